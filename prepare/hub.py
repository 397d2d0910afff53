"""Any chat set of the Hugging Face hub, or one on disk: python prepare/hub.py --dataset=org/name

--dataset is a name on the hub, or a folder or file of Parquet, JSON Lines, CSV or Arrow. Needs
`pip install -e '.[hub]'`. Rows are streamed, and an interrupted run goes on where it stopped. A row
is a conversation as prepare/jsonl.py reads it; for a reward model, a pair of replies or a reply
with a label as prepare/retry.py reads it; or one message of a tree, as in OpenAssistant. Trees are
held in memory, and start again after an interruption.
--columns=prompt=question,completion=answer names the columns of other sets.
"""

import difflib
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import at_least, run
from nanochatgpt.files import read_json, replacing
from prepare import trees
from prepare.corpus import divide, prepare
from prepare.formats import ConversationReader
from prepare.preferences import examples, with_label
from prepare.streams import batches, open_dataset, versions_of


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
        if self.val_split == self.split:
            raise ValueError(f"val_split={self.val_split} is the split to learn from: leave it out")
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


def pairs_of(text):
    """Return {"a": "b"} of "a=b,..."."""
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


class Reader:
    """Reads the conversations of a data set, and saves its progress to a file."""

    def __init__(self, config, builder):
        self.config = config
        self.builder = builder
        self.path = Path(config.out_dir) / "resume.json"
        self.run = {"knobs": asdict(config), "files": versions_of(builder)}
        self.columns = pairs_of(config.columns)  # field -> column
        self.where = pairs_of(config.where)  # column -> value
        self.parse = ConversationReader()
        self.in_trees = False  # whether a row is a message of a tree
        self.state = {}  # of the shards: where `prepare` goes on
        self.digests = {}  # of the first two keys, for `divide`
        self.position = {
            "split": "",  # that is being read
            "state": None,  # of `batches`
            "index": 0,  # rows read since this state
            "n_rows": 0,  # rows of this split that were taken
            "n_bad": 0,  # rows of all splits that could not be read
        }

        # go on where a run with the same knobs and files stopped
        saved = read_json(self.path) if self.path.exists() else {}
        parts = list(self.path.parent.glob("*.bin*.part"))  # three of each shard
        if saved.get("run") == self.run and len(parts) == 6:
            self.state = saved["state"]
            self.digests = saved["digests"]
            self.position = saved["position"]
            self.parse.n_blank = saved["n_blank"]
            self.parse.counts.update(saved["counts"])
            print(f"going on after row {self.position['n_rows']:,} of {self.position['split']}")
        else:
            self.path.unlink(missing_ok=True)  # its parts are going to be overwritten

    def save(self, state):
        """Keep the state of the shards, and of the rows that follow what they hold."""
        if self.in_trees:  # all rows are read before the first conversation
            return
        progress = {
            "run": self.run,
            "state": state,
            "digests": self.digests,
            "position": self.position,
            "n_blank": self.parse.n_blank,
            "counts": self.parse.counts,
        }
        with replacing(self.path) as part:
            part.write_text(json.dumps(progress), encoding="utf-8")

    def conversations(self):
        """Yield (split, messages)."""
        config = self.config
        if not config.val_split:
            yield from divide(self.read(config.split), self.digests)
            return
        if self.position["split"] in ("", config.split):
            for _, messages in self.read(config.split):
                yield "train", messages
        for _, messages in self.read(config.val_split):
            yield "val", messages

    def read(self, split):
        """Yield (key, messages) of a split; equal keys share a split of ours. Raises ValueError
        that names the row."""
        rows = self.rows(split)
        first = next(rows, None)
        if first is None:
            if not self.position["n_rows"]:
                raise ValueError(f"{self.config.dataset}: no row of {split} is left; see --where")
            return  # the run that goes on here had read them all
        rows = itertools.chain([first], rows)
        if first.keys() >= trees.FIELDS:
            self.in_trees = True
            for conversation in trees.conversations(rows):
                self.parse.counts["paths through trees"] += 1
                yield conversation
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

    def rows(self, split):
        """Yield the rows of a split as dicts, after `where` and `columns`, and keep the position.
        A batch of `prepare` ends between two rows: the two replies of a pair are in one batch."""
        position = self.position
        if position["split"] != split:
            position |= {"split": split, "state": None, "index": 0, "n_rows": 0}
        where = {name: value.lower() for name, value in self.where.items()}
        n_skipped = position["index"]
        for rows, state in batches(self.builder, self.config.dataset, split, position["state"]):
            for row in rows:
                if n_skipped:
                    n_skipped -= 1
                    continue
                if position["n_rows"] == self.config.max_examples > 0:
                    return
                position["index"] += 1
                if all(str(self.cell(row, name)).lower() == value for name, value in where.items()):
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
        """Return [(key, messages)] of a row: a conversation, the two replies of a pair, or a reply
        with a label."""
        labelled_reply = "completion" in row and "label" in row
        if labelled_reply or "chosen" in row or "preferred_output" in row:
            key, labelled = examples(row)
            name = "replies with labels" if labelled_reply else "pairs of replies"
            self.parse.counts[name] += bool(labelled)
            return [(key, with_label(messages, label)) for messages, label in labelled]
        conversation = self.parse(row)
        return [conversation] if conversation else []


def origin_of(dataset):
    """Return what the model card says of a set on the hub, None of a local one."""
    if Path(dataset).exists():
        return None
    url = f"https://huggingface.co/datasets/{dataset}"
    return {"name": dataset, "hub": dataset, "url": url, "licence": "see its page"}


def main(config):
    if not config.dataset:
        raise ValueError("--dataset=org/name is needed: a set of the hub, a folder or a file")
    path = Path(config.dataset).absolute()
    name = path.name.partition(".")[0] if path.is_file() else path.name
    config.out_dir = config.out_dir or f"data/{name}"
    builder = open_dataset(config)
    reader = Reader(config, builder)
    prepare(config, name, reader.conversations(), origin_of(config.dataset), reader)
    reader.path.unlink(missing_ok=True)
    n_bad = reader.position["n_bad"]
    print(f"{config.dataset}: {reader.parse.report()}, {n_bad:,} rows that could not be read")


if __name__ == "__main__":
    run(main, Config)
