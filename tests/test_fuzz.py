"""Whatever a damaged or foreign file holds, its reader returns something sound, or says what is
wrong in one or two lines that name the file: no other exception, no endless wait or memory.

A fifth of hypothesis's usual number of cases by default; `pytest --hypothesis-profile=fuzz
tests/test_fuzz.py` tries 2,000 of each kind of file.
"""

import copy
import csv
import gzip
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
from types import SimpleNamespace

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
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.shards import HEADER, open_shard
from nanochatgpt.tokenizer import TEMPLATES, Tokenizer, vocab_file
from prepare import jsonl, retry
from prepare.formats import conversation, n_learned
from rlhf.dataset import ReplyDataset

TOKENIZERS = {name: Tokenizer(name) for name in TEMPLATES}
cases = settings(
    deadline=None,
    max_examples=settings.default.max_examples // 5,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# --- reading under watch --------------------------------------------------------------------------


@contextmanager
def bounded(seconds=30, n_bytes=2 << 30):
    """Fail after this time; give no more than this memory beyond what is in use."""
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
    """Return read() as a script would; None if it refuses, in at most two lines with a name."""
    results = []
    stderr = io.StringIO()
    status = 0
    with bounded(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py"])
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
        patch.setattr(sys, "stderr", stderr)
        try:
            run(lambda config: results.append(read()), jsonl.Config)
        except SystemExit as exit:
            status = exit.code
    message = stderr.getvalue()
    if results:
        assert (status, message) == (0, "")
        return results[0]
    assert status == 2
    assert message.startswith("script.py: ")
    assert 1 <= len(message.splitlines()) <= 2, message
    assert len(message) < 2000, message[:2000]
    assert any(str(name) in message for name in names), message
    return None


# --- damages --------------------------------------------------------------------------------------


@st.composite
def edited(draw, content):
    """Bytes with up to three stretches replaced, inserted, removed or cut off."""
    numbers = st.sampled_from([0, 1, 255, 2**31, 2**63, 2**64 - 1])
    new_bytes = st.binary(max_size=8) | numbers.map(lambda n: n.to_bytes(8, "little"))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        new = draw(new_bytes)
        n_removed = draw(st.sampled_from([len(new), 0, 1, 2, 8, len(content)]))
        content = content[:start] + new + content[start + n_removed :]
    return content


any_text = st.text(st.characters(), max_size=8)  # lone surrogates too
numbers = st.sampled_from([0, 1, 2, 3, -1, 10**9, 2**31, 2**63, 1.5, 1e308, math.inf, math.nan])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text | numbers
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
def spoilt(draw, tree):
    """A JSON tree with up to two values replaced, removed or added."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(0, 2))):
        parent, key = draw(st.sampled_from([*places(root)] or [(root, None)]))
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace" and parent:
            parent[key] = draw(json_values)
        elif change == "remove" and parent:
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(any_text)] = draw(json_values)
        else:
            parent.append(draw(json_values))
    return root[0] if root else None


@st.composite
def as_json(draw, trees):
    """The bytes of a JSON tree, not always UTF-8."""
    text = json.dumps(draw(trees), ensure_ascii=draw(st.booleans()))
    return text.encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# --- config files and arguments -------------------------------------------------------------------

LINES = set()
for path in (ROOT / "config").glob("*.py"):
    LINES |= set(path.read_text(encoding="utf-8").splitlines())
BAD_LINES = """\
seed = (|'''|return 1|import absent|from math import *|raise SystemExit('no')|raise ValueError|\
raise ValueError('a\\nb\\nc')|raise MemoryError|assert False|x = 1|del seed|seed = 1 / 0|seed = 1j|\
seed = None|seed = b'\\xff'|out_dir = '\\ud800'|out_dir = 'a' * 100_000|seed = lambda: 0|\
learning_rate = 10**400|learning_rate = float('nan')|def _f(): return _f()\nseed = _f()|\
seed = [1]\nfor _ in range(100_000): seed = [seed]|seed = open('absent')|# coding: utf-16"""


@st.composite
def config_files(draw):
    """The bytes of a config file: lines of ours and bad ones, damaged; or any bytes."""
    bad = st.sampled_from(BAD_LINES.split("|"))
    names = st.sampled_from(["seed", "learning_rate", "compile", "out_dir", "max_iter", "a.b"])
    assignments = st.builds("{} = {!r}".format, names, scalars)
    lines = st.lists(st.sampled_from(sorted(LINES)) | bad | assignments)
    text = "\n".join(draw(lines)).encode("utf-8", "replace")
    return draw(st.just(text) | edited_text(text) | st.binary(max_size=40))


@st.composite
def edited_text(draw, text):
    start = draw(st.integers(0, len(text)))
    # not a star: Python would compute a power of a power
    new = draw(st.sampled_from([b"", b"\0", b"\n", b"(", b"'", b"=", b"\xff", b"\\"]))
    return text[:start] + new + text[start + draw(st.integers(0, 2)) :]


argument_values = scalars.map(str) | st.sampled_from(["nan", "1e999", "9" * 5000, "1_0", "0x1"])
argument_names = st.sampled_from(["seed", "learning_rate", "compile", "out_dir", "seeds", ""])
arguments = st.one_of(
    any_text,
    any_text.map("--{}".format),
    any_text.map("-{}".format),
    st.builds("--{}={}".format, argument_names, argument_values),
)


@cases
@given(
    content=config_files(),
    before=st.lists(arguments, max_size=1),
    after=st.lists(arguments, max_size=1),
)
@example(content=b"", before=["--=", "--"], after=["\0", "\ud800"])
def test_any_config_file_and_any_arguments(folder, content, before, after):
    path = folder / "own.py"
    path.write_bytes(content)
    argv = [*before, str(path), *after]
    # an argument is named by its first line, an empty one as a config file
    names = [(arg.splitlines() or [""])[0][:100] or "config file" for arg in argv]
    # a value out of range is named by its knob
    names += [f"{name}=" for name in train.Config.__dataclass_fields__]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = returned(lambda: parse(train.Config, argv), *names)
    if config:
        for name, field in train.Config.__dataclass_fields__.items():
            assert type(getattr(config, name)) is field.type


# --- conversations and replies --------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "i like tea."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "[Bot]: ]\n<|endoftext|>"},
]
RETRIED = [{"before": 1, "content": "what?"}, {"before": 3, "content": "tea"}]
RATED = [{"text": "hello", "evaluation_score": 0}, {"text": "hi", "evaluation_score": 1}]
NEGATIVES = {"positive_responses": ["a"], "adversarial_negative_responses": ["b", "c"]}
RECORDS = [
    {"messages": TALK},
    {"messages": TALK, "label": 1},
    {"messages": TALK, "retried": RETRIED},
    {"prompt": "hello", "chosen": "hi", "rejected": "what?"},
    {"prompt": TALK[:2], "chosen": "hi", "rejected": "what?"},
    {"input_text": "[Human]: hello\n[Bot]: hi", "labels": 0},
    {"context": ["hello", "hi"]} | NEGATIVES,
    {"dialog": [{"sender": str(i), **turn} for i, turn in enumerate(RATED)]},
    {"dialog": RATED},
]
# enough for both splits
TWO = [{"messages": [{"role": "assistant", "content": text}]} for text in ("first", "second")]
PAIRS = [{"prompt": text, "chosen": "good", "rejected": "bad"} for text in ("first", "second")]


def json_lines(records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def lines_of(records):
    """The bytes of a file with a few of these records, spoilt ones and other lines."""
    good = st.sampled_from(records).map(lambda record: json.dumps(record).encode())
    bad = as_json(st.sampled_from(records).flatmap(spoilt)) | as_json(json_values)
    other = st.sampled_from([b"", b" \t", b"\r", b"{", b"\xef\xbb\xbf", b"\0"])
    lines = st.lists(good | bad | bad | other | st.binary(max_size=20), min_size=1, max_size=3)
    text = lines.map(b"\n".join)
    return text | text | text.flatmap(edited)


def contents(shard):
    """Return the conversations of a shard, [(ids, mask)]."""
    pairs = []
    for start, stop in itertools.pairwise(shard.offsets.tolist()):
        pairs.append((shard.tokens[start:stop].tolist(), shard.mask(start, stop).tolist()))
    return pairs


def written_by(module, source, out, **knobs):
    """Run a script of prepare/; return the conversations in its shards, [(ids, mask)]."""
    module.main(module.Config(source=str(source), out_dir=str(out), **knobs))
    return contents(open_shard(out / "train.bin")) + contents(open_shard(out / "val.bin"))


def as_utf8(text):
    """Return the text as it is tokenized: lone surrogates become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@cases
@given(content=lines_of(RECORDS[:3]), template=st.sampled_from([*TEMPLATES]))
def test_any_jsonl_file(folder, content, template):
    path = folder / "mine.jsonl"
    path.write_bytes(json_lines(TWO) + content)
    pairs = returned(lambda: written_by(jsonl, path, folder / "jsonl", template=template), path)
    if pairs is None:
        return
    expected = []
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            _, messages, _ = conversation(json.loads(line))  # tested in test_formats.py
            if n_learned(messages):
                expected.append([(m["role"], as_utf8(m["content"])) for m in messages])
    written = []
    for ids, mask in pairs:
        assert any(mask)
        written.append([(m["role"], m["content"]) for m in TOKENIZERS[template].parse(ids)])
    assert sorted(written) == sorted(expected)


@st.composite
def reply_files(draw, kind):
    if kind == "jsonl":
        return json_lines(PAIRS) + draw(lines_of(RECORDS))
    if kind == "json":
        records = [json.dumps(record).encode() for record in PAIRS]
        bad = as_json(st.sampled_from(RECORDS).flatmap(spoilt))
        content = b"[" + b", ".join(records + draw(st.lists(bad, max_size=2))) + b"]"
    else:
        optional = {"label": scalars, "labels": scalars, "": any_text}
        row = st.fixed_dictionaries({"text": any_text}, optional=optional)
        rows = PAIRS + draw(st.lists(row, max_size=2))
        file = io.StringIO(newline="")
        table = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*rows))))
        table.writeheader()
        table.writerows(rows)
        content = file.getvalue().encode("utf-8", "surrogatepass")
    return draw(st.just(content) | edited(content))


@cases
@given(
    data=st.data(),
    kind=st.sampled_from(["jsonl", "jsonl", "jsonl", "json", "csv"]),
    packed=st.booleans(),
)
def test_any_file_of_replies(folder, data, kind, packed):
    content = data.draw(reply_files(kind))
    path = folder / (f"replies.{kind}" + ".gz" * packed)
    path.write_bytes(data.draw(edited(gzip.compress(content, mtime=0))) if packed else content)
    # a file that is sound, but has too little for both shards, is not named
    names = (path, "train.bin", "val.bin", "label")
    pairs = returned(lambda: written_by(retry, path, folder / "retry"), *names)
    if pairs is not None:
        assert {any(mask) for _, mask in pairs} == {True, False}
        for ids, mask in pairs:
            assert ids and list(mask) == sorted(mask)  # only the end is supervised


# --- shards ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_shard(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("whole"), small_talk(4), small_talk(1))
    return (folder / "train.bin").read_bytes()


@st.composite
def shard_files(draw, whole):
    """The bytes of a shard: damaged, with parts that contradict each other, or without a header."""
    if draw(st.booleans()):
        return draw(edited(whole))
    template = draw(st.sampled_from([*TEMPLATES]))
    tok = TOKENIZERS[template]
    prompt, _ = tok.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    piece = st.sampled_from([prompt, [tok.eos_id]]) | st.lists(st.integers(0, 65535), max_size=1)
    piece |= st.integers(0, 60).map(lambda n: [11] * n)
    tokens = list(itertools.chain(*draw(st.lists(piece, max_size=12))))
    body = struct.pack(f"<{len(tokens)}H", *tokens)
    if draw(st.integers(0, 3)) == 0:
        return draw(edited(body))

    # the mask and the offsets, each part padded to 8 bytes
    n_bytes = -(-len(tokens) // 8)
    mask = draw(st.binary(min_size=n_bytes, max_size=n_bytes))
    body += bytes(-len(body) % 8) + mask + bytes(-n_bytes % 8)
    highest = draw(st.sampled_from([len(tokens)] * 3 + [2**64 - 1]))
    offsets = [0, *sorted(draw(st.lists(st.integers(0, highest), max_size=5))), len(tokens)]
    counts = [len(tokens), len(offsets) - 1]
    if draw(st.integers(0, 3)) == 0:
        wrong = st.sampled_from([0, 1, *counts, 2**32, 2**63, 2**64 - 1])
        counts = [draw(wrong), draw(wrong)]
    vocab_size = draw(st.sampled_from([tok.n_vocab, tok.n_vocab, 0, 1, 2**32 - 1]))
    version = draw(st.sampled_from([1, 1, 1, 0]))
    name = draw(st.sampled_from([template.encode(), template.encode(), b"none", b"a\nb", b"\xff"]))
    head = HEADER.pack(b"nanoChat", version, vocab_size, *counts, name)
    return head + body + struct.pack(f"<{len(offsets)}Q", *offsets)


def every_batch(path, tokenizer, block_size, share):
    loader = Loader([(path, share)], 2, block_size, 0, tokenizer)
    return [loader.batch(number) for number in range(loader.n_rows)]


def every_reply(path, tokenizer, block_size):
    config = SimpleNamespace(batch_size=2, block_size=block_size, seed=0, loss="labels")
    replies = ReplyDataset([(path, 1.0)], tokenizer, config)
    return [replies.batch(number, "cpu") for number in range(replies.n_batches)]


@cases
@given(
    data=st.data(),
    template=st.sampled_from([*TEMPLATES]),
    size=st.integers(1, 70),
    share=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_any_shard(folder, whole_shard, data, template, size, share):
    path = folder / "train.bin"
    path.write_bytes(data.draw(shard_files(whole_shard)))
    shard = returned(lambda: open_shard(path), path)
    if not shard:
        return
    tokenizer = TOKENIZERS[template]
    n_vocab = tokenizer.n_vocab
    pairs = returned(lambda: contents(shard), path)
    assert [token for ids, _ in pairs for token in ids] == shard.tokens.tolist()
    assert [m for _, mask in pairs for m in mask] == shard.mask(0, len(shard.tokens)).tolist()
    first = returned(lambda: open_shard(path, max_conversations=1), path)
    assert contents(first) == pairs[:1]

    for x, y, documents in returned(lambda: every_batch(path, tokenizer, size, share), path) or []:
        assert x.shape == y.shape == (2, size)
        assert x.min() >= 0 and x.max() < n_vocab
        assert y.max() < n_vocab and y[y < 0].eq(-100).all()
        assert documents[0] == 0 and documents[-1] == 2 * size and (documents.diff() >= 0).all()

    prompts = returned(lambda: sample_prompts([shard], tokenizer, 9, size, 0), path)
    for ids in prompts[0] if prompts else []:
        assert 0 < len(ids) <= size and max(ids) < n_vocab

    batches = returned(lambda: every_reply(path, tokenizer, size), path)
    for idx, lengths, labels in batches or []:
        assert lengths.min() > 0 and lengths.max() <= idx.size(1) <= size
        assert idx.max() < n_vocab
        assert labels.shape == lengths.shape


# --- checkpoints ----------------------------------------------------------------------------------

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F4": 4, "I64": 64, "BOOL": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model without tokenizer.json, which takes long to read, and its files' contents."""
    directory = tmp_path_factory.mktemp("model")
    save_model(GPT(GPTConfig(16, 50257, 2, 2, 8)), Tokenizer(), directory)
    (directory / "tokenizer.json").unlink()
    return directory, {path.name: path.read_bytes() for path in directory.iterdir()}


@st.composite
def safetensors_files(draw, whole):
    """The bytes of a safetensors file: whole, with another header or tensors, or damaged."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    change = draw(st.sampled_from(["nothing", "tensors", "header", "bytes"]))
    if change == "nothing":
        return whole
    if change == "bytes":
        return draw(edited(whole[:end])) + draw(edited(whole[end:]))
    if change == "header":
        text = draw(as_json(spoilt(header)))
        return len(text).to_bytes(8, "little") + text + whole[end:]

    # another dtype, shape or name for one tensor
    tensors = {n: (t["dtype"], t["shape"]) for n, t in header.items() if n != "__metadata__"}
    name = draw(st.sampled_from(sorted(tensors)))
    dtype, shape = tensors.pop(name)
    other_names = ["score.weight", "lm_head.weight", "a\nb", name.removeprefix("transformer.")]
    name = draw(st.sampled_from([name, name, name, *other_names]))
    dtype = draw(st.sampled_from([dtype, *BITS]))
    shape = draw(st.just(shape) | st.just(shape[::-1]) | st.lists(st.integers(0, 32), max_size=3))
    tensors[name] = (dtype, shape)
    header = {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + BITS[dtype] * math.prod(shape) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(start)


@cases
@given(data=st.data(), inference=st.booleans())
def test_any_checkpoint(checkpoint, data, inference):
    directory, files = checkpoint
    sizes = {"n_positions": 16, "vocab_size": 50257, "n_layer": 2, "n_head": 2, "n_embd": 8}
    config = json.loads(files["config.json"])
    others = st.dictionaries(st.sampled_from([*sizes]), numbers | st.integers(1, 64), max_size=2)
    configs = as_json(others.map(lambda sizes: config | sizes)) | as_json(spoilt(config))
    configs |= st.just(files["config.json"]) | edited(files["config.json"])
    content = data.draw(configs)
    (directory / "config.json").write_bytes(content)
    weights = data.draw(safetensors_files(files["model.safetensors"]))
    (directory / "model.safetensors").write_bytes(weights)
    # for other programs: nobody here reads it
    generation = data.draw(edited(files["generation_config.json"]))
    (directory / "generation_config.json").write_bytes(generation)

    dtype = torch.bfloat16 if inference else torch.float32
    read = lambda: load_model(str(directory), dtype=dtype, inference=inference)  # noqa: E731
    loaded = returned(read, directory)
    if loaded:
        model, tokenizer = loaded
        for name in sizes:
            value = getattr(model.config, "block_size" if name == "n_positions" else name)
            assert value == json.loads(content)[name]
        assert tokenizer.template == "human_bot"
        with torch.no_grad():
            logits, _ = model(torch.zeros(1, min(3, model.config.block_size), dtype=torch.int64))
        assert logits.shape[2] == model.config.vocab_size


@pytest.fixture(scope="module")
def vocab():
    """The text of GPT-2's vocabulary {token: id}."""
    return vocab_file("encoder.json").read_bytes()


SPECIAL_IDS = TOKENIZERS["user_assistant"].special_ids
FILES = ("tokenizer.json", "added_tokens.json", "vocab.json", "tokenizer_config.json")


@cases
@given(data=st.data(), file=st.sampled_from(FILES))
def test_any_tokenizer_files(folder, vocab, data, file):
    directory = folder / "tokenizer"
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    if file == "vocab.json":
        content = data.draw(st.just(vocab) | edited(vocab))
    elif file == "added_tokens.json":
        (directory / "vocab.json").write_bytes(vocab)
        content = data.draw(as_json(spoilt(SPECIAL_IDS)))
    elif file == "tokenizer_config.json":
        tree = {"chat_template": "?", "eos_token": "<|End|>"}
        content = data.draw(as_json(spoilt(tree)))
    else:
        added = [{"id": token, "content": text} for text, token in SPECIAL_IDS.items()]
        tree = {"added_tokens": added, "model": {"vocab": "the vocabulary"}}
        content = data.draw(as_json(spoilt(tree))).replace(b'"the vocabulary"', vocab)
    (directory / file).write_bytes(content)
    tokenizer = returned(lambda: read_tokenizer(directory), directory)
    if tokenizer:  # another template than the default has all its tokens
        for token in set(tokenizer.special_ids) - {"<|endoftext|>"}:
            assert token.encode() in content.replace(b"\\u003c", b"<")
