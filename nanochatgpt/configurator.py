"""Knobs of a script: a dataclass, overridden by config files and --knob=value arguments.

    python SCRIPT.py [config/FILE.py ...] [--knob=value ...]        the last one wins

A config file holds plain Python assignments. A knob is a field of type int, float, bool or str; the
comment after it is its line of --help. In a text that may be a path, "~/" at the start or after a
comma is the home directory.
"""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import os
import re
import sys
import traceback
import types
from pathlib import Path

TEXTS = ("start", "persona", "api_key")  # knobs whose values are never paths


def parse(Config, argv):
    """Return a `Config`, overridden by the files and arguments in `argv`. Its field `given`,
    if any, names the knobs that were set. Raises ValueError or OSError for a wrong argument."""
    knobs = _knobs(Config)
    values = {}  # knob -> value; later arguments win
    for arg in argv:
        # a config file sets several knobs, an argument sets one
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("-"):
            assignments = _run_file(arg)
        elif arg.startswith("--") and equals:
            assignments = {name: text}
        else:
            raise ValueError(f"{arg}: write --knob=value; --help lists the knobs")
        for name, value in assignments.items():
            if name not in knobs:
                nearest = difflib.get_close_matches(name, knobs, n=1, cutoff=0)[0]
                raise ValueError(f"{arg}: unknown knob '{name}', did you mean '{nearest}'?")
            values[name] = _convert(knobs[name], value, arg)
    if hasattr(Config, "given"):  # some defaults depend on whether the user set a knob
        values["given"] = frozenset(values)
    return Config(**values)


def run(main, Config):
    """Call `main(config)`, or print the knobs for --help. An error that the user can fix ends in
    one or two lines on stderr and exit status 2; `python -X dev SCRIPT.py` shows its traceback."""
    # print each line at once, in a pipe too, and "?" for characters that the terminal lacks
    if sys.stdout:  # None if the shell closed it
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(usage(Config, sys.argv[0], inspect.getmodule(main).__doc__))
        else:
            main(parse(Config, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's status for Ctrl-C
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        message = str(error)
        full = re.search("out of memory|can't allocate memory", message)
        if full or isinstance(error, MemoryError):
            message = "not enough memory: use a smaller model, batch_size or block_size"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            cause = message.partition("\n")[0]
            remedy = "install a C++ compiler such as g++, on a GPU also triton, or set it to false"
            message = f"compile=true fails: {cause}\n{remedy}"
        elif isinstance(error, RuntimeError):  # a bug
            raise
        elif isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
            message = f"{error.filename or ''}: {error.strerror}".lstrip(": ")
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # the disk is full
                message += "\nfree some space and run again (training: with --init_from=resume)"
        # two short lines at most, since a message may quote a damaged file
        message = f"{Path(sys.argv[0]).name}: {message}"
        for line in message.splitlines()[:2]:
            print(line[:480], file=sys.stderr)
        sys.exit(2)


def at_least(minimum, config, *names):
    """Raise ValueError for a knob that is below `minimum` or NaN."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:  # also for NaN
            raise ValueError(f"{name}={value} is too small: it must be {minimum} or more")


def usage(Config, script, doc):
    """Return the text of --help: the script's docstring, then a line for each knob."""
    lines = [doc.strip(), "", f"usage: python {script} [config/FILE.py ...] [--knob=value ...]", ""]
    # the comments of the fields; the formatter may wrap a default in ()
    field = re.compile(r"^    (\w+): \w+ = (?:\(\n[^#]*?)?.*?  # (.*)$", re.MULTILINE)
    comments = {}
    for base in reversed(Config.__mro__[:-1]):  # a subclass overrides its base
        comments |= field.findall(inspect.getsource(base))
    for name, knob in _knobs(Config).items():
        assignment = f"{name}={knob.default}"
        lines.append(f"  --{assignment:<38} {comments.get(name, '')}".rstrip())
    return "\n".join(lines)


def _knobs(Config):
    return {field.name: field for field in dataclasses.fields(Config) if field.name != "given"}


def _convert(knob, value, source):
    """Return the value in the knob's type: parse text, and let an int stand for a float."""
    if knob.type is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())  # None fails below
    elif isinstance(value, str) or (knob.type is float and type(value) is int):
        with contextlib.suppress(ValueError, OverflowError):
            value = knob.type(value)
    if type(value) is not knob.type:  # isinstance would accept True for an int
        example = f"{knob.name}={knob.default}"
        raise ValueError(f"{source}: {knob.name} is of type {knob.type.__name__}, as in {example}")
    if knob.type is str and knob.name not in TEXTS:
        return _expand_home(value)
    return value


def _expand_home(text):
    """Return the text with the home directory for ~, as in ~, ~/out or ~/a,~/b."""
    return re.sub(r"^~$|(?<![^,])~(?=/)", lambda _: os.path.expanduser("~"), text)


def _run_file(path):
    """Run a config file; return what it assigns, without modules, functions, classes and _names."""
    path = _expand_home(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}; write knobs as --knob=value")
    names = {"__name__": "config", "__file__": path}  # its global variables
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), names)
    except (Exception, SystemExit) as error:
        place = path  # and the last line of it in the traceback
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == path:
                place = f"{path}, line {frame.lineno}"
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    values = {}  # what may be knobs
    for name, value in names.items():
        if name[0] != "_" and not callable(value) and not isinstance(value, types.ModuleType):
            values[name] = value
    return values
