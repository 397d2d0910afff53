"""The corpora: excerpts in the published formats go in, and what came out is read back from the shards."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import socket
import sys
import tarfile
import threading
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from conftest import assert_refused, largest_file, small_talk, write_jsonl

from nanochatgpt.configurator import run
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer, gpt2_encoding
from prepare import chitchat, columned_chat, corpus, eli5, jsonl, personachat, spc
from prepare import text as plain_text
from prepare.corpus import JsonStream


@pytest.fixture
def prepare(tmp_path, monkeypatch, in_process):
    """Run a script of prepare/ within this process in an empty folder: prepare(eli5, source=PATH) -> as `script`."""
    monkeypatch.chdir(tmp_path)

    def call(module, **knobs):
        knobs = [f"--{name}={value}" for name, value in knobs.items()]
        return in_process(lambda: run(module.main, module.Config), f"{module.__name__}.py", *knobs)

    return call


@pytest.fixture
def talk(tmp_path):
    """60 conversations of our own as a .jsonl file."""
    return write_jsonl(tmp_path / "talk.jsonl", small_talk(60))


def read_back(folder):
    """Return {"train": conversations, "val": conversations} of a prepared folder."""
    splits = {}
    for split in ("train", "val"):
        shard = open_shard(Path(folder) / f"{split}.bin")
        parse = Tokenizer(shard.template).parse
        splits[split] = [
            parse(shard.tokens[a:b].tolist()) for a, b in itertools.pairwise(shard.offsets)
        ]
    return splits


def files_in(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def written(folder):
    """Return what a failed run may not leave: shards and parts of shards."""
    return [path for path in Path(folder).rglob("*") if ".bin" in path.name]


def exchange(asked, reply):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]


def without_persona(messages):
    return [message for message in messages if message["role"] != "system"]


def split_of(conversations):
    """Return {conversation as text: its splits} of (split, messages), without personas."""
    splits = {}
    for split, messages in conversations:
        splits.setdefault(json.dumps(without_persona(messages), sort_keys=True), set()).add(split)
    return splits


# ---- dividing into splits


def divided(keys):
    """Return the keys that `divide` puts in train and those it puts in val."""
    splits = {"train": [], "val": []}
    for split, key in corpus.divide((key, key) for key in keys):
        splits[split].append(key)
    return splits["train"], splits["val"]


def test_one_conversation_in_twenty_is_held_out_and_the_order_is_kept():
    keys = [f"conversation {i}" for i in range(20_000)]
    train, val = divided(keys)
    assert 900 < len(val) < 1100
    for part in (train, val):
        assert part == sorted(part, key=lambda key: int(key.split()[1]))
    assert sorted(train + val) == sorted(keys)


def test_equal_keys_go_to_the_same_split():
    keys = [str(i % 500) for i in range(1500)]
    train, val = divided(keys)
    assert not set(train) & set(val)


def test_any_two_conversations_are_enough_for_both_splits():
    assert [i for i in range(200) if [] in divided(["first", str(i)])] == []


def test_what_was_held_out_stays_so_when_conversations_are_added():
    keys = [str(i) for i in range(1000)]
    _, before = divided(keys[:500])
    _, after = divided(keys)
    assert [key for key in after if key in keys[:500]] == before


def test_the_split_does_not_depend_on_the_process(prepare, script, talk):
    assert prepare(jsonl, source=talk, out_dir="here").returncode == 0
    done = script(
        "prepare/jsonl.py", f"--source={talk}", "--out_dir=there", env={"PYTHONHASHSEED": "7"}
    )
    assert done.returncode == 0
    assert files_in("here") == files_in("there")


# ---- the report


def spelled(messages, opening="", closing=""):
    """Return a conversation as the default template defines it, with marks around what is supervised."""
    lines = {
        "system": "[Persona]: {}",
        "user": "[Human]: {}",
        "assistant": "[Bot]:" + opening + " {}<|endoftext|>" + closing,
    }
    return "\n".join(lines[message["role"]].format(message["content"]) for message in messages)


def n_tokens(text):
    return len(gpt2_encoding().encode(text, allowed_special="all"))


def test_the_report_counts_what_was_written(prepare, tmp_path):
    conversations = [
        *small_talk(5),
        exchange("the longest", "comes first " * 200),
        *small_talk(1500, seed=3),
    ]
    report = prepare(
        jsonl, source=write_jsonl(tmp_path / "talk.jsonl", conversations)
    ).stdout.splitlines()
    splits = read_back("data/jsonl")
    assert sorted(map(spelled, splits["train"] + splits["val"])) == sorted(
        map(spelled, conversations)
    )
    for line, split in zip(report, ("train", "val"), strict=False):
        conversations = splits[split]
        lengths = [n_tokens(spelled(messages)) for messages in conversations]
        messages = [message for messages in conversations for message in messages]
        replies = [
            f" {message['content']}<|endoftext|>"
            for message in messages
            if message["role"] == "assistant"
        ]
        share = sum(map(n_tokens, replies)) / sum(lengths)
        assert line == (
            f"data/jsonl/{split}.bin: {len(conversations):,} conversations, {len(without_persona(messages)):,} turns, "
            f"{sum(lengths):,} tokens, {share:.1%} supervised, the longest {max(lengths)} tokens"
        )


def test_the_conversation_shown_is_marked_exactly_around_what_is_learnt(prepare, tmp_path):
    messages = [
        {"role": "system", "content": "i am a pirate ."},
        *exchange("hi", "ahoy"),
        *exchange("ho !", "aye ."),
    ]
    source = write_jsonl(tmp_path / "talk.jsonl", [exchange("first", "held out"), messages])
    heading, shown = prepare(jsonl, source=source).stdout.split("between these»:\n")
    assert shown == spelled(messages, "«", "»") + "\n"
    assert heading.endswith(
        f"the model sees it, {n_tokens(spelled(messages))} tokens, learning «what is "
    )


def test_a_long_conversation_is_shown_in_part(prepare, tmp_path):
    source = write_jsonl(
        tmp_path / "talk.jsonl", [exchange("first", "held out"), exchange("why ?", "word " * 5000)]
    )
    shown = prepare(jsonl, source=source).stdout.partition("between these»:\n")[2]
    assert 1400 < len(shown) < 1600
    assert shown.rstrip().endswith("...")


def test_a_terminal_that_lacks_a_character_shows_another_and_all_is_written(
    prepare, tmp_path, monkeypatch
):
    source = write_jsonl(
        tmp_path / "talk.jsonl", [exchange("first", "held out"), exchange("how ?", "😀")]
    )
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert prepare(jsonl, source=source).returncode == 0
    assert read_back("data/jsonl")["train"] == [exchange("how ?", "😀")]


# ---- failures leave what was there


@pytest.fixture
def broken(tmp_path):
    """A .jsonl file of which more than one batch is good before line 1,501 is not JSON."""
    path = write_jsonl(
        tmp_path / "broken.jsonl", [exchange(f"what is {i} ?", "a number .") for i in range(1500)]
    )
    path.write_text(path.read_text() + "{\n")
    return path


def test_a_failure_in_the_middle_leaves_the_earlier_shards_and_nothing_else(prepare, talk, broken):
    prepare(jsonl, source=talk)
    before = files_in("data/jsonl")
    assert before.keys() == {"train.bin", "val.bin"}
    assert prepare(jsonl, source=broken).returncode == 2
    assert files_in("data/jsonl") == before


def test_a_failure_in_the_middle_is_told_on_a_line_of_its_own(prepare, broken, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    error = prepare(jsonl, source=broken).stderr
    assert "M tokens, " in error
    assert re.search(r"^jsonl\.py: .*line 1501 is not JSON", error, re.MULTILINE)


@pytest.mark.parametrize("room", [2_000, 20_000, -10])
def test_a_full_disk_leaves_the_earlier_shards_both_of_them(prepare, talk, tmp_path, room):
    other = write_jsonl(tmp_path / "other.jsonl", small_talk(1500, seed=9))
    prepare(jsonl, source=other, out_dir="elsewhere")
    whole = Path("elsewhere/train.bin").stat().st_size
    prepare(jsonl, source=talk)
    before = files_in("data/jsonl")
    with largest_file(room % whole):  # -10: val.bin fits, and all but the last of train.bin
        assert prepare(jsonl, source=other).returncode == 2
    assert files_in("data/jsonl") == before


def test_a_full_disk_is_named(prepare, talk):
    with largest_file(2_000):
        done = prepare(jsonl, source=talk)
    assert "data/jsonl" in done.stderr.splitlines()[-1]


def test_one_conversation_is_refused_and_nothing_is_written(prepare, tmp_path):
    source = write_jsonl(tmp_path / "one.jsonl", [exchange("hi", "hello")])
    assert_refused(prepare(jsonl, source=source), "at least two")
    assert written(tmp_path) == []


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(n):
        conversations = (
            ("val" if i % 20 == 0 else "train", exchange(f"what is {i} ?", "it is ."))
            for i in range(n)
        )
        tracemalloc.start()
        corpus.prepare(corpus.Config(out_dir=str(tmp_path)), "numbers", conversations)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    Tokenizer()
    assert peak(12_000) < 1.2 * peak(3_000)


# ---- Synthetic-Persona-Chat


def spc_file(path, conversations):
    """Write [(personas of user 1, of user 2, [(who, text)])] as Synthetic-Persona-Chat publishes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user 1 personas", "user 2 personas", "Best Generated Conversation"])
        for *personas, turns in conversations:
            said = "\n".join(f"User {who}: {text}" for who, text in turns)
            table.writerow(["\n".join(lines) for lines in personas] + [said])
    return path


def spc_talks(n, name):
    return [
        (["i am one.", f"i am {i}."], ["i am two."], [(1, f"hi {name} {i}"), (2, 'hello, "you"')])
        for i in range(n)
    ]


def test_both_users_are_the_bot_once_with_their_own_persona(tmp_path):
    talk = (
        ["I bake.", "I knit."],
        ["I sail."],
        [(1, "Hi!"), (2, "Hello!"), (2, "You?"), (1, "Fine: thanks")],
    )
    read = [messages for _, messages in spc.read(spc_file(tmp_path / "talks.csv", [talk] * 20))]
    first = [("user", "Hi!"), ("assistant", "Hello! You?"), ("user", "Fine: thanks")]
    turned = [({"user": "assistant", "assistant": "user"}[role], text) for role, text in first]
    expected = [turned, first] * 20
    assert [
        [(m["role"], m["content"]) for m in without_persona(messages)] for messages in read
    ] == expected
    personas = [[m["content"] for m in messages if m["role"] == "system"] for messages in read]
    assert {str(p) for p in personas[::2]} == {"[]", "['I bake. I knit.']"}
    assert {str(p) for p in personas[1::2]} == {"[]", "['I sail.']"}


def test_the_published_files_are_split_as_published_and_one_alone_is_divided(prepare, tmp_path):
    for split, name in spc.FILES.items():
        spc_file(tmp_path / "published" / name, spc_talks(30 if split == "train" else 4, split))
    assert prepare(spc, source="published").returncode == 0
    read = read_back("data/spc")
    assert {split: len(read[split]) for split in read} == {"train": 60, "val": 8}
    assert all("val" in str(messages) for messages in read["val"])
    assert prepare(spc, source=f"published/{spc.FILES['train']}", out_dir="one").returncode == 0
    read = read_back("one")
    assert len(read["train"]) + len(read["val"]) == 60
    held_out = {re.search(r"hi train \d+", str(messages))[0] for messages in read["val"]}
    assert len(held_out) == len(read["val"]) / 2  # both sides of a conversation together
    assert not held_out & {
        re.search(r"hi train \d+", str(messages))[0] for messages in read["train"]
    }


def test_what_is_not_synthetic_persona_chat_is_refused_by_name(prepare, tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert_refused(prepare(spc, source="other.csv"), "other.csv", "user 1 personas")
    (tmp_path / "empty.csv").write_bytes(b"\0\xff")
    assert_refused(prepare(spc, source="empty.csv"), "empty.csv")
    open_quote = spc_file(tmp_path / "quote.csv", []).read_text() + '"a\n' + "x" * 200_000
    (tmp_path / "quote.csv").write_text(open_quote)
    assert_refused(prepare(spc, source="quote.csv"), "quote.csv", "damaged")
    (tmp_path / "half").mkdir()
    spc_file(tmp_path / "half" / spc.FILES["train"], spc_talks(3, "train"))
    assert_refused(prepare(spc, source="half"), spc.FILES["val"])
    assert written(tmp_path) == []


def test_synthetic_persona_chat_is_downloaded_from_the_hub_or_a_mirror(prepare, web, monkeypatch):
    hub = web.folder / "datasets" / spc.REPO / "resolve" / "main" / "data"
    for split, name in spc.FILES.items():
        spc_file(hub / name, spc_talks(5, split))
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    assert prepare(spc).returncode == 0
    assert len(read_back("data/spc")["val"]) == 10


# ---- any corpus


@pytest.mark.parametrize(
    "module", [chitchat, personachat, eli5, jsonl, spc], ids=lambda module: module.__name__
)
def test_a_source_that_is_not_there_is_named(prepare, tmp_path, module):
    assert_refused(prepare(module, source="nowhere/file"), "nowhere/file")
    assert written(tmp_path) == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server of the folder web.folder at web.url; the caches of whoever runs the tests are out of reach."""
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        server.folder, server.url = folder, f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def facts(path):
    """Return what the scripts know of a published file: its size and sha256."""
    body = path.read_bytes()
    return len(body), hashlib.sha256(body).hexdigest()


# ---- jsonl


def test_every_conversation_comes_back_with_its_persona_and_any_text(prepare, tmp_path):
    odd = 'a\n[Bot]: b <|endoftext|> «c» \\ "d" \t é 漢字 😀 [Human]: \u2028 \x85 e'
    conversations = [
        [{"role": "system", "content": odd}, *exchange(odd, odd)],
        [{"role": "assistant", "content": "i begin"}, *exchange("and", "i end")],
        [
            {"role": "user", "content": "one"},
            *exchange("two", "three"),
            {"role": "user", "content": "four"},
        ],
        exchange("", ""),
    ]
    prepare(
        jsonl,
        source=write_jsonl(
            tmp_path / "talk.jsonl", [exchange("first", "held out"), *conversations]
        ),
    )
    splits = read_back("data/jsonl")
    assert [
        c for c in splits["train"] + splits["val"] if c != exchange("first", "held out")
    ] == conversations


def lines_of(conversations, end="\n"):
    return end.join(json.dumps({"messages": messages}) for messages in conversations).encode()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("no_newline_at_the_end.jsonl", lines_of),
        ("crlf.jsonl", lambda c: lines_of(c, "\r\n")),
        ("blank_lines.jsonl", lambda c: b"\n \n" + lines_of(c, "\n\n\t\n") + b"\n\n"),
        ("byte_order_mark.jsonl", lambda c: b"\xef\xbb\xbf" + lines_of(c)),
        ("packed.jsonl.gz", lambda c: gzip.compress(lines_of(c))),
        (
            "packed_in_two_parts.gz",
            lambda c: gzip.compress(lines_of(c[:9]) + b"\n") + gzip.compress(lines_of(c[9:])),
        ),
        ("raw_utf8.json", lambda c: lines_of(c).decode().encode()),
        (
            "other_fields.jsonl",
            lambda c: lines_of(c).replace(b'{"messages"', b'{"id": 7, "messages"'),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lines_are_read_however_they_are_packed(prepare, tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(small_talk(60)))
    assert prepare(jsonl, source=path).returncode == 0
    splits = read_back("data/jsonl")
    assert sorted(map(spelled, splits["train"] + splits["val"])) == sorted(
        map(spelled, small_talk(60))
    )


def test_half_a_surrogate_pair_becomes_the_replacement_character_and_a_pair_its_character(
    prepare, tmp_path
):
    path = write_jsonl(
        tmp_path / "talk.jsonl",
        [exchange("\ud800 a", "b \udfff"), exchange("\ud83d\ude00", "fine")],
    )
    assert rb"\ud83d\ude00" in path.read_bytes()
    assert prepare(jsonl, source=path).returncode == 0
    assert read_back("data/jsonl") == {
        "val": [exchange("\ufffd a", "b \ufffd")],
        "train": [exchange("😀", "fine")],
    }


def test_the_other_template_is_written_where_it_is_asked_for(prepare, talk):
    assert prepare(jsonl, source=talk, template="user_assistant", out_dir="deep/er").returncode == 0
    shard = open_shard("deep/er/train.bin")
    assert (shard.template, shard.vocab_size) == ("user_assistant", 50_262)
    splits = read_back("deep/er")
    assert sorted(map(spelled, splits["train"] + splits["val"])) == sorted(
        map(spelled, small_talk(60))
    )
    text = Tokenizer("user_assistant").decode(shard.tokens[: shard.offsets[1]].tolist())
    assert text.startswith(("<|USER|> ", "<|SYSTEM|> ")) and text.endswith(" <|End|>")


GOOD = (
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}'
)
BAD_LINES = {
    "cut": GOOD[:-20],
    "two values": GOOD + GOOD,
    "not UTF-8": GOOD.replace("hi", "\udcff"),
    "endless nesting": "[" * 100_000,
    "list": "[1, 2]",
    "null": "null",
    "number": "17",
    "text": '"hi"',
    "other field": '{"text": "hi"}',
    "no messages": '{"messages": []}',
    "messages null": '{"messages": null}',
    "messages text": '{"messages": "hi"}',
    "messages object": '{"messages": {"role": "assistant", "content": "hi"}}',
    "message text": '{"messages": ["hi"]}',
    "no content": '{"messages": [{"role": "assistant"}]}',
    "content null": GOOD.replace('"hello"', "null"),
    "content number": GOOD.replace('"hello"', "5"),
    "content parts": GOOD.replace('"hello"', '[{"type": "text", "text": "hello"}]'),
    "no role": '{"messages": [{"content": "hi"}, {"role": "assistant", "content": "hello"}]}',
    "role null": GOOD.replace('"user"', "null"),
    "role list": GOOD.replace('"user"', '["user"]'),
    "other role": GOOD.replace("user", "tool"),
    "late system": GOOD.replace("]", ', {"role": "system", "content": "i am late"}]'),
    "no reply": GOOD.replace("assistant", "user"),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_conversation_is_named_and_nothing_is_written(prepare, tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        f"{GOOD}\n\n{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8", errors="surrogateescape"
    )
    done = prepare(jsonl, source=path)
    assert_refused(done, path, "line 4")
    assert len(done.stderr) < 500
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    "pack",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:-4],
        lambda _: b"not gzip",
        lambda _: b"",
    ],
    ids=["cut", "cut at the end", "not packed", "empty"],
)
def test_a_damaged_gz_is_refused_by_name(prepare, tmp_path, pack):
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(pack(gzip.compress(lines_of(small_talk(300)))))
    done = prepare(jsonl, source=path)
    assert_refused(done, "mine.jsonl.gz" if path.stat().st_size else "at least two")
    assert written(tmp_path) == []


def test_without_a_source_the_remedy_is_said(prepare):
    assert_refused(prepare(jsonl), "--source=FILE.jsonl")


def test_one_conversation_is_never_in_both_splits_however_its_lines_are_written(tmp_path):
    lines = [GOOD]
    for i in range(300):
        lines += [
            json.dumps({"messages": exchange(f"q{i}", "yes")}),
            json.dumps({"messages": exchange(f"q{i}", "yes")}, indent=None, separators=(",", ":")),
            json.dumps(
                {
                    "messages": [
                        dict(reversed(message.items())) for message in exchange(f"q{i}", "yes")
                    ]
                }
            ),
            json.dumps(
                {
                    "id": i,
                    "messages": [message | {"date": i} for message in exchange(f"q{i}", "yes")],
                }
            ),
        ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    shared = {}
    for split, messages in corpus.divide(jsonl.read(path)):
        shared.setdefault(messages[0]["content"], set()).add(split)
    assert len(shared) == 301
    assert [asked for asked, splits in shared.items() if len(splits) > 1] == []


# ---- chitchat


def chat_of(*groups):
    """Return a conversation as dataset.json has it, from groups of (sender, text)."""
    date = "2018-05-02T19:38:15Z"
    messages = [
        [{"text": text, "timestamp": date, "sender": sender} for sender, text in group]
        for group in groups
    ]
    return {"messages": messages, "ratings": {"witty": "3"}}


def dataset(path, conversations):
    path.write_text(json.dumps(conversations), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("conversation", "turns"),
    [
        (chat_of([("a", "hi")], [("b", "hello")]), ["hi", "hello"]),
        (
            chat_of([("a", "hi"), ("a", "there")], [("b", "yo")], [("a", "so")]),
            ["hi there", "yo", "so"],
        ),
        (chat_of([("a", "hi")], [("a", "again")], [("b", "yo")]), ["hi again", "yo"]),
        (chat_of([("a", "hi"), ("b", "in one group")], [("b", "yo")]), ["hi", "in one group yo"]),
        (
            chat_of([("a", "  hi\n")], [("b", " \n\t")], [("a", "there")], [("b", "yo")]),
            ["hi there", "yo"],
        ),
        (chat_of([("a", "two\nlines")], [], [("b", "yo")]), ["two\nlines", "yo"]),
        (chat_of([("a", "hi")], [("a", "nobody ?")]), None),
        (chat_of([("a", "hi")], [("b", "  ")]), None),
        (chat_of(), None),
    ],
)
def test_consecutive_messages_of_a_speaker_are_one_turn_and_both_speakers_are_the_bot(
    tmp_path, conversation, turns
):
    found = list(chitchat.read(dataset(tmp_path / "dataset.json", {"id": conversation})))
    human_first = itertools.cycle(["user", "assistant"])
    bot_first = itertools.cycle(["assistant", "user"])
    assert found == [
        (
            "id",
            [
                {"role": role, "content": text}
                for role, text in zip(roles, turns or [], strict=False)
            ],
        )
        for roles in (human_first, bot_first)
        if turns
    ]


def test_both_copies_of_a_chitchat_conversation_are_in_the_same_split(prepare, tmp_path):
    chats = {
        f"id{i}": chat_of([("a", f"hi {i}")], [("b", f"yo {i}")], [("a", "bye")])
        for i in range(200)
    }
    assert prepare(chitchat, source=dataset(tmp_path / "dataset.json", chats)).returncode == 0
    splits = read_back("data/chitchat")
    assert len(splits["train"]) + len(splits["val"]) == 400
    for conversations in splits.values():
        for one, other in zip(conversations[::2], conversations[1::2], strict=True):
            assert [m["content"] for m in one] == [m["content"] for m in other]
            assert [m["role"] for m in one] == ["user", "assistant", "user"]
            assert [m["role"] for m in other] == ["assistant", "user", "assistant"]
    first_turns = {
        split: {c[0]["content"] for c in conversations} for split, conversations in splits.items()
    }
    assert not first_turns["train"] & first_turns["val"]


def real_chats():
    """Return the turns of each conversation of the package, in its order, read by other code than the product's."""
    path = metadata.distribution("chitchat-dataset").locate_file("chitchat_dataset/dataset.json")
    chats = []
    for chat in json.loads(path.read_text(encoding="utf-8")).values():
        turns = []  # [sender, texts]
        for message in itertools.chain(*chat["messages"]):
            text = message["text"].strip()
            if text and turns and turns[-1][0] == message["sender"]:
                turns[-1][1].append(text)
            elif text:
                turns.append([message["sender"], [text]])
        if len(turns) > 1:
            chats.append([" ".join(texts) for _, texts in turns])
    return chats


def test_the_package_holds_4017_conversations_and_none_is_lost(prepare, monkeypatch):
    taken = []
    monkeypatch.setattr(
        chitchat, "prepare", lambda config, name, conversations: taken.extend(conversations)
    )
    assert prepare(chitchat).returncode == 0
    expected = real_chats()
    assert len(expected) == 4017
    assert [[message["content"] for message in messages] for _, messages in taken[::2]] == expected
    assert [[message["content"] for message in messages] for _, messages in taken[1::2]] == expected
    assert {messages[0]["role"] for _, messages in taken[::2]} == {"user"}
    assert {messages[0]["role"] for _, messages in taken[1::2]} == {"assistant"}
    assert [split for split, _ in taken[::2]] == [split for split, _ in taken[1::2]]
    contents = {
        split: {tuple(m["content"] for m in messages) for s, messages in taken if s == split}
        for split in ("train", "val")
    }
    assert not contents["train"] & contents["val"]


@pytest.mark.slow
def test_the_whole_package_comes_back_from_the_shards(script, tmp_path):
    done = script("prepare/chitchat.py", timeout=600)
    expected = real_chats()
    turns = sum(map(len, expected))
    counts = [
        [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:conversations|turns)", line)]
        for line in done.stdout.splitlines()[:2]
    ]
    assert [sum(pair) for pair in zip(*counts, strict=True)] == [2 * 4017, 2 * turns]
    splits = read_back(tmp_path / "data" / "chitchat")
    found = [
        [m["content"] for m in messages]
        for conversations in splits.values()
        for messages in conversations
    ]
    assert sorted(found) == sorted(expected * 2)


BAD_DATASETS = {
    "cut": b'{"id": {"messages": [[{"text": "hi", "sen',
    "list": b"[]",
    "empty": b"",
    "packed": gzip.compress(b"{}"),
    "endless nesting": b"[" * 100_000,
    "no messages": b'{"id": {}}',
    "no sender": b'{"id": {"messages": [[{"text": "hi"}]]}}',
    "text null": b'{"id": {"messages": [[{"text": null, "sender": "a"}]]}}',
    "conversation null": b'{"id": null}',
    "groups null": b'{"id": {"messages": null}}',
}


@pytest.mark.parametrize("body", BAD_DATASETS.values(), ids=BAD_DATASETS)
def test_what_is_not_chitchats_dataset_is_refused_by_name(prepare, tmp_path, body):
    path = tmp_path / "dataset.json"
    path.write_bytes(body)
    assert_refused(prepare(chitchat, source=path), path)
    assert written(tmp_path) == []


def test_without_the_package_the_command_that_installs_it_is_said(prepare, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert_refused(prepare(chitchat), "pip install chitchat-dataset")


# ---- PersonaChat


def dialogs(n, seed=0):
    """Return n dialogs, (persona's sentences, utterances)."""
    talks = [
        [message["content"] for message in without_persona(messages)]
        for messages in small_talk(n, seed)
    ]
    return [
        ([f"i am number {i} .", "i like tea ."], utterances) for i, utterances in enumerate(talks)
    ]


def parlai(dialogs, candidates=""):
    """Return the text of a ParlAI file."""
    text = ""
    for persona, utterances in dialogs:
        pairs = zip(utterances[::2], utterances[1::2], strict=True)
        lines = [f"your persona: {line}" for line in persona]
        lines += [
            f"{asked}\t{reply}" + (f"\t\t{candidates}|{reply}" if candidates else "")
            for asked, reply in pairs
        ]
        text += "".join(f"{number} {line}\n" for number, line in enumerate(lines, 1))
    return text


def utterances(conversations):
    return [
        [message["content"] for message in without_persona(messages)] for messages in conversations
    ]


TRAIN, VALID = dialogs(60, seed=1), dialogs(20, seed=2)
DECOY = "this file must not be read\n"
PERSONACHAT = {
    f"{split}_{kind}.txt": text if kind == "self_original" else DECOY
    for split, text in (
        ("train", parlai(TRAIN, "no .|yes .")),
        ("valid", parlai(VALID, "no .|yes .")),
        ("test", DECOY),
    )
    for kind in (
        "self_original",
        "self_revised",
        "other_original",
        "both_original",
        "none_original",
    )
}
CONVAI2 = PERSONACHAT | {
    "train_self_original_no_cands.txt": parlai(TRAIN),
    "valid_self_original_no_cands.txt": parlai(VALID),
    "train_self_revised_no_cands.txt": DECOY,
}


def unpacked(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def archive(path, files, inside="personachat/"):
    """Make a .tgz, or a .tar, of `files` in a folder of the archive."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        if inside:
            folder = tarfile.TarInfo(inside.rstrip("/"))
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name, text in files.items():
            member = tarfile.TarInfo(inside + name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def only(name_part, files):
    return {name: text for name, text in files.items() if name_part in name}


SOURCES = {
    "PersonaChat's archive": lambda at: archive(at / "personachat.tgz", PERSONACHAT),
    "ConvAI2's archive": lambda at: archive(at / "convai2_fix_723.tgz", CONVAI2, inside=""),
    "ConvAI2's archive, dotted names": lambda at: archive(
        at / "convai2_fix_723.tgz", CONVAI2, inside="./"
    ),
    "archive unzipped": lambda at: archive(at / "personachat.tar", PERSONACHAT),
    "archive of another name": lambda at: archive(at / "x.tgz", PERSONACHAT).rename(at / "blob"),
    "folder": lambda at: unpacked(at / "folder", PERSONACHAT),
    "folder around the folder": lambda at: unpacked(at / "folder" / "personachat", CONVAI2).parent,
    "folder without candidates": lambda at: unpacked(at / "folder", only("no_cands", CONVAI2)),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_dialog_of_personachat_is_read_in_its_order_and_split_as_published(
    prepare, tmp_path, make
):
    assert prepare(personachat, source=make(tmp_path)).returncode == 0
    splits = read_back("data/personachat")
    assert utterances(splits["train"]) == [utterances for _, utterances in TRAIN]
    assert utterances(splits["val"]) == [utterances for _, utterances in VALID]
    for conversations, published in ((splits["train"], TRAIN), (splits["val"], VALID)):
        for messages, (persona, _) in zip(conversations, published, strict=True):
            assert messages[0]["content"] == " ".join(persona) or messages[0]["role"] == "user"
            assert {m["role"] for m in messages[-2:]} == {"user", "assistant"}


def test_a_parlai_file_is_read_as_parlai_means_it():
    text = (
        "1 partner's persona: i hate tea.\n"
        "2 your persona: i like tea.\n"
        "3 your persona: i'm 6\u2032 tall.\n"
        "4 hi , how are you ? \tfine .\t\tbad .|so so .|fine .\n"
        "5 and 1 of these ?\tyour persona: is nice .\n"
        "1 your persona: i begin.\n"
        "2 __SILENCE__\thello !\n"
        "3 hi .\tbye .\n"
        "1 no persona\tnone\n"
        "1 a dialog of one line\tyes\r\n"
    )
    found = list(personachat.read(io.StringIO(text * 20, newline=None), "file.txt"))
    expected = [
        exchange("hi , how are you ?", "fine .")
        + exchange("and 1 of these ?", "your persona: is nice ."),
        exchange("__SILENCE__", "hello !")[1:] + exchange("hi .", "bye ."),
        exchange("no persona", "none"),
        exchange("a dialog of one line", "yes"),
    ]
    assert [without_persona(messages) for messages in found] == expected * 20
    for i, personas in enumerate([{"i like tea. i'm 6\u2032 tall."}, {"i begin."}, set(), set()]):
        assert {m[0]["content"] for m in found[i::4] if m[0]["role"] == "system"} == personas


def test_half_of_the_conversations_keep_the_persona_and_the_same_ones_each_time():
    published = dialogs(600)
    found = list(personachat.read(parlai(published).splitlines(), "file.txt"))
    assert utterances(found) == [utterances for _, utterances in published]
    kept = [messages[0]["content"] for messages in found if messages[0]["role"] == "system"]
    assert 250 < len(kept) < 350
    assert len(set(kept)) == len(kept) and set(kept) < {
        " ".join(persona) for persona, _ in published
    }
    assert found == list(personachat.read(parlai(published).splitlines(), "file.txt"))


@pytest.mark.parametrize("candidates", ["", "no .|yes ."])
def test_one_file_alone_is_divided_and_nothing_is_lost(prepare, tmp_path, candidates):
    path = tmp_path / "valid_self_original.txt"
    path.write_text(parlai(dialogs(300), candidates))
    assert prepare(personachat, source=path).returncode == 0
    splits = {
        split: utterances(conversations)
        for split, conversations in read_back("data/personachat").items()
    }
    assert sorted(splits["train"] + splits["val"]) == sorted(
        utterances for _, utterances in dialogs(300)
    )
    assert 4 < len(splits["val"]) < 30
    assert not {map(str, splits["train"])} & {map(str, splits["val"])}


def test_the_two_sides_of_a_dialog_are_in_the_same_split(tmp_path):
    """ConvAI2's training file has each dialog twice; whoever begins is the bot in one of them, after a silence."""
    text = parlai([(["i am first ."], ["a", "b"])])
    for i in range(300):
        said = [f"{i} {word}" for word in ("hi", "hello", "how are you", "fine", "good", "bye")]
        text += parlai([(["i reply ."], said), (["i begin ."], ["__SILENCE__", *said[:-1]])])
    path = tmp_path / "train_self_original.txt"
    path.write_text(text)
    splits = {}
    for split, messages in personachat.conversations(path):
        splits.setdefault(without_persona(messages)[0]["content"], set()).add(split)
    assert len(splits) == 301
    assert [first for first, found in splits.items() if len(found) > 1] == []


@pytest.mark.parametrize(
    "line",
    ["hello there", "3 no reply", "x hi\tthere", "", "<html>\t</html>", "\tx", "3\thi\tthere"],
)
@pytest.mark.parametrize("where", ["a file", "an archive"])
def test_a_line_that_is_not_parlais_is_named_with_its_file(prepare, tmp_path, line, where):
    bad = f"1 your persona: i like tea.\n2 hi\thello\n{line}\n4 how are you ?\tfine\n"
    if where == "a file":
        path = tmp_path / "train_self_original.txt"
        path.write_text(bad)
    else:
        path = archive(tmp_path / "personachat.tgz", PERSONACHAT | {"train_self_original.txt": bad})
    assert_refused(prepare(personachat, source=path), "train_self_original.txt", "line 3")
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda at: archive(at / "source.tgz", {}),
        lambda at: archive(at / "source.tgz", only("revised", PERSONACHAT)),
        lambda at: unpacked(at / "source", {"readme.txt": "hello"}),
    ],
    ids=["empty", "revised", "folder of something else"],
)
def test_a_source_without_the_files_is_named_with_what_it_lacks(prepare, tmp_path, make):
    source = make(tmp_path)
    assert_refused(prepare(personachat, source=source), source, "self_original.txt")
    assert written(tmp_path) == []


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("form", ["archive", "folder"])
def test_a_source_that_holds_one_split_only_is_divided(prepare, tmp_path, form, split):
    files = only(split, PERSONACHAT)
    source = (
        archive(tmp_path / "s.tgz", files) if form == "archive" else unpacked(tmp_path / "s", files)
    )
    assert prepare(personachat, source=source).returncode == 0
    alone = unpacked(tmp_path / "alone", files) / f"{split}_self_original.txt"
    divided = read_back("data/personachat")
    assert prepare(personachat, source=alone).returncode == 0
    assert divided == read_back("data/personachat") and divided["train"] and divided["val"]


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95, 0.999])
def test_a_cut_archive_is_refused_by_name(prepare, tmp_path, part):
    long = parlai(dialogs(2000))
    files = {
        "train_self_original.txt": long,
        "valid_self_original.txt": long,
        "test_self_original.txt": long,
    }
    path = archive(tmp_path / "personachat.tgz", files)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    assert_refused(prepare(personachat, source=path), path.name)
    assert written(tmp_path) == []


def test_a_damaged_archive_is_refused_by_name(prepare, tmp_path):
    path = archive(
        tmp_path / "personachat.tgz",
        {"train_self_original.txt": parlai(dialogs(2000))} | PERSONACHAT,
    )
    body = bytearray(path.read_bytes())
    middle = len(body) // 2
    body[middle : middle + 2000] = bytes(2000)
    path.write_bytes(body)
    assert_refused(prepare(personachat, source=path), path.name)
    assert written(tmp_path) == []


def test_a_file_of_one_dialog_is_refused(prepare, tmp_path):
    path = tmp_path / "train_self_original.txt"
    path.write_text("1 your persona: i like tea.\n2 hi\thello\n3 how are you ?\tfine\n")
    assert_refused(prepare(personachat, source=path), "at least two")
    assert written(tmp_path) == []


def test_personachat_is_downloaded_once_and_verified(prepare, web, monkeypatch):
    published = archive(web.folder / "personachat.tgz", PERSONACHAT)
    size, sha256 = facts(published)
    monkeypatch.setattr(personachat, "URL", f"{web.url}/personachat.tgz")
    monkeypatch.setattr(personachat, "SIZE", size)
    monkeypatch.setattr(personachat, "SHA256", "0" * 64)
    done = prepare(personachat)
    assert done.returncode == 2 and "sha256" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setattr(personachat, "SHA256", sha256)
    assert prepare(personachat).returncode == 0
    assert utterances(read_back("data/personachat")["train"]) == [
        utterances for _, utterances in TRAIN
    ]
    published.unlink()
    assert prepare(personachat, out_dir="again").returncode == 0
    assert files_in("again") == files_in("data/personachat")


def test_personachat_without_a_network_says_that_a_file_can_be_given(prepare, web, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(
            personachat, "URL", f"http://127.0.0.1:{nobody.getsockname()[1]}/personachat.tgz"
        )
        assert_refused(prepare(personachat), "127.0.0.1", "--source")


# ---- ELI5


def question(q_id="q", title="why ?", selftext="", answers=((1, "because"),), urls=None):
    """Return a question as eli5_category has it, from its answers as (score, text)."""
    no_urls = {"url": []} if urls is None else urls
    return {
        "q_id": q_id,
        "category": "Engineering",
        "title": title,
        "title_urls": no_urls,
        "selftext": selftext,
        "selftext_urls": no_urls,
        "subreddit": "explainlikeimfive",
        "answers": {
            "a_id": [f"a{i}" for i in range(len(answers))],
            "text": [text for _, text in answers],
            "text_urls": [[] for _ in answers],
            "score": [score for score, _ in answers],
        },
    }


def questions(n, name=""):
    return [
        question(f"{name}{i}", f"why {name} {i} ?", answers=[(2, "no idea"), (7, f"so {i} .")])
        for i in range(n)
    ]


def json_gz(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(value).encode()))
    return path


def conversations_of(tmp_path, questions):
    return [messages for _, messages in read_eli5(json_gz(tmp_path / "eli5.json.gz", questions))]


def read_eli5(path):
    return eli5.read(path, {"questions": 0, "unanswered": 0}, eli5.as_messages)


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        ([(3, "three"), (10, "ten"), (9, "nine")], "ten"),
        ([(-3, "worse"), (-1, "bad")], "bad"),
        ([(5, "first of equals"), (5, "second of equals")], "first of equals"),
        ([(1, "\n spaced \n\nlines  ")], "spaced \n\nlines"),
        ([(9, "[deleted]"), (3, "three"), (4, "four")], "four"),
        ([(9, "[removed]"), (3, "three")], "three"),
        ([(9, " [deleted]\n"), (8, "[removed] "), (7, " \n"), (3, "three")], "three"),
        ([(9, "see URL_0"), (3, "three")], "three"),
        ([(9, "(URL_0)."), (8, "URL_12, and more"), (7, "a\nURL_1\nb"), (3, "three")], "three"),
        ([(9, "it was [deleted] by them"), (3, "three")], "it was [deleted] by them"),
        ([(9, "[deleted]"), (8, "read URL_0")], None),
        ([], None),
    ],
)
def test_the_best_scored_answer_that_can_be_learnt_is_taken(tmp_path, answers, best):
    found = conversations_of(tmp_path, [question(title="why ?", answers=answers)])
    assert found == ([exchange("why ?", best)] if best else [])


@pytest.mark.parametrize(
    "urls", [{"url": []}, [], {"url": ["http://example.org"]}, ["http://example.org"]]
)
@pytest.mark.parametrize(
    ("title", "selftext", "asked"),
    [
        ("why ?", "", "why ?"),
        ("why ?", " \n", "why ?"),
        (" why ?\n", "\nsince when ?\n\nreally ? ", "why ?\nsince when ?\n\nreally ?"),
        ("", "only this", "only this"),
    ],
)
def test_the_question_is_the_title_and_what_was_written_below_it(
    tmp_path, title, selftext, asked, urls
):
    found = conversations_of(tmp_path, [question(title=title, selftext=selftext, urls=urls)])
    assert found == [exchange(asked, "because")]


def test_a_folder_with_the_published_files_is_split_as_published_and_counted(prepare, tmp_path):
    folder = tmp_path / "eli5"
    unanswered = question("none", answers=[(5, "[removed]")])
    json_gz(folder / "eli5-category-train.json.gz", [*questions(40, "train"), unanswered])
    json_gz(folder / "eli5-category-validation-1.json.gz", [unanswered, *questions(10, "val")])
    json_gz(folder / "eli5-category-validation-2.json.gz", "this file must not be read")
    done = prepare(eli5, source=folder)
    assert done.stdout.splitlines()[-1].startswith("52 questions, 2 of them left out")
    assert read_back("data/eli5") == {
        split: [exchange(f"why {split} {i} ?", f"so {i} .") for i in range(n)]
        for split, n in (("train", 40), ("val", 10))
    }


@pytest.mark.parametrize("missing", ["train", "validation-1"])
def test_a_folder_without_one_of_the_published_files_is_refused_by_that_name(
    prepare, tmp_path, missing
):
    folder = tmp_path / "eli5"
    for split in {"train", "validation-1", "test"} - {missing}:
        json_gz(folder / f"eli5-category-{split}.json.gz", questions(5))
    assert_refused(prepare(eli5, source=folder), folder / f"eli5-category-{missing}.json.gz")
    assert written(tmp_path) == []


def test_a_folder_with_one_file_is_divided_as_the_file_alone(prepare, tmp_path):
    path = json_gz(tmp_path / "eli5" / "eli5-category-test.json.gz", questions(300))
    assert prepare(eli5, source=path.parent).returncode == 0
    divided = read_back("data/eli5")
    assert prepare(eli5, source=path).returncode == 0
    assert divided == read_back("data/eli5") and divided["train"] and divided["val"]


@pytest.mark.parametrize("name", ["eli5-category-test.json.gz", "eli5-category-test.json"])
def test_one_file_alone_packed_or_not_is_divided_and_nothing_is_lost(prepare, tmp_path, name):
    path = json_gz(tmp_path / name, questions(300))
    if path.suffix == ".json":
        path.write_text(json.dumps(questions(300)))
    assert prepare(eli5, source=path).returncode == 0
    splits = read_back("data/eli5")
    assert 4 < len(splits["val"]) < 30
    expected = [exchange(f"why  {i} ?", f"so {i} .") for i in range(300)]
    assert sorted(splits["train"] + splits["val"], key=str) == sorted(expected, key=str)


class Trickle(io.StringIO):
    """A file that gives at most `most` characters at a time."""

    def __init__(self, text, most):
        super().__init__(text)
        self.most = most

    def read(self, n):
        return super().read(min(n, self.most))


@pytest.mark.parametrize("most", [1, 2, 3, 7, 50, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_object_by_object_wherever_the_reads_cut_it(most, indent):
    values = [{"a": ']}[{", "\\', "é": ["\u2028", {}]}, {}, {"n": [1, -2.5e3, None, True]}]
    text = json.dumps(values, indent=indent)
    assert list(JsonStream(Trickle(text, most)).items()) == values


def test_objects_larger_than_what_is_read_at_once_are_whole():
    values = [
        {"text": letter * size}
        for letter, size in (("a", 3 << 20), ("b", 1), ("c", (1 << 20) - 7), ("d", 5))
    ]
    assert list(JsonStream(io.StringIO(json.dumps(values))).items()) == values


def test_a_list_larger_than_memory_can_be_read(tmp_path):
    path = json_gz(
        tmp_path / "eli5.json.gz", [question(answers=[(1, "x" * 500_000)])] * 40
    )  # 20 MB
    tracemalloc.start()
    assert sum(1 for _ in read_eli5(path)) == 40
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert highest < 10e6


PACKED = gzip.compress(json.dumps(questions(500)).encode())
BAD_FILES = {
    "cut.json.gz": PACKED[: len(PACKED) // 2],
    "cut_early.json.gz": PACKED[:8],
    "damaged.json.gz": PACKED[:500] + bytes(200) + PACKED[700:],
    "html.json.gz": b"<!DOCTYPE html><html></html>",
    "html.json": b"<!DOCTYPE html><html></html>",
    "empty.json": b"",
    "empty.json.gz": b"",
    "packed.json": PACKED,
    "cut.json": json.dumps(questions(5)).encode()[:-40],
    "not_utf8.json": b'[{"q_id": "\xff"}]',
    "object.json": json.dumps({"train": questions(5)}).encode(),
    "lines.json": b"\n".join(json.dumps(q).encode() for q in questions(5)),
    "nested.json": b"[" * 100_000,
    "texts.json": b'["why ?", "so"]',
    "lists.json": b"[[1], [2]]",
    "columns.json": b'[{"prompt": "why ?", "reply": "so"}]',
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_cut_or_something_else_is_refused_by_name(prepare, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    assert_refused(prepare(eli5, source=path), path)
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"title": None},
        {"title": 5},
        {"selftext": None},
        {"selftext": ["why ?"]},
        {"q_id": None},
        {"q_id": 5},
        {"answers": None},
        {"answers": []},
        {"answers": {"text": ["so"]}},
        {"answers": {"text": [None], "score": [1]}},
        {"answers": {"text": [5], "score": [1]}},
        {"answers": {"text": "so", "score": 1}},
        {"answers": {"text": ["so", "or so"], "score": [1]}},
        {"answers": {"text": ["so", "or so"], "score": [1, None]}},
        {"answers": {"text": ["so", "or so"], "score": ["1", "2"]}},
    ],
    ids=str,
)
def test_a_question_with_values_of_another_type_is_refused_with_its_files_name(
    prepare, tmp_path, fields
):
    path = json_gz(tmp_path / "eli5.json.gz", [*questions(3), question() | fields])
    assert_refused(prepare(eli5, source=path), path)
    assert written(tmp_path) == []


def test_offline_and_without_a_source_it_ends_in_a_message(script, tmp_path):
    caches = {"HF_HUB_CACHE": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = script("prepare/eli5.py", env=caches | {"HF_HUB_OFFLINE": "1"})
    assert_refused(done, "eli5-category-train.json.gz", "HF_HUB_OFFLINE")
    assert written(tmp_path) == []


def test_eli5_is_downloaded_once_from_the_hub_or_a_mirror(prepare, web, monkeypatch):
    hub = web.folder / "datasets" / "rexarski" / "eli5_category" / "resolve" / "main"
    published = {
        "train": json_gz(hub / "eli5-category-train.json.gz", questions(30, "train")),
        "val": json_gz(hub / "eli5-category-validation-1.json.gz", questions(10, "val")),
    }
    assert {split: entry[0] for split, entry in eli5.FILES.items()} == {
        s: p.name for s, p in published.items()
    }
    monkeypatch.setattr(
        eli5, "FILES", {split: (path.name, *facts(path)) for split, path in published.items()}
    )
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    assert prepare(eli5).returncode == 0
    assert read_back("data/eli5")["val"] == [
        exchange(f"why val {i} ?", f"so {i} .") for i in range(10)
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert prepare(eli5, out_dir="again").returncode == 0
    assert files_in("again") == files_in("data/eli5")


def test_the_card_of_gpt2_finetuned_eli5_saw_all_answers_one_behind_the_other(prepare, tmp_path):
    path = json_gz(tmp_path / "eli5" / "eli5-category-train.json.gz", questions(60))
    done = prepare(eli5, source=path.parent, mask="all", max_examples=50)
    assert done.stdout.splitlines()[-1].startswith("50 questions, 0 of them left out")
    shards = {split: open_shard(f"data/eli5/{split}.bin") for split in ("train", "val")}
    texts = {split: Tokenizer().decode(shard.tokens.tolist()) for split, shard in shards.items()}
    assert all(shard.mask(0, len(shard.tokens)).all() for shard in shards.values())
    numbers = {
        split: [int(n) for n in re.findall(r"no idea so (\d+) \.", text)]
        for split, text in texts.items()
    }
    assert len(numbers["val"]) == 10 and sorted(numbers["train"] + numbers["val"]) == list(
        range(50)
    )
    assert texts["train"] == "".join(f"no idea so {n} ." for n in numbers["train"])


def test_some_questions_are_the_first_ones_and_a_fifth_is_for_validation(prepare, tmp_path):
    path = json_gz(tmp_path / "eli5.json.gz", questions(60))
    assert prepare(eli5, source=path, max_examples=50).returncode == 0
    splits = read_back("data/eli5")
    assert (len(splits["train"]), len(splits["val"])) == (40, 10)
    assert sorted(splits["train"] + splits["val"], key=str) == sorted(
        (exchange(f"why  {i} ?", f"so {i} .") for i in range(50)), key=str
    )


@pytest.mark.parametrize(("knob", "value"), [("mask", "none"), ("max_examples", -1)])
def test_eli5_refuses_a_knob_out_of_range(prepare, tmp_path, knob, value):
    path = json_gz(tmp_path / "eli5.json.gz", questions(5))
    assert_refused(prepare(eli5, source=path, **{knob: value}), f"{knob}={value}")


# ---- ColumnedChatCombined


def columned(i, system=""):
    return {"System": system, "User": f"question {i} ?", "Assistant": f"answer {i} ."}


def columned_file(path, train, validation=None, indent=None):
    """Write formatted_data.json with these records, validation left out if there is none."""
    path.write_text(
        json.dumps(
            {"train": train} | ({"validation": validation} if validation else {}), indent=indent
        )
    )
    return path


@pytest.mark.parametrize("indent", [None, 2])
def test_three_columns_become_turns_of_locutusques_template(prepare, tmp_path, indent):
    train = [columned(0, "be kind"), *map(columned, range(1, 30)), columned(30) | {"System": None}]
    path = columned_file(tmp_path / "formatted_data.json", train, [columned(99)], indent)
    done = prepare(
        columned_chat, source=path if indent else tmp_path
    )  # a file, or the folder with it
    assert done.stdout.splitlines()[-1] == "left out: 0 bad, 0 blank, 0 not English"
    persona = [{"role": "system", "content": "be kind"}]
    assert read_back("data/columned_chat") == {
        "train": [
            (persona if i == 0 else []) + exchange(f"question {i} ?", f"answer {i} .")
            for i in range(31)
        ],
        "val": [exchange("question 99 ?", "answer 99 .")],
    }
    text = "<|USER|> question 1 ? <|ASSISTANT|> answer 1 . <|End|>"
    shard = open_shard("data/columned_chat/train.bin")
    assert (
        Tokenizer("user_assistant").decode(shard.tokens[slice(*shard.offsets[1:3])].tolist())
        == text
    )


def test_max_examples_are_the_first_ones_of_each_list(prepare, tmp_path):
    path = columned_file(
        tmp_path / "f.json", [columned(i) for i in range(9)], [columned(i) for i in range(50, 60)]
    )
    assert prepare(columned_chat, source=path, max_examples=2).returncode == 0
    asked = {
        split: [talk[0]["content"] for talk in talks]
        for split, talks in read_back("data/columned_chat").items()
    }
    assert asked == {
        "train": ["question 0 ?", "question 1 ?"],
        "val": ["question 50 ?", "question 51 ?"],
    }


def test_blank_turns_are_left_out_and_counted(prepare, tmp_path):
    train = [columned(0), columned(1) | {"User": " "}, columned(2) | {"Assistant": ""}]
    path = columned_file(tmp_path / "f.json", train, [columned(9)])
    assert (
        prepare(columned_chat, source=path)
        .stdout.splitlines()[-1]
        .startswith("left out: 0 bad, 2 blank")
    )


def test_what_is_not_english_can_be_left_out(prepare, tmp_path):
    pytest.importorskip("py3langid")
    german = {
        "System": "",
        "User": "Was ist das für ein schöner Baum?",
        "Assistant": "Das ist eine alte Eiche, glaube ich.",
    }
    english = {
        "System": "",
        "User": "What kind of tree is that?",
        "Assistant": "I think that it is an old oak tree.",
    }
    path = columned_file(tmp_path / "f.json", [german, english], [english])
    done = prepare(columned_chat, source=path, english="true")
    assert done.stdout.splitlines()[-1] == "left out: 0 bad, 0 blank, 1 not English"
    assert read_back("data/columned_chat")["train"] == [
        exchange(english["User"], english["Assistant"])
    ]


BAD_RECORDS = {
    "no User": ({"System": "", "Assistant": "a"}, "no User"),
    "a number": (columned(1) | {"User": 5}, "5 as User"),
    "a list": (columned(1) | {"Assistant": ["a"]}, "Assistant"),
    "no object": ("text", "'text'"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_by_its_number_and_can_be_skipped(prepare, tmp_path, name):
    bad, reason = BAD_RECORDS[name]
    path = columned_file(tmp_path / "f.json", [columned(0), bad, columned(2)], [columned(9)])
    assert_refused(
        prepare(columned_chat, source=path), path, "record 2 of train", reason, "--skip_bad=true"
    )
    assert written(tmp_path) == []
    done = prepare(columned_chat, source=path, skip_bad="true")
    assert done.returncode == 0 and "record 2 of train" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("left out: 1 bad")
    assert [talk[0]["content"] for talk in read_back("data/columned_chat")["train"]] == [
        "question 0 ?",
        "question 2 ?",
    ]


def test_damage_within_the_file_is_placed_and_can_be_skipped(prepare, tmp_path):
    train = [
        columned(i) | {"Assistant": f'so {i}: [{{}}, "a"], {{"b": [{{}}]}}, ]}}'} for i in range(40)
    ]  # as code
    path = columned_file(tmp_path / "f.json", train, [columned(99)])
    text = path.read_text()
    path.write_text(text.replace('"question 3 ?"', "question 3 ?"))
    at = text.index('"question 3 ?"')
    assert_refused(prepare(columned_chat, source=path), "record 4 of train", f"at character {at:,}")
    done = prepare(columned_chat, source=path, skip_bad="true")
    asked = [talk[0]["content"] for talk in read_back("data/columned_chat")["train"]]
    assert asked == [f"question {i} ?" for i in range(40) if i != 3] and "1 bad" in done.stdout
    del train[9]["User"]
    columned_file(path, train, [columned(99)])
    path.write_text(path.read_text().replace('"question 3 ?"', "question 3 ?"))
    done = prepare(columned_chat, source=path, skip_bad="true")
    assert "record 4 of train" in done.stderr and "record 10 of train: has no User" in done.stderr


@pytest.mark.parametrize("damage", ["a comma", "no brace"])
def test_damage_at_the_end_of_a_list_costs_nothing_of_the_next(prepare, tmp_path, damage):
    path = columned_file(
        tmp_path / "f.json", [columned(i) for i in range(4)], [columned(i) for i in range(50, 53)]
    )
    end = '"}], "validation"'
    broken = {"a comma": '"},], "validation"', "no brace": '"], "validation"'}[damage]
    path.write_text(path.read_text().replace(end, broken))
    assert_refused(prepare(columned_chat, source=path), "of train")
    assert prepare(columned_chat, source=path, skip_bad="true").returncode == 0
    asked = {
        split: [talk[0]["content"] for talk in talks]
        for split, talks in read_back("data/columned_chat").items()
    }
    assert asked["val"] == [f"question {i} ?" for i in range(50, 53)]
    assert asked["train"] == [f"question {i} ?" for i in range(4 if damage == "a comma" else 3)]


def test_a_file_that_was_cut_is_refused_or_used_as_far_as_it_goes(prepare, tmp_path):
    path = columned_file(tmp_path / "f.json", [columned(i) for i in range(100)], [columned(999)])
    path.write_text(path.read_text()[: path.read_text().index("question 60 ?")])
    assert_refused(
        prepare(columned_chat, source=path), path, "record 61 of train", "Unterminated string"
    )
    done = prepare(columned_chat, source=path, skip_bad="true")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    splits = read_back("data/columned_chat")
    assert sorted(talk[0]["content"] for talk in splits["train"] + splits["val"]) == sorted(
        f"question {i} ?" for i in range(60)
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "it ends before {"),
        ("[]", "'[' instead of {"),
        ("{}", "record 1 of the file"),
        ('{"test": []}', "neither train nor validation"),
        ('{["a"]: []}', "neither train nor validation"),
        ('{"train": {}}', "'{' instead of ["),
        ('{"train": [{"a": x}]}', "Expecting value at character 17"),
        ("<html>", "'<' instead of {"),
        ('{"train": [], "validation": []}', "no conversation is left"),
    ],
)
def test_another_file_is_refused(prepare, tmp_path, content, what):
    path = tmp_path / "f.json"
    path.write_text(content)
    assert_refused(prepare(columned_chat, source=path), what)
    assert written(tmp_path) == []


def test_a_file_larger_than_memory_can_be_streamed(tmp_path):
    path = columned_file(
        tmp_path / "f.json", [columned(1) | {"Assistant": "x" * 500_000}] * 40, [columned(2)]
    )  # 20 MB
    tracemalloc.start()
    assert sum(1 for _ in columned_chat.records(path, None, False)) == 41
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert highest < 10e6
    assert columned_chat.has_validation(path)


@pytest.mark.parametrize("size", [10, (1 << 24) - 5, (1 << 24) + 3])
def test_a_validation_list_is_found_wherever_it_is_and_its_name_in_a_text_is_none(tmp_path, size):
    for train, validation in (
        ('a "validation": [] b' + "x" * size, [columned(2)]),
        ('"validation"', None),
    ):
        record = columned(1) | {"Assistant": train, "System": "validation"}
        path = columned_file(tmp_path / "f.json", [record], validation)
        assert columned_chat.has_validation(path) == bool(validation)


def test_the_hub_has_it(prepare, web, monkeypatch):
    hub = web.folder / "datasets" / "Locutusque" / "ColumnedChatCombined" / "resolve" / "main"
    hub.mkdir(parents=True)
    columned_file(hub / "formatted_data.json", [columned(1)], [columned(2)])
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    assert prepare(columned_chat).returncode == 0
    assert read_back("data/columned_chat")["val"] == [exchange("question 2 ?", "answer 2 .")]


# ---- plain text


def test_plain_text_is_divided_by_paragraphs_and_learned_whole(prepare, tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text(
        "\ufeff" + "".join(f"line {i}\n  goes on\n\n\n" for i in range(100))
    )
    (folder / "b.txt").write_text("a story\n<|endoftext|>\nanother\n")
    assert prepare(plain_text, source=folder).returncode == 0
    shards = {split: open_shard(f"data/text/{split}.bin") for split in ("train", "val")}
    found = {
        split: Tokenizer().decode(shard.tokens.tolist()).split("\n\n")
        for split, shard in shards.items()
    }
    assert all(paragraphs.pop(0) == "" for paragraphs in found.values())
    expected = [*(f"line {i} goes on" for i in range(100)), "a story", "another"]
    assert sorted(found["train"] + found["val"]) == sorted(expected)
    assert 1 <= len(found["val"]) < 20
    assert all(shard.mask(0, len(shard.tokens)).all() for shard in shards.values())


def test_a_folder_without_texts_is_refused(prepare, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(prepare(plain_text, source=tmp_path / "empty"), "empty has no .txt file")


def test_text_without_a_source_or_a_second_paragraph_is_refused(prepare, tmp_path):
    assert_refused(prepare(plain_text), "--source=PATH")
    (tmp_path / "b.txt").write_bytes(b"PK\3\4\0\0 no text")
    assert_refused(prepare(plain_text, source=tmp_path / "b.txt"), "b.txt is no text")
    (tmp_path / "a.txt").write_text("one line\n")
    assert_refused(prepare(plain_text, source=tmp_path / "a.txt"), "no text is left")
    assert written(tmp_path) == []
