"""Downloads from a server on this machine that misbehaves on command; atomic writes; safe reads."""

import errno
import gzip
import hashlib
import os
import random
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import largest_file
from safetensors.torch import save_file

from nanochatgpt import files
from nanochatgpt.files import SlowServer, download, load_tensors, replacing
from nanochatgpt.hub import hub_file

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `bodies` {path: bytes}, with ranges, and keeps the headers of each request in `seen`.

    Each request takes the next of `faults`: None, a status to answer, "stall" (no answer in time),
    "drip" (2 kB per second), or a number of bytes after which the connection is cut.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies = {"/file.bin": BODY}
        self.redirects = {}
        self.faults = []
        self.seen = []
        self.ranges = True
        self.lengths = True
        self.extra_headers = {}
        self.stalled = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.file_url = self.url + "/file.bin"
        serve = {"poll_interval": 0.01}
        threading.Thread(target=self.serve_forever, kwargs=serve, daemon=True).start()

    def close(self):
        self.stalled.set()
        self.shutdown()
        self.server_close()

    @property
    def requested_ranges(self):
        return [headers["Range"] for headers in self.seen]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.seen.append(self.headers)
        fault = server.faults.pop(0) if server.faults else None
        if fault == "stall":
            return server.stalled.wait(5)
        if self.path in server.redirects:
            return self.answer(302, {"Location": server.redirects[self.path]})
        body = server.bodies.get(self.path)
        if body is None or (isinstance(fault, int) and 400 <= fault < 600):
            return self.answer(fault or 404, {})
        status = 200
        headers = dict(server.extra_headers)
        if server.ranges and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        if server.lengths:
            headers["Content-Length"] = str(len(body))
        self.answer(status, headers)
        if fault == "drip":
            for start in range(0, 20_000, 100):
                self.wfile.write(body[start : start + 100])
                if server.stalled.wait(0.05):
                    break
            return None
        self.wfile.write(body[:fault])  # HTTP/1.0: returning closes the connection

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path):
    """No proxy, credentials or caches of whoever runs the tests; waits are noted, not taken."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    return waits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "file.bin"


@pytest.fixture
def part(path):
    """The part of an interrupted download, to be filled by the test."""
    path.parent.mkdir()
    return path.with_name("file.bin.part")


def closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# --- the ordinary case ----------------------------------------------------------------------------


def test_a_file_is_fetched_verified_and_nothing_else_left(server, path):
    assert download(server.file_url, str(path), size=len(BODY), sha256=SHA256) == path
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert server.requested_ranges == [None]


def test_size_hash_and_content_length_may_be_unknown(server, path):
    server.lengths = False
    assert download(server.file_url, path).read_bytes() == BODY


def test_an_empty_file_is_a_file(server, path):
    server.bodies["/empty"] = b""
    assert download(server.url + "/empty", path).read_bytes() == b""


def test_a_finished_file_is_returned_without_the_network(server, path):
    path.parent.mkdir()
    path.write_bytes(b"here already")
    assert download(server.file_url, path, sha256=SHA256).read_bytes() == b"here already"
    assert download(server.file_url, path, size=12).read_bytes() == b"here already"
    assert server.seen == []


def test_a_file_of_another_size_is_fetched_again(server, path):
    path.parent.mkdir()
    path.write_bytes(b"an older version")
    assert download(server.file_url, path, size=len(BODY)).read_bytes() == BODY


def test_a_gz_file_stays_packed_even_if_the_server_labels_it_as_encoded(server, path):
    server.bodies["/file.bin"] = packed = gzip.compress(BODY)
    server.extra_headers = {"Content-Encoding": "gzip"}
    downloaded = download(server.file_url, path, size=len(packed), headers={"X-Test": "yes"})
    assert downloaded.read_bytes() == packed
    assert server.seen[0]["Accept-Encoding"] == "identity"
    assert server.seen[0]["X-Test"] == "yes"


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, len(BODY)])
def test_the_part_of_an_earlier_run_is_resumed(server, path, part, size):
    part.write_bytes(BODY[:100_000])
    assert download(server.file_url, path, size=size, sha256=SHA256).read_bytes() == BODY
    assert server.requested_ranges == ["bytes=100000-"]
    assert not part.exists()


@pytest.mark.parametrize("length", [100_000, len(BODY), len(BODY) + 9])
def test_a_server_without_ranges_sends_the_whole_file(server, path, part, length):
    server.ranges = False
    part.write_bytes(b"x" * length)
    assert download(server.file_url, path).read_bytes() == BODY


@pytest.mark.parametrize("length", [len(BODY), len(BODY) + 9])
@pytest.mark.parametrize("hurry", [False, True])
def test_a_part_that_is_not_shorter_than_the_file_is_fetched_again(
    server, path, part, length, hurry
):
    part.write_bytes(b"x" * length)
    assert download(server.file_url, path, sha256=SHA256, hurry=hurry).read_bytes() == BODY
    assert server.requested_ranges == [f"bytes={length}-", None]


def test_a_part_of_another_version_is_refused_once_by_its_hash(server, path, part):
    part.write_bytes(b"x" * 100_000)
    with pytest.raises(ValueError, match="run again"):
        download(server.file_url, path, sha256=SHA256)
    assert list(path.parent.iterdir()) == []
    assert download(server.file_url, path, sha256=SHA256).read_bytes() == BODY


# --- a network that fails -------------------------------------------------------------------------


def test_a_cut_connection_is_resumed_where_it_broke(server, path, capsys):
    server.faults = [100_000, 50_000]
    assert download(server.file_url, path, sha256=SHA256).read_bytes() == BODY
    assert server.requested_ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert capsys.readouterr().err.count("trying again") == 2


def test_progress_resets_the_count_of_failures(server, path):
    server.faults = [10_000] * 20
    assert download(server.file_url, path, sha256=SHA256).read_bytes() == BODY


def test_five_failures_without_progress_are_an_error_and_a_later_run_resumes(server, path, waits):
    server.faults = [100_000, 0, 0, 0, 0]
    with pytest.raises(ConnectionError, match="run again"):
        download(server.file_url, path)
    assert len(server.seen) == 5
    assert waits == [2, 4, 8, 16]
    assert not path.exists()
    assert download(server.file_url, path, sha256=SHA256).read_bytes() == BODY
    assert server.requested_ranges[-1] == "bytes=100000-"


def test_a_server_without_ranges_that_always_cuts_is_given_up(server, path):
    server.ranges = False
    server.faults = [100_000] * 15
    with pytest.raises(ConnectionError):
        download(server.file_url, path)
    assert len(server.seen) == 5


@pytest.mark.parametrize("status", [410, 429, 500, 503])
def test_a_busy_server_is_asked_again_and_named_if_it_stays_busy(server, path, status):
    server.faults = [status, status]
    assert download(server.file_url, path).read_bytes() == BODY
    path.unlink()
    server.faults = [status] * 9
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{server.server_port}: {status} "):
        download(server.file_url, path)


def test_a_silent_server_is_asked_again(server, path, monkeypatch, capsys):
    monkeypatch.setattr(files, "TIMEOUT", (1, 0.1))
    server.faults = ["stall"]
    assert download(server.file_url, path).read_bytes() == BODY
    assert "timed out" in capsys.readouterr().err


def test_a_refused_connection_is_reported_at_once_with_the_remedy(path, waits, capsys):
    port = closed_port()
    with pytest.raises(ConnectionError) as error:
        download(f"http://127.0.0.1:{port}/file.bin", path)
    problem, remedy = str(error.value).splitlines()
    assert f"127.0.0.1:{port}" in problem
    assert problem.endswith("Connection refused")
    assert "proxy" in remedy and str(path) in remedy
    assert (capsys.readouterr().err, waits) == ("", [])
    assert not path.parent.exists()


def test_an_unknown_host_is_reported_at_once(path, monkeypatch, waits):
    def fail(*_args, **_kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConnectionError, match=r"nowhere\.test: .*Name or service not known"):
        download("http://nowhere.test/file.bin", path)
    assert waits == []


def test_a_connection_lost_on_the_way_is_waited_for(server, path, monkeypatch):
    lookup = socket.getaddrinfo
    calls = []

    def flaky(*args, **kwargs):
        calls.append(args)
        if len(calls) in (2, 3):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return lookup(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    server.faults = [100_000]
    assert download(server.file_url, path, sha256=SHA256).read_bytes() == BODY


def test_proxies_of_the_environment_are_used(path, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ConnectionError, match=r"example\.test: .*refused"):
        download("http://example.test/file.bin", path)


# --- in a hurry: another server has the file too --------------------------------------------------


@pytest.fixture
def hurry(monkeypatch):
    """The limits of a download in a hurry, shorter than they are."""
    monkeypatch.setattr(files, "HURRY_TIMEOUT", (0.3, 0.3))
    monkeypatch.setattr(files, "WINDOW", 0.3)


@pytest.mark.parametrize("fault", ["stall", "drip", 429, 503, 0])
def test_in_a_hurry_a_bad_server_is_given_up_soon_and_asked_once(server, path, waits, hurry, fault):
    server.faults = [fault]
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        download(server.file_url, path, hurry=True)
    assert time.monotonic() - start < 3
    assert (len(server.seen), waits) == (1, [])
    assert not path.exists()


def test_in_a_hurry_a_good_server_is_resumed_where_it_was_cut(server, path, hurry):
    server.faults = [100_000, 50_000]
    assert download(server.file_url, path, sha256=SHA256, hurry=True).read_bytes() == BODY
    assert server.requested_ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_what_a_slow_server_sent_is_kept_for_the_patient(server, path, hurry):
    server.faults = ["drip"]
    with pytest.raises(SlowServer, match="kB/s"):
        download(server.file_url, path, hurry=True)
    assert download(server.file_url, path, sha256=SHA256).read_bytes() == BODY
    done = int(server.requested_ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert 100 <= done < 20_000


def test_the_rate_is_that_of_each_window(monkeypatch):
    """A server that begins fast and then drips is slow, one that is fast all the time is not."""
    now = 0.0
    monkeypatch.setattr(files.time, "monotonic", lambda: now)

    class Response:
        """Sends `rates`, bytes of each second."""

        url = "http://host/file"

        def __init__(self, rates):
            self.raw = self
            self.rates = list(rates)

        def read1(self, _size, decode_content):
            nonlocal now
            now += 1
            return bytes(self.rates.pop(0)) if self.rates else b""

    assert len(b"".join(files._fast_chunks(Response([files.SLOW + 1] * 30)))) > 30 * files.SLOW
    with pytest.raises(SlowServer, match="host"):
        list(files._fast_chunks(Response([9 * files.SLOW] * 10 + [1000] * 20)))


# --- the wrong file, refusals, a full disk --------------------------------------------------------


@pytest.mark.parametrize("expected", [{"sha256": "0" * 64}, {"size": len(BODY) - 1}])
@pytest.mark.parametrize("lengths", [True, False])
def test_a_wrong_hash_or_size_is_an_error_and_keeps_nothing(server, path, expected, lengths):
    server.lengths = lengths
    with pytest.raises(ValueError) as error:
        download(server.file_url, path, **expected)
    assert server.file_url in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    assert list(path.parent.iterdir()) == []
    assert len(server.seen) == 1


PAGE = b"\n <!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
@pytest.mark.parametrize("hurry", [True, False])
def test_a_page_in_place_of_a_file_is_never_kept(server, path, content_type, hurry):
    server.bodies["/file.bin"] = PAGE
    server.extra_headers = {"Content-Type": content_type}
    with pytest.raises(ValueError) as error:
        download(server.file_url, path, hurry=hurry)
    assert server.file_url in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    assert not path.exists() and not path.with_name("file.bin.part").exists()


def test_a_page_does_not_overwrite_the_part_of_a_file(server, path, part):
    part.write_bytes(BODY[:100_000])
    server.ranges = False
    server.bodies["/file.bin"] = PAGE
    server.extra_headers = {"Content-Type": "text/html"}
    with pytest.raises(ValueError):
        download(server.file_url, path)
    assert part.read_bytes() == BODY[:100_000]


def test_a_file_with_other_first_bytes_is_refused(server, path):
    with pytest.raises(ValueError, match="first bytes"):
        download(server.file_url, path, begins=rb"\s*\{")
    assert list(path.parent.iterdir()) == []
    assert download(server.file_url, path, begins=re.escape(BODY[:20])).read_bytes() == BODY


@pytest.mark.parametrize(
    ("status", "error", "word"),
    [
        (404, FileNotFoundError, "name"),
        (401, PermissionError, "HF_TOKEN"),
        (403, PermissionError, "HF_TOKEN"),
    ],
)
def test_a_refusal_is_final_and_names_the_url(server, path, status, error, word):
    server.faults = [status]
    with pytest.raises(error, match=word) as raised:
        download(server.file_url, path)
    assert server.file_url in str(raised.value)
    assert len(server.seen) == 1
    assert not path.parent.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_with_the_path_and_not_retried(server, path, part):
    part.symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        download(server.file_url, path)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(part)
    assert len(server.seen) == 1


# --- progress -------------------------------------------------------------------------------------


def test_a_log_gets_a_line_at_the_start_and_one_at_the_end(server, path, capsys):
    download(server.file_url, path)
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert first.startswith("file.bin: 0.1 of 0.3 MB")
    assert last.startswith("file.bin: 0.3 of 0.3 MB")
    assert out == ""


def test_a_terminal_gets_one_line_that_is_redrawn_five_times_a_second(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(files.time, "monotonic", lambda: now)
    monkeypatch.setattr(files.sys.stderr, "isatty", lambda: True)
    for _ in files._with_progress([b"x" * 100_000] * 100, "f", 0, 10_000_000):
        now += 0.01
    printed = capsys.readouterr().err
    assert printed.endswith("\n") and printed.count("\n") == 1
    assert 4 <= printed.count("\r") <= 7  # in one second
    assert "f: 10.0 of 10.0 MB" in printed


# --- the Hugging Face hub -------------------------------------------------------------------------


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/mirror/")
    server.bodies["/mirror/org/name/resolve/main/w.bin"] = BODY
    return server


def cached(root, folder, body, revision="abc"):
    """Write w.bin as transformers caches it."""
    file = Path(root) / folder / "snapshots" / revision / "w.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(body)
    (Path(root) / folder / "refs").mkdir(exist_ok=True)
    (Path(root) / folder / "refs" / "main").write_text("abc")
    return file


def test_a_file_of_the_hub_is_downloaded_into_our_cache_once(hub, tmp_path):
    expected = tmp_path / "cache" / "nanochatgpt" / "models" / "org" / "name" / "w.bin"
    assert hub_file("org/name", "w.bin", sha256=SHA256) == expected
    assert hub_file("org/name", "w.bin", sha256=SHA256).read_bytes() == BODY
    assert len(hub.seen) == 1
    assert hub.seen[0]["Authorization"] is None


def test_datasets_have_their_own_place(hub, tmp_path):
    hub.bodies["/mirror/datasets/org/name/resolve/main/a/w.bin"] = b"rows"
    path = hub_file("org/name", "a/w.bin", kind="datasets")
    assert path == tmp_path / "cache" / "nanochatgpt" / "datasets" / "org" / "name" / "a" / "w.bin"
    assert path.read_bytes() == b"rows"
    file = cached(tmp_path / "cache/huggingface/hub", "datasets--org--name", b"cached")
    assert hub_file("org/name", "w.bin", kind="datasets") == file


@pytest.mark.parametrize(
    ("variable", "value", "root"),
    [
        ("HF_HUB_CACHE", "hubcache", "hubcache"),
        ("HF_HOME", "hfhome", "hfhome/hub"),
        ("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"),
        ("XDG_CACHE_HOME", "", "home/.cache/huggingface/hub"),
    ],
)
def test_the_cache_of_transformers_is_used(hub, tmp_path, monkeypatch, variable, value, root):
    monkeypatch.setenv(variable, value and str(tmp_path / value))
    file = cached(tmp_path / root, "models--org--name", b"cached")
    assert hub_file("org/name", "w.bin") == file
    assert hub.seen == []


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


def test_the_cached_revision_is_that_of_refs_main(hub, hf_cache):
    file = cached(hf_cache, "models--org--name", b"current")
    cached(hf_cache, "models--org--name", b"a pull request", revision="newer")
    assert hub_file("org/name", "w.bin") == file


@pytest.mark.parametrize(
    ("repo", "short"), [("openai-community/gpt2", "gpt2"), ("distilbert/distilgpt2", "distilgpt2")]
)
def test_gpt2_may_be_cached_under_the_name_it_had_without_organization(hf_cache, repo, short):
    file = cached(hf_cache, f"models--{short}", b"cached")
    assert hub_file(repo, "w.bin") == file


@pytest.mark.parametrize(("folder", "size"), [("org--name", len(BODY)), ("name", None)])
def test_a_cached_file_of_another_size_or_repository_is_not_used(hub, hf_cache, folder, size):
    cached(hf_cache, f"models--{folder}", b"another")
    assert hub_file("org/name", "w.bin", size=size).read_bytes() == BODY


@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_offline_forbids_downloading_and_names_both_caches(hub, hf_cache, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE") as error:
        hub_file("org/name", "w.bin")
    assert str(hf_cache) in str(error.value) and "nanochatgpt" in str(error.value)
    assert hub.seen == []


def test_offline_uses_what_is_cached_and_0_is_online(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    path = hub_file("org/name", "w.bin")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_file("org/name", "w.bin") == path


def test_a_redirect_keeps_the_range_and_drops_the_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    storage = Server()  # the hub redirects to it for large files
    storage.faults = [100_000]
    hub.redirects["/mirror/org/name/resolve/main/w.bin"] = storage.file_url
    assert hub_file("org/name", "w.bin").read_bytes() == BODY
    storage.close()
    assert storage.requested_ranges == [None, "bytes=100000-"]
    assert [headers["Authorization"] for headers in hub.seen] == ["Bearer hf_secret"] * 2
    assert [headers["Authorization"] for headers in storage.seen] == [None] * 2


# --- writing and reading --------------------------------------------------------------------------


def test_replacing_puts_the_whole_file_in_place_or_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "write",
    [
        lambda part: part.write_bytes(bytes(9000)),
        lambda part: torch.save(torch.zeros(9000), part),
        lambda part: save_file({"a": torch.zeros(9000)}, part),
    ],
    ids=["bytes", "torch", "safetensors"],
)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, write):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with largest_file(5000), pytest.raises(OSError) as error, replacing(path) as part:
        write(part)
    assert str(path) in str(error.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_tensors_are_loaded_and_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.pt"
    torch.save({"a": torch.arange(3), "iter": 5}, path)
    state = load_tensors(path)
    assert state["iter"] == 5 and state["a"].tolist() == [0, 1, 2]
    whole = path.read_bytes()
    for damaged in (b"", whole[:-100], b"not a pickle", bytes(50)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.pt"):
            load_tensors(path)
    torch.save({"a": Trap()}, path)
    with pytest.raises(ValueError, match=r"state\.pt"):
        load_tensors(path)
    assert not Path("trapped").exists()
