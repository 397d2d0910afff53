"""The next token is penalised and drawn as transformers and OpenAI's formula say, by whatever
shortcut."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import PROMPTS
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanochatgpt.configurator import parse
from nanochatgpt.engine import Engine
from nanochatgpt.generate import generate
from nanochatgpt.sampling import ChatSampling, Sampling, draw_token, for_template, penalize

LARGEST = 1 - 2**-24  # the largest float32 below 1, and the largest number that torch.rand returns


# the penalties


@st.composite
def texts(draw):
    """Draw (logits (V,), prompt, new): few tokens, so that they come again."""
    V = draw(st.integers(1, 9))
    logits = draw(st.lists(st.floats(-30, 30, width=32), min_size=V, max_size=V))
    ids = st.lists(st.integers(0, V - 1), max_size=15)
    return torch.tensor(logits), draw(ids.filter(bool)), draw(ids)


biases = st.dictionaries(st.integers(0, 8), st.floats(-100, 100, width=32), min_size=1)
penalties = st.floats(0.1, 10)
additive = st.floats(-2, 2) | st.just(0.0)


def penalized(logits, options, prompt, new, bias=()):
    """Return the logits (V,) of one row with its penalties."""
    logits = logits.clone()
    penalize(logits, options, prompt, new, dict(bias))
    return logits


def by_transformers(processors, logits, prompt, new):
    return LogitsProcessorList(processors)(torch.tensor([prompt + new]), logits[None].clone())[0]


def by_openai(logits, new, presence, frequency):
    """Return platform.openai.com's mu[j] - c[j] * alpha_frequency - float(c[j] > 0) *
    alpha_presence, in float64."""
    result = logits.double()
    for token in range(len(logits)):
        count = sum(other == token for other in new)
        result[token] -= count * frequency + (count > 0) * presence
    return result


def within(bias, logits):
    return {token: value for token, value in bias.items() if token < len(logits)}


@settings(max_examples=60, deadline=None)
@given(text=texts(), penalty=penalties)
def test_the_repetition_penalty_is_transformers(text, penalty):
    expected = by_transformers([RepetitionPenaltyLogitsProcessor(penalty)], *text)
    logits, prompt, new = text
    assert torch.equal(
        penalized(logits, Sampling(repetition_penalty=penalty), prompt, new), expected
    )


@settings(max_examples=60, deadline=None)
@given(text=texts(), n=st.integers(1, 5))
@example(text=(torch.zeros(3), [0, 1, 2, 0, 1], []), n=3)  # 0 1 2 was there: 2 is banned
@example(text=(torch.zeros(3), [0, 1], [2, 0, 1]), n=3)  # from the prompt into the new ids
@example(text=(torch.zeros(3), [0], [0]), n=5)  # shorter than n
def test_banned_are_the_ngrams_of_prompt_and_new_ids_that_transformers_bans(text, n):
    expected = by_transformers([NoRepeatNGramLogitsProcessor(n)], *text)
    logits, prompt, new = text
    assert torch.equal(penalized(logits, Sampling(no_repeat_ngram_size=n), prompt, new), expected)


@settings(max_examples=60, deadline=None)
@given(text=texts(), bias=biases)
def test_the_logit_bias_is_transformers_sequence_bias_of_single_tokens(text, bias):
    logits, prompt, new = text
    bias = within(bias, logits)
    assume(bias)
    expected = by_transformers(
        [SequenceBiasLogitsProcessor({(t,): b for t, b in bias.items()})], *text
    )
    assert torch.equal(penalized(logits, Sampling(), prompt, new, bias), expected)


@settings(max_examples=60, deadline=None)
@given(text=texts(), presence=additive, frequency=additive)
@example(text=(torch.zeros(3), [0, 0], [1, 1, 1, 2]), presence=0.5, frequency=0.25)
def test_presence_and_frequency_penalty_are_openais_over_the_new_ids_alone(
    text, presence, frequency
):
    logits, prompt, new = text
    options = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    expected = by_openai(logits, new, presence, frequency)
    torch.testing.assert_close(
        penalized(logits, options, prompt, new).double(), expected, rtol=1e-5, atol=1e-4
    )


def test_a_token_of_the_prompt_alone_has_no_presence_or_frequency_penalty():
    options = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalized(torch.zeros(3), options, [0, 0], []).tolist() == [0, 0, 0]
    assert penalized(torch.zeros(3), options, [0, 0], [1, 1, 1, 2]).tolist() == [0, -1.25, -0.75]


@settings(max_examples=80, deadline=None)
@given(
    text=texts(),
    bias=biases,
    penalty=penalties,
    presence=additive,
    frequency=additive,
    n=st.integers(1, 4),
)
def test_all_together_they_come_in_transformers_order_and_openais_before_the_bans(
    text, bias, penalty, presence, frequency, n
):
    logits, prompt, new = text
    bias = within(bias, logits)
    assume(bias)
    before = [
        SequenceBiasLogitsProcessor({(t,): b for t, b in bias.items()}),
        RepetitionPenaltyLogitsProcessor(penalty),
    ]
    expected = by_openai(by_transformers(before, *text), new, presence, frequency)
    expected = by_transformers([NoRepeatNGramLogitsProcessor(n)], expected, prompt, new)
    options = Sampling(
        repetition_penalty=penalty,
        presence_penalty=presence,
        frequency_penalty=frequency,
        no_repeat_ngram_size=n,
    )
    actual = penalized(logits, options, prompt, new, bias)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    text=texts(),
    options=st.sampled_from([Sampling(), Sampling(temperature=0.5, top_k=2, top_p=0.5, min_p=0.5)]),
)
def test_without_penalties_the_logits_are_the_same_whatever_the_warpers(text, options):
    logits, prompt, new = text
    assert torch.equal(penalized(logits, options, prompt, new), logits)


def test_greedy_ids_with_bias_and_penalties_are_those_of_transformers_generate(hf, model):
    first = generate(model, PROMPTS, Sampling(1, 0))[0][0]
    bias = {first: -3.0, 11: 2.5}
    options = {
        "sequence_bias": {(t,): b for t, b in bias.items()},
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
    }
    expected = []
    for prompt in PROMPTS:
        idx = torch.tensor([prompt])
        options |= {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(idx)}
        expected.append(hf.generate(idx, max_new_tokens=30, **options)[0, len(prompt) :].tolist())
    sampling = Sampling(30, 0, repetition_penalty=1.2, no_repeat_ngram_size=2)
    assert generate(model, PROMPTS, sampling, logit_bias=bias) == expected
    # each has its part in it
    assert generate(model, PROMPTS, sampling) != expected
    for name, off in (("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0)):
        changed = replace(sampling, **{name: off})
        assert generate(model, PROMPTS, changed, logit_bias=bias) != expected


# the draw


def warped(logits, temperature, top_k, top_p, min_p):
    """Return the float64 probabilities of transformers for logits (V,); assume that none is at the
    edge of a knob."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None].double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        rising = scores.softmax(-1).sort(-1).values.cumsum(-1)
        assume((rising - (1 - top_p)).abs().min() > 1e-5)
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        p = scores.softmax(-1).sort(descending=True).values[0]
        assume(((p[1:] / p[0] - min_p).abs() > 1e-5).all())
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)[0]


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **candidates):
    """Return the drawn ids, (B,)."""
    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return draw_token(logits, uniform, options, **candidates)


temperatures = st.sampled_from([0.05, 0.5, 1.0, 1.7, 20.0])
min_ps = st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.1, 1.0])


@settings(max_examples=80, deadline=None)
@given(
    logits=st.lists(st.integers(-200, 200), min_size=1, max_size=12, unique=True),
    temperature=temperatures,
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1) | st.just(1.0),
    min_p=min_ps,
)
@example(logits=[0, 20, -20, 50], temperature=1.7, top_k=0, top_p=1.0, min_p=0.2)
@example(logits=[0, 20, -20, 50], temperature=1.7, top_k=3, top_p=0.9, min_p=0.2)
def test_samples_have_the_distribution_of_transformers(logits, temperature, top_k, top_p, min_p):
    logits = torch.tensor(logits) / 20
    expected = warped(logits, temperature, min(top_k, len(logits)), top_p, min_p)
    # uniforms at equal distances: the samples invert the cumulative distribution, so each count is
    # exact to 1
    n = 1024
    uniform = (torch.arange(n) + 0.5) / n
    counts = draw(logits.expand(n, -1), uniform, temperature, top_k, top_p, min_p).bincount(
        minlength=len(logits)
    )
    assert (counts - n * expected).abs().max() <= 1.01
    assert not counts[expected == 0].any()


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(
        st.integers(-10_000, 10_000) | st.just(float("-inf")), min_size=1, max_size=30, unique=True
    ),
    temperature=temperatures | st.floats(1e-6, 1e6),
    top_k=st.integers(0, 31),
    top_p=st.floats(1e-6, 1),
    min_p=min_ps,
    uniform=st.sampled_from([0.0, 2**-24, 0.5, LARGEST])
    | st.integers(0, 2**24 - 1).map(lambda n: n / 2**24),
)
def test_no_uniform_draws_a_filtered_token(logits, temperature, top_k, top_p, min_p, uniform):
    assume(max(logits) > float("-inf"))
    logits = torch.tensor(logits).float()
    expected = warped(logits, temperature, min(top_k, len(logits)), top_p, min_p)
    assert (
        expected[
            draw(logits[None], torch.tensor([uniform]), temperature, top_k, top_p, min_p)
        ].item()
        > 0
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9)])
def test_edge_uniforms_draw_the_likeliest_and_the_unlikeliest_token_of_the_whole_vocabulary(
    scale, top_k, top_p
):
    logits = torch.randn(50257, generator=torch.Generator().manual_seed(1)) * scale
    first, last = draw(logits.expand(2, -1), torch.tensor([0.0, LARGEST]), 1.0, top_k, top_p)
    assert first == logits.argmax()
    falling, ids = logits.double().sort(descending=True)
    p = falling[: top_k or None].softmax(-1)
    at = (ids == last).nonzero().item()
    assert p[:at].sum() < top_p + 1e-6  # those before it have less than top_p, so it is kept
    assert p[: at + 1].sum() > top_p - 1e-6  # and none behind it is


@pytest.mark.parametrize("temperature", [0, 1e-5, 1e-38, 1e-45])
def test_a_temperature_of_0_or_next_to_it_draws_the_likeliest(temperature):
    logits = torch.tensor([[-3.0, 50.0, 49.0]]).expand(3, -1)
    assert draw(logits, torch.tensor([0.0, 0.5, LARGEST]), temperature).tolist() == [1, 1, 1]


@pytest.mark.parametrize("knobs", [{}, {"top_k": 2}, {"min_p": 0.1}, {"temperature": 20.0}])
def test_a_top_p_of_0_or_next_to_it_draws_the_likeliest(knobs):
    logits = torch.tensor([[-3.0, 49.9, 50.0]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, LARGEST])
    for top_p in (0, 1e-9):
        assert draw(logits, uniform, top_p=top_p, **knobs).tolist() == [2, 2, 2]


def test_equal_logits_are_drawn_equally_often():
    counts = draw(torch.zeros(1024, 4), torch.arange(1024) / 1024).bincount()
    assert counts.tolist() == [256] * 4


def test_rows_are_drawn_by_their_own_uniform():
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    assert draw(logits, torch.tensor([0.0, 0.0])).tolist() == [2, 0]
    assert draw(logits, torch.tensor([0.0, LARGEST])).tolist() == [2, 2]


def test_the_first_tokens_of_many_rows_have_the_models_distribution(hf, model):
    n = 3000
    ids = torch.tensor(generate(model, PROMPTS[:1] * n, Sampling(2, 2.0, 5), seed=0))
    with torch.no_grad():
        expected = warped(hf(torch.tensor(PROMPTS[:1])).logits[0, -1], 2.0, 5, 1.0, 0.0)
    observed = ids[:, 0].bincount(minlength=200) / n
    assert (observed - expected).abs().max() < 4 * (0.25 / n) ** 0.5
    # and the second token does not follow from the first one's uniform, nor a row from the one
    # before
    same = (ids[1:, 0] == ids[:-1, 0]).float().mean()
    assert abs(same - expected.square().sum()) < 4 * (0.25 / n) ** 0.5


def test_min_p_keeps_the_tokens_with_that_share_of_the_likeliest_ones_probability():
    p = torch.tensor([0.5, 0.26, 0.24]).log()  # shares 1, 0.52, 0.48
    n = 760  # of what min_p=0.5 keeps, 0.76
    uniform = (torch.arange(n) + 0.5) / n
    assert draw(p.expand(n, -1), uniform, min_p=0.5).bincount(minlength=3).tolist() == [
        500,
        260,
        0,
    ]


def draw_by_hand(logits, uniform, temperature, top_p, min_p):
    """Return the id that `uniform` draws, by a loop in float64; assume that it lies at no edge, nor
    any token's."""
    p = (logits.double() / temperature).softmax(-1)
    falling = sorted(zip(p.tolist(), range(len(p)), strict=True), reverse=True)
    kept, together = [], 0.0
    for n, (probability, token) in enumerate(falling):
        assume(n == 0 or top_p == 1 or abs(together - top_p) > 1e-5)
        assume(n == 0 or min_p == 0 or abs(probability / falling[0][0] - min_p) > 1e-5)
        if n == 0 or (together < top_p and probability >= min_p * falling[0][0]):
            kept.append((probability, token))
        together += probability
    mass, so_far = sum(probability for probability, _ in kept), 0.0
    for probability, token in kept[:-1]:
        so_far += probability / mass
        assume(abs(so_far - uniform) > 1e-5)
        if uniform < so_far:
            return token
    return kept[-1][1]


uniforms = st.floats(0, LARGEST, width=32) | st.sampled_from([0.0, 0.5, 0.9, 0.99, LARGEST])


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-100, 100), min_size=2, max_size=40, unique=True),
    candidates=st.integers(1, 40),
    temperature=st.floats(0.02, 100) | st.sampled_from([1.0, 3.0]),
    top_p=st.floats(0.01, 1) | st.just(1.0),
    min_p=min_ps,
    uniform=uniforms,
)
@example(
    logits=list(range(30)), candidates=3, temperature=50.0, top_p=1.0, min_p=0.0, uniform=0.95
)  # far beyond
@example(
    logits=list(range(30)), candidates=3, temperature=50.0, top_p=0.9, min_p=0.0, uniform=0.03
)  # mass unknown
@example(logits=list(range(30)), candidates=3, temperature=50.0, top_p=1.0, min_p=0.7, uniform=0.03)
@example(
    logits=list(range(30)), candidates=3, temperature=0.5, top_p=0.9, min_p=0.0, uniform=0.99
)  # all within
def test_the_candidates_change_no_draw(logits, candidates, temperature, top_p, min_p, uniform):
    logits = torch.tensor(logits) / 10
    expected = draw_by_hand(logits, uniform, temperature, top_p, min_p)
    for n in (min(candidates, len(logits) - 1), len(logits)):
        ids = draw(
            logits[None], torch.tensor([uniform]), temperature, 0, top_p, min_p, candidates=n
        )
        assert ids.tolist() == [expected]


@pytest.mark.parametrize(
    ("top_p", "min_p"), [(1.0, 0.0), (0.9, 0.0), (1.0, 0.01), (0.95, 0.05), (0.2, 0.0), (1.0, 0.5)]
)
def test_rows_that_need_the_whole_vocabulary_and_rows_that_do_not_are_drawn_as_if_alone(
    top_p, min_p
):
    random = torch.Generator().manual_seed(0)
    # from one token that has it all to nearly equal ones: the candidates hold all of the mass,
    # some, next to none
    scale = torch.tensor([50.0, 5.0, 2.0, 1.0, 0.1]).repeat(3)[:, None]
    logits = torch.randn(15, 20_000, generator=random) * scale
    uniform = torch.rand(15, generator=random)
    ids = draw(logits, uniform, 0.8, 0, top_p, min_p)
    alone = [
        draw(logits[n : n + 1], uniform[n : n + 1], 0.8, 0, top_p, min_p).item() for n in range(15)
    ]
    assert ids.tolist() == alone
    for row, u, token in zip(logits, uniform, alone, strict=True):
        falling, order = (row.double() / 0.8).softmax(-1).sort(descending=True)
        kept = falling * ((falling.cumsum(-1) - falling < top_p) & (falling >= min_p * falling[0]))
        cumulative = kept.cumsum(-1) / kept.sum()
        at = (order == token).nonzero().item()
        assert cumulative[at] > u - 1e-4
        assert cumulative[at] - kept[at] / kept.sum() < u + 1e-4


# the knobs


@pytest.mark.parametrize(
    ("knob", "values", "expected"),
    [
        ("max_new_tokens", [-1], "0 or more"),
        ("temperature", [-0.1, math.nan], "0 or more"),
        ("top_k", [-1], "0 or more"),
        ("top_p", [-1e-9, -0.5, 1.01, math.nan], "0 to 1"),
        ("min_p", [-0.01, 1.01, math.nan], "0 to 1"),
        ("repetition_penalty", [0, -1.0, math.nan], "above 0"),
        ("no_repeat_ngram_size", [-1], "0 or more"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_knob_the_value_and_the_range(
    knob, values, expected
):
    for value in values:
        with pytest.raises(ValueError) as refused:
            Sampling(**{knob: value})
        assert f"{knob}={value}" in str(refused.value)
        assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("knob", "values"),
    [
        ("max_new_tokens", [0]),
        ("temperature", [0, 1e-9, 1e9]),
        ("top_k", [0, 10**9]),
        ("top_p", [1e-9, 1]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [1e-3, 1e3]),
        ("presence_penalty", [-2.0, 2.0]),
        ("frequency_penalty", [-2.0, 2.0]),
        ("no_repeat_ngram_size", [0, 1, 10**9]),
    ],
)
def test_the_edges_of_each_range_are_accepted_and_generate(model, knob, values):
    for value in values:
        assert getattr(Sampling(**{knob: value}), knob) == value
        sampling = Sampling(**{"max_new_tokens": 3, knob: value})
        [ids] = generate(model, [[1, 2]], sampling, seed=0)
        assert len(ids) == (0 if knob == "max_new_tokens" else 3)
        assert all(0 <= token < 200 for token in ids)


# the engine


def run(engine, prompt, options, **add):
    """Return the Tokens of one row, up to its end."""
    engine.add(prompt, options, **add)
    tokens = []
    while step := engine.step():
        tokens += step
    return tokens


def test_logprobs_are_the_models_own_of_the_chosen_and_of_the_likeliest_tokens(hf, model):
    options = Sampling(
        max_new_tokens=20,
        temperature=3.0,
        top_k=50,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        no_repeat_ngram_size=1,
    )
    tokens = run(Engine(model), PROMPTS[0], options, seed=1, logit_bias={3: 5.0}, logprobs=3)
    ids = [token.id for token in tokens]
    with torch.no_grad():
        logits = hf(torch.tensor([PROMPTS[0] + ids])).logits[0, len(PROMPTS[0]) - 1 : -1]  # (20, V)
    logprobs = logits.double().log_softmax(-1)
    values, likeliest = logprobs.topk(3)
    assert [[i for i, _ in token.top] for token in tokens] == likeliest.tolist()
    found = torch.tensor([[value for _, value in token.top] for token in tokens]).double()
    torch.testing.assert_close(found, values, rtol=0, atol=1e-4)
    chosen = torch.tensor([token.logprob for token in tokens]).double()
    torch.testing.assert_close(chosen, logprobs[range(20), ids], rtol=0, atol=1e-4)
    assert (chosen < values[:, -1]).any()  # some token was not among the three likeliest


def test_each_row_gives_as_many_logprobs_as_it_asks_for_and_they_change_no_token(model):
    options, engine, rows = Sampling(max_new_tokens=8), Engine(model, rows=3), {}
    asked = {engine.add(PROMPTS[1], options, seed=4, logprobs=n): n for n in (None, 0, 5)}
    while step := engine.step():
        for token in step:
            rows.setdefault(token.row, []).append(token)
    assert len({tuple(token.id for token in tokens) for tokens in rows.values()}) == 1
    for row, tokens in rows.items():
        assert len(tokens) == 8
        for token in tokens:
            assert (token.logprob is None) == (asked[row] is None)
            assert len(token.top) == (asked[row] or 0)
            if asked[row] is None:
                assert token.top == []


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 20.0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {
            "temperature": 0,
            "repetition_penalty": 0.5,
            "no_repeat_ngram_size": 1,
            "presence_penalty": -1.0,
        },
    ],
    ids=str,
)
def test_no_id_is_chosen_that_the_tokenizer_has_not_though_the_model_likes_them_best(
    model, options
):
    with (
        torch.no_grad()
    ):  # a direction that all hidden states have, and the embeddings from 150 on more than others
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[150:, 0] = 100.0
        assert model.eval()(torch.tensor([PROMPTS[0]]))[0][0, -1].topk(50).indices.min() >= 150
    tokens = run(
        Engine(model, n_vocab=150),
        PROMPTS[3],
        Sampling(max_new_tokens=40, **options),
        seed=0,
        logprobs=2,
    )
    assert len(tokens) == 40
    for token in tokens:
        assert 0 <= token.id < 150
        assert all(i < 150 for i, _ in token.top)


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 1}], ids=str
)
def test_a_prompt_may_hold_ids_that_are_never_chosen_with_penalties_too(model, options):
    tokens = run(
        Engine(model, n_vocab=150), [199, 5, 199], Sampling(max_new_tokens=5, **options), seed=0
    )
    assert len(tokens) == 5
    assert all(token.id < 150 for token in tokens)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_logit_bias_of_minus_100_bans_a_token_and_of_100_forces_it(model, temperature):
    options, engine = Sampling(max_new_tokens=20, temperature=temperature), Engine(model)
    plain = [token.id for token in run(engine, PROMPTS[0], options, seed=2)]
    without = [
        token.id
        for token in run(engine, PROMPTS[0], options, seed=2, logit_bias=dict.fromkeys(plain, -100))
    ]
    assert len(without) == 20
    assert not set(without) & set(plain)
    absent = next(i for i in range(200) if i not in plain)
    forced = [
        token.id for token in run(engine, PROMPTS[0], options, seed=2, logit_bias={absent: 100})
    ]
    assert forced == [absent] * 20


@pytest.mark.parametrize(("token", "n_vocab"), [(-1, None), (200, None), (150, 150), (10**9, 150)])
def test_a_logit_bias_of_an_id_that_cannot_be_chosen_is_refused(model, token, n_vocab):
    engine = Engine(model, n_vocab=n_vocab)
    with pytest.raises(
        ValueError, match=rf"logit_bias has the token {token}\b.*0 to {(n_vocab or 200) - 1}\b"
    ):
        engine.add([1, 2], Sampling(), logit_bias={3: 1.0, token: 1.0})
    assert engine.running == []  # and no row was started
    engine.add([1, 2], Sampling(), logit_bias={0: 1.0, (n_vocab or 200) - 1: 1.0})


@pytest.mark.parametrize("token", [-1, 200])
def test_a_prompt_with_an_id_that_the_model_has_not_is_refused(model, token):
    with pytest.raises(ValueError, match=str(token)):
        Engine(model).add([1, token, 2], Sampling())


def test_a_chat_in_locutusques_template_samples_as_its_card_unless_told_otherwise():
    card = for_template(parse(ChatSampling, []), "user_assistant")
    assert (card.temperature, card.top_k, card.top_p, card.frequency_penalty) == (1.0, 35, 0.8, 0.0)
    assert for_template(parse(ChatSampling, ["--top_k=50"]), "user_assistant").top_k == 50
    assert for_template(ChatSampling(), "human_bot") == ChatSampling()
