"""Recall: nothing of val can be learned by heart from train, and probes are fair."""

import itertools
import re

import pytest

from evaluation.metrics import remembers
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from prepare.recall_generator import Speaker, conversation, probe

SPEAKERS = {split: Speaker(split, 0) for split in ("train", "val")}
swap = SPEAKERS["train"].swap
KINDS_OF_VALUES = sorted({kind["values"] for kind in SPEAKERS["train"].kinds})


def sentences_of(split):
    """Return the sentences of a split, but for small talk."""
    lists = [*SPEAKERS[split].sentences.values()]
    for kind in SPEAKERS[split].kinds:
        lists += [sentences for name, sentences in kind.items() if name != "values"]
    return [sentence for sentences in lists for sentence in sentences]


def held_out_words():
    return {word.lower() for words in SPEAKERS["val"].values.values() for word in words}


def test_the_same_seed_makes_the_same_conversations_and_another_seed_others():
    first, again, other = (Speaker("train", seed) for seed in (1, 1, 2))
    made = [[conversation(speaker) for _ in range(20)] for speaker in (first, again, other)]
    assert made[0] == made[1] != made[2]


def alternatives(sentence):
    """Return all that a sentence can become, said by either speaker."""
    parts = re.split(r"(\[.*?\])", sentence)
    choices = [part[1:-1].split("|") if part.startswith("[") else [part] for part in parts]
    variants = {" ".join("".join(chosen).split()) for chosen in itertools.product(*choices)}
    return variants | {swap(variant) for variant in variants}


def test_no_sentence_is_in_both_splits():
    """Not for another purpose either, nor said by the other speaker."""
    frames = {"{q}?", "{a}.", "{t}.", "{c}.", ""}  # nothing but what fills them
    variants = {}
    for split in ("train", "val"):
        sentences = sentences_of(split)
        for _, human, bot in SPEAKERS[split].exchanges:
            sentences += [human, bot]
        variants[split] = set().union(*map(alternatives, sentences)) - frames
    assert len(variants["val"]) > 100
    assert not variants["train"] & variants["val"]


@pytest.mark.parametrize("kind", KINDS_OF_VALUES)
def test_no_value_is_in_both_splits(kind):
    train, val = (
        {speaker.value(kind).lower() for _ in range(2000)}
        for speaker in (Speaker("train", 0), Speaker("val", 0))
    )
    assert not train & val
    assert len(train) > 100 and len(val) >= 4
    words = {word for value in train for word in value.split()}
    assert not words & held_out_words()  # nor as a part of another kind of value


def test_a_held_out_name_is_not_part_of_a_place():
    words = {}
    for split in ("train", "val"):
        speaker = Speaker(split, 0)
        values = (speaker.value(kind) for kind in ("name", "place") for _ in range(10_000))
        words[split] = {value.split()[0].lower() for value in values}
    assert len(words["val"]) > 1000 and not words["train"] & words["val"]


def test_no_sentence_of_train_has_a_held_out_word():
    words = set(re.findall(r"[a-z]+", " ".join(sentences_of("train")).lower()))
    assert not words & (held_out_words() - {"turkey", "orange"})


def test_swap_exchanges_the_speakers():
    assert swap("what is my name") == "what is your name"
    assert swap("where am i going") == "where are you going"
    assert swap("which name did i tell you") == "which name did you tell me"
    assert swap("how do i call myself") == "how do you call yourself"
    assert swap("you told me that your dog is called {x}") == "i told you that my dog is called {x}"


def test_slips_keep_the_slots_and_what_matters():
    speaker = Speaker("train", 9)
    text = "i told you that my dog is called {x} and that is it"
    sentence = text.split()
    slipped = [speaker.slip(sentence) for _ in range(500)]
    for words in slipped:
        rest = iter(words)
        assert all(
            word in rest for word in sentence if word not in speaker.little_words
        )  # in order
        # what stands next to the slot is from the sentence
        slot = words.index("{x}")
        assert words[slot - 1] in sentence and words[slot + 1] in sentence
    assert any(set(words) - set(sentence) for words in slipped)
    assert any(set(sentence) - set(words) for words in slipped)
    assert Speaker("val", 9).say("{x} is my dog", {"x": "Rex"}, slips=True) == "Rex is my dog"


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_question_is_answered_from_what_was_said_before(split):
    """The bot's answers name the value that the conversation has, for both speakers' facts."""
    talk = Speaker(split, 3)
    for _ in range(300):
        talk.begin(n_persona=2)
        told = [talk.tell() for _ in range(2)]
        for fact in told + talk.facts:
            talk.ask(fact)
            *before, answer = [message["content"] for message in talk.messages]
            assert remembers(answer, fact["x"])
            assert remembers(" ".join(before), fact["x"])
        roles = [message["role"] for message in talk.messages]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_sentences_are_complete(split):
    """No slot is unfilled, no bracket open, no space doubled by an empty alternative."""
    speaker = Speaker(split, 4)
    for message in (message for _ in range(500) for message in conversation(speaker)):
        assert message["content"]
        assert not re.search(r"[{}\[\]|]|  |^\s|\s$", message["content"]), message


def test_the_topic_is_the_last_one():
    talk = Speaker("train", 5)
    talk.begin()
    talk.small_talk()
    topic = talk.topic
    talk.ask_topic()
    assert topic in talk.messages[-1]["content"].lower()


@pytest.mark.parametrize(
    ("owner", "words"), [("human", "you your are yours"), ("bot", "i my am me mine")]
)
def test_the_bot_says_my_of_its_persona_and_your_of_the_humans_facts(owner, words):
    talk = Speaker("train", 8)
    talk.begin(n_persona=3)
    talk.tell()
    for fact in [fact for fact in talk.facts if fact["owner"] == owner] * 20:
        talk.ask(fact)
        pronouns = {word for word in talk.topic.split() if word in talk.swaps}
        assert pronouns <= set(words.split()), talk.topic


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_probe_asks_for_what_was_told_k_exchanges_ago_and_not_since(k):
    speaker = Speaker("val", 6)
    for _ in range(100):
        messages, value = probe(speaker, k)
        assert [message["role"] for message in messages] == ["user", "assistant"] * k + ["user"]
        told = [i for i, message in enumerate(messages) if remembers(message["content"], value)]
        assert told == [0]


def test_the_probe_of_the_persona_asks_for_what_only_the_persona_says():
    speaker = Speaker("val", 7)
    for _ in range(100):
        (persona, question), value = probe(speaker, 0)
        assert (persona["role"], question["role"]) == ("system", "user")
        assert remembers(persona["content"], value) and not remembers(question["content"], value)


def test_the_script_writes_shards_with_a_twentieth_held_out(as_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = as_main("prepare/recall.py", "--conversations=200")
    assert done.returncode == 0, done.stderr
    train, val = (open_shard(f"data/recall/{split}.bin") for split in ("train", "val"))
    assert (len(train.offsets) - 1, len(val.offsets) - 1) == (190, 10)
    first = Tokenizer().parse(train.tokens[: train.offsets[1]].tolist())
    assert first == conversation(Speaker("train", 1337))
