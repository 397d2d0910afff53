"""ParlAI's line format, in which PersonaChat and ConvAI2 are published."""

import io
import re
import tarfile
import zlib
from pathlib import Path


def dialogs(lines, name):
    """Yield (persona, exchanges) of each dialog: [sentence], [(utterance, reply, [candidate])].

    Lines are "N your persona: ..." and "N utterance<TAB>reply[<TAB><TAB>candidate|candidate...]";
    N is 1 where a dialog begins. Raises ValueError that names the line if it is neither.
    """
    persona = []  # sentences
    exchanges = []  # (utterance, reply, [candidate])
    for number, line in enumerate(lines, 1):
        count, _, text = line.rstrip("\n").partition(" ")
        if count == "1":  # ends the dialog before
            if exchanges:
                yield persona, exchanges
            persona = []
            exchanges = []

        # a sentence of a persona, or an exchange
        match = re.fullmatch("(your|partner's) persona: (.*)", text)
        if not count.isdigit() or not (match or "\t" in text):
            expected = "'N your persona: ...' or 'N utterance<TAB>reply'"
            raise ValueError(f"{name}, line {number} is not {expected}: {line[:60]!r}")
        if match is None:
            utterance, reply, *rest = (field.strip() for field in text.split("\t"))
            if utterance == "__SILENCE__":  # ConvAI2: the bot begins
                utterance = ""
            candidates = rest[-1].split("|") if rest else []
            exchanges.append((utterance, reply, list(filter(None, candidates))))
        elif match[1] == "your":  # the partner's persona is not the bot's
            persona.append(match[2])
    if exchanges:  # the last dialog
        yield persona, exchanges


def messages(exchanges):
    """Return exchanges as messages, without the empty ones, where a speaker said nothing."""
    turns = []
    for utterance, reply, _ in exchanges:
        turns.append({"role": "user", "content": utterance})
        turns.append({"role": "assistant", "content": reply})
    return [turn for turn in turns if turn["content"]]


def files(source, names=r"(train|valid)_self_original(_no_cands)?\.txt"):
    """Yield (split, name, lines) of the files with these names in an archive or a folder, or of
    `source` if it is such a file. split is "train", "val", or "" if there is only one file."""
    if source.is_file() and not tarfile.is_tarfile(source):
        with open(source, encoding="utf-8", errors="replace") as lines:
            yield "", source.name, lines
        return

    # list an archive, which reads it to the end and so finds damage, or a folder
    try:
        archive = tarfile.open(source) if source.is_file() else None  # noqa: SIM115
        paths = archive.getnames() if archive else map(str, source.rglob("*.txt"))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{source} is cut short or damaged: {error}") from error

    # the file without candidates sorts last and is shorter to read
    path_of = {}  # split -> path; "valid" is "val"
    for path in sorted(paths):
        if match := re.fullmatch(names, Path(path).name):
            path_of[match[1].removesuffix("id")] = path
    if not path_of:
        raise FileNotFoundError(f"{source} has no file like valid_self_original.txt")
    for split, path in path_of.items():
        with archive.extractfile(path) if archive else open(path, "rb") as file:
            # bytes -> text; damaged characters become U+FFFD
            lines = io.TextIOWrapper(file, "utf-8", "replace")
            name = f"{source}, {path}" if archive else path
            yield split if len(path_of) == 2 else "", name, lines
