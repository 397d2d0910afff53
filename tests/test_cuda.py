"""Training on a GPU, in 16 bits, compiled and packed, gives the numbers of float32 on a CPU.

Without a GPU most of these tests run on the CPU, so that they stay in step with the code.
"""

import functools
import queue

import pytest
import test_ppo
import test_train_reward
import torch

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.device import move
from nanochatgpt.engine import Engine
from nanochatgpt.fast import compiled, speed_up
from nanochatgpt.generate import generate
from nanochatgpt.sampling import Sampling
from nanochatgpt.tokenizer import Tokenizer
from serving.scheduler import Job, Scheduler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="slow in 16 bits on a CPU")
DTYPES = ["float32", "bfloat16", "float16"] if DEVICE == "cuda" else ["bfloat16"]


def loss_and_gradients(device, dtype="float32", packed=False, fast=False, how="eager"):
    """Return the loss and the gradients, on the CPU, of a small GPT far from its initialisation."""
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=1003, n_layer=2, n_head=2, n_embd=128))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    idx, targets = torch.randint(0, 1003, (4, 128)), torch.randint(0, 1003, (4, 128))
    targets[torch.rand(4, 128) < 0.5] = -100
    documents = (
        torch.tensor([0, 50, 128, 140, 256, 256, 300, 384, 512, 512], dtype=torch.int32)
        if packed
        else None
    )
    model.to(device).train()
    if fast:
        speed_up(model)
    model.gradient_checkpointing = how == "checkpointed"
    run = compiled(model) if how == "compiled" else model
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        documents = None if documents is None else move(documents, device)
        loss = run(move(idx, device), targets, documents=documents)[1]
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_on_a_gpu_is_that_of_float32_on_a_cpu(dtype, how, packed):
    if how == "compiled" and DEVICE == "cpu":
        pytest.skip("compiling takes a minute")
    expected_loss, expected = loss_and_gradients("cpu", packed=packed)
    loss, gradients = loss_and_gradients(DEVICE, dtype, packed, fast=True, how=how)
    tolerance = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 5e-3}[dtype]
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, name


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reward_model_learns_on_a_gpu_as_on_a_cpu(dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 400), ("val", 80)):
        test_train_reward.write_replies("data/retry", split, test_train_reward.replies(n))
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(64, **test_train_reward.SHAPE)), test_train_reward.TOKENIZER, "start")
    losses = {}
    for device in ("cuda", "cpu"):
        knobs = {"device": device, "out_dir": device, "dropout": 0.0, "max_iters": 20}
        knobs["dtype"] = dtype if device == "cuda" else "float32"
        evaluations = test_train_reward.evaluations(test_train_reward.fit(**knobs))
        losses[device] = [record["val_loss"] for record in evaluations]
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=0.05)
    assert losses["cuda"][-1] < 0.3


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_ppo_on_a_gpu_begins_with_no_kl(dtype, tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    save_model(test_ppo.model(), test_ppo.TOKENIZER, "start")
    # 48 tokens: enough steps for the engine to record a CUDA graph
    knobs = {"device": "cuda", "dtype": dtype, "max_new_tokens": 48, "max_iters": 3}
    steps = test_ppo.steps_of(test_ppo.fit(**knobs))
    assert abs(steps[0]["kl"]) < 1e-3 and len(steps) == 3
    assert all(abs(step["kl"]) < 60 for step in steps)


def test_jobs_on_a_gpu_that_come_and_go_get_what_each_gets_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=50257, n_layer=2, n_head=2, n_embd=64)).to(
        DEVICE
    )
    prompts = [[7 * n + i for i in range(3 + 5 * n)] for n in range(12)]
    alone = [generate(model, [prompt], Sampling(20, 0))[0] for prompt in prompts]
    pieces, tokenizer = queue.Queue(), Tokenizer()
    load = functools.partial(
        Engine, model, 4, prefill_tokens=16
    )  # prompts in pieces, steps replayed by graphs
    scheduler = Scheduler(load, len(prompts), lambda found: [pieces.put(each) for each in found])
    jobs = [Job(None, prompt, Sampling(20, 0), tokenizer) for prompt in prompts]
    scheduler.add(*jobs)
    given, left = {job: [] for job in jobs}, len(jobs)
    while left:
        job, piece = pieces.get(timeout=120)
        given[job] += [token.id for token in piece.tokens]
        left -= piece.end is not None
    scheduler.close()
    for job, expected in zip(jobs, alone, strict=True):  # half a character at the end is no text
        assert (
            given[job] == expected[: len(given[job])] and job.n_tokens == 20 <= len(given[job]) + 3
        )
