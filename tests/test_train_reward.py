"""The reward trainer: batches, resuming, and what it refuses."""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, StopsAfter, assert_same_weights, records
from forked import two_ranks
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import train_reward
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import parse
from nanochatgpt.shards import ShardWriter
from nanochatgpt.tokenizer import END_OF_TEXT, Tokenizer
from rlhf.dataset import ReplyDataset
from rlhf.reward_model import RewardModel, reward_losses, roc_auc
from rlhf.scoring import score_replies, score_texts, scored_ids

TOKENIZER = Tokenizer()
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32}
TINY = {"init_from": "start", "out_dir": "out", "dataset": "retry", "device": "cpu"}
TINY |= {"dtype": "float32", "dropout": 0.1, "batch_size": 8, "block_size": 48}
TINY |= {"gradient_accumulation_steps": 2, "max_iters": 8, "learning_rate": 0.01}
TINY |= {"warmup_iters": 2, "eval_interval": 4, "log_interval": 2}


def replies(n, seed=0, pairs=False):
    """Return n labelled conversations: kept replies have other words, but not another length."""
    draw = np.random.default_rng(seed)
    labelled = []
    for i in range(n):
        kept = i % 2 == 0 if pairs else bool(draw.integers(2))
        if not (pairs and i % 2):  # the same question for both of a pair
            question = f"is it {['red', 'blue', 'green', 'white'][draw.integers(4)]} now"
        words = draw.choice(["yes", "sure"] if kept else ["no", "never"], draw.integers(1, 6))
        labelled.append(([("user", question), ("assistant", " ".join(words))], kept))
    return labelled


def write_replies(folder, split, labelled):
    path = Path(folder) / f"{split}.bin"
    with ShardWriter(path, TOKENIZER.n_vocab, TOKENIZER.template) as writer:
        for turns, kept in labelled:
            ids, mask = TOKENIZER.render([{"role": role, "content": text} for role, text in turns])
            writer.write([(ids, mask if kept else [0] * len(ids))])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with the datasets `retry`, of labels, and `pairs`, and a GPT to start from."""
    home = tmp_path_factory.mktemp("reward")
    for name, pairs in (("retry", False), ("pairs", True)):
        write_replies(home / "data" / name, "train", replies(400, 1, pairs))
        write_replies(home / "data" / name, "val", replies(80, 2, pairs))
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(64, **SHAPE)), TOKENIZER, home / "start")
    return home


@pytest.fixture(autouse=True)
def folder(tmp_path, shared, monkeypatch):
    """The current folder, with what is shared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("data").mkdir()
    for name in ("data/retry", "data/pairs", "start"):
        Path(name).symlink_to(shared / name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def fit(**knobs):
    config = train_reward.Config(**TINY | knobs)
    train_reward.main(config)
    return Path(config.out_dir)


def dataset(path="data/retry/train.bin", block_size=48, loss="labels"):
    config = SimpleNamespace(block_size=block_size, batch_size=8, seed=0, loss=loss)
    return ReplyDataset([(path, 1.0)], TOKENIZER, config)


def evaluations(out):
    return [record for record in records(out) if "val_loss" in record]


# ---- losses and scores


def test_losses_by_hand():
    scores = torch.tensor([1.0, -2.0, 0.5, 0.5])
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    by_label = [math.log(1 + math.exp(-x)) for x in (1, 2, 0.5, -0.5)]
    by_pair = [math.log(1 + math.exp(-3)), math.log(2)]
    assert reward_losses(scores, labels, "labels").tolist() == pytest.approx(by_label)
    assert reward_losses(scores, labels, "pairs").tolist() == pytest.approx(by_pair)


def test_accuracy_is_the_share_on_the_right_side_or_of_pairs_in_order():
    def score(idx, lengths):
        return idx[:, 0].float()

    scorer = type("Scorer", (torch.nn.Module,), {"forward": lambda self, *args: score(*args)})()
    idx = torch.tensor([[2], [-1], [-1], [3]])
    batches = [(idx, torch.ones(4), torch.tensor([1.0, 0.0, 1.0, 0.0]))]
    for loss in ("labels", "pairs"):
        metrics = train_reward.evaluate(scorer, batches, loss, contextlib.nullcontext())
        assert metrics["accuracy"] == 0.5 and metrics["auc"] == pytest.approx(1.5 / 4)


def test_auc_is_the_share_of_pairs_in_order():
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores = draw.integers(0, 6, 30)  # with ties
        labels = draw.integers(0, 2, 30)
        kept, others = scores[labels == 1], scores[labels == 0]
        in_order = np.mean([(a > b) + 0.5 * (a == b) for a in kept for b in others])
        assert roc_auc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(in_order)


def test_the_end_of_a_text_is_not_scored_and_the_beginning_is_cut():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    ids, _ = TOKENIZER.render(messages)
    assert ids[-1] == END_OF_TEXT
    assert scored_ids(ids, TOKENIZER, 100) == ids[:-1]
    assert scored_ids(ids, TOKENIZER, 3) == ids[-4:-1]
    assert scored_ids([END_OF_TEXT], TOKENIZER, 3) == [END_OF_TEXT]
    other = Tokenizer("user_assistant")  # pads rows with another token
    ids, _ = other.render(messages)
    assert scored_ids(ids, other, 100) == ids


def test_many_texts_have_the_scores_that_each_has_alone():
    model = RewardModel(GPTConfig(64, **SHAPE)).eval()
    texts = [np.random.default_rng(n).integers(0, 50256, n % 40 + 1).tolist() for n in range(70)]
    alone = torch.cat([score_texts(model, TOKENIZER, [ids]) for ids in texts])
    torch.testing.assert_close(score_texts(model, TOKENIZER, texts), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [64, 20])
def test_replies_to_one_prompt_have_the_scores_of_whole_texts(size):
    model = RewardModel(GPTConfig(size, **SHAPE)).eval()
    prompt = list(range(100, 115))
    branches = [[5, 6, 7], [8], [], [9] * 10]
    room = size - 10  # what the longest reply leaves to the prompt
    whole = [score_texts(model, TOKENIZER, [prompt[-room:] + ids]) for ids in branches]
    scores = score_replies(model, TOKENIZER, prompt, branches)
    torch.testing.assert_close(scores, torch.cat(whole), atol=1e-5, rtol=0)


# ---- batches


def test_an_epoch_has_each_reply_once_in_batches_of_similar_length():
    data = dataset()
    epochs = []
    for epoch in (0, 1):
        rows = []
        padded = 0
        for number in range(data.n_batches):
            idx, lengths, labels = data.batch(epoch * data.n_batches + number, "cpu")
            padded += idx.numel()
            for ids, length, label in zip(idx, lengths, labels, strict=True):
                text = TOKENIZER.decode(ids[:length].tolist())
                assert (text.split("[Bot]: ")[1].split()[0] in ("yes", "sure")) == label
                rows.append(text)
        assert data.lengths.sum() / padded > 0.9
        epochs.append(rows)
    texts = [TOKENIZER.decode(ids[:-1].tolist()) for ids in data.texts]  # without the end
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(texts) and len(texts) == 400
    assert epochs[0] != epochs[1]


def test_the_end_of_a_long_text_is_what_is_scored():
    data = dataset(block_size=5)
    idx, lengths, _ = data.batch(0, "cpu")
    assert (lengths == 5).all()
    ends = [text[-6:-1].tolist() for text in data.texts]
    assert all(ids in ends for ids in idx.tolist())


# ---- runs


def test_pairs_stay_together():
    data = dataset("data/pairs/train.bin", loss="pairs")
    for number in range(data.n_batches):
        idx, _, labels = data.batch(number, "cpu")
        questions = [TOKENIZER.decode(ids.tolist()).split("[Bot]:")[0] for ids in idx]
        assert questions[::2] == questions[1::2]
        assert labels[::2].all() and not labels[1::2].any()


@pytest.mark.parametrize(("name", "loss"), [("retry", "labels"), ("pairs", "pairs")])
def test_it_learns_which_replies_are_kept(name, loss):
    out = fit(dataset=name, loss=loss, max_iters=40, eval_interval=40)
    last = evaluations(out)[-1]
    assert last["auc"] > 0.95 and last["accuracy"] > 0.9 and 0.5 <= last["length_auc"] < 0.65
    assert last["val_loss"] < 0.3

    # transformers loads what it wrote, and gives the same scores
    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    ours, _ = load_model(str(out), model_class=RewardModel)
    assert ours.config.block_size == theirs.config.n_positions == 48
    idx, lengths, _ = dataset("data/retry/val.bin").batch(0, "cpu")
    mask = (torch.arange(idx.size(1)) < lengths[:, None]).long()
    with torch.no_grad():
        expected = theirs(idx.masked_fill(mask == 0, END_OF_TEXT), attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(ours.eval()(idx, lengths), expected, atol=1e-4, rtol=0)


def test_the_baseline_is_the_length_of_the_reply():
    for split, n in (("train", 40), ("val", 20)):  # kept replies are shorter, a fifth is as long
        labelled = []
        for i in range(n):
            kept = i % 2 == 0
            words = "tea " * (2 if kept or i % 10 == 9 else 3)
            labelled.append(([("user", "hi " * (i % 3 + 1)), ("assistant", words)], kept))
        write_replies("data/short", split, labelled)
    out = fit(dataset="short", max_iters=1)
    assert evaluations(out)[-1]["length_auc"] == pytest.approx(0.8 + 0.2 / 2)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(monkeypatch):
    whole = fit(out_dir="whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_reward, "StopSignal", lambda: StopsAfter(3))
        halves = fit(out_dir="halves")
    assert torch.load(halves / "last" / "state.pt", weights_only=True)["iter"] == 3
    fit(out_dir="halves", init_from="resume")
    assert_same_weights(whole, halves)
    assert_same_weights(whole / "last", halves / "last")
    assert evaluations(whole) == evaluations(halves)


def test_two_processes_are_one_process_with_the_same_global_batch():
    whole = fit(dropout=0.0)
    knobs = TINY | {"dropout": 0.0, "out_dir": "two"}
    arguments = [f"--{name}={value}" for name, value in knobs.items()]
    done = [rank.wait() for rank in two_ranks(["train_reward.py", *arguments], Path.cwd())]
    assert [each.returncode for each in done] == [0, 0], done
    one = load_file(whole / "last" / "model.safetensors")
    two = load_file("two/last/model.safetensors")
    for name in one:
        if not name.endswith("c_attn.bias"):  # the gradient of the keys' biases is rounding
            torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=0)
    aucs = [[record["auc"] for record in evaluations(out)] for out in (whole, "two")]
    assert aucs[0] == pytest.approx(aucs[1], abs=0.02)


def test_a_reward_model_can_be_trained_further():
    first = fit()
    again = fit(init_from=str(first), out_dir="again", max_iters=1, warmup_iters=0)
    best = min(record["val_loss"] for record in evaluations(first))
    assert evaluations(again)[0]["val_loss"] == pytest.approx(best, abs=1e-6)


def test_another_template_with_more_tokens_grows_the_vocabulary():
    config = train_reward.Config(**TINY | {"template": "user_assistant"})
    distributed = train_reward.init_distributed(config)
    model, tokenizer = train_reward.make_model(config, None, distributed)
    assert tokenizer.n_vocab == len(model.transformer.wte.weight) > TOKENIZER.n_vocab


# ---- refusals


def test_a_shard_with_unknown_tokens_is_refused(tmp_path):
    with ShardWriter(tmp_path / "train.bin", TOKENIZER.n_vocab, "human_bot") as writer:
        writer.write([([11, 60000], [0, 0]), ([11, 12], [0, 1])])
    with pytest.raises(ValueError, match="60000"):
        dataset(tmp_path / "train.bin").batch(0, "cpu")


@pytest.mark.parametrize(
    ("knobs", "names"),
    [
        ({"lr_schedule": "step"}, ["lr_schedule=step"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"loss": "both"}, ["loss=both", "labels", "pairs"]),
        ({"batch_size": 7, "loss": "pairs"}, ["batch_size=7"]),
        ({"loss": "pairs"}, ["data/retry/train.bin", "loss=labels"]),
        ({"block_size": 65}, ["block_size=65", "64"]),
        ({"dataset": "nowhere"}, ["data/nowhere/train*.bin"]),
        ({"dataset": "text"}, ["data/text/train.bin", "prepare/retry.py"]),
        ({"dataset": "kept"}, ["data/kept/train.bin"]),
        ({"init_from": "resume"}, ["out/last/state.pt"]),
        ({"init_from": "nowhere"}, ["nowhere"]),
        ({"template": "user_assistant"}, ["--template=user_assistant"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_refused_by_name(knobs, names):
    if knobs.get("dataset") == "text":
        Path("data/text").mkdir()
        np.arange(1000, dtype=np.uint16).tofile("data/text/train.bin")
        np.arange(1000, dtype=np.uint16).tofile("data/text/val.bin")
    if knobs.get("dataset") == "kept":
        for split in ("train", "val"):
            write_replies("data/kept", split, [(turns, True) for turns, _ in replies(20)])
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        fit(**knobs)
    for name in names:
        assert name in str(refused.value)


def test_a_run_is_not_overwritten_and_resumes_with_its_own_knobs_only():
    fit(max_iters=1)
    for knobs, names in (
        ({}, "out/last"),
        ({"init_from": "resume", "block_size": 32, "max_iters": 1}, "block_size=32.*48"),
        ({"init_from": "resume", "dataset": "pairs"}, "dataset=pairs.*retry"),
        ({"init_from": "resume", "template": "user_assistant"}, "template=user_.*human_bot"),
        ({"init_from": "resume", "max_iters": 0}, "iter 1.*max_iters=0"),
    ):
        with pytest.raises(ValueError, match=names):
            fit(**knobs)


def test_a_diverging_run_ends_and_its_checkpoint_stays():
    with pytest.raises(ValueError, match="diverges"):
        fit(learning_rate=1e30, warmup_iters=0, grad_clip=0.0)
    load_model("out/last", model_class=RewardModel)


def test_the_config_for_the_model_in_the_box_runs():
    knobs = ["--max_epochs=0", "--max_iters=1", "--batch_size=4", "--eval_iters=5", "--device=cpu"]
    config = ROOT / "config" / "train_reward_nano.py"
    train_reward.main(parse(train_reward.Config, [str(config), *knobs]))
    assert load_model("out/reward", model_class=RewardModel)[0].config.block_size == 256
