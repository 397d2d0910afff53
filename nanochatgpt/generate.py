"""New tokens for many prompts (`generate`), and text as it is written for one (`stream`)."""

from bisect import bisect_right

from nanochatgpt.engine import Engine
from nanochatgpt.sampling import Sampling
from nanochatgpt.stream import TextStream

BATCH_ROWS = 64  # rows that `generate` decodes at once


def generate(
    model,
    prompts,
    sampling=None,
    *,
    seed=None,
    stop_ids=(),
    stop_strings=(),
    logit_bias=None,
    tokenizer=None,
    engine=None,
):
    """Return a list of new ids for each prompt (a list of ids), without what stopped it.

    sampling: a Sampling (None: Sampling()). seed: prompt i draws with seed + i. stop_strings: end a
    row where one appears, without the tokens that reach into it; needs the tokenizer. logit_bias:
    as for Engine.add. tokenizer: draw only ids that it knows. engine: reuse an idle one of this
    model and its cached prefixes (None: a new one). Raises ValueError as Engine.add does.
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    sampling = sampling or Sampling()
    # a new engine has room for the longest prompt and its reply
    if engine is None:
        size = max(map(len, prompts), default=0) + max(sampling.max_new_tokens, 1)
        n_vocab = tokenizer.n_vocab if tokenizer else None
        engine = Engine(model, min(len(prompts), BATCH_ROWS), size, n_vocab)
    elif engine.running:
        raise ValueError(f"{len(engine.running)} rows of the engine are running: end them first")

    new = [[] for _ in prompts]  # new ids of each prompt
    texts = [TextStream(tokenizer, stop_strings) for _ in prompts]
    ends = [[] for _ in prompts]  # length of the text after each new id, in characters
    waiting = list(enumerate(prompts))  # [(index of the prompt, prompt)]
    prompt_of = {}  # index of the row -> index of its prompt
    try:
        while waiting or engine.running:
            while waiting and len(engine.running) < len(engine.rows):
                i, prompt = waiting.pop(0)
                row_seed = None if seed is None else seed + i  # the row draws the same in any batch
                row = engine.add(
                    prompt, sampling, seed=row_seed, stop_ids=stop_ids, logit_bias=logit_bias
                )
                prompt_of[row] = i

            for token in engine.step():  # one per row
                i = prompt_of[token.row]
                new[i].append(token.id)
                if not stop_strings:
                    continue
                # cut the row at a stop string, or at the beginning of one where its room ends
                text = texts[i]
                text.push(token.id)
                ends[i].append(text.length + text.within_character)
                stop = text.stopped_at  # in characters
                if stop is None and not engine.rows[token.row].running:
                    stop = text.length - len(text.rest())
                if stop is not None:
                    new[i] = new[i][: bisect_right(ends[i], stop)]  # ids that end by the stop
                    engine.end(token.row)
    finally:
        for row in prompt_of:  # free the rows after an error too
            engine.end(row)
    return new


def stream(engine, tokenizer, prompt, sampling, *, stop_strings=(), stop_ids=(), seed=None):
    """Yield the text that follows one prompt, piece by piece, up to a stop. No other row may run.
    What may be the beginning of a stop string is held back, and dropped if the row ends there for
    lack of room: a chat never shows part of a marker."""
    text = TextStream(tokenizer, stop_strings)
    index = engine.add(prompt, sampling, seed=seed, stop_ids=stop_ids)
    row = engine.rows[index]
    try:
        while row.running:
            for token in engine.step():
                if piece := text.push(token.id):  # "" while text is held back
                    yield piece
            if text.stopped_at is not None:  # `finally` ends the row
                return
        # at the limit, what is held back might have become a stop string
        if len(row.ids) < row.limit and (piece := text.rest()):
            yield piece
    finally:
        engine.end(index)
