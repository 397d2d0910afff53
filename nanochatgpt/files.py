"""
Files from the network: resumed when cut, verified, and renamed into place only when whole.

`download` takes any URL; `hub_file` a file of a Hugging Face repository, which is often on this machine already.
"""

import contextlib
import errno
import hashlib
import os
import pickle
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import requests
import safetensors
import torch
import urllib3

TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
TRIES = 5  # failures in a row, none of which came further
WAIT = 1.0  # seconds before the second try, doubled before each later one
# Bodies are read from urllib3, one floor below requests, and what fails there has no common base with requests' errors.
TRANSIENT = (
    requests.ConnectionError,
    requests.Timeout,
    requests.HTTPError,
    urllib3.exceptions.HTTPError,
)


def download(
    url: str,
    path: Path | str,
    size: int | None = None,
    sha256: str | None = None,
    headers: dict | None = None,
) -> Path:
    """
    Fetch `url` into the file `path`, of `size` bytes and with that `sha256` where they are known. Return the path.

    A finished file is left as it is. What arrives goes to `path`.part, from where a later call resumes; without a hash,
    also from the hub, only the length tells whether that part belongs to the file.
    Raises ConnectionError (no network, or it keeps failing), FileNotFoundError (404), PermissionError (401, 403),
    ValueError (not the file expected), OSError (any other refusal, disk full).
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    old_part = part.exists()
    while not _is_finished(path, size):
        hub_sha256 = _fetch(url, part, size, headers or {})
        expected = sha256 or hub_sha256
        try:
            with part.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest() if expected else None
            if actual == expected:
                os.replace(part, path)
                break
            part.unlink()
        except (
            FileNotFoundError
        ):  # another process was fetching the same file and has renamed our part
            continue
        if not old_part:
            raise ValueError(
                f"{url} is not the file expected: sha256 {actual[:12]}… instead of {expected[:12]}…\n"
                f"it changed at its source or was altered on the way: place the right file at {path}"
            )
        old_part = (
            False  # it may have been of another version of the file: once more, from the start
        )
    return path


def hub_file(
    repo: str, name: str, size: int | None = None, sha256: str | None = None, kind: str = "models"
) -> Path:
    """
    Return the path of file `name` of `repo` ("org/name") on the Hugging Face hub; `kind` is "models" or "datasets".

    Looks in transformers' cache, then in ours, then downloads into ours; `size`, `sha256` and errors as in `download`.
    HF_HUB_CACHE, HF_HOME, HF_ENDPOINT (a mirror), HF_TOKEN and HF_HUB_OFFLINE mean what they mean to transformers.
    """
    env = os.environ
    # os.path's, since Path's raises where there is no such home, as for a user that a container knows by number only
    cache = Path(os.path.expanduser(env.get("XDG_CACHE_HOME") or "~/.cache"))
    hub = env.get("HF_HUB_CACHE") or os.path.join(
        env.get("HF_HOME") or cache / "huggingface", "hub"
    )
    hub = Path(os.path.expanduser(hub))
    # Until 2024 gpt2 and distilgpt2 had no organisation, and from_pretrained("gpt2") still caches under that name.
    short = repo.removeprefix("openai-community/").removeprefix("distilbert/")
    for alias in (repo, short):
        folder = hub / f"{kind}--{alias.replace('/', '--')}"
        if (main := folder / "refs" / "main").exists():
            snapshots = [folder / "snapshots" / main.read_text().strip()]
        else:
            snapshots = sorted(folder.glob("snapshots/*"), key=os.path.getmtime, reverse=True)
        for snapshot in snapshots:
            if _is_finished(snapshot / name, size):
                return snapshot / name

    path = cache / "nanochatgpt" / kind / repo / name
    if not _is_finished(path, size) and env.get("HF_HUB_OFFLINE", "").lower() in (
        "1",
        "true",
        "yes",
        "on",
    ):
        raise FileNotFoundError(
            f"{repo}/{name} is not on this machine and HF_HUB_OFFLINE forbids fetching it\n"
            f"looked in {hub} and for {path}: unset HF_HUB_OFFLINE, or place the file there"
        )
    endpoint = (env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo}/resolve/main/{name}"
    # requests drops this header when the hub redirects to the host that stores the file.
    headers = (
        {"Authorization": f"Bearer {env['HF_TOKEN'].strip()}"} if env.get("HF_TOKEN") else None
    )
    return download(url, path, size, sha256, headers)


def _is_finished(path, size):
    # Verified before it was renamed to this name; hashing gigabytes again at every start would take seconds.
    return path.is_file() and size in (None, path.stat().st_size)


def _length(part):
    return part.stat().st_size if part.exists() else 0


def _fetch(url, part, size, headers):
    """Complete `part`, however often the network fails. Return the sha256 that the hub names, or None."""
    host = urlsplit(url).netloc
    longest = _length(part)
    failures = 0
    reached = False
    while True:
        try:
            return _receive(url, part, size, headers)
        except TRANSIENT as error:
            reason = _reason(error)
            # a name that does not resolve, a refused connection, a proxy or a certificate that fails
            unreachable = isinstance(error.args[0], urllib3.exceptions.MaxRetryError)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"disk full while writing {part}\nfree space and run again: it resumes"
            ) from None
        # Progress is to be longer than ever: a server without ranges, cut at each try, would keep us here for good.
        failures = 1 if _length(part) > longest else failures + 1
        longest = max(longest, _length(part))
        reached = reached or not unreachable
        if failures == TRIES or not reached:  # waiting is for a network that was there
            raise ConnectionError(
                f"{'cannot reach' if unreachable else 'cannot fetch from'} {host}: {reason}\n"
                f"check the network or proxy and run again, or place the file at {part.with_suffix('')}"
                " (corpora: or pass --source=FILE)"
            )
        wait = WAIT * 2 ** (failures - 1)
        print(f"{host}: {reason}; trying again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def _receive(url, part, size, headers):
    """Ask once for what `part` lacks and append it. Raises one of TRANSIENT where another try may help."""
    have = _length(part)
    asked = headers | {
        "Accept-Encoding": "identity"
    }  # lengths and offsets are those of the stored bytes
    if have:
        asked["Range"] = f"bytes={have}-"
    with requests.get(url, headers=asked, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status == 404:
            raise FileNotFoundError(f"{url} does not exist (404): check its name")
        if status in (401, 403):
            raise PermissionError(
                f"{url} is gated or private, or misspelt ({status}): check its name, set HF_TOKEN"
            )
        if status == 429 or status >= 500:
            raise requests.HTTPError(f"{status} {response.reason}")
        if status not in (200, 206) and not (have and status == 416):
            raise OSError(
                f"{url} is refused: {status} {response.reason}\nplace the file at {part.with_suffix('')}"
            )

        content_range = response.headers.get(
            "Content-Range", ""
        )  # 206: "bytes 100-299/300", 416: "bytes */300"
        total = (
            response.headers.get("Content-Length", "")
            if status == 200
            else content_range.rpartition("/")[2]
        )
        total = int(total) if total.isdigit() else size
        if size not in (None, total):  # before a captive portal's page overwrites a good part
            raise ValueError(
                f"{url} is not the file expected: {total:,} bytes instead of {size:,}\n"
                f"check the network (a login page?), or place the right file at {part.with_suffix('')}"
            )
        # The hub names the sha256 of a large file where it redirects to the storage (a shorter hash is another kind).
        etags = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in response.history]
        hub_sha256 = next((etag for etag in etags if len(etag) == 64), None)
        if status == 416 and have == total:  # nothing is missing
            return hub_sha256
        if have and status != 200 and not content_range.startswith(f"bytes {have}-"):
            part.unlink()
            return _receive(url, part, size, headers)
        if status == 200:
            have = 0  # the whole file, whatever was asked for
        part.parent.mkdir(parents=True, exist_ok=True)
        # "r+b", not "ab": two processes that fetch one file write the same bytes to the same places.
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            # raw: requests would unpack what is labelled Content-Encoding: gzip, as Apache labels every .tgz.
            chunks = response.raw.stream(1 << 16, decode_content=False)
            for chunk in _with_progress(chunks, part.stem, have, total):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            if total not in (None, file.tell()):
                raise requests.ConnectionError(f"{file.tell():,} bytes came instead of {total:,}")
    return hub_sha256


def _with_progress(chunks, name, have, total):
    """
    Pass `chunks` on and show on stderr how far they are, beyond the `have` bytes from before, of `total` (or None).
    One line: redrawn five times a second on a terminal, else printed at the start and at the end.
    """
    terminal = sys.stderr.isatty()
    began = drawn = time.monotonic()
    done = have

    def draw():
        speed = (done - have) / max(time.monotonic() - began, 1e-3)  # bytes a second
        line = f"{name}: {done / 1e6:.1f} MB at {speed / 1e6:.1f} MB/s"
        if total:
            line += f", {done / total:.0%} of {total / 1e6:.1f} MB"
        if total and speed:
            line += f", {timedelta(seconds=int((total - done) / speed))} left"
        if terminal:
            width = shutil.get_terminal_size().columns - 1
            line = "\r" + line[:width].ljust(width)
        print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    draw()
    try:
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            if terminal and time.monotonic() - drawn > 0.2:
                drawn = time.monotonic()
                draw()
        draw()
    finally:
        if terminal:
            print(file=sys.stderr)


def _reason(error):
    """What went wrong in a few words, from under the wrappings of requests and urllib3."""
    while isinstance(inner := getattr(error, "reason", None) or error.args[-1], Exception):
        error = inner
    return str(inner if isinstance(inner, str) else error).rpartition("): ")[2]


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to; what was written there then takes the place of `path` at one instant, or not at all.

    Raises OSError, with the path, where it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (
        safetensors.SafetensorError,
        RuntimeError,
    ) as error:  # how these and torch tell of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def load_tensors(path):
    """Return what torch.save wrote to `path`, if it is tensors and plain values. Raises ValueError if it is not."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code: not loaded"
        ) from error
    except Exception as error:  # of whatever kind: the unpickler promises none for damaged bytes
        raise ValueError(
            f"{path} is damaged or cut short ({error}); fetch or save it again"
        ) from error
