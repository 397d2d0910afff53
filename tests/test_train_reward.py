"""The reward trainer: its losses and figures by hand, its batches, a run that is resumed, and what it refuses."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, StopsAfter, assert_refused, assert_same_weights, records
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import train_reward
from evaluation.metrics import auc, calibration_error
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import parse
from nanochatgpt.shards import ShardWriter
from nanochatgpt.tokenizer import END_OF_TEXT, Tokenizer
from rlhf.reward import scored, scores, scores_behind
from rlhf.reward_model import RewardModel
from train_reward import Replies, figures, losses

TOKENIZER = Tokenizer()
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32}
TINY = {
    "init_from": "start",
    "out_dir": "out",
    "dataset": "retry",
    "device": "cpu",
    "dtype": "float32",
    "dropout": 0.1,
}
TINY |= {
    "batch_size": 8,
    "block_size": 48,
    "gradient_accumulation_steps": 2,
    "max_epochs": 0.0,
    "max_iters": 20,
}
TINY |= {"learning_rate": 0.01, "warmup_iters": 2, "eval_interval": 10, "log_interval": 5}


def replies(n, seed=0, pairs=False):
    """Return n conversations with a label: replies that are kept are of other words, and as long."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(n):
        kept = i % 2 == 0 if pairs else bool(draw.integers(2))
        if not (pairs and i % 2):
            asked = ["red", "blue", "green", "white"][draw.integers(4)]  # the same of a pair
        said = " ".join(
            draw.choice(["yes", "sure"] if kept else ["no", "never"], draw.integers(1, 6))
        )
        found.append(([("user", f"is it {asked} now"), ("assistant", said)], kept))
    return found


def write_replies(folder, split, labelled):
    with ShardWriter(
        Path(folder) / f"{split}.bin", TOKENIZER.n_vocab, TOKENIZER.template
    ) as writer:
        for turns, kept in labelled:
            ids, mask = TOKENIZER.render([{"role": role, "content": text} for role, text in turns])
            writer.write([(ids, mask if kept else [0] * len(ids))])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """In a folder with data/retry, of labels, data/pairs, and a GPT to start from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, pairs in (("retry", False), ("pairs", True)):
        write_replies(f"data/{name}", "train", replies(400, 1, pairs))
        write_replies(f"data/{name}", "val", replies(80, 2, pairs))
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(64, **SHAPE)), TOKENIZER, "start")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def fit(**knobs):
    config = train_reward.Config(**TINY | knobs)
    train_reward.main(config)
    return Path(config.out_dir)


# ---- figures


def test_auc_is_the_share_of_pairs_that_are_in_order():
    draw = np.random.default_rng(0)
    for _ in range(20):
        found, labels = draw.integers(0, 6, 30), draw.integers(0, 2, 30)  # with equal scores
        good, bad = found[labels == 1], found[labels == 0]
        in_order = np.mean([(g > b) + 0.5 * (g == b) for g in good for b in bad])
        assert auc(found, labels) == pytest.approx(in_order)


def test_calibration_error_by_hand():
    # the first bin: 0.02 on average where none is kept; the last: 0.95 where half of them are
    assert calibration_error([0.01, 0.03, 0.9, 1.0], [0, 0, 1, 0]) == pytest.approx(
        (2 * 0.02 + 2 * 0.45) / 4
    )
    assert calibration_error([1.0, 1.0], [1, 1]) == 0


def test_losses_by_hand():
    found, labels = torch.tensor([1.0, -2.0, 0.5, 0.5]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    by_label = [
        math.log(1 + math.exp(-1)),
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(-0.5)),
    ]
    by_label += [math.log(1 + math.exp(0.5))]
    assert losses(found, labels, "labels").tolist() == pytest.approx(by_label)
    assert losses(found, labels, "pairs").tolist() == pytest.approx(
        [math.log(1 + math.exp(-3)), math.log(2)]
    )


def test_figures_by_hand():
    found, labels = torch.tensor([2.0, -1.0, -1.0, 3.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    by_label, by_pair = figures(found, labels, "labels"), figures(found, labels, "pairs")
    assert (by_label["accuracy"], by_pair["accuracy"]) == (0.5, 0.5)
    assert by_label["auc"] == by_pair["auc"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    likelier = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-4))]  # the one right, the other not
    assert by_pair["ece"] == pytest.approx(
        abs(sum(likelier) - 1) / 2, abs=1e-6
    )  # both in the last bin


# ---- what is scored


def test_of_a_text_the_end_is_not_scored_and_the_beginning_is_cut():
    ids, _ = TOKENIZER.render(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    )
    assert ids[-1] == END_OF_TEXT
    assert scored(ids, TOKENIZER, 100) == ids[:-1]
    assert scored(ids, TOKENIZER, 3) == ids[-4:-1]
    assert scored([END_OF_TEXT], TOKENIZER, 3) == [END_OF_TEXT]
    theirs = Tokenizer("user_assistant")  # whose rows are padded with another token
    ids, _ = theirs.render(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    )
    assert scored(ids, theirs, 100) == ids


def test_many_texts_have_the_scores_that_each_has_alone():
    model = RewardModel(GPTConfig(64, **SHAPE)).eval()
    rows = [np.random.default_rng(n).integers(0, 50256, n % 40 + 1).tolist() for n in range(300)]
    together = scores(model, rows)
    alone = torch.cat([scores(model, [row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [64, 20])
def test_replies_behind_one_context_have_the_scores_of_whole_rows(size):
    model = RewardModel(GPTConfig(size, **SHAPE)).eval()
    context, branches = list(range(100, 115)), [[5, 6, 7], [8], [], [9] * 10]
    room = size - 10  # that the longest leaves to the context
    whole = scores(model, [context[-room:] + ids for ids in branches])
    torch.testing.assert_close(
        scores_behind(model, TOKENIZER, context, branches), whole, atol=1e-5, rtol=0
    )


# ---- batches


@pytest.mark.parametrize(("dataset", "pairs"), [("retry", False), ("pairs", True)])
def test_an_epoch_has_each_reply_once_in_batches_of_about_equal_length(dataset, pairs):
    data = Replies([f"data/{dataset}/train.bin"], 8, 48, 0, TOKENIZER, pairs)
    for epoch in (0, 1):
        batches = [data.numbers(epoch * data.n_batches + b).tolist() for b in range(data.n_batches)]
        assert sorted(i for batch in batches for i in batch) == list(range(400))
        if pairs:
            assert all(
                a % 2 == 0 and b == a + 1
                for batch in batches
                for a, b in zip(batch[::2], batch[1::2], strict=True)
            )
        lengths = [data.lengths[batch] for batch in batches]
        padded = sum(max(n) * len(n) for n in lengths)
        assert sum(map(sum, lengths)) / padded > 0.9
    assert data.numbers(0).tolist() != data.numbers(data.n_batches).tolist()
    idx, lengths, labels = data.batch(3, "cpu")
    for row, i in enumerate(data.numbers(3)):
        assert idx[row, : lengths[row]].tolist() == data.ids(i).tolist()
        assert labels[row] == data.labels[i]
        text = TOKENIZER.decode(data.ids(i).tolist())
        assert (text.split("[Bot]: ")[1].split()[0] in ("yes", "sure")) == bool(labels[row])


def test_the_end_of_a_long_text_is_what_is_scored():
    data = Replies(["data/retry/train.bin"], 8, 5, 0, TOKENIZER, False)
    stop = data.spans[7, 1]
    assert data.ids(7).tolist() == data.shards[0].tokens[stop - 6 : stop - 1].tolist()


# ---- runs


@pytest.mark.parametrize("loss", ["labels", "pairs"])
def test_it_learns_which_replies_are_kept_and_length_does_not_tell(loss, capsys):
    out = fit(
        loss=loss,
        dataset={"labels": "retry", "pairs": "pairs"}[loss],
        max_iters=150,
        eval_interval=50,
    )
    last = [r for r in records(out) if "val_loss" in r][-1]
    length = last["length_auc" if loss == "labels" else "length_accuracy"]
    assert last["auc"] > 0.95 and last["accuracy"] > 0.9 and 0.5 <= length < 0.65
    assert last["val_loss"] < 0.3 < 0.68 < last["constant_loss"] < 0.7
    assert "NO BETTER" not in capsys.readouterr().out
    # what it wrote is what others load
    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    ours, _ = load_model(str(out), model_class=RewardModel)
    assert ours.config.block_size == theirs.config.n_positions == 48
    data = Replies([f"data/{TINY['dataset']}/val.bin"], 8, 48, 0, TOKENIZER, False)
    idx, lengths, _ = data.batch(0, "cpu")
    mask = (torch.arange(idx.size(1)) < lengths[:, None]).long()
    with torch.no_grad():
        expected = theirs(idx.masked_fill(mask == 0, END_OF_TEXT), attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(ours.eval()(idx, lengths), expected, atol=1e-4, rtol=0)


def test_a_model_that_is_no_better_than_length_is_told_so(capsys):
    draw = np.random.default_rng(0)
    for split, n in (
        ("train", 100),
        ("val", 60),
    ):  # kept replies are longer, and nothing is learned from 1 step
        labelled = [
            (
                [("user", "hi"), ("assistant", "tea " * int(draw.integers(1, 9) + 9 * (i % 2)))],
                i % 2,
            )
            for i in range(n)
        ]
        write_replies("data/long", split, labelled)
    fit(dataset="long", max_iters=30, learning_rate=1e-4)
    shown = capsys.readouterr().out
    assert "NO BETTER THAN LENGTH" in shown and "chat.py" not in shown


def test_a_model_that_is_no_better_than_a_constant_is_told_so(capsys):
    draw = np.random.default_rng(0)
    for split, n in (("train", 60), ("val", 60)):  # nothing tells which are kept
        labelled = [
            ([("user", "hi"), ("assistant", f"word {draw.integers(1000)}")], i % 2)
            for i in range(n)
        ]
        write_replies("data/noise", split, labelled)
    fit(dataset="noise", max_iters=1, learning_rate=1e-9)
    shown = capsys.readouterr().out
    assert "NO BETTER THAN" in shown and "chat.py" not in shown
    assert "60 replies in an evaluation say little" in shown


def test_of_pairs_the_baseline_is_the_longer_or_the_shorter_of_each(capsys):
    for split, n in (
        ("train", 40),
        ("val", 20),
    ):  # the chosen one is longer but for every fifth pair, which is even
        lengths = [(2, 2) if pair % 5 == 4 else (pair % 3 + 2, pair % 3 + 1) for pair in range(n)]
        labelled = [
            ([("user", "hi"), ("assistant", "tea " * k)], i == 0)
            for pair in lengths
            for i, k in enumerate(pair)
        ]
        write_replies("data/long", split, labelled)
    out = fit(dataset="long", loss="pairs", max_iters=1, learning_rate=1e-9)
    assert records(out)[-1]["length_accuracy"] == pytest.approx(0.8 + 0.2 / 2)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(monkeypatch):
    whole = fit(out_dir="whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_reward, "StopSignal", lambda: StopsAfter(7))
        halves = fit(out_dir="halves")
    assert torch.load(halves / "last" / "state.pt", weights_only=True)["iter"] == 7
    fit(out_dir="halves", init_from="resume")
    assert_same_weights(whole, halves)
    assert_same_weights(whole / "last", halves / "last")

    def evaluations(out):
        return [record for record in records(out) if "val_loss" in record]

    assert evaluations(whole) == evaluations(halves)


def test_two_processes_are_one_process_with_the_same_global_batch():
    whole = fit(dropout=0.0)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    knobs = [
        f"--{name}={value}" for name, value in (TINY | {"dropout": 0.0, "out_dir": "two"}).items()
    ]
    done = subprocess.run(
        [*run, ROOT / "train_reward.py", *knobs], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ones, twos = (load_file(f"{out}/last/model.safetensors") for out in (whole, "two"))
    for name in ones:
        if not name.endswith("c_attn.bias"):  # of the keys' biases the gradient is rounding
            torch.testing.assert_close(ones[name], twos[name], atol=2e-3, rtol=0)
    assert [r["auc"] for r in records(whole) if "auc" in r] == pytest.approx(
        [r["auc"] for r in records(Path("two")) if "auc" in r], abs=0.02
    )


def test_a_reward_model_can_be_trained_further():
    first = fit()
    again = fit(
        init_from=str(first), out_dir="again", max_iters=1, learning_rate=1e-9, warmup_iters=0
    )
    losses_of = [[r["val_loss"] for r in records(out) if "val_loss" in r] for out in (first, again)]
    assert losses_of[1][0] == pytest.approx(min(losses_of[0]), abs=1e-6)


# ---- refusals


@pytest.mark.parametrize(
    ("many", "says"),
    [
        ([([11, 60000], [0, 0]), ([11, 12], [0, 1])], r"train\.bin has token 60000"),
        (
            [([11, 12], [0, 1]), ([], []), ([11, 12], [0, 0])],
            r"train\.bin has a reply without tokens",
        ),
    ],
    ids=["beyond the vocabulary", "empty"],
)
def test_a_shard_with_a_reply_that_cannot_be_scored_is_refused(tmp_path, many, says):
    with ShardWriter(tmp_path / "train.bin", TOKENIZER.n_vocab, "human_bot") as writer:
        writer.write(many)
    with pytest.raises(ValueError, match=says):
        Replies([tmp_path / "train.bin"], 4, 8, 0, TOKENIZER, False).batch(0, "cpu")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"loss": "both"}, ["loss=both is not one of labels, pairs"]),
        ({"lr_schedule": "step"}, ["lr_schedule=step"]),
        ({"batch_size": 0}, ["batch_size=0 is too small"]),
        ({"batch_size": 7, "loss": "pairs"}, ["batch_size=7 has half a pair"]),
        ({"block_size": 65}, ["block_size=65", "context is 64"]),
        ({"loss": "pairs"}, ["has not a chosen and a rejected reply in turn", "--loss=labels"]),
        ({"dataset": "nowhere"}, ["no data/nowhere/train*.bin"]),
        ({"dataset": "text"}, ["plain text without labels", "prepare/retry.py"]),
        ({"dataset": "kept"}, ["replies of one kind only"]),
        ({"dataset": "empty"}, ["data/empty/train.bin is empty: prepare it again"]),
        (
            {"dataset": "sorted", "eval_iters": 1, "batch_size": 2},
            ["all of one label: raise eval_iters"],
        ),
        ({"init_from": "resume"}, ["out/last/state.pt to resume from"]),
        ({"init_from": "nowhere"}, ["no such directory"]),
        ({"template": "user_assistant"}, ["--template=user_assistant"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused_in_a_sentence(knobs, words):
    Path("data/text").mkdir()
    Path("data/empty").mkdir()
    for split in ("train", "val"):
        np.arange(1000, dtype=np.uint16).tofile(f"data/text/{split}.bin")
        Path(f"data/empty/{split}.bin").touch()
        write_replies("data/kept", split, [(turns, True) for turns, _ in replies(20)])
        talk = [
            ([("user", "hi"), ("assistant", "tea " * (1 + 9 * kept))], kept)
            for kept in (0, 0, 1, 1)
        ]
        write_replies("data/sorted", split, talk)  # batches of about equal length
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        fit(**knobs)
    for word in words:
        assert word in str(refused.value)


def test_a_run_is_resumed_with_its_own_block_size():
    fit(max_iters=1)
    with pytest.raises(ValueError, match="block_size=32, but the run in out is for 48"):
        fit(init_from="resume", block_size=32)


def test_scores_that_are_no_numbers_end_the_run_and_the_checkpoint_stays(monkeypatch):
    with pytest.raises(ValueError, match="diverges"):
        fit(learning_rate=1e30, warmup_iters=0, grad_clip=0.0)
    load_model("out/last", model_class=RewardModel)


def test_the_config_for_the_model_in_the_box_runs():
    given = ["--max_epochs=0", "--max_iters=1", "--batch_size=4", "--eval_iters=5", "--device=cpu"]
    train_reward.main(
        parse(train_reward.Config, [str(ROOT / "config" / "train_reward_nano.py"), *given])
    )
    assert load_model("out/reward", model_class=RewardModel)[0].config.block_size == 256


def test_a_run_is_not_overwritten_by_another():
    fit(max_iters=1)
    with pytest.raises(ValueError, match="holds a run: --init_from=resume"):
        fit()


def test_a_mistake_ends_in_a_sentence_and_status_2(script):
    assert_refused(
        script("train_reward.py", "--init_from=start", "--block_size=48", "--dataset=nowhere"),
        "nowhere",
    )
