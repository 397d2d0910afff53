"""What real clients send to serve.py is served, and what nobody can serve is refused by name."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import assert_refused

pytest.importorskip("fastapi")

from nanochatgpt.checkpoint import load_model
from nanochatgpt.generate import generate
from nanochatgpt.sampling import ChatSampling
from nanochatgpt.tokenizer import Tokenizer
from serving.service import Service

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
CONTEXT = 512  # of the model in the box
HI = [{"role": "user", "content": "Hello! My name is Nora."}]
NO_END = {"50256": -100}  # the model never ends its reply
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def post(server, path=CHAT, **body):
    return requests.post(server.url + path, json=body, timeout=60)


def ask(server, path=CHAT, **body):
    """Return the first choice of a response."""
    response = post(server, path, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def reply(server, messages=HI, **options):
    """Return the text of a reply."""
    return ask(server, messages=messages, **options)["message"]["content"]


def param(server, path=CHAT, **body):
    """Return the name of the field that is refused."""
    response = post(server, path, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    return error["param"]


def chunks(server, path=CHAT, **body):
    """Return the choices of the chunks of a stream."""
    lines = post(server, path, stream=True, **body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    return [choice for event in events for choice in event["choices"]]


@pytest.fixture(scope="module")
def exact_server(serving):
    """A server in float32, to compare numbers with."""
    with serving("--dtype=float32") as server:
        yield server


@pytest.fixture(scope="module")
def nano():
    """(model, tokenizer) of the server in float32."""
    return load_model("nano")


# ---- fields that ask for nothing, and fields that ask for what cannot be done

OPEN_WEBUI = {
    "model": "nano",
    "messages": [{"role": "user", "content": "Hello! My name is Nora.", "id": "6f1c", "files": []}],
    "params": {},
    "tool_servers": [],
    "features": {"image_generation": False, "code_interpreter": False, "web_search": False},
    "variables": {"{{USER_NAME}}": "Nora", "{{CURRENT_DATE}}": "2026-11-28"},
    "session_id": "vXw5",
    "chat_id": "0b1f",
    "id": "d5c6",
    "background_tasks": {"title_generation": True, "tags_generation": True},
    "metadata": {"user_id": "1", "task": None},
    "user": {"name": "Nora", "id": "1", "email": "nora@example.org", "role": "admin"},
}
LIBRECHAT = {
    "model": "nano",
    "messages": [{"role": "user", "content": [{"type": "text", "text": HI[0]["content"]}]}],
    "user": "66a0",
    "stop": ["||>", "\nUser:", "<|diff_marker|>"],
    "reasoning_effort": "medium",
    "verbosity": "low",
    "presence_penalty": 0,
    "promptPrefix": None,
    "service_tier": "auto",
    "store": True,
}
SILLYTAVERN = {
    "model": "nano",
    "messages": [{"role": "user", "content": "Hello! My name is Nora.", "name": "Nora"}],
    "max_tokens": 300,
    "top_k": -1,
    "stop": ["\nNora:", "\nBot:", "\nSystem:", "###", "</s>", "<|im_end|>", "Narrator:"],
    "logit_bias": {},
    "n": 1,
    "seed": -1,
    "include_reasoning": True,
    "group_names": [],
    "char_name": "Bot",
    "user_name": "Nora",
    "use_makersuite_sysprompt": True,
    "custom_prompt_post_processing": "",
}
CONTINUE = {
    "model": "nano",
    "messages": [{"role": "user", "content": "Hello! My name is Nora.", "toolCalls": None}],
    "max_tokens": 4096,
    "max_completion_tokens": None,
    "parallel_tool_calls": False,
    "prediction": None,
    "tools": None,
    "tool_choice": None,
    "thinking": None,
    "n_predict": None,
}
CACHING = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hello! My name is Nora.", "cache_control": {"type": "x"}}
            ],
        }
    ],
    "prompt_cache_key": "nora-1",
    "prompt_cache_retention": "24h",
    "safety_identifier": "a1b2",
}


@pytest.mark.parametrize(
    "body",
    [OPEN_WEBUI, LIBRECHAT, SILLYTAVERN, CONTINUE, CACHING],
    ids=["Open WebUI", "LibreChat", "SillyTavern", "Continue", "caching"],
)
def test_the_bodies_of_clients_get_the_same_reply_as_a_plain_one(chat_server, body):
    options = {"temperature": 0, "top_p": 0.8, "presence_penalty": 0, "frequency_penalty": 0.5}
    plain = ask(chat_server, messages=HI, **options)
    choice = ask(chat_server, **body | options)
    assert choice["message"] == plain["message"]
    deltas = [
        choice["delta"].get("content", "") for choice in chunks(chat_server, **body | options)
    ]
    assert "".join(deltas) == plain["message"]["content"]


def test_samplers_that_are_off_are_ignored_in_a_text_completion(chat_server):
    """What SillyTavern sends to a generic server for text."""
    off = {"typical_p": 1, "tfs": 1, "top_a": 0, "mirostat_mode": 0, "mirostat_tau": 5}
    off |= {"dry_multiplier": 0, "dry_base": 1.75, "xtc_probability": 0, "xtc_threshold": 0.1}
    off |= {
        "min_tokens": 0,
        "ignore_eos": False,
        "repetition_penalty_range": 1024,
        "add_bos_token": 1,
    }
    off |= {"stopping_strings": ["\nNora:"], "truncation_length": 2048, "grammar": "", "rep_pen": 1}
    off |= {"sampler_order": [6, 0, 1], "json_schema": {}, "negative_prompt": "", "api_server": "x"}
    plain = {"prompt": "The little girl", "temperature": 0, "max_tokens": 8}
    assert ask(chat_server, TEXT, **plain, **off) == ask(chat_server, TEXT, **plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [TOOL]),
        ("functions", [TOOL["function"]]),
        ("tool_choice", "required"),
        ("function_call", {"name": "weather"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("guided_choice", ["yes", "no"]),
        ("structured_outputs", {"regex": "a+"}),
        ("echo", True),
        ("min_tokens", 5),
        ("mirostat", 2),
        ("stop_token_ids", [531]),
        ("top_a", 0.5),
        ("guided_decoding", {"regex": "a"}),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(chat_server, name, value):
    assert param(chat_server, messages=HI, **{name: value}) == name


def test_what_cannot_be_done_is_refused_by_name_in_a_message_and_a_text_completion(chat_server):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert param(chat_server, messages=[*HI, turn, *HI]) == "messages.1.tool_calls"
    for part in ({"input_audio": {"data": "x"}}, {"file": {"file_id": "x"}}):
        part["type"] = next(iter(part))
        message = {"role": "user", "content": [{"type": "text", "text": "hi"}, part]}
        assert param(chat_server, messages=[message]) == f"messages.0.content.1.{part['type']}"
    pictures = [{"role": "user", "content": "what is this?", "images": ["aGk="]}]
    assert param(chat_server, messages=pictures) == "messages.0.images"
    result = {"role": "tool", "content": "4", "tool_call_id": "1"}
    assert param(chat_server, messages=[*HI, result]) == "messages.1.role"
    assert param(chat_server, TEXT, prompt="def f(", suffix="return x") == "suffix"
    assert param(chat_server, TEXT, messages=HI) == "prompt"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"),
        ("maxTokens", "max_tokens"),
        ("topK", "top_k"),
        ("frequencypenalty", "frequency_penalty"),
        ("stream_otpions", "stream_options"),
        ("logits_bias", "logit_bias"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_right_name(chat_server, wrong, right):
    for value in (0, 2):
        response = post(chat_server, messages=HI, **{wrong: value})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, wrong) and right in error["message"]


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("max_new_tokens", "max_tokens", 3),
        ("n_predict", "max_tokens", 3),
        ("stop_sequences", "stop", [" a"]),
        ("repeat_penalty", "repetition_penalty", 3.0),
    ],
)
def test_other_servers_names_are_known_and_ours_goes_first(chat_server, alias, name, value):
    options = {"temperature": 0, "logit_bias": NO_END}
    expected = reply(chat_server, **options, **{name: value})
    assert expected != reply(chat_server, **options)
    assert expected == reply(chat_server, **options, **{alias: value})
    both = {name: value, alias: 50}
    assert expected == reply(chat_server, **options, **both)


def test_tools_that_may_not_be_called_are_ignored(chat_server):
    assert reply(chat_server, temperature=0, tools=[TOOL], tool_choice="none")


@pytest.mark.parametrize(("name", "off"), [("top_k", 0), ("top_p", 1), ("min_p", 0)])
def test_minus_one_means_off(chat_server, name, off):
    options = {"temperature": 1.9, "max_tokens": 20, "seed": 3, "logit_bias": NO_END}
    text = reply(chat_server, **options, **{name: -1})
    assert text == reply(chat_server, **options, **{name: off})


def test_a_seed_of_minus_one_is_random_and_max_tokens_of_minus_one_is_no_limit(chat_server):
    texts = {reply(chat_server, seed=-1, temperature=1.5) for _ in range(5)}
    assert len(texts) > 1
    choice = ask(chat_server, messages=HI, max_tokens=-1, logit_bias=NO_END)
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["content"].split()) > 128  # the server's default


def test_top_p_of_zero_is_the_most_likely_token(chat_server):
    text = reply(chat_server, top_p=0, temperature=1.5, max_tokens=12)
    assert text == reply(chat_server, temperature=0, max_tokens=12)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("limit", [CONTEXT, 10**12])
def test_max_tokens_beyond_the_context_are_an_upper_bound(chat_server, name, limit):
    messages = [{"role": "user", "content": "hello " * (CONTEXT - 50)}]
    body = {"messages": messages, "logit_bias": NO_END, name: limit}
    response = post(chat_server, **body).json()
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["usage"]["total_tokens"] == CONTEXT
    auto = post(chat_server, **body, truncation="auto").json()
    assert auto["usage"]["total_tokens"] == CONTEXT


def test_only_a_prompt_that_leaves_no_room_is_refused(chat_server):
    fits = post(chat_server, TEXT, prompt=[100] * (CONTEXT - 1), max_tokens=50, logit_bias=NO_END)
    assert fits.json()["usage"]["completion_tokens"] == 1
    too_long = post(chat_server, TEXT, prompt=[100] * CONTEXT, max_tokens=1)
    assert too_long.status_code == 400
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_any_of_many_stops_ends_a_reply_and_none_is_none(chat_server):
    options = {"seed": 7, "max_tokens": 40}
    text = reply(chat_server, **options)
    stops = [f"<never {i}>" for i in range(30)] + [text[10:14]]
    assert reply(chat_server, **options, stop=stops) == text[: text.find(text[10:14])].rstrip()
    for none in ([], None, "", [""]):
        assert reply(chat_server, **options, stop=none) == text


# ---- messages


def test_system_messages_anywhere_are_joined_with_the_first(chat_server):
    talk = [*HI, {"role": "assistant", "content": "hi nora."}, *HI]
    persona = {"role": "system", "content": "i am a zookeeper.\ni like tea."}
    texts = [{"role": "system", "content": "i am a zookeeper."}]
    texts.append({"role": "developer", "content": [{"type": "text", "text": "i like tea."}]})
    options = {"temperature": 0, "max_tokens": 16}
    expected = reply(chat_server, [persona, *talk], **options)
    for where in (1, 2, 3):
        messages = [texts[0], *talk[:where], texts[1], *talk[where:]]
        assert reply(chat_server, messages, **options) == expected
    late = [*talk[:2], *texts, *talk[2:]]
    assert reply(chat_server, late, **options) == expected
    empty = [{"role": "system", "content": None}, *late, {"role": "system", "content": " "}]
    assert reply(chat_server, empty, **options) == expected


@pytest.mark.parametrize("nothing", [None, [], [{"type": "text", "text": ""}]], ids=str)
def test_null_contents_are_empty(chat_server, nothing):
    def messages(content):
        turn = {"role": "assistant", "content": content, "tool_calls": None, "audio": None}
        return [*HI, turn | {"refusal": None, "annotations": []}, *HI]

    options = {"temperature": 0, "max_tokens": 8}
    assert reply(chat_server, messages(nothing), **options) == reply(
        chat_server, messages(""), **options
    )


def test_feedback_may_have_system_messages_anywhere(chat_server):
    talk = [*HI, {"role": "assistant", "content": "hi nora."}]
    messages = [talk[0], {"role": "system", "content": "i like tea."}, talk[1]]
    assert post(chat_server, "/feedback", messages=messages, label=1).status_code == 204
    stored = json.loads(chat_server.feedback.read_text().splitlines()[-1])
    assert stored["messages"] == [messages[1], *talk]


# ---- a final message of the assistant


def continued(nano, text, n=24):
    """Return the model's continuation of a reply to HI that begins with `text`."""
    model, tokenizer = nano
    prompt = tokenizer.encode("[Human]:") + tokenizer.encode(f" {HI[0]['content']}")
    prompt += tokenizer.encode("\n[Bot]:") + tokenizer.encode(f" {text}")
    sampling = ChatSampling(temperature=0, max_new_tokens=n)
    ids = generate(model, [prompt], sampling, stop_ids=tokenizer.stop_ids, tokenizer=tokenizer)[0]
    return tokenizer.decode(ids).rstrip(), len(prompt)


def prefilled(text):
    return [*HI, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("text", ["Hello Nora. I am a", "I like to", "Hello, Nora! I have tw"])
def test_a_final_message_of_the_assistant_is_continued(exact_server, nano, text):
    expected, n_prompt = continued(nano, text)
    body = {"temperature": 0, "max_tokens": 24}
    response = post(exact_server, messages=prefilled(text), **body).json()
    assert response["choices"][0]["message"]["content"] == expected
    assert response["usage"]["prompt_tokens"] == n_prompt
    deltas = chunks(exact_server, messages=prefilled(text), **body)
    assert "".join(choice["delta"].get("content", "") for choice in deltas) == expected
    assert expected[0] == " " or text.endswith("tw")  # so the two can be joined as they are


def test_the_join_is_right_when_the_message_ends_in_a_space(exact_server, nano):
    expected, _ = continued(nano, "I like to")
    options = {"temperature": 0, "max_tokens": 24}
    for space in (" ", "\n", " \n "):
        assert reply(exact_server, prefilled(f"I like to{space}"), **options) == expected.lstrip()


def test_a_blank_final_message_begins_a_new_reply(exact_server):
    options = {"temperature": 0, "max_tokens": 24}
    plain = reply(exact_server, **options)
    assert reply(exact_server, prefilled(""), **options) == plain
    assert reply(exact_server, prefilled(None), **options) == plain
    assert reply(exact_server, prefilled(" \n"), **options) == plain


def test_a_conversation_that_outgrew_the_context_keeps_the_message_to_continue(exact_server, nano):
    turns = []
    for n in range(60):
        turns += [{"role": "user", "content": f"I have {n} dogs, and they like me."}]
        turns += [{"role": "assistant", "content": "That is nice."}]
    body = {"messages": turns + prefilled("I like to"), "temperature": 0, "max_tokens": 24}
    assert post(exact_server, **body).status_code == 400
    response = post(exact_server, **body, truncation="auto").json()
    text = response["choices"][0]["message"]["content"]
    assert text.startswith(" ") and response["usage"]["prompt_tokens"] <= CONTEXT - 24
    alone = [{"role": "assistant", "content": "I like to"}]
    assert reply(exact_server, alone, truncation="auto").startswith(" ")
    long = prefilled("very " * CONTEXT)
    error = post(exact_server, messages=long, truncation="auto").json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(CONTEXT) in error["message"] and "persona" not in error["message"]


def test_flags_for_continuing_are_accepted_if_they_agree(chat_server):
    flags = ("continue_final_message", "add_generation_prompt")
    for messages, values in ((prefilled("I"), (True, False)), (HI, (False, True))):
        wrong = [not value for value in values]
        options = {"messages": messages, "max_tokens": 2}
        assert (
            post(chat_server, **options, **dict(zip(flags, values, strict=True))).status_code == 200
        )
        for name, value in zip(flags, wrong, strict=True):
            assert param(chat_server, **options, **{name: value}) == name


@pytest.mark.parametrize("template", ["human_bot", "user_assistant"])
def test_the_ids_of_an_open_reply_begin_the_whole_one(template):
    tokenizer = Tokenizer(template)
    service = SimpleNamespace(tokenizer=tokenizer)
    for text in ("I like", "I like [Human]: tea", "é 🙂"):
        opening = tokenizer.render(HI, add_generation_prompt=True)[0]
        ids = opening + Service.open_reply(service, text)
        whole = tokenizer.render([*HI, {"role": "assistant", "content": f"{text} and tea"}])[0]
        assert ids == whole[: len(ids)] and tokenizer.decode(ids).endswith(text)


# ---- echo


def score(nano, ids):
    """Return the log-probabilities (T - 1, V) of the tokens after the first, by the plain model."""
    with torch.no_grad():
        logits, _ = nano[0](torch.tensor([ids]))
    return logits[0, :-1].log_softmax(-1)


def assert_scored(nano, logprobs, ids, n_top):
    """`logprobs` are the model's for these ids."""
    tokenizer = nano[1]
    expected = score(nano, ids)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == len(ids)
    chosen = expected[torch.arange(len(ids) - 1), ids[1:]].tolist()
    assert logprobs["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-3)
    for top, row, token in zip(logprobs["top_logprobs"][1:], expected, ids[1:], strict=True):
        values, _ = row.topk(n_top)
        assert sorted(top.values(), reverse=True)[:n_top] == pytest.approx(
            values.tolist(), abs=1e-3
        )
        text = tokenizer.token_bytes(token).decode(errors="backslashreplace")
        assert text in top


def test_echo_returns_the_prompt_with_its_log_probabilities(exact_server, nano):
    tokenizer = nano[1]
    prompt = "Hello there, my name is Zoë 🙂 and"
    body = {"prompt": prompt, "echo": True, "temperature": 0, "max_tokens": 6}
    body |= {"frequency_penalty": 0, "logit_bias": NO_END}
    choice = ask(exact_server, TEXT, **body, logprobs=2)
    ids = tokenizer.encode(choice["text"])
    assert choice["text"].startswith(prompt) and ids[:-6] == tokenizer.encode(prompt)
    assert_scored(nano, choice["logprobs"], ids, 2)
    # each token lies where it says
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    for token, offset in zip(tokens, offsets, strict=True):
        if "\\x" not in token:
            assert choice["text"][offset:].startswith(token)

    plain = ask(exact_server, TEXT, **body)
    assert plain["text"] == choice["text"] and plain["logprobs"] is None

    # in a stream the prompt comes first
    parts = chunks(exact_server, TEXT, **body, logprobs=2)
    assert parts[0]["text"] == prompt
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name, values in choice["logprobs"].items():
        streamed = [value for part in parts for value in part["logprobs"][name]]
        if name == "token_logprobs":
            assert streamed[1:] == pytest.approx(values[1:], abs=1e-4)
        elif name != "top_logprobs":
            assert streamed == values


def test_prompts_of_ids_are_scored_up_to_the_whole_context(exact_server, nano):
    torch.manual_seed(0)
    prompts = [torch.randint(50256, (n,)).tolist() for n in (1, 2, 65, CONTEXT)]
    body = {"prompt": prompts, "echo": True, "max_tokens": 0, "logprobs": 1}
    response = post(exact_server, TEXT, **body).json()
    for ids, choice in zip(prompts, response["choices"], strict=True):
        assert_scored(nano, choice["logprobs"], ids, 1)
        assert choice["text"] == nano[1].decode(ids) and choice["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == 0
    assert param(exact_server, TEXT, prompt="hi", max_tokens=0) == "max_tokens"


@pytest.mark.parametrize("token", [50256, 8582], ids=["the end", "half a character"])
def test_one_more_token_is_always_listed_after_the_prompt(exact_server, nano, token):
    """lm-evaluation-harness drops the last token: it must be the reply's, whatever it is."""
    ids = nano[1].encode("The little girl")
    body = {"prompt": ids, "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0}
    choice = ask(exact_server, TEXT, **body, logit_bias={str(token): 100})
    assert_scored(nano, choice["logprobs"], [*ids, token], 1)
    assert choice["text"] == "The little girl"
    streamed = chunks(exact_server, TEXT, **body, logit_bias={str(token): 100})
    tokens = [token for part in streamed for token in part["logprobs"]["tokens"]]
    assert tokens == choice["logprobs"]["tokens"]


def test_each_of_several_replies_has_the_echo(exact_server):
    body = {"prompt": ["one", "two"], "n": 2, "echo": True, "max_tokens": 2, "logprobs": 0}
    choices = post(exact_server, TEXT, **body).json()["choices"]
    assert [choice["text"][:3] for choice in choices] == ["one", "one", "two", "two"]
    starts = {}
    for part in chunks(exact_server, TEXT, **body):
        starts.setdefault(part["index"], part["text"])
    assert starts == {0: "one", 1: "one", 2: "two", 3: "two"}


def test_an_error_while_scoring_is_answered(exact_server, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(exact_server.service, "score_prompt", fail)
    body = {"prompt": "hi", "echo": True, "max_tokens": 1, "logprobs": 1}
    assert post(exact_server, TEXT, **body).status_code == 500
    text = post(exact_server, TEXT, **body, stream=True).text
    assert "server_error" in text and "[DONE]" not in text
    assert "out of memory" in capsys.readouterr().err


# ---- the clients themselves

SYSTEM = {"role": "system", "content": "i am a zookeeper."}
QUESTION = {"role": "user", "content": "What is my name?"}


def test_openais_client_holds_a_conversation(chat_server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0)
    create = client.chat.completions.create
    options = {"model": "nano", "temperature": 0, "max_completion_tokens": 2000, "user": "nora"}
    first = create(messages=[SYSTEM, *HI], **options)
    history = [SYSTEM, *HI, first.choices[0].message.model_dump(), QUESTION]
    second = create(messages=history, **options)
    plain = [SYSTEM, *HI, {"role": "assistant", "content": first.choices[0].message.content}]
    assert second.choices[0].message.content == reply(
        chat_server, [*plain, QUESTION], temperature=0, max_tokens=2000
    )

    usage = {"stream_options": {"include_usage": True}, "stream": True}
    *parts, last = create(messages=history, **options, **usage)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == second.choices[0].message.content
    assert last.usage.total_tokens == second.usage.total_tokens


def test_langchain_holds_a_conversation(chat_server):
    chat_models = pytest.importorskip("langchain_openai")
    messages = pytest.importorskip("langchain_core.messages")
    url = f"{chat_server.url}/v1"
    options = {"temperature": 0, "max_retries": 0, "stream_usage": True}
    model = chat_models.ChatOpenAI(model="nano", base_url=url, api_key="none", **options)
    history = [messages.SystemMessage(SYSTEM["content"]), messages.HumanMessage(HI[0]["content"])]
    first = model.invoke(history)
    history += [first, messages.HumanMessage(QUESTION["content"])]
    second = model.invoke(history)
    plain = [SYSTEM, *HI, {"role": "assistant", "content": first.content}, QUESTION]
    assert second.content == reply(chat_server, plain, temperature=0)
    assert second.usage_metadata["total_tokens"] > first.usage_metadata["total_tokens"]
    parts = list(model.stream(history))
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    assert whole.content == second.content
    assert whole.usage_metadata["total_tokens"] == second.usage_metadata["total_tokens"]


def test_litellm_holds_a_conversation(chat_server, monkeypatch):
    monkeypatch.setitem(os.environ, "LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    options = {"model": "openai/nano", "api_base": f"{chat_server.url}/v1", "api_key": "none"}
    options |= {"temperature": 0, "max_tokens": 2000, "num_retries": 0}
    first = litellm.completion(messages=[SYSTEM, *HI], **options)
    history = [SYSTEM, *HI, first.choices[0].message.model_dump(), QUESTION]
    second = litellm.completion(messages=history, **options)
    plain = [SYSTEM, *HI, {"role": "assistant", "content": first.choices[0].message.content}]
    assert second.choices[0].message.content == reply(
        chat_server, [*plain, QUESTION], temperature=0, max_tokens=2000
    )
    usage = {"stream_options": {"include_usage": True}, "stream": True}
    parts = list(litellm.completion(messages=history, **options, **usage))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == second.choices[0].message.content
    assert parts[-1].usage.total_tokens == second.usage.total_tokens


# ---- addresses, origins, names of hosts


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models/nano", "/metrics"])
def test_what_can_be_read_has_a_head(chat_server, path):
    whole = requests.get(chat_server.url + path, timeout=30)
    head = requests.head(chat_server.url + path, timeout=30)
    assert whole.status_code == head.status_code == 200 and head.content == b""
    assert head.headers["Content-Type"] == whole.headers["Content-Type"]


def test_a_list_of_models_may_end_in_a_slash(chat_server):
    texts = {
        requests.get(f"{chat_server.url}/v1/models{end}", timeout=30).text for end in ("", "/")
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models"),
        ("GET", "/v1"),
        ("GET", "/v1/"),
        ("POST", "/chat/completions"),
        ("POST", "/completions"),
        ("POST", "/v1/chat/completions/chat/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/api/generate"),
    ],
)
def test_an_unknown_address_says_where_the_api_is(chat_server, method, path):
    response = requests.request(method, chat_server.url + path, json={}, timeout=30)
    error = response.json()["error"]
    assert response.status_code == 404 and f"{chat_server.url}/v1" in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def friends(serving):
    """A server for pages of several origins, with a second name."""
    origins = "https://example.org/, app://obsidian.md,chrome-extension://abcdef,null"
    with serving(f"--cors={origins}", "--allowed_hosts=host.docker.internal, *.home") as server:
        yield server


def preflight(server, origin, path=CHAT):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers |= {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    headers |= {"Access-Control-Request-Private-Network": "true"}
    return requests.options(server.url + path, headers=headers, timeout=30)


@pytest.mark.parametrize(
    "origin", ["https://example.org", "app://obsidian.md", "chrome-extension://abcdef", "null"]
)
def test_pages_of_several_origins_may_call(friends, origin):
    response = preflight(friends, origin)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == origin
    assert response.headers["Access-Control-Allow-Private-Network"] == "true"
    assert "x-stainless-os" in response.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Credentials" not in response.headers
    response = requests.get(f"{friends.url}/nothing", headers={"Origin": origin}, timeout=30)
    assert response.headers["Access-Control-Allow-Origin"] == origin  # errors can be read too


@pytest.mark.parametrize("origin", ["https://evil.example", "https://example.org.evil", "app://x"])
def test_pages_of_other_origins_may_not(friends, origin):
    assert "Access-Control-Allow-Origin" not in preflight(friends, origin).headers


def test_a_star_is_any_origin(serving):
    with serving("--cors=*") as server:
        response = preflight(server, "vscode-webview://1a2b")
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert response.headers["Access-Control-Allow-Private-Network"] == "true"


def with_host(server, host):
    return requests.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=30)


def test_other_names_of_the_machine_are_allowed_by_name(friends):
    for host in ("host.docker.internal:8000", "HOST.docker.internal", "nas.home", "[::1]:8000"):
        assert with_host(friends, host).status_code == 200
    for host in ("evil.example", "host.docker.internal.evil.example", "xhome", ""):
        assert with_host(friends, host).status_code == 403


def test_another_name_is_refused_with_the_remedy(chat_server):
    response = with_host(chat_server, "host.docker.internal:8000")
    message = response.json()["error"]["message"]
    assert response.status_code == 403 and "--allowed_hosts=host.docker.internal" in message
    page = requests.get(chat_server.url, headers={"Host": "evil.example"}, timeout=30)
    assert page.status_code == 403 and not re.search("<script", page.text)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("cors", "example.org"),
        ("cors", "https://example.org/chat"),
        ("cors", "https://example.org,localhost:3000"),
        ("cors", "https://"),
        ("cors", "https://*.example.org"),
        ("allowed_hosts", "http://host.docker.internal:8000"),
    ],
)
def test_a_knob_that_can_match_nothing_is_refused(as_main, knob, value):
    wrong = value.rpartition(",")[2]
    assert_refused(as_main("serve.py", "--port=0", f"--{knob}={value}"), knob, wrong)
