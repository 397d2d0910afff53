"""Any chat set of the Hugging Face hub, or one on disk: python prepare/hub.py --dataset=org/name

--dataset is a name on the hub, or a folder or file of Parquet, JSON Lines, CSV or Arrow. Needs
`pip install -e '.[hub]'`. Rows are streamed, and an interrupted run goes on where it stopped. A row
is a conversation as prepare/jsonl.py reads it; a pair of a chosen and a rejected reply, as
prepare/retry.py reads it for a reward model; or one message of a tree, as in OpenAssistant.
--columns=prompt=question,completion=answer names the columns of other sets.
"""

import difflib
import itertools
import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import at_least, run
from nanochatgpt.files import read_json, replacing
from prepare.corpus import divide, prepare
from prepare.formats import ConversationReader
from prepare.preferences import examples, with_label
from prepare.records import parquet_batches

CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a set that has a loading script
STATE_INTERVAL = 1000  # rows between two states of a data set


@dataclass
class Config:
    dataset: str = ""  # org/name on the hub, or a folder or a file
    config: str = ""  # the configuration, of a set that has several
    revision: str = ""  # a branch, tag or commit of the hub; by default main
    split: str = "train"  # the split to learn from
    val_split: str = ""  # the split for val.bin; by default one conversation in twenty of `split`
    columns: str = ""  # FIELD=COLUMN,...: read these columns, as these fields of a format
    where: str = ""  # COLUMN=VALUE: take only the rows that have it, as in lang=en
    max_examples: int = 0  # rows of each split, the first ones (0 = all)
    skip_bad: bool = False  # leave out and count the rows that cannot be read
    out_dir: str = ""  # where train.bin and val.bin go; by default data/ and the set's name
    template: str = "human_bot"  # how conversations are written: one of TEMPLATES in tokenizer.py

    def __post_init__(self):
        """Raises ValueError for a value that makes no sense."""
        at_least(0, self, "max_examples")
        for knob in ("columns", "where"):
            for pair in filter(None, getattr(self, knob).split(",")):
                if "=" not in pair:
                    raise ValueError(f"{knob}={pair} must be as in {EXAMPLES[knob]}")
        for field in pairs_of(self.columns):
            if field not in FIELDS:
                nearest = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0)[0]
                raise ValueError(f"columns={field}=...: no format has it, did you mean {nearest}?")
        if self.where.count("=") > len(pairs_of(self.where)):
            raise ValueError(f"where={self.where} names a column twice")


EXAMPLES = {"columns": "prompt=question,completion=answer", "where": "lang=en"}
# what --columns can name
FIELDS = "messages conversations dialog instruction input output context response history prompt"
FIELDS += " completion system chosen rejected label message_id parent_id role text rank"
FIELDS = FIELDS.split()


# --- the data set ---------------------------------------------------------------------------------


def open_dataset(config):
    """Return the builder of the data set, from the datasets library. Raises FileNotFoundError,
    ConnectionError or ValueError with the remedy."""
    os.environ.setdefault("USE_TORCH", "0")  # datasets would import it: half of the memory
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{error}: pip install -e '.[hub]'") from error
    datasets.disable_progress_bars()

    options = {"path": config.dataset, "name": config.config or None}
    path = Path(config.dataset).absolute()
    if path.is_file():
        options |= {"path": str(path.parent), "data_files": str(path)}
    elif path.exists():
        options["path"] = str(path)
    elif "/" not in config.dataset:  # datasets would take "csv" for all files here
        raise FileNotFoundError(
            f"no folder or file {config.dataset}; names on the hub are org/name"
        )
    try:
        try:
            builder = datasets.load_dataset_builder(**options, revision=config.revision or None)
        except RuntimeError:  # it has a loading script
            builder = datasets.load_dataset_builder(**options, revision=CONVERTED)
    except datasets.exceptions.DatasetNotFoundError as error:
        remedy = "check the name; of a gated or private set, accept its terms and set HF_TOKEN"
        raise FileNotFoundError(f"{first_line(error)}\n{remedy}") from error
    except ConnectionError as error:
        raise ConnectionError(f"{first_line(error)}: check the network") from error
    except Exception as error:  # of many types
        raise ValueError(f"{config.dataset}: {first_line(error)}") from error

    # text columns of a .csv stay text
    if type(builder.config).__name__ == "CsvConfig":
        builder.config.dtype = str
        builder.config.keep_default_na = False
    return builder


def first_line(error):
    """Return the message of an error of the datasets library in one line."""
    return " ".join(str(error).partition("Example of usage")[0].split())


def batches(builder, name, split, state):
    """Yield ([row], state) of a split: rows as dicts, and where to go on after them, None if that
    is not known yet. state: where to begin, None: at the start. Raises ValueError for a split that
    does not exist, ConnectionError if rows cannot be read."""
    files = builder.config.data_files or {}
    try:
        if all(file.endswith(".parquet") for file in files.get(split, [""])):
            # datasets would keep whole row groups in memory
            yield from parquet_files(files[split], state or (0, 0))
            return
        dataset = builder.as_streaming_dataset(split=split)
        if state:
            dataset.load_state_dict(state)
        for number, row in enumerate(dataset, 1):
            yield [row], dataset.state_dict() if number % STATE_INTERVAL == 0 else None
    except Exception as error:  # of many types
        if "Bad split" in str(error):  # the message lists the splits
            raise ValueError(f"{name}: {first_line(error)}") from error
        remedy = "if the file is not damaged, run again to go on from there"
        raise ConnectionError(f"{name}, {split}: {first_line(error)}\n{remedy}") from error


def parquet_files(paths, state):
    """Yield what `batches` does, of Parquet files, on disk or on the hub. state: (index of a file,
    index of its row group)."""
    import fsspec

    first_file, first_group = state
    for number, path in enumerate(paths[first_file:], first_file):
        with fsspec.open(path) as file:
            for rows, group in parquet_batches(file, path, first_group):
                yield rows, None if group is None else (number, group)
        first_group = 0


def pairs_of(text):
    """Return {"a": "b"} of "a=b,..."."""
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


# --- from rows to conversations -------------------------------------------------------------------


class Reader:
    """Reads the conversations of a data set, and keeps in a file how far it came."""

    def __init__(self, config, path):
        self.config = config
        self.path = path  # of the file
        self.columns = pairs_of(config.columns)  # field -> column
        self.where = pairs_of(config.where)  # column -> value
        self.parse = ConversationReader()
        self.in_trees = False  # whether a row is a message of a tree
        self.state = {}  # of the shards: where `prepare` goes on
        self.digests = {}  # of the first two keys, for `divide`
        # in which split the next row is, and where: a state of `batches` and the rows read since;
        # how many of the split's rows were taken; how many of all could not be read
        self.position = {"split": "", "state": None, "index": 0, "n_rows": 0, "n_bad": 0}

        # go on where a run with the same knobs stopped
        saved = read_json(path) if path.exists() else {}
        parts = list(path.parent.glob("*.bin*.part"))  # three of each shard
        if saved.get("knobs") == asdict(config) and len(parts) == 6:
            self.state = saved["state"]
            self.digests = saved["digests"]
            self.position = saved["position"]
            self.parse.n_blank = saved["n_blank"]
            self.parse.counts.update(saved["counts"])
            print(f"going on after row {self.position['n_rows']:,} of {self.position['split']}")
        else:
            path.unlink(missing_ok=True)  # its parts are going to be overwritten

    def save(self, state):
        """Keep the state of the shards, and of the rows that follow what they hold."""
        if self.in_trees:  # all rows are read before the first conversation
            return
        progress = {
            "knobs": asdict(self.config),
            "state": state,
            "digests": self.digests,
            "position": self.position,
            "n_blank": self.parse.n_blank,
            "counts": self.parse.counts,
        }
        with replacing(self.path) as part:
            part.write_text(json.dumps(progress), encoding="utf-8")

    def conversations(self, builder):
        """Yield (split, messages)."""
        config = self.config
        if not config.val_split:
            yield from divide(self.read(builder, config.split), self.digests)
            return
        if self.position["split"] in ("", config.split):
            for _, messages in self.read(builder, config.split):
                yield "train", messages
        for _, messages in self.read(builder, config.val_split):
            yield "val", messages

    def read(self, builder, split):
        """Yield (key, messages) of a split; equal keys share a split of ours. Raises ValueError
        that names the row."""
        rows = self.rows(builder, split)
        first = next(rows, None)
        if first is None:
            if not self.position["n_rows"]:
                raise ValueError(f"{self.config.dataset}: no row of {split} is left; see --where")
            return  # the run that goes on here had read them all
        rows = itertools.chain([first], rows)
        if "parent_id" in first and "message_id" in first:
            self.in_trees = True
            yield from paths_of_trees(rows)
            return
        for row in rows:
            try:
                conversations = self.conversations_of(row)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                if not self.config.skip_bad:
                    place = f"{self.config.dataset}, {split}, row {self.position['n_rows']:,}"
                    remedy = "name the columns by --columns, or skip such rows: --skip_bad=true"
                    raise ValueError(f"{place}: {error}\n{remedy}") from error
                self.position["n_bad"] += 1
                continue
            yield from conversations

    def rows(self, builder, split):
        """Yield the rows of a split as dicts, after `where` and `columns`, and keep the position.
        A batch of `prepare` ends between two rows: the two replies of a pair are in one batch."""
        position = self.position
        if position["split"] != split:
            position |= {"split": split, "state": None, "index": 0, "n_rows": 0}
        n_skipped = position["index"]
        for rows, state in batches(builder, self.config.dataset, split, position["state"]):
            for row in rows:
                if n_skipped:
                    n_skipped -= 1
                    continue
                if position["n_rows"] == self.config.max_examples > 0:
                    return
                position["index"] += 1
                if all(str(self.cell(row, name)) == text for name, text in self.where.items()):
                    position["n_rows"] += 1
                    fields = {name: self.cell(row, column) for name, column in self.columns.items()}
                    yield fields or row
            if state is not None:
                position["state"] = state
                position["index"] = 0

    def cell(self, row, column):
        if column not in row:
            raise ValueError(f"{self.config.dataset} has no column {column}: {', '.join(row)}")
        return row[column]

    def conversations_of(self, row):
        """Return [(key, messages)] of a row: a conversation, or the two replies of a pair."""
        if "chosen" in row or "preferred_output" in row:
            key, labelled = examples(row)
            self.parse.counts["pairs of replies"] += bool(labelled)
            return [(key, with_label(messages, label)) for messages, label in labelled]
        conversation = self.parse(row)
        return [conversation] if conversation else []


def paths_of_trees(rows):
    """Yield (key, messages) of trees of messages, a row each, as OpenAssistant publishes them. Of
    several replies, the one of the lowest rank goes on; of what a human answers, each is a
    conversation. A reply that several conversations share is learned in the first."""
    children = defaultdict(list)  # id -> the messages that follow it
    for row in rows:
        children[row["parent_id"]].append(row)

    def paths(row, before):
        role = "assistant" if row["role"] == "assistant" else "user"
        messages = [*before, {"role": role, "content": (row["text"] or "").strip()}]
        following = children[row["message_id"]]
        replies = [child for child in following if child["role"] == "assistant"]
        if replies:
            following = [min(replies, key=rank)]
        for child in following:
            yield from paths(child, messages)
        if not following:
            yield messages

    for root in children[None]:
        for messages in paths(root, []):
            if any(message["role"] == "assistant" for message in messages):
                yield root["message_id"], [dict(message) for message in messages]
            for message in messages:  # the dicts are those of the paths to come
                message["weight"] = 0


def rank(row):
    """Return the rank of a reply, 0 for the best; without one it comes last."""
    return math.inf if row.get("rank") is None else row["rank"]


def origin_of(config, builder):
    """Return what the model card says of a set on the hub, None of a local one."""
    if Path(config.dataset).exists():
        return None
    repo = config.dataset
    origin = {"name": repo, "hub": repo, "url": f"https://huggingface.co/datasets/{repo}"}
    return origin | ({"licence": builder.info.license} if builder.info.license else {})


# --- the script -----------------------------------------------------------------------------------


def main(config):
    if not config.dataset:
        raise ValueError("--dataset=org/name is needed: a set of the hub, a folder or a file")
    path = Path(config.dataset).absolute()
    name = path.name.partition(".")[0] if path.is_file() else path.name
    config.out_dir = config.out_dir or f"data/{name}"
    builder = open_dataset(config)
    reader = Reader(config, Path(config.out_dir) / "resume.json")
    prepare(config, name, reader.conversations(builder), origin_of(config, builder), reader)
    reader.path.unlink(missing_ok=True)
    n_bad = reader.position["n_bad"]
    print(f"{config.dataset}: {reader.parse.report()}, {n_bad:,} rows that could not be read")


if __name__ == "__main__":
    run(main, Config)
