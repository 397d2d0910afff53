"""Continue a prompt: python sample.py --init_from=gpt2 --start="Once upon a time" """

from dataclasses import dataclass

from checkpoint import load_model, pick_device, pick_dtype
from configurator import run
from generate import stream


@dataclass
class Config:
    init_from: str = "gpt2"  # gpt2[-medium|-large|-xl], distilgpt2, org/name on the hub, or a directory
    start: str = "Once upon a time"  # the prompt
    num_samples: int = 1  # how many continuations
    max_new_tokens: int = 200  # tokens in each, at most
    temperature: float = 0.8  # below 1 is more predictable, above 1 more random; 0 takes the likeliest token
    top_k: int = 200  # draw from the so many likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that have this much probability together
    repetition_penalty: float = 1.0  # above 1 makes tokens that were there before less likely
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16


def main(config):
    device = pick_device(config.device)
    model, tokenizer = load_model(config.init_from, device, pick_dtype(config.dtype, device))
    prompt = tokenizer.encode(config.start) or [tokenizer.special_ids["<|endoftext|>"]]
    for i in range(config.num_samples):
        print(config.start, end="", flush=True)
        for text in stream(
            model,
            tokenizer,
            prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            stop_ids=tokenizer.stop_ids,
            seed=config.seed + i,
        ):
            print(text, end="", flush=True)
        print("\n" + "-" * 20 if i + 1 < config.num_samples else "")


if __name__ == "__main__":
    run(main, Config)
