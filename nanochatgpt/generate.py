"""
Tokens out: one engine for a chat, a batch of prompts, many samples of one prompt, and rows that come and go.

`Engine` is the one decoding loop, sampling.py chooses the next token; `generate` collects what the engine
gives for many prompts, `stream` turns it into text for one.
"""

from nanochatgpt.engine import Engine
from nanochatgpt.sampling import Sampling
from nanochatgpt.stream import TextStream

BATCH_ROWS = 64  # rows that `generate` decodes at once


def generate(
    model,
    prompts,
    *,
    seed=None,
    stop_ids=(),
    stop_strings=(),
    logit_bias=None,
    tokenizer=None,
    engine=None,
    **sampling,
):
    """Return for each prompt, a list of ids, the list of new ids, without what stopped it.

    `sampling` are the fields of Sampling, the rest as in Engine.add; prompt i has the seed `seed` + i. Given the
    `tokenizer`, no id beyond its vocabulary is chosen, if the model has embeddings for more. With
    `stop_strings` (which need the `tokenizer`) a row ends where one of them appears in its text, and loses the ids
    that reach into it; where its room ends, those of what may be the beginning of one. engine: one of this model to go
    on with, which has computed what prompts begin with and none of whose rows may run; else one is made. Raises
    ValueError as Engine.add and Sampling do.
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    options = Sampling(**sampling)
    new = [[] for _ in prompts]
    ends = [[] for _ in prompts]  # for each new id, how many characters the text then has
    texts = [TextStream(tokenizer, stop_strings) for _ in prompts] if stop_strings else []
    if engine is None:
        size = max(map(len, prompts), default=0) + max(options.max_new_tokens, 1)
        engine = Engine(
            model, min(len(prompts), BATCH_ROWS), size, n_vocab=tokenizer and tokenizer.n_vocab
        )
    elif engine.running:
        raise ValueError(f"{len(engine.running)} rows of the engine are running: end them first")
    waiting, at = (
        list(reversed(range(len(prompts)))),
        {},
    )  # at: row of the engine -> index of its prompt
    try:
        while waiting or engine.running:
            while waiting and len(engine.running) < len(engine.rows):
                i = waiting.pop()
                row_seed = None if seed is None else seed + i
                at[
                    engine.add(
                        prompts[i], options, seed=row_seed, stop_ids=stop_ids, logit_bias=logit_bias
                    )
                ] = i
            for row, token, *_ in engine.step():
                i = at[row]
                new[i].append(token)
                if texts:
                    texts[i].push(token)
                    ends[i].append(texts[i].length + texts[i].within_character)
                    stop, full = texts[i].stopped_at, not engine.rows[row].running
                    if stop is None and full:
                        stop = texts[i].length - len(texts[i].rest())
                    if stop is not None:
                        new[i] = [t for t, end in zip(new[i], ends[i], strict=True) if end <= stop]
                        engine.end(row)
    finally:
        for row in at:
            engine.end(row)
    return new


def stream(engine, tokenizer, prompt, options, *, stop_strings=(), **add):
    """Yield the text that follows one prompt, piece by piece, up to a stop; `add` are further arguments of Engine.add.

    No other row of the engine may run. What may be the beginning of a stop string is held back, and dropped if the row
    ends there for want of room: a chat never shows part of a marker.
    """
    text = TextStream(tokenizer, stop_strings)
    row = engine.add(prompt, options, **add)
    try:
        while engine.rows[
            row
        ].running:  # not while there are tokens: of a prompt in pieces there are none at first
            for token in engine.step():
                if piece := text.push(token.id):
                    yield piece
            if text.stopped_at is not None:
                return
        cut = (
            len(engine.rows[row].ids) == engine.rows[row].limit
        )  # then what is held back might have become a stop
        if not cut and (piece := text.rest()):
            yield piece
    finally:
        engine.end(row)
