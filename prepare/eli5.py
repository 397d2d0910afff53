"""Questions from "explain like I'm five" and their best answers: python prepare/eli5.py [--source=PATH]

Without --source, eli5_category's train and validation-1 splits are downloaded (67 MB). --source takes a folder with
these two files, or one file, .json.gz or .json, which is then divided 95 to 5.
"""

import gzip
import json
import re
import zlib

from corpus import Config, divide, existing, prepare

from configurator import run
from download import hub_file

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


DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError, OSError, zlib.error)
WHITE_SPACE = frozenset(" \t\r\n,")


def objects(file):
    """Yield the objects of a JSON list in a text file one by one, without holding the list."""
    decoder = json.JSONDecoder()
    if file.read(1) != "[":
        raise ValueError("it is not a list")
    text, at = "", 0
    while True:
        while text[at : at + 1] in WHITE_SPACE:
            at += 1
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            if len(text) - at > 1 << 26 or not (more := file.read(1 << 20)):
                raise ValueError("it ends within the list") from None
            text, at = text[at:] + more, 0
        else:
            yield value


def best_answer(answers):
    """Return the text of the best-scored answer, None if none is left: deleted ones do not count, nor those with a link
    in them, of which the corpus keeps only a placeholder (URL_0)."""
    ranked = sorted(zip(answers["score"], answers["text"], strict=True), key=lambda pair: -pair[0])
    texts = (text.strip() for _, text in ranked)
    return next((t for t in texts if t and t not in ("[deleted]", "[removed]") and not re.search(r"\bURL_\d", t)), None)


def read(path, counts):
    """Yield (question's id, messages) from one file; count questions and those without an answer left in `counts`."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            for question in objects(file):
                counts["questions"] += 1
                answer = best_answer(question["answers"])
                if answer is None:
                    counts["unanswered"] += 1
                    continue
                text = "\n".join(filter(None, (question["title"].strip(), question["selftext"].strip())))
                key = "" + question["q_id"]  # which raises if it is no text
                yield key, [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged or not eli5_category's JSON: {error!r}") from error


def conversations(source, counts):
    """Yield (split, messages) of the published files, of a folder with them, or of one file alone."""
    if not source:
        found = [hub_file("rexarski/eli5_category", *file, kind="datasets") for file in FILES.values()]
    elif source.is_dir():
        found = sorted(source.glob("eli5-category-*.json*"))
    else:
        found = [source]
    if len(found) == 1:
        yield from divide(read(found[0], counts))
        return
    by_name = {path.name.removesuffix(".gz"): path for path in found}
    for split, (name, _, _) in FILES.items():
        for _, messages in read(by_name.get(name.removesuffix(".gz")) or existing(source / name), counts):
            yield split, messages


def main(config):
    counts = {"questions": 0, "unanswered": 0}
    prepare(config, "eli5", conversations(config.source and existing(config.source), counts))
    print(f"{counts['questions']:,} questions, {counts['unanswered']:,} of them left out: no answer without a link")


if __name__ == "__main__":
    run(main, Config)
