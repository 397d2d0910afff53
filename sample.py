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
    init_from: str = default_model()  # nano, gpt2..., distilgpt2, org/name on the hub, a directory
    start: str = "Once upon a time"  # the prompt
    num_samples: int = 1  # how many continuations
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 200
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8


def main(config):
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    engine = Engine(model, n_vocab=tokenizer.n_vocab)
    # GPT-2 saw <|endoftext|> before each text
    prompt = tokenizer.encode(config.start) or [tokenizer.special_ids["<|endoftext|>"]]

    # stream each continuation after the prompt
    for i in range(config.num_samples):
        if i > 0:
            print("-" * 20)
        print(config.start, end="", flush=True)
        seed = config.seed + i
        pieces = stream(engine, tokenizer, prompt, config, stop_ids=tokenizer.stop_ids, seed=seed)
        for text in pieces:
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main, Config)
