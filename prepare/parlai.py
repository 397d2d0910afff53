"""ParlAI's line format, in which PersonaChat and ConvAI2 are published."""

import re
import tarfile
import zlib
from pathlib import Path

from prepare.records import open_bytes, text_lines

ESCAPES = {"\\n": "\n", "\\t": "\t", "__PIPE__": "|"}
SILENCE = re.compile("__ ?silence ?__", re.IGNORECASE)  # editions spell it differently
NAMES = r"(train|valid)_self_original(_no_cands)?\.txt"


def dialogs(lines, name):
    """Yield (persona, exchanges) of each dialog: [sentence], [(utterance, reply, [candidate])].

    A line is "N text" or "N text<TAB>reply[<TAB><TAB>candidate|candidate...]", where N is 1 if a
    dialog begins, or "text:...<TAB>labels:...", as ParlAI's scripts write it. The text is "your
    persona: ...", an utterance, or both with escaped newlines between them. Raises ValueError that
    names the line if it is something else.
    """
    persona = []  # sentences
    exchanges = []  # (utterance, reply, [candidate])
    ended = False  # whether the dialog ended with the line before
    for number, line in enumerate(lines, 1):
        text, *fields = line.rstrip("\r\n").split("\t")
        if not line.strip():  # ParlAI's scripts write a blank line after a dialog
            ended = True
            continue
        known = True  # whether the line has one of the two forms
        if text.startswith("text:"):
            values = dict(field.partition(":")[::2] for field in [text, *fields])
            begins = ended
            ended = "episode_done" in values
            text = values["text"]
            labels = values.get("labels", values.get("eval_labels", ""))
            label, _, _ = labels.partition("|")  # the first of several
            fields = [label, values.get("label_candidates", "")]
        else:
            count, space, text = text.partition(" ")
            begins = count == "1"
            known = space and count.isdigit()
        if begins:  # ends the dialog before
            if exchanges:
                yield persona, exchanges
            persona = []
            exchanges = []

        # sentences of a persona, then what is said
        spoken = []
        for part in unescape(text).split("\n"):
            match = re.fullmatch("(your|partner's) persona: (.*)", part)
            if match is None:
                spoken.append(part)
            elif match[1] == "your":  # the partner's persona is not the bot's
                persona.append(match[2])
        if not known or (spoken and not fields):
            expected = "'N your persona: ...' or 'N utterance<TAB>reply'"
            raise ValueError(f"{name}, line {number} is not {expected}: {line[:60]!r}")
        if fields:
            reply, *rest = map(unescape, fields)
            candidates = rest[-1].split("|") if rest else []
            exchanges.append(("\n".join(spoken), reply, list(filter(None, candidates))))
    if exchanges:  # the last dialog
        yield persona, exchanges


def unescape(text):
    """Return a field without ParlAI's escapes and its mark of silence."""
    for escape, meaning in ESCAPES.items():
        text = text.replace(escape, meaning)
    return SILENCE.sub("", text).strip()


def messages(exchanges):
    """Return exchanges as messages, without the empty ones, where a speaker said nothing."""
    turns = []
    for utterance, reply, _ in exchanges:
        turns.append({"role": "user", "content": utterance})
        turns.append({"role": "assistant", "content": reply})
    return [turn for turn in turns if turn["content"]]


def is_archive(path):
    """Return whether a file is a tar archive, also gzipped."""
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, zlib.error):  # cut short at its beginning; reading it says so
        return False


def files(source, names=NAMES):
    """Yield (split, name, lines) of the files with these names in an archive or a folder, or of
    `source` if it is such a file. split is "train", "val", or "" if there is only one file."""
    if source.is_file() and not is_archive(source):
        with open_bytes(source) as file:
            yield "", source.name, text_lines(file, source)
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
        with archive.extractfile(path) if archive else open_bytes(path) as file:
            name = f"{source}, {path}" if archive else path
            yield split if len(path_of) == 2 else "", name, text_lines(file, name)
