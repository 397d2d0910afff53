"""Knobs from files and arguments: what they become, in which order, and what a person reads when one is wrong."""

import importlib.util
import io
import marshal
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from conftest import ROOT, assert_refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochatgpt.configurator import parse, usage

SCRIPT = '''
"""A script with a few knobs, né le même."""

import os
import signal
from dataclasses import dataclass

from nanochatgpt.configurator import run


@dataclass
class Config:
    seed: int = 1  # of the dice
    learning_rate: float = 1e-3  # at its highest
    compile: bool = False  # first, then run
    out_dir: str = "out"  # where to
    fail: str = ""  # what goes wrong: a statement


def main(config):
    exec(config.fail)
    print(config)


if __name__ == "__main__":
    run(main, Config)
'''


@dataclass
class Config:
    seed: int = 1
    batch_size: int = 8
    learning_rate: float = 1e-3
    compile: bool = False
    out_dir: str = "out"


def changed(argv):
    """Return {knob: value} of those that differ from their defaults."""
    config = parse(Config, argv)
    return {
        f.name: value for f in fields(Config) if (value := getattr(config, f.name)) != f.default
    }


@pytest.fixture
def config_file(tmp_path):
    """Write a config file: config_file("seed = 2") -> its path as an argument."""

    def write(text, name="own.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def demo(script, tmp_path):
    """Run the script above with these arguments."""
    (tmp_path / "demo.py").write_text(SCRIPT, encoding="utf-8")
    return lambda *args, **env: script(
        tmp_path / "demo.py", *args, env={"PYTHONPATH": str(ROOT)} | env
    )


# values and their order


def test_without_arguments_every_knob_has_its_default():
    assert parse(Config, []) == Config()


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


def test_what_comes_later_wins_be_it_a_file_or_an_argument(config_file):
    two = config_file("seed = 2\nbatch_size = 2", "two.py")
    three = config_file("seed = 3", "three.py")
    assert changed([two, three]) == {"seed": 3, "batch_size": 2}
    assert changed([three, two]) == {"seed": 2, "batch_size": 2}
    assert changed(["--seed=4", two]) == {"seed": 2, "batch_size": 2}
    assert changed([two, "--seed=4"]) == {"seed": 4, "batch_size": 2}
    assert changed(["--seed=4", "--seed=5"]) == {"seed": 5}


def test_names_with_an_underscore_modules_functions_and_classes_in_a_file_are_ignored(config_file):
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


def test_a_file_runs_in_a_namespace_of_its_own(config_file):
    first = config_file("_seed = 7\nseed = 2", "first.py")
    second = config_file("seed = _seed", "second.py")
    with pytest.raises(ValueError, match="NameError: name '_seed' is not defined"):
        parse(Config, [first, second])
    assert "_seed" not in globals()


def test_parsing_leaves_the_defaults_as_they_were():
    assert parse(Config, ["--seed=5"]) != Config()
    assert parse(Config, []) == Config()


# what is refused


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("batchsize", "batch_size"), ("batch-size", "batch_size"), ("lerning_rate", "learning_rate")],
)
def test_an_unknown_knob_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=f"unknown knob '{name}', did you mean '{nearest}'"):
        parse(Config, [f"--{name}=4"])


@pytest.mark.parametrize(
    "line", ["batchsize = 4", "seed = batchsize = 4", "for batchsize in (1, 2): seed = 3"]
)
def test_an_unknown_name_in_a_file_is_refused_with_the_nearest_knob(config_file, line):
    path = config_file(line)
    with pytest.raises(
        ValueError, match=r"own\.py: unknown knob 'batchsize', did you mean 'batch_size'"
    ):
        parse(Config, [path])


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("--seed=1.5", "seed is of type int"),
        ("--seed=1e3", "seed is of type int"),
        ("--seed=", "seed is of type int"),
        ("--seed=true", "seed is of type int"),
        ("--learning_rate=high", "learning_rate is of type float"),
        ("--learning_rate=1,5", "learning_rate is of type float"),
        ("--compile=1", "compile is true or false"),
        ("--compile=yes", "compile is true or false"),
        ("--compile=", "compile is true or false"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused(arg, says):
    with pytest.raises(ValueError, match=f"{arg}: {says}"):
        parse(Config, [arg])


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("seed = 1.0", "int"),
        ("seed = True", "int"),
        ("seed = '1'", "int"),
        ("seed = None", "int"),
        ("learning_rate = True", "float"),
        ("learning_rate = '1e-3'", "float"),
        ("compile = 1", "bool"),
        ("compile = 'true'", "bool"),
        ("out_dir = 1", "str"),
        ("out_dir = b'out'", "str"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_refused(config_file, line, kind):
    name = line.split()[0]
    path = config_file(line)
    with pytest.raises(ValueError, match=rf"own\.py: {line}: {name} is of type {kind}"):
        parse(Config, [path])


@pytest.mark.parametrize("value", ["10**400", "10**5000"])
def test_a_number_too_large_for_a_float_is_refused(config_file, value):
    path = config_file(f"learning_rate = {value}")
    with pytest.raises(
        ValueError, match=r"own\.py: learning_rate = .*: learning_rate is of type float"
    ):
        parse(Config, [path])


def test_a_value_that_is_long_or_deep_is_shown_in_part(config_file):
    for text in ("seed = 'long' * 100_000", "seed = 1\nfor _ in range(100_000): seed = [seed]"):
        with pytest.raises(
            ValueError, match=r"own\.py: seed = .*\.\.\..*: seed is of type int"
        ) as error:
            parse(Config, [config_file(text)])
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", [field.name for field in fields(Config)])
def test_an_argument_without_a_value_is_told_how_to_give_one(name):
    default = getattr(Config(), name)
    with pytest.raises(
        ValueError, match=f"--{name} needs a value behind a =, as in --{name}={default}"
    ):
        parse(Config, [f"--{name}"])


@pytest.mark.parametrize("arg", ["-seed=1", "-s", "-"])
def test_an_argument_with_one_dash_is_told_how_knobs_are_written(arg):
    with pytest.raises(ValueError, match=f"^{arg} is not an argument: write --knob=value"):
        parse(Config, [arg])


@pytest.mark.parametrize("arg", ["absent.py", "seed=1", "", "."])
def test_what_is_neither_knob_nor_file_is_named(arg):
    with pytest.raises(
        FileNotFoundError, match="arguments are config files or --knob=value"
    ) as error:
        parse(Config, [arg])
    assert arg in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("seed = 2\nseed = (\n", 2, "SyntaxError: '[(]' was never closed"),
        ("seed = 2\n  batch_size = 3\n", 2, "IndentationError: unexpected indent"),
        ("seed = 2\n\nseed = 1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        (
            "seed = 2\nimport nothing_of_the_kind\n",
            2,
            "ModuleNotFoundError: No module named 'nothing_of_the_kind'",
        ),
        ("def half(n):\n    return n / 0\n\nseed = half(1)\n", 2, "ZeroDivisionError"),
        (
            "import json\n\nseed = json.loads('{')\n",
            3,
            "JSONDecodeError",
        ),  # raised in a file of Python's
        ("seed = 2\nout_dir = b'\\xff'.decode()\n", 2, "UnicodeDecodeError"),
        (
            "from pathlib import Path\nout_dir = Path('absent.txt').read_text()\n",
            2,
            "FileNotFoundError",
        ),
        ("import sys\nsys.exit('not here')\n", 2, "SystemExit: not here"),
    ],
)
def test_an_error_in_a_file_is_told_with_the_files_name_and_line(config_file, text, line, says):
    path = config_file(text)
    with pytest.raises(ValueError, match=rf"own\.py, line {line}: {says}"):
        parse(Config, [path])


def a_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("own.py", "seed = 2")
    return file.getvalue()


def a_pyc():
    return (
        importlib.util.MAGIC_NUMBER
        + bytes(12)
        + marshal.dumps(compile("seed = 2", "own.py", "exec"))
    )


@pytest.mark.parametrize(
    "content",
    [b"seed = 1\0\n", b"out_dir = '\xff'\n", b"\x7fELF\x02\x01\x01" + bytes(50), a_zip(), a_pyc()],
    ids=["a zero byte", "not UTF-8", "a program", "a zip", "compiled"],
)
def test_a_file_that_is_not_python_text_is_refused_by_name(config_file, content):
    path = config_file(content)
    with pytest.raises(ValueError, match=r"own\.py") as error:
        parse(Config, [path])
    assert "line None" not in str(error.value)


# anything a keyboard can produce, more or less
values = st.one_of(
    st.text(max_size=8), st.integers().map(str), st.floats().map(str), st.booleans().map(str)
)
knobs = st.sampled_from([*(field.name for field in fields(Config)), "sed", "", "-"])
arguments = st.one_of(
    st.text(max_size=12),
    st.builds("--{}={}".format, knobs, values),
    st.builds("--{}".format, knobs),
    st.text(max_size=8).map("--{}".format),
    st.text(max_size=8).map("-{}".format),
)


@settings(deadline=None)
@given(argv=st.lists(arguments, max_size=4))
@example(argv=["--seed=" + "9" * 5000])
@example(argv=["--=", "--"])
@example(argv=["\0"])
@example(argv=["a" * 300])
@example(argv=["\ud800"])
def test_any_arguments_make_a_config_or_a_message(tmp_path_factory, argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        try:
            config = parse(Config, argv)
        except (ValueError, OSError) as error:
            assert str(error)
            return
    assert [type(getattr(config, field.name)) for field in fields(Config)] == [
        field.type for field in fields(Config)
    ]


# the scripts


def test_a_script_runs_with_what_was_parsed(demo, config_file):
    done = demo(config_file("learning_rate = 1"), "--out_dir=a=b", "--compile=true")
    assert (
        done.stdout == "Config(seed=1, learning_rate=1.0, compile=True, out_dir='a=b', fail='')\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_knob_with_its_default_and_its_comment(demo, tmp_path, flag):
    done = demo("--sed=1", flag)
    assert (done.returncode, done.stderr) == (0, "")
    first, *_ = lines = done.stdout.splitlines()
    assert first.startswith("A script with a few knobs")
    assert (
        f"usage: python {tmp_path / 'demo.py'} [config/FILE.py ...] [--knob=value ...]" in lines
    )  # as it was called
    knobs = [line.split(maxsplit=1) for line in lines if line.startswith("  --")]
    assert [(knob, comment.strip()) for knob, comment in knobs] == [
        ("--seed=1", "of the dice"),
        ("--learning_rate=0.001", "at its highest"),
        ("--compile=False", "first, then run"),
        ("--out_dir=out", "where to"),
        ("--fail=", "what goes wrong: a statement"),
    ]


def test_help_is_printed_on_a_terminal_that_lacks_a_character(demo):
    done = demo("--help", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert "n? le m?me" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("arg", ["--help", "--seed=2"])
@pytest.mark.parametrize("output", [">&-", "| true"])
def test_a_script_whose_output_nobody_reads_ends_quietly(tmp_path, arg, output):
    (tmp_path / "demo.py").write_text(SCRIPT, encoding="utf-8")
    line = f'{{ sleep 0.2; "$0" demo.py {arg}; echo $? >status; }} {output}'
    command, env = ["sh", "-c", line, sys.executable], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert (tmp_path / "status").read_text() == "0\n"


SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "prepare").glob("*.py"))]
SCRIPTS = [
    path for path in SCRIPTS if path.read_text(encoding="utf-8").endswith("    run(main, Config)\n")
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_a_docstring_and_a_line_of_help_for_each_knob(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert Path(module.__file__) == path
    lines = usage(module.Config, path.name, module.__doc__).splitlines()
    assert lines[0]
    for field in fields(module.Config):
        (line,) = (line for line in lines if line.startswith(f"  --{field.name}="))
        assert line.removeprefix(f"  --{field.name}={field.default}").strip(), line


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_of_ours_is_one_that_its_script_takes(path):
    scripts = {"eval_": "evaluate", "train_reward": "train_reward", "ppo_": "train_ppo"}
    named = (script for beginning, script in scripts.items() if path.stem.startswith(beginning))
    script = importlib.import_module(next(named, "train"))
    assert parse(script.Config, [str(path)]) != script.Config()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--sed=1"], ["demo.py: --sed=1: unknown knob 'sed', did you mean 'seed'?"]),
        (["--seed=x"], ["--seed=x: seed is of type int"]),
        (["--seed"], ["--seed needs a value behind a =, as in --seed=1"]),
        (["absent.py"], ["config file absent.py does not exist"]),
        (["a" * 300], ["a" * 300]),
        (["--fail=open('absent.txt')"], ["demo.py: absent.txt: No such file or directory"]),
        (["--fail=os.mkdir('demo.py')"], ["demo.py: File exists"]),
        (["--fail=raise ValueError('the moon is full')"], ["demo.py: the moon is full"]),
        (["--fail=bytearray(1 << 62)"], ["not enough memory", "batch_size"]),
        (
            ["--fail=raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')"],
            ["not enough memory"],
        ),
        (["--fail=import torch; torch.empty(1 << 55)"], ["not enough memory"]),
    ],
    ids=lambda value: value[0][:30],
)
def test_what_a_person_can_mend_ends_in_a_line_and_status_2(demo, args, words):
    done = demo(*args)
    assert_refused(done, *words)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "text", ["seed = (", "sed = 1", "seed = 1.5", "raise ValueError('one\\ntwo\\nthree\\nfour')"]
)
def test_a_mistake_in_a_file_ends_in_at_most_two_lines_and_status_2(demo, config_file, text):
    assert_refused(demo(config_file(text)), "demo.py: ", "own.py")


def test_a_long_message_is_cut(demo):
    done = demo("--fail=raise ValueError('long' * 100_000)")
    assert_refused(done, "demo.py: longlong")
    assert len(done.stderr) < 1100


def test_a_bug_shows_its_traceback(demo):
    done = demo("--fail=raise RuntimeError('shapes do not match')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_dev_mode_shows_the_traceback_of_a_mistake_too(demo):
    done = demo("--seed=x", PYTHONDEVMODE="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "seed is of type int" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_a_script_quietly_with_the_shells_status(demo):
    done = demo("--fail=os.kill(os.getpid(), signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, "")
