"""Train a GPT-2 on shards: python train.py config/finetune_chat.py

From OpenAI's weights or from scratch, on one device or, under torchrun, on many:
torchrun --nproc_per_node=4 train.py config/finetune_chat.py
"""

import gc
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig, move
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import peak_flops
from nanochatgpt.generate import generate
from nanochatgpt.induction import set_induction_heads
from nanochatgpt.monitor import Log, StopSignal, Trouble
from nanochatgpt.shards import Loader, find_shards
from nanochatgpt.tokenizer import Tokenizer
from nanochatgpt.training import (
    WHOLE,
    adamw,
    check_knobs,
    join,
    learning_rate,
    optimizer_step,
    precision,
    restore,
    run_to_resume,
    save_last,
)


@dataclass
class Config:
    # where from, where to
    init_from: str = "gpt2"  # scratch, resume, nano, gpt2[-medium|-large|-xl], distilgpt2, org/name or a directory
    out_dir: str = (
        "out/chat"  # the best weights so far; the latest and the trainer's state in its last/
    )
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # folders of data_dir with train*.bin and val*.bin; a,b:0.5 takes half of b an epoch
    template: str = ""  # one of TEMPLATES in tokenizer.py: how conversations are written; the model's own unless given
    dropout: float = 0.1  # share of activations dropped in training
    # the model, when it starts from scratch
    n_layer: int = 12  # layers, from scratch
    n_head: int = 12  # attention heads in each, from scratch
    n_embd: int = 768  # width, from scratch
    induction_heads: bool = (
        False  # from scratch: begin with heads that copy (induction.py), so that it soon remembers
    )
    # the batch
    batch_size: int = 8  # rows in a micro-batch
    block_size: int = 1024  # tokens in a row; from scratch, also the model's context
    gradient_accumulation_steps: int = 4  # micro-batches in a step, over all processes together
    # the optimizer: AdamW
    max_iters: int = 1000  # steps
    max_epochs: float = (
        0.0  # if not 0, as many steps as make so many passes over the data, whatever max_iters is
    )
    learning_rate: float = 5e-5  # at its highest
    lr_schedule: str = "cosine"  # cosine or linear, down to min_lr at max_iters; or constant
    min_lr: float = 0.0  # learning rate at the end
    warmup_iters: int = 50  # steps over which the learning rate rises from 0
    weight_decay: float = 0.01  # on matrices, not on biases and LayerNorms
    beta1: float = 0.9  # decay of the gradient's mean
    beta2: float = 0.99  # decay of the gradient's square's mean
    adam_eps: float = (
        1e-8  # from scratch 1e-5: else tokens that are rarely targets all drift to one embedding
    )
    freeze_rare: int = 0  # embeddings of tokens that come less often in an epoch stay as they are: see config/nano.py
    label_smoothing: float = (
        0.0  # share of each target that is spread over all tokens: none becomes impossible
    )
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    # looking on
    eval_interval: int = 200  # steps from one evaluation and checkpoint to the next
    eval_iters: int = 50  # micro-batches of each split in an evaluation, at most
    log_interval: int = 10  # steps from one line to the next
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "nanochatgpt"  # project at Weights & Biases
    wandb_run_name: str = ""  # name of the run there
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # what autocast computes in: float32, bfloat16, float16 (CUDA only); auto: what is fastest
    compile: bool = False  # torch.compile the model: a minute's start, then faster steps on a GPU
    strategy: str = (
        "ddp"  # under torchrun: ddp, or fsdp, which shards weights and optimizer over the devices
    )
    gradient_checkpointing: bool = False  # a third more work, and far less memory for activations
    deterministic: bool = (
        False  # on a GPU the same bits in every run, at some cost in speed; a CPU gives them anyway
    )
    seed: int = 1337  # of the initialisation, the order of the data and dropout


def check(config):
    """Raise ValueError for a knob that is out of range."""
    check_knobs(config)
    at_least(
        1,
        config,
        "n_layer",
        "n_head",
        "n_embd",
        "block_size",
        "gradient_accumulation_steps",
        "eval_iters",
    )
    at_least(0, config, "freeze_rare")
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"label_smoothing={config.label_smoothing} is not from 0 to below 1")
    if config.strategy not in ("ddp", "fsdp"):
        raise ValueError(f"strategy={config.strategy} is not one of ddp, fsdp")
    if config.freeze_rare and config.strategy == "fsdp":
        raise ValueError(
            f"freeze_rare={config.freeze_rare} needs the embeddings in one piece: set strategy=ddp"
        )


def main(config):
    check(config)
    last = Path(config.out_dir) / "last"

    # 1. the processes: one alone, or as many as torchrun started
    world = join(config, "gradient_accumulation_steps")
    rank, world_size, device, master = world.rank, world.size, world.device, world.master
    sharded = config.strategy == "fsdp" and world_size > 1

    # 2. the precision
    dtype, autocast, scaler = precision(config.dtype, device)
    if dtype == torch.float16 and sharded:
        raise ValueError("strategy=fsdp trains in bfloat16 or float32: set dtype")
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)

    # 3. the model and its tokenizer
    shards = {  # that there are any is known before weights are fetched
        split: find_shards(config.data_dir, config.dataset, split, shares=True)
        for split in ("train", "val")
    }
    state = run_to_resume(config, world, "train")
    if state is not None:
        tokenizer = Tokenizer(state["template"])
        model = GPT(GPTConfig(**state["config"] | {"dropout": config.dropout}))
        model.load_state_dict(state.pop("model"))
    elif config.init_from == "scratch":
        tokenizer = Tokenizer(config.template or "human_bot")
        shape = (config.n_layer, config.n_head, config.n_embd)
        model = GPT(GPTConfig(config.block_size, tokenizer.n_vocab, *shape, config.dropout))
        if config.induction_heads:
            set_induction_heads(model)
    else:
        with world.one_by_one():
            model, tokenizer = load_model(config.init_from, dropout=config.dropout)
        for name in ("n_layer", "n_head", "n_embd"):
            asked, there = getattr(config, name), getattr(model.config, name)
            if name in getattr(config, "given", ()) and asked != there:
                raise ValueError(
                    f"{name}={asked}, but {config.init_from} has {there}: leave it out, or start from scratch"
                )
        tokenizer = Tokenizer(config.template or tokenizer.template)
        model.grow_vocab(tokenizer.n_vocab)
    if config.block_size > model.config.block_size:
        raise ValueError(
            f"block_size={config.block_size}, but the model's context is {model.config.block_size}: lower it to that"
        )
    state = state or {"iter": 0, "best_val_loss": math.inf}
    raw_model = model.to(device)
    raw_model.gradient_checkpointing = config.gradient_checkpointing
    raw_model.label_smoothing = config.label_smoothing

    # 4. the data
    loaders = {}
    for split in ("train", "val"):
        loaders[split] = Loader(
            shards[split], config.batch_size, config.block_size, config.seed, tokenizer
        )
    steps_per_epoch = loaders["train"].n_rows / (
        config.batch_size * config.gradient_accumulation_steps
    )
    if config.max_epochs:
        config.max_iters = max(1, round(config.max_epochs * steps_per_epoch))
    if config.freeze_rare:
        counts = loaders["train"].counts(raw_model.config.vocab_size)
        raw_model.freeze_embeddings(torch.from_numpy(counts < config.freeze_rare).to(device))
    if state["iter"] > config.max_iters:
        raise ValueError(
            f"{last} is at iter {state['iter']}, beyond max_iters={config.max_iters}: raise it"
        )

    # 5. many devices: whole copies of the model whose gradients are averaged, or one that is sharded
    if config.compile:
        model = raw_model.compiled()
    if sharded:
        for block in raw_model.transformer.h:
            fully_shard(block)
        fully_shard(raw_model)
    elif world_size > 1:
        model = DistributedDataParallel(
            model
        )  # with device_ids it would move the targets to the GPU

    # 6. the optimizer
    spared = (
        raw_model.transformer.wte.weight if config.freeze_rare else None
    )  # some of it has to stay as it is
    optimizer = adamw(raw_model, config, spared)
    restore(raw_model, optimizer, scaler, state)

    @torch.no_grad()
    def evaluate(loader):
        """Return the mean loss over the supervised tokens of the first `eval_iters` batches, or of a whole epoch."""
        sums = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
        n_batches = min(config.eval_iters, -(-loader.n_rows // config.batch_size))
        for first in range(
            0, n_batches, world_size
        ):  # all processes the same number: a sharded model needs them all
            x, y, documents = loader.batch(first + rank)
            n = (y != -100).sum().item() if first + rank < n_batches else 0
            with autocast:
                loss = raw_model(x.to(device), y, documents=documents.to(device))[1]
            sums += torch.tensor([loss.item() * n, n], dtype=torch.float64)
        if world.sum(sums)[1] == 0:
            raise ValueError(
                f"no supervised token in the first {config.eval_iters} batches: raise eval_iters"
            )
        return (sums[0] / sums[1]).item()

    def gathered():
        """Return the model, a sharded one as a whole on the first process's CPU."""
        if not sharded:
            return raw_model
        weights = get_model_state_dict(raw_model, options=WHOLE)
        with torch.device("meta"):
            model = GPT(raw_model.config)
        if master:
            model.load_state_dict(weights, assign=True)
            model.tie_weights()
        return model

    def save(it, model):
        """Write last/."""
        common = (raw_model, optimizer, scaler)
        best = state["best_val_loss"]
        save_last(
            world,
            config,
            "train",
            model,
            tokenizer,
            *common,
            weights=model,
            iter=it,
            best_val_loss=best,
        )

    # 7. the log: lines on the screen and in metrics.jsonl, which a resumed run continues from where it was saved
    stop, trouble = StopSignal(), Trouble()
    tokens_per_step = config.batch_size * config.block_size * config.gradient_accumulation_steps
    peak = peak_flops(device) if dtype != torch.float32 else None
    if master:
        print(
            f"{raw_model.num_parameters():,} parameters on {device}, {str(dtype).removeprefix('torch.')}"
        )
        if torch.device(device).type == "cuda" and not peak:
            print(
                f"no MFU: the peak rate of {torch.cuda.get_device_name(device)} in {dtype} is not in PEAK_FLOPS"
            )
        for split, loader in loaders.items():
            rows = f"{loader.n_rows:,} rows of {config.block_size}, {loader.fill:.1%} full"
            if len(loader.parts) > 1:  # a small data set may drown in a large one
                rows += f" ({', '.join(f'{part.taken:,} of {part.shard.path.parent.name}' for part in loader.parts)})"
            lost = f"; {loader.n_lost:,} left out, beyond a row" if loader.n_lost else ""
            print(f"{split}: {loader.n_tokens:,} tokens in {rows}{lost}")
        print(
            f"{config.max_iters:,} steps are {round(config.max_iters / steps_per_epoch, 2):,g} epochs"
        )
        log = Log(config, first_iter=state["iter"])

    def step_batches(it):
        """Return this process's micro-batches of step `it`, each with its number of supervised tokens."""
        steps = range(rank, config.gradient_accumulation_steps, world_size)
        batches = [
            loaders["train"].batch(it * config.gradient_accumulation_steps + step) for step in steps
        ]
        return [(*batch, (batch[1] != -100).sum().item()) for batch in batches]

    # 8. the loop
    reader = ThreadPoolExecutor(1)  # a step's batches are read while the one before is computed
    ahead = reader.submit(step_batches, state["iter"])
    gc.freeze()  # what is there now lives to the end: the collector need not walk through it at every turn
    clock, clock_iter, norm = time.perf_counter(), state["iter"], None
    for it in range(state["iter"], config.max_iters + 1):
        if it % config.eval_interval == 0 or it == config.max_iters:
            raw_model.eval()
            losses = {split: evaluate(loader) for split, loader in loaders.items()}
            trouble.check("validation loss", losses["val"], it, state["best_val_loss"])
            model_now = gathered()
            if master:
                log(iter=it, train_loss=losses["train"], val_loss=losses["val"])
                print(f"iter {it}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
                print(f"  {sample_reply(model_now, tokenizer)}")
                if losses["val"] < state["best_val_loss"]:
                    save_model(model_now, tokenizer, config.out_dir)
            state["best_val_loss"] = min(state["best_val_loss"], losses["val"])
            save(it, model_now)
            raw_model.train()
            clock, clock_iter = time.perf_counter(), it
        if it == config.max_iters:
            if master:
                best = f"the best validation loss is {state['best_val_loss']:.4f}, its weights are in {config.out_dir}"
                print(f"{best}; talk to them: python chat.py --init_from={config.out_dir}")
            break

        # dropout's noise is a function of (seed, step, rank), as the data is: nothing of it need be saved
        torch.manual_seed(int(np.random.SeedSequence((config.seed, it, rank)).generate_state(1)[0]))
        lr = learning_rate(config, it)

        # the loss is the sum over the supervised tokens of all micro-batches and processes, over their number
        batches, ahead = ahead.result(), reader.submit(step_batches, it + 1)
        # on the CPU, through gloo: no wait for the GPU
        total, stopping = world.sum(
            torch.tensor([sum(n for *_, n in batches), int(stop.asked)])
        ).tolist()
        if stopping:
            if norm is not None and not scaler.is_enabled():
                trouble.check("gradient norm", norm.item(), it)
            save(it, gathered())
            if master:
                print(
                    f"stopped at iter {it}, saved to {last}; go on with the same command and --init_from=resume"
                )
            break
        loss_sum = torch.zeros((), device=device)
        for i, (x, y, documents, n) in enumerate(batches):
            if world_size > 1:  # gradients meet once a step
                meet = i == len(batches) - 1
                if sharded:
                    raw_model.set_requires_gradient_sync(meet)
                else:
                    model.require_backward_grad_sync = meet
            with autocast:
                # the targets stay on the CPU: the model looks there for what is supervised, and waits for no GPU (but
                # FSDP moves all that goes in)
                loss = model(move(x, device), y, documents=move(documents, device))[1] * (
                    n / max(1, total)
                )
            loss_sum += loss.detach()
            scaler.scale(loss * world_size).backward()  # the processes' mean is taken
        norm = optimizer_step(raw_model, optimizer, scaler, lr, config.grad_clip)
        norm = norm.full_tensor() if sharded else norm

        if (it + 1) % config.log_interval == 0:
            loss = world.sum(loss_sum).item()
            seconds = (time.perf_counter() - clock) / (it + 1 - clock_iter)
            clock, clock_iter = time.perf_counter(), it + 1
            if master:
                tokens = loaders["train"].fill * tokens_per_step  # padding is none
                speed, flops = (
                    tokens / seconds,
                    raw_model.flops_per_token(loaders["train"].span, total / tokens),
                )
                mfu = flops * speed / (peak * world_size) if peak else None
                log(
                    iter=it + 1,
                    loss=loss,
                    lr=lr,
                    grad_norm=norm.item(),
                    tokens_per_s=speed,
                    mfu=mfu,
                )
                left = timedelta(seconds=round(seconds * (config.max_iters - it - 1)))
                rate = f"{speed:,.0f} tokens/s" + (f" ({mfu:.1%} MFU)" if mfu else "")
                print(
                    f"iter {it + 1}/{config.max_iters}: loss {loss:.4f}, lr {lr:.2e}, {rate}, {left} left"
                )
            trouble.check("loss", loss, it + 1)
            if (
                not scaler.is_enabled()
            ):  # which skips a step whose gradients are too large for float16
                trouble.check("gradient norm", norm.item(), it + 1)
    reader.shutdown(cancel_futures=True)
    world.leave()


def sample_reply(model, tokenizer):
    """Return a short conversation with the model, on one line, for the person who watches it learn."""
    message = {"role": "user", "content": "Hello! How are you today?"}
    prompt = tokenizer.render([message], add_generation_prompt=True)[0]
    if len(prompt) >= model.config.block_size:
        return f"(a context of {model.config.block_size} tokens is too short to talk)"
    options = {
        "max_new_tokens": 30,
        "temperature": 0.7,
        "top_k": 50,
        "seed": 0,
        "stop_ids": tokenizer.stop_ids,
    }
    reply = generate(model, [prompt], tokenizer=tokenizer, **options)[0]
    return " ".join(tokenizer.decode(prompt + reply).split())


if __name__ == "__main__":
    run(main, Config)
