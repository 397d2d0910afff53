"""The editions of PersonaChat: ParlAI's lines, and the records that Hugging Face made of ConvAI2's.

A record is a conversation, {"personality": [sentence], "utterances": [turn]}. A turn is {"history":
[text], "candidates": [text]}: all that was said before, and the possible replies, the right one
last. Or a record is a turn, which has "conv_id" and "personality" too.
"""

import itertools
import re
from pathlib import Path

from prepare import parlai
from prepare.records import is_csv, is_parquet, open_bytes, read_records

TABLE = re.compile(r".*\.(json|jsonl|csv|parquet)(\.gz)?", re.IGNORECASE)  # name of a file


def read(sources, parlai_names=parlai.NAMES):
    """Yield (split, name, dialogs) of an archive, a folder or files, given as a list of paths.
    split: "train", "val", or "" if there is only one. dialogs: as in parlai.py. parlai_names: a
    regular expression of ParlAI's files to read."""
    parts = record_files(sources)
    for split, files in parts.items():
        if len(parts) != 2:
            split = ""
        yield split, files[0][0], dialogs_of(files)
    if not parts:
        for split, name, lines in parlai.files(sources[0], parlai_names):
            yield split, name, parlai.dialogs(lines, name)


def record_files(sources):
    """Return {split: [(path, name of the list in it)]} of the files of records among `sources` and
    in its folders, {} if they are ParlAI's."""
    names = {path: path.name for path in sources if path.is_file()}
    for folder in filter(Path.is_dir, sources):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if any("_self_original" in path.name and path.suffix == ".txt" for path in paths):
            return {}
        tables = [path for path in paths if TABLE.fullmatch(path.name)]
        names |= {path: path.relative_to(folder).as_posix() for path in tables}
    if len(names) == 1:
        return lists_in(*names)

    parts = {}
    for path, name in names.items():
        match = re.search(r".*(train|val)", name, re.IGNORECASE)  # also validation/0000.parquet
        if match and "sample" not in name:  # an excerpt
            parts.setdefault(match[1].lower(), []).append((path, ""))
    return parts


def lists_in(path):
    """Return the same for one file."""
    if is_parquet(path) or is_csv(path):
        return {"": [(path, "")]}
    if parlai.is_archive(path):
        return {}
    with open_bytes(path) as file:
        head = file.peek(1).lstrip()
    if not re.match(rb'\{\s*"(train|valid)"\s*:', head):
        return {"": [(path, "")]} if head.startswith((b"[", b"{")) else {}
    parts = {"train": [(path, "train")], "val": [(path, "valid")]}
    return {split: files for split, files in parts.items() if any(dialogs_of(files))}


def dialogs_of(files):
    """Yield (persona, exchanges) of the conversations in (path, list name) pairs. Raises ValueError
    that names a record of another form, or a conversation whose turns are not together."""
    serial = itertools.count()

    def parse(record):
        """Return (id, persona, turns)."""
        persona = texts(record, "personality")
        if "utterances" in record:
            turns = [turn(utterance) for utterance in record["utterances"]]
            return ("", next(serial)), persona, turns
        return record["conv_id"], persona, [turn(record)]

    seen = set()  # ids
    records = itertools.chain.from_iterable(read_records(path, parse, name) for path, name in files)
    for conv_id, group in itertools.groupby(records, key=lambda record: record[0]):
        if conv_id in seen:
            raise ValueError(f"{files[0][0]}: the rows of conv_id {conv_id} are not together: sort")
        seen.add(conv_id)
        _, personas, turns = zip(*group, strict=True)
        turns = list(itertools.chain.from_iterable(turns))
        if turns:
            yield personas[0], exchanges(turns)


def turn(record):
    """Return (history, candidates) of a turn."""
    history = texts(record, "history")
    candidates = texts(record, "candidates")
    if not candidates:
        raise ValueError("candidates is empty, so there is no reply")
    return history, candidates


def texts(record, name):
    """Return a list of texts of a record. Raises ValueError if it is something else."""
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} is not a list of texts: {value!r:.40}")
    return value


def exchanges(turns):
    """Return (utterance, reply, candidates) triples from (history, candidates) pairs."""
    candidates_after = {len(history): candidates for history, candidates in turns}  # n texts
    history, candidates = max(turns, key=lambda pair: len(pair[0]))  # has all texts
    utterances = [parlai.unescape(text) for text in (*history, candidates[-1])]
    if len(utterances) % 2:
        utterances.insert(0, "")  # the bot begins
    triples = []
    for i in range(0, len(utterances), 2):
        n = len(history) + 2 + i - len(utterances)  # texts before the reply
        reply = utterances[i + 1]
        candidates = candidates_after.get(n, [])[:-1]  # without the reply
        if candidates:
            candidates = [*candidates, reply]
        triples.append((utterances[i], reply, candidates))
    return triples
