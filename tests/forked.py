"""Scripts in processes that fork from one that has imported torch, which saves seconds of CPU time
per script. That process has nothing of the project: a script imports it from its own folder."""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = "torch._dynamo torch.distributed.checkpoint.state_dict torch.distributed.fsdp numpy"
LIBRARIES += " safetensors.torch requests tiktoken sympy.printing"
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["forked", *LIBRARIES.split()])


def start_server():
    """Start the process to fork from, if there is none."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])  # for `forked`
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with patch.dict(os.environ, environment):
        forkserver.ensure_running()


def be_python(argv, cwd, env, streams):
    """In the forked process: do what python does with these arguments."""
    # standard input, output and error are files, or a terminal whose Ctrl-C reaches this process
    if streams[0] == streams[1]:
        os.setsid()
    for descriptor, path in enumerate(streams):
        flags = os.O_WRONLY | os.O_APPEND if descriptor else os.O_RDONLY
        os.dup2(os.open(path, flags), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")

    # its environment, its folder, and imports from nowhere else in the project
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path.insert(0, "")
        exec(argv[1], {"__name__": "__main__"})
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")


class Forked:
    """A running script: Forked(["train.py", "--seed=1"], folder) or Forked(["-c", code], folder).

    A relative path of a script is relative to `root`. `terminal`: the path of a terminal that is
    its standard input, output and error, instead of `input` and files.
    """

    def __init__(self, command, cwd, env=None, input="", root=ROOT, terminal=None):
        start_server()
        self.files = tempfile.TemporaryDirectory()
        self.streams = [Path(self.files.name) / name for name in ("in", "out", "err")]
        for path in self.streams:
            path.write_text(input if path.name == "in" else "", encoding="utf-8")
        self.args = [str(arg) for arg in command]
        if self.args[0] != "-c":
            self.args[0] = str(root / self.args[0])
        env = os.environ | {"HOME": str(cwd), "CUDA_VISIBLE_DEVICES": ""} | (env or {})
        streams = [terminal] * 3 if terminal else [str(path) for path in self.streams]
        self.process = processes.Process(target=be_python, args=(self.args, cwd, env, streams))
        self.process.start()
        self.pid = self.process.pid

    @property
    def stdout(self):
        return self.streams[1].read_text(encoding="utf-8")

    @property
    def stderr(self):
        return self.streams[2].read_text(encoding="utf-8")

    @property
    def running(self):
        return self.process.is_alive()

    def until(self, text, timeout=60):
        """Wait until it has printed `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.stdout:
            assert self.running, self.stdout + self.stderr
            assert time.monotonic() < deadline, self.stdout + self.stderr
            time.sleep(0.01)

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout=120):
        """Return it as a CompletedProcess; kill it if it does not end in time."""
        self.process.join(timeout)
        self.kill()
        status = self.process.exitcode
        return subprocess.CompletedProcess(self.args, status, self.stdout, self.stderr)

    def kill(self):
        self.process.kill()
        self.process.join()


def two_ranks(command, cwd):
    """Start a script in two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in "01":
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(Forked(command, cwd, env))
    return ranks
