"""Downloads that resume and are verified; writes that happen completely or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests
import safetensors
import urllib3

TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
TRIES = 5  # attempts in a row without progress before giving up
HURRY_TIMEOUT = (3, 5)  # the same while there is another server to ask
SLOW = 100_000  # bytes per second; 200 MB would take more than half an hour
WINDOW = 5  # seconds over which the rate is measured
NO_PAGE = rb"(?!\s*<(!doctype|html))"  # a web page may come in place of the file


class SlowServer(ConnectionError):
    """A download in a hurry is slower than SLOW."""


def download(url, path, size=None, sha256=None, begins=NO_PAGE, headers=None, hurry=False):
    """Download `url` to the file `path`, unless it exists; return the path.

    The bytes go to path.part, which a later call resumes; it is renamed once its size (bytes),
    sha256 and first bytes (a regular expression) are right. hurry: another server may be asked, so
    give up one that is down, silent or slow within seconds. Raises ConnectionError, SlowServer,
    FileNotFoundError (404), PermissionError (401, 403), ValueError (wrong file), OSError (disk
    full).
    """
    path = Path(path)
    if is_finished(path, size):
        return path
    part = path.with_name(path.name + ".part")
    failures = 0  # attempts in a row that brought no new bytes
    while True:
        length = _length(part)
        try:
            _receive(url, part, headers or {}, hurry)
            break
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            failures = 1 if _length(part) > length else failures + 1
            reason = str(error).rpartition(": ")[2].rstrip("\"')")  # without urllib3's wrapping
            problem = f"cannot fetch from {urlsplit(url).netloc}: {reason}"
            # retry a flaky connection; give up at once if there is none
            no_network = failures == 1 and isinstance(error, requests.ConnectionError)
            in_vain = hurry and _length(part) == length
            if failures == TRIES or no_network or in_vain:
                remedy = f"check the network or proxy and run again, or place the file at {path}"
                raise ConnectionError(f"{problem}\n{remedy}") from error
        print(f"{problem}; trying again in {2**failures} s", file=sys.stderr)
        time.sleep(2**failures)  # seconds

    # keep only the right file: not another version, nor a network's login page
    with part.open("rb+") as file:
        os.fsync(file.fileno())  # on the disk before it gets its name
        is_wrong = not re.match(begins, file.read(1000), re.IGNORECASE)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
    if is_wrong or digest != sha256 or size not in (None, _length(part)):
        part.unlink()
        remedy = f"run again to download it anew, or place the right file at {path}"
        raise ValueError(f"{url} has the wrong size, sha256 or first bytes\n{remedy}")
    part.replace(path)
    return path


def _receive(url, part, headers, hurry):
    """Request the bytes that `part` lacks, once, and append them."""
    done = _length(part)  # bytes
    headers = headers | {"Accept-Encoding": "identity"}  # the bytes as they are stored
    if done:
        headers["Range"] = f"bytes={done}-"
    timeout = HURRY_TIMEOUT if hurry else TIMEOUT
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        if status == 404:
            raise FileNotFoundError(f"{url} does not exist (404): check the name")
        if status in (401, 403):
            raise PermissionError(f"{url} is private or misspelt ({status}): set HF_TOKEN")
        if status == 416:  # part is longer than the file: start again
            part.unlink(missing_ok=True)
        if status not in (200, 206):  # `download` tries again
            raise requests.HTTPError(f"{status} {response.reason}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            place = part.with_name(part.name.removesuffix(".part"))
            remedy = f"log in to the network if it asks for that, or place the file at {place}"
            raise ValueError(f"{url} is a web page, not the file\n{remedy}")
        if status == 200:  # the whole file, from a server without ranges
            done = 0

        # append the bytes
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None  # bytes of the whole file
        part.parent.mkdir(parents=True, exist_ok=True)
        with naming(part), part.open("ab" if done else "wb") as file:
            # raw: requests would unpack a .tgz that is labelled Content-Encoding: gzip
            chunks = response.raw.stream(1 << 16, decode_content=False)
            if hurry:
                chunks = _fast_chunks(response)
            for chunk in _with_progress(chunks, part.stem, done, total):
                file.write(chunk)
        if total not in (None, _length(part)):
            raise requests.HTTPError(f"{_length(part):,} bytes instead of {total:,}")


def _fast_chunks(response):
    """Yield the bytes of a response as they arrive. Raises SlowServer if a window has too few."""
    start = time.monotonic()  # of the window
    n_bytes = 0  # in it
    while chunk := response.raw.read1(1 << 16, decode_content=False):  # waits for one byte only
        yield chunk
        n_bytes += len(chunk)
        seconds = time.monotonic() - start
        if seconds > WINDOW:
            rate = n_bytes / seconds
            if rate < SLOW:
                host = urlsplit(response.url).netloc
                raise SlowServer(f"{host} sends {rate / 1000:.1f} kB/s, which is slow")
            start += seconds
            n_bytes = 0


def _with_progress(chunks, name, done, total):
    """Yield `chunks` and print the progress five times a second, in a log twice a minute."""
    terminal = sys.stderr.isatty()
    next_time = 0  # of a line, in seconds
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if time.monotonic() > next_time or done == total:
            next_time = time.monotonic() + (0.2 if terminal else 30)  # seconds
            line = f"{name}: {done / 1e6:.1f}" + (f" of {total / 1e6:.1f} MB" if total else " MB")
            end = "\r" if terminal and done != total else "\n"
            print(f"{line:<70}", end=end, file=sys.stderr, flush=True)


def is_finished(path, size):
    """Return whether a file is there, with this size in bytes if it is known."""
    return path.is_file() and size in (None, path.stat().st_size)


def _length(part):
    return part.stat().st_size if part.exists() else 0


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to; rename it to `path` at the end, or remove it after an error.
    Raises OSError, with the path, if writing fails."""
    part = path.with_name(path.name + ".part")
    try:
        with naming(path):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())  # on the disk before it gets its name
            part.replace(path)
    except (safetensors.SafetensorError, RuntimeError) as error:  # how they report a full disk
        reason = f"the disk may be full ({str(error).splitlines()[0]})"
        raise OSError(errno.ENOSPC, reason, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path):
    """Add the path to an OSError that lacks it, such as disk full."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def check_format(path):
    """Raise ValueError if the file is a Git LFS pointer or GGUF, OSError if it cannot be read."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull")
    if start.startswith(b"GGUF"):
        remedy = "pass the Hugging Face directory that it was converted from"
        raise ValueError(f"{path} is a GGUF file, llama.cpp's format: {remedy}")


def read_json(path):
    """Return the JSON object in a file. Raises ValueError if it is damaged."""
    check_format(path)
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load_tensors(path, mmap=False):
    """Return what torch.save wrote to `path`; mmap: leave tensors on the disk until they are used.
    Raises ValueError if that is not tensors and plain values: anything else could run code."""
    import torch  # here, because those who prepare data need no 200 MB of it

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes raise errors of many types
        reason = f"damaged or holds more than tensors ({type(error).__name__})"
        raise ValueError(f"{path} is {reason}: not loaded") from error
