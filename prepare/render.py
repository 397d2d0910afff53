"""Tokenizer.render for many conversations at once: equal to it, and twice as fast."""

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanochatgpt.tokenizer import LONG_SPACE


def render_batch(tokenizer, conversations):
    """Return [(ids (n,) uint16, mask (n,) uint8)]: for each conversation what `render` returns."""
    # 64 each: work for all threads
    chunks = [conversations[i : i + 64] for i in range(0, len(conversations), 64)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # tiktoken releases the GIL
        rendered = threads.map(functools.partial(_render_chunk, tokenizer), chunks)
    return list(itertools.chain(*rendered))


def _render_chunk(tokenizer, conversations):
    """A call of tiktoken per conversation takes half the time of one per message. The ids are the
    same, because GPT-2's words end where an opener begins and ends."""
    # the special tokens among the template's markers, such as <|endoftext|>
    template = tokenizer._template
    markers = {*template.openers.values(), template.end}
    specials = markers & tokenizer.special_ids.keys()
    all_ids = []  # an array per conversation
    piece_sizes = []  # bytes of each opener and each body
    weights = []  # 1 for the body of a reply that is learned, else 0
    for messages in conversations:
        pieces = _pieces(template, messages)
        text = "".join(pieces)
        if not text.isascii():
            pieces = [_as_utf8(piece) for piece in pieces]
            text = b"".join(pieces).decode()
        piece_sizes += map(len, pieces)  # they tell later which tokens a piece has
        n_ends = 0  # replies
        for message in messages:
            is_reply = message["role"] == "assistant"
            n_ends += is_reply
            weights += (0, message.get("weight", 1) if is_reply else 0)

        # `render` knows what to do if somebody typed a marker or very much white space
        n_markers = sum([text.count(marker.strip()) for marker in markers])
        if n_markers == len(messages) + n_ends and len(text) < LONG_SPACE:
            ids = tokenizer._bpe.encode_to_numpy(
                text, allowed_special=specials, disallowed_special=()
            )
        else:
            ids, _ = tokenizer.render(messages)  # the slow path
        all_ids.append(np.array(ids, np.uint16))

    # tokens know their size in bytes, which gives the number of tokens in each piece
    token_ends = np.cumsum(_token_sizes(tokenizer._bpe)[np.concatenate(all_ids)])
    piece_ends = token_ends.searchsorted(np.cumsum(piece_sizes), side="right")
    mask = np.repeat(np.array(weights, np.uint8), np.diff(piece_ends, prepend=0))
    borders = np.cumsum([len(ids) for ids in all_ids])[:-1]  # between conversations
    return list(zip(all_ids, np.split(mask, borders), strict=True))


def _pieces(template, messages):
    """Return the texts of a conversation, an opener and a body in turn."""
    openers, before, after, end = template.openers, template.before, template.after, template.end
    pieces = []
    for message in messages:
        role = message["role"]
        body = before + message["content"] + after
        pieces += (openers[role], body + end if role == "assistant" else body)
    if pieces:
        pieces[0] = pieces[0].removeprefix("\n")  # it separates an opener from the turn before
    return pieces


def _as_utf8(text):
    """Return the bytes of a text; half a surrogate pair becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


@functools.cache
def _token_sizes(bpe):
    """Return the bytes of each token, (n_vocab,)."""
    return np.array([len(bpe.decode_single_token_bytes(token)) for token in range(bpe.n_vocab)])
