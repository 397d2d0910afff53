"""
Knobs of a script: a dataclass, overridden by Python files and --knob=value arguments.

    python SCRIPT.py [config/FILE.py ...] [--knob=value ...]        later wins; --help lists every knob

A config file is Python: plain assignments, run in a namespace of their own. The comment behind a field of the
dataclass is its help; its annotation (int, float, bool or str) is its type.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import reprlib
import sys
import traceback
import types
from pathlib import Path


def parse(Config, argv):
    """Return a `Config` with its defaults overridden by the files and arguments in `argv`, in their order.

    Its attribute `given` has the names of the knobs that these set. Raises ValueError for an unknown knob or a value of
    the wrong type, FileNotFoundError for a missing file.
    """
    values = {}
    for arg in argv:
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            field = _field(Config, name, arg)
            if not equals:
                raise ValueError(f"{arg} needs a value behind a =, as in --{name}={field.default}")
            values[name] = _from_text(field, text)
        elif arg.startswith("-"):
            raise ValueError(
                f"{arg} is not an argument: write --knob=value; --help lists the knobs"
            )
        else:
            for name, value in _run_file(arg).items():
                values[name] = _checked(_field(Config, name, arg), value, arg)
    config = Config(**values)
    config.given = frozenset(values)
    return config


def run(main, Config):
    """Call `main(Config)` for a script: --help prints and exits 0; what a person can mend ends in one or two lines
    on stderr and exit status 2. `python -X dev SCRIPT.py` shows the traceback instead."""
    script = Path(sys.argv[0]).name
    # lines appear at once in a pipe too; a terminal that lacks a character shows another
    if sys.stdout:  # which the shell may have closed
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(usage(Config, sys.argv[0], inspect.getmodule(main).__doc__))
        else:
            main(parse(Config, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's status for Ctrl-C
    except BrokenPipeError:  # the reader of our output, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        full = re.search("out of memory|can't allocate memory", str(error))
        if sys.flags.dev_mode or (isinstance(error, RuntimeError) and not full):
            raise
        if full or isinstance(error, MemoryError):
            error = "not enough memory: take a smaller model, or a smaller batch_size or block_size to train it"
        elif isinstance(error, OSError) and error.strerror:
            error = f"{error.filename or ''}: {error.strerror}".lstrip(": ")
        lines = f"{script}: {error}".splitlines()[:2]
        print("\n".join(line[:480] for line in lines), file=sys.stderr)  # a file may have any text
        sys.exit(2)


def take_mode(modes, doc):
    """Take the mode out of the arguments of a script that is called as python SCRIPT.py MODE ..., and return it; --help
    prints `doc` instead. Exits where there is none."""
    mode = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if mode in ("-h", "--help"):
        print(doc.strip())
        sys.exit()
    if mode not in modes:
        print(f"{Path(sys.argv[0]).name}: {mode} is none of {', '.join(modes)}", file=sys.stderr)
        sys.exit(2)
    return mode


def at_least(least, config, *names):
    """Raise ValueError for a knob that is below `least`, NaN, or beyond all sense."""
    for name in names:
        value = getattr(config, name)
        if not value >= least:
            raise ValueError(f"{name}={value} is too small: it must be {least} or more")
        if value >= (2**32 if isinstance(value, int) else math.inf):
            raise ValueError(f"{name}={value} is too large")


def usage(Config, script, doc):
    """Return the text of --help: the script's docstring and a line for each knob with its default."""
    lines = [
        (doc or "").strip(),
        "",
        f"usage: python {script} [config/FILE.py ...] [--knob=value ...]",
        "",
    ]
    comments = {}
    for base in reversed(
        Config.__mro__[:-1]
    ):  # a field that only has another default keeps its comment
        comments |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE)
    for field in dataclasses.fields(Config):
        lines.append(
            f"  --{f'{field.name}={field.default}':<38} {comments.get(field.name, '')}".rstrip()
        )
    return "\n".join(lines)


def _field(Config, name, source):
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if name not in fields:
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0)[0]
        raise ValueError(
            f"{source}: unknown knob '{name}', did you mean '{nearest}'? --help lists them all"
        )
    return fields[name]


def _from_text(field, text):
    if field.type is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--{field.name}={text}: {field.name} is true or false")
        return text.lower() == "true"
    try:
        return field.type(text)
    except ValueError:
        raise ValueError(
            f"--{field.name}={text}: {field.name} is of type {field.type.__name__}"
        ) from None


def _checked(field, value, path):
    if field.type is float and type(value) is int:
        with contextlib.suppress(OverflowError):  # then it is refused as the int that it is
            value = float(value)
    if type(value) is not field.type:
        try:
            shown = reprlib.repr(value)
        except ValueError:  # of an int with more digits than Python prints
            shown = "a number out of range"
        raise ValueError(
            f"{path}: {field.name} = {shown}: {field.name} is of type {field.type.__name__}"
        )
    return value


def _run_file(path):
    """Run a config file; return what it assigned, less modules, functions, classes and _names."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"config file {path} does not exist; arguments are config files or --knob=value"
        )
    names = {"__name__": "config", "__file__": path}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), names)
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        line = (
            lines[-1] if lines else getattr(error, "lineno", None)
        )  # a SyntaxError has no frame of its own
        where = f"{path}, line {line}" if line else path
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    ignored = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type
    return {
        name: value
        for name, value in names.items()
        if name[0] != "_" and not isinstance(value, ignored)
    }
