"""Train a GPT-2 on shards: python train.py config/finetune_chat.py

From OpenAI's weights or from scratch, on one device or, with torchrun, on many:
torchrun --nproc_per_node=4 train.py config/finetune_chat.py
"""

import gc
import math
import os
from dataclasses import dataclass

import nanochatgpt  # isort: skip  # noqa: F401  # first: sets how OpenMP's threads wait
import torch
from torch.nn.utils import clip_grad_norm_

from model import GPT, GPTConfig
from nanochatgpt.card import write_card
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import move, peak_flops, precision
from nanochatgpt.distributed import distribute, gathered, init_distributed, seed_for, synced_last
from nanochatgpt.generate import generate
from nanochatgpt.loader import Loader, read_ahead
from nanochatgpt.monitor import DivergenceCheck, Log, StopSignal, Timer, time_left
from nanochatgpt.optimizer import TrainConfig, check_schedule, learning_rate, make_adamw
from nanochatgpt.resume import Run
from nanochatgpt.sampling import Sampling
from nanochatgpt.shards import find_shards
from nanochatgpt.tokenizer import Tokenizer


@dataclass
class Config(TrainConfig):  # TrainConfig: the knobs shared by all training scripts
    init_from: str = "gpt2"  # scratch, resume, nano, gpt2[-medium|...], org/name, a directory
    dataset: str = "personachat"  # folders of data_dir: a,b:0.5 takes half of b per epoch
    template: str = ""  # one of TEMPLATES in nanochatgpt/tokenizer.py; by default the model's own
    dropout: float = 0.1  # share of activations dropped in training
    attention_dropout: float = 0.0  # share of attention weights dropped; slower, more memory
    # the model's shape, from scratch
    n_layer: int = 12  # layers
    n_head: int = 12  # attention heads per layer
    n_embd: int = 768  # width
    # the batch
    block_size: int = 1024  # tokens in a row; from scratch, also the model's context
    gradient_accumulation_steps: int = 4  # micro-batches per step, over all processes together
    # the optimizer, AdamW
    max_epochs: float = 0.0  # passes over the data; overrides max_iters (0 = off)
    lr_schedule: str = "cosine"  # cosine or linear, down to min_lr at max_iters; or constant
    min_lr: float = 0.0  # learning rate at the end
    warmup_iters: int = 50  # steps of linear warmup
    weight_decay: float = 0.01  # for matrices and embeddings, not biases and LayerNorms
    beta2: float = 0.99  # AdamW's beta2
    # evaluation and logging
    eval_iters: int = 50  # micro-batches per split in an evaluation
    log_interval: int = 10  # log every N steps
    # the machine
    compile: bool = False  # torch.compile: a minute to start, then faster steps on a GPU
    strategy: str = "ddp"  # with torchrun: ddp, or fsdp to shard weights and optimizer over devices
    gradient_checkpointing: bool = False  # a third more work, far less memory for activations
    deterministic: bool = False  # bitwise reproducible on a GPU, slower (a CPU always is)

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        check_schedule(self)
        at_least(1, self, "n_layer", "n_head", "n_embd", "block_size")
        at_least(1, self, "gradient_accumulation_steps", "eval_iters", "log_interval")
        at_least(0, self, "max_epochs")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.strategy not in ("ddp", "fsdp"):
            raise ValueError(f"strategy={self.strategy} is not one of ddp, fsdp")


def make_model(config, state, distributed):
    """Return (GPT, Tokenizer): from the state of a run to resume, from scratch, or from weights."""
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    dropouts = {"dropout": config.dropout, "attention_dropout": config.attention_dropout}
    source = config.init_from
    if state is not None:
        source = f"the run in {config.out_dir}"
        tokenizer = Tokenizer(state["template"])
        model = GPT(GPTConfig(**state["config"] | dropouts))
        model.load_state_dict(state.pop("model"))
    elif source == "scratch":
        tokenizer = Tokenizer(config.template or "human_bot")
        model = GPT(GPTConfig(config.block_size, tokenizer.n_vocab, **shape, **dropouts))
    else:
        with distributed.rank_zero_first():
            model, tokenizer = load_model(source, **dropouts)
        if config.template:
            tokenizer = Tokenizer(config.template)
        model.grow_vocab(tokenizer.n_vocab)

    # a model that is there keeps its shape
    for name, value in shape.items():
        n = getattr(model.config, name)
        if value != n and (name in config.given or value != getattr(Config, name)):
            raise ValueError(f"{name}={value} needs init_from=scratch; {source} has {n}")
    return model, tokenizer


@torch.no_grad()
def evaluate(model, loader, config, distributed, autocast):
    """Return the mean loss over the supervised tokens of the first eval_iters batches, or of a
    whole epoch if that is less."""
    sums = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
    n_batches = min(config.eval_iters, math.ceil(loader.n_rows / config.batch_size))
    # all processes take the same number of batches: a sharded model needs all of them
    for first in range(0, n_batches, distributed.world_size):
        number = first + distributed.rank
        x, y, documents = loader.batch(number)
        n = (y != -100).sum().item() if number < n_batches else 0
        with autocast:
            _, loss = model(x.to(distributed.device), y, documents.to(distributed.device))
        sums += torch.tensor([loss.item() * n, n], dtype=torch.float64)
    loss_sum, n_supervised = distributed.sum(sums).tolist()
    if n_supervised == 0:
        raise ValueError(f"no supervised token in {config.eval_iters} batches: raise eval_iters")
    return loss_sum / n_supervised


def main(config):
    # 1. the processes, the precision
    distributed = init_distributed(config, "gradient_accumulation_steps")
    rank, world_size, device = distributed.rank, distributed.world_size, distributed.device
    dtype, autocast, scaler = precision(config.dtype, device)
    sharded = config.strategy == "fsdp" and world_size > 1
    if dtype == torch.float16 and sharded:
        raise ValueError("strategy=fsdp trains in bfloat16 or float32: set dtype")
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)

    # 2. the model and its tokenizer; fail before downloading weights if there is no data
    shards = {}
    for split in ("train", "val"):
        shards[split] = find_shards(config.data_dir, config.dataset, split, shares=True)
    training_run = Run("train", config, distributed)
    state = training_run.load()
    raw_model, tokenizer = make_model(config, state, distributed)
    context = raw_model.config.block_size
    if config.block_size > context:
        problem = f"block_size={config.block_size} exceeds the context"
        raise ValueError(f"{problem}: lower it to {context}")
    raw_model.gradient_checkpointing = config.gradient_checkpointing
    raw_model.to(device)

    # optional: a faster loss and attention, equal up to rounding; delete both lines to go without
    from nanochatgpt.fast import speed_up

    speed_up(raw_model)

    # 3. the data
    loaders = {}
    for split, paths in shards.items():
        loaders[split] = Loader(paths, config.batch_size, config.block_size, config.seed, tokenizer)
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    if config.max_epochs:
        steps_per_epoch = loaders["train"].n_rows / rows_per_step
        config.max_iters = max(1, round(config.max_epochs * steps_per_epoch))

    # 4. the model on many devices, the optimizer
    model = raw_model
    if config.compile:
        from nanochatgpt.fast import compiled

        model = compiled(raw_model)
    model = distribute(model, raw_model, distributed, sharded)
    optimizer = make_adamw(raw_model, config.learning_rate, config.weight_decay, config.beta2)
    state = state or {"iter": 0, "best_val_loss": math.inf}
    training_run.restore(state, tokenizer, raw_model, optimizer, scaler)
    first_iter = state["iter"]
    best_val_loss = state["best_val_loss"]

    # other data: losses do not compare, so judge the best weights anew
    n_tokens = " + ".join(f"{loader.n_tokens:,}" for loader in loaders.values())
    data = f"{config.dataset}, {n_tokens} tokens, block_size={config.block_size}"
    if state.get("data", data) != data:
        best_val_loss = math.inf
        if distributed.master:
            print(f"the data was {state['data']}; now {data}: judging the best weights anew")

    # 5. the log
    stop = StopSignal()
    divergence = DivergenceCheck()
    if distributed.master:
        print(f"{raw_model.num_parameters():,} parameters on {device}, {dtype}")
        for split, loader in loaders.items():
            print(f"{split}: {loader.summary()}")
        print(loaders["train"].mixture(config.max_iters, rows_per_step))
        log = Log(config, first_iter)

    def step_batches(it):
        """Return this process's micro-batches of step `it`: [(x, y, documents)]."""
        first = it * config.gradient_accumulation_steps
        steps = range(rank, config.gradient_accumulation_steps, world_size)
        return [loaders["train"].batch(first + step) for step in steps]

    # 6. the loop
    steps = read_ahead(step_batches, range(first_iter, config.max_iters))
    timer = Timer(first_iter)
    norm = None
    gc.freeze()  # all of this lives until the end: do not let the garbage collector rescan it
    for it in range(first_iter, config.max_iters + 1):
        # evaluate; save the best weights in out_dir, the latest in out_dir/last
        if it % config.eval_interval == 0 or it == config.max_iters or best_val_loss == math.inf:
            raw_model.eval()
            losses = {}
            for split, loader in loaders.items():
                losses[split] = evaluate(raw_model, loader, config, distributed, autocast)
            divergence.check("validation loss", losses["val"], it, best_val_loss)
            improved = losses["val"] < best_val_loss
            best_val_loss = min(best_val_loss, losses["val"])
            whole_model = gathered(raw_model, sharded)
            if distributed.master:
                log(iter=it, train_loss=losses["train"], val_loss=losses["val"])
                print(f"iter {it}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
                print(f"  {sample_reply(whole_model, tokenizer)}")
                write_card(config, whole_model, tokenizer, loaders["train"], it, best_val_loss)
                if improved:
                    save_model(whole_model, tokenizer, config.out_dir)
            training_run.save(
                whole_model, whole_model, iter=it, best_val_loss=best_val_loss, data=data
            )
            raw_model.train()
            timer.restart(it)
        if it == config.max_iters:
            break

        # read this step's micro-batches; sum the supervised tokens over all processes, and the stop
        # flag rides along
        batches = next(steps)
        counts = [(y != -100).sum().item() for _, y, _ in batches]
        sums = torch.tensor([sum(counts), int(stop.asked)])
        total, stopping = distributed.sum(sums).tolist()
        if stopping:
            if norm is not None and not scaler.is_enabled():
                divergence.check("gradient norm", norm.item(), it)
            whole_model = gathered(raw_model, sharded)
            training_run.save(
                whole_model, whole_model, iter=it, best_val_loss=best_val_loss, data=data
            )
            training_run.print_stopped(it)
            break

        # ==== one training step: the heart of this file ===========================================
        lr = learning_rate(config, it)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # dropout is a function of (seed, step, rank), as the data is: there is no RNG state to save
        torch.manual_seed(seed_for(config.seed, it, rank))

        # the loss: the sum over the supervised tokens of all micro-batches, divided by their number
        step_loss = torch.zeros((), device=device)
        micro_batches = list(zip(batches, counts, strict=True))
        for (x, y, documents), n in synced_last(model, micro_batches):
            x = move(x, device)  # y stays on the CPU: fast_loss indexes it without a GPU sync
            documents = move(documents, device)
            with autocast:
                _, loss = model(x, y, documents)  # mean over this micro-batch's n tokens
                loss = loss * (n / max(1, total))
            scaler.scale(loss * world_size).backward()  # DDP averages gradients; we want their sum
            step_loss += loss.detach()

        # clip the gradient, update the weights
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # ==========================================================================================

        # log
        if sharded:
            norm = norm.full_tensor()
        if (it + 1) % config.log_interval == 0:
            step_loss = distributed.sum(step_loss).item()
            seconds = timer.seconds_per_step(it + 1)
            if distributed.master:
                loader = loaders["train"]
                tokens = loader.fill * rows_per_step * config.block_size  # without the padding
                speed = tokens / seconds
                flops = speed * raw_model.flops_per_token(loader.span, total / tokens)
                peak = peak_flops(device) if dtype != torch.float32 else None  # None: unknown
                mfu = flops / (peak * world_size) if peak else None
                metrics = {"loss": step_loss, "lr": lr, "grad_norm": norm.item()}
                log(iter=it + 1, **metrics, tokens_per_s=speed, mfu=mfu)
                print(
                    f"iter {it + 1}/{config.max_iters}: loss {step_loss:.4f}, lr {lr:.2e}, "
                    f"{speed:,.0f} tokens/s{f' ({mfu:.1%} MFU)' if mfu else ''}, "
                    f"{time_left(seconds * (config.max_iters - it - 1))} left"
                )
            divergence.check("loss", step_loss, it + 1)
            if not scaler.is_enabled():  # GradScaler already skips steps whose gradient overflows
                divergence.check("gradient norm", norm.item(), it + 1)

    if it == config.max_iters and distributed.master:
        print(f"best validation loss {best_val_loss:.4f}, weights and card in {config.out_dir}")
        print(f"chat with them: python chat.py --init_from={config.out_dir}")
    distributed.leave()


def sample_reply(model, tokenizer):
    """Return a short conversation with the model on one line, to watch it learn."""
    message = {"role": "user", "content": "Hello! How are you today?"}
    prompt, _ = tokenizer.render([message], add_generation_prompt=True)
    if len(prompt) >= model.config.block_size:
        return f"(a context of {model.config.block_size} tokens is too short to talk)"
    sampling = Sampling(max_new_tokens=30, temperature=0.7, top_k=50)
    [reply] = generate(
        model, [prompt], sampling, seed=0, stop_ids=tokenizer.stop_ids, tokenizer=tokenizer
    )
    return " ".join(tokenizer.decode(prompt + reply).split())


if __name__ == "__main__":
    run(main, Config)
