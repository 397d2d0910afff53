"""Conversations in every format are read as a straightforward reader reads them, and nothing is
learned that should not be."""

import codecs
import gzip
import json

import pytest
from conftest import assert_refused
from hypothesis import given
from hypothesis import strategies as st

from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from prepare.formats import conversation, n_learned

TOKENIZER = Tokenizer()
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
texts = st.text(max_size=12)


def talk(n):
    return [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "hello"}]


def message(role, content, **more):
    return {"role": role, "content": content} | more


# a conversation: (system, [(user, assistant, learned)])
conversations = st.tuples(
    texts, st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4)
)


def reference(system, exchanges):
    """Return the messages of a conversation, by its description."""
    messages = [message("system", system.strip())] if system.strip() else []
    for user, assistant, learned in exchanges:
        if user.strip():
            messages.append(message("user", user.strip()))
        if assistant.strip():
            weight = {} if learned else {"weight": 0}
            messages.append(message("assistant", assistant.strip(), **weight))
    return messages


def as_openai(system, exchanges):
    messages = [message("developer", [{"type": "text", "text": system}])]
    for user, assistant, learned in exchanges:
        messages.append(message("user", user, name="nora"))
        messages.append(message("assistant", assistant, weight=int(learned), tool_calls=[]))
    return {"messages": messages, "tools": []}


def as_axolotl(system, exchanges):
    messages = []
    for user, assistant, learned in exchanges:
        messages.append(message("user", user, train=True))
        messages.append(message("assistant", assistant, training=learned))
    return {"messages": messages, "system": system}


def as_sharegpt(system, exchanges):
    turns = [{"from": "system", "value": system}]
    for user, assistant, learned in exchanges:
        turns.append({"from": "human", "value": user})
        turns.append({"from": "gpt", "value": assistant, "weight": float(learned)})
    return {"id": "7", "conversations": turns}


@pytest.mark.parametrize("write", [as_openai, as_axolotl, as_sharegpt])
@given(talk=conversations)
def test_each_format_of_turns_is_read_as_the_reference_reads_it(write, talk):
    _, messages, n_blank = conversation(write(*talk))
    assert messages == reference(*talk)
    assert n_blank == sum(not assistant.strip() for _, assistant, _ in talk[1])
    assert n_learned(messages) == sum(bool(a.strip() and learned) for _, a, learned in talk[1])


@given(talk=conversations, given_input=texts)
def test_alpaca_is_its_history_then_the_instruction_with_its_input(talk, given_input):
    system, exchanges = talk
    *history, (instruction, output, _) = [
        (user, assistant, True) for user, assistant, _ in exchanges
    ]
    record = {"system": system, "history": [[user, assistant] for user, assistant, _ in history]}
    record |= {"instruction": instruction, "input": given_input, "output": output}
    question = "\n".join(text.strip() for text in (instruction, given_input) if text.strip())
    assert conversation(record)[1] == reference(system, [*history, (question, output, True)])


def test_prompt_and_completion_are_texts_or_messages():
    for record in (
        {"prompt": "hi", "completion": " hello"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
    ):
        assert conversation(record)[1] == TALK


def test_what_the_system_says_comes_first_and_once():
    record = {"system": "be kind", "messages": [*TALK, message("system", "be brief")]}
    record["messages"].append(message("developer", "be kind"))
    assert conversation(record)[1] == [message("system", "be kind\nbe brief"), *TALK]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [message("user", "hi"), message("tool", "42")]}, ["message 2", "tool"]),
        (
            {"messages": [message("assistant", None, tool_calls=[{"id": "1"}])]},
            ["message 1", "tool"],
        ),
        ({"conversations": [{"from": "observation", "value": "x"}]}, ["message 1", "tool"]),
        ({"messages": [message("user", [{"type": "image_url"}])]}, ["message 1", "image_url"]),
        ({"messages": [message("narrator", "x")]}, ["message 1", "narrator"]),
        ({"messages": [message("assistant", "x", weight=0.5)]}, ["message 1", "0.5"]),
        ({"messages": [message("user", 7)]}, ["message 1", "7"]),
        ({"messages": [["hi"]]}, ["message 1", "hi"]),
        ({"text": "hi"}, ["text"]),
        ({}, ["no conversation"]),
    ],
)
def test_what_cannot_be_learned_is_named(record, words):
    with pytest.raises(ValueError) as refused:
        conversation(record)
    for word in words:
        assert word in str(refused.value)


# ---- files


@pytest.fixture
def prepared(as_main, tmp_path, monkeypatch):
    """Run prepare/jsonl.py on these bytes: prepared(b"...", "talk.jsonl") -> (process, the text of
    both shards with what is learned in «»)."""
    monkeypatch.chdir(tmp_path)

    def run(content, name="talk.jsonl"):
        (tmp_path / name).write_bytes(content)
        done = as_main("prepare/jsonl.py", f"--source={name}", "--out_dir=out")
        text = ""
        if done.returncode == 0:
            for split in ("train", "val"):
                shard = open_shard(tmp_path / "out" / f"{split}.bin")
                mask = shard.mask(0, len(shard.tokens))
                for token, learned in zip(shard.tokens.tolist(), mask, strict=True):
                    piece = TOKENIZER.decode([token])
                    text += f"«{piece}»" if learned else piece
        return done, text.replace("»«", "")

    return run


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_a_reply_of_weight_0_is_in_the_shard_and_not_learned(prepared):
    context = [message("user", "a"), message("assistant", "bad", weight=0)]
    records = []
    for n in range(3):
        records.append(
            {"messages": [*context, message("user", n * "b"), message("assistant", "good")]}
        )
    done, text = prepared(lines(*records))
    assert done.returncode == 0, done.stderr
    assert "[Bot]: bad<|endoftext|>" in text and "[Bot]:« good<|endoftext|>»" in text


def test_blank_replies_are_left_out_and_counted(prepared):
    blank = {"messages": [message("user", "b"), message("assistant", " \n")]}
    some = {"messages": [*blank["messages"], *TALK]}
    done, text = prepared(
        lines({"messages": TALK}, blank, some, {"prompt": "hi", "completion": "ho"})
    )
    assert done.returncode == 0, done.stderr
    assert "«<|endoftext|>»" not in text and text.count("« hello<|endoftext|>»") == 2
    assert "1 of 4 records left out" in done.stdout
    assert "2 blank replies" in done.stdout and "3 of OpenAI's messages" in done.stdout


RECORDS = [{"messages": talk(n)} for n in range(3)]
JSONL = lines(*RECORDS)
PRETTY = json.dumps(RECORDS, indent=2).encode()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (JSONL, "talk.jsonl"),
        (PRETTY, "talk.json"),
        (codecs.BOM_UTF8 + JSONL, "talk.jsonl"),
        (codecs.BOM_UTF8 + PRETTY, "talk.json"),
        (b"\n" + JSONL.replace(b"\n", b"\r\n\r\n"), "talk.jsonl"),
        (gzip.compress(JSONL, mtime=0), "talk.JSONL.GZ"),
        (gzip.compress(PRETTY, mtime=0), "talk"),
    ],
)
def test_lines_and_lists_are_read_whatever_their_name(prepared, content, name):
    done, text = prepared(content, name)
    assert done.returncode == 0, done.stderr
    assert text.count("« hello<|endoftext|>»") == 3


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (JSONL.decode().encode("utf-16"), "UTF-16"),
        (b"PAR1" + bytes(100), "Parquet"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
        (JSONL + b'{"messages": "\xe9"}\n', "line 4"),
        (JSONL + b"\n\n{broken\n", "line 6"),
    ],
)
def test_other_files_are_refused_by_what_they_are(prepared, content, word):
    assert_refused(prepared(content)[0], "talk.jsonl", word)
