"""prepare/retry.py: kept and rejected replies from each form of record, divided by conversation."""

import csv
import gzip
import itertools
import json
import statistics
from importlib import metadata

import pytest
from conftest import ROOT, assert_refused, small_talk

from nanochatgpt.configurator import run
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from prepare import retry
from prepare.preferences import examples

PREFERENCE = ROOT.parent / "shared" / "data" / "preference"


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


HI = user("hi")
HELLO = bot("hello")


@pytest.fixture
def prepare(tmp_path, monkeypatch, in_process):
    """Run the script in this process in an empty folder: prepare(source=PATH) -> as `script`."""
    monkeypatch.chdir(tmp_path)

    def call(**knobs):
        args = [f"--{name}={value}" for name, value in knobs.items()]
        return in_process(lambda: run(retry.main, retry.Config), "retry.py", *args)

    return call


@pytest.fixture
def prepared(prepare, tmp_path):
    """Prepare a .jsonl file of records; return them as `read_back` does."""

    def call(records):
        done = prepare(source=write(tmp_path / "records.jsonl", records))
        assert done.returncode == 0, done.stderr
        return read_back()

    return call


def read_back():
    """Return {split: [(text, the text that is supervised)]} of the prepared folder."""
    splits = {}
    for split in ("train", "val"):
        shard = open_shard(f"data/retry/{split}.bin")
        decode = Tokenizer(shard.template).decode
        splits[split] = []
        for start, stop in itertools.pairwise(shard.offsets.tolist()):
            ids = shard.tokens[start:stop]
            supervised = ids[shard.mask(start, stop)]
            splits[split].append((decode(ids.tolist()), decode(supervised.tolist())))
    return splits


def labelled(n):
    texts = [f"[Human]: question {i}\n[Bot]: answer {i % 7}" for i in range(n)]
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


def write(path, records):
    """Write records in the form that the path's name says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "csv":
            table = csv.DictWriter(file, records[0])
            table.writeheader()
            table.writerows(records)
        elif kind == "json":
            json.dump(records, file)
        else:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return path


# ---- forms


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("r.jsonl", ("text", "label")),
        ("r.json", ("input_text", "labels")),
        ("r.csv", ("input_ids", "labels")),
        ("r.jsonl.gz", ("input_text", "label")),
        ("r.json.gz", ("text", "labels")),
        ("r.csv.gz", ("text", "label")),
    ],
)
def test_texts_with_labels_are_supervised_if_they_were_kept(prepare, tmp_path, file, names):
    records = labelled(60)
    renamed = [dict(zip(names, record.values(), strict=True)) for record in records]
    done = prepare(source=write(tmp_path / file, renamed))
    assert done.returncode == 0, done.stderr
    splits = read_back()
    expected = {(r["text"], r["text"] if r["label"] else "") for r in records}
    assert set(splits["train"]) | set(splits["val"]) == expected
    assert sum(map(len, splits.values())) == 60


def test_the_chosen_reply_of_a_pair_comes_first(prepared):
    pairs = [
        {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(30)
    ]
    pairs.append({"prompt": [HI, HELLO, user("and?")], "chosen": "yes", "rejected": "no"})
    splits = prepared(pairs)
    texts = splits["train"] + splits["val"]
    assert len(texts) == 62
    for (kept, supervised), (rejected, nothing) in zip(texts[::2], texts[1::2], strict=True):
        prompt = kept.rpartition("[Bot]:")[0]
        assert rejected.startswith(prompt) and nothing == ""
        assert supervised == kept.removeprefix(f"{prompt}[Bot]:")
    chat = "[Human]: hi\n[Bot]: hello<|endoftext|>\n[Human]: and?\n[Bot]: yes<|endoftext|>"
    assert (chat, " yes<|endoftext|>") in texts


def test_a_reply_is_kept_if_the_human_went_on_and_rejected_if_retried():
    persona = {"role": "system", "content": "i like tea."}
    how = user("how are you")
    record = {
        "messages": [persona, HI, HELLO, how, bot("fine")],
        "retried": [{"before": 3, "content": "what?"}],
    }
    assert examples(record)[1] == [
        ([persona, HI, HELLO], 1),  # the last reply has no label
        ([persona, HI, HELLO, how, bot("what?")], 0),
    ]


def test_dailydialog_has_good_and_adversarial_replies():
    record = {
        "context": ["a", "b", "c"],
        "positive_responses": ["good"],
        "adversarial_negative_responses": ["bad"],
        "random_negative_responses": ["other"],
    }
    context = [user("a"), bot("b"), user("c")]
    expected = [([*context, bot("good")], 1), ([*context, bot("bad")], 0)]
    assert examples(record)[1] == expected


def test_in_convai2_the_assistant_says_the_reply_and_messages_in_a_row_are_one_turn():
    utterances = [
        ("p1", "hello there", None),
        ("p2", "hey", None),
        ("p1", "fine", None),
        ("p1", "are you here?", None),
        ("p2", "i am", 1),
    ]
    names = ("sender", "text", "evaluation_score")
    record = {"dialog": [dict(zip(names, values, strict=True)) for values in utterances]}
    messages = [user("hello there"), bot("hey"), user("fine are you here?"), bot("i am")]
    assert examples(record)[1] == [(messages, 1)]


def test_chitchats_conversations_are_kept_if_they_were_rated_well():
    path = metadata.distribution("chitchat-dataset").locate_file("chitchat_dataset/dataset.json")
    published = json.loads(path.read_text(encoding="utf-8"))
    n_labels = [0, 0]
    for key, ((messages, label),) in retry.from_chitchat():
        mean = statistics.mean(published[key]["ratings"].values())
        assert label == (mean >= 6) and not 4 < mean < 6
        assert messages[-1]["role"] == "assistant"
        n_labels[label] += 1
    assert min(n_labels) > 100


@pytest.mark.skipif(not PREFERENCE.exists(), reason="the real files are not part of the repository")
@pytest.mark.parametrize(
    ("file", "n_kept", "n_rejected"),
    [("convai2_wild_volunteers.json", 935, 440), ("dailydialogpp_dev.jsonl", None, None)],
)
def test_the_real_files_are_read_whole(prepare, file, n_kept, n_rejected):
    done = prepare(source=PREFERENCE / file)
    assert done.returncode == 0, done.stderr
    splits = read_back()
    kept = [bool(supervised) for texts in splits.values() for _, supervised in texts]
    counts = (sum(kept), len(kept) - sum(kept))
    assert counts == (n_kept, n_rejected) if n_kept else counts[0] == counts[1] > 1000
    split_of = {}
    for split, texts in splits.items():
        for text, _ in texts:
            context = text.rpartition("\n[Bot]:")[0]
            if context.count("[Human]:") > 1:  # many begin with hi
                split_of.setdefault(context, set()).add(split)
    assert {len(names) for names in split_of.values()} == {1}


# ---- splits


def test_no_conversation_is_in_both_splits_however_long_it_was_when_saved(prepared):
    logs = []
    for messages in small_talk(200):
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
        logs += [{"messages": messages[:end]} for end in ends]
        logs[-1]["retried"] = [{"before": 1, "content": "what?"}]
    # a conversation is known by its first exchange
    beginnings = {}
    for split, texts in prepared(logs).items():
        beginnings[split] = {text.partition("<|endoftext|>")[0] for text, kept in texts if kept}
    assert beginnings["train"] and beginnings["val"]
    assert not beginnings["train"] & beginnings["val"]


def test_what_chat_saves_is_read(prepared, tmp_path):
    """Two replies were taken back; a persona given meanwhile does not count as a turn."""
    from chat import Chat

    chat = Chat.__new__(Chat)
    chat.system = []
    chat.retried = []
    chat.turns = [HI, HELLO, HI, bot("bad")]
    assert chat.take_back() == "hi"
    chat.system = [{"role": "system", "content": "i like tea."}]
    chat.turns += [HI, bot("good"), HI, bot("last")]
    for n in range(30):
        chat.turns[0] = user(f"hi {n}")
        chat.save(tmp_path / "log.jsonl")
    splits = prepared([json.loads(line) for line in (tmp_path / "log.jsonl").open()])
    texts = splits["train"] + splits["val"]
    kept = [supervised for _, supervised in texts if supervised]
    rejected = [text for text, supervised in texts if not supervised]
    assert sorted(kept) == [" good<|endoftext|>"] * 30 + [" hello<|endoftext|>"] * 30
    assert len(rejected) == 30
    assert all(t.endswith("\n[Human]: hi\n[Bot]: bad<|endoftext|>") for t in rejected)


def test_what_is_saved_twice_counts_once_and_a_reply_that_came_again_was_kept(prepared):
    what = {"before": 1, "content": "what?"}
    hello = {"before": 1, "content": "hello"}
    logs = []
    for n in range(30):
        talk = [user(f"hi {n}"), HELLO, HI, bot("yes"), HI, bot("last")]
        logs.append({"messages": talk[:4], "retried": [what]})
        logs.append({"messages": talk, "retried": [what, hello]})
    splits = prepared(logs)
    texts = splits["train"] + splits["val"]
    assert len(texts) == len(set(texts)) == 30 * 3
    assert sum(bool(supervised) for _, supervised in texts) == 60


def test_chats_that_begin_alike_are_divided(prepared):
    logs = []
    for n in range(60):
        retried = [{"before": 3, "content": f"what? {n}"}]
        logs.append({"messages": [HI, bot(f"hello {n}"), HI, HELLO], "retried": retried})
    assert all(len(texts) > 1 for texts in prepared(logs).values())


# ---- refusals

PAIR = {"prompt": "a", "chosen": "good", "rejected": "bad"}
CHAT = {"messages": [HI, HELLO]}
DIALOG = {"context": ["a"], "positive_responses": ["b"], "adversarial_negative_responses": ["c"]}


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"text": "a", "label": 2}, "label 2"),
        ({"text": "a", "label": "good"}, "label 'good'"),
        ({"text": "a"}, "label"),
        ({"label": 1}, "label"),
        ({"text": 5, "label": 1}, "5"),
        (PAIR | {"chosen": 5}, "message 2"),
        (PAIR | {"prompt": [{"role": "user"}]}, "content"),
        (PAIR | {"prompt": 5}, ""),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "'narrator'"),
        (CHAT | {"retried": [{"content": "a"}]}, "before"),
        (CHAT | {"retried": [{"before": "q", "content": "a"}]}, ""),
        (CHAT | {"retried": None}, ""),
        ({"context": ["a"], "positive_responses": ["b"]}, "adversarial_negative_responses"),
        (DIALOG | {"context": 5}, ""),
        (DIALOG | {"positive_responses": [5]}, "message 2"),
        ({"dialog": [{"sender": "a", "text": 5, "evaluation_score": 1}]}, "message 1"),
        ("a", "'a'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_record_is_named_by_its_line(prepare, tmp_path, record, word):
    path = write(tmp_path / "r.jsonl", [*labelled(2), record])
    assert_refused(prepare(source=path), "r.jsonl, line 3", word)
    assert not list(tmp_path.rglob("*.bin*"))


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("r.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "line 2"),
        ("r.json", b'[{"text": "a", "label": 1}, {"text"', "record 2"),
        ("r.jsonl.gz", b"\x1f\x8b no", ""),
        ("r.txt", b"hi\n", "line 1"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(prepare, tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    assert_refused(prepare(source=tmp_path / name), name, word)


@pytest.mark.parametrize(
    "records",
    [
        [{"text": f"[Human]: hi\n[Bot]: {n}", "label": n % 2} for n in range(30)],  # one split
        [record | {"label": 1} for record in labelled(20)],  # one label
        [],
    ],
)
def test_both_splits_need_kept_and_rejected_replies(prepare, tmp_path, records):
    refused = prepare(source=write(tmp_path / "r.jsonl", records))
    assert_refused(refused, ".bin would have", "kept", "rejected")
    assert not list((tmp_path / "data").glob("*"))  # not even an empty folder


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({}, "--source=PATH"),
        ({"source": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_knobs_are_refused(prepare, knobs, word):
    assert_refused(prepare(**knobs), word)


# ---- preference pairs, as trl and hh-rlhf have them

ASK = [{"role": "user", "content": "hi"}]
GOOD = {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "go away"}
HH = "\n\nHuman: hi\n\nAssistant: "


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]},
        {"chosen": HH + "hello", "rejected": HH + "go away\n"},
        {"prompt": None, "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD], "score_chosen": 7.0},
    ],
)
def test_pairs_in_every_form_are_the_same_pair(record):
    assert examples(record)[1] == [([*ASK, GOOD], 1), ([*ASK, BAD], 0)]


def test_a_pair_of_equal_replies_is_left_out_and_counted(prepare, tmp_path):
    pairs = [{"prompt": f"hi {i}", "chosen": "hello", "rejected": "go away"} for i in range(40)]
    pairs[7]["rejected"] = " hello"
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    done = prepare(source=source)
    assert done.returncode == 0, done.stderr
    assert "1 of 40 records left out" in done.stdout
