"""Continue a prompt: python sample.py --init_from=gpt2 --start="Once upon a time" """

from dataclasses import dataclass

from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.configurator import run
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.engine import Engine
from nanochatgpt.generate import stream
from nanochatgpt.sampling import Sampling


@dataclass
class Config(Sampling):
    init_from: str = (
        default_model()
    )  # nano, gpt2[-medium|-large|-xl], distilgpt2, org/name on the hub, or a directory
    start: str = "Once upon a time"  # the prompt
    num_samples: int = 1  # how many continuations
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 200
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8; auto is float16 on an x86 CPU, bfloat16 on CUDA


def main(config):
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    engine = Engine(model, n_vocab=tokenizer.n_vocab)
    prompt = tokenizer.encode(config.start) or [tokenizer.special_ids["<|endoftext|>"]]
    for i in range(config.num_samples):
        print(config.start, end="", flush=True)
        for text in stream(
            engine, tokenizer, prompt, config, stop_ids=tokenizer.stop_ids, seed=config.seed + i
        ):
            print(text, end="", flush=True)
        print("\n" + "-" * 20 if i + 1 < config.num_samples else "")


if __name__ == "__main__":
    run(main, Config)
