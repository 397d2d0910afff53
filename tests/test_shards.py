"""Shards byte by byte, what is refused, and what a loader makes of them: rows of whole
conversations, each once."""

import gzip
import io
import struct
import tracemalloc
import zipfile
from collections import Counter
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, largest_file, small_talk, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochatgpt.loader import Loader
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.shards import HEADER, ShardWriter, find_shards, open_shard
from nanochatgpt.tokenizer import TEMPLATES, Tokenizer
from prepare.render import render_batch

TOKENIZERS = {name: Tokenizer(name) for name in TEMPLATES}
in_both_templates = pytest.mark.parametrize("tok", TOKENIZERS.values(), ids=TOKENIZERS)
unhurried = settings(deadline=None)  # the machine may be busy
TALK = [
    ([11, 12, 13, 14, 15], [0, 0, 1, 1, 1]),
    ([21, 22], [0, 1]),
    ([31, 32, 33, 34], [0, 1, 0, 1]),
]
# lowest bit first: 00111 01 0, then 101
TALK_BITS = bytes([0b01011100, 0b101])


def write(path, *batches, vocab_size=50257, template="human_bot"):
    with ShardWriter(path, vocab_size, template) as writer:
        for conversations in batches:
            writer.write(conversations)
    return path


def contents(shard):
    """Return the conversations of a shard as they were written, [(ids, mask)]."""
    borders = zip(shard.offsets[:-1].tolist(), shard.offsets[1:].tolist(), strict=True)
    return [(shard.tokens[a:b].tolist(), shard.mask(a, b).astype(int).tolist()) for a, b in borders]


@st.composite
def conversations(draw, max_size=8, max_length=40):
    lengths = draw(st.lists(st.integers(0, max_length), max_size=max_size))
    token, supervised = st.integers(0, 65535), st.integers(0, 1)
    lists = [
        (st.lists(token, min_size=n, max_size=n), st.lists(supervised, min_size=n, max_size=n))
        for n in lengths
    ]
    return [(draw(ids), draw(mask)) for ids, mask in lists]


@pytest.fixture
def talk(tmp_path):
    return write(tmp_path / "train.bin", TALK)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Make a new path at each call."""
    return lambda: tmp_path_factory.mktemp("shard") / "train.bin"


# the file


def test_a_shard_is_laid_out_as_documented(talk):
    expected = b"nanoChat" + struct.pack("<IIQQ", 1, 50257, 11, 3) + b"human_bot".ljust(32, b"\0")
    expected += struct.pack("<11H", 11, 12, 13, 14, 15, 21, 22, 31, 32, 33, 34) + bytes(2)
    expected += TALK_BITS + bytes(6)
    expected += struct.pack("<4Q", 0, 5, 7, 11)
    assert talk.read_bytes() == expected


@unhurried
@given(
    many=conversations(),
    vocab_size=st.integers(1, 65536),
    template=st.sampled_from(["human_bot", "user_assistant"]),
)
def test_what_is_written_is_read(fresh, many, vocab_size, template):
    path = write(fresh(), many, vocab_size=vocab_size, template=template)
    if not any(ids for ids, _ in many):
        with pytest.raises(ValueError, match="holds no tokens"):
            open_shard(path)
        return
    shard = open_shard(path)
    assert contents(shard) == many
    assert (shard.vocab_size, shard.template, shard.path) == (vocab_size, template, path)


@unhurried
@given(many=conversations(), borders=st.lists(st.integers(0, 8), max_size=5).map(sorted))
def test_several_writes_make_the_same_file_as_one(fresh, many, borders):
    batches = [many[a:b] for a, b in zip([0, *borders], [*borders, None], strict=True)]
    assert write(fresh(), *batches).read_bytes() == write(fresh(), many).read_bytes()


def test_the_mask_of_any_stretch_is_the_one_written(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, 27).tolist()
    shard = open_shard(write(tmp_path / "train.bin", [(list(range(27)), mask)]))
    for start in range(28):
        for stop in range(start, 28):
            assert shard.mask(start, stop).tolist() == [bool(bit) for bit in mask[start:stop]]


def test_a_shard_is_mapped_and_not_read(talk):
    shard = open_shard(talk)
    assert isinstance(shard.tokens, np.memmap)
    assert isinstance(shard.bits, np.memmap)
    assert not shard.tokens.flags.writeable


def test_the_conversations_of_a_dataset_come_back_as_the_tokenizer_rendered_them(tmp_path):
    spoken = small_talk(50)
    folder = write_shards(tmp_path / "talk", spoken, spoken[:5])
    assert contents(open_shard(folder / "train.bin")) == [
        Tokenizer().render(messages) for messages in spoken
    ]
    assert contents(open_shard(folder / "val.bin")) == [
        Tokenizer().render(messages) for messages in spoken[:5]
    ]


# the writer


def test_the_writers_memory_does_not_grow_with_the_corpus(fresh):
    def peak(batches):
        tracemalloc.start()
        try:
            write(fresh(), *[[([1, 2, 3], [0, 1, 1])] * 5000] * batches)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(70) < peak(40) + 100_000  # bytes; the file grows by a million


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_writer_that_is_interrupted_leaves_the_old_file_and_nothing_else(talk, failure):
    before = talk.read_bytes()
    with pytest.raises(failure), ShardWriter(talk, 50257, "human_bot") as writer:
        writer.write(TALK * 10)
        raise failure
    assert talk.read_bytes() == before
    assert list(talk.parent.iterdir()) == [talk]


def test_a_finished_shard_takes_its_place_only_at_the_end_of_the_context(talk):
    before = talk.read_bytes()
    with pytest.raises(KeyboardInterrupt), ShardWriter(talk, 50257, "human_bot") as writer:
        writer.write(TALK * 10)
        writer.finish()
        raise KeyboardInterrupt
    assert talk.read_bytes() == before
    assert list(talk.parent.iterdir()) == [talk]
    with ShardWriter(talk, 50257, "human_bot") as writer:
        writer.write(TALK * 10)
        writer.finish()
        assert talk.read_bytes() == before
    assert contents(open_shard(talk)) == TALK * 10


@pytest.mark.parametrize(
    "lengths", [[3000], [3000, 100_000], [100_000]], ids=["at the end", "between", "at once"]
)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(talk, lengths):
    before = talk.read_bytes()
    with largest_file(5000), pytest.raises(OSError, match="File too large"):
        write(talk, *([([1] * n, [1] * n)] for n in lengths))
    assert talk.read_bytes() == before
    assert list(talk.parent.iterdir()) == [talk]


def test_a_shard_appears_only_when_it_is_whole(tmp_path):
    with ShardWriter(tmp_path / "deep" / "train.bin", 50257, "human_bot") as writer:
        writer.write(TALK)
        assert not writer.path.exists()
    assert list(writer.path.parent.iterdir()) == [writer.path]


# what is refused


def assert_names_path_and_remedy(error, path):
    assert str(path) in str(error.value)
    assert "prepare it again" in str(
        error.value
    ) or "make shards with the scripts in prepare/" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.bin", content)
    return file.getvalue()


def header(version=1, vocab_size=50257, tokens=11, conversations=3, template=b"human_bot"):
    return HEADER.pack(b"nanoChat", version, vocab_size, tokens, conversations, template)


def offsets(*values):
    return struct.pack(f"<{len(values)}Q", *values)


# what the file holds, given the bytes of a good one
DAMAGES = {
    "empty": lambda good: b"",
    "cut in the header": lambda good: good[:40],
    "only the header": lambda good: good[:64],
    "cut in the tokens": lambda good: good[:80],
    "cut in the mask": lambda good: good[:90],
    "one byte short": lambda good: good[:-1],
    "extended": lambda good: good + bytes(8),
    "twice": lambda good: good + good,
    "older version": lambda good: header(version=0) + good[64:],
    "newer version": lambda good: header(version=2) + good[64:],
    "no tokens": lambda good: header(tokens=0, conversations=0) + offsets(0),
    "more tokens than bytes": lambda good: header(tokens=2**63) + good[64:],
    "a border beyond the end": lambda good: good[:-16] + offsets(99, 11),
    "borders out of order": lambda good: good[:-24] + offsets(7, 5, 11),
    "borders before the end": lambda good: good[:-8] + offsets(10),
    "a first border behind the start": lambda good: good[:-32] + offsets(1, 5, 7, 11),
    "a template that is no text": lambda good: header(template=b"\xff\xfe") + good[64:],
    "gzip": lambda good: gzip.compress(good),
    "zip": zipped,
    # llm.c, dev/data/data_common.py: 256 int32 with magic, version and count, then the tokens
    "llm.c": lambda good: struct.pack("<256i", 20240520, 1, 500, *[0] * 253) + bytes(1000),
    "llm.c of Llama 3": lambda good: (
        struct.pack("<256i", 20240801, 7, 500, *[0] * 253) + bytes(2000)
    ),
    "text": lambda good: "Hallo, schöne Welt!\n".encode() * 300,
    "JSON": lambda good: b'{"messages": []}',
    "odd length": lambda good: bytes(1001),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_shard_is_refused_with_the_remedy(talk, damage):
    talk.write_bytes(DAMAGES[damage](talk.read_bytes()))
    with pytest.raises(ValueError, match="train") as error:
        open_shard(talk)
    assert_names_path_and_remedy(error, talk)


def test_a_shard_cut_anywhere_is_refused(talk):
    good = talk.read_bytes()
    for length in range(len(good)):
        talk.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"train\.bin") as error:
            open_shard(talk)
        assert_names_path_and_remedy(error, talk)


def readable_or_refused(path, content):
    """A file with this content is refused, naming it, or can be read from its first token to its
    last."""
    path.write_bytes(content)
    try:
        shard = open_shard(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert sum(len(ids) for ids, _ in contents(shard)) == len(shard.tokens) > 0
        assert shard.mask(0, len(shard.tokens)).shape == shard.tokens.shape


@unhurried
@given(
    content=st.one_of(
        st.binary(max_size=300), st.binary(max_size=300).map(lambda tail: b"nanoChat" + tail)
    )
)
def test_arbitrary_bytes_are_refused_or_readable(fresh, content):
    readable_or_refused(fresh(), content)


@unhurried
@given(at=st.integers(0, 127), byte=st.integers(0, 255))
def test_a_shard_with_a_wrong_byte_is_refused_or_readable(fresh, at, byte):
    content = bytearray(write(fresh(), TALK).read_bytes())
    content[at] = byte
    readable_or_refused(fresh(), bytes(content))


def test_a_missing_dataset_is_named_with_the_remedy(data_dir):
    with pytest.raises(
        FileNotFoundError, match=r"no .*nothing/train\*\.bin: make it with a script in prepare/"
    ):
        find_shards(data_dir, "talk,nothing", "train")


def test_a_script_says_in_one_line_which_shard_is_damaged(as_main, data_dir, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    path = Path("data/talk/train.bin")
    path.write_bytes(path.read_bytes()[:-1])
    shape = ("--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=32")
    done = as_main("train.py", "--init_from=scratch", "--dataset=talk", "--device=cpu", *shape)
    assert_refused(done, path, "prepare it again")


# which files


def test_a_dataset_is_all_its_shards_and_several_can_be_given_with_their_shares(tmp_path):
    for name in ("a/train_1.bin", "a/train_0.bin", "a/val.bin", "b/train.bin", "b/train.bin.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, b, val = (
        [tmp_path / "a/train_0.bin", tmp_path / "a/train_1.bin"],
        tmp_path / "b/train.bin",
        tmp_path / "a/val.bin",
    )
    assert find_shards(tmp_path, "b, a", "train") == [(b, 1.0), (a[0], 1.0), (a[1], 1.0)]
    assert find_shards(tmp_path, "a:2,b : 0.5", "train", shares=True) == [
        (a[0], 2.0),
        (a[1], 2.0),
        (b, 0.5),
    ]
    assert find_shards(tmp_path, "a", "val") == [(val, 1.0)]


@pytest.mark.parametrize("share", ["0", "-1", "x", "nan", "inf", "1:2"])
def test_a_share_that_is_no_positive_number_is_refused_by_the_name_of_its_dataset(data_dir, share):
    with pytest.raises(ValueError, match=r"dataset=.*talk:0\.5"):
        find_shards(data_dir, f"talk:{share}", "train", shares=True)


def test_a_share_where_nothing_would_come_of_it_is_refused(data_dir):
    with pytest.raises(ValueError, match=r"dataset=talk:0\.5"):
        find_shards(data_dir, "talk:0.5", "val")


# nanoGPT's files


@pytest.mark.parametrize(
    "tokens",
    [np.arange(1, 1001), [19280, 11, 262], [35615, 11, 262]],
    ids=["plain", "PK", "gzip's"],
)
def test_a_headerless_nanogpt_file_is_plain_text_to_learn_all_of(tmp_path, tokens):
    tokens = np.array(tokens, np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    shard = open_shard(tmp_path / "train.bin")
    assert shard.tokens.tolist() == tokens.tolist()
    assert shard.mask(0, len(tokens)).all()
    assert shard.template is None


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("largest", [50256, 128_000])
def test_a_headerless_file_of_wider_tokens_is_refused_by_that_name(tmp_path, dtype, largest):
    tokens = np.random.default_rng(0).integers(0, largest, 1000)
    tokens.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin.*32 bits"):
        open_shard(tmp_path / "train.bin")


def test_a_headerless_file_with_a_vocabulary_of_its_own_is_refused(tmp_path):
    np.arange(65, dtype=np.uint16).tofile(tmp_path / "train.bin")
    open_shard(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.bin.*meta\.pkl"):
        open_shard(tmp_path / "train.bin")


# the loader


def load(*paths, batch_size=1, block=16, seed=0, shares=None, tokenizer=TOKENIZERS["human_bot"]):
    shards = list(zip(paths, shares or [1.0] * len(paths), strict=True))
    return Loader(shards, batch_size, block, seed, tokenizer)


def rows_of(loader, epoch=0):
    """Return the batches of an epoch of a loader with one row a batch: [(x, y, documents)]."""
    return [loader.batch(epoch * loader.n_rows + row) for row in range(loader.n_rows)]


def epoch(loader, number=0):
    """Return x and y of the rows of an epoch, (n_rows, T) each."""
    return tuple(torch.cat(part) for part in list(zip(*rows_of(loader, number), strict=True))[:2])


def numbered(lengths, first=1):
    """Return conversations of these lengths whose tokens number on, with a gap between two, so each
    is found again."""
    made = []
    for n in lengths:
        mask = [int(i % 3 != 1) for i in range(first, first + n)]
        made.append((list(range(first, first + n)), mask))
        first += n + 1
    return made


def pairs(x, y):
    """Return the (token, target) pairs of a batch with their number."""
    return Counter(zip(x[y != -100].tolist(), y[y != -100].tolist(), strict=True))


def supervised_pairs(many):
    return Counter(
        (ids[i - 1], ids[i]) for ids, mask in many for i in range(1, len(ids)) if mask[i]
    )


def documents_of(x, y, documents):
    """Return [(inputs, targets)] of each document of a batch that has any tokens."""
    lengths = documents.diff().tolist()
    parts = zip(*(t.flatten().split(lengths) for t in (x, y)), strict=True)
    return [(inputs.tolist(), targets.tolist()) for inputs, targets in parts if len(inputs)]


lengths = st.lists(st.integers(0, 17), min_size=1, max_size=12)


@settings(unhurried, max_examples=50)
@given(lengths, lengths, st.integers(16, 40), st.integers(0, 3))
def test_an_epoch_has_each_supervised_token_exactly_once_behind_the_token_before_it(
    fresh, ours, theirs, block, seed
):
    many = numbered([*ours, 3]), numbered([*theirs, 3], first=1000)
    loader = load(*(write(fresh(), m) for m in many), block=block, seed=seed)
    for number in range(2):
        assert pairs(*epoch(loader, number)) == supervised_pairs(many[0] + many[1])
    assert loader.n_tokens == sum(len(ids) for ids, _ in many[0] + many[1])
    assert loader.n_lost == sum(len(ids) for ids, _ in many[0] + many[1] if len(ids) == 1)


@settings(unhurried, max_examples=50)
@given(lengths, st.integers(16, 40), st.integers(1, 4), st.integers(0, 3))
def test_the_documents_are_the_conversations_and_the_padding_of_each_row(
    fresh, lengths, block, batch_size, seed
):
    many = numbered([*lengths, 3])
    path = write(fresh(), many)
    whole = {
        (*ids[:-1],): [t if m else -100 for t, m in zip(ids[1:], mask[1:], strict=True)]
        for ids, mask in many
    }
    loader = load(path, batch_size=batch_size, block=block, seed=seed)
    for number in range(3):
        x, y, documents = loader.batch(number)
        assert (documents.dtype, documents.shape) == (torch.int32, (loader.max_documents + 1,))
        assert documents[0] == 0
        assert documents[-1] == batch_size * block
        assert (documents.diff() >= 0).all()
        assert set(range(0, batch_size * block, block)) <= set(
            documents.tolist()
        )  # none goes on in the next row
        for inputs, targets in documents_of(x, y, documents):
            padding = ([0] * len(inputs), [-100] * len(inputs))
            assert (inputs, targets) in (padding, (inputs, whole.get((*inputs,))))
    found = [
        (*inputs,)
        for row in rows_of(load(path, block=block))
        for inputs, _ in documents_of(*row)
        if inputs[0]
    ]
    assert sorted(found) == sorted((*ids[:-1],) for ids, _ in many if len(ids) > 1)


def test_a_small_batch_written_out(tmp_path):
    many = [([1, 2, 3], [0, 0, 1]), ([11, 12], [1, 1])]
    loader = load(write(tmp_path / "train.bin", many), block=6)
    x, y, documents = loader.batch(0)
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
    _ = -100
    assert (x.tolist(), y.tolist(), documents.tolist()) in (
        ([[1, 2, 11, 0, 0, 0]], [[_, 3, 12, _, _, _]], [0, 2, 3, 6]),
        ([[11, 1, 2, 0, 0, 0]], [[12, _, 3, _, _, _]], [0, 1, 3, 6]),
    )
    assert loader.fill == 3 / 6


def test_rows_of_conversations_of_realistic_lengths_are_97_percent_full(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 0.8, 3000).astype(int).clip(8, 1025)
    assert 195 < lengths.mean() < 205
    loader = load(write(tmp_path / "train.bin", [([7] * n, [1] * n) for n in lengths]), block=1024)
    x, y = epoch(loader)
    assert x.count_nonzero() == (y == 7).sum() == (lengths - 1).sum()
    assert (x != 0).double().mean().item() == pytest.approx(loader.fill)
    assert loader.fill >= 0.97


def test_conversations_that_fill_rows_without_rest_leave_no_padding(tmp_path):
    loader = load(write(tmp_path / "train.bin", numbered([5, 9, 17] * 32)))
    x, _ = epoch(loader)
    assert loader.n_rows == 32 * (4 + 8 + 16) / 16
    assert (x != 0).all()


# long conversations


@st.composite
def chats(draw):
    """Conversations some of which are too long, of numbers that come but once."""
    numbers = map(str, count(100))

    def say(role, low):
        return {"role": role, "content": " ".join(islice(numbers, draw(st.integers(low, 12))))}

    return [
        [say("system", 1)] * draw(st.integers(0, 1))
        + [say(role, 1) for _ in range(draw(st.integers(1, 6))) for role in ("user", "assistant")]
        for _ in range(draw(st.integers(1, 4)))
    ]


def split(messages):
    """Return (the persona's messages, the exchanges) of messages in which user and assistant
    alternate."""
    n = int(messages[0]["role"] == "system")
    return messages[:n], [messages[i : i + 2] for i in range(n, len(messages), 2)]


@in_both_templates
@settings(unhurried, max_examples=50)
@given(many=chats(), block=st.integers(40, 80))
def test_long_conversations_are_cut_into_conversations_with_all_the_exchanges_that_fit(
    fresh, tok, many, block
):
    path = write(fresh(), render_batch(tok, many), vocab_size=tok.n_vocab, template=tok.template)
    loader = load(path, block=block, tokenizer=tok)
    whole, cut = [], []
    for inputs, targets in chain(*(documents_of(*row) for row in rows_of(loader))):
        if set(targets) == {-100}:
            continue  # padding
        ids = [*inputs, targets[-1]]
        persona, exchanges = split(tok.parse(ids))
        assert [message["role"] for message in chain(*exchanges)] == ["user", "assistant"] * len(
            exchanges
        )
        _, mask = tok.render([*persona, *chain(*exchanges)])
        assert targets == [
            token if m else -100 for token, m in zip(ids[1:], mask[1:], strict=False)
        ]
        if ids[-1] == tok.eos_id:
            whole += [tok.render([*persona, *exchange])[0] for exchange in exchanges]
        else:
            cut.append(ids)
    every = [
        tok.render([*persona, *exchange])
        for persona, exchanges in map(split, many)
        for exchange in exchanges
    ]
    room = block + 1
    assert sorted(whole) == sorted(ids for ids, _ in every if len(ids) <= room)
    assert sorted(cut) == sorted(
        ids[:room] for ids, mask in every if len(ids) > room and any(mask[:room])
    )


@in_both_templates
@pytest.mark.parametrize(
    "persona", [[], [{"role": "system", "content": "i count"}]], ids=["without persona", "with"]
)
def test_of_an_exchange_that_is_too_long_the_end_is_lost(tmp_path, tok, persona):
    messages = [
        *persona,
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "1 2 3 4 " * 20},
    ]
    ids, mask = tok.render(messages)
    path = write(
        tmp_path / "train.bin", [(ids, mask)], vocab_size=tok.n_vocab, template=tok.template
    )
    loader = load(path, block=32, tokenizer=tok)
    x, y, _ = loader.batch(0)
    assert x.tolist() == [ids[:32]]
    assert y.tolist() == [[t if m else -100 for t, m in zip(ids[1:33], mask[1:33], strict=True)]]
    assert loader.n_rows == 1


@in_both_templates
@pytest.mark.parametrize(
    "persona",
    [
        pytest.param([], id="without persona"),
        pytest.param(
            [{"role": "system", "content": "i count"}],
            id="with",
        ),
    ],
)
def test_the_tokens_that_are_in_no_row_are_counted(tmp_path, tok, persona):
    exchange = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2 3 4"}]
    ids, mask = tok.render(
        [*persona, *exchange, *exchange, exchange[0], {**exchange[1], "content": "5 " * 80}]
    )
    path = write(
        tmp_path / "train.bin",
        [(ids, mask), ([1], [1])],
        vocab_size=tok.n_vocab,
        template=tok.template,
    )
    loader = load(path, block=32, tokenizer=tok)
    pieces = tok.cut(ids, 33)
    in_rows = set(chain(*([*range(n), *range(start, stop)] for n, start, stop in pieces)))
    assert len(pieces) > 1
    assert loader.n_lost == len(ids) - len(in_rows) + 1


def test_a_file_without_conversations_is_cut_at_each_row_and_every_token_but_the_first_is_a_target(
    tmp_path,
):
    np.arange(1, 22, dtype=np.uint16).tofile(tmp_path / "train.bin")
    loader = load(tmp_path / "train.bin", block=8)
    x, y = epoch(loader)
    rows = {tuple(row): targets for row, targets in zip(x.tolist(), y.tolist(), strict=True)}
    assert rows == {
        tuple(range(1, 9)): list(range(2, 10)),
        tuple(range(9, 17)): list(range(10, 18)),
        (17, 18, 19, 20, 0, 0, 0, 0): [18, 19, 20, 21, -100, -100, -100, -100],
    }
    assert loader.n_lost == 0


# order


@pytest.fixture
def loader_of(tmp_path):
    """Make a loader of 60 conversations: loader_of(batch_size=..., seed=...)."""
    path = write(tmp_path / "train.bin", numbered([3 + i % 15 for i in range(60)]))
    return lambda batch_size=4, seed=0: load(path, batch_size=batch_size, seed=seed)


def test_a_batch_depends_on_the_seed_and_its_number_alone(loader_of):
    there, back = loader_of(), loader_of()
    batches = [there.batch(number) for number in range(40)]
    for number in reversed(range(40)):
        for ours, theirs in zip(batches[number], back.batch(number), strict=True):
            assert torch.equal(ours, theirs)


def test_another_seed_is_another_order(loader_of):
    x, y = epoch(loader_of(batch_size=1, seed=0))
    other_x, other_y = epoch(loader_of(batch_size=1, seed=1))
    assert pairs(x, y) == pairs(other_x, other_y)
    assert x.tolist() != other_x.tolist()


def test_another_epoch_is_another_order_of_the_same_rows(loader_of):
    loader = loader_of(batch_size=1)
    first, second = (epoch(loader, number)[0].tolist() for number in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_batches_of_any_size_are_the_same_rows_one_after_the_other(loader_of):
    one, four = loader_of(batch_size=1), loader_of(batch_size=4)
    for number in range(one.n_rows):  # four epochs
        rows = [one.batch(4 * number + row) for row in range(4)]
        x, y, documents = four.batch(number)
        assert torch.equal(x, torch.cat([row[0] for row in rows]))
        assert torch.equal(y, torch.cat([row[1] for row in rows]))
        assert documents_of(x, y, documents) == list(chain(*(documents_of(*row) for row in rows)))


# several shards


def test_several_datasets_are_one_corpus(data_dir):
    write_shards(data_dir / "more", small_talk(20, seed=5), small_talk(2, seed=6))
    one, two, both = (
        Loader(find_shards(data_dir, names, "train"), 1, 256, 0, Tokenizer())
        for names in ("talk", "more", "talk,more")
    )
    assert both.n_tokens == one.n_tokens + two.n_tokens
    assert both.n_rows == one.n_rows + two.n_rows
    assert pairs(*epoch(both)) == pairs(*epoch(one)) + pairs(*epoch(two))


@settings(unhurried, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    shares=st.lists(st.sampled_from([0.1, 0.5, 0.75, 1.0, 1.5, 2.0, 3.7]), min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_each_epoch_has_the_share_of_each_shard_exactly_and_its_rows_take_turns(
    fresh, sizes, shares, seed
):
    paths = [write(fresh(), numbered([17] * n, first=1 + 1000 * i)) for i, n in enumerate(sizes)]
    loader = load(*paths, seed=seed, shares=shares[: len(sizes)])
    taken = [max(1, round(share * n)) for n, share in zip(sizes, shares, strict=False)]
    assert loader.n_rows == sum(taken)
    seen = Counter()
    for number in range(4):
        first = epoch(loader, number)[0][:, 0].tolist()
        seen.update(first)
        assert [sum(token // 1000 == i for token in first) for i in range(len(sizes))] == taken
        for i, n in enumerate(sizes):
            times = [seen[1 + 1000 * i + 18 * row] for row in range(n)]
            assert sum(times) == (number + 1) * taken[i]
            assert max(times) - min(times) <= 1


def test_a_share_of_a_half_has_each_row_once_in_two_epochs_and_one_of_two_twice_in_each(tmp_path):
    half = load(write(tmp_path / "train.bin", numbered([17] * 8)), shares=[0.5])
    first, second = ({*epoch(half, number)[0][:, 0].tolist()} for number in range(2))
    every = set(range(1, 8 * 18, 18))
    assert (len(first), len(second), first | second) == (4, 4, every)
    twice = load(tmp_path / "train.bin", shares=[2.0])
    for number in range(2):
        assert Counter(epoch(twice, number)[0][:, 0].tolist()) == Counter([*every] * 2)


# what is learnt, and what is refused


@in_both_templates
def test_what_the_loader_asks_to_be_learnt_are_the_replies(tmp_path, tok):
    spoken = small_talk(60, seed=1)
    write_shards(tmp_path / "talk", spoken, spoken[:1], template=tok.template)
    loader = Loader(find_shards(tmp_path, "talk", "train"), 1, 256, 0, tok)
    _, y = epoch(loader)
    after, end = {"human_bot": ("", "<|endoftext|>"), "user_assistant": (" ", "<|End|>")}[
        tok.template
    ]
    said = tok.decode(y[y >= 0].tolist()).split(end)
    replies = [m["content"] for messages in spoken for m in messages if m["role"] == "assistant"]
    assert sorted(said) == sorted(["", *(f" {reply}{after}" for reply in replies)])


@in_both_templates
def test_a_dataset_in_another_template_is_refused(tmp_path, tok):
    other = {"human_bot": "user_assistant", "user_assistant": "human_bot"}[tok.template]
    path = write(tmp_path / "train.bin", TALK, template=other)
    with pytest.raises(ValueError, match=rf"train\.bin.*--template={tok.template}"):
        load(path, tokenizer=tok)


def test_a_shard_for_a_larger_vocabulary_than_the_tokenizers_is_refused(tmp_path):
    path = write(tmp_path / "train.bin", TALK, vocab_size=50258)
    with pytest.raises(
        ValueError,
        match=r"train\.bin.* 50257",
    ):
        load(path)


@pytest.mark.parametrize("at", [0, 3, 8, 15, 16])
def test_a_token_beyond_the_vocabulary_is_refused_wherever_it_stands(tmp_path, at):
    tokens = np.ones(17, np.uint16)
    tokens[at] = 50257
    tokens.tofile(tmp_path / "train.bin")
    loader = load(tmp_path / "train.bin", block=8)
    with pytest.raises(
        ValueError,
        match=r"train\.bin.* 50257",
    ):
        epoch(loader)


def test_a_prompt_with_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    tok = TOKENIZERS["human_bot"]
    shard = open_shard(write(tmp_path / "train.bin", [([11, 60000, 12, tok.eos_id], [0, 0, 1, 1])]))
    with pytest.raises(ValueError, match=r"train\.bin has token 60000"):
        sample_prompts([shard], tok, 1, 8, 0)


@pytest.mark.parametrize(
    "many",
    [
        pytest.param([([1], [1])] * 5, id="single tokens"),
        pytest.param([([1, 2, 3], [1, 0, 0])] * 5, id="nothing supervised"),
        pytest.param(
            [(list(range(1, 20)), [0] * 10 + [1] * 9)], id="supervised only behind the block"
        ),
    ],
)
def test_a_corpus_of_nothing_to_learn_is_refused(tmp_path, many):
    with pytest.raises(ValueError, match=r"train\.bin.*8 tokens.*block_size"):
        load(write(tmp_path / "train.bin", many), block=8)


def test_a_text_of_one_token_is_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"\x07\x00")
    with pytest.raises(ValueError, match=r"train\.bin"):
        load(tmp_path / "train.bin", block=8)


def test_the_span_is_the_mean_length_of_the_conversation_that_a_token_is_in(tmp_path):
    loader = Loader(
        [(write(tmp_path / "train.bin", numbered([11, 11, 31])), 1)], 1, 64, 0, Tokenizer()
    )
    assert loader.span == pytest.approx((10 * 10 + 10 * 10 + 30 * 30) / 50)
