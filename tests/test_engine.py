"""The engine gives the tokens of the plain GPT.generate, in every dtype, whatever runs next to a
row
and whatever its cache held before; and it computes nothing twice."""

import random
from collections import Counter
from importlib import metadata
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROMPTS

from benchmarks import fidelity
from model import GPT, GPTConfig
from nanochatgpt import recording
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.device import FBGEMM
from nanochatgpt.engine import Engine
from nanochatgpt.generate import generate
from nanochatgpt.loader import Loader
from nanochatgpt.sampling import Sampling
from nanochatgpt.shards import ShardWriter
from nanochatgpt.tokenizer import Tokenizer
from prepare import chitchat_package as chitchat
from prepare.render import render_batch

# bfloat16 rounds each sum to 8 bits, which tells rows apart
EXACT = [torch.float32, torch.float16, torch.int8]
x86_only = pytest.mark.skipif(not FBGEMM, reason="x86 only")


def plain(gpt, prompt, n):
    """Return n greedy ids by GPT.generate, which has no cache."""
    return gpt.eval().generate(torch.tensor([prompt]), n, temperature=0)[0, len(prompt) :].tolist()


def greedy(n):
    return Sampling(n, temperature=0)


def finish(engine):
    """Step until no row runs; return {row: its new ids}."""
    ids = {}
    while tokens := engine.step():
        for token in tokens:
            ids.setdefault(token.row, []).append(token.id)
    return ids


def alone(model, prompt, sampling, **options):
    """Return the new ids of a prompt that has an engine for itself."""
    engine = Engine(model)
    engine.add(prompt, sampling, **options)
    return finish(engine)[0]


@pytest.fixture
def computed(monkeypatch):
    """What engines compute from now on: a list of (rows, tokens)."""
    calls = []
    hidden = GPT.hidden

    def counting(self, idx, documents=None, **cache):
        if cache:
            calls.append(tuple(idx.shape))
        return hidden(self, idx, documents, **cache)

    monkeypatch.setattr(GPT, "hidden", counting)
    return calls


@pytest.fixture
def packed(model, tmp_path, monkeypatch):
    """The model as it is loaded for inference: packed(dtype)."""
    tokenizer = SimpleNamespace(n_vocab=200)  # the real one knows more tokens than this model
    monkeypatch.setattr("nanochatgpt.huggingface.read_tokenizer", lambda directory: tokenizer)
    save_model(model, Tokenizer(), tmp_path / "model")
    return lambda dtype: load_model(str(tmp_path / "model"), dtype=dtype, inference=True)[0]


# --- the definition: GPT.generate ---------------------------------------------------------------


def test_greedy_ids_are_those_of_the_plain_generate_up_to_the_end_of_the_context(model):
    together = generate(model, PROMPTS, greedy(1000))
    assert together == [plain(model, prompt, 64 - len(prompt)) for prompt in PROMPTS]


def test_with_top_k_it_draws_only_what_the_plain_generate_could_draw(model):
    for prompt, ids in zip(PROMPTS, generate(model, PROMPTS, Sampling(20, 2.0, 3)), strict=True):
        text = prompt + ids
        with torch.no_grad():
            logits = model(torch.tensor([text]))[0][0, len(prompt) - 1 : -1]  # (20, V)
        assert all(token in top for token, top in zip(ids, logits.topk(3).indices, strict=True))
        assert ids != plain(model, prompt, 20)


@x86_only
@pytest.mark.parametrize("dtype", EXACT)
def test_every_exact_dtype_gives_what_its_own_plain_generate_gives(packed, dtype):
    fast = packed(dtype)
    expected = [plain(fast, prompt, 20) for prompt in PROMPTS]
    assert generate(fast, PROMPTS, greedy(20)) == expected
    assert [generate(fast, [prompt], greedy(20))[0] for prompt in PROMPTS] == expected
    if dtype == torch.float16:
        assert expected == generate(packed(torch.float32), PROMPTS, greedy(20))


@x86_only
@pytest.mark.parametrize("dtype", EXACT)
def test_in_every_exact_dtype_a_row_depends_on_no_neighbour(packed, dtype):
    fast = packed(dtype)
    sampling = Sampling(20, top_k=40)
    together = generate(fast, PROMPTS, sampling, seed=5)
    for i, prompt in enumerate(PROMPTS):
        assert generate(fast, [prompt], sampling, seed=5 + i) == [together[i]]


# --- rows that come and go ----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_that_join_and_leave_mid_way_change_nobodys_text(model, temperature):
    choose = random.Random(1)
    jobs = [[choose.randrange(200) for _ in range(choose.randint(1, 30))] for _ in range(20)]
    options = []
    for _ in jobs:
        top_p = choose.choice([1.0, 0.9])
        options.append(Sampling(choose.randint(1, 25), temperature, top_p=top_p))
    expected = [alone(model, job, options[i], seed=i) for i, job in enumerate(jobs)]

    engine = Engine(model, rows=4)
    waiting = list(range(len(jobs)))
    job_of = {}
    given = [[] for _ in jobs]
    cut = set()
    while waiting or engine.running:
        while waiting and len(engine.running) < 4 and choose.random() < 0.7:  # not always full
            i = waiting.pop()
            job_of[engine.add(jobs[i], options[i], seed=i)] = i
        for token in engine.step():
            given[job_of[token.row]].append(token.id)
        if engine.running and choose.random() < 0.1:  # one is cut short
            row = choose.choice(engine.running)
            engine.end(row)
            cut.add(job_of[row])
    assert 0 < len(cut) < len(jobs)
    for i, ids in enumerate(given):
        assert ids == expected[i][: len(ids)]
        assert i in cut or ids == expected[i]


def test_more_prompts_than_rows_take_turns(model, monkeypatch):
    expected = generate(model, PROMPTS * 3, Sampling(9), seed=2)
    monkeypatch.setattr("nanochatgpt.generate.BATCH_ROWS", 2)
    assert generate(model, PROMPTS * 3, Sampling(9), seed=2) == expected


def test_a_full_engine_refuses_another_row_and_an_ended_row_makes_room(model):
    engine = Engine(model, rows=2)
    for prompt in PROMPTS[:2]:
        engine.add(prompt, Sampling(5))
    with pytest.raises(ValueError, match="2 rows"):
        engine.add(PROMPTS[2], Sampling(5))
    engine.end(0)
    assert engine.add(PROMPTS[2], Sampling(5)) == 0


def test_rows_with_different_options_share_a_step(model):
    options = [greedy(12), Sampling(12, 1.3), Sampling(12, 0.7, 5)]
    options.append(Sampling(12, 0, repetition_penalty=2.0))
    engine = Engine(model, rows=4)
    for i, option in enumerate(options):
        engine.add(PROMPTS[i], option, seed=i, stop_ids=[i])
    together = finish(engine)
    for i, option in enumerate(options):
        assert together[i] == alone(model, PROMPTS[i], option, seed=i, stop_ids=[i])


def test_rows_of_every_length_end_where_the_room_does(model):
    for size in (2, 33, 64):
        engine = Engine(model, rows=3, size=size)
        prompts = [[7], [5] * (size - 1), list(range(1, size // 2 + 1))]
        for prompt in prompts:
            engine.add(prompt, greedy(1000))
        ids = finish(engine)
        for row, prompt in enumerate(prompts):
            assert ids[row] == plain(model, prompt, size - len(prompt))


# --- what was computed before is not computed again ---------------------------------------------


def test_a_new_turn_computes_only_what_is_new_and_gives_what_computing_all_gives(model, computed):
    engine = Engine(model)
    ids = list(range(10, 30))
    for turn in range(3):
        engine.add(ids, greedy(6))
        computed.clear()
        reply = finish(engine)[0]
        # the last id of the reply, never computed, and the four new ones
        assert computed[0] == (1, 20 if turn == 0 else 5)
        assert reply == alone(model, ids, greedy(6))
        ids = ids + reply + [7, 8, 9, turn]


def test_a_prompt_that_parts_from_the_earlier_one_is_computed_from_there(model, computed):
    engine = Engine(model, record=False)
    engine.add(list(range(10, 30)), greedy(6))
    first = finish(engine)
    other = [*range(10, 22), 99, 98, 97]
    engine.add(other, greedy(6))
    computed.clear()
    assert finish(engine)[0] == plain(model, other, 6)
    assert computed[0] == (1, 3)

    # the same prompt again computes one token
    engine.add(list(range(10, 30)), greedy(6))
    finish(engine)
    engine.add(list(range(10, 30)), greedy(6))
    computed.clear()
    assert finish(engine) == first
    assert computed == [(1, 1)] * 6


def test_many_samples_of_one_prompt_compute_the_prompt_once(model, computed):
    prompt = list(range(10, 40))
    samples = generate(model, [prompt] * 5, Sampling(4), seed=3)
    assert computed[0] == (1, 30)
    assert max(tokens for _, tokens in computed[1:]) == 1
    assert samples == [generate(model, [prompt], Sampling(4), seed=3 + i)[0] for i in range(5)]
    assert len(set(map(tuple, samples))) > 1


def test_rows_with_a_long_common_beginning_compute_it_once_and_differ_from_there(model, computed):
    prompts = [[*range(10, 40), 50 + i] for i in range(4)]
    together = generate(model, prompts, greedy(4))
    assert sum(rows * tokens for rows, tokens in computed) < 31 + 4 * (1 + 4)
    assert together == [plain(model, prompt, 4) for prompt in prompts]


def test_a_row_that_runs_gives_its_beginning_to_a_new_one(model, computed):
    engine = Engine(model, rows=2)
    prompt = list(range(10, 40))
    engine.add(prompt, greedy(20))
    first = [engine.step()[0].id for _ in range(3)]
    computed.clear()
    row = engine.add([*prompt, *first], greedy(5))
    assert engine.rows[row].n_reused == 32  # all but the last, which is computed for its logits
    ids = finish(engine)
    assert max(tokens for _, tokens in computed) == 1
    assert first + ids[0] == plain(model, prompt, 20)
    assert ids[1] == plain(model, prompt, 8)[3:]


# --- prompts in batches and in pieces -----------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 3, 16, 1000])
def test_prompts_computed_in_pieces_give_the_same_and_hold_up_nobody(model, computed, piece):
    choose = random.Random(3)
    jobs = [[choose.randrange(200) for _ in range(choose.randint(1, 40))] for _ in range(10)]
    # beginnings in common, while they are being computed
    jobs += [[*jobs[0][:20], 9], [*jobs[1], 8, 7], jobs[2]]
    sampling = Sampling(12, 0.9)
    expected = [alone(model, job, sampling, seed=i) for i, job in enumerate(jobs)]

    engine = Engine(model, rows=4, prefill_tokens=piece)
    waiting = list(range(len(jobs)))
    job_of = {}
    given = {}
    while waiting or engine.running:
        while waiting and len(engine.running) < 4:
            i = waiting.pop(0)
            job_of[engine.add(jobs[i], sampling, seed=i)] = i
        writing = {i for i in engine.running if len(engine.rows[i].ids) > engine.rows[i].n_prompt}
        computed.clear()
        tokens = engine.step()
        assert writing <= {token.row for token in tokens}
        assert sum(rows * n for rows, n in computed if n > 1) <= 2 * piece  # padding included
        for token in tokens:
            given.setdefault(job_of[token.row], []).append(token.id)
    assert [given[i] for i in range(len(jobs))] == expected


def test_in_pieces_the_prompt_that_came_first_is_done_first(model):
    engine = Engine(model, rows=2, prefill_tokens=10)
    engine.add([1], Sampling(1))
    long = engine.add(list(range(100, 130)), Sampling(5))
    engine.step()  # the first 10 of it, and row 0 is free again
    short = engine.add([5, 6], Sampling(5))
    assert (short, long) == (0, 1)
    assert [[token.row for token in engine.step()] for _ in range(2)] == [[], [long]]
    assert {token.row for token in engine.step()} == {long, short}


@pytest.mark.parametrize("n_good", [0, 1])
def test_what_an_error_left_uncomputed_is_not_reused(model, monkeypatch, n_good):
    engine = Engine(model, rows=2, record=False)
    hidden = model.hidden
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > n_good:  # the prompt, then the first decoding step
            raise RuntimeError("out of memory")
        return hidden(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", fail)
        index = engine.add(PROMPTS[2], greedy(5))
        with pytest.raises(RuntimeError, match="out of memory"):
            while engine.running:
                engine.step()
    continued = list(engine.rows[index].ids)
    engine.end(index)
    engine.add([*continued, 3, 4], greedy(5))
    assert list(finish(engine).values()) == [plain(model, [*continued, 3, 4], 5)]


def test_a_row_that_runs_alone_is_computed_alone(model, monkeypatch):
    engine = Engine(model, rows=4, record=False)
    rows = []
    step = engine.run_step
    monkeypatch.setattr(
        engine, "run_step", lambda inputs, kv: rows.append(kv.size(2)) or step(inputs, kv)
    )
    for prompt in ([1, 2], [3, 4], [5, 6], [7, 8]):  # each goes to the row that is still empty
        engine.add(prompt, greedy(4))
        assert list(finish(engine).values()) == [plain(model, prompt, 4)]
    assert set(rows) == {1}


# --- recorded and compiled steps, compaction ----------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_a_recorded_step_gives_the_ids_of_the_eager_one_at_every_length(model, rows):
    ids = []
    for record in (False, True):
        engine = Engine(model, rows, record=record)
        for prompt in PROMPTS[:rows]:
            engine.add(prompt, Sampling(60, 0.8), seed=1)
        ids.append(finish(engine))
        assert bool(getattr(engine.run_step, "recordings", {})) == record
    assert ids[0] == ids[1]


@pytest.mark.slow
def test_a_compiled_step_gives_the_ids_of_the_eager_one(model):
    engine = Engine(model, compile=True)
    engine.add(PROMPTS[0], greedy(40))
    assert finish(engine)[0] == plain(model, PROMPTS[0], 40)


@x86_only
@pytest.mark.parametrize("dtype", EXACT)
def test_one_trace_serves_any_number_of_rows(packed, dtype, monkeypatch):
    fast = packed(dtype)
    prompts = [*PROMPTS, [3], [9, 9]]
    results = []
    for record_after in (10**9, 3):
        monkeypatch.setattr(recording, "RECORD_AFTER", record_after)
        engine = Engine(fast, rows=6)
        ids = {}
        for i, prompt in enumerate(prompts):  # rows join one by one, and end one by one
            engine.add(prompt, greedy(4 * i + 3))
            for token in engine.step() + engine.step():
                ids.setdefault(token.row, []).append(token.id)
        for row, rest in finish(engine).items():
            ids.setdefault(row, []).extend(rest)
        results.append(ids)
    assert set(engine.run_step.recordings) <= {1, 2}  # one row, or any number
    assert results[0] == results[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_graph_gives_the_ids_of_the_eager_step(dtype):
    torch.manual_seed(0)
    wide = GPT(GPTConfig(512, 300, 2, 4, 64)).to("cuda", dtype)
    ids = []
    for record in (False, True):
        engine = Engine(wide, rows=3, record=record)
        for prompt in PROMPTS[:3]:
            engine.add(prompt, Sampling(400, 0.8), seed=1)
        ids.append(finish(engine))
    assert ids[0] == ids[1]


# --- what fewer bits cost -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small GPT trained on real conversations, a directory, with held-out ones in data/talk.

    Its vocabulary is the 1,500 most common tokens, the last of which stands for all others.
    """
    folder = tmp_path_factory.mktemp("trained")
    path = metadata.distribution("chitchat-dataset").locate_file("chitchat_dataset/dataset.json")
    conversations = [messages for _, messages, _ in islice(chitchat.read(path), 600)]
    rendered = render_batch(Tokenizer(), conversations)
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


@pytest.mark.slow
@x86_only
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
