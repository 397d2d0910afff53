"""prepare/retry.py: what people kept and what not, from each form of record; each conversation in one split."""

import csv
import gzip
import itertools
import json

import pytest
from conftest import ROOT, assert_refused, small_talk

from nanochatgpt.configurator import run
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from prepare import retry

PREFERENCE = ROOT.parent / "shared" / "data" / "preference"
HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}


@pytest.fixture
def prepare(tmp_path, monkeypatch, in_process):
    """Run the script within this process in an empty folder: prepare(source=PATH) -> as `script`."""
    monkeypatch.chdir(tmp_path)
    return lambda **knobs: in_process(
        lambda: run(retry.main, retry.Config),
        "retry.py",
        *(f"--{name}={value}" for name, value in knobs.items()),
    )


def read_back(folder="data/retry"):
    """Return {split: [(text, the text that is supervised)]} of a prepared folder."""
    splits = {}
    for split in ("train", "val"):
        shard = open_shard(f"{folder}/{split}.bin")
        decode = Tokenizer(shard.template).decode
        splits[split] = []
        for a, b in itertools.pairwise(shard.offsets.tolist()):
            ids, mask = shard.tokens[a:b], shard.mask(a, b)
            splits[split].append((decode(ids.tolist()), decode(ids[mask].tolist())))
    return splits


def labelled(n):
    return [
        {"text": f"[Human]: question {i}\n[Bot]: answer {i % 7}", "label": i % 2} for i in range(n)
    ]


def write(path, records):
    """Write records in the form that the path's name says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    with (gzip.open if path.suffix == ".gz" else open)(
        path, "wt", encoding="utf-8", newline=""
    ) as file:
        if kind == "csv":
            table = csv.DictWriter(file, records[0])
            table.writeheader()
            table.writerows(records)
        else:
            file.write(
                json.dumps(records)
                if kind == "json"
                else "".join(json.dumps(r) + "\n" for r in records)
            )
    return path


# ---- forms


@pytest.mark.parametrize(
    "file", ["r.jsonl", "r.json", "r.csv", "r.jsonl.gz", "r.json.gz", "r.csv.gz"]
)
@pytest.mark.parametrize(
    "names", [("text", "label"), ("input_text", "labels"), ("input_ids", "labels")]
)
def test_texts_with_labels_come_back_supervised_where_they_were_kept(
    prepare, tmp_path, file, names
):
    records = labelled(60)
    renamed = [dict(zip(names, record.values(), strict=True)) for record in records]
    done = prepare(source=write(tmp_path / file, renamed))
    assert done.returncode == 0, done.stderr
    found = read_back()
    expected = {(r["text"], r["text"] if r["label"] else "") for r in records}
    assert set(found["train"]) | set(found["val"]) == expected
    assert sum(map(len, found.values())) == 60


def test_of_a_pair_the_reply_that_was_chosen_comes_first(prepare, tmp_path):
    pairs = [
        {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(30)
    ]
    pairs += [
        {
            "prompt": [HI, HELLO, {"role": "user", "content": "and?"}],
            "chosen": "yes",
            "rejected": "no",
        }
    ]
    assert prepare(source=write(tmp_path / "pairs.jsonl", pairs)).returncode == 0
    found = read_back()
    texts = found["train"] + found["val"]
    assert len(texts) == 62
    for (kept, supervised), (rejected, nothing) in zip(texts[::2], texts[1::2], strict=True):
        prompt = kept.rpartition("[Bot]:")[0]
        assert rejected.startswith(prompt) and nothing == ""
        assert supervised == kept.removeprefix(f"{prompt}[Bot]:")
    assert (
        "[Human]: hi\n[Bot]: hello<|endoftext|>\n[Human]: and?\n[Bot]: yes<|endoftext|>",
        " yes<|endoftext|>",
    ) in texts


def test_a_reply_that_was_talked_on_after_was_kept_and_one_that_was_taken_back_was_not():
    persona = {"role": "system", "content": "i like tea."}
    go_on, fine = (
        {"role": "user", "content": "how are you"},
        {"role": "assistant", "content": "fine"},
    )
    record = {
        "messages": [persona, HI, HELLO, go_on, fine],
        "retried": [{"before": 3, "content": "what?"}],
    }
    assert retry.examples(record)[1] == [
        ([persona, HI, HELLO], 1),  # of the last reply nobody knows
        ([persona, HI, HELLO, go_on, {"role": "assistant", "content": "what?"}], 0),
    ]


def test_dailydialog_gives_good_replies_and_those_that_are_asked_for():
    record = {
        "context": ["a", "b", "c"],
        "positive_responses": ["good"],
        "adversarial_negative_responses": ["bad"],
    }
    record |= {"random_negative_responses": ["other"]}
    context = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    for negatives, bad in (
        ("adversarial", ["bad"]),
        ("random", ["other"]),
        ("both", ["bad", "other"]),
    ):
        expected = [("good", 1), *((text, 0) for text in bad)]
        assert retry.examples(record, negatives)[1] == [
            ([*context, {"role": "assistant", "content": text}], label) for text, label in expected
        ]


def test_in_convai2_whoever_says_the_reply_is_the_assistant_and_turns_in_a_row_are_one():
    said = [
        ("p1", "hello there", None),
        ("p2", "hey", None),
        ("p1", "fine", None),
        ("p1", "are you here?", None),
    ]
    said += [("p2", "i am", 1)]
    record = {
        "dialog": [
            {"sender": who, "text": text, "evaluation_score": score} for who, text, score in said
        ]
    }
    ((messages, label),) = retry.examples(record)[1]
    assert label == 1
    assert [(m["role"], m["content"]) for m in messages] == [
        ("user", "hello there"),
        ("assistant", "hey"),
        ("user", "fine are you here?"),
        ("assistant", "i am"),
    ]


def test_convai2_gives_the_utterances_that_have_a_score():
    dialog = [
        ("hi", None),
        ("hello", None),
        ("how are you", None),
        ("tea", 0),
        ("what?", None),
        ("sorry", 1),
    ]
    record = {"dialog": [{"text": text, "evaluation_score": score} for text, score in dialog]}
    (first, bad), (second, good) = retry.examples(record)[1]
    assert (bad, good) == (0, 1)
    assert [m["content"] for m in first] == ["hi", "hello", "how are you", "tea"]
    assert [m["role"] for m in second] == ["user", "assistant"] * 3


def test_chitchats_conversations_are_kept_where_they_were_rated_well(prepare):
    done = prepare(source="chitchat")
    assert done.returncode == 0, done.stderr
    found = read_back()
    assert len(found["train"]) > 500 and len(found["val"]) > 20
    assert {bool(supervised) for _, supervised in found["train"]} == {True, False}


@pytest.mark.skipif(not PREFERENCE.exists(), reason="the real files are not part of the repository")
@pytest.mark.parametrize(
    ("file", "kept", "not_kept"),
    [("convai2_wild_volunteers.json", 935, 440), ("dailydialogpp_dev.jsonl", None, None)],
)
def test_the_real_files_are_read_whole(prepare, file, kept, not_kept):
    done = prepare(source=PREFERENCE / file)
    assert done.returncode == 0, done.stderr
    found = read_back()
    counts = [
        sum(bool(s) is label for texts in found.values() for _, s in texts)
        for label in (True, False)
    ]
    assert counts == [kept, not_kept] if kept else counts[0] == counts[1] > 1000
    split_of = {}
    for split, texts in found.items():
        for text, _ in texts:
            context = text.rpartition("\n[Bot]:")[0]
            if context.count("[Human]:") > 1:  # many begin with hi
                split_of.setdefault(context, set()).add(split)
    assert {len(splits) for splits in split_of.values()} == {1}


# ---- splits


def test_no_conversation_is_in_both_splits_however_far_it_had_got(prepare, tmp_path):
    logs = []
    for messages in small_talk(200):
        if messages[-1]["role"] == "assistant":
            logs += [
                {"messages": messages[: i + 1]}
                for i, m in enumerate(messages)
                if m["role"] == "assistant"
            ]
            logs[-1]["retried"] = [{"before": 1, "content": "what?"}]
    assert prepare(source=write(tmp_path / "logs.jsonl", logs)).returncode == 0
    # a conversation is known by its first exchange
    beginnings = {
        split: {text.partition("<|endoftext|>")[0] for text, s in texts if s}
        for split, texts in read_back().items()
    }
    assert beginnings["train"] and beginnings["val"] and not beginnings["train"] & beginnings["val"]


def test_what_chat_saves_is_read(prepare, tmp_path, monkeypatch):
    """Two replies were taken back; a persona given meanwhile does not count as a turn."""
    from chat import Chat

    chat = Chat.__new__(Chat)
    chat.system, chat.retried = [], []
    chat.turns = [HI, HELLO, HI, {"role": "assistant", "content": "bad"}]
    assert chat.take_back() == "hi"
    chat.system = [{"role": "system", "content": "i like tea."}]
    chat.turns += [
        HI,
        {"role": "assistant", "content": "good"},
        HI,
        {"role": "assistant", "content": "last"},
    ]
    for _ in range(30):
        chat.turns[0] = {"role": "user", "content": f"hi {_}"}
        chat.save(tmp_path / "log.jsonl")
    done = prepare(source=tmp_path / "log.jsonl")
    assert done.returncode == 0, done.stderr
    found = read_back()
    texts = found["train"] + found["val"]
    assert len(texts) == 90
    assert (
        sum(text.endswith("\n[Human]: hi\n[Bot]: bad<|endoftext|>") and not s for text, s in texts)
        == 30
    )
    assert (
        sum(s == " good<|endoftext|>" for _, s in texts)
        == sum(s == " hello<|endoftext|>" for _, s in texts)
        == 30
    )


def test_what_is_saved_twice_counts_once_and_a_reply_that_came_again_was_kept(prepare, tmp_path):
    logs = []
    for n in range(30):
        talk = [
            {"role": "user", "content": f"hi {n}"},
            HELLO,
            HI,
            {"role": "assistant", "content": "yes"},
            HI,
        ]
        talk += [{"role": "assistant", "content": "last"}]
        logs += [{"messages": talk[:4], "retried": [{"before": 1, "content": "what?"}]}]
        logs += [
            {
                "messages": talk,
                "retried": [{"before": 1, "content": "what?"}, {"before": 1, "content": "hello"}],
            }
        ]
    assert prepare(source=write(tmp_path / "logs.jsonl", logs)).returncode == 0
    found = read_back()
    texts = found["train"] + found["val"]
    assert len(texts) == len(set(texts)) == 30 * 3
    assert sum(bool(s) for _, s in texts) == 60


def test_chats_that_begin_alike_are_divided(prepare, tmp_path):
    logs = [
        {"messages": [HI, {"role": "assistant", "content": f"hello {n}"}, HI, HELLO]}
        for n in range(60)
    ]
    for n, log in enumerate(logs):
        log["retried"] = [{"before": 3, "content": f"what? {n}"}]
    assert prepare(source=write(tmp_path / "logs.jsonl", logs)).returncode == 0
    assert all(len(texts) > 1 for texts in read_back().values())


# ---- refusals


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "a", "label": 2}, ["label 2 is not 0 or 1"]),
        ({"text": "a", "label": "good"}, ["label 'good'"]),
        ({"text": "a"}, ["labels nor label"]),
        ({"label": 1}, ["input_text nor text nor input_ids"]),
        ({"text": 5, "label": 1}, ["text is no text: 5"]),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, ["chosen is no text"]),
        ({"messages": [{"role": "bot", "content": "a"}]}, ["message 1 has role 'bot'"]),
        (
            {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"},
            ["prompt: message 1 is not"],
        ),
        (
            {"prompt": [HI, {"role": "system", "content": "a"}], "chosen": "a", "rejected": "b"},
            ["only come first"],
        ),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, ["prompt: not"]),
        ({"messages": [HI, HELLO], "retried": [{"content": "a"}]}, ["before"]),
        (
            {"messages": [HI, HELLO], "retried": [{"before": "q", "content": "a"}]},
            ["before='q'", "1 to 2"],
        ),
        ({"messages": [HI, HELLO], "retried": [{"before": 9, "content": "a"}]}, ["before=9"]),
        ({"context": ["a"], "positive_responses": ["b"]}, ["adversarial_negative_responses"]),
        (["a", 1], ["is no object"]),
        ({"messages": [HI, HELLO], "retried": None}, ["is of no known form"]),
        ({"context": "hello", "positive_responses": []}, ["context is no list"]),
        ({"dialog": [{"text": 5, "evaluation_score": 1}]}, ["text is no text: 5"]),
        (
            {"context": ["a"], "positive_responses": [5], "adversarial_negative_responses": ["b"]},
            ["positive_responses is no text: 5"],
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_record_that_is_not_right_is_named_by_its_line(prepare, tmp_path, record, words):
    path = write(tmp_path / "r.jsonl", [*labelled(2), record])
    assert_refused(prepare(source=path), "r.jsonl, line 3", *words)
    assert not list(tmp_path.rglob("*.bin*"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', ["behind line 1"]),
        ("r.json", b'[{"text": "a", "label": 1}, {"text"', ["behind record 1"]),
        ("r.jsonl.gz", b"\x1f\x8b no", ["r.jsonl.gz"]),
        ("r.txt", b"hi\n", ["not .jsonl, .json or .csv"]),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_place(
    prepare, tmp_path, name, content, words
):
    (tmp_path / name).write_bytes(content)
    assert_refused(prepare(source=tmp_path / name), name, *words)


def test_a_file_of_one_conversation_or_of_nothing_is_refused(prepare, tmp_path):
    alike = [{"text": f"[Human]: hi\n[Bot]: {n}", "label": n % 2} for n in range(30)]
    refused = prepare(source=write(tmp_path / "r.jsonl", alike))
    assert_refused(refused, "what begins with the same message stays in one of the two")
    assert not list((tmp_path / "data").glob("*"))  # not even an empty folder
    (tmp_path / "empty.jsonl").touch()
    assert_refused(
        prepare(source=tmp_path / "empty.jsonl"), "there is no reply of which it is known"
    )


def test_labels_that_are_all_alike_are_refused(prepare, tmp_path):
    path = write(tmp_path / "r.jsonl", [record | {"label": 1} for record in labelled(20)])
    assert_refused(prepare(source=path), "0 that were not")
    assert not list(tmp_path.rglob("*.bin*"))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({}, ["--source=PATH"]),
        ({"source": "nowhere.jsonl"}, ["nowhere.jsonl does not exist"]),
        ({"hub": "org/name"}, ["hub=org/name is not org/name/FILE"]),
        ({"source": "chitchat", "negatives": "all"}, ["negatives=all is not one of"]),
    ],
)
def test_knobs_that_cannot_be_are_refused(prepare, knobs, words):
    assert_refused(prepare(**knobs), *words)
