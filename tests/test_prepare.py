"""The corpora: excerpts in the published formats go in, what came out is read back from shards."""

import csv
import gzip
import hashlib
import importlib
import io
import itertools
import json
import re
import sys
import tarfile
import threading
import time
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from conftest import assert_refused, largest_file, small_talk, write_jsonl
from test_files import Server, closed_port

from nanochatgpt import files
from nanochatgpt.configurator import run
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import END_OF_TEXT, Tokenizer, gpt2_encoding
from prepare import (
    chitchat,
    chitchat_package,
    columned_chat,
    corpus,
    eli5,
    jsonl,
    personachat,
    retry,
    spc,
)
from prepare import parlai as parlai_format
from prepare import text as plain_text
from prepare.natural import natural
from prepare.records import read_records
from prepare.ways import File


@pytest.fixture
def prepare(tmp_path, monkeypatch, in_process):
    """Run a script of prepare/ in this process in an empty folder, prepare(eli5, source=PATH)."""
    monkeypatch.chdir(tmp_path)

    def call(module, **knobs):
        args = [f"--{name}={value}" for name, value in knobs.items()]
        return in_process(lambda: run(module.main, module.Config), f"{module.__name__}.py", *args)

    return call


@pytest.fixture
def prepared(prepare):
    """Run a script as `prepare` does; return the two splits of conversations that it wrote."""

    def call(module, **knobs):
        done = prepare(module, **knobs)
        assert done.returncode == 0, done.stderr
        return read_back(f"data/{module.__name__.removeprefix('prepare.')}")

    return call


@pytest.fixture
def refused(prepare, tmp_path):
    """Run a script that must refuse and write nothing: refused(eli5, "name", source=PATH)."""

    def call(module, *words, **knobs):
        assert_refused(prepare(module, **knobs), *words)
        assert [path for path in tmp_path.rglob("*") if ".bin" in path.name] == []

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
        borders = itertools.pairwise(shard.offsets)
        splits[split] = [parse(shard.tokens[a:b].tolist()) for a, b in borders]
    return splits


def everything(splits):
    """Return the conversations of both splits in an order that can be compared."""
    return sorted(splits["train"] + splits["val"], key=str)


def files_in(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def without_persona(messages):
    return [message for message in messages if message["role"] != "system"]


def texts(conversations):
    """Return conversations as lists of texts, without personas."""
    return [[m["content"] for m in without_persona(messages)] for messages in conversations]


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


def test_equal_keys_share_a_split():
    train, val = divided([str(i % 500) for i in range(1500)])
    assert not set(train) & set(val)


def test_two_conversations_are_enough_for_both_splits():
    assert [i for i in range(200) if [] in divided(["first", str(i)])] == []
    assert divided(["first", "first", "second", "first"]) == (["second"], ["first"] * 3)


def test_what_was_held_out_stays_so_when_conversations_are_added():
    keys = [str(i) for i in range(1000)]
    _, before = divided(keys[:500])
    _, after = divided(keys)
    assert [key for key in after if key in keys[:500]] == before


@pytest.mark.slow
def test_the_split_does_not_depend_on_the_process(prepare, script, talk):
    assert prepare(jsonl, source=talk, out_dir="here").returncode == 0
    hashing = {"PYTHONHASHSEED": "7"}
    done = script("prepare/jsonl.py", f"--source={talk}", "--out_dir=there", env=hashing)
    assert done.returncode == 0
    assert files_in("here") == files_in("there")


# ---- the report


def spelled(messages, opening="", closing=""):
    """Return a conversation as the default template defines it, its supervised parts marked."""
    lines = {
        "system": "[Persona]: {}",
        "user": "[Human]: {}",
        "assistant": "[Bot]:" + opening + " {}<|endoftext|>" + closing,
    }
    return "\n".join(lines[message["role"]].format(message["content"]) for message in messages)


def n_tokens(text):
    return len(gpt2_encoding().encode(text, allowed_special="all"))


def test_the_report_counts_what_was_written(prepare, tmp_path):
    conversations = [*small_talk(5), exchange("the longest", "comes first" + " comes first" * 199)]
    conversations += small_talk(1500, seed=3)
    source = write_jsonl(tmp_path / "talk.jsonl", conversations)
    recognised, *report = prepare(jsonl, source=source).stdout.splitlines()
    assert f"OpenAI's messages ({len(conversations):,})" in recognised
    splits = read_back("data/jsonl")
    assert everything(splits) == sorted(conversations, key=str)
    for line, split in zip(report, ("train", "val"), strict=False):
        n_turns = supervised = 0
        lengths = [n_tokens(spelled(messages)) for messages in splits[split]]
        for message in itertools.chain(*splits[split]):
            n_turns += message["role"] != "system"
            if message["role"] == "assistant":
                supervised += n_tokens(f" {message['content']}<|endoftext|>")
        numbers = [f"{len(lengths):,}", f"{n_turns:,}", f"{sum(lengths):,}"]
        numbers += [f"{supervised / sum(lengths):.1%}", f"{max(lengths)}"]
        assert line.startswith(f"data/jsonl/{split}.bin: ")
        assert re.findall(r"\d[\d,.]*%?(?= )", line) == numbers


def test_the_example_is_marked_exactly_around_what_is_learned(prepare, tmp_path):
    persona = {"role": "system", "content": "i am a pirate ."}
    messages = [persona, *exchange("hi", "ahoy"), *exchange("ho !", "aye .")]
    source = write_jsonl(tmp_path / "talk.jsonl", [exchange("first", "held out"), messages])
    _, _, _, heading, shown = prepare(jsonl, source=source).stdout.split("\n", 4)
    assert shown == spelled(messages, "«", "»") + "\n"
    assert f" {n_tokens(spelled(messages))} tokens" in heading


def test_a_long_example_is_cut(prepare, tmp_path):
    long = exchange("why ?", "word " * 5000)
    source = write_jsonl(tmp_path / "talk.jsonl", [exchange("first", "held out"), long])
    shown = prepare(jsonl, source=source).stdout.split("\n", 4)[4]
    assert 1400 < len(shown) < 1600
    assert shown.rstrip().endswith("...")


def test_a_terminal_that_lacks_a_character_shows_another(prepared, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "t.jsonl", [exchange("first", "val"), exchange("how ?", "😀")])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert prepared(jsonl, source=source)["train"] == [exchange("how ?", "😀")]


# ---- failures leave the earlier shards


@pytest.fixture
def broken(tmp_path):
    """A .jsonl file with more than one batch before line 1,501, which is not JSON."""
    conversations = [exchange(f"what is {i} ?", "a number .") for i in range(1500)]
    path = write_jsonl(tmp_path / "broken.jsonl", conversations)
    path.write_text(path.read_text() + "{\n")
    return path


def test_a_failure_in_the_middle_leaves_the_earlier_shards_and_nothing_else(prepare, talk, broken):
    prepare(jsonl, source=talk)
    before = files_in("data/jsonl")
    assert before.keys() == {"train.bin", "val.bin"}
    assert prepare(jsonl, source=broken).returncode == 2
    assert files_in("data/jsonl") == before


def test_an_error_overwrites_the_progress(prepare, broken, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress, error = prepare(jsonl, source=broken).stderr.split("\r")
    assert "M tokens, " in progress
    assert "line 1,501" in error and len(error) > len(progress)


@pytest.mark.parametrize("room", [2_000, 20_000, -10])
def test_a_full_disk_leaves_the_earlier_shards_and_is_named(prepare, talk, tmp_path, room):
    other = write_jsonl(tmp_path / "other.jsonl", small_talk(1500, seed=9))
    prepare(jsonl, source=other, out_dir="elsewhere")
    size = Path("elsewhere/train.bin").stat().st_size
    prepare(jsonl, source=talk)
    before = files_in("data/jsonl")
    with largest_file(room % size):  # -10: val.bin fits, and all but the last bytes of train.bin
        done = prepare(jsonl, source=other)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2
    assert "data/jsonl" in done.stderr and "space" in done.stderr
    assert files_in("data/jsonl") == before


def test_one_conversation_is_refused(refused, tmp_path):
    source = write_jsonl(tmp_path / "one.jsonl", [exchange("hi", "hello")])
    refused(jsonl, "at least two", source=source)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(n):
        numbers = (exchange(f"what is {i} ?", "it is .") for i in range(n))
        conversations = (("train" if i % 20 else "val", talk) for i, talk in enumerate(numbers))
        tracemalloc.start()
        corpus.prepare(corpus.Config(out_dir=str(tmp_path)), "numbers", conversations)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(1000)  # caches
    assert peak(6000) < 1.2 * peak(2000)


# ---- Synthetic-Persona-Chat


def spc_file(path, conversations):
    """Write [(personas of user 1, of user 2, [(user, text)])] as Synthetic-Persona-Chat has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user 1 personas", "user 2 personas", "Best Generated Conversation"])
        for first, second, turns in conversations:
            lines = [f"User {user}: {text}" for user, text in turns]
            table.writerow(["\n".join(first), "\n".join(second), "\n".join(lines)])
    return path


def spc_talks(n, name):
    turns = [[(1, f"hi {name} {i}"), (2, 'hello, "you"')] for i in range(n)]
    return [(["i am one.", f"i am {i}."], ["i am two."], turns[i]) for i in range(n)]


def test_both_users_are_the_bot_once_with_their_persona(tmp_path):
    turns = [(1, "Hi!"), (2, "Hello!"), (2, "You?"), (1, "Fine: thanks")]
    talk = (["I bake.", "I knit."], ["I sail."], turns)
    read = [messages for _, messages in spc.read(spc_file(tmp_path / "talks.csv", [talk] * 20))]
    assert texts(read) == [["Hi!", "Hello! You?", "Fine: thanks"]] * 40
    roles = [[message["role"] for message in without_persona(messages)] for messages in read]
    assert roles == [["assistant", "user", "assistant"], ["user", "assistant", "user"]] * 20
    personas = [[m["content"] for m in messages if m["role"] == "system"] for messages in read]
    assert {str(p) for p in personas[::2]} == {"[]", "['I bake. I knit.']"}
    assert {str(p) for p in personas[1::2]} == {"[]", "['I sail.']"}


def test_the_published_files_are_split_as_published_and_one_alone_is_divided(prepared, tmp_path):
    for split, (name, *_) in spc.FILES.items():
        n = 30 if split == "train" else 4
        spc_file(tmp_path / "published" / Path(name).name, spc_talks(n, split))
    splits = prepared(spc, source="published")
    assert (len(splits["train"]), len(splits["val"])) == (60, 8)
    assert all("val" in str(messages) for messages in splits["val"])
    splits = prepared(spc, source="published/Synthetic-Persona-Chat_train.csv")
    assert len(splits["train"]) + len(splits["val"]) == 60
    numbers = {}
    for split, conversations in splits.items():
        numbers[split] = {
            re.search(r"hi train \d+", str(messages))[0] for messages in conversations
        }
    assert len(numbers["val"]) == len(splits["val"]) / 2  # both sides of a conversation together
    assert not numbers["val"] & numbers["train"]


def test_what_is_not_synthetic_persona_chat_is_refused(refused, tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    refused(spc, "other.csv", "user 1 personas", source="other.csv")
    header = spc_file(tmp_path / "quote.csv", []).read_text()
    (tmp_path / "quote.csv").write_text(header + '"a\n' + "x" * 200_000)
    refused(spc, "quote.csv", source="quote.csv")
    name = "Synthetic-Persona-Chat_{}.csv"
    spc_file(tmp_path / "half" / name.format("train"), spc_talks(3, "train"))
    refused(spc, name.format("valid"), source="half")


# ---- any corpus


@pytest.mark.parametrize("module", [columned_chat, personachat, eli5, jsonl, spc])
def test_a_missing_source_is_named(refused, module):
    refused(module, "nowhere/file", source="nowhere/file")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server of web.folder at web.url; the user's caches are out of reach."""
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        poll = {"poll_interval": 0.01}
        threading.Thread(target=server.serve_forever, kwargs=poll, daemon=True).start()
        server.folder = folder
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
        server.shutdown()


def hub_folder(web, repo):
    """Return the folder of web's files that stands for a dataset on the Hugging Face hub."""
    folder = web.folder / "datasets" / repo / "resolve" / "main"
    folder.mkdir(parents=True)
    return folder


def size_and_hash(path):
    body = path.read_bytes()
    return len(body), hashlib.sha256(body).hexdigest()


def test_synthetic_persona_chat_is_downloaded_from_the_hub_or_a_mirror(prepared, web):
    folder = hub_folder(web, spc.REPO)
    for split, (name, *_) in spc.FILES.items():
        spc_file(folder / name, spc_talks(5, split))
    assert len(prepared(spc)["val"]) == 10


def test_eli5_is_downloaded_once(prepare, web, monkeypatch):
    folder = hub_folder(web, "rexarski/eli5_category")
    files = {}
    for split, (name, *_) in eli5.FILES.items():
        path = json_gz(folder / name, questions(30, split))
        files[split] = File(name, *size_and_hash(path))
    monkeypatch.setattr(eli5, "FILES", files)
    assert prepare(eli5).returncode == 0
    expected = [exchange(f"why val {i} ?", f"so {i} .") for i in range(30)]
    assert read_back("data/eli5")["val"] == expected
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert prepare(eli5, out_dir="again").returncode == 0
    assert files_in("again") == files_in("data/eli5")


def test_columned_chat_is_downloaded(prepared, web):
    folder = hub_folder(web, "Locutusque/ColumnedChatCombined")
    columned_file(folder / "formatted_data.json", [columned(1)], [columned(2)])
    assert prepared(columned_chat)["val"] == [exchange("question 2 ?", "answer 2 .")]


def test_offline_the_missing_file_is_named(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(eli5, "eli5-category-train.json.gz", "HF_HUB_OFFLINE")


# ---- jsonl


def test_every_conversation_comes_back_with_its_persona_and_any_text(prepared, tmp_path):
    odd = 'a\n[Bot]: b <|endoftext|> «c» \\ "d" \t é 漢字 😀 [Human]: \u2028 \x85 e'
    conversations = [
        [{"role": "system", "content": odd}, *exchange(odd, odd)],
        [{"role": "assistant", "content": "i begin"}, *exchange("and", "i end")],
        [{"role": "user", "content": "one"}, *exchange("two", "three"), *exchange("four", "5")[:1]],
    ]
    source = [exchange("first", "held out"), *conversations]
    splits = prepared(jsonl, source=write_jsonl(tmp_path / "talk.jsonl", source))
    assert everything(splits) == sorted(source, key=str)
    assert splits["train"] == [
        messages for messages in conversations if messages in splits["train"]
    ]


def lines_of(conversations, end="\n"):
    return end.join(json.dumps({"messages": messages}) for messages in conversations).encode()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("no_newline_at_the_end.jsonl", lines_of),
        ("crlf.json", lambda c: lines_of(c, "\r\n")),
        ("blank_lines.jsonl", lambda c: b"\n \n" + lines_of(c, "\n\n\t\n") + b"\n\n"),
        ("byte_order_mark.jsonl", lambda c: b"\xef\xbb\xbf" + lines_of(c)),
        ("packed.jsonl.gz", lambda c: gzip.compress(lines_of(c))),
        ("parts.gz", lambda c: b"".join(gzip.compress(lines_of([m]) + b"\n") for m in c)),
        ("fields.jsonl", lambda c: lines_of(c).replace(b'{"messages"', b'{"id": 7, "messages"')),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lines_are_read_however_they_are_packed(prepared, tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(small_talk(60)))
    assert everything(prepared(jsonl, source=path)) == sorted(small_talk(60), key=str)


def test_half_a_surrogate_pair_becomes_the_replacement_character(prepared, tmp_path):
    conversations = [exchange("\ud800 a", "b \udfff"), exchange("\ud83d\ude00", "fine")]
    path = write_jsonl(tmp_path / "talk.jsonl", conversations)
    assert rb"\ud83d\ude00" in path.read_bytes()
    splits = prepared(jsonl, source=path)
    assert splits["val"] == [exchange("\ufffd a", "b \ufffd")]
    assert splits["train"] == [exchange("😀", "fine")]


def test_another_template_can_be_written(prepare, talk):
    assert prepare(jsonl, source=talk, template="user_assistant", out_dir="deep/er").returncode == 0
    shard = open_shard("deep/er/train.bin")
    assert (shard.template, shard.vocab_size) == ("user_assistant", 50_262)
    assert everything(read_back("deep/er")) == sorted(small_talk(60), key=str)
    text = Tokenizer("user_assistant").decode(shard.tokens[: shard.offsets[1]].tolist())
    assert text.startswith(("<|USER|> ", "<|SYSTEM|> ")) and text.endswith(" <|End|>")


HI = '{"role": "user", "content": "hi"}'
GOOD = f'{{"messages": [{HI}, {{"role": "assistant", "content": "hello"}}]}}'
BAD_LINES = {
    "cut": GOOD[:-20],
    "two values": GOOD + GOOD,
    "not UTF-8": GOOD.replace("hi", "\udcff"),
    "endless nesting": "[" * 100_000,
    "list": "[1, 2]",
    "null": "null",
    "other field": '{"text": "hi"}',
    "messages text": '{"messages": "hi"}',
    "message text": '{"messages": ["hi"]}',
    "no role": GOOD.replace('"role": "user", ', ""),
    "role list": GOOD.replace('"user"', '["user"]'),
    "other role": GOOD.replace("user", "tool"),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(refused, tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n{line}\n{GOOD}\n", "utf-8", errors="surrogateescape")
    refused(jsonl, path, "line 4", source=path)


def test_a_damaged_gz_is_named(refused, tmp_path):
    path = tmp_path / "mine.jsonl.gz"
    packed = gzip.compress(lines_of(small_talk(300)))
    for body in (packed[: len(packed) // 2], packed[:-4], b"not gzip"):
        path.write_bytes(body)
        refused(jsonl, "mine.jsonl.gz", source=path)
    path.write_bytes(b"")
    refused(jsonl, "at least two", source=path)


def test_a_source_is_needed(refused):
    refused(jsonl, "--source=FILE.jsonl")


def test_a_conversation_is_in_one_split_however_its_lines_are_written(tmp_path):
    lines = [GOOD]
    for i in range(300):
        messages = exchange(f"q{i}", "yes")
        reversed_fields = [dict(reversed(message.items())) for message in messages]
        more_fields = [message | {"date": i} for message in messages]
        lines += [
            json.dumps({"messages": messages}),
            json.dumps({"messages": messages}, separators=(",", ":")),
            json.dumps({"messages": reversed_fields}),
            json.dumps({"id": i, "messages": more_fields}),
        ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    splits = {}
    for split, messages in corpus.divide(jsonl.read(path)):
        splits.setdefault(messages[0]["content"], set()).add(split)
    assert len(splits) == 301
    assert [question for question, names in splits.items() if len(names) > 1] == []


# ---- chitchat


def chat_of(*groups):
    """Return a conversation as dataset.json has it, from groups of (sender, text)."""
    date = "2018-05-02T19:38:15Z"
    messages = []
    for group in groups:
        fields = [{"text": text, "timestamp": date, "sender": sender} for sender, text in group]
        messages.append(fields)
    return {"messages": messages, "ratings": {"witty": 3, "int": 6}}


def dataset(path, conversations):
    path.write_text(json.dumps(conversations), encoding="utf-8")
    return path


A = ("a", "hi")
B = ("b", "yo")


@pytest.mark.parametrize(
    ("conversation", "turns"),
    [
        (chat_of([A], [B]), ["hi", "yo"]),
        (chat_of([A, ("a", "there")], [B], [("a", "so")]), ["hi there", "yo", "so"]),
        (chat_of([A], [("a", "again")], [B]), ["hi again", "yo"]),
        (chat_of([A, ("b", "in one group")], [B]), ["hi", "in one group yo"]),
        (chat_of([("a", "  hi\n")], [("b", " \n\t")], [("a", "so")], [B]), ["hi so", "yo"]),
        (chat_of([("a", "two\nlines")], [], [B]), ["two\nlines", "yo"]),
        (chat_of([A], [("a", "nobody ?")]), None),
        (chat_of([A], [("b", "  ")]), None),
        (chat_of(), None),
    ],
)
def test_messages_in_a_row_are_one_turn_and_both_speakers_are_the_bot(
    tmp_path, conversation, turns
):
    pairs = list(chitchat_package.read(dataset(tmp_path / "dataset.json", {"id": conversation})))
    expected = []
    for roles in (("user", "assistant"), ("assistant", "user")) if turns else ():
        messages = zip(itertools.cycle(roles), turns, strict=False)
        messages = [{"role": role, "content": text} for role, text in messages]
        expected.append(("id", messages, 4.5))  # the mean rating
    assert pairs == expected


def test_both_copies_of_a_chitchat_conversation_share_a_split(prepared, tmp_path, monkeypatch):
    chats = {}
    for i in range(100):
        chats[f"id{i}"] = chat_of([("a", f"hi {i}")], [("b", f"yo {i}")], [("a", "bye")])
    path = dataset(tmp_path / "dataset.json", chats)
    monkeypatch.setattr(chitchat, "packaged", lambda: path)
    splits = prepared(chitchat)
    assert len(splits["train"]) + len(splits["val"]) == 200
    for conversations in splits.values():
        assert texts(conversations[::2]) == texts(conversations[1::2])
        for one, other in zip(conversations[::2], conversations[1::2], strict=True):
            assert [m["role"] for m in one] == ["user", "assistant", "user"]
            assert [m["role"] for m in other] == ["assistant", "user", "assistant"]


def real_chats():
    """Return the turns of each conversation of the package, read by other code."""
    path = metadata.distribution("chitchat-dataset").locate_file("chitchat_dataset/dataset.json")
    chats = []
    for chat in json.loads(path.read_text(encoding="utf-8")).values():
        turns = []
        sender = None
        for message in itertools.chain(*chat["messages"]):
            text = message["text"].strip()
            if text and message["sender"] == sender:
                turns[-1] += f" {text}"
            elif text:
                turns.append(text)
                sender = message["sender"]
        if len(turns) > 1:
            chats.append(turns)
    return chats


def test_no_conversation_of_the_package_is_lost(prepare, monkeypatch):
    pairs = []
    collect = lambda config, name, conversations, origin: pairs.extend(conversations)  # noqa: E731
    monkeypatch.setattr(chitchat, "prepare", collect)
    assert prepare(chitchat).returncode == 0
    human_first = [messages for _, messages in pairs[::2]]
    bot_first = [messages for _, messages in pairs[1::2]]
    assert len(human_first) == 4017
    assert texts(human_first) == texts(bot_first) == real_chats()
    assert {messages[0]["role"] for messages in human_first} == {"user"}
    assert {messages[0]["role"] for messages in bot_first} == {"assistant"}
    assert [split for split, _ in pairs[::2]] == [split for split, _ in pairs[1::2]]


@pytest.mark.slow
def test_the_whole_package_comes_back_from_the_shards(script, tmp_path):
    done = script("prepare/chitchat.py", timeout=600)
    assert done.returncode == 0, done.stderr
    splits = read_back(tmp_path / "data" / "chitchat")
    assert sorted(texts(splits["train"] + splits["val"])) == sorted(real_chats() * 2)


# ---- PersonaChat


def dialogs(n, seed=0):
    """Return n dialogs, (persona's sentences, utterances)."""
    utterances = texts(small_talk(n, seed))
    return [([f"i am number {i} .", "i like tea ."], utterances[i]) for i in range(n)]


def parlai(dialogs, candidates=""):
    """Return the text of a ParlAI file."""
    text = ""
    for persona, utterances in dialogs:
        lines = [f"your persona: {line}" for line in persona]
        for question, reply in zip(utterances[::2], utterances[1::2], strict=True):
            choices = f"\t\t{candidates}|{reply}" if candidates else ""
            lines.append(f"{question}\t{reply}{choices}")
        text += "".join(f"{number} {line}\n" for number, line in enumerate(lines, 1))
    return text


def read_parlai(lines):
    dialogs = parlai_format.dialogs(lines, "file.txt")
    return [messages for _, messages in personachat.read(dialogs, natural_writing=False)]


TRAIN = dialogs(60, seed=1)
VALID = dialogs(20, seed=2)
DECOY = "this file must not be read\n"
PERSONACHAT = {
    "train_self_original.txt": parlai(TRAIN, "no .|yes ."),
    "valid_self_original.txt": parlai(VALID, "no .|yes ."),
}
for kind in ("self_revised", "other_original", "both_original", "none_original"):
    for split in ("train", "valid", "test"):
        PERSONACHAT[f"{split}_{kind}.txt"] = DECOY
CONVAI2 = PERSONACHAT | {
    "train_self_original_no_cands.txt": parlai(TRAIN),
    "valid_self_original_no_cands.txt": parlai(VALID),
    "train_self_revised_no_cands.txt": DECOY,
}


def unpacked(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
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
    "PersonaChat's archive": lambda path: archive(path / "personachat.tgz", PERSONACHAT),
    "ConvAI2's archive": lambda path: archive(path / "convai2.tgz", CONVAI2, inside=""),
    "dotted names": lambda path: archive(path / "convai2.tgz", CONVAI2, inside="./"),
    "archive unzipped": lambda path: archive(path / "personachat.tar", PERSONACHAT),
    "another name": lambda path: archive(path / "x.tgz", PERSONACHAT).rename(path / "blob"),
    "folder": lambda path: unpacked(path / "folder", PERSONACHAT),
    "folder in a folder": lambda path: unpacked(path / "f" / "personachat", CONVAI2).parent,
    "without candidates": lambda path: unpacked(path / "folder", only("no_cands", CONVAI2)),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_dialog_of_personachat_is_read_in_order_and_split_as_published(
    prepared, tmp_path, make
):
    splits = prepared(personachat, source=make(tmp_path), natural="false")
    for conversations, published in ((splits["train"], TRAIN), (splits["val"], VALID)):
        assert texts(conversations) == [utterances for _, utterances in published]
        for messages, (persona, _) in zip(conversations, published, strict=True):
            assert messages[0]["content"] == " ".join(persona) or messages[0]["role"] == "user"


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
    conversations = read_parlai(io.StringIO(text * 20, newline=None))
    question = exchange("and 1 of these ?", "your persona: is nice .")
    expected = [
        exchange("hi , how are you ?", "fine .") + question,
        exchange("", "hello !")[1:] + exchange("hi .", "bye ."),
        exchange("no persona", "none"),
        exchange("a dialog of one line", "yes"),
    ]
    assert [without_persona(messages) for messages in conversations] == expected * 20
    for i, personas in enumerate([{"i like tea. i'm 6\u2032 tall."}, {"i begin."}, set(), set()]):
        first = [messages[0] for messages in conversations[i::4]]
        assert {m["content"] for m in first if m["role"] == "system"} == personas


def test_half_of_the_conversations_keep_the_persona_the_same_ones_each_time():
    published = dialogs(600)
    conversations = read_parlai(parlai(published).splitlines())
    assert texts(conversations) == [utterances for _, utterances in published]
    kept = [messages[0]["content"] for messages in conversations if messages[0]["role"] == "system"]
    assert 250 < len(kept) < 350
    assert len(set(kept)) == len(kept)
    assert set(kept) < {" ".join(persona) for persona, _ in published}
    assert conversations == read_parlai(parlai(published).splitlines())


@pytest.mark.parametrize("candidates", ["", "no .|yes ."])
def test_one_file_alone_is_divided_and_nothing_is_lost(prepared, tmp_path, candidates):
    path = tmp_path / "valid_self_original.txt"
    path.write_text(parlai(dialogs(300), candidates))
    splits = prepared(personachat, source=path, natural="false")
    train, val = (texts(splits[split]) for split in ("train", "val"))
    assert sorted(train + val) == sorted(utterances for _, utterances in dialogs(300))
    assert 4 < len(val) < 30
    assert not set(map(str, train)) & set(map(str, val))


def test_the_two_sides_of_a_dialog_share_a_split(tmp_path):
    """ConvAI2's training file has each dialog twice; in one the bot begins, after a silence."""
    text = parlai([(["i am first ."], ["a", "b"])])
    for i in range(300):
        utterances = [f"{i} {word}" for word in ("hi", "hello", "how are you", "fine", "ok", "bye")]
        other_side = ["__SILENCE__", *utterances[:-1]]
        text += parlai([(["i reply ."], utterances), (["i begin ."], other_side)])
    path = tmp_path / "train_self_original.txt"
    path.write_text(text)
    splits = {}
    for split, messages in personachat.conversations([path], natural_writing=False):
        splits.setdefault(without_persona(messages)[0]["content"], set()).add(split)
    assert len(splits) == 301
    assert [first for first, names in splits.items() if len(names) > 1] == []


@pytest.mark.parametrize(
    "line",
    ["hello there", "3 no reply", "x hi\tthere", "<html>\t</html>", "\tx", "3\thi\tthere"],
)
def test_a_line_that_is_not_parlais_is_named_with_its_file(refused, tmp_path, line):
    name = "train_self_original.txt"
    bad = f"1 your persona: i like tea.\n2 hi\thello\n{line}\n4 how are you ?\tfine\n"
    (tmp_path / name).write_text(bad)
    refused(personachat, name, "line 3", source=name)
    path = archive(tmp_path / "personachat.tgz", PERSONACHAT | {name: bad})
    refused(personachat, name, "line 3", source=path)


ESCAPED = (
    "1 your persona: i like tea.\\nyour persona: i have a cat.\\nhi\tthere\n"
    "2 how\\nare you ?\tfine\\tthanks\n"
)
SILENT = (
    "1 your persona: i like tea.\n2 your persona: i have a cat.\n"
    "3 __SILENCE__\tthere\n4 hi\t__SILENCE__\n5 bye\tgood night\t\tno .|good night\n"
)
PARLAIS_OWN = (
    "text:your persona: i like tea.\\nyour persona: i have a cat.\\nhi\tlabels:there"
    "\tlabel_candidates:no|there\n"
    "text:how\\nare you ?\tlabels:fine\\tthanks\tepisode_done:True\n\n"
)


@pytest.mark.parametrize(
    ("dialog", "expected"),
    [
        (ESCAPED, [("hi", "there"), ("how\nare you ?", "fine\tthanks")]),
        (SILENT, [("", "there"), ("hi", ""), ("bye", "good night")]),
        (PARLAIS_OWN, [("hi", "there"), ("how\nare you ?", "fine\tthanks")]),
    ],
)
def test_what_parlais_scripts_write_is_read(dialog, expected):
    lines = (dialog * 3).splitlines(keepends=True)
    for persona, exchanges in parlai_format.dialogs(lines, "dump.txt"):
        assert persona == ["i like tea.", "i have a cat."]
        assert [exchange[:2] for exchange in exchanges] == expected
    turns = [text for exchange in expected for text in exchange if text]
    read = [without_persona(messages) for messages in read_parlai(lines)]
    assert [[message["content"] for message in messages] for messages in read] == [turns] * 3


def test_a_source_without_the_files_is_named_with_what_it_lacks(refused, tmp_path):
    for source in (
        archive(tmp_path / "empty.tgz", {}),
        archive(tmp_path / "source.tgz", only("revised", PERSONACHAT)),
        unpacked(tmp_path / "source", {"readme.txt": "hello"}),
    ):
        refused(personachat, source, "self_original.txt", source=source)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_source_with_one_split_is_divided(prepared, tmp_path, split):
    files = only(split, PERSONACHAT)
    folder = unpacked(tmp_path / "folder", files)
    alone = prepared(personachat, source=folder / f"{split}_self_original.txt")
    assert alone["train"] and alone["val"]
    assert prepared(personachat, source=folder) == alone
    assert prepared(personachat, source=archive(tmp_path / "s.tgz", files)) == alone


@pytest.mark.parametrize("damage", [0.3, 0.6, 0.999, "zeros"])
def test_a_damaged_archive_is_named(refused, tmp_path, damage):
    long = parlai(dialogs(1000))
    path = archive(
        tmp_path / "personachat.tgz",
        PERSONACHAT | {"valid_self_original.txt": long, "end.txt": long},
    )
    body = path.read_bytes()
    if damage == "zeros":
        middle = len(body) // 2
        path.write_bytes(body[:middle] + bytes(2000) + body[middle + 2000 :])
    else:
        path.write_bytes(body[: int(len(body) * damage)])
    refused(personachat, path.name, source=path)


@pytest.mark.parametrize("module", [personachat, plain_text])
@pytest.mark.parametrize("length", [12, 0.5, 0.99])
def test_a_gzipped_text_that_is_cut_short_is_named(refused, tmp_path, module, length):
    body = gzip.compress(parlai(dialogs(300)).encode())
    path = tmp_path / "train.txt.gz"
    path.write_bytes(body[: length if length > 1 else int(len(body) * length)])
    refused(module, path.name, source=path)


def test_a_file_of_one_dialog_is_refused(refused, tmp_path):
    path = tmp_path / "train_self_original.txt"
    path.write_text("1 your persona: i like tea.\n2 hi\thello\n3 how are you ?\tfine\n")
    refused(personachat, "at least two", source=path)


# ---- the editions of PersonaChat


def as_records(dialogs, silence="__ SILENCE __"):
    """Return dialogs as Hugging Face's JSON has them, with every turn's history."""
    conversations = []
    for persona, utterances in dialogs:
        said = [text or silence for text in utterances]
        turns = []
        for i in range(1, len(said), 2):
            turns.append({"history": said[:i], "candidates": ["no .", "yes .", said[i]]})
        conversations.append({"personality": persona, "utterances": turns})
    return conversations


def as_rows(dialogs):
    """Return dialogs as bavard/personachat_truecased has them on the hub, a row for each turn."""
    rows = []
    for number, record in enumerate(as_records(dialogs)):
        for i, turn in enumerate(record["utterances"]):
            row = {"conv_id": number, "utterance_idx": i, "personality": record["personality"]}
            rows.append(row | turn)
    return rows


def as_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def write_parquet(path, records, **options):
    arrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.Table.from_pylist(records)
    importlib.import_module("pyarrow.parquet").write_table(table, path, **options)
    return path


def both_sides(dialogs):
    """Return dialogs as ConvAI2 has them: each again from the side that begins, after a silence."""
    twice = []
    for number, (persona, utterances) in enumerate(dialogs):
        twice.append((persona, utterances))
        twice.append(([f"I begin {number}."], ["", *utterances[:-1]]))
    return twice


def say(n, name):
    """Return n dialogs in natural writing, which all editions may have."""
    dialogs = []
    for i in range(n):
        texts = [f"Hello, {name} {i}.", "Hi! How are you?", "I'm fine.", "So am I."]
        dialogs.append(([f"I am {name} {i}.", "I like tea."], texts[: 2 + 2 * (i % 2)]))
    return both_sides(dialogs)


TALK = {"train": say(12, "Anna"), "valid": say(4, "Bob")}


def write_parlai(folder):
    files = {}
    for split, talk in TALK.items():
        lines = [(persona, [text or "__SILENCE__" for text in said]) for persona, said in talk]
        files[f"{split}_self_original.txt"] = parlai(lines)
    return archive(folder / "personachat.tgz", files)


def write_json(folder, indent=None):
    path = folder / "personachat_self_original.json"
    lists = {split: as_records(talk) for split, talk in TALK.items()}
    path.write_text(json.dumps(lists, indent=indent))
    return path


def write_truecased(folder):
    for split, talk in TALK.items():
        path = folder / f"personachat_truecased_full_{split}.json"
        path.write_text(json.dumps(as_records(talk, silence="__ Silence __")))
        excerpt = folder / f"personachat_truecased_sample_{split}.json"
        excerpt.write_text(json.dumps(as_records(say(3, "Carl"))))
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def write_json_lines(folder):
    for split, talk in TALK.items():
        (folder / f"{split}.jsonl").write_text(as_lines(as_rows(talk)))
    return folder


def write_lists_of_rows(folder):
    (folder / "train.json").write_text(json.dumps(as_rows(TALK["train"])))
    (folder / "validation.json.gz").write_bytes(
        gzip.compress(json.dumps(as_rows(TALK["valid"]), indent=1).encode())
    )
    return folder


def write_conversion(folder):
    """As the hub's revision refs/convert/parquet, with a conversation over two files."""
    rows = as_rows(TALK["train"])
    write_parquet(folder / "full/train/0000.parquet", rows[:9], row_group_size=4)
    write_parquet(folder / "full/train/0001.parquet", rows[9:])
    write_parquet(folder / "full/validation/0000.parquet", as_rows(TALK["valid"]))
    write_parquet(folder / "sample/train/0000.parquet", as_rows(say(3, "Carl")))
    return folder


EDITIONS = [
    write_json,
    partial(write_json, indent=2),
    write_truecased,
    write_json_lines,
    write_lists_of_rows,
    write_conversion,
]


@pytest.mark.parametrize("write", EDITIONS)
def test_each_edition_gives_the_same_conversations(prepare, tmp_path, write):
    folder = tmp_path / "edition"
    folder.mkdir()
    assert prepare(personachat, source=write_parlai(tmp_path), out_dir="parlai").returncode == 0
    done = prepare(personachat, source=write(folder), out_dir="other")
    assert done.returncode == 0, done.stderr
    assert files_in("other") == files_in("parlai")
    splits = read_back("other")
    for split, talk in (("train", TALK["train"]), ("val", TALK["valid"])):
        assert texts(splits[split]) == [list(filter(None, said)) for _, said in talk]
        roles = [without_persona(messages)[-1]["role"] for messages in splits[split]]
        assert set(roles) == {"assistant"}


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "lists"])
def test_an_edition_of_one_split_is_divided_with_both_sides_together(prepared, tmp_path, form):
    talk = say(150, "Anna")
    path = tmp_path / f"talk.{form}"
    if form == "parquet":
        write_parquet(path, as_rows(talk))
    else:
        forms = {"json": as_records(talk), "lists": {"train": as_records(talk)}}
        path.write_text(json.dumps(forms[form]) if form in forms else as_lines(as_records(talk)))
    splits = prepared(personachat, source=path)
    numbers = {}  # split -> those of its dialogs
    for split, conversations in splits.items():
        greetings = [said[0] for said in texts(conversations)]
        numbers[split] = [int(re.search(r"\d+", text)[0]) for text in greetings]
    assert len(numbers["train"] + numbers["val"]) == 300
    assert not set(numbers["train"]) & set(numbers["val"])


LOWER = (["i like tea ."], ["hello , i am anna .", "hi ! how are you ?"])


@pytest.mark.parametrize("write", [parlai, lambda talk: json.dumps(as_records(talk))])
def test_natural_writing_is_the_default_and_the_published_text_a_choice(prepared, tmp_path, write):
    path = tmp_path / "talk"
    path.write_text(write([LOWER] * 40 + [(["i ski ."], ["hey !", "hello ."])]))
    persona, said = LOWER
    assert natural(said[0]) != said[0]
    for knobs, expected in (
        ({}, [natural(text) for text in (*said, *persona)]),
        ({"natural": "false"}, [*said, *persona]),
    ):
        conversations = everything(prepared(personachat, source=path, **knobs))
        assert texts(conversations).count(expected[:2]) == 40
        first = [talk[0] for talk in conversations]
        assert expected[2] in {m["content"] for m in first if m["role"] == "system"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": []}, ["record 2", "personality"]),
        ({"personality": [], "utterances": [{"history": ["hi"]}]}, ["record 2", "candidates"]),
        ({"personality": [], "conv_id": 1, "history": ["a"], "candidates": []}, ["candidates"]),
        ({"personality": [], "conv_id": 1, "history": "['a']", "candidates": ["b"]}, ["history"]),
        ({"personality": [5], "utterances": []}, ["personality"]),
        (as_rows(TALK["train"])[0], ["conv_id 0", "sort"]),
    ],
)
def test_a_record_of_another_form_is_named(refused, tmp_path, record, words):
    rows = as_rows(TALK["train"])
    records = [rows[0], record, rows[1]] if words[0] == "record 2" else [*rows, record]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(records))
    refused(personachat, "talk.json", *words, source=path)


def test_a_conversation_without_turns_is_left_out(prepared, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([*as_records(TALK["train"]), {"personality": [], "utterances": []}]))
    assert len(everything(prepared(personachat, source=path))) == len(TALK["train"])


# ---- where PersonaChat can be had


@pytest.fixture
def ways(web, monkeypatch):
    """The three places that have PersonaChat are on `web`; ways(url) puts the first elsewhere,
    ways(url, url) the first two."""
    monkeypatch.setattr(files, "HURRY_TIMEOUT", (0.3, 0.3))
    monkeypatch.setattr(files, "WINDOW", 0.1)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    size, sha256 = size_and_hash(write_parlai(web.folder))
    write_json(web.folder)
    hub = hub_folder(web, "bavard/personachat_truecased")
    write_truecased(hub)

    def point(*urls):
        urls = [*urls, web.url, web.url]
        first, second, third = WAYS
        archive = first.files[0]._replace(size=size, sha256=sha256)
        truecased = []
        for file in third.files:
            truecased.append(file._replace(sha256=size_and_hash(hub / file.name)[1]))
        first = first._replace(files=[archive], url=urls[0])
        second = second._replace(url=urls[1])
        monkeypatch.setattr(personachat, "WAYS", [first, second, third._replace(files=truecased)])

    point()
    return point


WAYS = personachat.WAYS


@pytest.fixture
def bad(monkeypatch):
    """A server that misbehaves: bad("drip") -> url of its folder."""
    servers = []

    def start(fault):
        if fault == "down":
            return f"http://127.0.0.1:{closed_port()}"
        server = Server()
        servers.append(server)
        for way in WAYS[:2]:
            name = f"/{way.files[0].name}"
            server.bodies[name] = b"x" * 100_000
            if fault in ("page", "page in disguise"):
                server.bodies[name] = b"<html>moved</html>"
        if fault == "page":
            server.extra_headers = {"Content-Type": "text/html"}
        server.faults = [fault] * 50 if fault in ("stall", "drip", 404, 503) else []
        return server.url

    yield start
    for server in servers:
        server.close()


FAULTS = ["down", "stall", "drip", 404, 503, "page", "page in disguise", "other file"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_server_is_passed_over_within_seconds(prepare, ways, bad, fault):
    url = bad(fault)
    ways(url)
    start = time.monotonic()
    done = prepare(personachat)
    assert time.monotonic() - start < 5
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "passed over" in line]
    for word in (url.removeprefix("http://"), WAYS[0].title, WAYS[1].title):
        assert word in line
    [line] = [line for line in done.stdout.splitlines() if line.startswith("from ")]
    assert WAYS[1].title in line and "personachat_self_original.json" in line
    assert not Path("data/downloads/personachat.tgz").exists()

    # the other one is down too, and an HTML page is no JSON
    Path("data/downloads/personachat_self_original.json").unlink()
    ways(url, url)
    done = prepare(personachat, out_dir="hub")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("passed over") == 2
    assert f"from {WAYS[2].title}" in done.stdout
    assert files_in("hub") == files_in("data/personachat")
    assert {path.suffix for path in Path("data/downloads").glob("*")} <= {".part"}


def test_a_slow_server_is_better_than_none(prepare, ways, web, monkeypatch):
    nobody = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    slow = Server()
    slow.bodies["/personachat.tgz"] = (web.folder / "personachat.tgz").read_bytes()
    slow.faults = ["drip", "drip"]
    ways(slow.url, nobody)
    done = prepare(personachat)
    slow.close()
    assert done.returncode == 0 and done.stderr.count("passed over") == 3
    assert f"from {WAYS[0].title}" in done.stdout


def test_what_is_here_already_is_taken_before_the_network_is_asked(prepare, ways, web, tmp_path):
    assert prepare(personachat).returncode == 0
    first = files_in("data/personachat")
    Path("data/downloads/personachat.tgz").unlink()
    snapshot = tmp_path / "hf/datasets--bavard--personachat_truecased/snapshots/abc"
    snapshot.mkdir(parents=True)
    write_truecased(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    ways("http://nowhere.test")
    done = prepare(personachat, out_dir="again")
    assert done.returncode == 0 and "passed over" not in done.stderr
    assert WAYS[2].title in done.stdout and files_in("again") == first


def test_the_part_of_one_way_is_resumed_later_and_does_not_block_the_others(prepare, ways, web):
    whole = (web.folder / "personachat.tgz").read_bytes()
    part = Path("data/downloads/personachat.tgz.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:300])
    ways(f"http://127.0.0.1:{closed_port()}")
    assert prepare(personachat).returncode == 0
    assert part.read_bytes() == whole[:300]
    Path("data/downloads/personachat_self_original.json").unlink()
    server = Server()
    server.bodies["/personachat.tgz"] = whole
    ways(server.url)
    assert WAYS[0].title in prepare(personachat).stdout
    server.close()
    assert server.requested_ranges == ["bytes=300-"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_no_reason_to_go_elsewhere(prepare, ways):
    part = Path("data/downloads/personachat.tgz.part")
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    done = prepare(personachat)
    assert done.returncode == 2 and "passed over" not in done.stderr
    assert str(part) in done.stderr


def test_if_all_ways_fail_what_is_left_is_named(prepare, ways, monkeypatch):
    down = f"127.0.0.1:{closed_port()}"
    ways(f"http://{down}", f"http://{down}")
    monkeypatch.setenv("HF_ENDPOINT", f"http://{down}")
    done = prepare(personachat)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *passed, problem, remedy = done.stderr.splitlines()
    assert len(passed) == 2 and all("passed over" in line for line in passed)
    assert down in problem
    for word in ("--source", "HF_ENDPOINT", "data/downloads/personachat.tgz"):
        assert word in remedy


def test_personachat_is_downloaded_once_and_verified(prepare, ways, web):
    archive = web.folder / "personachat.tgz"
    body = archive.read_bytes()
    archive.write_bytes(body[:-1] + b"x")  # of the same size
    done = prepare(personachat)
    assert done.returncode == 0 and "sha256" in done.stderr and WAYS[1].title in done.stdout
    archive.write_bytes(body)
    Path("data/downloads/personachat_self_original.json").unlink()
    assert prepare(personachat).returncode == 0
    archive.unlink()
    assert prepare(personachat, out_dir="again").returncode == 0
    assert files_in("again") == files_in("data/personachat")


@pytest.mark.parametrize("module", [eli5, columned_chat, spc])
def test_a_corpus_of_the_hub_names_the_ways_left(prepare, web, monkeypatch, module):
    nobody = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    monkeypatch.setattr(spc, "MIRROR", nobody)
    done = prepare(module)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("passed over") == (module is spc)
    problem, remedy = done.stderr.splitlines()[-2:]
    assert nobody.removeprefix("http://") in problem
    for word in ("--source", "HF_ENDPOINT", "cache/nanochatgpt/datasets", module.REPO):
        assert word in remedy


def test_synthetic_persona_chat_comes_from_github_if_the_hub_is_down(prepare, web, monkeypatch):
    for split, (name, *_) in spc.FILES.items():
        spc_file(web.folder / name, spc_talks(5, split))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setattr(spc, "MIRROR", web.url)
    done = prepare(spc)
    assert done.returncode == 0 and done.stderr.count("passed over") == 2
    assert len(read_back("data/spc")["val"]) == 10


# ---- ELI5


def question(q_id="q", title="why ?", selftext="", answers=((1, "because"),)):
    """Return a question as eli5_category has it, from its answers as (score, text)."""
    return {
        "q_id": q_id,
        "category": "Engineering",
        "title": title,
        "title_urls": {"url": []},
        "selftext": selftext,
        "selftext_urls": {"url": []},
        "subreddit": "explainlikeimfive",
        "answers": {
            "a_id": [f"a{i}" for i in range(len(answers))],
            "text": [text for _, text in answers],
            "text_urls": [[] for _ in answers],
            "score": [score for score, _ in answers],
        },
    }


def questions(n, name=""):
    answers = [[(2, "no idea"), (7, f"so {i} .")] for i in range(n)]
    return [question(f"{name}{i}", f"why {name} {i} ?", answers=answers[i]) for i in range(n)]


def json_gz(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(value).encode()))
    return path


def read_eli5(path):
    return (messages for _, messages in read_records(path, eli5.as_messages))


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        ([(3, "three"), (10, "ten"), (9, "nine")], "ten"),
        ([(-3, "worse"), (-1, "bad")], "bad"),
        ([(5, "first of equals"), (5, "second of equals")], "first of equals"),
        ([(1, "\n spaced \n\nlines  ")], "spaced \n\nlines"),
        ([(9, "[deleted]"), (3, "three"), (4, "four")], "four"),
        ([(9, " [deleted]\n"), (8, "[removed] "), (7, " \n"), (3, "three")], "three"),
        ([(9, "(URL_0)."), (8, "URL_12, and more"), (7, "a\nURL_1\nb"), (3, "three")], "three"),
        ([(9, "it was [deleted] by them"), (3, "three")], "it was [deleted] by them"),
        ([(9, "[deleted]"), (8, "read URL_0")], None),
        ([], None),
    ],
)
def test_the_answer_is_the_best_scored_one_that_can_be_learned(tmp_path, answers, best):
    path = json_gz(tmp_path / "eli5.json.gz", [question(answers=answers)])
    assert list(read_eli5(path)) == ([exchange("why ?", best)] if best else [])


@pytest.mark.parametrize(
    ("title", "selftext", "asked"),
    [
        ("why ?", "", "why ?"),
        ("why ?", " \n", "why ?"),
        (" why ?\n", "\nsince when ?\n\nreally ? ", "why ?\nsince when ?\n\nreally ?"),
        ("", "only this", "only this"),
    ],
)
def test_the_question_is_the_title_and_the_text_below_it(tmp_path, title, selftext, asked):
    path = json_gz(tmp_path / "eli5.json.gz", [question(title=title, selftext=selftext)])
    assert list(read_eli5(path)) == [exchange(asked, "because")]


def test_a_folder_with_the_published_files_is_split_as_published_and_counted(prepare, tmp_path):
    folder = tmp_path / "eli5"
    unanswered = question("none", answers=[(5, "[removed]")])
    json_gz(folder / "eli5-category-train.json.gz", [*questions(40, "train"), unanswered])
    json_gz(folder / "eli5-category-validation-1.json.gz", [unanswered, *questions(10, "val")])
    json_gz(folder / "eli5-category-validation-2.json.gz", "this file must not be read")
    done = prepare(eli5, source=folder)
    assert [line for line in done.stdout.splitlines() if line.endswith("left out")] == [
        f"{folder}/eli5-category-train.json.gz: 1 of 41 records left out",
        f"{folder}/eli5-category-validation-1.json.gz: 1 of 11 records left out",
    ]
    splits = read_back("data/eli5")
    for split, n in (("train", 40), ("val", 10)):
        assert splits[split] == [exchange(f"why {split} {i} ?", f"so {i} .") for i in range(n)]


@pytest.mark.parametrize("missing", ["train", "validation-1"])
def test_a_folder_without_one_of_the_published_files_is_refused(refused, tmp_path, missing):
    folder = tmp_path / "eli5"
    for split in {"train", "validation-1", "test"} - {missing}:
        json_gz(folder / f"eli5-category-{split}.json.gz", questions(5))
    refused(eli5, folder / f"eli5-category-{missing}.json.gz", source=folder)


def test_one_file_is_divided_packed_or_not(prepared, tmp_path):
    path = json_gz(tmp_path / "eli5" / "eli5-category-test.json.gz", questions(300))
    splits = prepared(eli5, source=path)
    assert 4 < len(splits["val"]) < 30
    expected = [exchange(f"why  {i} ?", f"so {i} .") for i in range(300)]
    assert everything(splits) == sorted(expected, key=str)
    unpacked_path = tmp_path / "eli5-category-test.json"
    unpacked_path.write_text(json.dumps(questions(300)))
    assert prepared(eli5, source=unpacked_path) == splits


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("list_name", ["", "val"])
def test_a_list_is_read_object_by_object_however_it_is_written(tmp_path, indent, list_name):
    values = [{"a": ']}[{", "\\', "é": ["\u2028", {}]}, {}, {"n": [1, -2.5e3, None, True]}]
    values += [{"text": "x" * size} for size in (3 << 20, 1, (1 << 20) - 7)]
    content = {"train": values[:1], "val": values} if list_name else values
    (tmp_path / "f.json").write_text(json.dumps(content, indent=indent))
    assert list(read_records(tmp_path / "f.json", dict, list_name)) == values


def peak_memory(iterator):
    """Return (number of items, bytes of memory that passing through them takes)."""
    tracemalloc.start()
    n = sum(1 for _ in iterator)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return n, peak


def test_files_larger_than_memory_can_be_read(tmp_path):
    long = question(answers=[(1, "x" * 500_000)])
    n, peak = peak_memory(read_eli5(json_gz(tmp_path / "eli5.json.gz", [long] * 40)))  # 20 MB
    assert n == 40 and peak < 10e6
    train = [columned(1) | {"Assistant": "x" * 500_000}] * 40
    path = columned_file(tmp_path / "f.json", train, [columned(2)])
    n, peak = peak_memory(columned_chat.examples(columned_chat.Config(), path))
    assert n == 41 and peak < 10e6


PACKED = gzip.compress(json.dumps(questions(500)).encode())
BAD_FILES = {
    "cut.json.gz": PACKED[: len(PACKED) // 2],
    "cut_early.json.gz": PACKED[:8],
    "damaged.json.gz": PACKED[:500] + bytes(200) + PACKED[700:],
    "html.json.gz": b"<!DOCTYPE html><html></html>",
    "html.json": b"<!DOCTYPE html><html></html>",
    "cut.json": json.dumps(questions(5)).encode()[:-40],
    "not_utf8.json": b'[{"q_id": "\xff"}]',
    "object.json": json.dumps({"train": questions(5)}).encode(),
    "texts.json": b'["why ?", "so"]',
    "columns.json": b'[{"prompt": "why ?", "reply": "so"}]',
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_damaged_or_other_file_is_refused(refused, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    refused(eli5, path, source=path)


@pytest.mark.parametrize(
    "fields",
    [
        {"selftext": ["why ?"]},
        {"answers": {"text": ["so"]}},
        {"answers": {"text": "so", "score": 1}},
        {"answers": {"text": ["so", "or so"], "score": [1]}},
        {"answers": {"text": ["so", "or so"], "score": ["1", "2"]}},
    ],
    ids=str,
)
def test_a_question_with_values_of_another_type_is_refused(refused, tmp_path, fields):
    path = json_gz(tmp_path / "eli5.json.gz", [*questions(3), question() | fields])
    refused(eli5, path, source=path)


def test_all_answers_become_plain_text_end_to_end(prepare, tmp_path):
    path = json_gz(tmp_path / "eli5" / "eli5-category-train.json.gz", questions(60))
    assert prepare(eli5, source=path.parent, mask="all", max_examples=50).returncode == 0
    train, val = text_shards("data/eli5")
    assert val.count("no idea") == 10
    numbers = re.findall(r"so (\d+) \.", train)
    assert train == "".join(f"no idea so {n} ." for n in numbers)
    numbers += re.findall(r"so (\d+) \.", val)
    assert sorted(map(int, numbers)) == list(range(50))


def text_shards(folder):
    """Return the texts of train.bin and val.bin, which must be supervised throughout."""
    shards = [open_shard(f"{folder}/{split}.bin") for split in ("train", "val")]
    assert all(shard.mask(0, len(shard.tokens)).all() for shard in shards)
    return [Tokenizer().decode(shard.tokens.tolist()) for shard in shards]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_nulls_are_empty_in_a_list_and_in_lines(prepared, tmp_path, form):
    records = questions(60)
    fields = [
        {"selftext": None},
        {"title": None, "selftext": "why ?"},
        {"title": None, "selftext": None},  # left out
        {"answers": None},  # left out
        {"answers": {"text": [None, "so ."], "score": [9, 1]}},
        {"answers": {"text": ["low", "so ."], "score": [None, 1]}},
        {"answers": {"text": ["so ."], "score": None}},
    ]
    for record, changed in zip(records, fields, strict=False):
        record |= changed
    path = tmp_path / "eli5.json"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(json.dumps(records) if form == "list" else lines)
    read = everything(prepared(eli5, source=path))
    assert len(read) == 58
    replies = [messages[1]["content"] for messages in read if messages[1]["content"] == "so ."]
    assert len(replies) == 3
    assert [{"role": "user", "content": "why ?"}] in [messages[:1] for messages in read]


def test_max_examples_are_the_first_ones_a_fifth_of_them_for_validation(prepared, tmp_path):
    path = json_gz(tmp_path / "eli5.json.gz", questions(60))
    splits = prepared(eli5, source=path, max_examples=50)
    assert (len(splits["train"]), len(splits["val"])) == (40, 10)
    expected = [exchange(f"why  {i} ?", f"so {i} .") for i in range(50)]
    assert everything(splits) == sorted(expected, key=str)


@pytest.mark.parametrize(("knob", "value"), [("mask", "none"), ("max_examples", -1)])
def test_eli5_refuses_a_knob_out_of_range(refused, tmp_path, knob, value):
    path = json_gz(tmp_path / "eli5.json.gz", questions(5))
    refused(eli5, f"{knob}={value}", source=path, **{knob: value})


# ---- ColumnedChatCombined


def columned(i, system=""):
    return {"System": system, "User": f"question {i} ?", "Assistant": f"answer {i} ."}


def columned_file(path, train, validation=None, indent=None):
    """Write formatted_data.json with these records, without a validation list if there is none."""
    lists = {"train": train} | ({"validation": validation} if validation else {})
    path.write_text(json.dumps(lists, indent=indent))
    return path


def numbers_of(splits):
    """Return {split: numbers of the questions}."""
    return {
        split: [int(re.search(r"\d+", talk[0]["content"])[0]) for talk in conversations]
        for split, conversations in splits.items()
    }


@pytest.mark.parametrize("indent", [None, 2])
def test_three_columns_become_turns_of_locutusques_template(prepare, tmp_path, indent):
    train = [columned(0, "be kind"), *map(columned, range(1, 30)), columned(30) | {"System": None}]
    path = columned_file(tmp_path / "formatted_data.json", train, [columned(99)], indent)
    done = prepare(columned_chat, source=path if indent else tmp_path)  # the file or the folder
    assert done.returncode == 0 and "left out" not in done.stdout
    splits = read_back("data/columned_chat")
    expected = [exchange(f"question {i} ?", f"answer {i} .") for i in range(31)]
    expected[0].insert(0, {"role": "system", "content": "be kind"})
    assert splits["train"] == expected
    assert splits["val"] == [exchange("question 99 ?", "answer 99 .")]
    shard = open_shard("data/columned_chat/train.bin")
    ids = shard.tokens[slice(*shard.offsets[1:3])].tolist()
    text = "<|USER|> question 1 ? <|ASSISTANT|> answer 1 . <|End|>"
    assert Tokenizer("user_assistant").decode(ids) == text


def test_max_examples_are_the_first_ones_of_each_list(prepared, tmp_path):
    train = [columned(i) for i in range(9)]
    path = columned_file(tmp_path / "f.json", train, [columned(i) for i in range(50, 60)])
    splits = prepared(columned_chat, source=path, max_examples=2)
    assert numbers_of(splits) == {"train": [0, 1], "val": [50, 51]}


def test_blank_turns_are_left_out_and_counted(prepare, tmp_path):
    train = [columned(0), columned(1) | {"User": " "}, columned(2) | {"Assistant": ""}]
    path = columned_file(tmp_path / "f.json", train, [columned(9)])
    assert "2 of 3 records left out" in prepare(columned_chat, source=path).stdout


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"System": "", "Assistant": "a"}, "User"),
        (columned(1) | {"User": 5}, "User"),
        (columned(1) | {"Assistant": ["a"]}, "Assistant"),
    ],
)
def test_a_bad_record_is_named_by_its_number_and_can_be_skipped(prepare, tmp_path, bad, word):
    path = columned_file(tmp_path / "f.json", [columned(0), bad, columned(2)], [columned(9)])
    words = (path, "record 2 of train", word, "--skip_bad=true")
    assert_refused(prepare(columned_chat, source=path), *words)
    done = prepare(columned_chat, source=path, skip_bad="true")
    assert done.returncode == 0 and "1 of 3 records left out" in done.stdout
    assert numbers_of(read_back("data/columned_chat"))["train"] == [0, 2]


def test_a_cut_file_is_refused_or_used_as_far_as_it_goes(prepare, tmp_path):
    path = columned_file(tmp_path / "f.json", [columned(i) for i in range(100)], [columned(999)])
    path.write_text(path.read_text()[: path.read_text().index("question 60 ?")])
    for knobs in ({}, {"max_examples": 5}):
        assert_refused(prepare(columned_chat, source=path, **knobs), path, "--skip_bad=true")
    done = prepare(columned_chat, source=path, skip_bad="true")
    assert done.returncode == 0 and "record 61 of train" in done.stderr
    numbers = numbers_of(read_back("data/columned_chat"))
    assert sorted(numbers["train"] + numbers["val"]) == list(range(60))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "f.json"),
        ("<html>", "f.json"),
        ('{"train": [{"a": x}]}', "f.json"),
        ("[]", "at least two"),
        ('{"test": []}', "at least two"),
        ('{"train": [], "validation": []}', "at least two"),
    ],
)
def test_another_file_is_refused(refused, tmp_path, content, word):
    path = tmp_path / "f.json"
    path.write_text(content)
    refused(columned_chat, word, source=path)


# ---- plain text


def test_plain_text_is_divided_by_paragraphs_and_learned_whole(prepare, tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    lines = [f"line {i}\n  goes on\n\n\n" for i in range(100)]
    (folder / "a.txt").write_text("\ufeff" + "".join(lines))
    (folder / "b.txt").write_text("a story\n<|endoftext|>\nanother")
    assert prepare(plain_text, source=folder).returncode == 0
    border = re.compile(r"\n\n|<\|endoftext\|>")  # of paragraphs or of documents
    train, val = (border.split(text) for text in text_shards("data/text"))
    expected = [*(f"line {i} goes on" for i in range(100)), "a story", "another"]
    assert sorted(train + val) == sorted(expected)
    assert 1 <= len(val) < 20


def test_the_end_of_text_token_stands_between_documents_and_files(prepare, tmp_path):
    folder = tmp_path / "stories"
    folder.mkdir()
    stories = [f"story {i}\n\nthe end of {i}" for i in range(200)]
    (folder / "a.txt").write_text("\n<|endoftext|>\n".join(stories[:100]) + "\n<|endoftext|>\n")
    (folder / "b.txt").write_text(" <|endoftext|> ".join(stories[100:150]))
    for i, story in enumerate(stories[150:], 150):  # sorted after b.txt
        (folder / f"c{i}.txt").write_text(story)
    assert prepare(plain_text, source=folder).returncode == 0

    for split in ("train", "val"):
        ids = open_shard(f"data/text/{split}.bin").tokens.tolist()
        documents = []  # the numbers in each
        for is_border, document in itertools.groupby(ids, key=lambda token: token == END_OF_TEXT):
            if is_border:
                assert len(list(document)) == 1  # no document is empty
            else:
                text = Tokenizer().decode(document)
                assert "endoftext" not in text
                documents.append({int(number) for number in re.findall(r"\d+", text)})
        assert ids[0] != END_OF_TEXT != ids[-1]
        assert all(len(numbers) == 1 for numbers in documents)  # a border between any two
        order = [number for numbers in documents for number in numbers]
        assert order == sorted(set(order))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("caf\xe9\n\n".encode("latin-1"), ["line 1", "byte 4", "0xe9"]),
        ("\n\ntwo \x93quoted\x94".encode("latin-1"), ["line 3", "byte 5", "0x93"]),
        ("日本語".encode("shift-jis"), ["line 1", "byte 1"]),
        ("hello\n\nthere".encode("utf-16"), ["UTF-16"]),
        (b"\x28\xb5\x2f\xfd\x24", ["zstd"]),
    ],
)
@pytest.mark.parametrize("script", [plain_text, personachat, jsonl, retry, eli5])
def test_another_encoding_is_refused_with_the_place_in_every_script(
    refused, tmp_path, script, body, words
):
    path = tmp_path / "b.txt"
    path.write_bytes(body)
    refused(script, "b.txt", *words, source=path)


def test_a_source_that_is_not_text_is_refused(refused, tmp_path):
    refused(plain_text, "--source=PATH")
    (tmp_path / "empty").mkdir()
    refused(plain_text, "empty", ".txt", source=tmp_path / "empty")
    (tmp_path / "b.txt").write_bytes(b"no text\0\0")
    refused(plain_text, "b.txt", "NUL", source=tmp_path / "b.txt")
    (tmp_path / "a.txt").write_text("one line\n")
    refused(plain_text, "at least two", source=tmp_path / "a.txt")
