"""Train a reward model on kept and rejected replies: python train_reward.py config/train_reward.py

Like Chai's gpt2_medium_retry_and_continue_12m_reward_model, GPT-2 with a scalar head on the last
token; on shards of prepare/retry.py. On one device or, with torchrun, on many.
"""

import math
from dataclasses import dataclass

import nanochatgpt  # isort: skip  # noqa: F401  # first: sets how OpenMP's threads wait
import torch
from torch.nn.utils import clip_grad_norm_

from model import GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import precision
from nanochatgpt.distributed import distribute, init_distributed, seed_for, synced_last
from nanochatgpt.monitor import DivergenceCheck, Log, StopSignal, Timer, time_left
from nanochatgpt.optimizer import TrainConfig, check_schedule, learning_rate, make_adamw
from nanochatgpt.resume import Run
from nanochatgpt.shards import find_shards
from nanochatgpt.tokenizer import Tokenizer
from nanochatgpt.weights import NoScore
from rlhf.dataset import ReplyDataset
from rlhf.reward_model import RewardModel, reward_losses, roc_auc

MUST_MATCH = ("loss", "dataset", "block_size")  # in a resumed run


@dataclass
class Config(TrainConfig):  # TrainConfig: the knobs shared by all training scripts
    out_dir: str = "out/reward"
    dataset: str = "retry"
    template: str = ""  # how conversations are written; default: the model's own
    loss: str = "labels"  # labels: cross-entropy; pairs: Bradley-Terry, chosen against rejected
    dropout: float = 0.1  # share of activations dropped in training, not of attention weights
    # the batch
    batch_size: int = 16  # replies in a micro-batch, of similar length
    block_size: int = 256  # tokens of a text that are scored, the last ones
    gradient_accumulation_steps: int = 4  # micro-batches per step, over all processes together
    # the optimizer, AdamW
    max_epochs: float = 0.0  # passes over the data; overrides max_iters (0 = off)
    learning_rate: float = 1e-5
    lr_schedule: str = "cosine"  # cosine or linear, down to min_lr at max_iters; or constant
    min_lr: float = 0.0  # learning rate at the end
    warmup_iters: int = 50  # steps of linear warmup
    weight_decay: float = 0.01  # for matrices and embeddings, not biases and LayerNorms
    beta2: float = 0.999  # AdamW's beta2
    # evaluation and logging
    eval_iters: int = 1000  # micro-batches in an evaluation, at most
    log_interval: int = 10  # log every N steps

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        check_schedule(self)
        at_least(1, self, "block_size", "gradient_accumulation_steps", "eval_iters", "log_interval")
        at_least(0, self, "max_epochs")
        if self.loss not in ("labels", "pairs"):
            raise ValueError(f"loss={self.loss} is not one of labels, pairs")
        if self.loss == "pairs" and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} splits a pair: make it even")


def make_model(config, state, distributed):
    """Return (RewardModel, Tokenizer): resumed, loaded, or a GPT with a new score for its head."""
    if state is not None:
        model = RewardModel(GPTConfig(**state["config"] | {"dropout": config.dropout}))
        model.load_state_dict(state.pop("model"))
        return model, Tokenizer(state["template"])

    source = config.init_from
    with distributed.rank_zero_first():
        try:
            model, tokenizer = load_model(source, dropout=config.dropout, model_class=RewardModel)
        except NoScore:
            model, tokenizer = load_model(source, dropout=config.dropout)
    if config.template:
        tokenizer = Tokenizer(config.template)
    model.grow_vocab(tokenizer.n_vocab)

    # a GPT gets a random score; the context shrinks to what training uses
    if not isinstance(model, RewardModel):
        gpt = model
        model = RewardModel(gpt.config)
        model.transformer = gpt.transformer
    context = model.config.block_size
    if config.block_size > context:
        raise ValueError(f"block_size={config.block_size} exceeds the model's {context}: lower it")
    model.shorten(config.block_size)
    return model, tokenizer


@torch.no_grad()
def evaluate(model, batches, loss, autocast):
    """Return {val_loss in nats, accuracy, auc} over all replies of the batches. accuracy: the share
    of replies on the right side of 0, or of pairs in order."""
    model.eval()
    scores = []
    for idx, lengths, _ in batches:
        with autocast:
            scores.append(model(idx, lengths))
    model.train()
    scores = torch.cat(scores)  # (n,)
    labels = torch.cat([y for _, _, y in batches])
    losses = reward_losses(scores, labels, loss)
    # a coin gives a loss of log 2, and what is better than a coin is right
    right = (losses < math.log(2)).float()
    return {
        "val_loss": losses.mean().item(),
        "accuracy": right.mean().item(),
        "auc": roc_auc(scores, labels),
    }


def main(config):
    # 1. the processes, the precision
    distributed = init_distributed(config, "gradient_accumulation_steps")
    world_size = distributed.world_size
    device = distributed.device
    dtype, autocast, scaler = precision(config.dtype, device)

    # 2. the model and its tokenizer; fail before downloading weights if there is no data
    train_shards = find_shards(config.data_dir, config.dataset, "train")
    val_shards = find_shards(config.data_dir, config.dataset, "val")
    training_run = Run("train_reward", config, distributed, MUST_MATCH)
    state = training_run.load()
    raw_model, tokenizer = make_model(config, state, distributed)
    raw_model.to(device)

    # 3. the data
    train = ReplyDataset(train_shards, tokenizer, config)
    val = ReplyDataset(val_shards, tokenizer, config)
    steps_per_epoch = train.n_batches / config.gradient_accumulation_steps
    if config.max_epochs:
        config.max_iters = max(1, round(config.max_epochs * steps_per_epoch))

    # 4. the model on many devices, the optimizer
    model = distribute(raw_model, raw_model, distributed)
    optimizer = make_adamw(raw_model, config.learning_rate, config.weight_decay, config.beta2)
    state = state or {"iter": 0, "best_val_loss": math.inf}
    training_run.restore(state, tokenizer, raw_model, optimizer, scaler)
    best_val_loss = state["best_val_loss"]

    # 5. the replies of an evaluation, and how well their length alone ranks them
    n_eval_batches = min(config.eval_iters, val.n_batches)
    val_batches = [val.batch(number, device) for number in range(n_eval_batches)]
    reply_lengths = []  # tokens
    for idx, lengths, _ in val_batches:
        for ids, length in zip(idx.tolist(), lengths.tolist(), strict=True):
            reply_lengths.append(length - tokenizer.last_reply(ids[:length]))
    labels = torch.cat([y for _, _, y in val_batches]).cpu()
    length_auc = roc_auc(torch.tensor(reply_lengths), labels)
    length_auc = max(length_auc, 1 - length_auc)  # longer or shorter is better

    # 6. the log
    stop = StopSignal()
    divergence = DivergenceCheck()
    if distributed.master:
        log = Log(config, first_iter=state["iter"])
        print(f"{raw_model.num_parameters():,} parameters on {device}, {dtype}")
        for split, dataset in (("train", train), ("val", val)):
            kept = f"{dataset.labels.mean():.1%} kept, {dataset.lengths.mean():.0f} tokens each"
            print(f"{split}: {len(dataset.labels):,} replies, {kept}")
        print(f"{config.max_iters:,} steps are {config.max_iters / steps_per_epoch:,.3g} epochs")

    # 7. the loop
    timer = Timer(state["iter"])
    for it in range(state["iter"], config.max_iters + 1):
        # evaluate; save the best weights in out_dir, the latest in out_dir/last
        if it % config.eval_interval == 0 or it == config.max_iters:
            metrics = evaluate(raw_model, val_batches, config.loss, autocast)
            val_loss = metrics["val_loss"]
            divergence.check("validation loss", val_loss, it, best_val_loss)
            if distributed.master:
                log(iter=it, **metrics, length_auc=length_auc)
                auc = f"auc {metrics['auc']:.3f} (of the length alone: {length_auc:.3f})"
                print(f"iter {it}: val loss {val_loss:.4f}, {auc}")
                if val_loss < best_val_loss:
                    save_model(raw_model, tokenizer, config.out_dir)
            best_val_loss = min(best_val_loss, val_loss)
            training_run.save(raw_model, raw_model, iter=it, best_val_loss=best_val_loss)
            timer.restart(it)
        if it == config.max_iters:
            break

        # read this step's micro-batches; sum the number of losses, and the stop flag with it
        first = it * config.gradient_accumulation_steps
        steps = range(distributed.rank, config.gradient_accumulation_steps, world_size)
        batches = [train.batch(first + step, device) for step in steps]
        n = sum(len(y) // train.group_size for _, _, y in batches)  # losses
        total, stopping = distributed.sum(torch.tensor([n, stop.asked])).tolist()
        if stopping:
            training_run.save(raw_model, raw_model, iter=it, best_val_loss=best_val_loss)
            training_run.print_stopped(it)
            break

        # ==== one training step ===================================================================
        lr = learning_rate(config, it)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # dropout is a function of (seed, step, rank), as the data is: there is no RNG state to save
        torch.manual_seed(seed_for(config.seed, it, distributed.rank))

        # the loss: the sum over the replies or pairs of all micro-batches, divided by their number
        step_loss = torch.zeros((), device=device)
        for idx, lengths, y in synced_last(model, batches):
            with autocast:
                scores = model(idx, lengths)
            loss = reward_losses(scores, y, config.loss).sum() / total
            scaler.scale(loss * world_size).backward()  # DDP averages gradients; we want their sum
            step_loss += loss.detach()

        # clip the gradient, update the weights
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # ==========================================================================================

        if (it + 1) % config.log_interval == 0:
            loss = distributed.sum(step_loss).item()
            seconds = timer.seconds_per_step(it + 1)
            if distributed.master:
                rate = total * train.group_size / seconds
                log(iter=it + 1, loss=loss, lr=lr, grad_norm=norm.item(), replies_per_s=rate)
                left = time_left(seconds * (config.max_iters - it - 1))
                text = f"iter {it + 1}/{config.max_iters}: loss {loss:.4f}, lr {lr:.2e}"
                print(f"{text}, {rate:,.0f} replies/s, {left} left")
            divergence.check("loss", loss, it + 1)
            if not scaler.is_enabled():  # GradScaler already skips steps whose gradient overflows
                divergence.check("gradient norm", norm.item(), it + 1)

    if it == config.max_iters and distributed.master:
        best = f"best validation loss {best_val_loss:.4f}, weights in {config.out_dir}"
        command = f"python chat.py --best_of=8 --reward={config.out_dir}"
        print(f"{best}; pick replies with them: {command}")
    distributed.leave()


if __name__ == "__main__":
    run(main, Config)
