"""Questions from "explain like I'm five", with answers: python prepare/eli5.py [--source=PATH]

Without --source, eli5_category's train and validation-1 splits are downloaded (67 MB). --source is
a folder with these two files, or one file, a JSON list or JSON Lines, also gzipped, which is then
divided 95 to 5. With --mask=all, the answers are plain text, end to end, as gpt2-finetuned-eli5 was
trained on.
"""

import itertools
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import at_least, run
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import prepare, prepare_text
from prepare.records import find_file, published, read_records
from prepare.ways import File

REPO = "rexarski/eli5_category"  # on the Hugging Face hub
TRAIN_SHA256 = "9bfbed0d20608978fde8889f6383bfb695af575c81c3a3b2ec87c644928c725b"
VAL_SHA256 = "4b29d4c6eae0d474b629d1e3a825a2543491afec08da0fb0bb06cd573ce718cf"
FILES = {  # downloads are checked against size and sha256
    "train": File("eli5-category-train.json.gz", 62_314_944, TRAIN_SHA256),
    "val": File("eli5-category-validation-1.json.gz", 4_997_144, VAL_SHA256),
}
ORIGIN = {  # for the model card
    "name": "ELI5 category",
    "hub": REPO,
    "url": f"https://huggingface.co/datasets/{REPO}",
    "licence": "not stated; text by users of Reddit",
    "language": "en",
}


@dataclass
class Config(CorpusConfig):
    mask: str = "reply"  # what to learn: the best reply to each question; or all answers, as text
    max_examples: int = 0  # the first N questions, a fifth of them for validation (0 = all)


def as_messages(question):
    """Return (id, a question and its best answer as messages), None if no answer is left. Deleted
    answers are left out, and those with a link, which the corpus replaces by URL_0."""
    answers = question["answers"] or {"score": [], "text": []}  # null: none
    texts = answers["text"] or []
    scores = answers["score"] or [0] * len(texts)
    # best score first; null is 0
    ranked = sorted(zip(scores, texts, strict=True), key=lambda a: -(a[0] or 0))
    # the title and the text below it; either may be empty or null
    title = question["title"] or ""
    selftext = question.get("selftext") or ""
    text = (title.strip() + "\n" + selftext.strip()).strip()
    if not text:
        return None
    for _, answer in ranked:  # take the best answer that is usable
        answer = (answer or "").strip()
        if answer not in ("", "[deleted]", "[removed]") and not re.search(r"\bURL_\d", answer):
            user = {"role": "user", "content": text}
            return str(question["q_id"] or text), [user, {"role": "assistant", "content": answer}]
    return None


def as_text(question):
    """Return (id, all answers as one text), as Hugging Face's language modeling tutorial does."""
    answers = question["answers"] or {"text": []}
    text = " ".join(text for text in answers["text"] or [] if text and text.strip())
    return (str(question["q_id"] or text), text) if text else None


def questions(config, parse):
    """Yield (split, messages or text): as published, or the first max_examples, divided 4 to 1."""
    if not config.max_examples:
        yield from published(config.source, REPO, FILES, lambda path: read_records(path, parse))
        return
    path = find_file(config.source, REPO, FILES["train"])
    examples = list(itertools.islice(read_records(path, parse), config.max_examples))
    n = len(examples)
    held_out = set(random.Random(42).sample(range(n), n // 5))  # indices, the same each time
    for i, (_, example) in enumerate(examples):
        yield "val" if i in held_out else "train", example


def main(config):
    at_least(0, config, "max_examples")
    if config.mask == "reply":
        prepare(config, "eli5", questions(config, as_messages), ORIGIN)
    elif config.mask == "all":
        prepare_text(config, "eli5", questions(config, as_text), ORIGIN)
    else:
        raise ValueError(f"mask={config.mask} is not one of reply, all")


if __name__ == "__main__":
    run(main, Config)
