"""The JSON of OpenAI's responses, whole or in chunks."""

import codecs
import time
import uuid


class ResponseFormat:
    """Builds the JSON of a response, whole or in chunks."""

    def __init__(self, model, tokenizer, n_logprobs):
        """n_logprobs: alternatives to list for each token; None: no log-probabilities at all."""
        self.tokenizer = tokenizer
        self.n_logprobs = n_logprobs
        response_id = f"{self.prefix}-{uuid.uuid4().hex}"
        # the fields that all chunks of a response share
        self.head = {"id": response_id, "created": int(time.time()), "model": model}

    def whole(self, choices, usage):
        return self.head | {"object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, *choices):
        return self.head | {"object": self.chunk_kind, "choices": choices}

    def choice(self, index, content, tokens=(), finish_reason=None, offset=0):
        """Return a reply or a piece of one; content: what `message` or `delta` returns; offset: of
        the tokens in the text, in characters."""
        logprobs = None if self.n_logprobs is None else self.logprobs(tokens, offset)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def token_text(self, token):
        """Return the text of a token; if it is not whole characters, with bytes such as \\xe2."""
        return self.tokenizer.token_bytes(token).decode(errors="backslashreplace")


class ChatFormat(ResponseFormat):
    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def message(self, text):
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text):
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, tokens, _):
        content = []
        for token in tokens:
            top = [self.token(*pair) for pair in token.top]  # pairs: (id, logprob)
            content.append(self.token(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def token(self, token, logprob):
        data = self.tokenizer.token_bytes(token)
        return {"token": self.token_text(token), "logprob": logprob, "bytes": list(data)}


class CompletionFormat(ResponseFormat):
    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def message(self, text):
        return {"text": text}

    delta = message  # a chunk and a whole reply look the same here

    def logprobs(self, tokens, offset):
        lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            lists["tokens"].append(self.token_text(token.id))
            lists["token_logprobs"].append(token.logprob)
            lists["text_offset"].append(offset)
            offset += len(decoder.decode(self.tokenizer.token_bytes(token.id)))
            # the chosen token is listed too, even if it is unlikely
            top = {self.token_text(i): logprob for i, logprob in token.top}
            top[self.token_text(token.id)] = token.logprob
            # nothing predicts the first token of a prompt
            lists["top_logprobs"].append(None if token.logprob is None else top)
        return lists
