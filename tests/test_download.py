"""Downloads against a real server on this machine that misbehaves on command; nothing leaves the machine."""

import errno
import gzip
import hashlib
import io
import os
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanochatgpt import download as module
from nanochatgpt.files import download, hub_file

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """
    Serves `files` {path: bytes} with ranges, as storage servers do, and keeps the headers of each request in `seen`.

    Each request takes the next of `faults`: None, a status to answer, "stall" (no answer in time), or a number of bytes
    after which the connection is cut.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.seen, self.redirects = {}, [], [], {}
        self.ranges, self.wrong_range, self.lengths, self.extra_headers = True, False, True, {}
        self.stalled = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def close(self):
        self.stalled.set()
        self.shutdown()
        self.server_close()

    @property
    def ranges_asked(self):
        return [headers["Range"] for headers in self.seen]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.seen.append(self.headers)
        fault = server.faults.pop(0) if server.faults else None
        if fault == "stall":
            return server.stalled.wait(5)
        if self.path in server.redirects:
            target, headers = server.redirects[self.path]
            return self.answer(302, {"Location": target, "Content-Length": "0", **headers})
        body = server.files.get(self.path)
        if body is None or (isinstance(fault, int) and 400 <= fault < 600):
            return self.answer(fault or 404, {"Content-Length": "0"})
        status, headers = 200, dict(server.extra_headers)
        if server.ranges and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if server.wrong_range:
                start = 0
            if start >= len(body):
                return self.answer(
                    416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"}
                )
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        if server.lengths:
            headers["Content-Length"] = str(len(body))
        self.answer(status, headers)
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
    server.files["/file.bin"] = BODY
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch, tmp_path):
    """No proxy, credentials or caches of whoever runs the tests; no waiting."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "WAIT", 0)


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


# ---- the ordinary case


def test_fetches_verifies_and_leaves_nothing_else(server, path):
    assert download(server.url + "/file.bin", str(path), size=len(BODY), sha256=SHA256) == path
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_fetches_without_knowing_size_or_hash_and_without_content_length(server, path):
    server.lengths = False
    assert download(server.url + "/file.bin", path).read_bytes() == BODY


def test_an_empty_file_is_a_file(server, path):
    server.files["/empty"] = b""
    assert download(server.url + "/empty", path).read_bytes() == b""


def test_an_existing_file_is_returned_without_touching_the_network(server, path):
    path.parent.mkdir()
    path.write_bytes(b"here already")
    assert download(server.url + "/file.bin", path, sha256=SHA256).read_bytes() == b"here already"
    assert download(server.url + "/file.bin", path, size=12).read_bytes() == b"here already"
    assert server.seen == []


def test_an_existing_file_of_another_size_is_fetched_again(server, path):
    path.parent.mkdir()
    path.write_bytes(b"an older version")
    assert download(server.url + "/file.bin", path, size=len(BODY)).read_bytes() == BODY


def test_asks_for_the_stored_bytes_and_sends_the_headers_given(server, path):
    download(server.url + "/file.bin", path, headers={"X-Test": "yes"})
    assert server.seen[0]["Accept-Encoding"] == "identity"
    assert server.seen[0]["X-Test"] == "yes"
    assert server.seen[0]["Range"] is None


def test_a_gz_file_stays_packed_even_if_the_server_labels_it_as_encoded(server, path):
    server.files["/file.bin"] = packed = gzip.compress(BODY)
    server.extra_headers = {"Content-Encoding": "gzip"}
    assert download(server.url + "/file.bin", path, size=len(packed)).read_bytes() == packed


def test_a_file_that_another_process_finishes_first_is_taken(server, path, monkeypatch):
    def fetch_and_lose(url, part, *rest):
        fetch(url, part, *rest)
        os.replace(part, path)

    fetch = module._fetch
    monkeypatch.setattr(module, "_fetch", fetch_and_lose)
    assert download(server.url + "/file.bin", path, sha256=SHA256).read_bytes() == BODY


# ---- resuming


@pytest.mark.parametrize("size", [None, len(BODY)])
def test_resumes_from_the_part_of_an_earlier_run(server, path, part, size):
    part.write_bytes(BODY[:100_000])
    assert download(server.url + "/file.bin", path, size=size, sha256=SHA256).read_bytes() == BODY
    assert server.ranges_asked == ["bytes=100000-"]
    assert not part.exists()


def test_starts_over_when_the_server_ignores_ranges(server, path, part):
    server.ranges = False
    part.write_bytes(b"x" * 400_000)
    assert download(server.url + "/file.bin", path).read_bytes() == BODY


def test_starts_over_when_the_server_sends_another_range(server, path, part):
    server.wrong_range = True
    part.write_bytes(b"x" * 100_000)
    assert download(server.url + "/file.bin", path).read_bytes() == BODY
    assert server.ranges_asked == ["bytes=100000-", None]


def test_a_part_that_is_complete_already_is_only_verified_and_renamed(server, path, part):
    part.write_bytes(BODY)
    assert download(server.url + "/file.bin", path, sha256=SHA256).read_bytes() == BODY
    assert server.ranges_asked == [f"bytes={len(BODY)}-"]


def test_a_part_longer_than_the_file_is_discarded(server, path, part):
    part.write_bytes(BODY + b"too much")
    assert download(server.url + "/file.bin", path).read_bytes() == BODY
    assert server.ranges_asked[1:] == [None]


def test_a_part_of_another_version_is_found_by_its_hash_and_fetched_from_the_start(
    server, path, part
):
    part.write_bytes(b"x" * 100_000)
    assert download(server.url + "/file.bin", path, sha256=SHA256).read_bytes() == BODY
    assert server.ranges_asked == ["bytes=100000-", None]


# ---- a network that fails


def test_a_cut_connection_is_resumed_where_it_broke(server, path, capsys):
    server.faults = [100_000, 50_000]
    assert download(server.url + "/file.bin", path, sha256=SHA256).read_bytes() == BODY
    assert server.ranges_asked == [None, "bytes=100000-", "bytes=150000-"]
    assert "trying again" in capsys.readouterr().err


def test_progress_resets_the_count_of_failures(server, path):
    server.faults = [10_000] * 20
    assert download(server.url + "/file.bin", path, sha256=SHA256).read_bytes() == BODY


def test_gives_up_after_five_failures_without_progress_and_resumes_in_a_later_run(server, path):
    server.faults = [100_000, 0, 0, 0, 0]
    with pytest.raises(ConnectionError, match="run again"):
        download(server.url + "/file.bin", path)
    assert len(server.seen) == 5
    assert not path.exists()
    assert download(server.url + "/file.bin", path, sha256=SHA256).read_bytes() == BODY
    assert server.ranges_asked[-1] == "bytes=100000-"


def test_a_server_without_ranges_that_always_cuts_does_not_keep_us_for_ever(server, path):
    server.ranges = False
    server.faults = [100_000, 50_000] * 15
    with pytest.raises(ConnectionError):
        download(server.url + "/file.bin", path)
    assert len(server.seen) == 5


def test_a_body_that_ends_early_is_noticed_without_content_length(server, path):
    server.lengths = False
    server.faults = [100_000]
    assert download(server.url + "/file.bin", path, size=len(BODY)).read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, path, status):
    server.faults = [status, status]
    assert download(server.url + "/file.bin", path).read_bytes() == BODY


def test_a_server_that_stays_busy_is_named_with_its_answer(server, path):
    server.faults = [503] * 9
    with pytest.raises(
        ConnectionError,
        match=rf"cannot fetch from 127.0.0.1:{server.server_port}: 503 Service Unavail",
    ):
        download(server.url + "/file.bin", path)
    assert len(server.seen) == 5


def test_waits_twice_as_long_before_each_try(server, path, monkeypatch):
    waits = []
    monkeypatch.setattr(module, "WAIT", 1.0)
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.faults = [503] * 5
    with pytest.raises(ConnectionError):
        download(server.url + "/file.bin", path)
    assert waits == [1, 2, 4, 8]


def test_a_silent_server_is_asked_again(server, path, monkeypatch, capsys):
    monkeypatch.setattr(module, "TIMEOUT", (1, 0.1))
    server.faults = ["stall"]
    assert download(server.url + "/file.bin", path).read_bytes() == BODY
    assert "timed out" in capsys.readouterr().err


def test_a_refused_connection_is_reported_at_once_with_the_remedy(path, capsys):
    port = closed_port()
    with pytest.raises(ConnectionError) as error:
        download(f"http://127.0.0.1:{port}/file.bin", path)
    what, remedy = str(error.value).splitlines()
    assert what.startswith(f"cannot reach 127.0.0.1:{port}: Failed") and what.endswith(
        "Connection refused"
    )
    assert "proxy" in remedy and str(path) in remedy and "--source" in remedy
    assert capsys.readouterr().err == ""
    assert not path.parent.exists()


def test_an_unknown_host_is_reported_at_once(path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(
        ConnectionError, match=r"^cannot reach nowhere\.test: .*Name or service not known"
    ):
        download("http://nowhere.test/file.bin", path)


def test_a_connection_lost_on_the_way_is_waited_for(server, path, monkeypatch):
    url, lookup, calls = server.url + "/file.bin", socket.getaddrinfo, []

    def flaky(*args, **kwargs):
        calls.append(args)
        if len(calls) in (2, 3):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return lookup(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    server.faults = [100_000]
    assert download(url, path, sha256=SHA256).read_bytes() == BODY


def test_proxies_of_the_environment_are_used(path, monkeypatch):
    port = closed_port()
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    with pytest.raises(ConnectionError, match=r"cannot reach example\.test: .*refused"):
        download("http://example.test/file.bin", path)


# ---- the wrong file, refusals, a full disk


def test_a_wrong_hash_is_an_error_that_names_both_and_keeps_nothing(server, path):
    with pytest.raises(ValueError) as error:
        download(server.url + "/file.bin", path, sha256="0" * 64)
    message = str(error.value)
    assert (
        server.url in message
        and SHA256[:12] in message
        and "000000000000…" in message
        and str(path) in message
    )
    assert list(path.parent.iterdir()) == []
    assert len(server.seen) == 1


def test_a_wrong_hash_after_resuming_is_an_error_only_after_a_second_fetch(server, path, part):
    part.write_bytes(BODY[:100_000])
    with pytest.raises(ValueError):
        download(server.url + "/file.bin", path, sha256="0" * 64)
    assert server.ranges_asked == ["bytes=100000-", None]
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("lengths", [True, False])
def test_a_wrong_size_is_an_error_that_names_both(server, path, lengths):
    server.lengths = lengths
    with pytest.raises(ValueError, match="300,000 bytes instead of 299,999"):
        download(server.url + "/file.bin", path, size=len(BODY) - 1)
    assert not path.exists()


def test_the_page_of_a_captive_portal_does_not_overwrite_a_good_part(server, path, part):
    part.write_bytes(BODY[:100_000])
    server.ranges = False
    server.files["/file.bin"] = b"<html>please log in</html>"
    with pytest.raises(ValueError):
        download(server.url + "/file.bin", path, size=len(BODY))
    assert part.read_bytes() == BODY[:100_000]


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (404, FileNotFoundError, "does not exist"),
        (401, PermissionError, "HF_TOKEN"),
        (403, PermissionError, "HF_TOKEN"),
        (410, OSError, "410 Gone"),
        (416, OSError, "416"),
    ],
)
def test_a_refusal_is_final_and_names_the_url(server, path, status, error, words):
    server.faults = [status]
    with pytest.raises(error, match=words) as raised:
        download(server.url + "/file.bin", path)
    assert server.url + "/file.bin" in str(raised.value)
    assert len(server.seen) == 1
    assert not path.parent.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_with_the_path_and_not_retried(server, path, part):
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="disk full") as error:
        download(server.url + "/file.bin", path)
    assert str(part) in str(error.value)
    assert len(server.seen) == 1


def test_a_disk_found_full_only_at_the_end_is_reported_too(server, path, monkeypatch):
    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        download(server.url + "/file.bin", path)
    assert not path.exists()


# ---- progress


def test_in_a_log_progress_is_one_line_at_the_start_and_one_at_the_end(server, path, capsys):
    download(server.url + "/file.bin", path)
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert "file.bin: 0.0 MB" in first
    assert "file.bin: 0.3 MB" in last and "100% of 0.3 MB" in last and "MB/s" in last
    assert out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_is_one_line_redrawn(monkeypatch):
    def chunks():
        nonlocal now
        for _ in range(100):
            now += 0.01
            yield b"x" * 100_000

    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module.sys, "stderr", Terminal())
    assert b"".join(module._with_progress(chunks(), "f", 0, 10_000_000)) == b"x" * 10_000_000
    shown = module.sys.stderr.getvalue()
    assert shown.endswith("\n") and shown.count("\n") == 1
    assert 4 <= shown.count("\r") <= 7  # in one second
    assert "MB at 10.0 MB/s, 100% of 10.0 MB, 0:00:00 left" in shown


def test_on_a_terminal_an_error_starts_on_a_line_of_its_own(server, path, monkeypatch):
    monkeypatch.setattr(module.sys, "stderr", Terminal())
    server.faults = [100_000]
    download(server.url + "/file.bin", path)
    assert any(line.startswith("127.0.0.1:") for line in module.sys.stderr.getvalue().splitlines())


# ---- the Hugging Face hub


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/mirror/")
    server.files["/mirror/org/name/resolve/main/w.bin"] = BODY
    return server


def cached(root, folder, revision, body, ref=None, name="w.bin"):
    file = Path(root) / folder / "snapshots" / revision / name
    file.parent.mkdir(parents=True)
    file.write_bytes(body)
    if ref:
        (Path(root) / folder / "refs").mkdir(exist_ok=True)
        (Path(root) / folder / "refs" / "main").write_text(ref)
    return file


def test_hub_file_downloads_into_our_cache_once(hub, tmp_path):
    expected = tmp_path / "cache" / "nanochatgpt" / "models" / "org" / "name" / "w.bin"
    assert hub_file("org/name", "w.bin", sha256=SHA256) == expected
    assert hub_file("org/name", "w.bin", sha256=SHA256).read_bytes() == BODY
    assert len(hub.seen) == 1


def test_hub_file_takes_a_dataset_from_its_own_place(hub, tmp_path):
    hub.files["/mirror/datasets/org/name/resolve/main/a/w.bin"] = b"rows"
    path = hub_file("org/name", "a/w.bin", kind="datasets")
    assert path == tmp_path / "cache" / "nanochatgpt" / "datasets" / "org" / "name" / "a" / "w.bin"
    assert path.read_bytes() == b"rows"


@pytest.mark.parametrize(
    ("variable", "value", "root"),
    [
        ("HF_HUB_CACHE", "hubcache", "hubcache"),
        ("HF_HOME", "hfhome", "hfhome/hub"),
        ("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"),
        ("XDG_CACHE_HOME", "", "home/.cache/huggingface/hub"),
    ],
)
def test_hub_file_finds_what_transformers_has_fetched(
    hub, tmp_path, monkeypatch, variable, value, root
):
    monkeypatch.setenv(variable, value and str(tmp_path / value))
    file = cached(tmp_path / root, "models--org--name", "abc", b"cached", ref="abc")
    assert hub_file("org/name", "w.bin") == file
    assert hub.seen == []


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_home_that_there_is_not_is_no_defect(hub, tmp_path, monkeypatch, variable):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "~nobody-of-this-name/cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="nobody-of-this-name"):
        hub_file("org/name", "w.bin")


def test_hub_file_finds_a_dataset_that_the_datasets_library_has_fetched(tmp_path):
    file = cached(
        tmp_path / "cache/huggingface/hub", "datasets--org--name", "abc", b"cached", ref="abc"
    )
    assert hub_file("org/name", "w.bin", kind="datasets") == file


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


def test_the_revision_is_that_of_refs_main(hub, hf_cache):
    file = cached(hf_cache, "models--org--name", "current", b"current", ref="current")
    cached(hf_cache, "models--org--name", "newer", b"a pull request")
    assert hub_file("org/name", "w.bin") == file


def test_without_refs_main_the_newest_snapshot_that_holds_the_file_counts(hub, hf_cache):
    old = cached(hf_cache, "models--org--name", "a", b"old")
    new = cached(hf_cache, "models--org--name", "b", b"new")
    other = cached(hf_cache, "models--org--name", "c", b"{}", name="config.json")
    for seconds, file in enumerate((old, new, other)):
        os.utime(file.parent, (seconds, seconds))
    assert hub_file("org/name", "w.bin") == new


@pytest.mark.parametrize(
    ("repo", "old"), [("openai-community/gpt2", "gpt2"), ("distilbert/distilgpt2", "distilgpt2")]
)
def test_gpt2_is_found_under_the_name_it_had_without_organisation(hf_cache, repo, old):
    file = cached(hf_cache, f"models--{old}", "abc", b"cached", ref="abc")
    assert hub_file(repo, "w.bin") == file


def test_a_file_cached_by_transformers_in_another_size_is_not_taken(hub, hf_cache):
    cached(hf_cache, "models--org--name", "abc", b"short", ref="abc")
    assert hub_file("org/name", "w.bin", size=len(BODY)).read_bytes() == BODY


def test_a_file_of_another_repository_of_the_same_name_is_not_taken(hub, hf_cache):
    cached(hf_cache, "models--name", "abc", b"another", ref="abc")
    assert hub_file("org/name", "w.bin").read_bytes() == BODY


@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_offline_forbids_fetching_and_says_where_it_looked(hub, hf_cache, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE") as error:
        hub_file("org/name", "w.bin")
    assert str(hf_cache) in str(error.value) and "nanochatgpt" in str(error.value)
    assert hub.seen == []


def test_offline_takes_what_is_here(hub, monkeypatch):
    path = hub_file("org/name", "w.bin")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_file("org/name", "w.bin") == path


def test_offline_0_is_online(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub_file("org/name", "w.bin").read_bytes() == BODY


@pytest.fixture
def storage(hub):
    """The second server to which the hub redirects for large files, naming their hash on the way."""
    storage = Server()
    storage.files["/blob"] = BODY
    hub.redirects["/mirror/org/name/resolve/main/w.bin"] = (
        storage.url + "/blob",
        {"X-Linked-Etag": f'"{SHA256}"'},
    )
    yield storage
    storage.close()


def test_the_token_goes_to_the_hub_and_not_to_the_storage_it_redirects_to(
    hub, storage, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    assert hub_file("org/name", "w.bin").read_bytes() == BODY
    assert hub.seen[0]["Authorization"] == "Bearer hf_secret"
    assert storage.seen[0]["Authorization"] is None


def test_without_a_token_none_is_sent(hub):
    hub_file("org/name", "w.bin")
    assert hub.seen[0]["Authorization"] is None


def test_a_range_survives_the_redirect_to_the_storage(hub, storage):
    storage.faults = [100_000]
    assert hub_file("org/name", "w.bin").read_bytes() == BODY
    assert storage.ranges_asked == [None, "bytes=100000-"]


def test_the_hash_that_the_hub_names_is_verified(hub, storage):
    storage.files["/blob"] = BODY[:-1] + b"x"
    with pytest.raises(ValueError, match=SHA256[:12]):
        hub_file("org/name", "w.bin")


def test_a_hash_that_is_given_counts_more_than_the_one_that_the_hub_names(hub, storage):
    storage.files["/blob"] = b"pinned"
    assert (
        hub_file("org/name", "w.bin", sha256=hashlib.sha256(b"pinned").hexdigest()).read_bytes()
        == b"pinned"
    )


def test_the_shorter_hash_that_the_hub_names_for_small_files_is_ignored(hub, storage):
    hub.redirects["/mirror/org/name/resolve/main/w.bin"] = (
        storage.url + "/blob",
        {"X-Linked-Etag": '"' + "0" * 40 + '"'},
    )
    assert hub_file("org/name", "w.bin").read_bytes() == BODY
