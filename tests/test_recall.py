"""Conversations about what was said: nothing of val can be learned by heart from train, and probes are fair."""

import itertools
import re

import pytest

from evaluate import remembers
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from prepare.recall import (
    KINDS,
    LITTLE,
    SENTENCES,
    SMALL_TALK,
    SWAP,
    VALUES,
    Conversation,
    Speaker,
    conversation,
    probe,
    swap,
)

KINDS_OF_VALUES = sorted({kind["values"] for kind in KINDS})


def test_the_same_seed_makes_the_same_conversations_and_another_others():
    made = [
        [conversation(speaker) for _ in range(20)]
        for speaker in (Speaker("train", s) for s in (1, 1, 2))
    ]
    assert made[0] == made[1] != made[2]


def alternatives(sentence):
    """Return all that a sentence can become, said by the one and by the other."""
    parts = [
        part[1:-1].split("|") if part.startswith("[") else [part]
        for part in re.split(r"(\[.*?\])", sentence)
    ]
    said = {" ".join("".join(chosen).split()) for chosen in itertools.product(*parts)}
    return said | {swap(sentence) for sentence in said}


def test_no_sentence_is_in_both_splits():
    """Not in another role either, nor said by the other speaker."""
    frames = {"{q}?", "{a}.", "{t}.", "{c}."}  # of a sentence that is nothing but itself
    told = {split: set() for split in ("train", "val")}
    for split in told:
        lists = [
            *SENTENCES.values(),
            *(part for kind in KINDS for name, part in kind.items() if name != "values"),
        ]
        sentences = [sentence for part in lists for sentence in part[split]]
        sentences += [sentence for _, *both in SMALL_TALK[split] for sentence in both]
        told[split] = (
            {said for sentence in sentences for said in alternatives(sentence)} - frames - {""}
        )
    assert len(told["val"]) > 100
    assert not told["train"] & told["val"]


@pytest.mark.parametrize("kind", KINDS_OF_VALUES)
def test_no_value_is_in_both_splits(kind):
    train, val = Speaker("train", 0), Speaker("val", 0)
    told, asked = ({speaker.value(kind).lower() for _ in range(3000)} for speaker in (train, val))
    assert not told & asked
    assert len(told) > 100 and len(asked) >= 4


def test_words_that_are_held_out_do_not_come_in_as_part_of_another_kind_of_value():
    train = Speaker("train", 0)
    told = {
        word
        for kind in KINDS_OF_VALUES
        for _ in range(2000)
        for word in train.value(kind).lower().split()
    }
    held_out = {word.lower() for words in VALUES.values() for word in words["val"]}
    assert not told & held_out


def test_a_name_that_is_held_out_is_not_part_of_a_place():
    words = {}
    for split in ("train", "val"):
        speaker = Speaker(split, 0)
        values = (speaker.value(kind) for kind in ("name", "place") for _ in range(20_000))
        words[split] = {value.split()[0].lower() for value in values}
    assert len(words["val"]) > 1000 and not words["train"] & words["val"]


def test_no_sentence_of_train_has_a_word_that_is_held_out():
    held_out = {word.lower() for words in VALUES.values() for word in words["val"]} - {
        "turkey",
        "orange",
    }
    lists = [
        *SENTENCES.values(),
        *(part for kind in KINDS for name, part in kind.items() if name != "values"),
    ]
    said = " ".join(sentence for part in lists for sentence in part["train"]).lower()
    assert not held_out & set(re.findall(r"[a-z]+", said))


def test_swap_exchanges_the_speakers():
    assert swap("what is my name") == "what is your name"
    assert swap("where am i going") == "where are you going"
    assert swap("which name did i tell you") == "which name did you tell me"
    assert swap("how do i call myself") == "how do you call yourself"
    assert swap("you told me that your dog is called {x}") == "i told you that my dog is called {x}"


def test_slips_leave_the_slots_and_what_matters():
    speaker = Speaker("train", 9)
    sentence = [
        "i",
        "told",
        "you",
        "that",
        "my",
        "dog",
        "is",
        "called",
        "{x}",
        "and",
        "that",
        "is",
        "it",
    ]
    slipped = [speaker.slip(sentence) for _ in range(500)]
    kept = [word for word in sentence if word not in LITTLE]
    for words in slipped:
        rest = iter(words)
        assert all(word in rest for word in kept)  # in their order
    assert any(set(words) - set(sentence) for words in slipped) and any(
        set(sentence) - set(words) for words in slipped
    )
    # beside the slot stands what stood there, or nothing came between
    assert all(words[words.index("{x}") - 1] in sentence for words in slipped)
    assert all(words[words.index("{x}") + 1] in sentence for words in slipped)
    assert Speaker("val", 9).say("{x} is my dog", True, x="Rex") == "Rex is my dog"


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_question_is_answered_from_what_was_said_before(split):
    """The bot's answers name the value that the conversation has, for both speakers' facts."""
    speaker = Speaker(split, 3)
    for _ in range(300):
        talk = Conversation(speaker, persona=2)
        told = [talk.tell() for _ in range(2)]
        for which in (*told, *talk.facts):
            talk.ask(which)
            assert remembers(talk.messages[-1]["content"], talk.facts[which]["x"])
            said_before = " ".join(message["content"] for message in talk.messages[:-1])
            assert remembers(said_before, talk.facts[which]["x"])
        roles = [message["role"] for message in talk.messages]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2)


def test_sentences_are_whole():
    """No slot is left unfilled, no bracket open, no word doubled by an empty alternative."""
    for split in ("train", "val"):
        speaker = Speaker(split, 4)
        for message in (message for _ in range(500) for message in conversation(speaker)):
            assert not re.search(r"[{}\[\]|]|  |^\s|\s$", message["content"]), message
            assert message["content"]


def test_the_topic_is_what_was_talked_of_last():
    speaker = Speaker("train", 5)
    talk = Conversation(speaker)
    talk.small_talk()
    about = talk.about
    talk.topic()
    assert about in talk.messages[-1]["content"].lower()


def test_the_bot_speaks_of_its_own_facts_as_its_own():
    """Of its persona's it says "my", of the human's "your"; "you" for "me" is no "i"."""
    for who in ("human", "bot"):
        talk = Conversation(Speaker("train", 8), persona=3)
        talk.tell()
        for which in [key for key in talk.facts if key[0] == who] * 20:
            talk.ask(which)
            said = {word for word in talk.about.split() if word in SWAP}
            assert said <= (
                {"i", "my", "am", "me", "mine"} if who == "bot" else {"you", "your", "are", "yours"}
            ), talk.about


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_probe_asks_for_what_was_told_k_exchanges_ago_and_not_since(k):
    speaker = Speaker("val", 6)
    for _ in range(100):
        messages, value = probe(speaker, k)
        assert [message["role"] for message in messages] == ["user", "assistant"] * k + ["user"]
        told = [i for i, message in enumerate(messages) if remembers(message["content"], value)]
        assert told == [0]  # in the first message, in no reply, and not in the question


def test_the_personas_probe_asks_for_what_only_the_persona_says():
    speaker = Speaker("val", 7)
    for _ in range(100):
        messages, value = probe(speaker, 0)
        assert [message["role"] for message in messages] == ["system", "user"]
        assert remembers(messages[0]["content"], value) and not remembers(
            messages[1]["content"], value
        )


def test_the_script_writes_shards_of_which_a_twentieth_is_held_out(script, tmp_path):
    done = script("prepare/recall.py", "--conversations=200")
    assert done.returncode == 0, done.stderr
    train, val = (
        open_shard(tmp_path / "data" / "recall" / f"{split}.bin") for split in ("train", "val")
    )
    assert (len(train.offsets) - 1, len(val.offsets) - 1) == (190, 10)
    first = Tokenizer().parse(train.tokens[: train.offsets[1]].tolist())
    assert first == conversation(Speaker("train", 1337))
