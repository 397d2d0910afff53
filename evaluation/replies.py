"""Replies of a model to many prompts; whether they emit the end token and do not write the user's
next turn."""

import re
from dataclasses import dataclass

from evaluation.report import progress
from nanochatgpt.generate import generate
from nanochatgpt.tokenizer import END_OF_TEXT

CHUNK = 64  # replies generated between two updates of the progress line


@dataclass
class Reply:
    text: str  # up to where the next turn begins
    ended: bool  # emitted the end token before max_new_tokens
    speaks_for_human: bool  # wrote the opener of the user's next turn


def reply_to(prompts, model, tokenizer, sampling, seed, label):
    """Return [Reply], one to each prompt (a list of ids). sampling: a Sampling; prompt i is sampled
    with seed + i; label: for the progress line."""
    # only the end token stops a reply, to see whether it goes on to speak for the human
    stop_ids = (tokenizer.eos_id, END_OF_TEXT)
    openers = re.compile("|".join(map(re.escape, tokenizer.stop_strings)))
    replies = []
    for start in progress(range(0, len(prompts), CHUNK), label):
        chunk = prompts[start : start + CHUNK]
        generated = generate(
            model, chunk, sampling, seed=seed + start, stop_ids=stop_ids, tokenizer=tokenizer
        )

        # cut each reply where another turn begins
        for ids in generated:
            text = tokenizer.decode(ids)
            opener = openers.search(text)
            if opener:
                text = text[: opener.start()]
            ended = len(ids) < sampling.max_new_tokens
            replies.append(Reply(text.strip(), ended, bool(opener)))
    return replies
