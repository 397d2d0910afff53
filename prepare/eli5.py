"""Questions from "explain like I'm five" and their best answers: python prepare/eli5.py [--source=PATH]

Without --source, eli5_category's train and validation-1 splits are downloaded (67 MB). --source takes a folder with
these two files, or one file, .json.gz or .json, which is then divided 95 to 5. With --mask=all the answers alone, one
behind the other, are plain text to be learned whole, as the model gpt2-finetuned-eli5 was trained.
"""

import gzip
import random
import re
import sys
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import at_least, run
from nanochatgpt.files import hub_file
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import JsonStream, divide, existing, prepare, prepare_text

FILES = {  # split -> file, bytes, sha256
    "train": (
        "eli5-category-train.json.gz",
        62_314_944,
        "9bfbed0d20608978fde8889f6383bfb695af575c81c3a3b2ec87c644928c725b",
    ),
    "val": (
        "eli5-category-validation-1.json.gz",
        4_997_144,
        "4b29d4c6eae0d474b629d1e3a825a2543491afec08da0fb0bb06cd573ce718cf",
    ),
}


@dataclass
class Config(CorpusConfig):
    mask: str = (
        "reply"  # what is to be learned: the reply to the question; or all, of every answer's text
    )
    max_examples: int = (
        0  # take the first so many that have an answer, a fifth of them for validation; 0: all
    )


DAMAGED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    EOFError,
    OSError,
    zlib.error,
)


def best_answer(answers):
    """Return the text of the best-scored answer, None if none is left: deleted ones do not count, nor those with a link
    in them, of which the corpus keeps only a placeholder (URL_0)."""
    ranked = sorted(zip(answers["score"], answers["text"], strict=True), key=lambda pair: -pair[0])
    texts = (text.strip() for _, text in ranked)
    return next(
        (
            t
            for t in texts
            if t and t not in ("[deleted]", "[removed]") and not re.search(r"\bURL_\d", t)
        ),
        None,
    )


def as_messages(question):
    """Return a question as a conversation, None where no answer is left."""
    answer = best_answer(question["answers"])
    text = "\n".join(filter(None, (question["title"].strip(), question["selftext"].strip())))
    return (
        [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        if answer
        else None
    )


def as_text(question):
    """Return all answers to a question as one text, as Hugging Face's tutorial on language modeling does."""
    return " ".join(question["answers"]["text"])


def read(path, counts, form):
    """Yield (question's id, form(question)) from one file; count questions and those without an answer in `counts`."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            for question in JsonStream(file).items():
                counts["questions"] += 1
                if formed := form(question):
                    yield "" + question["q_id"], formed  # which raises if it is no text
                else:
                    counts["unanswered"] += 1
        except DAMAGED as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is damaged or not eli5_category's JSON: {what}") from error


def questions(config, counts, form):
    """Yield (split, form(question)) of the published files, of a folder with them, or of one file alone."""
    source = config.source and existing(config.source)
    names = list(FILES.values())[: 1 if config.max_examples else None]
    if not source:
        found = [hub_file("rexarski/eli5_category", *file, kind="datasets") for file in names]
    elif source.is_dir():
        by_name = {
            path.name.removesuffix(".gz"): path
            for path in sorted(source.glob("eli5-category-*.json*"))
        }
        if len(by_name) != 1 or config.max_examples:
            found = [
                by_name.get(name.removesuffix(".gz")) or existing(source / name)
                for name, _, _ in names
            ]
        else:
            found = list(by_name.values())
    else:
        found = [source]
    if config.max_examples:
        taken = list(islice(read(found[0], counts, form), config.max_examples))
        held_out = set(random.Random(42).sample(range(len(taken)), len(taken) // 5))
        yield from (
            ("val" if i in held_out else "train", formed) for i, (_, formed) in enumerate(taken)
        )
    elif len(found) == 1:
        yield from divide(read(found[0], counts, form))
    else:
        for split, path in zip(FILES, found, strict=True):
            yield from ((split, formed) for _, formed in read(path, counts, form))


def main(config):
    if config.mask not in ("reply", "all"):
        raise ValueError(f"mask={config.mask} is not one of reply, all")
    at_least(0, config, "max_examples")
    counts = {"questions": 0, "unanswered": 0}
    if config.mask == "all":
        prepare_text(config, "eli5", questions(config, counts, as_text))
    else:
        prepare(config, "eli5", questions(config, counts, as_messages))
    why = "no answer" if config.mask == "all" else "no answer without a link"
    print(f"{counts['questions']:,} questions, {counts['unanswered']:,} of them left out: {why}")


if __name__ == "__main__":
    run(main, Config)
