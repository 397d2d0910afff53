"""What evaluate.py reports: each metric against transformers, sacrebleu, or a count by hand."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import assert_refused, small_talk, write_shards
from sacrebleu.metrics import BLEU, CHRF

import evaluate
from evaluate import Config, EvalSet, predictions
from evaluation import replies
from evaluation.metrics import distinct, remembers, repeated_4grams, similarity
from evaluation.replies import Reply, reply_to
from evaluation.report import ROWS, progress
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import run
from nanochatgpt.device import pick_dtype
from nanochatgpt.loader import Loader
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.shards import find_shards, open_shard
from nanochatgpt.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
CONFIG = Config(max_new_tokens=30)


def save(path, block_size=256, tokenizer=TOKENIZER):
    """Write a small model of random weights."""
    torch.manual_seed(0)
    config = GPTConfig(block_size, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)
    save_model(GPT(config), tokenizer, path)
    return path


@pytest.fixture
def model_dir(tmp_path):
    return save(tmp_path / "model")


class Copier(torch.nn.Module):
    """Predicts at each position the token that stands there, with a logit of 5 against 0."""

    lm_head = torch.nn.Identity()
    transformer = torch.nn.ModuleDict({"wpe": torch.nn.Embedding(1, 1)})

    def hidden(self, x, documents):
        return 5.0 * torch.nn.functional.one_hot(x, TOKENIZER.n_vocab).float()


def loader_of(folder, conversations, batch_size=2, **options):
    write_shards(folder, conversations, conversations)
    return Loader([(folder / "val.bin", 1.0)], batch_size, 64, 0, TOKENIZER, **options)


# --- how it predicts ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_loss_and_accuracy_are_those_of_transformers(data_dir, hf_gpt2, tmp_path, dtype):
    hf = hf_gpt2(n_positions=64)
    hf.save_pretrained(tmp_path / "hf")
    dtype = pick_dtype(dtype, "cpu", inference=True)
    model, tokenizer = load_model(str(tmp_path / "hf"), dtype=dtype, inference=True)
    shards = find_shards(data_dir, "talk", "val")
    metrics = predictions(model, Loader(shards, 3, 64, 0, tokenizer))
    loss = correct = n = 0
    for messages in small_talk(10, seed=2):  # as in conftest.data_dir; some exceed the context
        ids, mask = tokenizer.render(messages)
        for n_persona, start, stop in tokenizer.cut(ids, 65):
            piece = torch.tensor(ids[:n_persona] + ids[start:stop])
            learned = torch.tensor(mask[:n_persona] + mask[start:stop])[1:].bool()
            with torch.no_grad():
                logprobs = hf(piece[None, :-1]).logits[0].log_softmax(-1)
            loss -= logprobs.gather(1, piece[1:, None])[learned].sum().item()
            correct += (logprobs.argmax(-1) == piece[1:])[learned].sum().item()
            n += learned.sum().item()
    assert metrics["loss"] == pytest.approx(loss / n, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss / n), rel=1e-4)
    assert metrics["reward"] == pytest.approx(correct / n, abs=2 / n)


def test_reward_and_penalty_by_hand(tmp_path):
    # After "[Bot]:" comes " a a b b b" and the end. The copier predicts what it sees: for a a b b b
    # END it says ":" a a b b b. Three are right, and of the five pairs of neighbours (: a) (a a)
    # (a b) (b b) (b b) three are repetitions.
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a a b b b"}]
    metrics = predictions(Copier(), loader_of(tmp_path, [talk]))
    assert (metrics["reward"], metrics["penalty"]) == (3 / 6, 3 / 5)
    wrong, right = (math.log(math.exp(5) + 50256) - logit for logit in (0, 5))
    assert metrics["loss"] == pytest.approx((3 * wrong + 3 * right) / 6, rel=1e-5)


def test_the_last_token_of_a_row_and_the_first_of_the_next_are_no_neighbours(tmp_path):
    # Text is all supervised, and its rows lie end to end. Of the predictions a b c c | c d e f the
    # pair (c c) in the first row counts, the one across the rows does not: 1 of 3 + 3 pairs.
    path = tmp_path / "val.bin"
    np.array([0, 1, 2, 2, 2, 3, 4, 5, 6], np.uint16).tofile(path)
    metrics = predictions(Copier(), Loader([(path, 1.0)], 2, 4, 0, TOKENIZER))
    assert metrics["penalty"] == 1 / 6


def test_every_conversation_counts_once_in_any_batch_size(tmp_path, model_dir):
    model, _ = load_model(str(model_dir))
    losses = []
    for batch_size in (2, 5, 40):
        loader = loader_of(tmp_path, small_talk(13, seed=5), batch_size)
        losses.append(predictions(model, loader)["loss"])
    assert max(losses) - min(losses) < 1e-5


def test_max_conversations_takes_the_first_ones(tmp_path):
    conversations = small_talk(9, seed=5)
    first = loader_of(tmp_path / "all", conversations, max_conversations=4)
    alone = loader_of(tmp_path / "four", conversations[:4])
    assert first.n_tokens == alone.n_tokens
    assert torch.equal(first.batch(0)[0], alone.batch(0)[0])


# --- how it replies -------------------------------------------------------------------------------


def test_prompts_and_references_are_turns_of_different_people(data_dir):
    conversations = small_talk(10, seed=2)
    shard = open_shard(data_dir / "talk" / "val.bin")
    prompts, references = sample_prompts([shard], TOKENIZER, 8, 100, seed=0)
    used = set()
    for prompt, reference in zip(prompts, references, strict=True):
        assert len(prompt) <= 100 and TOKENIZER.decode(prompt).endswith("[Bot]:")
        for i, messages in enumerate(conversations):
            for n, message in enumerate(messages):
                same = message == {"role": "assistant", "content": reference}
                if same and TOKENIZER.render(messages[:n], True)[0] == prompt:
                    used.add(i)
    assert len(used) == len(prompts) == 8
    assert sample_prompts([shard], TOKENIZER, 8, 100, seed=0) == (prompts, references)
    assert sample_prompts([shard], TOKENIZER, 8, 100, seed=1) != (prompts, references)


def test_distinct_counts_different_words_among_all():
    texts = ["the cat saw the dog", "The dog!"]  # 8 words, different: the cat saw dog !
    assert distinct(texts, 1) == 5 / 8
    assert distinct(texts, 2) == 5 / 6  # the-cat cat-saw saw-the the-dog the-dog dog-!
    assert distinct([], 1) == 0


def test_repeated_4grams_by_hand():
    assert repeated_4grams(["a b c d a b c d"]) == 1 / 5  # abcd bcda cdab dabc abcd
    assert repeated_4grams(["a b c d", "a b c d"]) == 0  # once in each reply
    assert repeated_4grams(["so so so so so so"]) == pytest.approx(2 / 3)
    assert repeated_4grams(["too short"]) == 0


def test_an_answer_remembers_a_value_as_whole_words_in_any_case():
    assert remembers("Your name is Ana.", "ana")
    assert remembers("it was the red  car!", "Red Car")
    assert not remembers("your name is anabel.", "ana")
    assert not remembers("the car is red", "red car")
    assert not remembers("", "ana")


def test_bleu_and_chrf_of_replies():
    """By hand: 8 of 9 words, 5 of 7 pairs, 3 of 5 triples and 1 of 3 fours are right."""
    texts = ["the cat sat on a mat", "hello to you"]
    references = ["the cat sat on the mat", "hello to you"]
    scores = similarity(texts, references)
    assert scores["bleu"] == pytest.approx((8 / 9 * 5 / 7 * 3 / 5 * 1 / 3) ** 0.25)
    assert 0.5 < scores["chrf"] < 1
    long = ["hello there, how are you doing today?", "i am fine, thank you very much indeed"]
    assert similarity(long, long) == pytest.approx({"bleu": 1, "chrf": 1})


def test_replies_show_whether_they_ended_and_spoke_for_the_human(monkeypatch):
    texts = ["fine, thanks", "yes\n[Human]: and you?\n[Bot]: no", "on and on and on"]
    ids = [TOKENIZER.encode(text) for text in texts]
    ids[2] = (ids[2] * 10)[:30]
    monkeypatch.setattr(replies, "generate", lambda *args, **options: ids)
    assert reply_to([[0]] * 3, None, TOKENIZER, CONFIG, "") == [
        Reply("fine, thanks", True, False),
        Reply("yes", True, True),
        Reply(TOKENIZER.decode(ids[2]), False, False),
    ]


def test_special_tokens_that_open_a_turn_are_caught_too(monkeypatch):
    columned = Tokenizer("user_assistant")
    user = columned.special_ids["<|USER|>"]
    ids = [*columned.encode("yes "), user, *columned.encode(" and you?")]
    calls = []
    monkeypatch.setattr(replies, "generate", lambda *_, **options: calls.append(options) or [ids])
    assert reply_to([[0]], None, columned, CONFIG, "") == [Reply("yes", True, True)]
    assert user not in calls[0]["stop_ids"] and columned.eos_id in calls[0]["stop_ids"]


def test_metrics_of_replies_are_sacrebleus_of_the_same_replies(data_dir, model_dir):
    config = Config(dataset="talk", data_dir=str(data_dir), replies=6, probes=0, max_new_tokens=20)
    model, tokenizer = load_model(str(model_dir))
    metrics, _ = evaluate.evaluate(config, model, tokenizer, EvalSet(config, tokenizer, 256))
    shard = open_shard(data_dir / "talk" / "val.bin")
    prompts, references = sample_prompts([shard], tokenizer, 6, 256 - 20, config.seed)
    texts = [r.text for r in reply_to(prompts, model, tokenizer, config, "")]
    assert metrics["bleu"] == pytest.approx(BLEU().corpus_score(texts, [references]).score / 100)
    assert metrics["chrf"] == pytest.approx(CHRF().corpus_score(texts, [references]).score / 100)
    assert metrics["recall_1"] is None


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_appears_only_on_a_terminal(monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert list(progress([7, 8, 9, 10], "predicting")) == [7, 8, 9, 10]
    lines = capsys.readouterr().err
    expected = [f"predicting: {n} of 4" for n in (1, 2, 3, 4)]
    assert lines.split("\r") == ([*expected[:3], expected[3] + "\n"] if terminal else [""])


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture
def run_script(in_process, tmp_path, monkeypatch):
    """Run evaluate.py in an empty folder: run_script("--init_from=model", ...) -> as `script`."""
    monkeypatch.chdir(tmp_path)
    return partial(in_process, lambda: run(evaluate.main, Config), "evaluate.py")


def test_two_models_side_by_side_in_a_table_and_as_json(run_script, data_dir, model_dir, tmp_path):
    save(tmp_path / "longer", block_size=512)
    quick = ["--dataset=talk", "--replies=3", "--probes=2", "--max_new_tokens=8", "--dtype=float32"]
    done = run_script("--init_from=model", "--base=longer", "--json=new/both.json", *quick)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "new" / "both.json").read_text())
    assert list(metrics) == ["longer", "model"]
    for row in metrics.values():
        assert list(row) == list(ROWS)
        shares = row.keys() - {"loss", "perplexity", "mean_length"}
        assert all(0 <= row[key] <= 1 for key in shares)
        assert row["loss"] == pytest.approx(math.log(50257), rel=0.05)  # it has learned nothing
        assert f"{row['loss']:.4f}" in done.stdout
    assert done.stdout.split()[:3] == ["longer", "model", "people"]
    assert "nrefs:1|case:mixed|eff:no|tok:13a" in done.stdout  # sacrebleu's signature

    # the shorter context holds for both, so the second model changes nothing for the first
    assert run_script("--init_from=model", "--json=one.json", *quick).returncode == 0
    assert json.loads((tmp_path / "one.json").read_text())["model"] == metrics["model"]


def test_without_a_dataset_there_are_only_probes(run_script, model_dir, tmp_path):
    quick = ["--init_from=model", "--dataset=", "--probes=2", "--max_new_tokens=4"]
    done = run_script(*quick, "--json=metrics.json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())["model"]
    assert [key for key in ROWS if metrics[key] is None] == list(ROWS)[:10]
    assert "BLEU" not in done.stdout and "recall" in done.stdout


def test_text_without_turns_has_a_loss_and_no_replies(data_dir, model_dir):
    (data_dir / "prose").mkdir()
    ids = np.array(TOKENIZER.encode("once upon a time there was a cat. " * 50), np.uint16)
    ids.tofile(data_dir / "prose" / "val.bin")
    config = Config(dataset="prose", data_dir=str(data_dir), probes=0)
    eval_set = EvalSet(config, TOKENIZER, 256)
    metrics, _ = evaluate.evaluate(config, *load_model(str(model_dir)), eval_set)
    assert metrics["loss"] > 0 and metrics["bleu"] is None and metrics["ended"] is None


def test_refusals(run_script, data_dir, model_dir, tmp_path):
    save(tmp_path / "columned", tokenizer=Tokenizer("user_assistant"))
    save(tmp_path / "short", block_size=40)
    (data_dir / "train_only").mkdir()
    (data_dir / "talk" / "train.bin").rename(data_dir / "train_only" / "train.bin")
    talk = ["--init_from=model", "--dataset=talk"]
    for words, arguments in [
        (["train_only/val*.bin"], ["--init_from=model", "--dataset=train_only"]),
        (["max_new_tokens=300", "--probes=0"], [*talk, "--max_new_tokens=300"]),
        (["max_new_tokens=300"], [*talk, "--max_new_tokens=300", "--probes=0"]),
        (["batch_size=0"], [*talk, "--batch_size=0"]),
        (["replies=-1"], [*talk, "--replies=-1"]),
        (["columned and model", "template"], [*talk, "--base=columned"]),
        (["out/none"], ["--init_from=out/none", "--dataset="]),
        (["max_new_tokens=20", "40"], ["--init_from=short", "--dataset=", "--max_new_tokens=20"]),
    ]:
        assert_refused(run_script(*arguments), *words)
