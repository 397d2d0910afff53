"""The server is one for OpenAI's clients, and says what the engine says; whatever is sent, it answers, and goes on."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch
from conftest import ROOT, assert_refused

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from chat import Chat, Config  # noqa: E402
from model import GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.generate import generate
from nanochatgpt.sampling import ChatSampling  # noqa: E402
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel

HI = [{"role": "user", "content": "Hello! My name is Nora."}]
NO_END = {"50256": -100}  # the model never ends its reply


def client(server, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": 30} | options
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


@pytest.fixture(scope="module")
def ask(chat_server):
    """Ask the server's model: ask(messages, ...) -> completion."""
    api = client(chat_server)

    def create(messages=HI, **options):
        extra = {
            name: options.pop(name)
            for name in ("top_k", "min_p", "best_of", "truncation")
            if name in options
        }
        return api.chat.completions.create(
            model="nano", messages=messages, extra_body=extra, **options
        )

    return create


@pytest.fixture(scope="module")
def nano():
    """The model that the server has, as the server has it."""
    return load_model("nano", dtype=torch.float16, inference=True)


def expected(nano, messages, seed, **sampling):
    """Return the text of the reply by `generate`."""
    model, tokenizer = nano
    prompt, _ = tokenizer.render(messages, add_generation_prompt=True)
    options = vars(ChatSampling()) | sampling
    stops = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
    ids = generate(model, [prompt], tokenizer=tokenizer, seed=seed, **stops, **options)[0]
    return tokenizer.decode(ids).strip()


def post(server, path="/v1/chat/completions", data=None, **options):
    return requests.post(server.url + path, data=data, timeout=30, **options)


def value(server, name):
    """Return one of the server's metrics."""
    lines = requests.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"nanochatgpt_{name} "))


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# what OpenAI's client asks for


def test_a_reply_is_the_engines_and_its_usage_is_counted(ask, nano):
    found = ask(seed=7)
    (choice,) = found.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert choice.message.content == expected(nano, HI, 7)
    prompt, _ = nano[1].render(HI, add_generation_prompt=True)
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == len(nano[1].encode(f" {choice.message.content}"))
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"top_p": 0.5, "top_k": 5, "presence_penalty": 1.5}],
    ids=str,
)
def test_options_mean_what_they_mean_to_the_engine(ask, nano, options):
    assert ask(seed=3, **options).choices[0].message.content == expected(nano, HI, 3, **options)


def test_streamed_it_is_the_same_in_pieces(ask):
    whole = ask(seed=7)
    chunks = list(ask(seed=7, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len([p for p in pieces if p]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert (
        chunks[-1].choices == []
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(seed=7, stream=True))


def test_of_n_replies_each_has_the_seed_after_the_one_before(ask, nano):
    found = ask(n=3, seed=20, temperature=1.2)
    texts = [choice.message.content for choice in found.choices]
    assert texts == [expected(nano, HI, 20 + i, temperature=1.2) for i in range(3)]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in ask(n=3, seed=20, temperature=1.2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_without_a_seed_replies_differ(ask):
    assert len({ask(temperature=1.5).choices[0].message.content for _ in range(6)}) > 1


@pytest.mark.parametrize("stop", ["o", ["zzz", "Nora"], "Nora."])
def test_it_stops_before_a_stop_string(ask, nano, stop):
    text = expected(nano, HI, 7)
    ends = [text.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each in text]
    assert ends, text
    for streamed in (False, True):
        found = ask(seed=7, stop=stop, stream=streamed)
        parts = list(found) if streamed else []
        reply = (
            "".join(p.choices[0].delta.content or "" for p in parts)
            or found.choices[0].message.content
        )
        assert reply == text[: min(ends)].rstrip()
        assert (parts[-1] if streamed else found).choices[0].finish_reason == "stop"


def test_max_tokens_by_both_names_cut_a_reply(ask):
    for name in ("max_tokens", "max_completion_tokens"):
        found = ask(logit_bias=NO_END, **{name: 5})
        assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 5


def test_logprobs_are_the_models_own(ask, nano):
    model, tokenizer = nano
    found = ask(seed=7, logprobs=True, top_logprobs=3)
    content = found.choices[0].logprobs.content
    assert (
        b"".join(bytes(token.bytes) for token in content).decode().strip()
        == found.choices[0].message.content
    )
    assert len(content) == found.usage.completion_tokens
    prompt, _ = tokenizer.render(HI, add_generation_prompt=True)
    ids = tokenizer.encode("".join(token.token for token in content))
    logprobs = (
        model(torch.tensor([prompt + ids]))[0][0, len(prompt) - 1 : -1].float().log_softmax(-1)
    )
    for token, i, row in zip(content, ids, logprobs, strict=True):
        assert token.logprob == pytest.approx(row[i].item(), abs=1e-2)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-2
        )
        assert [tokenizer.encode(top.token)[0] for top in token.top_logprobs] == row.topk(
            3
        ).indices.tolist()
    chunks = ask(seed=7, logprobs=True, top_logprobs=3, stream=True)
    streamed = [
        token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_a_logit_bias_forces_and_bans(ask, nano):
    token = nano[1].encode(" tea")[0]
    assert (
        ask(logit_bias={str(token): 100}, max_tokens=3).choices[0].message.content == "tea tea tea"
    )
    said = nano[1].encode(f" {ask(seed=7).choices[0].message.content}")
    banned = {str(token): -100 for token in said}
    assert not set(said) & set(
        nano[1].encode(f" {ask(seed=7, logit_bias=banned).choices[0].message.content}")
    )


def test_completions_go_on_with_texts_and_with_ids(chat_server, nano):
    model, tokenizer = nano
    api = client(chat_server)
    options = {"max_tokens": 8, "temperature": 0, "frequency_penalty": 0}
    prompts = ["The little girl", "Once upon a time"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    plain = {
        "max_new_tokens": 8,
        "temperature": 0,
        "tokenizer": tokenizer,
        "stop_ids": tokenizer.stop_ids,
    }
    texts = [tokenizer.decode(new) for new in generate(model, ids, **plain)]
    for prompt in (prompts, ids):
        found = api.completions.create(model="nano", prompt=prompt, **options)
        assert [choice.text for choice in found.choices] == texts
        assert (
            found.usage.prompt_tokens == sum(map(len, ids)) and found.usage.completion_tokens == 16
        )
    streamed = ["", ""]
    for chunk in api.completions.create(model="nano", prompt=prompts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    (choice,) = api.completions.create(model="nano", prompt=ids[0], logprobs=2, **options).choices
    assert "".join(choice.logprobs.tokens) == texts[0] and len(choice.logprobs.top_logprobs[0]) == 2
    assert choice.logprobs.text_offset == [
        texts[0].index(t, at)
        for t, at in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
    ]


def test_messages_may_be_parts_and_developers_are_the_system(ask, nano):
    persona = {"role": "system", "content": "i am a zookeeper."}
    parts = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hello! "},
                {"type": "text", "text": "My name is Nora."},
            ],
        }
    ]
    text = expected(nano, [persona, *HI], 5)
    assert ask([persona, *HI], seed=5).choices[0].message.content == text
    assert (
        ask([{**persona, "role": "developer"}, *parts], seed=5).choices[0].message.content == text
    )


def test_what_asks_for_nothing_is_no_matter_and_a_reply_can_be_sent_back_as_it_came(
    ask, chat_server
):
    reply = ask(seed=7).choices[0].message
    again = ask(
        [*HI, reply, {"role": "user", "content": "What is my name?"}],
        tools=[],
        response_format={"type": "text"},
    )
    assert again.choices[0].message.content
    nulls = dict.fromkeys(
        ("temperature", "stop", "seed", "tools", "user", "logit_bias", "stream_options", "n")
    )
    assert post(chat_server, json={"model": "nano", "messages": HI} | nulls).status_code == 200


def test_the_next_turn_computes_only_what_is_new(ask):
    messages = [
        {"role": "user", "content": f"I would like to tell you about my {'dog ' * 40}today."}
    ]
    first = ask(messages, seed=1)
    turn = [*messages, {"role": "assistant", "content": first.choices[0].message.content}, *HI]
    found = ask(turn, seed=1).usage
    assert found.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_models_are_listed_and_described(chat_server):
    api = client(chat_server)
    assert [model.id for model in api.models.list()] == ["nano"]
    assert api.models.retrieve("nano").context_length == 512
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-5")


def test_many_at_once_get_what_each_gets_alone(ask):
    talks = [
        [{"role": "user", "content": f"I have {n} dogs. {'How are you? ' * (n % 5)}"}]
        for n in range(30)
    ]
    alone = [ask(talk, temperature=0).choices[0].message.content for talk in talks]
    with ThreadPoolExecutor(30) as threads:
        together = list(
            threads.map(lambda talk: ask(talk, temperature=0).choices[0].message.content, talks)
        )
    assert together == alone and len(set(alone)) > 5


# what is refused, and how


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"n": "3"}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"messages": HI * 1001}, "1000"),
        ({"logit_bias": {"50257": 1}}, "logit_bias"),
        ({"logit_bias": {"tea": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"best_of": 4}, "best_of"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"seed": 2**63}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "role"),
        ({"messages": [{"role": "system", "content": "alone"}]}, "messages"),
        ({"messages": [*HI, {"role": "system", "content": "late"}, *HI]}, "messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "content",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_or_not_supported_is_refused_by_name(chat_server, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        extra = {name: value for name, value in options.items() if name != "messages"}
        client(chat_server).chat.completions.create(
            model="nano", messages=options.get("messages", HI), extra_body=extra
        )
    assert set(refused.value.body) == {"message", "type", "param", "code"}
    assert param in f"{refused.value.body['param']} {refused.value.body['message']}"


def test_another_model_is_not_found(chat_server):
    with pytest.raises(openai.NotFoundError, match="gpt-5") as refused:
        client(chat_server).chat.completions.create(model="gpt-5", messages=HI)
    assert refused.value.code == "model_not_found"


def test_what_is_too_long_for_the_context_is_refused_with_its_length_or_loses_its_beginning(
    ask, nano, monkeypatch
):
    prompts = []
    monkeypatch.setattr(
        "chat.stream",
        lambda _, __, prompt, *___, **____: (prompts.append(prompt), iter(["ok."]))[1],
    )
    chat = Chat(Config(device="cpu", persona="i am a zookeeper."))
    for n in range(60):
        list(chat.reply(f"I have {n} dogs, and they like me."))
    talk, n = (
        chat.messages[:-1],
        len(nano[1].render(chat.messages[:-1], add_generation_prompt=True)[0]),
    )
    with pytest.raises(openai.BadRequestError, match=f"512 .* {n}") as refused:
        ask(talk)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(max_tokens=510)
    found = ask(talk, truncation="auto", seed=9)  # as chat.py has it
    assert found.usage.prompt_tokens == len(prompts[-1]) < n
    model, tokenizer = nano
    stops = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
    ids = generate(
        model, prompts[-1:], tokenizer=tokenizer, seed=9, **stops, **vars(ChatSampling())
    )[0]
    assert found.choices[0].message.content == tokenizer.decode(ids).strip()


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
    for path in ("/v1/chat/completions", "/v1/completions", "/feedback"):
        found = post(chat_server, path, data, headers={"Content-Type": "application/json"})
        assert (
            found.status_code == 400 and found.json()["error"]["type"] == "invalid_request_error"
        ), found.text


def test_half_a_character_is_taken_for_an_unknown_one(chat_server):
    found = post(chat_server, json={"messages": [{"role": "user", "content": "\ud800"}]})
    assert found.status_code == 200 and found.json()["usage"]["prompt_tokens"] > 4


def test_a_body_of_another_type_is_refused(chat_server):
    body = json.dumps({"messages": HI})
    assert post(chat_server, data=body, headers={"Content-Type": "text/plain"}).status_code == 400


def test_a_body_that_is_too_large_is_refused_also_where_its_length_is_not_said(chat_server):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    headers = {"Content-Type": "application/json"}
    assert post(chat_server, data=body, headers=headers).status_code == 413
    parts = (body[i : i + 65536] for i in range(0, len(body), 65536))
    assert post(chat_server, data=parts, headers=headers).status_code == 413
    with pytest.raises(openai.APIStatusError, match="413"):
        client(chat_server).completions.create(model="nano", prompt="x" * 2_000_000)


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/../serve.py", "/%2e%2e/serve.py", "/serving/page.html", "//etc/passwd", "/docs"],
)
def test_there_is_nothing_but_what_is_served(chat_server, path):
    found = requests.get(chat_server.url + path, timeout=30)
    assert found.status_code == 404 and found.json()["error"]["message"]


def test_a_wrong_method_is_refused(chat_server):
    found = requests.get(f"{chat_server.url}/v1/chat/completions", timeout=30)
    assert found.status_code == 405 and "error" in found.json()


def test_a_page_of_another_name_or_origin_gets_nothing(chat_server):
    assert (
        requests.get(
            f"{chat_server.url}/v1/models", headers={"Host": "evil.example"}, timeout=30
        ).status_code
        == 403
    )
    found = post(chat_server, json={"messages": HI}, headers={"Origin": "https://evil.example"})
    assert not any(name.lower().startswith("access-control") for name in found.headers)


def test_the_page_may_load_nothing_from_elsewhere(chat_server):
    found = requests.get(f"{chat_server.url}/", timeout=30)
    assert (
        found.status_code == 200
        and "default-src 'none'" in found.headers["Content-Security-Policy"]
    )
    assert (
        "http://" not in found.text.replace("http://www.w3.org/2000/svg", "")
        and "https://" not in found.text
    )


# keys, limits, who leaves and who dawdles


def test_with_a_key_nothing_but_the_page_is_open(serving):
    with serving(
        "--cors=https://example.org", env={"NANOCHATGPT_API_KEY": "open-sesame"}
    ) as server:
        for api in (client(server), client(server, api_key="open-sesamE")):
            with pytest.raises(openai.AuthenticationError):
                api.chat.completions.create(model="nano", messages=HI)
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert requests.get(server.url + path, timeout=30).status_code == 401
        for path in ("/", "/health"):
            assert requests.get(server.url + path, timeout=30).status_code == 200
        assert (
            client(server, api_key="open-sesame")
            .chat.completions.create(model="nano", messages=HI)
            .choices
        )
        allowed = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        found = requests.options(f"{server.url}/v1/chat/completions", headers=allowed, timeout=30)
        assert found.headers["Access-Control-Allow-Origin"] == "https://example.org"


@pytest.fixture(scope="module")
def narrow(serving):
    """A server with room for one reply, and for one that waits; requests have to be sent within a second."""
    with serving(
        "--max_rows=1", "--max_queue=1", "--request_seconds=1", "--max_seconds=8"
    ) as server:
        yield server


def endless(server, **options):
    """Return a stream of 400 tokens."""
    options = {
        "max_tokens": 400,
        "logit_bias": NO_END,
        "stream": True,
        "temperature": 1.5,
    } | options
    return client(server).chat.completions.create(model="nano", messages=HI, **options)


def test_who_leaves_makes_room_at_once_and_who_finds_none_is_told_when_to_come_again(narrow):
    running = endless(narrow)
    next(iter(running))
    waiting = threading.Thread(target=lambda: list(endless(narrow, max_tokens=2)))
    waiting.start()
    wait_until(lambda: value(narrow, "queued_replies") == 1)
    with pytest.raises(openai.RateLimitError) as refused:
        client(narrow).chat.completions.create(model="nano", messages=HI)
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert value(narrow, "running_replies") == 1
    running.close()
    waiting.join()
    wait_until(lambda: value(narrow, "running_replies") == 0)


def test_who_gives_up_waiting_for_a_whole_reply_frees_its_place(narrow):
    with pytest.raises(openai.APITimeoutError):
        client(narrow, timeout=0.3).chat.completions.create(
            model="nano", messages=HI, max_tokens=400, logit_bias=NO_END
        )
    wait_until(lambda: value(narrow, "running_replies") == 0, seconds=1)


def test_a_request_that_is_not_sent_is_answered_or_closed_and_others_go_on(narrow):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begun = time.monotonic()
    half = socket.create_connection(("127.0.0.1", narrow.port))
    half.sendall(head + b'Content-Length: 100\r\n\r\n{"mess')
    silent, headless = (socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(2))
    headless.sendall(head)
    assert list(endless(narrow, max_tokens=20))
    for connection in (half, silent, headless):
        connection.settimeout(10)
    assert half.recv(1000).startswith(b"HTTP/1.1 408")
    assert silent.recv(1000) == b"" and headless.recv(1000) == b""
    assert time.monotonic() - begun < 8


def test_a_reply_whose_time_is_over_is_cut_and_what_waited_too_long_is_told_so(serving):
    with serving("--max_rows=1", "--max_queue=5", "--max_seconds=0.5") as server:
        # four of one request, whose time is over at once: one runs then, of those behind it not all can have begun
        options = {"max_tokens": 490, "logit_bias": NO_END, "stream": True}
        ended = []
        with pytest.raises(openai.APIError, match="turn"):
            for chunk in client(server).completions.create(
                model="nano", prompt=["a"] * 4, **options
            ):
                ended.append(chunk.choices[0].finish_reason)
        assert "length" in ended
        assert list(endless(server, max_tokens=3))


def test_slow_readers_and_idle_connections_hold_up_nobody(chat_server):
    idle = [socket.create_connection(("127.0.0.1", chat_server.port)) for _ in range(200)]
    body = json.dumps(
        {
            "messages": HI,
            "max_tokens": 400,
            "logit_bias": NO_END,
            "stream": True,
            "n": 8,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", chat_server.port))
    slow.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_until(lambda: value(chat_server, "running_replies") == 8)
    assert len(list(endless(chat_server, max_tokens=50))) > 3
    wait_until(
        lambda: value(chat_server, "running_replies") == 0, seconds=60
    )  # though nobody reads
    for connection in (slow, *idle):
        connection.close()
    assert list(endless(chat_server, max_tokens=5))


# being stopped


def test_stopped_it_lets_replies_end_and_takes_no_new_ones(serving):
    with serving() as server:
        running = iter(endless(server, max_tokens=300))
        next(running)
        server.process.terminate()
        assert [chunk.choices[0].finish_reason for chunk in running][-1] == "length"
        assert server.process.wait(10) == 0
        with pytest.raises(openai.APIConnectionError):
            client(server).models.list()


def test_stopped_it_waits_no_longer_than_its_grace_and_stopped_twice_not_at_all(serving):
    body = json.dumps(
        {"messages": HI, "max_tokens": 480, "logit_bias": NO_END, "n": 8, "stream": True}
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for grace, signals in ((1, 1), (60, 2)):
        with serving(f"--grace={grace}", "--max_rows=8") as server:
            reading = socket.create_connection(("127.0.0.1", server.port))
            reading.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            reading.recv(10)
            begun = time.monotonic()
            for _ in range(signals):
                server.process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            assert server.process.wait(20) == 0 and time.monotonic() - begun < 8
            assert "8 replies" in server.printed.read_text()


def test_interrupted_while_it_loads_it_ends_without_a_crash(serving, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "serve.py"), f"--port={port}", "--init_from=random:gpt2"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    def listens():  # which it does before it loads
        with socket.socket() as trying:
            return trying.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, seconds=60)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) in (0, 130)
    assert "terminate" not in started.stderr.read()


def test_who_leaves_while_the_best_of_many_is_chosen_or_in_mid_body_leaves_nothing_broken(
    serving, tmp_path
):
    torch.manual_seed(0)
    save_model(RewardModel(GPTConfig(512, 50257, 2, 2, 32)), Tokenizer(), tmp_path / "reward")
    with serving(f"--reward={tmp_path / 'reward'}") as server:
        body = json.dumps({"messages": HI, "max_tokens": 2, "best_of": 16}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for n in range(30):
            leaving = socket.create_connection(("127.0.0.1", server.port))
            leaving.sendall(
                f"{head}Content-Length: {len(body)}\r\n\r\n".encode()
                + body[: None if n % 3 else 20]
            )
            time.sleep(0.01 * n)
            leaving.close()
        assert requests.get(f"{server.url}/health", timeout=30).status_code == 200
        assert client(server).chat.completions.create(model="nano", messages=HI).choices


def test_it_says_where_it_is_and_one_line_a_request_without_what_is_said(serving):
    with serving() as server:
        found = client(server).chat.completions.create(model="nano", messages=HI)
        requests.get(f"{server.url}/a%0Ab%1b[31m", timeout=30)
        assert server.stop() == 0
        first, chat, other = server.printed.read_text().splitlines()
        assert server.url in first and "nano" in first
        assert (
            "/v1/chat/completions 200 " in chat
            and f" {found.usage.prompt_tokens} + {found.usage.completion_tokens} tokens" in chat
        )
        assert "Nora" not in chat and "\x1b" not in other and "404" in other
    with serving("--log_text=true") as server:
        client(server).chat.completions.create(model="nano", messages=HI)
        assert server.stop() == 0
        assert "My name is Nora." in server.printed.read_text()


# feedback, metrics, best-of


def test_thumbs_are_kept_as_retry_reads_them(chat_server, tmp_path):
    from prepare.retry import examples

    talk = [*HI, {"role": "assistant", "content": "hi nora"}]
    for label in (1, 0):
        assert (
            post(chat_server, "/feedback", json={"messages": talk, "label": label}).status_code
            == 204
        )
    *_, liked, disliked = map(json.loads, chat_server.feedback.read_text().splitlines())
    assert examples(liked)[1] == [(talk, 1)] and examples(disliked)[1] == [(talk, 0)]
    for wrong in ({"messages": HI, "label": 1}, {"messages": talk, "label": 2}, {"messages": talk}):
        assert post(chat_server, "/feedback", json=wrong).status_code == 400


def test_metrics_count_what_is_asked_and_said(serving):
    with serving() as server:
        found = [
            client(server).chat.completions.create(model="nano", messages=HI).usage
            for _ in range(3)
        ]
        assert value(server, "prompt_tokens_total") == sum(usage.prompt_tokens for usage in found)
        assert value(server, "generated_tokens_total") == sum(
            usage.completion_tokens for usage in found
        )
        assert (
            value(server, "first_token_seconds_count")
            == value(server, "reply_tokens_per_second_count")
            == 3
        )
        text = requests.get(f"{server.url}/metrics", timeout=30).text
        assert 'requests_total{path="/v1/chat/completions",status="200"} 3.0' in text


def test_the_best_of_many_is_the_reward_models_choice(serving, tmp_path, nano):
    torch.manual_seed(0)
    reward_model = RewardModel(GPTConfig(512, 50257, 2, 2, 32))
    torch.nn.init.normal_(reward_model.score.weight)
    save_model(reward_model, Tokenizer(), tmp_path / "reward")
    with serving(
        f"--reward={tmp_path / 'reward'}", "--temperature=1.3", "--dtype=float32"
    ) as server:
        api = client(server).chat.completions
        every = api.create(model="nano", messages=HI, n=8, seed=5)
        best = api.create(model="nano", messages=HI, n=2, seed=5, extra_body={"best_of": 8})
        assert best.usage.completion_tokens == every.usage.completion_tokens
        loaded, tokenizer = load_model(str(tmp_path / "reward"), model_class=RewardModel)
        texts = [choice.message.content for choice in every.choices]
        prompt, _ = tokenizer.render(HI, add_generation_prompt=True)
        scores = [
            loaded(
                torch.tensor([prompt + tokenizer.encode(f" {text}")]),
                torch.tensor([len(prompt + tokenizer.encode(f" {text}"))]),
            ).item()
            for text in texts
        ]
        order = sorted(range(8), key=lambda i: -scores[i])
        assert [choice.message.content for choice in best.choices] == [texts[i] for i in order[:2]]
        chunks = list(
            api.create(model="nano", messages=HI, seed=5, stream=True, extra_body={"best_of": 8})
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == texts[order[0]]
        with pytest.raises(openai.BadRequestError, match="best_of"):
            api.create(model="nano", messages=HI, n=4, extra_body={"best_of": 2})


# what is refused at the start


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host=0.0.0.0"], ["0.0.0.0", "--api_key", "--allow_open"]),
        (["--host=no.such.host.invalid", "--allow_open=true"], ["no.such.host.invalid"]),
        (["--port=70000"], ["70000"]),
        (["--max_rows=0"], ["max_rows=0"]),
        (["--cors=example.org"], ["example.org"]),
        (["--feedback=/"], ["feedback=/"]),
        (["--api_key=schlüssel"], ["API key"]),
        (["--max_queue=-1"], ["max_queue=-1"]),
        (["--init_from=nowhere"], ["nowhere"]),
        (["--reward=nowhere"], ["nowhere"]),
    ],
    ids=str,
)
def test_a_bad_start_is_refused(script, args, words):
    assert_refused(script("serve.py", "--port=0", *args), *words)


def test_a_port_in_use_is_refused_with_the_remedy(script, chat_server):
    assert_refused(
        script("serve.py", f"--port={chat_server.port}"), chat_server.port, "taken", "--port=0"
    )
