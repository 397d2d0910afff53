"""Generation gives the ids of transformers and of a loop without a cache, and text that never shows
a stop string or half a character."""

import random
import time

import pytest
import torch
from conftest import PROMPTS, small_talk
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig
from nanochatgpt.engine import Engine
from nanochatgpt.generate import generate, stream
from nanochatgpt.sampling import Sampling, draw_token
from nanochatgpt.stream import TextStream
from nanochatgpt.tokenizer import Tokenizer, fit_context


def hf_generate(hf, prompt, **options):
    idx = torch.tensor([prompt])
    options = {"do_sample": False, "pad_token_id": 0} | options
    ids = hf.generate(idx, attention_mask=torch.ones_like(idx), **options)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("bias", [0.0, -30.0, -60.0], ids=["logits>0", "of both signs", "logits<0"])
def test_greedy_ids_equal_transformers_in_a_batch_of_different_lengths(hf, model, bias, penalty):
    for m in (hf, model):
        m.transformer.ln_f.bias.data[0] = bias
    ids = generate(model, PROMPTS, Sampling(30, 0, repetition_penalty=penalty))
    options = {"max_new_tokens": 30, "repetition_penalty": penalty}
    assert ids == [hf_generate(hf, prompt, **options) for prompt in PROMPTS]
    assert len({token for row in ids for token in row}) > 10  # not one token over and over


def test_stop_ids_end_a_row_as_in_transformers_and_are_not_returned(hf, model):
    greedy = Sampling(30, 0)
    stop_ids = [row[i] for i, row in enumerate(generate(model, PROMPTS, greedy))]
    ids = generate(model, PROMPTS, greedy, stop_ids=stop_ids)
    for prompt, row in zip(PROMPTS, ids, strict=True):
        expected = hf_generate(hf, prompt, max_new_tokens=30, eos_token_id=stop_ids)
        assert row + expected[len(row) :][:1] == expected
        assert not set(row) & set(stop_ids)
    assert ids[0] == []
    assert len({len(row) for row in ids}) > 2


def test_the_seed_draws_the_ids_of_a_loop_without_a_cache_up_to_the_end_of_the_context(model):
    sampling = Sampling(1000, temperature=0.9, top_k=40, top_p=0.95)
    expected = []
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        draws = random.Random(3 + row)
        while len(ids) < 64:
            with torch.no_grad():
                logits = model.eval()(torch.tensor([ids]))[0][:, -1]
            ids.append(draw_token(logits, torch.tensor([draws.random()]), sampling).item())
        expected.append(ids[len(prompt) :])
    assert generate(model, PROMPTS, sampling, seed=3) == expected


def test_a_row_depends_on_its_seed_and_on_no_neighbour(model):
    sampling = Sampling(20, repetition_penalty=1.2)
    ids = generate(model, PROMPTS, sampling, seed=11)
    for stop_ids in ((), (ids[0][2], ids[2][4])):  # nor when the neighbours end early
        together = generate(model, PROMPTS, sampling, seed=11, stop_ids=stop_ids)
        for row, prompt in enumerate(PROMPTS):
            one = generate(model, [prompt], sampling, seed=11 + row, stop_ids=stop_ids)
            assert one == [together[row]]


def test_a_seed_gives_the_same_ids_again_and_no_seed_gives_others(model):
    def ids(seed):
        return generate(model, PROMPTS, Sampling(20), seed=seed)

    assert ids(1) == ids(1)
    assert ids(1) != ids(5)
    assert ids(None) != ids(None)


def test_generating_leaves_the_global_random_state_alone_and_ignores_dropout(model):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    expected = generate(model, PROMPTS, Sampling(10), seed=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
    model.train()
    assert generate(model, PROMPTS, Sampling(10), seed=1) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_the_context_ends_a_row(model):
    prompts = [[1] * 63, [1] * 60, [1, 2]]
    assert [len(row) for row in generate(model, prompts, Sampling(10))] == [1, 4, 10]


def test_no_new_tokens_or_no_prompts_give_nothing(model, tokenizer):
    assert generate(model, PROMPTS, Sampling(0)) == [[], [], [], []]
    assert list(stream(Engine(model), tokenizer, [1, 2], Sampling(0))) == []
    assert generate(model, []) == []


@pytest.mark.parametrize("length", [0, 64, 65])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused(model, length):
    with pytest.raises(ValueError, match=rf"\b{length} tokens.*1 to 63"):
        generate(model, [[1, 2], [1] * length])


def test_half_precision_weights_generate(model):
    model.to(torch.bfloat16)
    ids = generate(model, PROMPTS, Sampling(12), seed=1)
    assert [len(row) for row in ids] == [12] * 4
    first = model(torch.tensor(PROMPTS[1:2]))[0][0, -1].argmax().item()
    assert generate(model, PROMPTS[1:2], Sampling(1, 0)) == [[first]]


# text


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def reciter(ids):
    """A real model that says `ids` whatever it is asked: each position embeds the token that comes
    next."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=len(ids) + 1, vocab_size=50257, n_layer=0, n_head=1, n_embd=128)
    )
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    with torch.no_grad():
        wpe[: len(ids)] = 100 * wte[ids]
    return model


def text_of(model, tokenizer, n, **stops):
    """Return the greedy text that `stream` gives, as one string."""
    return "".join(stream(Engine(model), tokenizer, [0], Sampling(n, 0), **stops))


def ids_of(tokenizer, pieces):
    return [token for piece in pieces for token in tokenizer.encode(piece)]


@pytest.mark.parametrize(
    ("pieces", "stop_strings", "expected"),
    [
        (["hello world, how are you"], (), "hello world, how are you"),
        ([" fine.", "\n", "[", "Human", "]:", " hi"], ("[Human]:",), " fine.\n"),
        ([" fine", ".\n\n[", "Hum", "an", "]: hi"], ("[Human]:", "[Bot]:"), " fine.\n\n"),
        (["so far [Hum", "mer] and on"], ("[Human]:",), "so far [Hummer] and on"),
        (["[[[", "Human", "]: x"], ("[Human]:",), "[["),
        (["ab", "ab", "ac!"], ("abac",), "ab"),
        (["one ", "two ", "three"], ("wo t", "hree"), "one t"),
        (["hello"], ("hello",), ""),
        (["say hello"], ("lo", "he"), "say "),
        (["so 😀 happy 🤷🏽‍♀️ naïve 日本"], (), "so 😀 happy 🤷🏽‍♀️ naïve 日本"),
        (["I say 😀 now"], ("😀",), "I say "),
        (["I say 😁 now"], ("😀",), "I say 😁 now"),
    ],
)
def test_text_streams_up_to_a_stop_string_and_generate_has_the_same(
    tokenizer, pieces, stop_strings, expected
):
    ids = ids_of(tokenizer, pieces)
    model = reciter(ids)
    assert text_of(model, tokenizer, len(ids), stop_strings=stop_strings) == expected
    options = {"stop_strings": stop_strings, "tokenizer": tokenizer}
    [new] = generate(model, [[0]], Sampling(len(ids), 0), **options)
    assert ids[: len(new)] == new
    text = tokenizer.decode(new)
    assert expected.startswith(text)
    # generate gives whole ids: all that end before the stop
    longer = tokenizer.decode(ids[: len(new) + 1])
    assert len(text) == len(expected) or not expected.startswith(longer)


def test_a_stop_string_ends_its_own_row_only(tokenizer):
    ids = ids_of(tokenizer, ["one ", "two ", "three ", "four"])
    # the second has the stop string in its prompt, which does not count
    prompts = [[0], [0, *ids_of(tokenizer, ["one ", "two "])], [0]]
    options = {"stop_strings": ["two"], "tokenizer": tokenizer}
    rows = generate(reciter(ids), prompts, Sampling(len(ids), 0), **options)
    assert [tokenizer.decode(row) for row in rows] == ["one ", "three four", "one "]


def test_the_beginning_of_a_stop_string_is_shown_only_if_the_row_ends_by_itself(tokenizer):
    ids = ids_of(tokenizer, ["the [Human]"])
    stops = {"stop_strings": ["[Human]:"], "stop_ids": [50256]}
    for n, expected in ((len(ids), "the "), (50, "the [Human]")):
        model = reciter([*ids, 50256])
        assert text_of(model, tokenizer, n, **stops) == expected
        [new] = generate(model, [[0]], Sampling(n, 0), tokenizer=tokenizer, **stops)
        assert expected.startswith(tokenizer.decode(new)) and len(new) == (
            1 if n < 50 else len(ids)
        )


def test_half_a_character_at_the_end_is_not_shown(tokenizer):
    ids = tokenizer.encode("so 😀")
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    assert text_of(reciter(ids), tokenizer, len(ids) - 1) == "so "


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    text = TextStream(tokenizer, ["[Human]:"])
    pieces = ["fine", ".\n", "[", "Human", "]", "!", " 😀"]
    shown = ["".join(map(text.push, tokenizer.encode(piece))) for piece in pieces]
    assert shown == ["fine", ".\n", "", "", "", "[Human]!", " 😀"]


alphabet = st.text(st.sampled_from("ab[]: \n😀é日"), max_size=20)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(alphabet | st.text(max_size=5), max_size=6),
    stops=st.lists(alphabet.filter(bool), max_size=3),
)
@example(texts=["a[a", "[b]"], stops=["[a[b"])
@example(texts=["hello"], stops=["lo", "el"])
def test_streamed_text_is_the_text_up_to_the_first_stop_and_no_more_is_held_back_than_must_be(
    texts, stops
):
    tokenizer = Tokenizer()
    ids = ids_of(tokenizer, texts)
    stream_, shown, whole = TextStream(tokenizer, stops), "", b""
    for token in ids:
        shown += stream_.push(token)
        whole += tokenizer.token_bytes(token)
        so_far = whole.decode("utf-8", "ignore")  # without half a character at the end
        found = [so_far.find(stop) for stop in stops if stop in so_far]
        if found:
            assert stream_.stopped_at == min(found)
            assert shown == so_far[: min(found)]
            assert stream_.rest() == ""
            return
        starts = [
            n for n in range(len(so_far)) if any(stop.startswith(so_far[n:]) for stop in stops)
        ]
        assert shown == so_far[: min(starts, default=len(so_far))]
        assert stream_.stopped_at is None
    assert shown + stream_.rest() == "".join(texts).encode("utf-8", "replace").decode()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 50256), max_size=20) | st.lists(st.integers(94, 255), max_size=20)
)  # the latter: bytes
def test_streamed_text_is_the_decoded_text_whatever_the_ids_are(ids):
    tokenizer = Tokenizer()
    text = TextStream(tokenizer)
    streamed = "".join(map(text.push, ids)) + text.rest()
    whole = tokenizer.decode(ids)
    assert whole.startswith(streamed)
    assert set(whole[len(streamed) :]) <= {"\ufffd"}  # half a character at the end


# the prompt that fits


def say(role, content):
    return {"role": role, "content": content}


def length(tokenizer, messages):
    return len(tokenizer.render(messages, add_generation_prompt=True)[0])


@pytest.mark.parametrize("template", ["human_bot", "user_assistant"])
@pytest.mark.parametrize("persona", [[], [say("system", "i am a zookeeper.")]])
def test_what_does_not_fit_gives_way_in_whole_exchanges_until_half_of_the_room_is_free(
    template, persona
):
    tokenizer = Tokenizer(template)
    turns = [m for conversation in small_talk(3) for m in conversation if m["role"] != "system"]
    turns.append(say("user", "and now?"))
    starts = range(0, len(turns), 2)
    prompts = [
        tokenizer.render(persona + turns[start:], add_generation_prompt=True)[0] for start in starts
    ]
    assert len(prompts) > 5
    for room in range(len(prompts[-1]), len(prompts[0]) + 2):
        if len(prompts[0]) <= room:
            expected = 0
        else:  # the longest of those that leave half of it, else the last message alone
            expected = next(
                (n for n, ids in enumerate(prompts) if len(ids) <= room // 2), len(prompts) - 1
            )
        assert fit_context(tokenizer, persona + turns, room) == (
            prompts[expected],
            starts[expected],
        )


def test_what_was_dropped_stays_so_and_the_prompts_begin_alike_until_the_room_is_full_again(
    tokenizer,
):
    persona, turns, start, before = [say("system", "i like tea.")], [], 0, []
    appended = drops = 0
    for turn in range(120):
        turns.append(say("user", f"this is message number {turn} of many"))
        ids, start_now = fit_context(tokenizer, persona + turns, 300, start)
        assert len(ids) <= 300
        assert ids == tokenizer.render(persona + turns[start_now:], add_generation_prompt=True)[0]
        if start_now == start:
            assert ids[: len(before)] == before
            appended += 1
        else:
            assert start_now > start
            assert len(ids) <= 150
            drops += 1
        start, before = start_now, ids
        turns.append(say("assistant", "oh, is it so?"))
    assert drops > 5
    assert appended > 5 * drops


@settings(max_examples=80, deadline=None)
@given(
    persona=st.none() | st.text(max_size=20),
    contents=st.lists(
        st.text(max_size=30) | st.sampled_from(["hello", "\n[Bot]: no", ""]), min_size=1, max_size=9
    ),
    room=st.integers(30, 120),
)
def test_the_prompt_fits_and_is_the_end_of_the_conversation_for_any_text(persona, contents, room):
    tokenizer = Tokenizer()
    turns = [say(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    turns = turns[: len(turns) - 1 + len(turns) % 2]  # the last is the user's
    system = [] if persona is None else [say("system", persona)]
    assume(length(tokenizer, [*system, say("user", "")]) + 5 <= room)
    ids, _ = fit_context(tokenizer, system + turns, room)
    assert len(ids) <= room
    if length(tokenizer, system + turns[-1:]) <= room:
        candidates = [system + turns[start:] for start in range(0, len(turns), 2)]
        assert ids in [tokenizer.render(c, add_generation_prompt=True)[0] for c in candidates]


def test_a_conversation_that_fits_is_left_as_it_is(tokenizer):
    turns = [say("user", "hi"), say("assistant", "hello"), say("user", "bye")]
    assert fit_context(tokenizer, turns, 1000) == (
        tokenizer.render(turns, add_generation_prompt=True)[0],
        0,
    )
    assert fit_context(tokenizer, [], 10) == (
        tokenizer.render([], add_generation_prompt=True)[0],
        0,
    )


@pytest.mark.parametrize(
    "text", ["the number 12345 is " * 300, "😀" * 300, "日本語" * 300, "\n[Bot]: " * 300]
)
@pytest.mark.parametrize("persona", [[], [say("system", "i am a zookeeper.")]])
def test_of_a_message_that_is_too_long_the_end_is_kept(tokenizer, text, persona):
    turns = [say("user", "hi"), say("assistant", "hello"), say("user", text + "what now?")]
    for room in (40, 64, 101):
        ids, _ = fit_context(tokenizer, persona + turns, room)
        assert room - 10 <= len(ids) <= room
        prompt = tokenizer.decode(ids)
        before = "[Persona]: i am a zookeeper.\n[Human]: " if persona else "[Human]: "
        assert prompt.startswith(before)
        assert prompt.endswith("what now?\n[Bot]:")
        assert text.endswith(prompt.removeprefix(before).removesuffix("what now?\n[Bot]:"))


@pytest.mark.parametrize("turns", [[], [say("user", "hello")]])
def test_a_persona_that_leaves_no_room_is_refused(tokenizer, turns):
    persona = [say("system", "i like tea. " * 50)]
    with pytest.raises(ValueError, match=r"persona is too long.* 64 tokens"):
        fit_context(tokenizer, persona + turns, 64)


def test_a_history_of_a_thousand_turns_takes_no_time(tokenizer):
    turns = [
        say(role, "i like tea and the dog runs home")
        for _ in range(500)
        for role in ("user", "assistant")
    ]
    start = time.perf_counter()
    ids, _ = fit_context(tokenizer, [*turns, say("user", "hi")], 1000)
    assert time.perf_counter() - start < 2
    assert 450 < len(ids) <= 500
