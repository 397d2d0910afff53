"""Training: compared with a plain transformers loop, interrupted and resumed, killed, on two
processes, and with wrong knobs."""

import functools
import io
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    assert_refused,
    assert_same_weights,
    largest_file,
    records,
    small_talk,
    write_shards,
)
from forked import Forked, two_ranks
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

import chat
import model
import train
from nanochatgpt import configurator, fast
from nanochatgpt.huggingface import read_tokenizer
from nanochatgpt.loader import Loader
from nanochatgpt.shards import find_shards
from nanochatgpt.tokenizer import Tokenizer
from prepare.render import render_batch

# a step takes hundredths of a second; what is not said here is as in train.py
TINY = {"init_from": "scratch", "out_dir": "out", "data_dir": "data", "dataset": "talk"}
TINY |= {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "dropout": 0.0}
TINY |= {"batch_size": 2, "gradient_accumulation_steps": 2, "max_iters": 12, "warmup_iters": 3}
TINY |= {"learning_rate": 0.01, "eval_interval": 5, "eval_iters": 2, "log_interval": 1}
TINY |= {"device": "cpu", "dtype": "float32"}
LONG = {"max_iters": 20, "eval_interval": 3, "dropout": 0.1}  # saves all the time


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path, data_dir):
    """In a folder with data/talk; on one thread, here and in other processes, so that sums have the
    same order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Train from scratch to the end: uninterrupted(dropout=0.1) -> out_dir. The same knobs are
    trained once."""

    @functools.cache
    def run(**knobs):
        out = tmp_path_factory.mktemp("uninterrupted") / "out"
        return fit(out_dir=str(out), **knobs)

    return run


def tiny(**knobs):
    return train.Config(**TINY | knobs)


def fit(**knobs):
    """Train in this process; return out_dir."""
    config = tiny(**knobs)
    if config.init_from != "resume":
        shutil.rmtree(config.out_dir, ignore_errors=True)
    train.main(config)
    return Path(config.out_dir)


def arguments(**knobs):
    return [f"--{name}={value}" for name, value in (TINY | knobs).items()]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_close_weights(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = ours[name], theirs[name]
        # the gradient of the keys' biases is 0 but for rounding: Adam makes noise of it
        if name.endswith("c_attn.bias"):
            a, b = (torch.cat([bias[:16], bias[32:]]) for bias in (a, b))
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def without_speeds(records):
    for record in records:
        record.pop("tokens_per_s", None)
        record.pop("mfu", None)
    return records


def run_script(monkeypatch, capfd, **knobs):
    """Run train.py as a person does, but within this process -> as the fixture `script`."""
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments(**knobs)])
        status = 0
        try:
            configurator.run(train.main, train.Config)
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(sys.argv, status, *capfd.readouterr())


def assert_same_run(out, whole):
    assert_same_weights(out, whole)
    assert_same_weights(out / "last", whole / "last")
    assert without_speeds(records(out)) == without_speeds(records(whole))


def load_state(out):
    return torch.load(Path(out) / "last" / "state.pt", weights_only=True)


def losses(out, name="loss"):
    return [record[name] for record in records(out) if name in record]


def at_step(monkeypatch, step, act):
    """Call act(), once, in the middle of a step of the training to come."""
    acts, original = [act], train.learning_rate

    def learning_rate(config, it):
        if it == step and acts:
            acts.pop()()
        return original(config, it)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def power_cut():
    raise InterruptedError("power cut")


def quiet_talk():
    """Conversations among which many have no reply, so that whole micro-batches have nothing
    supervised."""
    return [
        messages[:1] if i % 10 else messages for i, messages in enumerate(small_talk(200, seed=3))
    ]


def supervised_counts(config):
    """Return the number of supervised tokens of each micro-batch, (steps, micro-batches of a
    step)."""
    shards = find_shards(config.data_dir, config.dataset, "train")
    loader = Loader(shards, config.batch_size, 32, config.seed, Tokenizer())
    steps = config.gradient_accumulation_steps
    counts = [(loader.batch(i)[1] != -100).sum().item() for i in range(config.max_iters * steps)]
    return torch.tensor(counts).view(-1, steps)


def one_by_one(model, x, y, documents):
    """Return the summed loss of a transformers model over the conversations of a batch, each
    computed by itself."""
    borders = [(i, j) for i, j in itertools.pairwise(documents.tolist()) if i < j]
    logits = torch.cat([model(x.view(1, -1)[:, i:j]).logits[0] for i, j in borders])
    return F.cross_entropy(logits, y.flatten(), reduction="sum")


# --- the arithmetic of a step ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("talk", "batch_size"), [(None, 2), (quiet_talk, 1)], ids=["talk", "little supervised"]
)
def test_the_steps_give_the_losses_and_weights_of_a_plain_transformers_loop(
    hf_gpt2, talk, batch_size
):
    if talk:
        write_shards("data/talk", talk(), small_talk(10))
    hf_gpt2(n_positions=32, n_embd=16).save_pretrained("start")
    knobs = {"max_iters": 10, "learning_rate": 0.005, "min_lr": 0.001, "weight_decay": 0.5}
    config = tiny(init_from="start", batch_size=batch_size, seed=1, **knobs)
    counts = supervised_counts(config)
    assert (counts[:, 0] != counts[:, 1]).any()
    if talk:
        assert (counts.sum(1) == 0).any()  # a whole step without supervised tokens
        assert ((counts == 0).any(1) & (counts.sum(1) > 0)).any()  # and one micro-batch
    train.main(config)

    model = GPT2LMHeadModel.from_pretrained("start").eval()  # eval: its config has dropout
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    loader = Loader([(Path("data/talk/train.bin"), 1)], batch_size, 32, config.seed, Tokenizer())
    expected = []
    for it in range(10):
        batches = [loader.batch(2 * it), loader.batch(2 * it + 1)]
        supervised = sum((y != -100).sum() for _, y, _ in batches)
        total = sum(one_by_one(model, *batch) for batch in batches)
        loss = total / max(supervised, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.001 + 0.004 * (1 + math.cos(math.pi * (it - 3) / 7)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * (it + 1) / 4 if it < 3 else cosine
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())

    assert losses(Path("out")) == pytest.approx(expected, abs=1e-4)
    theirs = {
        name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    assert_close_weights(weights("out/last"), theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("linear", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0 - 0.8 / 3, 0.6, 0.2 + 0.8 / 3, 0.2]),
        ("constant", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_rises_over_the_warmup_and_falls_as_scheduled(schedule, expected):
    config = tiny(lr_schedule=schedule, learning_rate=1.0, min_lr=0.2, warmup_iters=4, max_iters=16)
    steps = [0, 1, 2, 3, 4, 8, 10, 12, 16]  # a third, half and two thirds down at 8, 10 and 12
    assert [train.learning_rate(config, it) for it in steps] == pytest.approx(expected)


def test_max_epochs_are_as_many_steps_as_the_data_has_rows():
    write_shards("data/talk", small_talk(8), small_talk(4))
    n_rows = Loader(find_shards("data", "talk", "train"), 2, 32, 1337, Tokenizer()).n_rows
    assert records(fit(max_epochs=1.5))[-1]["iter"] == round(1.5 * n_rows / 4) > n_rows / 4


def test_without_the_fast_drop_ins_a_run_is_the_same(uninterrupted, monkeypatch):
    whole = uninterrupted()  # before the patch
    monkeypatch.setattr(fast, "speed_up", lambda model: model)
    plain = fit()
    assert losses(plain) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(plain) != losses(whole)  # rounding
    assert_close_weights(weights(plain / "last"), weights(whole / "last"), atol=1e-4)


def test_without_a_warmup_the_first_step_has_the_full_learning_rate():
    assert train.learning_rate(tiny(warmup_iters=0, learning_rate=0.5), 0) == 0.5


def test_the_loss_falls():
    out = fit(dropout=0.1, n_embd=32)
    assert losses(out)[0] == pytest.approx(math.log(50257), abs=0.2)
    assert losses(out)[-1] < 8 and losses(out, "val_loss")[-1] < 8


def test_evaluation_does_not_touch_training(uninterrupted):
    often, seldom = fit(dropout=0.1, eval_interval=2, eval_iters=2), uninterrupted(dropout=0.1)
    assert_same_weights(often / "last", seldom / "last")


def test_both_dropouts_reach_the_training_and_the_checkpoint(uninterrupted):
    first = losses(uninterrupted())[0]
    for knobs in ({"dropout": 0.1}, {"attention_dropout": 0.2}):
        assert losses(fit(**knobs, max_iters=1, out_dir="other"))[0] != first
        config = GPT2LMHeadModel.from_pretrained("other").config
        shares = [knobs.get("dropout", 0)] * 2 + [knobs.get("attention_dropout", 0)]
        assert [config.embd_pdrop, config.resid_pdrop, config.attn_pdrop] == shares


def test_gradient_checkpointing_changes_no_bit(uninterrupted, monkeypatch):
    whole, checkpoint, blocks = uninterrupted(dropout=0.1), model.checkpoint, []
    monkeypatch.setattr(
        model, "checkpoint", lambda *args, **kw: blocks.append(args[0]) or checkpoint(*args, **kw)
    )
    assert_same_run(fit(dropout=0.1, gradient_checkpointing=True), whole)
    assert len(blocks) == 12 * 2 * 2  # steps, micro-batches, layers; none in evaluations


def test_the_seed_decides_the_run(uninterrupted):
    assert losses(fit(dropout=0.1, max_iters=1, seed=2)) != losses(uninterrupted(dropout=0.1))[:1]


# --- interrupted ----------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(uninterrupted, monkeypatch):
    # the runs below that are killed or stopped are in float32
    knobs = {"dtype": "bfloat16", "dropout": 0.1, "max_iters": 9, "eval_iters": 1}
    whole = uninterrupted(**knobs)
    with monkeypatch.context() as patch:  # saved where it was told to stop
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        fit(**knobs)
    assert records(Path("out"))[-1]["iter"] == 4
    with monkeypatch.context() as patch:  # back to the last save, three steps ago
        at_step(patch, 8, power_cut)
        with pytest.raises(InterruptedError, match="power cut"):
            fit(**knobs, init_from="resume")
    assert records(Path("out"))[-1]["iter"] == 8
    assert_same_run(fit(**knobs, init_from="resume"), whole)


def test_a_finished_run_can_be_prolonged():
    knobs = {"lr_schedule": "constant", "dropout": 0.1, "eval_interval": 3}
    fit(**knobs, max_iters=3)
    longer = fit(**knobs, max_iters=6, init_from="resume")
    assert losses(longer) == losses(fit(**knobs, max_iters=6, out_dir="at once"))


def test_a_run_is_not_overwritten_by_another():
    out = fit(max_iters=2)
    before = records(out)
    with pytest.raises(ValueError, match=r"out/last.*--init_from=resume"):
        train.main(tiny())
    assert records(out) == before


def test_a_float16_run_scales_its_loss_and_resumes_bit_for_bit(monkeypatch):
    def precision(name, device):
        # the scale is so large at first that gradients overflow and steps are skipped
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return torch.float16, torch.autocast("cpu", torch.float16), scaler

    monkeypatch.setattr(train, "precision", precision)
    knobs = {"max_iters": 40, "eval_interval": 20, "dropout": 0.1}
    whole = fit(**knobs, out_dir="whole")
    assert losses(whole, "val_loss")[-1] < losses(whole, "val_loss")[0] - 0.5
    assert load_state(whole)["scaler"]["scale"] < 2.0**40
    with monkeypatch.context() as patch:
        at_step(patch, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
        fit(**knobs)
    assert_same_run(fit(**knobs, init_from="resume"), whole)


def test_sigterm_and_ctrl_c_save_and_exit_0(uninterrupted):
    init_from = "scratch"
    for number, line in ((signal.SIGTERM, "iter 4/20"), (signal.SIGINT, "iter 8/20")):
        process = Forked(["train.py", *arguments(**LONG | {"init_from": init_from})], Path.cwd())
        process.until(line)
        process.send_signal(number)
        done = process.wait()
        assert (done.returncode, done.stderr) == (0, "")
        last_line = done.stdout.splitlines()[-1]
        assert "stopped at iter" in last_line and "--init_from=resume" in last_line
        init_from = "resume"
    assert_same_run(fit(**LONG, init_from="resume"), uninterrupted(**LONG))


def renewed(path, since):
    """Whether the file was written after `since`, in nanoseconds; it may vanish while we look."""
    try:
        return path.stat().st_mtime_ns > since
    except FileNotFoundError:
        return False


def test_kill_9_at_any_instant_leaves_a_checkpoint_that_loads_and_resumes(uninterrupted):
    out = Path("out")
    whole = uninterrupted(**LONG)
    log, state, best = out / "metrics.jsonl", out / "last/state.pt", out / "model.safetensors"
    last = out / "last/model.safetensors"
    # wait until the first file is renewed, then the second: while one is written
    instants = []
    for path in (state, out / "last/tokenizer.json", last, best):
        instants.append((state, path.with_name(path.name + ".part")))
    # and when one is replaced
    instants += [(log, state), (log, last), (state, best)]
    for number, paths in enumerate(instants):
        init_from = "resume" if number else "scratch"
        started = time.time_ns()
        process = Forked(["train.py", *arguments(**LONG | {"init_from": init_from})], Path.cwd())
        for path in paths:
            while process.running and not renewed(path, started):
                time.sleep(0.0005)
        process.kill()
        assert process.wait().returncode == -signal.SIGKILL, "it ended before it was killed"
        for folder in ("", "last"):
            GPT2LMHeadModel.from_pretrained(out / folder)
            for path in (whole / folder).glob("*.json"):
                assert path.read_bytes() == (out / folder / path.name).read_bytes()
    assert_same_run(fit(**LONG, init_from="resume"), whole)
    assert list(out.rglob("*.part")) == []


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_of_a_run_changes_no_bit_of_its_end(uninterrupted):
    knobs = LONG | {"max_iters": 60, "eval_interval": 2, "dtype": "bfloat16"}
    choose = random.Random(0)
    killed_at = []
    for number in range(10):
        init_from = "resume" if number else "scratch"
        process = Forked(["train.py", *arguments(**knobs | {"init_from": init_from})], Path.cwd())
        for _ in range(2):  # where it begins, and two steps on
            since = time.time_ns()
            while process.running and not renewed(Path("out/last/state.pt"), since):
                time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.4))
        process.kill()
        assert process.wait().returncode == -signal.SIGKILL, "it ended before it was killed"
        killed_at.append(load_state("out")["iter"])
    assert killed_at == sorted(set(killed_at))  # it had come further in between
    assert_same_run(fit(**knobs, init_from="resume"), uninterrupted(**knobs))


def test_the_trainers_state_loads_as_tensors_and_plain_values_only(uninterrupted):
    state = torch.load(uninterrupted(dropout=0.1) / "last" / "state.pt", weights_only=True)
    assert state["iter"] == 12
    # the format since version 0.1: runs of older checkouts resume
    keys = "script knobs iter best_val_loss template config model optimizer scaler"
    assert state.keys() == {*keys.split(), "data"}  # states without data resume, too
    assert state["optimizer"].keys() == state["model"].keys() - {"lm_head.weight"}


@pytest.fixture
def half_a_run():
    """out/ after a power cut: saved at iter 6."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 8, power_cut)
        with pytest.raises(InterruptedError):
            fit(**LONG)
    assert load_state("out")["iter"] == 6


def test_a_full_disk_ends_the_run_in_a_sentence_and_it_goes_on_from_the_last_save(
    half_a_run, uninterrupted, monkeypatch, capfd
):
    for n_bytes, file in ((3_000_000, "model.safetensors"), (5_000_000, "last/state.pt")):
        with largest_file(n_bytes):
            done = run_script(monkeypatch, capfd, **LONG | {"init_from": "resume"})
        assert_refused(done, file, "full", "--init_from=resume")
        assert load_state("out")["iter"] == 6
        for folder in ("out", "out/last"):
            GPT2LMHeadModel.from_pretrained(folder)
            AutoTokenizer.from_pretrained(folder)
        assert list(Path("out").rglob("*.part")) == []
    assert_same_run(fit(**LONG, init_from="resume"), uninterrupted(**LONG))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"n_layer": 3}, ["n_layer=3", " 2"]),
        ({"n_layer": 12}, ["n_layer=12", " 2"]),  # the default
        ({"n_head": 4}, ["n_head=4", " 2"]),
        ({"n_embd": 32}, ["n_embd=32", " 16"]),
        ({"block_size": 64}, ["block_size=64", " 32"]),
        ({"template": "user_assistant"}, ["template=user_assistant", "human_bot"]),
    ],
    ids=str,
)
def test_a_run_is_not_resumed_in_another_shape_or_template(
    knobs, words, uninterrupted, monkeypatch, capfd
):
    shutil.copytree(uninterrupted(), "out")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    done = run_script(monkeypatch, capfd, **{"init_from": "resume"} | knobs)
    assert_refused(done, *words)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_resumes_without_the_knobs_of_its_shape_and_template(uninterrupted):
    shutil.copytree(uninterrupted(), "out")
    defaults = {name: getattr(train.Config, name) for name in ("n_layer", "n_head", "n_embd")}
    for knobs in (defaults, {"template": "human_bot"}):
        assert_same_run(fit(init_from="resume", **knobs), uninterrupted())


def other_data(way):
    """Put other data in the place of data/talk, or beside it; return the knobs for it."""
    knobs = {"dataset": "other"} if way == "dataset" else {}
    if way == "data_dir":
        knobs["data_dir"] = "elsewhere"
    folder = Path(knobs.get("data_dir", "data"), knobs.get("dataset", "talk"))
    write_shards(folder, small_talk(50, seed=7), [small_talk(1, seed=8)[0]] * 9)
    return knobs


@pytest.mark.parametrize("way", ["dataset", "data_dir", "prepared again"])
def test_with_other_data_a_resumed_run_says_so_and_judges_the_best_weights_anew(
    way, uninterrupted, capsys
):
    shutil.copytree(uninterrupted(), "out")
    state = load_state("out")
    torch.save(state | {"best_val_loss": 0.5}, "out/last/state.pt")  # as of easier data
    capsys.readouterr()
    knobs = other_data(way) | {"init_from": "resume", "eval_interval": 3, "max_iters": 15}
    fit(**knobs)
    said = [line for line in capsys.readouterr().out.splitlines() if "best weights anew" in line]
    assert len(said) == 1 and "talk" in said[0]
    if way == "dataset":
        assert "other" in said[0]
    of_other_data = [r["val_loss"] for r in records("out") if r["iter"] >= 12 and "val_loss" in r]
    assert load_state("out")["best_val_loss"] == min(of_other_data) > 0.5
    assert_same_weights("out", "out/last")  # the last were the best of the other data

    # from here on, it is the data of the run
    fit(**knobs | {"max_iters": 18})
    assert "anew" not in capsys.readouterr().out


def test_on_other_data_the_weights_so_far_are_judged_before_they_change(uninterrupted):
    shutil.copytree(uninterrupted(), "out")
    shutil.copytree("out/last", "before")
    knobs = other_data("dataset") | {"init_from": "resume", "eval_interval": 100}
    ruin = {"learning_rate": 30.0, "lr_schedule": "constant", "warmup_iters": 0}
    with pytest.raises(ValueError, match="diverges"):
        fit(**knobs, **ruin, max_iters=13)
    assert_same_weights("out", "before")


def test_the_same_data_in_another_place_changes_nothing(uninterrupted, capsys):
    shutil.copytree(uninterrupted(), "out")
    shutil.move("data", "moved")
    assert_same_run(fit(init_from="resume", data_dir="moved"), uninterrupted())
    assert "anew" not in capsys.readouterr().out


def test_a_state_from_before_it_held_the_data_resumes(half_a_run, uninterrupted, capsys):
    state = load_state("out")
    del state["data"]
    torch.save(state, "out/last/state.pt")
    assert_same_run(fit(**LONG, init_from="resume"), uninterrupted(**LONG))
    assert "anew" not in capsys.readouterr().out


# --- two processes --------------------------------------------------------------------------------


def torchrun(*options, **knobs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [*options, ROOT / "train.py", *arguments(**knobs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# train.py, printing what it shards
TRAIN = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from nanochatgpt import distributed
fully_shard = distributed.fully_shard
distributed.fully_shard = lambda module: print("sharded") or fully_shard(module)
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def fit_on_two(stop_after="", **knobs):
    """Train on two processes, as torchrun starts them, until rank 0 prints `stop_after` or to the
    end; return what rank 0 prints."""
    ranks = two_ranks(["-c", TRAIN, *arguments(**knobs)], Path.cwd())
    try:
        if stop_after:
            ranks[0].until(stop_after)
            ranks[1].send_signal(signal.SIGTERM)
        done = [process.wait() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in done] == [0, 0], done
    # one process speaks, and the Gloo of torch 2.9
    lines = done[1].stdout.splitlines()
    assert [line for line in lines if line != "sharded" and not line.startswith("[Gloo]")] == []
    n_sharded = 3 if knobs.get("strategy") == "fsdp" else 0  # two blocks and the rest
    assert [process.stdout.count("sharded") for process in done] == [n_sharded] * 2
    return done[0].stdout


def children(pid):
    """Return {RANK: process id} of torchrun's children."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            variables = dict(
                v.split("=", 1)
                for v in Path(f"/proc/{child}/environ").read_text().split("\0")
                if "=" in v
            )
            if "RANK" in variables:
                found[int(variables["RANK"])] = int(child)
    return found


def assert_close_runs(out, alone):
    """Equal but for the order in which gradients are added up."""
    for name in ("loss", "train_loss", "val_loss"):
        assert losses(out, name) == pytest.approx(losses(alone, name), abs=1e-5)
    assert_close_weights(weights(out / "last"), weights(alone / "last"), atol=1e-6)


def test_two_processes_train_as_one_with_the_same_global_batch_and_stop_together():
    write_shards("data/talk", quiet_talk(), small_talk(10))
    knobs = {"batch_size": 1, "gradient_accumulation_steps": 4, "eval_iters": 3, "seed": 2}
    knobs |= {"max_iters": 16, "eval_interval": 3}
    # rank 0 has micro-batches 0 and 2, rank 1 has 1 and 3
    ranks = supervised_counts(tiny(**knobs | {"max_iters": 8})).view(-1, 2, 2).sum(1)
    assert (ranks[:, 0] != ranks[:, 1]).all() and (ranks == 0).any()
    output = fit_on_two(stop_after="iter 8/16", out_dir="two", **knobs)
    assert output.count("iter 1/16: ") == 1 and "stopped at iter" in output.splitlines()[-1]
    # one process goes on
    out = fit(**knobs, out_dir="two", init_from="resume")
    assert_close_runs(out, fit(**knobs))


# what goes wrong if a shard of the weights is taken for all of them: decay, and clipping in each
# step
HARD = {"learning_rate": 0.003, "weight_decay": 0.5, "grad_clip": 0.05, "eval_interval": 4}
HARD |= {"lr_schedule": "constant"}  # does not depend on max_iters


def assert_close_states(out, other, atol):
    ours, theirs = load_state(out), load_state(other)
    assert ours.keys() == theirs.keys()
    for name in ("iter", "template", "config", "scaler"):
        assert ours[name] == theirs[name]
    assert_close_weights(ours["model"], theirs["model"], atol)
    moments = [state["optimizer"] for state in (ours, theirs)]
    assert moments[0].keys() == moments[1].keys() == weights(out / "last").keys()
    for part in ("exp_avg", "exp_avg_sq"):
        a, b = ({name: m[part] for name, m in each.items()} for each in moments)
        largest = max(tensor.abs().max().item() for tensor in b.values())
        assert_close_weights(a, b, atol=1e-3 * largest)
    for m in [*moments[0].values(), *moments[1].values()]:
        assert m.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert m["step"] == ours["iter"]


def assert_same_layout(out, other):
    """The same files, with tensors of the same names, shapes and dtypes."""
    layouts = []
    for folder in (out, other):
        tensors = [(name, t.shape, t.dtype) for name, t in sorted(weights(folder).items())]
        layouts.append(({path.name for path in folder.iterdir()}, tensors))
    assert layouts[0] == layouts[1]


def test_a_run_goes_on_sharded_over_two_processes_and_then_on_one(uninterrupted):
    shutil.copytree(uninterrupted(**HARD, max_iters=3), "out")
    fit_on_two(**HARD | {"init_from": "resume", "strategy": "fsdp", "max_iters": 6})
    # a checkpoint does not show whether the weights were sharded
    sharded, alone = Path("out"), uninterrupted(**HARD, max_iters=6)
    assert min(losses(alone, "grad_norm")) > HARD["grad_clip"]
    assert losses(sharded, "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-4)
    assert_close_runs(sharded, alone)
    assert_close_states(sharded, alone, atol=1e-6)
    for folder in ("", "last"):
        assert_close_weights(weights(sharded / folder), weights(alone / folder), atol=1e-6)
        assert_same_layout(sharded / folder, alone / folder)
    GPT2LMHeadModel.from_pretrained(sharded)
    # and back
    fit(**HARD, init_from="resume", max_iters=8)
    assert [record["iter"] for record in records("out") if "loss" in record] == list(range(1, 9))
    whole = uninterrupted(**HARD, max_iters=8)
    assert_close_weights(weights("out/last"), weights(whole / "last"), atol=1e-5)


@pytest.mark.slow
def test_a_job_whose_process_is_killed_ends_soon_and_does_not_hang():
    with torchrun(**LONG | {"max_iters": 1000}) as job:
        next(line for line in job.stdout if line.startswith("iter 4/"))
        os.kill(children(job.pid)[1], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = job.communicate(timeout=60)
    assert job.returncode not in (0, None), errors
    assert time.monotonic() - killed < 45
    GPT2LMHeadModel.from_pretrained("out/last")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_job_again_whose_process_was_killed_and_it_goes_on_from_its_last_save(
    rank,
):
    knobs = LONG | {"max_iters": 30}
    with torchrun("--max_restarts=1", **knobs) as job:
        next(line for line in job.stdout if line.startswith("iter 7/"))
        os.kill(children(job.pid)[rank], signal.SIGKILL)
        shown, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert "iter 30/30" in shown and "iter 1/30" not in shown  # it did not begin from the start
    fit_on_two(**knobs, out_dir="whole")
    assert_same_run(Path("out"), Path("whole"))


# --- what it writes -------------------------------------------------------------------------------


def test_metrics_are_one_json_object_a_line_with_the_keys_that_others_rely_on(uninterrupted):
    lines = records(uninterrupted(dropout=0.1))
    steps = [record for record in lines if "loss" in record]
    evaluations = [record for record in lines if "val_loss" in record]
    assert len(steps) + len(evaluations) == len(lines)
    assert [record["iter"] for record in steps] == list(range(1, 13))
    assert [record["iter"] for record in evaluations] == [0, 5, 10, 12]
    for record in steps:
        assert record.keys() >= {"iter", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    for record in evaluations:
        assert record.keys() >= {"iter", "train_loss", "val_loss"}
    assert [r["lr"] for r in steps] == [train.learning_rate(tiny(), it) for it in range(12)]
    assert all(record["tokens_per_s"] > 0 and record["mfu"] is None for record in steps)
    assert all(0 < record["grad_norm"] < math.inf for record in steps)


def test_the_gradients_norm_is_logged_as_it_was_before_it_was_clipped(uninterrupted):
    clipped, free = (uninterrupted(grad_clip=clip, max_iters=2) for clip in (0.01, 0.0))
    assert losses(clipped, "grad_norm")[0] == losses(free, "grad_norm")[0] > 0.01


def test_the_screen_shows_each_logged_step_each_evaluation_and_a_sampled_reply(capsys):
    fit(max_iters=4, log_interval=2)
    shown = capsys.readouterr().out
    assert shown.count("[Human]: Hello! How are you today? [Bot]:") == shown.count("val loss") == 2
    lines = [line for line in shown.splitlines() if line.startswith("iter") and "/4: loss" in line]
    assert [line.split(":")[0] for line in lines] == ["iter 2/4", "iter 4/4"]
    assert all(
        f"lr {lr:.2e}" in line for line, lr in zip(lines, losses(Path("out"), "lr"), strict=True)
    )
    assert all("tokens/s" in line and "left" in line for line in lines)


@pytest.fixture
def overfitting():
    """Knobs of a run whose validation loss falls, then rises."""
    other_words = [{"role": "user", "content": "hi"}]
    other_words.append({"role": "assistant", "content": "purple zebra!"})
    write_shards("data/other", small_talk(60, seed=1), [other_words] * 30)
    return {"dataset": "other", "eval_interval": 4, "learning_rate": 0.03, "n_embd": 32}


def test_out_dir_holds_the_weights_of_the_lowest_validation_loss(overfitting, uninterrupted):
    out = uninterrupted(**overfitting)
    val_losses = losses(out, "val_loss")
    assert val_losses[0] > min(val_losses) < val_losses[-1]
    loader = Loader([(Path("data/other/val.bin"), 1)], 2, 32, 1337, Tokenizer())
    batches = [loader.batch(i) for i in range(2)]
    supervised = sum((y != -100).sum().item() for _, y, _ in batches)
    for folder, expected in ((out, min(val_losses)), (out / "last", val_losses[-1])):
        with torch.no_grad():
            model = GPT2LMHeadModel.from_pretrained(folder).eval()
            loss = sum(one_by_one(model, *batch).item() for batch in batches) / supervised
        assert loss == pytest.approx(expected, abs=1e-4)


def test_a_resumed_run_does_not_forget_which_weights_were_best(
    overfitting, uninterrupted, monkeypatch
):
    with monkeypatch.context() as patch:
        at_step(patch, 11, power_cut)
        with pytest.raises(InterruptedError):
            fit(**overfitting)
    assert_same_run(fit(**overfitting, init_from="resume"), uninterrupted(**overfitting))


def test_what_was_trained_loads_in_transformers_and_talks(uninterrupted, monkeypatch, capsys):
    out = uninterrupted(dropout=0.1)
    messages = [{"role": "user", "content": "hello"}]
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt == Tokenizer().render(messages, add_generation_prompt=True)[0]
    hf = GPT2LMHeadModel.from_pretrained(out)
    reply = hf.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    capsys.readouterr()
    greedy = {"temperature": 0, "frequency_penalty": 0, "max_new_tokens": 8}
    chat.main(chat.Config(init_from=str(out), device="cpu", **greedy))
    expected = Tokenizer().decode([token for token in reply.tolist() if token != 50256]).split()
    assert capsys.readouterr().out.split() == ["Bot:", *expected]


def test_a_stopped_run_can_be_fine_tuned_further_from_its_directory(uninterrupted):
    out = uninterrupted(dropout=0.1)
    again = fit(init_from=str(out / "last"), max_iters=0)
    assert_same_weights(again, out / "last")


def test_weights_and_biases_gets_the_run_when_switched_on(monkeypatch):
    import wandb

    monkeypatch.setenv("HOME", os.getcwd())  # it keeps settings there
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_NAME", "my first run")
    fit(max_iters=2, wandb_log=True)
    wandb.finish()
    wandb.teardown()  # ends its service, which writes
    (logged,) = Path("wandb").glob("offline-run-*/run-*.wandb")
    first, second, *_ = records("out")
    for word in ("my first run", "learning_rate", *first, *second):
        assert word.encode() in logged.read_bytes()

    # a resumed run goes on in the same one
    fit(max_iters=4, wandb_log=True, init_from="resume")
    wandb.finish()
    wandb.teardown()
    names = [path.name for path in Path("wandb").glob("offline-run-*/run-*.wandb")]
    assert names == [logged.name] * 2


# --- what it takes --------------------------------------------------------------------------------


@pytest.mark.parametrize("init_from", ["scratch", "start"])
def test_another_template_trains_and_its_tokens_are_added(init_from, hf_gpt2):
    hf_gpt2(n_positions=32, n_embd=16).save_pretrained("start")
    write_shards("data/talk", small_talk(60), small_talk(10), template="user_assistant")
    out = fit(init_from=init_from, template="user_assistant", max_iters=4)
    model, tokenizer = GPT2LMHeadModel.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 50262
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|End|>")
    assert torch.load(out / "last" / "state.pt")["template"] == "user_assistant"
    assert losses(out)[-1] < losses(out)[0]


def test_a_nanogpt_bin_without_a_header_trains(capsys):
    ids = Tokenizer().encode("the dog runs home. what now? tea for you. " * 100)
    for split in ("train", "val"):
        np.array(ids, np.uint16).tofile(f"data/talk/{split}.bin")
    out = fit()
    assert f"train: {len(ids):,} tokens" in capsys.readouterr().out
    assert losses(out, "val_loss")[-1] < losses(out, "val_loss")[0] - 2


def test_datasets_separated_by_commas_are_trained_on_together(capsys):
    write_shards("data/more", small_talk(20, seed=5), small_talk(5, seed=6))
    fit(dataset="talk, more", max_iters=1)
    sizes = [
        len(ids)
        for seed, n in ((1, 60), (5, 20))
        for ids, _ in render_batch(Tokenizer(), small_talk(n, seed))
    ]
    assert f"train: {sum(sizes):,} tokens" in capsys.readouterr().out


def test_a_dataset_with_a_share_gives_an_epoch_that_share_of_its_rows(capsys):
    write_shards("data/more", small_talk(40, seed=5), small_talk(5, seed=6))
    out = fit(dataset="talk:1,more:0.5", max_iters=6, n_embd=32)
    n_rows = {
        dataset: Loader(find_shards("data", dataset, "train"), 2, 32, 1, Tokenizer()).n_rows
        for dataset in ("talk", "more")
    }
    said = capsys.readouterr().out
    assert f"in {n_rows['talk'] + round(n_rows['more'] / 2)} rows of 32" in said
    # of each: rows, share of a step, epochs in 6 steps of 2 * 2 rows
    per_epoch = n_rows["talk"] + round(n_rows["more"] / 2)
    for name, taken in (("talk", n_rows["talk"]), ("more", round(n_rows["more"] / 2))):
        share = taken / per_epoch
        epochs = 6 * 4 * share / n_rows[name]
        assert f"{name}: {n_rows[name]:,} rows, {share:.2%} of a step, {epochs:,.3g} epochs" in said
    assert "warning" not in said
    assert losses(out)[-1] < losses(out)[0] - 1


def test_a_corpus_that_drowns_or_comes_too_often_gets_a_warning(capsys):
    write_shards("data/few", small_talk(2, seed=5), small_talk(2, seed=6))
    fit(dataset="talk:0.001,few:200", max_iters=60, n_embd=32, eval_interval=60)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert "talk" in warnings[0]
    assert "few" in warnings[1]


@pytest.mark.parametrize("share", ["0", "-1", "half", "nan", "inf"])
def test_a_share_that_is_no_positive_number_is_refused_by_name(share, monkeypatch, capfd):
    assert_refused(run_script(monkeypatch, capfd, dataset=f"talk:1,more:{share}"), f"more:{share}")


def test_a_context_too_short_for_the_sampled_reply_trains():
    assert len(losses(fit(block_size=8, max_iters=1))) == 1


def test_a_model_that_is_trained_further_keeps_its_template():
    write_shards("data/theirs", small_talk(20), small_talk(5), "user_assistant")
    first = fit(template="user_assistant", dataset="theirs", max_iters=1)
    again = fit(init_from=str(first), dataset="theirs", out_dir="again", max_iters=1)
    assert read_tokenizer(again).template == "user_assistant"
    fit(init_from=str(first), template="human_bot", out_dir="other", max_iters=1)
    assert read_tokenizer(Path("other")).template == "human_bot"


def test_a_shape_that_the_model_has_not_is_refused(monkeypatch, capfd):
    fit(max_iters=0)
    knobs = {"init_from": "out/last", "out_dir": "other", "max_iters": 0}
    done = run_script(monkeypatch, capfd, **knobs, n_layer=3)
    assert_refused(done, "n_layer=3", "out/last")
    assert run_script(monkeypatch, capfd, **knobs).returncode == 0


BROKEN = """#!/bin/sh
if [ "$*" = --version ]; then echo "g++ 12.0"; exit; fi
echo "collect2: error: ld returned 1 exit status" >&2
exit 1
"""


@pytest.mark.parametrize("compiler", [pytest.param("missing", marks=pytest.mark.slow), "broken"])
def test_without_a_compiler_compile_is_refused_and_the_run_stays_as_it_was(compiler, uninterrupted):
    shutil.copytree(uninterrupted(max_iters=3), "out")
    before = {path: path.read_bytes() for path in Path("out/last").iterdir()}
    Path("bin").mkdir()
    if compiler == "broken":
        Path("bin/g++").write_text(BROKEN)
        Path("bin/g++").chmod(0o755)
    env = {"PATH": str(Path("bin").resolve()), "TORCHINDUCTOR_CACHE_DIR": str(Path("cache"))}
    knobs = {"compile": "true", "init_from": "resume"}
    done = Forked(["train.py", *arguments(**knobs)], Path.cwd(), env).wait()
    # a CUDA build of torch warns where there is nvcc but no GPU
    lines = done.stderr.splitlines(keepends=True)
    done.stderr = "".join(line for line in lines if "No CUDA runtime is found" not in line)
    assert_refused(done, "compile=true", "C++ compiler")
    assert {path: path.read_bytes() for path in Path("out/last").iterdir()} == before


@pytest.mark.slow
def test_a_compiled_model_trains_alike(uninterrupted):
    assert losses(fit(compile=True)) == pytest.approx(losses(uninterrupted()), abs=1e-3)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"lr_schedule": "cos"}, "lr_schedule=cos"),
        ({"init_from": "resume"}, "out/last/state.pt"),
        ({"init_from": "nowhere"}, "nowhere"),
        ({"dataset": "nothing"}, "data/nothing"),
        ({"dataset": "talk,nothing"}, "data/nothing"),
        ({"data_dir": "elsewhere"}, "elsewhere/talk"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "double"}, "double"),
        ({"device": "tpu"}, "tpu"),
        ({"n_embd": 33}, "n_embd=33"),
        ({"template": "user_assistant"}, "human_bot"),
        ({"template": "shakespeare"}, "shakespeare"),
        ({"batch_size": 0}, "batch_size"),
        ({"block_size": 0}, "block_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"eval_interval": 0}, "eval_interval"),
        ({"eval_iters": 0}, "eval_iters"),
        ({"log_interval": 0}, "log_interval"),
        ({"n_head": 0}, "n_head"),
        ({"max_iters": -1}, "max_iters"),
        ({"seed": -1}, "seed"),
        ({"grad_clip": math.nan}, "grad_clip=nan"),
        ({"min_lr": -1.0}, "min_lr=-1.0"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1"),
    ],
    ids=str,
)
def test_a_knob_that_cannot_be_is_refused_by_name(knobs, words):
    with pytest.raises((ValueError, OSError)) as refused:
        fit(**knobs)
    assert words in str(refused.value) and str(refused.value).count("\n") <= 1


def test_a_block_beyond_the_models_context_is_refused(hf_gpt2):
    hf_gpt2(n_positions=32, n_embd=16).save_pretrained("start")
    with pytest.raises(ValueError, match=r"block_size=64.* 32"):
        fit(init_from="start", block_size=64)


def test_micro_batches_that_processes_cannot_share_equally_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=3.* 2 "):
        fit(gradient_accumulation_steps=3)


def test_a_loss_that_is_no_number_is_refused_and_the_last_good_weights_stay():
    with pytest.raises(ValueError, match="learning_rate"):
        fit(learning_rate=1e30, warmup_iters=0, grad_clip=0.0, eval_interval=1)
    assert all(torch.isfinite(tensor).all() for tensor in weights("out/last").values())


@pytest.fixture
def go_wrong(monkeypatch):
    """go_wrong(spoil) -> spoil(loss) takes the place of what the model returns as the loss in steps
    from 11 on;
    go_wrong(spoil, training=False) in evaluations after it. The weights are as they were saved at
    step 10 at first."""
    forward, wrong = train.GPT.forward, []

    def spoiled(model, *args, **kwargs):
        logits, loss = forward(model, *args, **kwargs)
        if wrong and loss is not None and model.training == wrong[0][1]:
            loss = wrong[0][0](loss)
        return logits, loss

    def arrange(spoil, training=True):
        monkeypatch.setattr(train.GPT, "forward", spoiled)
        at_step(monkeypatch, 11, lambda: wrong.append((spoil, training)))

    return arrange


def explode(loss):
    """Let the loss be as it is, and its gradient a million times as large."""
    return loss + (loss - loss.detach()) * 1e6


@pytest.mark.parametrize(
    ("spoil", "training", "words"),
    [
        (lambda loss: loss * math.nan, True, "the loss is nan at iter 12"),
        (lambda loss: loss * 10, True, r"the loss is \d+\.\d+ at iter 12, \d+\.\d+ before"),
        (explode, True, r"the gradient norm is .* at iter 12, .* before"),
        (lambda loss: loss * 10, False, r"the validation loss is .* at iter 15, .* before"),
        (lambda loss: loss * math.nan, False, r"the validation loss is nan at iter 15, .* before"),
    ],
    ids=["nan", "spike", "gradient", "evaluation", "nan in evaluation"],
)
def test_a_run_that_diverges_ends_in_a_sentence_and_the_good_weights_stay(
    spoil, training, words, go_wrong, uninterrupted, monkeypatch, capfd
):
    knobs = {"dropout": 0.1}
    good = uninterrupted(**knobs, max_iters=10, lr_schedule="constant")
    go_wrong(spoil, training)
    done = run_script(monkeypatch, capfd, **knobs, max_iters=20, lr_schedule="constant")
    assert_refused(done, "diverges")
    assert re.search(words, done.stderr)
    assert load_state("out")["iter"] == 10
    assert_same_weights("out", good)
    assert_same_weights("out/last", good / "last")


def test_a_learning_rate_that_is_far_too_high_ends_the_run_before_anything_is_saved_over(
    uninterrupted,
):
    with pytest.raises(
        ValueError,
        match=r"the (loss|validation loss|gradient norm) is .* at iter \d+.*learning_rate",
    ):
        fit(learning_rate=1e4, warmup_iters=0)
    for folder in ("out", "out/last"):
        assert_same_weights(folder, uninterrupted(max_iters=0))


def test_a_run_that_diverges_between_two_logged_steps_is_not_saved_when_it_is_told_to_stop(
    go_wrong, monkeypatch
):
    go_wrong(lambda loss: loss * math.nan)
    at_step(monkeypatch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(ValueError, match=r"the (loss|gradient norm) is nan"):
        fit(max_iters=20, log_interval=20, eval_interval=10)
    assert all(torch.isfinite(tensor).all() for tensor in weights("out/last").values())


def test_a_run_that_went_beyond_max_iters_is_not_resumed(uninterrupted):
    out = uninterrupted(dropout=0.1)
    with pytest.raises(ValueError, match="is at iter 12, beyond max_iters=11"):
        fit(init_from="resume", out_dir=str(out), max_iters=11)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_with_nothing_to_learn_is_refused_by_name(split):
    splits = {"train": small_talk(20), "val": small_talk(20)}
    splits[split] = [messages[:1] for messages in splits[split]]
    write_shards("data/talk", **splits)
    with pytest.raises(ValueError, match=f"{split}.bin"):
        fit()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_that_was_cut_short_is_refused_by_name(split):
    path = Path(f"data/talk/{split}.bin")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{split}.bin is cut short"):
        fit()


def damaged(path, kind):
    whole = path.read_bytes()
    names = whole.index(b"best_val_loss")  # in the part that says what the tensors are
    return {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "no end": whole[:-1],
        "text": b"these are no tensors\n",
        "zeros": bytes(len(whole)),
        "zeros within": whole[: names - 8] + bytes(64) + whole[names + 56 :],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "half", "no end", "text", "zeros", "zeros within"])
def test_a_damaged_state_is_refused_by_name(kind, uninterrupted):
    path = Path("out/last/state.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged(uninterrupted(dropout=0.1) / "last" / "state.pt", kind))
    with pytest.raises(ValueError, match=r"last/state.pt is damaged"):
        fit(init_from="resume")


@pytest.mark.parametrize(
    "state", [[1], torch.zeros(2), {"script": "train"}], ids=["list", "tensor", "dict"]
)
def test_tensors_that_are_not_a_state_are_refused_by_name(state):
    Path("out/last").mkdir(parents=True)
    torch.save(state, "out/last/state.pt")
    with pytest.raises(ValueError, match=r"out/last/state.pt is not the state of a run"):
        fit(init_from="resume")


def test_another_programs_log_is_refused_by_name_and_left(uninterrupted):
    shutil.copytree(uninterrupted(dropout=0.1), "out")
    Path("out/metrics.jsonl").write_text('["loss", 1]\n')
    with pytest.raises(ValueError, match=r"out/metrics.jsonl is not the log of a run"):
        fit(init_from="resume", max_iters=12)
    assert Path("out/metrics.jsonl").read_text() == '["loss", 1]\n'


def test_a_mistake_ends_in_a_sentence_and_status_2():
    done = Forked(["train.py", *arguments(init_from="resume")], Path.cwd()).wait()
    assert_refused(done, "out/last/state.pt", "--init_from")


def test_a_screen_that_cannot_show_every_character_does_not_end_the_training(monkeypatch):
    monkeypatch.setattr(train, "sample_reply", lambda *_: "tea ☕")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(max_iters=0)])
    configurator.run(train.main, train.Config)
    assert b"\n  tea ?\n" in sys.stdout.buffer.getvalue()
