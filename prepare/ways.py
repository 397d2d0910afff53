"""The places on the web that have a corpus, asked in turn until one gives it."""

import sys
from pathlib import Path
from typing import NamedTuple

from nanochatgpt.files import NO_PAGE, SlowServer, download, is_finished
from nanochatgpt.hub import hub_file, hub_path


class File(NamedTuple):
    name: str  # in its folder or repository
    size: int | None = None  # bytes; None if unknown
    sha256: str | None = None
    begins: bytes = NO_PAGE  # regular expression of its first bytes


class Way(NamedTuple):
    """A place that has a corpus: a repository of the Hugging Face hub, or a folder on the web."""

    title: str  # in messages
    files: list  # File
    repo: str = ""  # "org/name" on the hub, or
    url: str = ""  # of the folder


def fetch(ways):
    """Return the paths of the files of one way: of the first that is here already, else of the
    first that can be downloaded. A way that is down or slow is passed over while another is left;
    the last has all the patience of `download`, and after it those that were slow. Raises
    ConnectionError that names the problems and the remedies."""
    for way in ways:
        if all(is_finished(place(way, file), file.size) for file in way.files):
            return chosen(way, ways)

    attempts = list(ways)
    problems = []
    for number, way in enumerate(attempts, 1):
        try:
            for file in way.files:
                fetch_file(way, file, hurry=number < len(ways))
            return chosen(way, ways)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:  # of this machine, such as a full disk
                raise
            if isinstance(error, SlowServer):
                attempts.append(way)  # better than none
            problem = str(error).partition("\n")[0]
            problems.append(problem)
            if number < len(attempts):
                line = f"{problem}: passed over {way.title}, next is {attempts[number].title}"
                print(line, file=sys.stderr)

    remedy = "check the network or proxy, pass the file as --source=PATH"
    if any(way.repo for way in ways):
        remedy += ", set HF_ENDPOINT to a mirror of the hub"
    places = [" and ".join(str(place(way, file)) for file in way.files) for way in ways]
    remedy += f", or place {' or '.join(places)}"
    raise ConnectionError(f"{'; '.join(dict.fromkeys(problems))}\n{remedy}")


def chosen(way, ways):
    """Return the paths of a way's files; say which way it is if there are several."""
    paths = [place(way, file) for file in way.files]
    if len(ways) > 1:
        print(f"from {way.title}: {', '.join(map(str, paths))}")
    return paths


def place(way, file):
    """Return the path at which a file of a way is, or will be."""
    if way.repo:
        return hub_path(way.repo, file.name, file.size, "datasets")
    return Path("data/downloads") / Path(file.name).name


def fetch_file(way, file, hurry):
    """Download a file of a way, unless it is here."""
    checks = {"size": file.size, "sha256": file.sha256, "begins": file.begins, "hurry": hurry}
    if way.repo:
        hub_file(way.repo, file.name, kind="datasets", **checks)
    else:
        download(f"{way.url}/{file.name}", place(way, file), **checks)
