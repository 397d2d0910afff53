"""Knobs from files and arguments: their values, order and help, and the errors they end in."""

import dataclasses
import errno
import importlib
import io
import os
import re
import signal  # noqa: F401 (for the statements in `fail`)
import subprocess
import sys
import zipfile
from dataclasses import dataclass, fields

import pytest
import torch  # noqa: F401
from conftest import ROOT, assert_refused

import chat
import sample
from nanochatgpt.configurator import at_least, parse, run, usage


@dataclass
class Config:
    seed: int = 1  # of the dice
    batch_size: int = 8  # rows
    learning_rate: float = 1e-3  # at its highest
    compile: bool = False  # first, then run
    out_dir: str = "out"  # né le même
    fail: str = ""  # a statement that fails


def main(config):
    exec(config.fail)
    print(config.seed, config.out_dir)


def changed(argv):
    """Return {knob: value} of the knobs that differ from their defaults."""
    values = vars(parse(Config, argv))
    return {name: value for name, value in values.items() if value != getattr(Config, name)}


@pytest.fixture
def config_file(tmp_path):
    """Write a config file: config_file("seed = 2") -> its path as an argument."""

    def write(text, name="own.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def demo(in_process, monkeypatch, tmp_path):
    """Call `main` with these arguments as a script does."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: in_process(lambda: run(main, Config), "demo.py", *args)


# --- values and their order -----------------------------------------------------------------------


def test_without_arguments_every_knob_has_its_default():
    assert parse(Config, []) == Config()
    assert parse(Config, ["--seed=5"]) != Config() == parse(Config, [])


@pytest.mark.parametrize(
    ("arg", "name", "value"),
    [
        ("--seed=2", "seed", 2),
        ("--seed=-2", "seed", -2),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=3e-4", "learning_rate", 3e-4),
        ("--compile=true", "compile", True),
        ("--compile=True", "compile", True),
        ("--out_dir=a=b=c", "out_dir", "a=b=c"),
        ("--out_dir=--seed=2", "out_dir", "--seed=2"),
        ("--out_dir=", "out_dir", ""),
        ("--out_dir=7", "out_dir", "7"),
        ("--out_dir= ünï ", "out_dir", " ünï "),
    ],
)
def test_an_argument_has_the_type_of_its_knob(arg, name, value):
    assert changed([arg]) == {name: value}
    assert type(getattr(parse(Config, [arg]), name)) is type(value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("seed = 2", "seed", 2),
        ("seed = 2 ** 10 + 1", "seed", 1025),
        ("learning_rate = 1", "learning_rate", 1.0),
        ("compile = True", "compile", True),
        ("out_dir = 'a' + 'b'", "out_dir", "ab"),
        ("batch_size: int = 4", "batch_size", 4),
    ],
)
def test_a_file_assigns_to_knobs(config_file, line, name, value):
    path = config_file(line)
    assert changed([path]) == {name: value}
    assert type(getattr(parse(Config, [path]), name)) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("~", "/home/me"),
        ("~/out", "/home/me/out"),
        ("~/a,b,~/c", "/home/me/a,b,/home/me/c"),
        ("i am ~/happy", "i am ~/happy"),
        ("a~/b", "a~/b"),
        ("it is ~ 3, ~ 4", "it is ~ 3, ~ 4"),
        (":~", ":~"),
        ("~~/", "~~/"),
    ],
)
def test_a_tilde_where_a_path_begins_is_the_home_directory(config_file, monkeypatch, text, value):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(Config, [f"--out_dir={text}"]).out_dir == value
    assert parse(Config, [config_file(f"out_dir = {text!r}")]).out_dir == value


def test_a_tilde_in_a_prompt_or_a_persona_stays(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(sample.Config, ["--start=~/notes is"]).start == "~/notes is"
    assert parse(chat.Config, ["--persona=~"]).persona == "~"


def test_a_config_file_in_the_home_directory_is_found(config_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config_file("seed = 3")
    assert changed(["~/own.py"]) == {"seed": 3}


def test_the_later_of_files_and_arguments_wins(config_file):
    two = config_file("seed = 2\nbatch_size = 2", "two.py")
    three = config_file("seed = 3", "three.py")
    assert changed([two, three]) == {"seed": 3, "batch_size": 2}
    assert changed([three, two]) == {"seed": 2, "batch_size": 2}
    assert changed(["--seed=4", two]) == {"seed": 2, "batch_size": 2}
    assert changed([two, "--seed=4"]) == {"seed": 4, "batch_size": 2}
    assert changed(["--seed=4", "--seed=5"]) == {"seed": 5}


def test_a_file_may_import_and_define_names_that_are_not_knobs(config_file):
    text = """
import os, os.path as path
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

_half = 4

def twice(n):
    return 2 * n

thrice = lambda n: 3 * n
seed = twice(_half) + int(sqrt(4))
"""
    assert changed([config_file(text)]) == {"seed": 10}


def test_files_do_not_see_each_others_names(config_file):
    first = config_file("_seed = 7\nseed = 2", "first.py")
    second = config_file("seed = _seed", "second.py")
    with pytest.raises(ValueError, match="NameError: name '_seed' is not defined"):
        parse(Config, [first, second])


@dataclass
class Asking(Config):
    given: frozenset = dataclasses.field(default=frozenset(), repr=False)


def test_a_config_that_asks_is_told_which_knobs_were_set(config_file):
    path = config_file("out_dir = 'a'")
    config = parse(Asking, [path, "--seed=1"])
    assert config.given == {"out_dir", "seed"}
    assert dataclasses.replace(config, seed=3).given == {"out_dir", "seed"}
    assert "given" not in usage(Asking, "demo.py", "doc")
    with pytest.raises(ValueError, match="unknown knob 'given'"):
        parse(Asking, ["--given=seed"])
    assert not hasattr(parse(Config, ["--seed=1"]), "given")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batchsize", "batch-size", "_batch_siz"])
def test_an_unknown_knob_is_refused_with_the_nearest_name(name):
    with pytest.raises(ValueError, match=f"{name}.*batch_size"):
        parse(Config, [f"--{name}=4"])


@pytest.mark.parametrize(
    "line", ["batchsize = 4", "seed = batchsize = 4", "for batchsize in (1, 2): seed = 3"]
)
def test_an_unknown_name_in_a_file_is_refused_with_the_nearest_knob(config_file, line):
    with pytest.raises(ValueError, match=r"own\.py: .*'batchsize'.*'batch_size'"):
        parse(Config, [config_file(line)])


@pytest.mark.parametrize(
    ("arg", "kind"),
    [
        ("--seed=1.5", "int"),
        ("--seed=1e3", "int"),
        ("--seed=", "int"),
        ("--seed=true", "int"),
        ("--seed=" + "9" * 5000, "int"),
        ("--learning_rate=high", "float"),
        ("--learning_rate=1,5", "float"),
        ("--compile=1", "bool"),
        ("--compile=yes", "bool"),
        ("--compile=", "bool"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused(arg, kind):
    with pytest.raises(ValueError, match=f"{arg}: .*{kind}"):
        parse(Config, [arg])


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("seed = 1.0", "int"),
        ("seed = True", "int"),
        ("seed = 'one'", "int"),
        ("seed = None", "int"),
        ("seed = 1\nfor _ in range(100_000): seed = [seed]", "int"),
        ("learning_rate = True", "float"),
        ("learning_rate = 10**400", "float"),
        ("learning_rate = [1e-3]", "float"),
        ("compile = 1", "bool"),
        ("compile = 'yes'", "bool"),
        ("out_dir = 1", "str"),
        ("out_dir = b'out'", "str"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_refused(config_file, line, kind):
    with pytest.raises(ValueError, match=rf"own\.py: {line.split()[0]} .*{kind}"):
        parse(Config, [config_file(line)])


@pytest.mark.parametrize("arg", ["--seed", "--compile", "-seed=1", "-s", "-", "--"])
def test_an_argument_of_another_form_is_told_how_knobs_are_written(arg):
    with pytest.raises(ValueError, match=f"^{arg}: .*--knob=value"):
        parse(Config, [arg])


@pytest.mark.parametrize("arg", ["absent.py", "seed=1", "", ".", "\0", "\ud800", "a" * 300])
def test_an_argument_that_is_neither_knob_nor_file_is_named(arg):
    with pytest.raises(OSError) as error:
        parse(Config, [arg])
    assert arg in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "kind"),
    [
        ("seed = 2\nseed = (\n", 2, "SyntaxError"),
        ("seed = 2\n  batch_size = 3\n", 2, "IndentationError"),
        ("seed = 2\n\nseed = 1 / 0\n", 3, "ZeroDivisionError"),
        ("seed = 2\nimport nothing_of_the_kind\n", 2, "ModuleNotFoundError"),
        ("def half(n):\n    return n / 0\n\nseed = half(1)\n", 2, "ZeroDivisionError"),
        ("import json\n\nseed = json.loads('{')\n", 3, "JSONDecodeError"),
        ("seed = 2\nout_dir = open('absent.txt').read()\n", 2, "FileNotFoundError"),
        ("import sys\nsys.exit('not here')\n", 2, "SystemExit"),
    ],
)
def test_an_error_in_a_file_names_the_file_the_line_and_the_error(config_file, text, line, kind):
    with pytest.raises(ValueError) as error:
        parse(Config, [config_file(text)])
    for part in ("own.py", f"line {line}", kind):
        assert part in str(error.value)


def a_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("own.py", "seed = 2")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"seed = 1\0\n", b"out_dir = '\xff'\n", b"\x7fELF\x02\x01\x01" + bytes(50), a_zip()],
    ids=["a zero byte", "not UTF-8", "a program", "a zip"],
)
def test_a_file_that_is_not_python_text_is_refused_by_name(config_file, content):
    with pytest.raises(ValueError, match=r"own\.py"):
        parse(Config, [config_file(content)])


def test_a_knob_has_to_be_at_least_its_minimum():
    at_least(1, Config(), "seed", "batch_size")
    with pytest.raises(ValueError, match="batch_size=0"):
        at_least(1, Config(batch_size=0), "seed", "batch_size")
    with pytest.raises(ValueError, match="learning_rate=nan"):
        at_least(0, Config(learning_rate=float("nan")), "learning_rate")


# --- scripts --------------------------------------------------------------------------------------


def test_a_script_runs_with_its_config(demo, config_file):
    done = demo(config_file("seed = 3"), "--out_dir=a=b", "--fail=True")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 a=b\n", "")


@dataclass
class Wrapped(Config):
    seed: int = 7
    persona: str = (
        "a person whose name is long"  # what the formatter makes of a field that is too long
    )
    model: str = (
        os.getcwd()
    )  # the other thing that the formatter makes of a field that is too long for its line
    batch_size: int = 9  # more rows


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_knob_with_its_default_and_its_comment(demo, flag):
    done = demo("--sed=1", flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(__doc__)
    assert "usage: python demo.py" in done.stdout
    assert help_lines(done.stdout) == {
        "seed=1": "of the dice",
        "batch_size=8": "rows",
        "learning_rate=0.001": "at its highest",
        "compile=False": "first, then run",
        "out_dir=out": "né le même",
        "fail=": "a statement that fails",
    }


def help_lines(text):
    """Return {"knob=default": comment}, of knobs whose default has no two blanks in it."""
    lines = [line[4:].partition("  ") for line in text.splitlines() if line.startswith("  --")]
    return {knob: comment.strip() for knob, _, comment in lines}


def test_a_subclass_has_the_comments_of_its_base_and_fields_may_be_wrapped():
    lines = help_lines(usage(Wrapped, "demo.py", "doc"))
    assert lines["seed=7"] == "of the dice"
    assert lines["batch_size=9"] == "more rows"
    assert lines["persona=a person whose name is long"].startswith("what the formatter")
    assert lines[f"model={os.getcwd()}"].startswith("the other thing")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--sed=1"], "'seed'"),
        (["absent.py"], "absent.py"),
        (["a" * 300], "a" * 300),
        (["--fail=open('absent.txt')"], "absent.txt: No such file or directory"),
        (["--fail=os.mkdir('/')"], "File exists"),
        (["--fail=raise ValueError('the moon is full')"], "the moon is full"),
        (["--fail=raise ValueError('one\\ntwo\\nthree')"], "two"),
        (["--fail=raise ValueError('long' * 100_000)"], "longlong"),
        (["--fail=bytearray(1 << 62)"], "not enough memory"),
        (["--fail=torch.empty(1 << 55)"], "not enough memory"),
        (["--fail=raise torch.OutOfMemoryError('CUDA out of memory.')"], "not enough memory"),
    ],
    ids=lambda value: value[0][:30],
)
def test_an_error_that_the_user_can_fix_ends_in_two_lines_and_status_2(demo, args, word):
    done = demo(*args)
    assert_refused(done, "demo.py: ", word)
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_ends_in_the_path_and_the_remedy(demo, name):
    number = getattr(errno, name)
    done = demo(f"--fail=raise OSError({number}, 'it is full', 'out/last/state.pt')")
    assert_refused(done, "out/last/state.pt: it is full", "free some space", "--init_from=resume")


def test_a_bug_is_raised(demo):
    with pytest.raises(RuntimeError, match="shapes"):
        demo("--fail=raise RuntimeError('shapes do not match')")


def test_ctrl_c_ends_a_script_quietly_with_the_shells_status(demo):
    done = demo("--fail=signal.raise_signal(signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, "")


SCRIPT = '''
"""A script, né le même."""
from dataclasses import dataclass
from nanochatgpt.configurator import run

@dataclass
class Config:
    seed: int = 1  # of the dice

def main(config):
    print(config)

run(main, Config)
'''


@pytest.fixture
def process(script, tmp_path):
    """Run the script above as a process of its own."""
    path = tmp_path / "demo.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return lambda *args, **env: script(path, *args, env={"PYTHONPATH": str(ROOT)} | env)


def test_help_is_printed_on_a_terminal_that_lacks_a_character(process):
    done = process("--help", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert "n? le m?me" in done.stdout


def test_dev_mode_shows_the_traceback_of_a_mistake_too(process):
    done = process("--seed=x", PYTHONDEVMODE="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "--seed=x" in done.stderr


@pytest.mark.parametrize("output", [">&-", "| true"])
def test_a_script_whose_output_nobody_reads_ends_quietly(tmp_path, output):
    (tmp_path / "demo.py").write_text(SCRIPT, encoding="utf-8")
    line = f'{{ sleep 0.2; "$0" demo.py --help; echo $? >status; }} {output}'
    command = ["sh", "-c", line, sys.executable]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert (tmp_path / "status").read_text() == "0\n"


# --- the project's scripts and configs ------------------------------------------------------------

SCRIPTS = []
for pattern in ("*.py", "prepare/*.py", "evaluation/*.py", "benchmarks/*.py"):
    for path in sorted(ROOT.glob(pattern)):
        if path.read_text(encoding="utf-8").endswith(", Config)\n"):
            SCRIPTS.append(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_a_docstring_and_a_line_of_help_for_each_knob(name):
    module = importlib.import_module(name)
    text = usage(module.Config, name, module.__doc__)
    assert text.splitlines()[0]
    lines = [line for line in text.splitlines() if line.startswith("  --")]
    knobs = [field for field in fields(module.Config) if field.name != "given"]
    for line, field in zip(lines, knobs, strict=True):
        assignment = f"  --{field.name}={field.default}"
        assert line.startswith(assignment)
        assert line.removeprefix(assignment).strip(), line


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_of_ours_is_one_that_its_script_takes(path):
    name = {"ppo": "train_ppo", "train": "train_reward"}.get(path.stem.split("_")[0], "train")
    if command := re.search(rf"python (\S+)\.py config/{path.name}", path.read_text()):
        name = command[1].replace("/", ".")
    script = importlib.import_module(name)
    assert parse(script.Config, [str(path)]) != script.Config()
