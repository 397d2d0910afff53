"""serve.py speaks OpenAI's protocol, says what the engine says, and survives what clients do."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import ROOT, assert_refused

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from chat import Chat, Config  # noqa: E402
from model import GPTConfig  # noqa: E402
from nanochatgpt.checkpoint import load_model, save_model  # noqa: E402
from nanochatgpt.generate import generate  # noqa: E402
from nanochatgpt.sampling import ChatSampling  # noqa: E402
from nanochatgpt.tokenizer import Tokenizer  # noqa: E402
from rlhf.reward_model import RewardModel  # noqa: E402

HI = [{"role": "user", "content": "Hello! My name is Nora."}]
NO_END = {"50256": -100}  # the model never ends its reply
EXTRA = ("top_k", "min_p", "best_of", "truncation")  # options that OpenAI's client does not know
CHAT = "/v1/chat/completions"


def client(server, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": 30} | options
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


def chat(server, messages=HI, **options):
    """Ask for a chat completion."""
    extra = {name: options.pop(name) for name in EXTRA if name in options}
    completions = client(server).chat.completions
    return completions.create(model="nano", messages=messages, extra_body=extra, **options)


@pytest.fixture(scope="module")
def ask(chat_server):
    """Ask the shared server: ask(messages, ...) -> completion."""
    return lambda messages=HI, **options: chat(chat_server, messages, **options)


@pytest.fixture(scope="module")
def nano():
    """(model, tokenizer) of the server, loaded as the server loads them."""
    return load_model("nano", dtype=torch.float16, inference=True)


def generated(nano, prompt, seed, stop_strings=(), **changes):
    """Return the text after a prompt of ids by `generate`, with the sampling of a chat."""
    model, tokenizer = nano
    sampling = ChatSampling(**changes)
    stops = {"stop_ids": tokenizer.stop_ids, "stop_strings": stop_strings}
    ids = generate(model, [prompt], sampling, tokenizer=tokenizer, seed=seed, **stops)[0]
    return tokenizer.decode(ids)


def expected(nano, messages, seed, **changes):
    """Return the text of the reply to a conversation."""
    prompt, _ = nano[1].render(messages, add_generation_prompt=True)
    return generated(nano, prompt, seed, nano[1].stop_strings, **changes).strip()


def content(completion):
    """Return the text of the first choice."""
    return completion.choices[0].message.content


def streamed(chunks, n=1):
    """Return the texts of n choices that came in chunks."""
    texts = [""] * n
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return texts


def post(server, path=CHAT, data=None, **options):
    return requests.post(server.url + path, data=data, timeout=30, **options)


def get(server, path, **options):
    return requests.get(server.url + path, timeout=30, **options)


def metric(server, name):
    for line in get(server, "/metrics").text.splitlines():
        if line.startswith(f"nanochatgpt_{name} "):
            return float(line.split()[1])
    raise KeyError(name)


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def connect(server, data=b""):
    """Return a socket on which these bytes have been sent."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(data)
    return connection


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


def raw(**options):
    """Return the bytes of a request for a chat."""
    body = json.dumps({"messages": HI} | options).encode()
    return HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def endless(server, **options):
    """Return a stream of 480 tokens."""
    options = {"max_tokens": 480, "temperature": 1.5} | options
    return chat(server, logit_bias=NO_END, stream=True, **options)


# ---- what OpenAI's client asks for


def test_a_reply_is_the_engines_and_its_usage_is_counted(ask, nano):
    completion = ask(seed=7)
    (choice,) = completion.choices
    usage = completion.usage
    assert choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert choice.message.content == expected(nano, HI, 7)
    assert usage.prompt_tokens == len(nano[1].render(HI, add_generation_prompt=True)[0])
    assert usage.completion_tokens == len(nano[1].encode(f" {choice.message.content}"))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


SAMPLING = [{}, {"temperature": 0}, {"top_p": 0.5, "top_k": 5, "presence_penalty": 1.5}]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_options_mean_what_they_mean_to_the_engine(ask, nano, options):
    assert content(ask(seed=3, **options)) == expected(nano, HI, 3, **options)


def test_a_stream_gives_the_same_reply_in_pieces(ask):
    whole = ask(seed=7)
    chunks = list(ask(seed=7, stream=True, stream_options={"include_usage": True}))
    *choices, last = chunks
    assert streamed(chunks) == [content(whole)]
    assert sum(bool(chunk.choices[0].delta.content) for chunk in choices) > 1
    assert choices[0].choices[0].delta.role == "assistant"
    assert choices[-1].choices[0].finish_reason == "stop"
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(seed=7, stream=True))


def test_each_of_n_replies_has_the_next_seed(ask, nano):
    options = {"n": 3, "seed": 20, "temperature": 1.2}
    completion = ask(**options)
    texts = [choice.message.content for choice in completion.choices]
    assert texts == [expected(nano, HI, 20 + i, temperature=1.2) for i in range(3)]
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert streamed(ask(**options, stream=True), 3) == texts


def test_without_a_seed_replies_differ(ask):
    assert len({content(ask(temperature=1.5)) for _ in range(6)}) > 1


@pytest.mark.parametrize("stop", ["o", ["zzz", "Nora"], "Nora."])
def test_a_stop_string_ends_a_reply(ask, nano, stop):
    text = expected(nano, HI, 7)
    stops = [stop] if isinstance(stop, str) else stop
    expected_text = text[: min(text.find(each) for each in stops if each in text)].rstrip()
    completion = ask(seed=7, stop=stop)
    chunks = list(ask(seed=7, stop=stop, stream=True))
    assert content(completion) == streamed(chunks)[0] == expected_text
    assert completion.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_cut_a_reply(ask, name):
    completion = ask(logit_bias=NO_END, **{name: 5})
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 5


def test_logprobs_are_the_models_own(ask, nano):
    model, tokenizer = nano
    options = {"seed": 7, "logprobs": True, "top_logprobs": 3}
    completion = ask(**options)
    tokens = completion.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert text.strip() == content(completion)
    assert len(tokens) == completion.usage.completion_tokens

    # compare with a forward pass over the whole text
    prompt, _ = tokenizer.render(HI, add_generation_prompt=True)
    ids = tokenizer.encode(text)
    logits = model(torch.tensor([prompt + ids]))[0][0, len(prompt) - 1 : -1]
    for token, i, row in zip(tokens, ids, logits.float().log_softmax(-1), strict=True):
        values, top = row.topk(3)
        assert token.logprob == pytest.approx(row[i].item(), abs=1e-2)
        assert [each.logprob for each in token.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-2
        )
        assert [tokenizer.encode(each.token) for each in token.top_logprobs] == [
            [each] for each in top.tolist()
        ]

    chunked = []
    for chunk in ask(**options, stream=True):
        if chunk.choices[0].logprobs:
            chunked += chunk.choices[0].logprobs.content
    assert [token.token for token in chunked] == [token.token for token in tokens]


def test_a_logit_bias_forces_and_bans(ask, nano):
    encode = nano[1].encode
    tea = str(encode(" tea")[0])
    assert content(ask(logit_bias={tea: 100}, max_tokens=3)) == "tea tea tea"
    ids = encode(f" {content(ask(seed=7))}")
    others = content(ask(seed=7, logit_bias={str(token): -100 for token in ids}))
    assert not set(ids) & set(encode(f" {others}"))


def test_completions_continue_texts_and_ids(chat_server, nano):
    tokenizer = nano[1]
    create = client(chat_server).completions.create
    options = {"model": "nano", "max_tokens": 8, "temperature": 0, "frequency_penalty": 0}
    prompts = ["The little girl", "Once upon a time"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    plain = {"max_new_tokens": 8, "temperature": 0, "frequency_penalty": 0}
    texts = [generated(nano, prompt, seed=0, **plain) for prompt in ids]
    for prompt in (prompts, ids):
        completion = create(prompt=prompt, **options)
        assert [choice.text for choice in completion.choices] == texts
        assert completion.usage.prompt_tokens == sum(map(len, ids))
        assert completion.usage.completion_tokens == 16
    chunked = ["", ""]
    for chunk in create(prompt=prompts, stream=True, **options):
        chunked[chunk.choices[0].index] += chunk.choices[0].text
    assert chunked == texts

    logprobs = create(prompt=ids[0], logprobs=2, **options).choices[0].logprobs
    assert "".join(logprobs.tokens) == texts[0] and len(logprobs.top_logprobs[0]) == 2


def test_messages_may_be_parts_and_developers_are_the_system(ask, nano):
    persona = {"role": "system", "content": "i am a zookeeper."}
    parts = [{"type": "text", "text": "Hello! "}, {"type": "text", "text": "My name is Nora."}]
    text = expected(nano, [persona, *HI], 5)
    assert content(ask([persona, *HI], seed=5)) == text
    developer = persona | {"role": "developer"}
    assert content(ask([developer, {"role": "user", "content": parts}], seed=5)) == text


def test_no_ops_are_accepted_and_a_reply_can_be_sent_back(ask, chat_server):
    reply = ask(seed=7).choices[0].message
    question = {"role": "user", "content": "What is my name?"}
    assert content(ask([*HI, reply, question], tools=[], response_format={"type": "text"}))
    names = ["temperature", "stop", "seed", "tools", "user", "logit_bias", "stream_options", "n"]
    nulls = dict.fromkeys(names)
    assert post(chat_server, json={"model": "nano", "messages": HI} | nulls).status_code == 200


def test_the_next_turn_computes_only_what_is_new(ask):
    text = f"I would like to tell you about my {'dog ' * 40}today."
    messages = [{"role": "user", "content": text}]
    first = ask(messages, seed=1)
    turns = [*messages, {"role": "assistant", "content": content(first)}, *HI]
    details = ask(turns, seed=1).usage.prompt_tokens_details
    assert details.cached_tokens >= first.usage.prompt_tokens


def test_models_are_listed_and_described(chat_server):
    models = client(chat_server).models
    assert [model.id for model in models.list()] == ["nano"]
    assert models.retrieve("nano").context_length == 512
    with pytest.raises(openai.NotFoundError):
        models.retrieve("gpt-5")


def test_many_clients_get_what_each_gets_alone(ask):
    def reply(n):
        text = f"I have {n} dogs. {'How are you? ' * (n % 5)}"
        return content(ask([{"role": "user", "content": text}], temperature=0, max_tokens=12))

    alone = [reply(n) for n in range(16)]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(reply, range(16))) == alone
    assert len(set(alone)) > 3


# ---- what is refused


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"n": "3"}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 1000}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"logit_bias": {"50257": 1}}, "logit_bias"),
        ({"logit_bias": {"tea": 1}}, "logit_bias.tea"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"best_of": 4}, "best_of"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"seed": 2**63}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": HI * 1001}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages.0.role"),
        ({"messages": [{"role": "system", "content": "alone"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages.0.content.0.image_url"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_and_unsupported_options_are_refused_by_name(chat_server, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client(chat_server).chat.completions.create(model="nano", messages=HI, extra_body=options)
    body = refused.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    assert body["param"] == param and body["type"] == "invalid_request_error"


def test_another_model_is_not_found(chat_server):
    with pytest.raises(openai.NotFoundError, match="nano") as refused:
        client(chat_server).chat.completions.create(model="gpt-5", messages=HI)
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_a_chat_too_long_for_the_context_is_refused_or_loses_its_oldest_turns(
    ask, nano, monkeypatch
):
    tokenizer = nano[1]
    prompts = []  # of chat.py in the same conversation

    def fake_stream(_engine, _tokenizer, prompt, *_, **__):
        prompts.append(prompt)
        return iter(["ok."])

    monkeypatch.setattr("chat.stream", fake_stream)
    talk = Chat(Config(device="cpu", persona="i am a zookeeper."))
    for n in range(60):
        list(talk.reply(f"I have {n} dogs, and they like me."))
    messages = talk.messages[:-1]
    n_tokens = len(tokenizer.render(messages, add_generation_prompt=True)[0])
    with pytest.raises(openai.BadRequestError, match=f"512 .* {n_tokens}") as refused:
        ask(messages)
    assert refused.value.code == "context_length_exceeded"

    completion = ask(messages, truncation="auto", seed=9)
    assert completion.usage.prompt_tokens == len(prompts[-1]) < n_tokens
    text = generated(nano, prompts[-1], 9, tokenizer.stop_strings)
    assert content(completion) == text.strip()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"hi"',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"\\ud800": 1, "messages": []}',
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "seed": 1e400}',
        b'{"messages": [{"role": "user", "content": "hi"}], "seed": 99999999999999999999999999}',
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
    ids=lambda data: str(data[:40]),
)
def test_a_body_that_is_no_request_is_refused(chat_server, data):
    for path in (CHAT, "/v1/completions", "/feedback"):
        response = post(chat_server, path, data, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_half_a_character_counts_as_an_unknown_one(chat_server):
    response = post(chat_server, json={"messages": [{"role": "user", "content": "\ud800"}]})
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] > 4


def test_a_body_of_another_type_is_refused(chat_server):
    body = json.dumps({"messages": HI})
    assert post(chat_server, data=body, headers={"Content-Type": "text/plain"}).status_code == 400


def test_a_body_that_is_too_large_is_refused_with_and_without_a_length(chat_server):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    parts = (body[i : i + 65536] for i in range(0, len(body), 65536))
    for data in (body, parts):
        response = post(chat_server, data=data, headers={"Content-Type": "application/json"})
        assert response.status_code == 413


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/../serve.py", "/%2e%2e/serve.py", "/serving/page.html", "//etc/passwd", "/docs"],
)
def test_no_file_is_served(chat_server, path):
    response = get(chat_server, path)
    assert response.status_code == 404 and response.json()["error"]["message"]


def test_a_wrong_method_is_refused(chat_server):
    response = get(chat_server, CHAT)
    assert response.status_code == 405 and "error" in response.json()


def test_a_page_of_another_name_or_origin_gets_nothing(chat_server):
    assert get(chat_server, "/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert get(chat_server, "/", headers={"Host": "localhost:8000"}).status_code == 200
    response = post(chat_server, json={"messages": HI}, headers={"Origin": "https://evil.example"})
    assert not any(name.lower().startswith("access-control") for name in response.headers)


def test_the_page_may_load_nothing_from_elsewhere(chat_server):
    response = get(chat_server, "/")
    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    html = response.text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in html and "https://" not in html


# ---- keys, limits, and clients that leave or dawdle


def test_with_a_key_only_the_page_is_open(serving):
    with serving("--api_key=open-sesame", "--cors=https://example.org") as server:
        for wrong in ("none", "open-sesamE"):
            with pytest.raises(openai.AuthenticationError) as refused:
                client(server, api_key=wrong).models.list()
            assert refused.value.code == "invalid_api_key"
        for path in ("/v1/models", "/metrics"):
            assert get(server, path).status_code == 401
        for path in (CHAT, "/v1/completions", "/feedback"):
            assert post(server, path, json={}).status_code == 401
        for path in ("/", "/health"):
            assert get(server, path).status_code == 200
        completions = client(server, api_key="open-sesame").chat.completions
        assert content(completions.create(model="nano", messages=HI))

        allowed = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        response = requests.options(server.url + CHAT, headers=allowed, timeout=30)
        assert response.headers["Access-Control-Allow-Origin"] == "https://example.org"


@pytest.fixture(scope="module")
def narrow(serving):
    """A server with one row and short time limits."""
    with serving("--max_rows=1", "--max_queue=8", "--max_seconds=2") as server:
        yield server


def test_clients_that_leave_make_room_and_too_many_are_told_when_to_come_again(narrow):
    before = metric(narrow, "generated_tokens_total")
    request = raw(max_tokens=480, logit_bias=NO_END, stream=True)
    connections = [connect(narrow, request) for _ in range(20)]  # one runs, eight may wait
    heads = [connection.recv(1000).lower() for connection in connections]
    refused = [head for head in heads if head.startswith(b"http/1.1 429")]
    assert 1 <= len(refused) <= 11 and all(b"\r\nretry-after: " in head for head in refused)
    assert metric(narrow, "running_replies") <= 1
    for connection in connections:
        connection.close()
    wait_until(lambda: metric(narrow, "running_replies") + metric(narrow, "queued_replies") == 0)
    assert metric(narrow, "generated_tokens_total") - before < 9 * 480
    assert content(chat(narrow))


def test_a_client_that_gives_up_waiting_frees_its_row(narrow):
    before = metric(narrow, "generated_tokens_total")
    with pytest.raises(openai.APITimeoutError):
        completions = client(narrow, timeout=0.2).chat.completions
        completions.create(model="nano", messages=HI, max_tokens=480, logit_bias=NO_END)
    wait_until(lambda: metric(narrow, "running_replies") == 0)
    assert metric(narrow, "generated_tokens_total") - before < 480


def test_a_request_that_is_not_sent_is_answered_and_others_go_on(narrow, monkeypatch):
    monkeypatch.setattr("serving.app.BODY_SECONDS", 0.5)
    half = connect(narrow, HEAD + b'Content-Length: 100\r\n\r\n{"mess')
    silent = connect(narrow)
    headless = connect(narrow, HEAD)
    assert list(endless(narrow, max_tokens=20))
    half.settimeout(10)
    assert half.recv(1000).startswith(b"HTTP/1.1 408")
    for connection in (half, silent, headless):
        connection.close()


def test_a_reply_is_cut_when_its_time_is_over_and_one_that_could_not_start_is_refused(narrow):
    options = {"max_tokens": 490, "logit_bias": NO_END, "stream": True}
    ends = []
    with pytest.raises(openai.APIError, match="time"):
        prompts = ["a"] * 9  # one after the other
        create = client(narrow).completions.create
        for chunk in create(model="nano", prompt=prompts, **options):
            ends.append(chunk.choices[0].finish_reason)
    assert "length" in ends
    assert list(endless(narrow, max_tokens=3))


def test_slow_readers_and_idle_connections_hold_up_nobody(chat_server):
    idle = [connect(chat_server) for _ in range(200)]
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", chat_server.port))
    much = {"stream": True, "logprobs": True, "top_logprobs": 20, "logit_bias": NO_END}
    slow.sendall(raw(n=4, max_tokens=100, **much))
    wait_until(lambda: metric(chat_server, "running_replies") == 4)
    assert len(list(endless(chat_server, max_tokens=50))) > 3
    wait_until(lambda: metric(chat_server, "running_replies") == 0, 60)  # though nobody reads
    for connection in (slow, *idle):
        connection.close()
    assert list(endless(chat_server, max_tokens=5))


def test_when_the_engine_has_stopped_requests_are_refused_at_once(serving):
    with serving() as server:
        server.service.scheduler.alive = False
        assert get(server, "/health").status_code == 503
        assert post(server, json={"messages": HI}).status_code == 503
        assert post(server, json={"messages": HI, "stream": True}).status_code == 503


# ---- shutting down


def test_when_stopped_it_lets_replies_end_and_takes_no_new_ones(tmp_path):
    command = [sys.executable, str(ROOT / "serve.py"), "--port=0", "--init_from=nano"]
    env = os.environ | {"NANOCHATGPT_API_KEY": "sesame", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    server = SimpleNamespace(url=re.search(r"http://[\d.]+:\d+", process.stdout.readline())[0])
    options = {"max_tokens": 300, "logit_bias": NO_END, "stream": True}
    completions = client(server, api_key="sesame").chat.completions
    running = completions.create(model="nano", messages=HI, **options)
    next(running)
    process.terminate()
    assert [chunk.choices[0].finish_reason for chunk in running][-1] == "length"
    assert process.wait(10) == 0
    with pytest.raises(openai.APIConnectionError):
        client(server).models.list()


@pytest.mark.parametrize(("grace", "signals"), [(0.5, 1), (60, 2)])
def test_it_stops_after_its_grace_or_a_second_signal(serving, grace, signals, monkeypatch, capsys):
    monkeypatch.setattr("serve.GRACE", grace)
    with serving() as server:
        reading = connect(server, raw(max_tokens=480, n=8, stream=True, logit_bias=NO_END))
        reading.recv(10)
        for _ in range(signals):
            server.stop()
            time.sleep(0.3)
        server.thread.join(20)
        assert not server.thread.is_alive()
        n_tokens = int(re.search(r"\d+ \+ (\d+) tokens", capsys.readouterr().out)[1])
        assert n_tokens < 8 * 480


@pytest.mark.slow
def test_interrupted_while_it_loads_it_ends_without_a_crash(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "serve.py"), f"--port={port}", "--init_from=nano"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    def listens():  # before it loads
        with socket.socket() as trying:
            return trying.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, seconds=60)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130)
    assert "terminate" not in process.stderr.read()


# ---- logs, feedback, metrics


def test_the_log_has_the_number_of_tokens_but_not_the_text(chat_server, capsys):
    usage = chat(chat_server).usage
    log = capsys.readouterr().out
    assert f" {usage.prompt_tokens} + {usage.completion_tokens} tokens" in log
    assert "Nora" not in log


def test_feedback_is_stored_as_retry_reads_it(chat_server):
    from prepare.retry import examples

    talk = [*HI, {"role": "assistant", "content": "hi nora"}]
    for label in (1, 0):
        response = post(chat_server, "/feedback", json={"messages": talk, "label": label})
        assert response.status_code == 204
    *_, liked, disliked = map(json.loads, chat_server.feedback.read_text().splitlines())
    assert examples(liked)[1] == [(talk, 1)] and examples(disliked)[1] == [(talk, 0)]
    for wrong in ({"messages": HI, "label": 1}, {"messages": talk, "label": 2}, {"messages": talk}):
        assert post(chat_server, "/feedback", json=wrong).status_code == 400


def test_metrics_count_requests_and_tokens(chat_server):
    names = ("prompt_tokens_total", "generated_tokens_total")
    before = [metric(chat_server, name) for name in names]
    usages = [chat(chat_server).usage for _ in range(3)]
    n_prompt, n_new = (
        metric(chat_server, name) - old for name, old in zip(names, before, strict=True)
    )
    assert n_prompt == sum(usage.prompt_tokens for usage in usages)
    assert n_new == sum(usage.completion_tokens for usage in usages)
    get(chat_server, "/nothing")
    assert 'nanochatgpt_refused_total{status="404"}' in get(chat_server, "/metrics").text


# ---- best of N


@pytest.fixture(scope="module")
def best_of_server(serving, tmp_path_factory):
    """A server with a random reward model in its folder `reward`."""
    torch.manual_seed(0)
    reward_model = RewardModel(GPTConfig(512, 50257, 2, 2, 32))
    torch.nn.init.normal_(reward_model.score.weight)
    folder = tmp_path_factory.mktemp("reward")
    save_model(reward_model, Tokenizer(), folder)
    with serving(f"--reward={folder}", "--temperature=1.3", "--dtype=float32") as server:
        server.reward = folder
        yield server


def test_the_best_of_n_is_the_reward_models_choice(best_of_server):
    options = {"seed": 5, "max_tokens": 12}
    every = chat(best_of_server, n=8, **options)
    best = chat(best_of_server, n=2, best_of=8, **options)
    assert best.usage.completion_tokens == every.usage.completion_tokens

    # score each reply by itself
    reward_model, tokenizer = load_model(str(best_of_server.reward), model_class=RewardModel)
    prompt, _ = tokenizer.render(HI, add_generation_prompt=True)
    scores = {}
    for choice in every.choices:
        ids = prompt + tokenizer.encode(f" {choice.message.content}")
        score = reward_model(torch.tensor([ids]), torch.tensor([len(ids)]))
        scores[choice.message.content] = score.item()
    order = sorted(scores, key=scores.get, reverse=True)
    assert [choice.message.content for choice in best.choices] == order[:2]
    assert streamed(chat(best_of_server, best_of=8, stream=True, **options)) == order[:1]


def test_clients_that_leave_in_mid_body_or_before_the_choice_break_nothing(best_of_server):
    request = raw(max_tokens=2, best_of=16)
    for n in range(20):
        leaving = connect(best_of_server, request if n % 3 else request[:200])
        time.sleep(0.01 * n)
        leaving.close()
    assert get(best_of_server, "/health").status_code == 200
    assert content(chat(best_of_server))


# ---- what is refused at the start


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host=0.0.0.0"], ["0.0.0.0", "--api_key", "--allow_open"]),
        (["--host=no.such.host.invalid", "--allow_open=true"], ["no.such.host.invalid"]),
        (["--port=70000"], ["70000"]),
        (["--max_rows=0"], ["max_rows=0"]),
        (["--max_queue=-1"], ["max_queue=-1"]),
        (["--init_from=nowhere"], ["nowhere"]),
        (["--reward=nowhere"], ["nowhere"]),
    ],
    ids=str,
)
def test_a_bad_start_is_refused(as_main, args, words):
    assert_refused(as_main("serve.py", "--port=0", "--device=cpu", *args), *words)


def test_a_port_in_use_is_refused_with_the_remedy(as_main, chat_server):
    assert_refused(as_main("serve.py", f"--port={chat_server.port}"), chat_server.port, "--port=0")


def test_without_the_extra_it_says_what_to_install(as_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "serving.app", raising=False)
    assert_refused(as_main("serve.py"), "uvicorn", "pip install -e '.[serve]'")
