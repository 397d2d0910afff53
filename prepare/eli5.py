"""Questions from "explain like I'm five", with answers: python prepare/eli5.py [--source=PATH]

Without --source, eli5_category's train and validation-1 splits are downloaded (67 MB). --source is
a folder with these two files, or one file, .json.gz or .json, which is then divided 95 to 5. With
--mask=all, the answers are plain text, end to end, as gpt2-finetuned-eli5 was trained on.
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
from nanochatgpt.hub import hub_file
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import divide, existing, prepare, prepare_text
from prepare.json_stream import JsonStream

# downloads are checked against these
TRAIN_SHA256 = "9bfbed0d20608978fde8889f6383bfb695af575c81c3a3b2ec87c644928c725b"
VAL_SHA256 = "4b29d4c6eae0d474b629d1e3a825a2543491afec08da0fb0bb06cd573ce718cf"
FILES = {  # split -> file, bytes, sha256
    "train": ("eli5-category-train.json.gz", 62_314_944, TRAIN_SHA256),
    "val": ("eli5-category-validation-1.json.gz", 4_997_144, VAL_SHA256),
}


@dataclass
class Config(CorpusConfig):
    mask: str = "reply"  # what to learn: the best reply to each question; or all answers, as text
    max_examples: int = 0  # the first N questions, a fifth of them for validation (0 = all)


def as_messages(question):
    """Return a question and its best answer as messages, None if no answer is left.

    Deleted answers are left out, and those with a link, which the corpus replaces by URL_0.
    """
    answers = question["answers"]  # {"score": [...], "text": [...], ...}
    # best score first
    ranked = sorted(zip(answers["score"], answers["text"], strict=True), key=lambda a: -a[0])
    # the title and the text below it; either may be empty
    text = "\n".join(filter(None, (question["title"].strip(), question["selftext"].strip())))
    for _, answer in ranked:  # take the best answer that is usable
        answer = answer.strip()
        if answer not in ("", "[deleted]", "[removed]") and not re.search(r"\bURL_\d", answer):
            return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return None


def as_text(question):
    """Return all answers as one text, as Hugging Face's tutorial on language modeling does."""
    return " ".join(question["answers"]["text"])


def read(path, counts, form):
    """Yield (question's id, form(question)) of a file. Count questions, and those for which form
    returns nothing, in `counts`."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            for question in JsonStream(file).items():
                counts["questions"] += 1
                example = form(question)
                if example:
                    yield "" + question["q_id"], example  # a TypeError if it is not text
                else:
                    counts["unanswered"] += 1  # `form` found nothing to learn
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not eli5_category's JSON: {problem}") from error
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def find_files(source, files):
    """Return the paths of published files, or [path] of another file alone."""
    if not source:  # download
        return [hub_file("rexarski/eli5_category", *file, kind="datasets") for file in files]
    if source.is_file():  # one file, to be divided
        return [source]

    # a folder
    by_name = {}  # packed or not
    for path in sorted(source.glob("eli5-category-*.json*")):
        by_name[path.name.removesuffix(".gz")] = path
    if len(by_name) == 1 and len(files) == 2:  # a folder with one of the two
        return list(by_name.values())
    names = [name.removesuffix(".gz") for name, _, _ in files]
    return [by_name.get(name) or existing(source / f"{name}.gz") for name in names]


def questions(config, counts, form):
    """Yield (split, form(question)) of the files."""
    source = existing(config.source) if config.source else None
    files = list(FILES.values())
    # with max_examples, the train file alone is enough
    paths = find_files(source, files[:1] if config.max_examples else files)
    # the first ones, a fifth of them held out
    if config.max_examples:
        examples = list(islice(read(paths[0], counts, form), config.max_examples))
        n = len(examples)
        # indices; a fixed seed keeps the split
        held_out = set(random.Random(42).sample(range(n), n // 5))
        for i, (_, example) in enumerate(examples):
            yield "val" if i in held_out else "train", example
    elif len(paths) == 1:  # one file
        yield from divide(read(paths[0], counts, form))
    else:  # as published
        for split, path in zip(FILES, paths, strict=True):
            for _, example in read(path, counts, form):
                yield split, example


def main(config):
    at_least(0, config, "max_examples")
    # "reply" trains on chats, "all" on plain text
    counts = {"questions": 0, "unanswered": 0}
    if config.mask == "reply":
        prepare(config, "eli5", questions(config, counts, as_messages))
        reason = "no answer without a link"
    elif config.mask == "all":
        prepare_text(config, "eli5", questions(config, counts, as_text))
        reason = "no answer"
    else:
        raise ValueError(f"mask={config.mask} is not one of reply, all")
    print(f"{counts['questions']:,} questions, {counts['unanswered']:,} of them left out: {reason}")


if __name__ == "__main__":
    run(main, Config)
