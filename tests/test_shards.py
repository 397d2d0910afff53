"""Shards byte by byte: what is written, what is refused, and which pairs of tokens a loader's epoch is made of."""

import gzip
import io
import struct
import tracemalloc
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import assert_refused, largest_file, small_talk, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import HEADER, Loader, ShardWriter, find_shards, open_shard
from tokenizer import Tokenizer

unhurried = settings(deadline=None)  # the machine may be busy
TALK = [([11, 12, 13, 14, 15], [0, 0, 1, 1, 1]), ([21, 22], [0, 1]), ([31, 32, 33, 34], [0, 1, 0, 1])]
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
    lists = [(st.lists(token, min_size=n, max_size=n), st.lists(supervised, min_size=n, max_size=n)) for n in lengths]
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
    many=conversations(), vocab_size=st.integers(1, 65536), template=st.sampled_from(["human_bot", "user_assistant"])
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
    assert contents(open_shard(folder / "train.bin")) == [Tokenizer().render(messages) for messages in spoken]
    assert contents(open_shard(folder / "val.bin")) == [Tokenizer().render(messages) for messages in spoken[:5]]


# the writer


def test_the_writers_memory_does_not_grow_with_the_corpus(fresh):
    def peak(batches):
        tracemalloc.start()
        try:
            write(fresh(), *[[([1, 2, 3], [0, 1, 1])] * 5000] * batches)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(250) < peak(100) + 100_000  # bytes; what is written grows by six million


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


@pytest.mark.parametrize("lengths", [[3000], [3000, 100_000], [100_000]], ids=["at the end", "between", "at once"])
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
    assert "prepare it again" in str(error.value) or "make shards with the scripts in prepare/" in str(error.value)
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


# what the file holds, given the bytes of a good one, and what the message says of it
DAMAGES = {
    "empty": (lambda good: b"", "is empty"),
    "cut in the header": (lambda good: good[:40], r"cut short \(40 bytes, less than its header\)"),
    "only the header": (lambda good: good[:64], "cut short or damaged"),
    "cut in the tokens": (lambda good: good[:80], "cut short or damaged"),
    "cut in the mask": (lambda good: good[:90], "cut short or damaged"),
    "one byte short": (lambda good: good[:-1], r"\(127 bytes, its header says 128\)"),
    "extended": (lambda good: good + bytes(8), r"\(136 bytes, its header says 128\)"),
    "twice": (lambda good: good + good, "cut short or damaged"),
    "older version": (lambda good: header(version=0) + good[64:], "format version 0, this program reads version 1"),
    "newer version": (lambda good: header(version=2) + good[64:], "format version 2, this program reads version 1"),
    "no tokens": (lambda good: header(tokens=0, conversations=0) + offsets(0), "holds no tokens"),
    "more tokens than bytes": (lambda good: header(tokens=2**63) + good[64:], "cut short or damaged"),
    "a border beyond the end": (lambda good: good[:-16] + offsets(99, 11), "damaged"),
    "borders out of order": (lambda good: good[:-24] + offsets(7, 5, 11), "damaged"),
    "borders before the end": (lambda good: good[:-8] + offsets(10), "damaged"),
    "a first border behind the start": (lambda good: good[:-32] + offsets(1, 5, 7, 11), "damaged"),
    "a template that is no text": (lambda good: header(template=b"\xff\xfe") + good[64:], "damaged"),
    "gzip": (lambda good: gzip.compress(good), "is a gzip file"),
    "zip": (zipped, "is a zip file"),
    # llm.c, dev/data/data_common.py: 256 int32 with magic, version and count, then the tokens
    "llm.c": (lambda good: struct.pack("<256i", 20240520, 1, 500, *[0] * 253) + bytes(1000), r"is an llm\.c file"),
    "llm.c of Llama 3": (lambda good: struct.pack("<256i", 20240801, 7, 500, *[0] * 253) + bytes(2000), "is an llm"),
    "text": (lambda good: "Hallo, schöne Welt!\n".encode() * 300, "looks like text"),
    "JSON": (lambda good: b'{"messages": []}', "looks like text"),
    "odd length": (lambda good: bytes(1001), r"odd length \(1001 bytes\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_shard_is_refused_with_the_remedy(talk, damage):
    make, says = DAMAGES[damage]
    talk.write_bytes(make(talk.read_bytes()))
    with pytest.raises(ValueError, match=says) as error:
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
    """A file with this content is refused, naming it, or can be read from its first token to its last."""
    path.write_bytes(content)
    try:
        shard = open_shard(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert sum(len(ids) for ids, _ in contents(shard)) == len(shard.tokens) > 0
        assert shard.mask(0, len(shard.tokens)).shape == shard.tokens.shape


@unhurried
@given(content=st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda tail: b"nanoChat" + tail)))
def test_arbitrary_bytes_are_refused_or_readable(fresh, content):
    readable_or_refused(fresh(), content)


@unhurried
@given(at=st.integers(0, 127), byte=st.integers(0, 255))
def test_a_shard_with_a_wrong_byte_is_refused_or_readable(fresh, at, byte):
    content = bytearray(write(fresh(), TALK).read_bytes())
    content[at] = byte
    readable_or_refused(fresh(), bytes(content))


def test_a_missing_dataset_is_named_with_the_remedy(data_dir):
    with pytest.raises(FileNotFoundError, match=r"no .*nothing/train\*\.bin: make it with a script in prepare/"):
        find_shards(data_dir, "talk,nothing", "train")


def test_a_script_says_in_one_line_which_shard_is_damaged(script, data_dir):
    path = data_dir / "talk" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])  # the script's folder is the one that holds data/
    shape = ("--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=32")
    done = script("train.py", "--init_from=scratch", "--dataset=talk", "--device=cpu", *shape)
    assert_refused(done, path.relative_to(data_dir.parent), "prepare it again")


# which files


def test_a_dataset_is_all_its_shards_and_several_can_be_given(tmp_path):
    for name in ("a/train_1.bin", "a/train_0.bin", "a/val.bin", "b/train.bin", "b/train.bin.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_shards(tmp_path, "b, a", "train")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/train.bin", "a/train_0.bin", "a/train_1.bin"]
    assert find_shards(tmp_path, "a", "val") == [tmp_path / "a" / "val.bin"]


# nanoGPT's files


@pytest.mark.parametrize(
    "tokens", [np.arange(1, 1001), [19280, 11, 262], [35615, 11, 262]], ids=["plain", "PK", "gzip's"]
)
def test_a_headerless_nanogpt_file_is_plain_text_to_learn_all_of(tmp_path, tokens):
    tokens = np.array(tokens, np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    shard = open_shard(tmp_path / "train.bin")
    assert shard.tokens.tolist() == tokens.tolist()
    assert shard.mask(0, len(tokens)).all()
    assert shard.template is None


def test_an_epoch_of_a_headerless_file_has_every_token_but_the_first_as_a_target(tmp_path):
    np.arange(1, 1001, dtype=np.uint16).tofile(tmp_path / "train.bin")
    loader = Loader([tmp_path / "train.bin"], 1, 64, 0, 50257)
    x, y = epoch(loader)
    assert sorted(y[y >= 0].tolist()) == list(range(2, 1001))
    assert (y[y >= 0] == x[y >= 0] + 1).all()


# the loader


def epoch(loader, number=0):
    """Return x and y of the rows of an epoch of a loader with one row a batch."""
    batches = [loader.batch(number * loader.n_rows + row) for row in range(loader.n_rows)]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def numbered(lengths, first=1):
    """Return conversations of these lengths whose tokens number on, with a gap between two, so each is found again."""
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
    return Counter((ids[i - 1], ids[i]) for ids, mask in many for i in range(1, len(ids)) if mask[i])


def pieces(row):
    """Return the runs of consecutive numbers in a row, without the padding behind them."""
    runs = []
    for token in row:
        if runs and token == runs[-1][-1] + 1:
            runs[-1].append(token)
        elif token:
            runs.append([token])
    return runs


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(unhurried, max_examples=50)
@given(lengths, lengths, st.integers(1, 16), st.integers(0, 3))
def test_an_epoch_has_each_supervised_token_exactly_once_behind_the_token_before_it(fresh, ours, theirs, block, seed):
    many = numbered([*ours, 2]), numbered([*theirs, 2], first=1000)
    loader = Loader([write(fresh(), m) for m in many], 1, block, seed, 50257)
    for number in range(2):
        assert pairs(*epoch(loader, number)) == supervised_pairs(many[0] + many[1])


@unhurried
@given(lengths, st.integers(1, 16), st.integers(0, 3))
def test_rows_are_filled_with_whole_pieces_of_conversations(fresh, lengths, block, seed):
    many = numbered([*lengths, 2])
    loader = Loader([write(fresh(), many)], 1, block, seed, 50257)
    found = [piece for row in epoch(loader)[0].tolist() for piece in pieces(row)]
    # the last token of a conversation is a target and needs no place of its own, but is there where there is room
    cut = [ids[i : i + block] for ids, _ in many for i in range(0, len(ids) - 1, block)]
    assert sorted(found) == sorted(cut)


def test_rows_are_as_few_as_pieces_that_follow_each_other_allow(tmp_path):
    loader = Loader([write(tmp_path / "train.bin", numbered([4] * 64))], 1, 16, 0, 50257)
    x, _ = epoch(loader)
    assert loader.n_rows == 16
    assert (x != 0).all()


def test_no_target_is_of_another_conversation_or_unsupervised(tmp_path):
    many = [([1, 2, 3], [0, 0, 1]), ([11, 12], [1, 1])]
    loader = Loader([write(tmp_path / "train.bin", many)], 1, 8, 0, 50257)
    x, y = loader.batch(0)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1, 8), torch.int64, (1, 8), torch.int64)
    assert x.tolist()[0] in ([1, 2, 3, 11, 12, 0, 0, 0], [11, 12, 1, 2, 3, 0, 0, 0])
    assert y[x == 1].item() == -100  # 2 is not supervised
    assert y[x == 2].item() == 3
    assert y[x == 3].item() == -100  # 11 is supervised, but no answer to 3
    assert y[x == 11].item() == 12
    assert (y[x == 12].item(), set(y[x == 0].tolist())) == (-100, {-100})


def test_a_long_conversation_is_cut_at_the_block_without_losing_the_target_behind_the_cut(tmp_path):
    loader = Loader([write(tmp_path / "train.bin", [(list(range(1, 22)), [1] * 21)])], 1, 8, 0, 50257)
    x, y = epoch(loader)
    rows = {tuple(row): targets for row, targets in zip(x.tolist(), y.tolist(), strict=True)}
    assert rows == {
        tuple(range(1, 9)): list(range(2, 10)),
        tuple(range(9, 17)): list(range(10, 18)),
        (17, 18, 19, 20, 21, 0, 0, 0): [18, 19, 20, 21, -100, -100, -100, -100],
    }


@pytest.fixture
def loader_of(tmp_path):
    """Make a loader of 60 conversations: loader_of(batch_size=..., seed=...)."""
    path = write(tmp_path / "train.bin", numbered([3 + i % 20 for i in range(60)]))
    return lambda batch_size=4, block_size=16, seed=0: Loader([path], batch_size, block_size, seed, 50257)


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
        for part in range(2):
            assert torch.equal(four.batch(number)[part], torch.cat([row[part] for row in rows]))


def test_what_the_loader_asks_to_be_learnt_are_the_replies(data_dir):
    loader = Loader(find_shards(data_dir, "talk", "train"), 1, 256, 0, 50257)
    targets = torch.cat([loader.batch(row)[1][0] for row in range(loader.n_rows)])
    said = Tokenizer().decode(targets[targets >= 0].tolist()).split("<|endoftext|>")
    replies = [m["content"] for messages in small_talk(60, seed=1) for m in messages if m["role"] == "assistant"]
    assert sorted(said) == sorted(["", *(f" {reply}" for reply in replies)])


def test_several_datasets_are_one_corpus(data_dir):
    write_shards(data_dir / "more", small_talk(20, seed=5), small_talk(2, seed=6))
    one, two, both = (
        Loader(find_shards(data_dir, names, "train"), 1, 256, 0, 50257) for names in ("talk", "more", "talk,more")
    )
    assert both.n_tokens == one.n_tokens + two.n_tokens
    assert pairs(*epoch(both)) == pairs(*epoch(one)) + pairs(*epoch(two))
    assert both.template == "human_bot"


def test_datasets_in_different_templates_are_refused(data_dir):
    write_shards(data_dir / "other", small_talk(2), small_talk(2), template="user_assistant")
    paths = find_shards(data_dir, "talk,other", "train")
    with pytest.raises(ValueError, match=r"in template human_bot but .* in template user_assistant") as error:
        Loader(paths, 1, 64, 0, 50262)
    assert all(str(path) in str(error.value) for path in paths)


def test_a_shard_for_a_larger_vocabulary_than_the_models_is_refused(data_dir):
    write_shards(data_dir / "other", small_talk(2), small_talk(2), template="user_assistant")
    (path,) = find_shards(data_dir, "other", "train")
    with pytest.raises(ValueError, match=r"other/train\.bin .*50261.* vocabulary is 50257 tokens"):
        Loader([path], 1, 64, 0, 50257)
    assert Loader([path], 1, 64, 0, 50262).template == "user_assistant"


@pytest.mark.parametrize("at", [0, 3, 8, 15, 16])
def test_a_token_beyond_the_models_vocabulary_is_refused_wherever_it_stands(tmp_path, at):
    tokens = np.ones(17, np.uint16)
    tokens[at] = 300
    tokens.tofile(tmp_path / "train.bin")
    loader = Loader([tmp_path / "train.bin"], 1, 8, 0, 300)
    with pytest.raises(ValueError, match=r"train\.bin has token 300, but the model's vocabulary is 300 tokens"):
        epoch(loader)


def test_a_corpus_of_nothing_to_predict_is_refused(tmp_path):
    path = write(tmp_path / "train.bin", [([1], [1])] * 5)
    with pytest.raises(ValueError, match=r"train\.bin has no conversation of two tokens or more"):
        Loader([path], 1, 8, 0, 50257)
