"""The engine's fast ways give what the plain one gives: the greedy text of a loop without a cache, whatever runs
beside a row, whatever was there before it, in every dtype."""

import random
from collections import Counter
from importlib import metadata
from itertools import islice

import numpy as np
import pytest
import torch
from test_generate import PROMPTS, hf, model  # noqa: F401 (fixtures)

from benchmarks import fidelity
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.device import FBGEMM
from nanochatgpt.engine import Engine
from nanochatgpt.generate import generate
from nanochatgpt.loader import Loader
from nanochatgpt.sampling import Sampling
from nanochatgpt.shards import ShardWriter
from nanochatgpt.tokenizer import Tokenizer
from prepare import chitchat
from prepare.render import render_batch

EXACT = [
    torch.float32,
    torch.float16,
    torch.int8,
]  # bfloat16 rounds each sum to 8 bits, which tells rows apart


def plain(gpt, prompt, n):
    """Return n greedy ids by whole forward passes, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(gpt.eval()(torch.tensor([ids]))[0][0, -1].argmax().item())
    return ids[len(prompt) :]


def finish(engine):
    """Step until no row runs; return {row: the ids it gave}."""
    given = {}
    while tokens := engine.step():
        for token in tokens:
            given.setdefault(token.row, []).append(token.id)
    return given


@pytest.fixture
def computed(monkeypatch):
    """How many positions the model computes from now on: a list of (rows, tokens)."""
    calls, hidden = [], GPT.hidden

    def counting(self, idx, *args):
        calls.append(tuple(idx.shape))
        return hidden(self, idx, *args)

    monkeypatch.setattr(GPT, "hidden", counting)
    return calls


@pytest.fixture
def packed(model, tmp_path):  # noqa: F811
    """The model as it is loaded for inference: packed(dtype)."""
    save_model(model, Tokenizer(), tmp_path / "model")
    return lambda dtype: load_model(str(tmp_path / "model"), dtype=dtype, inference=True)[0]


# every dtype, one row or many


@pytest.mark.skipif(not FBGEMM, reason="x86 only")
@pytest.mark.parametrize("dtype", EXACT)
def test_the_packed_model_gives_the_greedy_text_of_its_own_plain_forward(packed, dtype):
    fast = packed(dtype)
    expected = [plain(fast, prompt, 20) for prompt in PROMPTS]
    assert generate(fast, PROMPTS, temperature=0, max_new_tokens=20) == expected
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert generate(fast, [prompt], temperature=0, max_new_tokens=20) == [ids]


@pytest.mark.skipif(not FBGEMM, reason="x86 only")
def test_float16_gives_the_greedy_text_of_float32(packed):
    options = {"temperature": 0, "max_new_tokens": 20}
    assert generate(packed(torch.float16), PROMPTS, **options) == generate(
        packed(torch.float32), PROMPTS, **options
    )


@pytest.mark.skipif(not FBGEMM, reason="x86 only")
@pytest.mark.parametrize("dtype", EXACT)
def test_in_every_exact_dtype_a_row_depends_on_no_neighbour(packed, dtype):
    fast = packed(dtype)
    options = {"max_new_tokens": 20, "top_k": 40}
    together = generate(fast, PROMPTS, seed=5, **options)
    assert together == [
        generate(fast, [prompt], seed=5 + i, **options)[0] for i, prompt in enumerate(PROMPTS)
    ]


# rows that come and go


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_that_join_and_leave_mid_way_change_nobodys_text(model, temperature):  # noqa: F811
    choose = random.Random(1)
    jobs = [[choose.randrange(200) for _ in range(choose.randint(1, 30))] for _ in range(25)]
    options = [
        Sampling(choose.randint(1, 25), temperature, top_p=choose.choice([1.0, 0.9])) for _ in jobs
    ]
    alone = [finish(_with(Engine(model), jobs[i], options[i], seed=i))[0] for i in range(len(jobs))]

    engine, waiting, at = Engine(model, rows=4), list(range(len(jobs))), {}
    given, cut = [[] for _ in jobs], set()
    while waiting or engine.running:
        while waiting and len(engine.running) < 4 and choose.random() < 0.7:  # not always full
            i = waiting.pop()
            at[engine.add(jobs[i], options[i], seed=i)] = i
        for row, token, *_ in engine.step():
            given[at[row]].append(token)
        if engine.running and choose.random() < 0.1:  # one is cut short
            row = choose.choice(engine.running)
            engine.end(row)
            cut.add(at[row])
    assert 0 < len(cut) < len(jobs)
    for i, ids in enumerate(given):
        assert ids == alone[i][: len(ids)]
        assert i in cut or ids == alone[i]


def _with(engine, prompt, options, **add):
    engine.add(prompt, options, **add)
    return engine


def test_more_prompts_than_rows_take_turns(model, monkeypatch):  # noqa: F811
    expected = generate(model, PROMPTS * 3, seed=2, max_new_tokens=9)
    monkeypatch.setattr("nanochatgpt.generate.BATCH_ROWS", 2)
    assert generate(model, PROMPTS * 3, seed=2, max_new_tokens=9) == expected


def test_a_full_engine_refuses_another_row_and_an_ended_row_makes_room(model):  # noqa: F811
    engine = Engine(model, rows=2)
    for prompt in PROMPTS[:2]:
        engine.add(prompt, Sampling(5))
    with pytest.raises(ValueError, match="all 2 rows are running"):
        engine.add(PROMPTS[2], Sampling(5))
    engine.end(0)
    assert engine.add(PROMPTS[2], Sampling(5)) == 0


def test_rows_with_options_of_their_own_share_a_step(model):  # noqa: F811
    options = [
        Sampling(12, 0),
        Sampling(12, 1.3),
        Sampling(12, 0.7, top_k=5),
        Sampling(12, 0, repetition_penalty=2.0),
    ]
    engine = Engine(model, rows=4)
    for i, option in enumerate(options):
        engine.add(PROMPTS[i], option, seed=i, stop_ids=[i])
    together = finish(engine)
    for i, option in enumerate(options):
        assert (
            together[i] == finish(_with(Engine(model), PROMPTS[i], option, seed=i, stop_ids=[i]))[0]
        )


# what was computed before is not computed again


def test_a_new_turn_computes_only_what_is_new_and_gives_what_computing_all_gives(model, computed):  # noqa: F811
    engine, options = Engine(model), Sampling(6, 0)
    ids = list(range(10, 30))
    for turn in range(3):
        engine.add(ids, options)
        computed.clear()
        reply = finish(engine)[0]
        assert computed[0] == (
            1,
            20 if turn == 0 else 5,
        )  # the last id of the reply, never fed, and the four new ones
        assert reply == finish(_with(Engine(model), ids, options))[0]
        ids = ids + reply + [7, 8, 9, turn]


def test_a_prompt_that_parts_from_the_earlier_one_is_computed_from_there(model, computed):  # noqa: F811
    engine, options = Engine(model), Sampling(6, 0)
    finish(_with(engine, list(range(10, 30)), options))
    prompt = [*range(10, 22), 99, 98, 97]
    engine.add(prompt, options)
    computed.clear()
    assert finish(engine)[0] == finish(_with(Engine(model), prompt, options))[0]
    assert computed[0] == (1, 3)


def test_the_same_prompt_again_computes_one_token(model, computed):  # noqa: F811
    engine, options = Engine(model, record=False), Sampling(6, 0)
    first = finish(_with(engine, list(range(10, 30)), options))[0]
    engine.add(list(range(10, 30)), options)
    computed.clear()
    assert finish(engine)[0] == first
    assert computed == [(1, 1)] * 6


def test_of_many_samples_of_one_prompt_the_prompt_is_computed_once(model, computed):  # noqa: F811
    prompt = list(range(10, 40))
    samples = generate(model, [prompt] * 5, seed=3, max_new_tokens=4)
    assert computed[0] == (1, 30)
    assert max(tokens for _, tokens in computed[1:]) == 1
    assert samples == [generate(model, [prompt], seed=3 + i, max_new_tokens=4)[0] for i in range(5)]
    assert len(set(map(tuple, samples))) > 1


def test_rows_with_a_long_common_beginning_compute_it_once_and_differ_from_there(model, computed):  # noqa: F811
    prompts = [[*range(10, 40), 50 + i] for i in range(4)]
    together = generate(model, prompts, temperature=0, max_new_tokens=4)
    assert sum(rows * tokens for rows, tokens in computed) < 31 + 4 * (1 + 4)
    assert together == [plain(model, prompt, 4) for prompt in prompts]


def test_a_row_that_runs_gives_its_beginning_to_a_new_one(model, computed):  # noqa: F811
    engine, prompt = Engine(model, rows=2), list(range(10, 40))
    engine.add(prompt, Sampling(20, 0))
    first = [engine.step()[0].id for _ in range(3)]
    computed.clear()
    engine.add([*prompt, *first], Sampling(5, 0))
    given = finish(engine)
    assert max(tokens for _, tokens in computed) == 1
    assert first + given[0] == plain(model, prompt, 20)
    assert given[1] == plain(model, prompt, 8)[3:]


def test_prompts_of_a_batch_are_computed_together_but_not_too_many_tokens_at_once(
    model, computed, monkeypatch
):
    prompts = [[i, *range(100, 109)] for i in range(6)]
    expected = generate(model, prompts, temperature=0, max_new_tokens=2)
    assert computed[0] == (6, 10)
    computed.clear()
    monkeypatch.setattr("nanochatgpt.generate.PREFILL_TOKENS", 25)
    assert generate(model, prompts, temperature=0, max_new_tokens=2) == expected
    assert computed[:3] == [(2, 10)] * 3


# prompts in pieces


@pytest.mark.parametrize("piece", [1, 3, 16, 1000])
def test_prompts_computed_in_pieces_give_the_same_and_hold_up_nobody(model, computed, piece):  # noqa: F811
    choose = random.Random(3)
    jobs = [[choose.randrange(200) for _ in range(choose.randint(1, 40))] for _ in range(12)]
    jobs += [
        [*jobs[0][:20], 9],
        [*jobs[1], 8, 7],
        jobs[2],
    ]  # beginnings in common, while they are being computed
    alone = [
        finish(_with(Engine(model), job, Sampling(12, 0.9), seed=i))[0]
        for i, job in enumerate(jobs)
    ]
    engine, waiting, at, given = (
        Engine(model, rows=4, prefill_tokens=piece),
        list(range(len(jobs))),
        {},
        {},
    )
    while waiting or engine.running:
        while waiting and len(engine.running) < 4:
            i = waiting.pop(0)
            at[engine.add(jobs[i], Sampling(12, 0.9), seed=i)] = i
        further_on = [i for i in engine.running if engine.rows[i].ids[engine.rows[i].n_prompt :]]
        computed.clear()
        tokens = engine.step()
        assert set(further_on) <= {token.row for token in tokens}
        assert sum(rows * n for rows, n in computed if n > 1) <= 2 * piece  # padding included
        for token in tokens:
            given.setdefault(at[token.row], []).append(token.id)
    assert [given[i] for i in range(len(jobs))] == alone


def test_in_pieces_the_prompt_that_came_first_is_done_first(model):  # noqa: F811
    engine = Engine(model, rows=2, prefill_tokens=10)
    engine.add([1], Sampling(1))
    long = engine.add(list(range(100, 130)), Sampling(5))
    engine.step()  # the first 10 of it, and row 0 is free again
    short = engine.add([5, 6], Sampling(5))
    assert (short, long) == (0, 1)
    assert [[token.row for token in engine.step()] for _ in range(2)] == [[], [long]]
    assert {token.row for token in engine.step()} == {long, short}


# the bounds


def test_rows_of_every_length_end_where_the_room_does(model):  # noqa: F811
    for size in (2, 33, 63, 64):
        engine = Engine(model, rows=3, size=size)
        prompts = [[7], [5] * (size - 1), list(range(1, size // 2 + 1))]
        for prompt in prompts:
            engine.add(prompt, Sampling(1000, 0))
        given = finish(engine)
        for row, prompt in enumerate(prompts):
            assert given[row] == plain(model, prompt, size - len(prompt))


@pytest.mark.slow
def test_a_compiled_step_gives_the_ids_of_the_eager_one(model):  # noqa: F811
    expected = finish(_with(Engine(model), PROMPTS[0], Sampling(40, 0)))
    assert finish(_with(Engine(model, compile=True), PROMPTS[0], Sampling(40, 0))) == expected


@pytest.mark.parametrize("rows", [1, 3])
def test_a_recorded_step_gives_the_ids_of_the_eager_one_at_every_length(model, rows):  # noqa: F811
    given = []
    for record in (False, True):
        engine = Engine(model, rows, record=record)
        for prompt in PROMPTS[:rows]:
            engine.add(prompt, Sampling(60, 0.8), seed=1)
        given.append(finish(engine))
    assert engine.recorded
    assert given[0] == given[1]


@pytest.mark.skipif(not FBGEMM, reason="x86 only")
@pytest.mark.parametrize("dtype", EXACT)
def test_one_trace_serves_any_number_of_rows(packed, dtype, monkeypatch):
    fast, prompts = packed(dtype), [*PROMPTS, [3], [9, 9]]
    options = [
        Sampling(4 * i + 3, 0) for i in range(len(prompts))
    ]  # rows join one by one, and end so
    given = []
    for record_at in (10**9, 3):
        monkeypatch.setattr("nanochatgpt.generate.RECORD_AT", record_at)
        engine, ids = Engine(fast, rows=6), {}
        for prompt, option in zip(prompts, options, strict=True):
            engine.add(prompt, option)
            for token in [token for _ in range(2) for token in engine.step()]:
                ids.setdefault(token.row, []).append(token.id)
        for row, rest in finish(engine).items():
            ids.setdefault(row, []).extend(rest)
        given.append(ids)
    assert set(engine.recorded) == {1, 2}  # the one that is left is alone
    assert given[0] == given[1]


def test_rows_that_go_on_are_moved_together_and_each_keeps_what_it_has_computed(model, monkeypatch):  # noqa: F811
    widths, take = [], Engine._take
    monkeypatch.setattr(
        Engine, "_take", lambda engine, n, length: (widths.append(n), take(engine, n, length))[1]
    )
    prompts, lengths = [[i, 20, 30 + i, 7] for i in range(6)], [3, 20, 5, 4, 12, 15]
    engine = Engine(model, rows=6)
    for prompt, n in zip(prompts, lengths, strict=True):
        engine.add(prompt, Sampling(n, 0))
    texts = {row: prompts[row] + ids for row, ids in finish(engine).items()}
    for row, n in enumerate(lengths):
        assert (
            texts[row]
            == prompts[row] + finish(_with(Engine(model), prompts[row], Sampling(n, 0)))[0]
        )
    running = [
        sum(n > step for n in lengths) for step in range(1, 20)
    ]  # after the first token, which prompts give
    assert widths[:19] == running
    for row in (
        0,
        1,
        4,
        5,
        2,
        3,
    ):  # each next turn goes on from its own row, wherever that has got to
        turn = [*texts[row], 11, 12]
        expected = finish(_with(Engine(model), turn, Sampling(6, 0)))[0]
        i = engine.add(turn, Sampling(6, 0))
        assert engine.rows[i].n_cached >= len(texts[row]) - 1
        assert finish(engine)[i] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_graph_gives_the_ids_of_the_eager_step(dtype):
    torch.manual_seed(0)
    wide = GPT(GPTConfig(512, 300, 2, 4, 64)).to("cuda", dtype)
    given = []
    for record in (False, True):
        engine = Engine(wide, rows=3, record=record)
        for prompt in PROMPTS[:3]:
            engine.add(prompt, Sampling(400, 0.8), seed=1)
        given.append(finish(engine))
    assert given[0] == given[1]


# what fewer bits cost


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small GPT that was trained on real conversations, as a directory with their held-out part in data/talk.

    Its vocabulary is the 1,500 commonest tokens, the last of which stands for all others: it learns in seconds.
    """
    folder = tmp_path_factory.mktemp("trained")
    path = metadata.distribution("chitchat-dataset").locate_file("chitchat_dataset/dataset.json")
    rendered = list(
        render_batch(Tokenizer(), [messages for _, messages in islice(chitchat.read(path), 600)])
    )
    common = Counter(token for ids, _ in rendered for token in ids.tolist()).most_common(1500)
    rank = {token: i for i, (token, _) in enumerate(common)}
    (folder / "talk").mkdir()
    ranks = [([rank.get(token, 1499) for token in ids.tolist()], mask) for ids, mask in rendered]
    np.array([token for ids, _ in ranks[60:] for token in ids], "<u2").tofile(
        folder / "talk" / "train.bin"
    )
    with ShardWriter(folder / "talk" / "val.bin", 1500, "human_bot") as writer:
        writer.write(ranks[:60])
    loader = Loader([(folder / "talk" / "train.bin", 1.0)], 16, 64, seed=0, tokenizer=Tokenizer())
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=1500, n_layer=3, n_head=4, n_embd=64))
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=5e-3)
    for step in range(150):
        x, _, _ = loader.batch(step)
        loss = gpt(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 5  # of 7.3
    save_model(gpt, Tokenizer(), folder / "model")
    return folder


@pytest.mark.skipif(not FBGEMM, reason="x86 only")
@pytest.mark.parametrize(
    ("dtype", "kl", "same_top"), [("int8", 5e-3, 0.97), ("float16", 1e-4, 0.999)]
)
def test_on_real_text_a_trained_model_in_fewer_bits_says_the_same(trained, dtype, kl, same_top):
    config = fidelity.Config(str(trained / "model"), str(trained), "talk", 2000, dtype)
    result = fidelity.measure(config)
    assert result["positions"] == 2000
    assert 0 < result["kl"] < kl
    assert result["same_top"] >= same_top
    assert abs(result["perplexity"] / result["perplexity_float32"] - 1) < kl
