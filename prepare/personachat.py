"""PersonaChat, or ConvAI2's larger edition of it: python prepare/personachat.py [--source=PATH]

Without --source, PersonaChat is downloaded (223 MB). --source takes that archive or ConvAI2's, the folder unpacked from
it, or one of its files, which is then divided 95 to 5. The bot is the speaker whose persona the file gives ("self");
half of the conversations keep it, so that the model can do with one and without.
"""

import io
import random
import re
import sys
import tarfile
import zlib
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from nanochatgpt.files import download
from prepare.corpus import Config, divide, existing, prepare

URL = "http://parl.ai/downloads/personachat/personachat.tgz"
SIZE, SHA256 = 223_221_886, "507cf8641d333240654798870ea584d854ab5261071c5e3521c20d8fa41d5622"
SILENCE = "__SILENCE__"  # ConvAI2: the other speaker begins


def dialogs(lines, name):
    """Yield (persona, exchanges) of a ParlAI file: [sentence], [(utterance, reply, [candidate])]; either may be "".

    Lines are "N your persona: ..." and "N utterance<TAB>reply[<TAB><TAB>candidate|candidate|...]", where N is 1 on the
    first one of each dialog. Raises ValueError naming the line that is neither.
    """
    persona, exchanges = [], []
    for number, line in enumerate(lines, 1):
        count, _, text = line.rstrip("\n").partition(" ")
        if count == "1":
            if exchanges:
                yield persona, exchanges
            persona, exchanges = [], []
        if count.isdigit() and (match := re.fullmatch(r"(your|partner's) persona: (.*)", text)):
            if match[1] == "your":
                persona.append(match[2])
        elif count.isdigit() and "\t" in text:
            said, reply, *others = (field.strip() for field in text.split("\t"))
            candidates = [candidate for candidate in (others or [""])[-1].split("|") if candidate]
            exchanges.append(("" if said == SILENCE else said, reply, candidates))
        else:
            expected = "'N your persona: ...' or 'N utterance<TAB>reply'"
            raise ValueError(f"{name}, line {number} is not {expected}: {line[:60]!r}")
    if exchanges:
        yield persona, exchanges


def read(lines, name):
    """Yield the conversations of a ParlAI file, half of them with the bot's persona."""
    coin = random.Random(1337)
    for persona, exchanges in dialogs(lines, name):
        if any(reply for _, reply, _ in exchanges):
            system = (
                [{"role": "system", "content": " ".join(persona)}]
                if persona and coin.random() < 0.5
                else []
            )
            yield system + messages(exchanges)


def messages(exchanges):
    """Return exchanges as messages, without those in which nothing is said."""
    turns = (
        (role, text)
        for said, reply, _ in exchanges
        for role, text in (("user", said), ("assistant", reply))
    )
    return [{"role": role, "content": text} for role, text in turns if text]


def files(source, wanted=r"(train|valid)_self_original(_no_cands)?\.txt"):
    """Yield (split, name, lines) of the files of these names, which an archive or folder has, or of the one file that
    `source` is: the "self" ones with original personas. The split is "" where there is only one."""
    wanted = re.compile(wanted)
    if source.is_file() and not tarfile.is_tarfile(source):
        with open(source, encoding="utf-8", errors="replace") as lines:
            yield "", source.name, lines
        return
    archive = tarfile.open(source) if source.is_file() else None  # noqa: SIM115
    paths = archive.getnames() if archive else source.rglob("*.txt")
    found = {}
    for path in sorted(
        paths, key=str
    ):  # the file without candidates comes second, and is the shorter one to read
        if match := wanted.fullmatch(Path(path).name):
            found[match[1]] = path
    if not found:
        raise FileNotFoundError(
            f"{source} has none of PersonaChat's files, as valid_self_original.txt"
        )
    for split, path in found.items():
        split = split.removesuffix("id") if len(found) == 2 else ""
        with archive.extractfile(path) if archive else open(path, "rb") as file:
            yield split, str(path), io.TextIOWrapper(file, encoding="utf-8", errors="replace")


def examples(source, max_dialogs=0):
    """Return [(persona, messages so far, the reply, [candidate])] of the lines of a validation file, or of the one in
    an archive or folder; of the first `max_dialogs` dialogs, if not 0. Of the candidates the last is the reply.

    Raises ValueError where a line's candidates lack the reply, FileNotFoundError where there is no such file.
    """
    found = []
    with readable(source):
        for _, name, lines in files(source, r"(valid)_self_original\.txt"):
            for number, (persona, exchanges) in enumerate(dialogs(lines, name), 1):
                for i, (said, reply, candidates) in enumerate(exchanges):
                    if candidates and candidates[-1] != reply:
                        raise ValueError(
                            f"{name}, dialog {number}: the last candidate is not the reply, {reply!r:.60}"
                        )
                    if reply:
                        before = messages([*exchanges[:i], (said, "", [])])
                        found.append((" ".join(persona), before, reply, candidates))
                if number == max_dialogs:
                    break
    if not found:
        raise ValueError(f"{source} has no reply")
    return found


@contextmanager
def readable(source):
    """Raise ValueError, with its name, for an archive that is cut or damaged."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{source} is cut short or damaged: {error}") from error


def dialog(conversation):
    """Return what both sides of one dialog have in common, as text. ConvAI2 has each from both sides; the one in which
    the bot begins lacks the last utterance, for which it has no reply. Personas do not count."""
    said = [message["content"] for message in conversation if message["role"] != "system"]
    return "\n".join(said[: (len(said) - 1) | 1])


def conversations(source):
    """Yield (split, messages) of all there is in `source`."""
    with readable(source):
        for split, name, lines in files(source):
            if split:
                for conversation in read(lines, name):
                    yield split, conversation
            else:
                yield from divide(
                    (dialog(conversation), conversation) for conversation in read(lines, name)
                )


def main(config):
    if config.source:
        source = existing(config.source)
    else:
        source = download(URL, Path("data/downloads/personachat.tgz"), SIZE, SHA256)
    prepare(config, "personachat", conversations(source))


if __name__ == "__main__":
    run(main, Config)
