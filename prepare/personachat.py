"""PersonaChat, or ConvAI2's larger edition of it: python prepare/personachat.py [--source=PATH]

Without --source, PersonaChat is downloaded (223 MB). --source takes that archive or ConvAI2's, the folder unpacked from
it, or one of its files, which is then divided 95 to 5. The bot is the speaker whose persona the file gives ("self");
half of the conversations keep it, so that the model can do with one and without.
"""

import io
import random
import re
import tarfile
import zlib
from pathlib import Path

from corpus import Config, divide, existing, prepare

from configurator import run
from download import download

URL = "http://parl.ai/downloads/personachat/personachat.tgz"
SIZE, SHA256 = 223_221_886, "507cf8641d333240654798870ea584d854ab5261071c5e3521c20d8fa41d5622"
SILENCE = "__SILENCE__"  # ConvAI2: the other speaker begins


def read(lines, name):
    """Yield the conversations of a ParlAI file: lines "N your persona: ..." and "N utterance<TAB>reply[...]", where N
    is 1 on the first line of each. Raises ValueError naming the line that is neither."""
    coin = random.Random(1337)
    persona, turns = [], []

    def conversation():
        system = [{"role": "system", "content": " ".join(persona)}] if persona and coin.random() < 0.5 else []
        roles = ("user", "assistant")
        return system + [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns) if t and t != SILENCE]

    for number, line in enumerate(lines, 1):
        count, _, text = line.rstrip("\n").partition(" ")
        if count == "1":
            if any(turns[1::2]):
                yield conversation()
            persona, turns = [], []
        if count.isdigit() and (match := re.fullmatch(r"(your|partner's) persona: (.*)", text)):
            if match[1] == "your":
                persona.append(match[2])
        elif count.isdigit() and "\t" in text:
            turns += [turn.strip() for turn in text.split("\t")[:2]]
        else:
            expected = "'N your persona: ...' or 'N utterance<TAB>reply'"
            raise ValueError(f"{name}, line {number} is not {expected}: {line[:60]!r}")
    if any(turns[1::2]):
        yield conversation()


def files(source):
    """Yield (split, name, lines) of the "self" files with original personas, which an archive or folder has, or of the
    one file that `source` is. The split is "" where there is only one."""
    wanted = re.compile(r"(train|valid)_self_original(_no_cands)?\.txt")
    if source.is_file() and not tarfile.is_tarfile(source):
        with open(source, encoding="utf-8", errors="replace") as lines:
            yield "", source.name, lines
        return
    archive = tarfile.open(source) if source.is_file() else None  # noqa: SIM115
    paths = archive.getnames() if archive else source.rglob("*.txt")
    found = {}
    for path in sorted(paths, key=str):  # the file without candidates comes second, and is the shorter one to read
        if match := wanted.fullmatch(Path(path).name):
            found[match[1]] = path
    if not found:
        raise FileNotFoundError(f"{source} has no train_self_original.txt and no valid_self_original.txt")
    for split, path in found.items():
        split = split.removesuffix("id") if len(found) == 2 else ""
        with archive.extractfile(path) if archive else open(path, "rb") as file:
            yield split, str(path), io.TextIOWrapper(file, encoding="utf-8", errors="replace")


def dialog(messages):
    """Return what both sides of one dialog have in common, as text. ConvAI2 has each from both sides; the one in which
    the bot begins lacks the last utterance, for which it has no reply. Personas do not count."""
    said = [message["content"] for message in messages if message["role"] != "system"]
    return "\n".join(said[: (len(said) - 1) | 1])


def conversations(source):
    """Yield (split, messages) of all there is in `source`."""
    try:
        for split, name, lines in files(source):
            if split:
                for messages in read(lines, name):
                    yield split, messages
            else:
                yield from divide((dialog(messages), messages) for messages in read(lines, name))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{source} is cut short or damaged: {error}") from error


def main(config):
    if config.source:
        source = existing(config.source)
    else:
        source = download(URL, Path("data/downloads/personachat.tgz"), SIZE, SHA256)
    prepare(config, "personachat", conversations(source))


if __name__ == "__main__":
    run(main, Config)
