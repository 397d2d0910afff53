"""Whatever a file holds, its reader returns something sound, or says what is wrong in one or two lines that name it.

No other exception, no waiting without end and no memory without end. `pytest --hypothesis-profile=fuzz` (conftest.py)
tries 10,000 cases of each kind of file in place of 100.
"""

import copy
import csv
import gzip
import importlib.util
import io
import itertools
import json
import math
import resource
import signal
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_talk, write_shards
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import parse, run
from nanochatgpt.huggingface import read_tokenizer
from nanochatgpt.loader import Loader
from nanochatgpt.shards import HEADER, open_shard, sample_prompts
from nanochatgpt.tokenizer import TEMPLATES, Tokenizer, vocab_file
from prepare import jsonl, retry
from prepare.corpus import Config as CorpusConfig
from train_reward import Replies

TOKENIZERS = {name: Tokenizer(name) for name in TEMPLATES}
cases = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


# how it is found out


@contextmanager
def bounded(seconds=30, n_bytes=2 << 30):
    """What is in it has to end in this time, and gets no more than this memory beyond what there is."""
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {seconds} s"))
    signal.alarm(seconds)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def returned(read, *names):
    """Return read() as the work of a script; None where the script refuses, in one or two lines with one of `names`."""
    found, printed, said = [], io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with bounded(), pytest.MonkeyPatch.context() as patch:
        for name, value in {"argv": ["script.py"], "stdout": printed, "stderr": said}.items():
            patch.setattr(sys, name, value)
        status = 0
        try:
            run(lambda config: found.append(read()), CorpusConfig)
        except SystemExit as exit:
            status = exit.code
    said = said.getvalue()
    if found:
        assert (status, said) == (0, "")
        return found[0]
    assert status == 2
    assert said.startswith("script.py: ")
    assert 1 <= len(said.splitlines()) <= 2, said
    assert len(said) < 2000, said[:2000]
    assert any(str(name) in said for name in names), said
    return None


# what goes wrong with a file


@st.composite
def edited(draw, content):
    """Bytes of which up to three stretches are others, longer or shorter, or go on no further."""
    numbers = st.sampled_from([0, 1, 255, 2**31, 2**63, 2**64 - 1]).map(
        lambda n: n.to_bytes(8, "little")
    )
    for _ in range(draw(st.integers(0, 3))):
        at, new = draw(st.integers(0, len(content))), draw(st.binary(max_size=8) | numbers)
        gone = draw(st.sampled_from([len(new), 0, 1, 2, 8, len(content)]))
        content = content[:at] + new + content[at + gone :]
    return content


any_text = st.text(st.characters(), max_size=8)  # lone surrogates too
odd_numbers = st.sampled_from(
    [0, 1, 2, 3, -1, 10**9, 2**31, 2**62, 2**63, 10**30, 10**400, 1.5, 1e308, math.inf, math.nan]
)
DEEP = "a list in a list in a list"  # in a JSON tree: stands for very many of them
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | any_text
    | odd_numbers
    | st.sampled_from([DEEP, "a" * 5000])
)
json_values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(any_text, v, max_size=3),
    max_leaves=6,
)


def places(tree):
    """Yield (list or dict, index or key) of every place in a JSON tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, list | dict):
            yield from places(value)


@st.composite
def spoilt(draw, tree, values=json_values):
    """A JSON tree that has something else in up to two places, or lacks them, or has more there."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(0, 2))):
        found = list(places(root))
        within, key = found[draw(st.integers(0, len(found) - 1))] if found else (root, None)
        how = draw(st.sampled_from(["other", "less", "more"]))
        if how == "other" and found:
            within[key] = draw(values)
        elif how == "less" and found:
            del within[key]
        elif isinstance(within, dict):
            within[draw(any_text)] = draw(values)
        else:
            within.append(draw(values))
    return root[0] if root else None


@st.composite
def as_json(draw, trees):
    """The bytes of a JSON tree; not always UTF-8, nor of a depth that can be read."""
    depth = draw(st.sampled_from([50, 900, 100_000]))
    text = json.dumps(draw(trees), ensure_ascii=draw(st.booleans()))
    return text.replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode(
        "utf-8", "surrogatepass"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# configs and arguments

CONFIG_LINES = sorted(
    {line for path in (ROOT / "config").glob("*.py") for line in path.read_text().splitlines()}
)
ODD_VALUES = [
    *(
        "1e999",
        "-1e999",
        "float('nan')",
        "10**400",
        "10**5000",
        "-1",
        "0",
        "1j",
        "None",
        "True",
        "b'\\xff'",
        "'\\ud800'",
    ),
    *(
        "[[]] * 1000",
        "{'a': 1}",
        "'a' * 100_000",
        "lambda: 0",
        "int",
        "...",
        "1 / 0",
        "open('absent')",
        "object()",
    ),
    *(
        "(" * 300 + ")" * 300,
        "[" * 60 + "]" * 60,
        "-" * 10_000 + "1",
        "+".join("1" * 20_000),
        "'a\\nb\\nc\\nd'",
    ),
]
ODD_LINES = [
    *(
        "seed = (",
        "'''",
        "return 1",
        "import absent",
        "from math import *",
        "from os import environ",
        "raise SystemExit",
    ),
    *(
        "raise SystemExit('no')",
        "raise ValueError",
        "raise ValueError('a\\nb\\nc')",
        "raise MemoryError",
        "assert False",
    ),
    *(
        "seed = [1]\nfor _ in range(100_000): seed = [seed]",
        "def _f(): return _f()\nseed = _f()",
        "x = 1",
        "del seed",
    ),
    *(
        "# coding: utf-16",
        "# coding: utf-7",
        "# coding: idna",
        "# coding: undefined",
        "# coding: none of the kind",
    ),
]
PYC = importlib.util.MAGIC_NUMBER  # with which a compiled file begins


@st.composite
def config_files(draw):
    """The bytes of a config file: lines like ours, in part damaged, or anything at all."""
    if draw(st.integers(0, 5)) == 0:
        start = draw(
            st.sampled_from(
                [
                    b"",
                    b"",
                    b"\xef\xbb\xbf",
                    b"\xff\xfe",
                    PYC,
                    PYC + bytes(12),
                    b"PK\3\4",
                    b"\x7fELF",
                ]
            )
        )
        return start + draw(st.binary(max_size=40))
    names = st.sampled_from(
        [
            "seed",
            "learning_rate",
            "compile",
            "out_dir",
            "dataset",
            "max_iter",
            "a.b",
            "None",
            "é",
            "_a",
        ]
    )
    assigned = st.builds("{} = {}".format, names, st.sampled_from(ODD_VALUES) | scalars.map(repr))
    lines = draw(
        st.lists(st.sampled_from(CONFIG_LINES) | st.sampled_from(ODD_LINES) | assigned, max_size=4)
    )
    content = "\n".join(lines).encode(
        draw(st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-7"])), "replace"
    )
    for _ in range(draw(st.integers(0, 2))):  # not a star: a power of a power would be computed
        at, new = (
            draw(st.integers(0, len(content))),
            draw(st.sampled_from([b"", b"\0", b"\n", b"(", b"'", b"=", b"\xff", b"\\"])),
        )
        content = content[:at] + new + content[at + draw(st.integers(0, 2)) :]
    return content


arguments = st.one_of(
    any_text,
    any_text.map("--{}".format),
    any_text.map("-{}".format),
    st.builds(
        "--{}={}".format,
        st.sampled_from(["seed", "learning_rate", "compile", "out_dir", "seeds", ""]),
        scalars.map(str) | st.sampled_from(["nan", "inf", "1e999", "9" * 5000, "1_0", "٣", "0x1"]),
    ),
)


@cases
@given(
    content=config_files(),
    before=st.lists(arguments, max_size=1),
    behind=st.lists(arguments, max_size=1),
)
@example(content=PYC + bytes(12) + b"(" + (2**31 - 1).to_bytes(4, "little"), before=[], behind=[])
def test_any_config_file_and_any_arguments_make_a_config_or_a_message(
    folder, content, before, behind
):
    path = folder / "own.py"
    path.write_bytes(content)
    argv = [*before, str(path), *behind]
    # an argument is named by its first line, one without any as the config file that it is not
    firsts = [(arg.splitlines() or [""])[0][:100] or "config file" for arg in argv]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = returned(lambda: parse(train.Config, argv), *firsts)
    if config:
        knobs = train.Config.__dataclass_fields__
        assert {name: type(getattr(config, name)) for name in knobs} == {
            name: f.type for name, f in knobs.items()
        }


# conversations and replies

TALK = [
    {"role": "system", "content": "i like tea."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "[Bot]: ]\n<|endoftext|>"},
]
RECORDS = [
    {"messages": TALK},
    {"messages": TALK, "label": 1},
    {
        "messages": TALK,
        "retried": [{"before": 1, "content": "what?"}, {"before": 3, "content": "tea"}],
    },
    {"prompt": "hello", "chosen": "hi", "rejected": "what?"},
    {"prompt": TALK[:2], "chosen": "hi", "rejected": "what?"},
    {"input_text": "[Human]: hello\n[Bot]: hi", "labels": 0},
    {
        "context": ["hello", "hi"],
        "positive_responses": ["a"],
        "adversarial_negative_responses": ["b", "c"],
    },
    {
        "dialog": [
            {"sender": "a", "text": "hello", "evaluation_score": None},
            {"sender": "b", "text": "a", "evaluation_score": 1},
        ]
    },
    {"dialog": [{"text": "hello", "evaluation_score": 0}, {"text": "hi", "evaluation_score": 1}]},
]


def lines_of(records):
    """The bytes of a file with a few of these records a line, in part spoilt, and other lines."""
    good = st.sampled_from(records).map(lambda record: json.dumps(record).encode())
    bad = as_json(st.sampled_from(records).flatmap(spoilt)) | as_json(json_values)
    other = st.sampled_from(
        [b"", b" \t", b"\r", b"{", b"\xef\xbb\xbf", b"\0", b"1" * 5000, b"[" * 100_000]
    ) | st.binary(max_size=20)
    lines = st.lists(good | bad | bad | other, min_size=1, max_size=3)
    return st.one_of(
        lines.map(b"\n".join), lines.map(b"\n".join), lines.map(b"\n".join).flatmap(edited)
    )


def written_by(module, source, out, **knobs):
    """Run a script of prepare/; return the conversations that are in its shards, [(ids, mask)]."""
    module.main(module.Config(source=str(source), out_dir=str(out), **knobs))
    return [
        pair for split in ("train", "val") for pair in contents(open_shard(out / f"{split}.bin"))
    ]


TWO = [
    {"messages": [{"role": "assistant", "content": text}]} for text in ("first", "second")
]  # enough for both splits


@cases
@given(content=lines_of(RECORDS[:3]), template=st.sampled_from([*TEMPLATES]))
def test_any_jsonl_becomes_a_corpus_or_a_message(folder, content, template):
    path = folder / "mine.jsonl"
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in TWO) + content)
    pairs = returned(lambda: written_by(jsonl, path, folder / "jsonl", template=template), path)
    if pairs is not None:
        records = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        parse = TOKENIZERS[template].parse
        found = [[(m["role"], m["content"]) for m in parse(ids)] for ids, _ in pairs]
        written = [
            [(m["role"], as_utf8(m["content"])) for m in record["messages"]] for record in records
        ]
        assert sorted(found) == sorted(written)
        assert all(any(mask) for _, mask in pairs)


def as_utf8(text):
    """A text as it is tokenized: pairs of surrogates are their character, and of lone ones U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


PAIRS = [{"prompt": text, "chosen": "good", "rejected": "bad"} for text in ("first", "second")]


def as_csv(records):
    """The bytes of records, a column for each name in one of them."""
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*records))))
    table.writeheader()
    table.writerows(records)
    return file.getvalue().encode("utf-8", "surrogatepass")


@cases
@given(
    data=st.data(),
    kind=st.sampled_from(["jsonl", "jsonl", "jsonl", "json", "csv"]),
    packed=st.booleans(),
)
def test_any_file_of_replies_becomes_shards_or_a_message(folder, data, kind, packed):
    if kind == "jsonl":
        content = b"".join(json.dumps(record).encode() + b"\n" for record in PAIRS) + data.draw(
            lines_of(RECORDS)
        )
    elif kind == "json":
        more = data.draw(st.lists(as_json(st.sampled_from(RECORDS).flatmap(spoilt)), max_size=2))
        content = (
            b"[" + b", ".join([*(json.dumps(record).encode() for record in PAIRS), *more]) + b"]"
        )
        content = data.draw(st.just(content) | edited(content))
    else:
        row = st.fixed_dictionaries(
            {"text": any_text}, optional={"label": scalars, "labels": scalars, "": any_text}
        )
        content = as_csv(PAIRS + data.draw(st.lists(row, max_size=2)))
        content = data.draw(st.just(content) | edited(content))
    path = folder / (f"replies.{kind}" + ".gz" * packed)
    path.write_bytes(data.draw(edited(gzip.compress(content, mtime=0))) if packed else content)
    # of what is right by itself, but not enough, the shard that lacks it is named
    names = (
        path,
        "train.bin would have",
        "val.bin would have",
        "there is no reply of which it is known",
    )
    pairs = returned(lambda: written_by(retry, path, folder / "retry"), *names)
    if pairs is not None:
        assert {any(mask) for _, mask in pairs} == {True, False}
        assert all(
            ids and list(mask) == sorted(mask) for ids, mask in pairs
        )  # what is supervised is at the end


# shards


def contents(shard):
    """Return the conversations of a shard, [(ids, mask)]."""
    return [
        (shard.tokens[a:b].tolist(), shard.mask(a, b).tolist())
        for a, b in itertools.pairwise(shard.offsets.tolist())
    ]


@pytest.fixture(scope="module")
def whole_shard(tmp_path_factory):
    return (
        write_shards(tmp_path_factory.mktemp("whole"), small_talk(4), small_talk(1)) / "train.bin"
    ).read_bytes()


@st.composite
def shard_files(draw, whole):
    """The bytes of a shard: a whole one that was damaged, one whose parts do not fit each other, or a bare .bin."""
    if draw(st.booleans()):
        return draw(edited(whole))
    template = draw(st.sampled_from([*TEMPLATES]))
    tok = TOKENIZERS[template]
    pieces = st.sampled_from(
        [*tok._first.values(), *tok._later.values(), [tok.eos_id], [tok.eos_id]]
    )
    pieces |= st.integers(0, 65535).map(lambda token: [token]) | st.integers(0, 60).map(
        lambda n: [11] * n
    )
    tokens = [token for piece in draw(st.lists(pieces, max_size=12)) for token in piece]
    body = struct.pack(f"<{len(tokens)}H", *tokens)
    if draw(st.integers(0, 3)) == 0:
        return draw(edited(body))
    n_bytes = -(-len(tokens) // 8)
    body += (
        bytes(-len(body) % 8)
        + draw(st.binary(min_size=n_bytes, max_size=n_bytes))
        + bytes(-n_bytes % 8)
    )
    borders = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=5)))
    if draw(st.integers(0, 3)) == 0:
        borders = draw(st.lists(st.integers(0, 2**64 - 1), max_size=5))
    offsets = [0, *borders, len(tokens)]
    names = st.sampled_from([template.encode(), template.encode(), b"", b"none", b"a\nb", b"\xff"])
    counts = (len(tokens), len(offsets) - 1)
    if draw(st.integers(0, 3)) == 0:
        counts = draw(st.tuples(*[st.sampled_from([0, 1, *counts, 2**32, 2**63, 2**64 - 1])] * 2))
    vocab_size = draw(st.sampled_from([tok.n_vocab, tok.n_vocab, 0, 1, 2**32 - 1]))
    head = HEADER.pack(
        b"nanoChat", draw(st.sampled_from([1, 1, 1, 0])), vocab_size, *counts, draw(names)
    )
    return head + body + struct.pack(f"<{len(offsets)}Q", *offsets)


def every_batch(path, tokenizer, block_size, share):
    loader = Loader([(path, share)], 2, block_size, 0, tokenizer)
    return loader.counts(tokenizer.n_vocab), [
        loader.batch(number) for number in range(loader.n_rows)
    ]


def every_reply(path, tokenizer, block_size, pairs):
    replies = Replies([path], 2, block_size, 0, tokenizer, pairs)
    return [replies.batch(number, "cpu") for number in range(replies.n_batches)]


@cases
@given(
    data=st.data(),
    template=st.sampled_from([*TEMPLATES]),
    size=st.integers(1, 70),
    share=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_of_any_shard_all_can_be_read_or_it_is_refused(
    folder, whole_shard, data, template, size, share
):
    path, tokenizer = folder / "train.bin", TOKENIZERS[template]
    path.write_bytes(data.draw(shard_files(whole_shard)))
    if not (shard := returned(lambda: open_shard(path), path)):
        return
    n_vocab, of = tokenizer.n_vocab, returned(lambda: contents(shard), path)
    assert [token for ids, _ in of for token in ids] == shard.tokens.tolist()
    assert [m for _, mask in of for m in mask] == shard.mask(0, len(shard.tokens)).tolist()
    first = returned(lambda: open_shard(path, max_conversations=1), path)
    assert contents(first) == of[:1]

    if found := returned(lambda: every_batch(path, tokenizer, size, share), path):
        counts, batches = found
        assert counts.shape == (n_vocab,) and counts.sum() > 0
        for x, y, documents in batches:
            assert x.shape == y.shape == (2, size)
            assert (
                x.min() >= 0 and x.max() < n_vocab and y.max() < n_vocab and y[y < 0].eq(-100).all()
            )
            assert documents[0] == 0 and documents[-1] == 2 * size and (documents.diff() >= 0).all()

    prompts, _ = returned(lambda: sample_prompts([shard], tokenizer, 9, size, 0), path) or ([], [])
    assert all(0 < len(ids) <= size and max(ids) < n_vocab for ids in prompts)

    for pairs in (False, True):
        for idx, lengths, labels in (
            returned(lambda: every_reply(path, tokenizer, size, pairs), path) or []
        ):
            assert (
                lengths.min() > 0 and lengths.max() <= idx.size(1) <= size and idx.max() < n_vocab
            )
            assert labels.shape == lengths.shape


# checkpoints


SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F4": 4,
}
BITS |= {"C64": 64, "I64": 64, "U8": 8, "BOOL": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory of a tiny model without a tokenizer's files, which take long to read, and its files' contents."""
    directory = tmp_path_factory.mktemp("model")
    save_model(GPT(GPTConfig(16, 50, 2, 2, 8)), Tokenizer(), directory)
    (directory / "tokenizer.json").unlink()
    return directory, {path.name: path.read_bytes() for path in directory.iterdir()}


@st.composite
def safetensors_files(draw, whole):
    """The bytes of a safetensors file: the whole one, with other tensors, another header, or damaged."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    how = draw(st.sampled_from(["whole", "tensors", "header", "bytes"]))
    if how == "whole":
        return whole
    if how == "bytes":
        return draw(edited(whole[:end])) + draw(edited(whole[end:]))
    if how == "header":
        values = (
            json_values
            | st.sampled_from([*BITS])
            | st.lists(odd_numbers | st.integers(0, 32), max_size=3)
        )
        text = draw(as_json(spoilt(header, values)))
        return len(text).to_bytes(8, "little") + text + whole[end:]
    tensors = {
        name: (t["dtype"], t["shape"]) for name, t in header.items() if name != "__metadata__"
    }
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(tensors)))
        dtype, shape = tensors[name]
        tensors |= draw(
            st.one_of(
                st.sampled_from([*BITS]).map(lambda dtype: {name: (dtype, shape)}),  # noqa: B023
                st.lists(st.integers(0, 32), max_size=3).map(lambda shape: {name: (dtype, shape)}),  # noqa: B023
                st.just({name: (dtype, shape[::-1])}),
                st.sampled_from(
                    [
                        "score.weight",
                        "lm_head.weight",
                        "a\nb\nc",
                        "",
                        name.removeprefix("transformer."),
                    ]
                )
                .filter(lambda other: other not in tensors)  # noqa: B023
                .map(lambda other: {other: (dtype, shape)}),  # noqa: B023
            )
        )
        if draw(st.integers(0, 3)) == 0:
            del tensors[name]
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = BITS[dtype] * math.prod(shape) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


@cases
@given(data=st.data(), inference=st.booleans())
def test_any_checkpoint_is_a_model_or_a_message(checkpoint, data, inference):
    directory, files = checkpoint
    config = json.loads(files["config.json"])
    sizes = st.dictionaries(st.sampled_from(SIZES), odd_numbers | st.integers(1, 64), max_size=2)
    configs = (
        st.just(files["config.json"])
        | as_json(sizes.map(lambda sizes: config | sizes))
        | as_json(spoilt(config))
    )
    spoilt_files = {
        "model.safetensors": data.draw(safetensors_files(files["model.safetensors"])),
        "config.json": data.draw(configs | configs | edited(files["config.json"])),
    }
    for name, content in spoilt_files.items():
        (directory / name).write_bytes(content)
    how = {"dtype": torch.bfloat16, "inference": True} if inference else {}
    if not (loaded := returned(lambda: load_model(str(directory), **how), directory)):
        return
    model, tokenizer = loaded
    config = json.loads(spoilt_files["config.json"])
    assert [getattr(model.config, {"n_positions": "block_size"}.get(n, n)) for n in SIZES] == [
        dict(config)[n] for n in SIZES
    ]
    assert tokenizer.template == "human_bot"
    with torch.no_grad():
        logits, _ = model(torch.zeros(1, min(3, model.config.block_size), dtype=torch.int64))
    assert logits.shape[2] == model.config.vocab_size


@settings(cases, max_examples=20)  # nobody reads it
@given(data=st.data())
def test_a_file_that_is_for_other_programs_may_hold_anything(checkpoint, data):
    (directory, files), name = checkpoint, "generation_config.json"
    for other, content in files.items():
        (directory / other).write_bytes(content)
    (directory / name).write_bytes(
        data.draw(as_json(spoilt(json.loads(files[name]))) | edited(files[name]))
    )
    model, _ = returned(lambda: load_model(str(directory)))
    assert model.config == GPTConfig(16, 50, 2, 2, 8)


@pytest.fixture(scope="module")
def vocab():
    """The text of GPT-2's vocabulary {token: id}."""
    return vocab_file("encoder.json").read_bytes()


NAMES = ("tokenizer.json", "added_tokens.json", "vocab.json")
LOCUTUSQUE = [
    {"id": i, "content": token} for token, i in TOKENIZERS["user_assistant"].special_ids.items()
]


@cases
@given(data=st.data(), file=st.sampled_from([*NAMES, "tokenizer_config.json"]))
def test_any_tokenizers_files_are_a_template_or_a_message(folder, vocab, data, file):
    directory = folder / "tokenizer"
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    if file == "vocab.json":
        (directory / file).write_bytes(data.draw(st.just(vocab) | edited(vocab)))
    elif file == "added_tokens.json":
        (directory / "vocab.json").write_bytes(vocab)
        added = {token["content"]: token["id"] for token in LOCUTUSQUE}
        (directory / file).write_bytes(data.draw(as_json(spoilt(added))))
    elif file == "tokenizer_config.json":
        (directory / file).write_bytes(
            data.draw(as_json(spoilt({"chat_template": "?", "eos_token": "<|End|>"})))
        )
    else:
        fast = {"added_tokens": LOCUTUSQUE, "model": {"vocab": "the vocabulary"}}
        content = data.draw(as_json(spoilt(fast)))
        (directory / file).write_bytes(content.replace(b'"the vocabulary"', vocab))
    tokenizer = returned(lambda: read_tokenizer(directory), directory)
    if tokenizer:  # one of another template has all its tokens
        added = set(tokenizer.special_ids) - {"<|endoftext|>"}
        assert all(
            token.encode() in (directory / file).read_bytes().replace(b"\\u003c", b"<")
            for token in added
        )
