"""Read text and files of records, one line or record in memory at a time."""

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import ijson

from prepare.corpus import divide, existing
from prepare.ways import Way, fetch

PARQUET = b"PAR1"  # its first bytes
CONVERT_TABLE = "read it with `python prepare/hub.py --dataset=FILE`"
FOREIGN = {  # first bytes -> what to do about it
    codecs.BOM_UTF32_LE: "it is UTF-32: save it as UTF-8",
    codecs.BOM_UTF16_LE: "it is UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "it is UTF-16: save it as UTF-8",
    PARQUET: f"it is Parquet: {CONVERT_TABLE}",
    b"ARROW1": f"it is Arrow: {CONVERT_TABLE}",
    b"\xff\xff\xff\xff": f"it is Arrow: {CONVERT_TABLE}",  # as `datasets` saves it
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it with `zstd -d`",
    b"\xfd7zXZ": "it is compressed by xz: unpack it with `xz -d`",
    b"BZh": "it is compressed by bzip2: unpack it with `bzip2 -d`",
    b"\x1f\x8b": "it is compressed twice: unpack it with `gzip -d`",  # once is read
    b"PK\x03\x04": "it is a zip file: unpack it",
    b"version https://git-lfs": "it is a Git LFS pointer: fetch the file with `git lfs pull`",
}
BLANK = object()  # in place of the record of a blank line
CONVERT = "convert it with `iconv -f ENCODING -t utf-8`"
DAMAGE = (ijson.JSONError, csv.Error, gzip.BadGzipFile, zlib.error, EOFError, RecursionError)


def find_file(source, repo, file, mirror=""):
    """Return the path of a corpus's file: `source`, in the folder `source`, or downloaded if source
    is "", from `repo` on the Hugging Face hub or else from the folder `mirror` on the web. file: a
    File."""
    if not source:
        ways = [Way("the Hugging Face hub", [file], repo=repo)]
        if mirror:
            ways.append(Way(urlsplit(mirror).netloc, [file], url=mirror))
        return fetch(ways)[0]
    path = existing(source)
    return existing(path / Path(file.name).name) if path.is_dir() else path


def published(source, repo, files, read, mirror=""):
    """Yield (split, example) of a corpus; read(path) yields (key, example). files: {split: File in
    `repo` or `mirror`}. If source is a file, it is divided by key."""
    if Path(source).is_file():
        yield from divide(read(Path(source)))
        return
    for split, file in files.items():
        for _, example in read(find_file(source, repo, file, mirror)):
            yield split, example


class NotText(ValueError):
    """A file is not UTF-8 text; the message names the place and the remedy."""


def open_bytes(path):
    """Return a file of UTF-8 text, maybe gzipped, opened for bytes, without a byte-order mark.
    Raises NotText that names what else it is."""
    file = open(path, "rb")  # noqa: SIM115
    if file.peek(2).startswith(b"\x1f\x8b"):
        file = gzip.open(file)  # noqa: SIM115
    try:
        head = file.peek(64)
    except DAMAGE as error:
        raise NotText(f"{path} is damaged: {error}") from error
    for magic, problem in FOREIGN.items():
        if head.startswith(magic):
            raise NotText(f"{path}: {problem}")
    if b"\0" in head[:4]:
        raise NotText(f"{path}: it is UTF-16, or not text: save it as UTF-8")
    if head.startswith(codecs.BOM_UTF8):
        file.read(3)
    return file


def is_parquet(path):
    """Return whether a file is Parquet."""
    with open(path, "rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def is_csv(path):
    return path.name.lower().removesuffix(".gz").endswith(".csv")


def parquet_batches(file, path, first_group=0):
    """Yield ([row], next row group) of a Parquet file, 100 rows in memory at a time, from a row
    group on. The next row group is None as long as this one goes on."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise NotText(f"{path}: it is Parquet: to read it, pip install -e '.[hub]'") from error
    try:
        # without these, a row group is read as a whole
        table = ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)  # bytes
        for group in range(first_group, table.num_row_groups):
            for batch in table.iter_batches(100, row_groups=[group]):
                yield batch.to_pylist(), None
            yield [], group + 1
    except (pyarrow.ArrowException, OSError) as error:  # OSError does not name the file
        raise ValueError(error) from error


def text_lines(file, name):
    """Yield the lines of a file of bytes as text. Raises NotText."""
    for number in itertools.count(1):
        try:
            line = next(file)
        except StopIteration:
            return
        except DAMAGE as error:
            raise NotText(f"{name}, line {number:,} is damaged: {error}") from error
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            place = f"line {number:,}, byte {error.start + 1} (0x{line[error.start]:02x})"
            raise NotText(f"{name}, {place}: it is not UTF-8; {CONVERT}") from error
        if "\0" in text or "\x1b$" in text:
            problem = "it has NUL bytes or escape sequences, as UTF-16 and ISO-2022 have"
            raise NotText(f"{name}, line {number:,}: {problem}: save it as UTF-8")
        yield from io.StringIO(text, newline="") if "\r" in text else [text]  # \r ends lines too


def is_pretty_printed(head):
    """Return whether a file that begins with these bytes has JSON objects over several lines."""
    first, *rest = head.split(b"\n", 2)
    if not rest or (first.rstrip().endswith(b"}") and rest[0].startswith(b"{")):
        return False
    try:
        json.loads(first)
    except ValueError:
        return head.startswith(b"{")
    return False


def read_records(path, parse, list_name=""):
    """Yield parse(record) for each record of a file: Parquet, or, also gzipped, a .csv with column
    names, a JSON list, or JSON objects, one per line or pretty-printed. list_name: read this list
    of a JSON object instead; a table is the list "train". Records for which `parse` returns None
    are left out and counted. Raises ValueError that names the first record that is damaged or that
    `parse` cannot use."""
    number = 1  # of the current record or line
    unit = "record"
    n_records = 0
    n_left_out = 0
    try:
        parquet = is_parquet(path)
        if (parquet or is_csv(path)) and list_name not in ("", "train"):
            return
        with open(path, "rb") if parquet else open_bytes(path) as file:
            # choose the reader
            head = file.peek(1).lstrip()
            if parquet:
                records = (row for rows, _ in parquet_batches(file, path) for row in rows)
            elif is_csv(path):
                records = csv.DictReader(text_lines(file, path), restval="")  # of a short row
            elif list_name:
                records = ijson.items(file, f"{list_name}.item", use_float=True)
            elif head.startswith(b"["):
                records = ijson.items(file, "item", use_float=True)
            elif is_pretty_printed(head):
                records = ijson.items(file, "", use_float=True, multiple_values=True)
            else:
                unit = "line"
                lines = text_lines(file, path)
                records = (json.loads(line) if line.strip() else BLANK for line in lines)
            for record in records:  # one in memory at a time
                if record is BLANK:
                    number += 1
                    continue
                if not isinstance(record, dict):
                    raise ValueError(f"it is not an object: {record!r:.40}")
                example = parse(record)
                n_records += 1
                if example is None:
                    n_left_out += 1
                else:
                    yield example
                number += 1
            if n_left_out:
                print(f"{path}: {n_left_out:,} of {n_records:,} records left out")
    except NotText:
        raise
    except (*DAMAGE, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        if reason.startswith("b'"):  # ijson quotes bytes that are not UTF-8
            reason = f"it is not UTF-8; {CONVERT}"
        reason = reason.partition("\n")[0]  # ijson draws a picture below it
        place = f"{unit} {number:,}" + (f" of {list_name}" if list_name else "")
        raise ValueError(f"{path}, {place}: {reason}") from error


def merge_turns(utterances, bot):
    """Return (speaker, text) pairs as messages; what one side says in a row is one message. `bot`
    is the speaker who is the assistant."""
    messages = []
    for is_bot, group in itertools.groupby(utterances, key=lambda pair: pair[0] == bot):
        content = " ".join(text for _, text in group)
        messages.append({"role": "assistant" if is_bot else "user", "content": content})
    return messages
