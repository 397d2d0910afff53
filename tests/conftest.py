"""What the tests share: no network, scripts run as a user runs them, small corpora and models made
on the spot."""

import io
import json
import logging.handlers
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: more threads would only queue
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from hypothesis import settings
from safetensors.torch import load_file

from model import GPT, GPTConfig
from nanochatgpt import configurator
from nanochatgpt.shards import ShardWriter
from nanochatgpt.tokenizer import Tokenizer
from prepare.render import render_batch

ROOT = Path(__file__).resolve().parents[1]
os.fsync = lambda file: None  # waits for the disk, and no test cuts the power
os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
# pytest --hypothesis-profile=fuzz tests/test_fuzz.py
settings.register_profile("fuzz", max_examples=10_000)
# a background job ignores Ctrl-C, and so would its children
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only this machine's own addresses can be reached."""
    connect = socket.socket.connect

    def loopback_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback_only)


@pytest.fixture
def script(tmp_path):
    """Run a script in an empty folder: script("chat.py", "--seed=1", input="hi") ->
    CompletedProcess with text."""

    def run(name, *args, input=None, env=None, timeout=120):
        command = [sys.executable, str(ROOT / name), *map(str, args)]
        env = os.environ | {"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""} | (env or {})
        options = {"capture_output": True, "text": True, "timeout": timeout}
        return subprocess.run(command, input=input or "", cwd=tmp_path, env=env, **options)

    return run


def assert_refused(done, *words):
    """The script ended as a person's mistake should: status 2, at most two lines on stderr, which
    name the thing."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert 1 <= len(done.stderr.strip().splitlines()) <= 2, done.stderr
    assert len(done.stderr) < 1000, done.stderr  # none of them is a file's content
    for word in words:
        assert str(word) in done.stderr, done.stderr


@contextmanager
def largest_file(n_bytes):
    """While in it, no file of this process can grow beyond this, as if the disk were full.

    Not longer: what pytest itself prints may go to a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class StopsAfter:
    """In place of a StopSignal: asks to stop after so many steps."""

    def __init__(self, steps):
        self.left = steps + 1

    @property
    def asked(self):
        self.left -= 1
        return self.left <= 0


def records(out):
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a, b):
    """Two checkpoints have the same weights to the bit."""
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def small_talk(n, seed=0):
    """Return n conversations of 1 to 4 exchanges, some with a persona, in a vocabulary that a small
    model can learn."""
    choose = random.Random(seed)
    text = "hello how are you i am fine like tea the dog runs home what now"

    def say():
        return " ".join(choose.choices(text.split(), k=choose.randint(1, 12)))

    conversations = []
    for _ in range(n):
        messages = [{"role": "system", "content": say()}] if choose.random() < 0.5 else []
        for _ in range(choose.randint(1, 4)):
            messages += [
                {"role": "user", "content": say()},
                {"role": "assistant", "content": say()},
            ]
        conversations.append(messages)
    return conversations


def write_shards(folder, train, val, template="human_bot"):
    """Write train.bin and val.bin of these conversations to `folder`; return it."""
    tokenizer = Tokenizer(template)
    for split, conversations in (("train", train), ("val", val)):
        with ShardWriter(Path(folder) / f"{split}.bin", tokenizer.n_vocab, template) as writer:
            writer.write(render_batch(tokenizer, conversations))
    return Path(folder)


def write_jsonl(path, conversations):
    path.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Run a script as `script` does, but in this process, which spares 3 s: in_process(chat.main,
    "chat.py", ...)."""

    def run(main, *argv):
        argv = [str(arg) for arg in argv]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code or 0
        return subprocess.CompletedProcess(argv, status, *capsys.readouterr())

    return run


@pytest.fixture
def as_main(in_process, monkeypatch):
    """Run a script's file so: as_main("train.py", "--max_iters=1"), from wherever we are."""

    def run(name, *args, input=""):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with monkeypatch.context() as patch:
            patch.setattr(
                sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8")
            )
            patch.setattr(sys, "path", [str((ROOT / name).parent), *sys.path])
            try:
                return in_process(
                    lambda: runpy.run_path(str(ROOT / name), run_name="__main__"), name, *args
                )
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    return run


class Serving:
    """serve.py in a thread of the tests, with the model in the box unless told otherwise."""

    def __init__(self, folder, *args):
        import serve

        self.feedback = Path(folder) / "feedback.jsonl"
        args = ["--port=0", "--device=cpu", f"--feedback={self.feedback}", *args]
        config = configurator.parse(serve.Config, args)
        listening = serve.listen(config)
        self.service = serve.Service(config)
        app = serve.create_app(config, self.service)
        self.server = serve.Server(app, self.service.scheduler)
        # its log belongs to pytest
        for name in ("uvicorn", "uvicorn.access"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
        self.errors = logging.handlers.BufferingHandler(1000)
        self.errors.setLevel("ERROR")
        logging.getLogger().addHandler(self.errors)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        """What a signal does."""
        self.server.handle_exit(signal.SIGTERM, None)


@pytest.fixture(scope="session")
def serving(tmp_path_factory):
    """Start a server: with serving("--max_rows=1") as server: ... server.url; it must log no
    error."""
    pytest.importorskip("fastapi")

    @contextmanager
    def start(*args):
        server = Serving(tmp_path_factory.mktemp("serve"), *args)
        try:
            yield server
        finally:
            server.stop()
            server.thread.join(30)
            server.service.scheduler.close()
            logging.getLogger().removeHandler(server.errors)
        assert not server.thread.is_alive() and server.errors.buffer == []

    return start


@pytest.fixture(scope="session")
def chat_server(serving):
    """A server of the model in the box for all tests that change nothing of it."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def talk_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    return write_shards(folder, small_talk(60, seed=1), small_talk(10, seed=2))


@pytest.fixture
def data_dir(tmp_path, talk_shards):
    """A data/ folder with one dataset, `talk`, of 60 conversations to train on and 10 held out."""
    shutil.copytree(talk_shards, tmp_path / "data" / "talk")
    return tmp_path / "data"


@pytest.fixture
def hf_gpt2():
    """Make a transformers GPT2LMHeadModel with random weights: hf_gpt2(n_layer=2, ...) -> model in
    eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(seed=0, **shape):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(
            GPT2Config(**({"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128} | shape))
        ).eval()

    return make


# prompts of different lengths for the model below
PROMPTS = [[5, 17, 17, 199], [42], list(range(100, 130)), [7, 8, 9, 7, 8, 9, 7]]


@pytest.fixture
def hf(hf_gpt2):
    """A transformers model of 200 tokens and 64 positions, with weights large enough for varied
    output."""
    hf = hf_gpt2(vocab_size=200, n_positions=64, initializer_range=0.5)
    with torch.no_grad():
        hf.transformer.wte.weight[:, 0] = 0.3  # so that ln_f.bias[0] moves all logits
    return hf


@pytest.fixture
def model(hf):
    """The same as a GPT."""
    model = GPT(GPTConfig(64, 200, 2, 2, 32))
    model.load_state_dict(hf.state_dict())
    return model
