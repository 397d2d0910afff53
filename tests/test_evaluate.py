"""What evaluate.py reports: each figure against transformers, sacrebleu, or a count by hand."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import assert_refused, small_talk, write_shards

import evaluate
from evaluate import Config, Material, Reply, predictions, reply
from evaluation.metrics import distinct, remembers, repeated_4grams
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import run
from nanochatgpt.loader import Loader
from nanochatgpt.sampling import options_of
from nanochatgpt.shards import find_shards, open_shard, sample_prompts
from nanochatgpt.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
KEYS = [
    "loss",
    "perplexity",
    "token_accuracy",
    "reward",
    "penalty",
    "bleu",
    "chrf",
    "distinct_1",
    "distinct_2",
]
KEYS += [
    "repeated_4grams",
    "mean_length",
    "ended",
    "speaks_for_human",
    "recall_1",
    "recall_3",
    "recall_6",
    "persona",
]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.fixture
def model_dir(tmp_path):
    """A directory with a small model of random weights."""
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(block_size=256, **SHAPE)), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


class Copier(torch.nn.Module):
    """Predicts at each position the token that stands there, with a logit of 5 against 0."""

    lm_head = torch.nn.Identity()

    def hidden(self, x, documents):
        return 5.0 * torch.nn.functional.one_hot(x, TOKENIZER.n_vocab).float()


def loader_of(folder, conversations, batch_size=2, block_size=64, **options):
    write_shards(folder, conversations, conversations)
    return Loader([(folder / "val.bin", 1.0)], batch_size, block_size, 0, TOKENIZER, **options)


# what the model makes of what people said


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_loss_and_perplexity_are_those_of_transformers_on_the_same_tokens(
    data_dir, hf_gpt2, tmp_path, dtype
):
    hf = hf_gpt2(n_positions=64)
    hf.save_pretrained(tmp_path / "hf")
    dtype = evaluate.pick_dtype(dtype, "cpu", inference=True)
    model, tokenizer = load_model(str(tmp_path / "hf"), dtype=dtype, inference=True)
    figures = predictions(
        model, Loader(find_shards(data_dir, "talk", "val"), 3, 64, 0, tokenizer), "cpu"
    )
    loss = right = n = 0
    for messages in small_talk(
        10, seed=2
    ):  # as in conftest.data_dir; some are longer than the context
        ids, mask = tokenizer.render(messages)
        for n_persona, start, stop in tokenizer.cut(ids, 65):
            piece = torch.tensor(ids[:n_persona] + ids[start:stop])
            learned = torch.tensor(mask[:n_persona] + mask[start:stop])[1:].bool()
            with torch.no_grad():
                logprobs = hf(piece[None, :-1]).logits[0].log_softmax(-1)
            loss -= logprobs.gather(1, piece[1:, None])[learned].sum().item()
            right += (logprobs.argmax(-1) == piece[1:])[learned].sum().item()
            n += learned.sum().item()
    assert figures["loss"] == pytest.approx(loss / n, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(loss / n), rel=1e-4)
    assert figures["token_accuracy"] == figures["reward"] == pytest.approx(right / n, abs=2 / n)


def test_reward_and_penalty_by_hand(tmp_path):
    # After "[Bot]:" the reply " a a b b b" and its end. Seen are ":" and the five words; the copier predicts what it
    # sees, for the tokens a a b b b END: ":" a a b b b. Right: the second a, the second and third b: 3 of 6. Of the 5
    # pairs of neighbours among the predictions (: a) (a a) (a b) (b b) (b b), 3 are repetitions.
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a a b b b"}]
    figures = predictions(Copier(), loader_of(tmp_path, [talk]), "cpu")
    assert (figures["reward"], figures["penalty"]) == (3 / 6, 3 / 5)
    wrong, right = (math.log(math.exp(5) + 50256) - logit for logit in (0, 5))
    assert figures["loss"] == pytest.approx((3 * wrong + 3 * right) / 6, rel=1e-5)


def test_the_end_of_a_reply_and_the_beginning_of_the_next_are_no_neighbours(tmp_path):
    # Text without turns is all supervised, and its rows lie end to end. Of the predictions a b c c | c d e f the pair
    # (c c) within the first row counts and that across the rows does not: 1 of 3 + 3 pairs.
    a, b, c, d, e, f, g = range(7)
    np.array([a, b, c, c, c, d, e, f, g], np.uint16).tofile(tmp_path / "val.bin")
    figures = predictions(
        Copier(), Loader([(tmp_path / "val.bin", 1.0)], 2, 4, 0, TOKENIZER), "cpu"
    )
    assert figures["penalty"] == 1 / 6


def test_every_conversation_counts_once_whatever_the_batch(tmp_path):
    conversations = small_talk(23, seed=5)
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, **SHAPE))
    losses = {
        batch_size: predictions(model, loader_of(tmp_path, conversations, batch_size), "cpu")[
            "loss"
        ]
        for batch_size in (1, 2, 5, 40)
    }
    assert max(losses.values()) - min(losses.values()) < 1e-5


def test_max_conversations_takes_the_first_ones(tmp_path):
    conversations = small_talk(9, seed=5)
    first = loader_of(tmp_path / "all", conversations, max_conversations=4)
    alone = loader_of(tmp_path / "four", conversations[:4])
    assert first.n_tokens == alone.n_tokens
    assert torch.equal(first.batch(0)[0], alone.batch(0)[0])


# what the model says itself


def test_openings_are_prompts_of_the_people_and_what_they_replied(data_dir):
    conversations = small_talk(10, seed=2)
    shard = open_shard(data_dir / "talk" / "val.bin")
    prompts, replies = sample_prompts([shard], TOKENIZER, 8, 100, seed=0)
    seen = set()
    for prompt, said in zip(prompts, replies, strict=True):
        assert len(prompt) <= 100 and TOKENIZER.decode(prompt).endswith("[Bot]:")
        (number,) = [
            i
            for i, messages in enumerate(conversations)
            for n, message in enumerate(messages)
            if message == {"role": "assistant", "content": said}
            and TOKENIZER.render(messages[:n], add_generation_prompt=True)[0] == prompt
        ]
        seen.add(number)
    assert len(seen) == len(prompts) == 8  # each of another conversation
    assert sample_prompts([shard], TOKENIZER, 8, 100, seed=0) == (prompts, replies)
    assert sample_prompts([shard], TOKENIZER, 8, 100, seed=1) != (prompts, replies)


def test_distinct_counts_different_words_among_all():
    texts = [
        "the cat saw the dog",
        "The dog!",
    ]  # 8 words and convai2_metrics: the cat saw dog ! are different
    assert distinct(texts, 1) == 5 / 8
    assert distinct(texts, 2) == 5 / 6  # the-cat cat-saw saw-the the-dog the-dog dog-!
    assert distinct([], 1) == 0


def test_repeated_4grams_by_hand():
    assert repeated_4grams(["a b c d a b c d"]) == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repeated_4grams(["a b c d", "a b c d"]) == 0  # in one reply once each
    assert repeated_4grams(["so so so so so so"]) == pytest.approx(2 / 3)
    assert repeated_4grams(["too short"]) == 0


def test_an_answer_remembers_a_value_as_whole_words_in_any_case():
    assert remembers("Your name is Ana.", "ana")
    assert remembers("it was the red  car!", "Red Car")
    assert not remembers("your name is anabel.", "ana")
    assert not remembers("the car is red", "red car")
    assert not remembers("", "ana")


def test_replies_tell_whether_they_ended_and_for_whom_they_spoke(monkeypatch):
    said = ["fine, thanks", "yes\n[Human]: and you?\n[Bot]: no", "on and on and on"]
    sampling = {"max_new_tokens": 30}
    ids = [TOKENIZER.encode(text) for text in said]
    ids[2] = (ids[2] * 10)[:30]
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, **options: ids)
    assert reply(None, TOKENIZER, [[0]] * 3, sampling, 0, "") == [
        Reply("fine, thanks", True, False),
        Reply("yes", True, True),
        Reply(TOKENIZER.decode(ids[2]), False, False),
    ]


def test_a_template_with_tokens_for_the_turns_is_caught_speaking_for_the_human_too(monkeypatch):
    columned = Tokenizer("user_assistant")
    ids = [
        *columned.encode("yes "),
        columned.special_ids["<|USER|>"],
        *columned.encode(" and you?"),
    ]
    seen = {}
    monkeypatch.setattr(
        evaluate, "generate", lambda model, prompts, **options: seen.update(options) or [ids]
    )
    assert reply(None, columned, [[0]], {"max_new_tokens": 30}, 0, "") == [Reply("yes", True, True)]
    assert (
        columned.special_ids["<|USER|>"] not in seen["stop_ids"]
        and columned.eos_id in seen["stop_ids"]
    )


def test_bleu_and_chrf_are_sacrebleus_of_the_same_replies(data_dir, model_dir):
    from sacrebleu.metrics import BLEU, CHRF

    config = Config(dataset="talk", data_dir=str(data_dir), replies=6, probes=0, max_new_tokens=20)
    model, tokenizer = load_model(str(model_dir))
    figures, _ = evaluate.evaluate(config, model, tokenizer, Material(config, tokenizer, 256))
    shard = open_shard(data_dir / "talk" / "val.bin")
    prompts, references = sample_prompts([shard], tokenizer, 6, 256 - 20, config.seed)
    options = options_of(config)
    texts = [r.text for r in reply(model, tokenizer, prompts, options, config.seed, "")]
    assert figures["bleu"] == pytest.approx(BLEU().corpus_score(texts, [references]).score / 100)
    assert figures["chrf"] == pytest.approx(CHRF().corpus_score(texts, [references]).score / 100)
    assert figures["recall_1"] is None


def test_progress_is_shown_at_a_terminal_alone(monkeypatch, capsys):
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        with evaluate.progress("predicting", 4) as shown:
            shown(1)
            before = capsys.readouterr().err
        assert ("predicting: 1 of 4, " in before and " s left" in before) == terminal
        assert capsys.readouterr().err == "\r\033[K" * terminal  # the line is gone


def test_bleu_and_chrf_of_replies_that_are_partly_right():
    """By hand: 8 of 9 words, 5 of 7 pairs, 3 of 5 triples and 1 of 3 fours are there, in as many words."""
    texts = ["the cat sat on a mat", "hello to you"]
    references = ["the cat sat on the mat", "hello to you"]
    precisions = (8 / 9, 5 / 7, 3 / 5, 1 / 3)
    figures = evaluate.likeness(texts, references)
    assert figures["bleu"] == pytest.approx(math.prod(precisions) ** 0.25)
    assert 0.5 < figures["chrf"] < 1


def test_what_people_replied_scores_full_marks():
    said = ["hello there, how are you doing today?", "i am fine, thank you very much indeed"]
    assert evaluate.likeness(said, said) == pytest.approx({"bleu": 1, "chrf": 1})


# the script


@pytest.fixture
def evaluated(in_process, tmp_path, monkeypatch):
    """Run the script in an empty folder: evaluated("--init_from=model", ...) -> as `script`."""
    monkeypatch.chdir(tmp_path)
    return partial(in_process, lambda: run(evaluate.main, Config), "evaluate.py")


def test_two_models_side_by_side_in_a_table_and_as_json(
    script, evaluated, data_dir, model_dir, tmp_path
):
    torch.manual_seed(1)
    save_model(GPT(GPTConfig(block_size=256, **SHAPE)), TOKENIZER, tmp_path / "other")
    quick = ["--replies=3", "--probes=2", "--max_new_tokens=8", "--dtype=float32"]
    done = script(
        "evaluate.py",
        "--init_from=model",
        "--base=other",
        "--dataset=talk",
        "--json=figures.json",
        *quick,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["other", "model"]
    for row in figures.values():
        assert list(row) == KEYS
        assert all(
            0 <= row[key] <= 1 for key in KEYS if key not in ("loss", "perplexity", "mean_length")
        )
        assert row["loss"] == pytest.approx(math.log(50257), rel=0.05)  # they have learned nothing
        assert f"{row['loss']:.4f}" in done.stdout
    assert done.stdout.split()[:3] == ["other", "model", "people"]
    assert "bleu: nrefs:1|case:mixed|eff:no|tok:13a" in done.stdout
    again = evaluated("--init_from=model", "--dataset=talk", "--json=again.json", *quick)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["model"] == figures["model"]


def test_without_a_dataset_only_the_probes_are_asked(evaluated, model_dir, tmp_path):
    done = evaluated(
        "--init_from=model", "--dataset=", "--probes=2", "--max_new_tokens=4", "--json=figures.json"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["model"]
    assert [key for key in KEYS if figures[key] is None] == KEYS[:11]
    assert "BLEU" not in done.stdout and "recall" in done.stdout


def test_text_without_turns_has_a_loss_and_no_replies(data_dir, model_dir):
    (data_dir / "prose").mkdir()
    np.array(TOKENIZER.encode("once upon a time there was a cat. " * 200), np.uint16).tofile(
        data_dir / "prose" / "val.bin"
    )
    config = Config(dataset="prose", data_dir=str(data_dir), probes=0)
    figures, _ = evaluate.evaluate(
        config, *load_model(str(model_dir)), Material(config, TOKENIZER, 256)
    )
    assert figures["loss"] > 0 and figures["bleu"] is None and figures["ended"] is None


def test_refusals(evaluated, data_dir, model_dir, tmp_path):
    (data_dir / "untold").mkdir()
    (data_dir / "talk" / "train.bin").rename(data_dir / "untold" / "train.bin")
    torch.manual_seed(0)
    columned = Tokenizer("user_assistant")
    save_model(
        GPT(GPTConfig(block_size=256, vocab_size=columned.n_vocab, **SHAPE)),
        columned,
        tmp_path / "columned",
    )
    shutil.copytree(model_dir, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    save_model(
        GPT(GPTConfig(block_size=256, vocab_size=65, **SHAPE)), TOKENIZER, tmp_path / "letters"
    )
    save_model(GPT(GPTConfig(block_size=40, **SHAPE)), TOKENIZER, tmp_path / "short")
    model = "--init_from=model"
    for words, arguments in [
        (["untold/val*.bin"], [model, "--dataset=untold"]),
        (["nowhere/val*.bin"], [model, "--dataset=nowhere"]),
        (["bare", "tokenizer.json"], ["--init_from=bare", "--dataset=talk"]),
        (["letters", "65"], ["--init_from=letters", "--dataset=talk"]),
        (["context, 256", "max_new_tokens=300"], [model, "--dataset=talk", "--max_new_tokens=300"]),
        (
            ["no reply", "max_new_tokens=300"],
            [model, "--dataset=talk", "--max_new_tokens=300", "--probes=0"],
        ),
        (["batch_size=0"], [model, "--dataset=talk", "--batch_size=0"]),
        (["vocabular", "columned"], [model, "--base=columned", "--dataset=talk"]),
        (["base=model"], [model, "--base=model"]),
        (["there is no such directory"], [model, "--base=out/none", "--dataset="]),
        (["replies=-1"], [model, "--replies=-1"]),
        (["letters", "65"], ["--init_from=letters", "--dataset=untold", "--first_batches=1"]),
        (
            ["max_conversations does nothing"],
            [model, "--dataset=talk", "--first_batches=1", "--max_conversations=9"],
        ),
        (["nothing is asked for", "probes"], [model, "--dataset=", "--probes=0"]),
        (["context, 40", "--probes=0"], ["--init_from=short", "--dataset=", "--max_new_tokens=20"]),
        (["no/figures.json"], [model, "--dataset=talk", "--json=no/figures.json"]),
    ]:
        assert_refused(evaluated(*arguments), *words)


def test_two_models_are_measured_by_the_same_material(
    evaluated, data_dir, model_dir, tmp_path, monkeypatch
):
    """The shorter context is that of both, so that the same tokens are predicted and the same prompts answered."""
    save_model(GPT(GPTConfig(block_size=512, **SHAPE)), TOKENIZER, tmp_path / "longer")
    seen = []
    monkeypatch.setattr(
        evaluate,
        "evaluate",
        lambda config, model, tokenizer, material: seen.append(material) or ({}, []),
    )
    done = evaluated(
        "--init_from=longer", "--base=model", "--dataset=talk", "--probes=0", "--replies=0"
    )
    assert done.returncode == 0, done.stderr
    assert seen[0] is seen[1] and seen[0].loader.block_size == 256
