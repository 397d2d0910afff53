"""
Files that appear whole or not at all.
"""

import contextlib
import os

import safetensors


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to; what was written there then takes the place of `path` at one instant, or not at all.

    Raises OSError, with the path, where it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (
        safetensors.SafetensorError,
        RuntimeError,
    ) as error:  # how these and torch tell of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
