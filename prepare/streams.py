"""Rows of data sets on the Hugging Face hub or on disk, through the datasets library."""

import glob
import os
from pathlib import Path

from prepare.records import parquet_batches

CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a set that has a loading script
STATE_INTERVAL = 1000  # rows between two states of a data set


def open_dataset(config):
    """Return the builder of config.dataset, from the datasets library. Raises FileNotFoundError,
    ConnectionError or ValueError with the remedy."""
    os.environ.setdefault("USE_TORCH", "0")  # datasets would import it: half of the memory
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{error}: pip install -e '.[hub]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we report errors ourselves

    options = {"path": config.dataset, "name": config.config or None}
    path = Path(config.dataset).absolute()
    if path.is_file():
        options |= {"path": str(path.parent), "data_files": glob.escape(str(path))}
    elif path.exists():
        options["path"] = str(path)
    elif "/" not in config.dataset:  # datasets would take "csv" for all files here
        problem = f"no folder or file {config.dataset}"
        raise FileNotFoundError(f"{problem}; names on the hub are org/name")
    try:
        try:
            builder = datasets.load_dataset_builder(**options, revision=config.revision or None)
        except RuntimeError:  # it has a loading script: take the hub's conversion, a folder each
            options = {"path": config.dataset, "data_dir": config.config or "default"}
            builder = datasets.load_dataset_builder(**options, revision=CONVERTED)
    except datasets.exceptions.DatasetNotFoundError as error:
        remedy = "check the name; of a gated or private set, accept its terms and set HF_TOKEN"
        raise FileNotFoundError(f"{one_line(error)}\n{remedy}") from error
    except ConnectionError as error:
        raise ConnectionError(f"{one_line(error)}: check the network") from error
    except Exception as error:  # of many types
        raise ValueError(f"{config.dataset}: {one_line(error)}") from error

    # fail now, not after the first split
    for split in filter(None, (config.split, config.val_split)):
        if split not in builder.config.data_files:
            splits = ", ".join(builder.config.data_files)
            raise ValueError(f"{config.dataset} has no split {split}, only {splits}")

    # all columns of a .csv are text
    if type(builder.config).__name__ == "CsvConfig":
        builder.config.keep_default_na = False
        first = next(iter(builder.as_streaming_dataset(split=config.split)))
        features = datasets.Features(dict.fromkeys(first, datasets.Value("string")))
        builder.config.features = features
        builder.info.features = features
    return builder


def one_line(error):
    """Return the message of an error of the datasets library in one line."""
    return " ".join(str(error).partition("Example of usage")[0].split())


def versions_of(builder):
    """Return the paths of a data set's files, with size and time of change of those on disk. Paths
    on the hub have a commit in them."""
    versions = []
    for files in builder.config.data_files.values():
        for file in files:
            path = Path(file)
            stat = path.stat() if path.exists() else None
            versions.append([file, stat and stat.st_size, stat and stat.st_mtime_ns])
    return versions


def batches(builder, name, split, state):
    """Yield ([row], state) of a split: rows as dicts, and where to go on after them, None if that
    is not known yet. state: where to begin, None: at the start. Raises ValueError that names the
    data set if rows cannot be read."""
    files = builder.config.data_files[split]
    try:
        if all(file.endswith(".parquet") for file in files):
            # datasets would keep whole row groups in memory
            yield from parquet_files(files, state or (0, 0))
            return
        dataset = builder.as_streaming_dataset(split=split)
        if state:
            dataset.load_state_dict(state)
        for number, row in enumerate(dataset, 1):
            known = number % STATE_INTERVAL == 0
            yield [row], dataset.state_dict() if known else None
    except Exception as error:  # of many types
        remedy = "repair the file; after a lost connection, run again to go on from there"
        raise ValueError(f"{name}, {split}: {one_line(error)}\n{remedy}") from error


def parquet_files(paths, state):
    """Yield what `batches` does, of Parquet files, on disk or on the hub. state: (index of a file,
    index of its row group)."""
    import fsspec

    first_file, first_group = state
    for number, path in enumerate(paths[first_file:], first_file):
        with fsspec.open(path) as file:
            for rows, group in parquet_batches(file, path, first_group):
                yield rows, (number, group) if group else None
        first_group = 0
