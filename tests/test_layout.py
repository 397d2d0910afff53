"""The structure of the project: a short root, imports that point one way, wings that can go."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, small_talk, write_jsonl
from forked import Forked

WINGS = ("prepare", "rlhf", "evaluation", "serving", "benchmarks")
SCRIPTS = ("train", "sample", "chat", "serve", "evaluate", "train_reward", "train_ppo")
FILES = list(ROOT.glob("*.py"))
FILES += [path for folder in ("nanochatgpt", *WINGS) for path in (ROOT / folder).glob("*.py")]
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imports(path):
    """Return the modules of the project that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in modules if name in NAMES}


def is_script(name):
    return '__name__ == "__main__"' in NAMES[name].read_text(encoding="utf-8")


def test_the_root_has_the_model_and_seven_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == {"model", *SCRIPTS}


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_one_way(name):
    folder = name.partition(".")[0] if "." in name else ""
    for imported in imports(NAMES[name]):
        target = imported.partition(".")[0] if "." in imported else ""
        if name == "model":
            raise AssertionError(f"model.py imports {imported}")
        if folder == "nanochatgpt":
            assert target == "nanochatgpt" or imported == "model", imported
        elif folder:
            allowed = {folder, "nanochatgpt"} | {"serving": {"rlhf"}}.get(folder, set())
            allowed |= set(WINGS) if folder == "benchmarks" or is_script(name) else set()
            assert target in allowed or imported == "model", imported
        assert not is_script(imported), f"{imported} is a script"


BEFORE_TORCH = """
import os, sys
sys.path.insert(0, sys.argv[1])

class Finder:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()

sys.meta_path.insert(0, Finder)
__import__(sys.argv[2])
"""


MEASURING = [name for name in NAMES if name.startswith("benchmarks.") and is_script(name)]


@pytest.mark.parametrize(
    ("script", "users", "expected"),
    [
        *((script, {}, "1000 None") for script in [*SCRIPTS, *MEASURING]),
        ("chat", {"GOMP_SPINCOUNT": "7"}, "7 None"),
        ("chat", {"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_how_threads_wait_is_set_before_torch_is_loaded_unless_the_user_did(
    script, users, expected
):
    environ = os.environ | users
    if "GOMP_SPINCOUNT" not in users:
        environ.pop("GOMP_SPINCOUNT", None)  # of this process
    command = [sys.executable, "-c", BEFORE_TORCH, str(ROOT), script]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


@pytest.fixture(scope="module")
def without_wings(tmp_path_factory):
    """A copy of the project without the wings that can be removed and the scripts that use them."""
    tree = tmp_path_factory.mktemp("project") / "tree"
    tree.mkdir()
    for name in ("model.py", "train.py", "sample.py", "chat.py"):
        shutil.copy(ROOT / name, tree)
    for folder in ("nanochatgpt", "prepare", "config", "assets"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def test_without_the_wings_preparing_training_and_chatting_work(without_wings):
    def python(*args, input=""):
        done = Forked(args, without_wings, input=input, root=without_wings).wait()
        assert done.returncode == 0, done.stderr
        return done.stdout

    source = write_jsonl(without_wings / "talk.jsonl", small_talk(40))
    python("prepare/jsonl.py", f"--source={source}", "--out_dir=data/talk")
    shape = ["--block_size=64", "--batch_size=2", "--n_layer=2", "--n_head=2", "--n_embd=32"]
    steps = ["--max_iters=2", "--eval_iters=1", "--gradient_accumulation_steps=1"]
    run = ["--init_from=scratch", "--dataset=talk", "--device=cpu", "--out_dir=out/tiny"]
    assert "best validation loss" in python("train.py", *run, *shape, *steps)
    knobs = ["--init_from=out/tiny", "--max_new_tokens=8", "--device=cpu"]
    assert python("chat.py", *knobs, input="hello\n").startswith("Bot:")
    assert python("sample.py", *knobs, "--start=hello").startswith("hello")
