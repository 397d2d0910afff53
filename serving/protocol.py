"""OpenAI's requests, responses and errors, as far as GPT-2 can serve them.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

import time
import uuid
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

T = TypeVar("T")
MAX_ITEMS = 1000  # messages, parts of a message, prompts, biases: keeps validation quick
# fail_fast: report the first bad item, not a thousand
Items = Annotated[list[T], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]  # a prompt as token ids
Count = Annotated[int, Field(ge=1, le=128)]  # replies per prompt
MaxTokens = Annotated[int, Field(ge=1, le=10**9)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]  # added to a token's logit
TokenId = Annotated[int, Field(ge=0, strict=False)]  # keys of JSON are strings

# unsupported fields -> values that change nothing; clients send them by default
NO_OPS = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
}


class Refused(HTTPException):
    """A request that the server turns down, and why."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(status, message, headers)
        self.param = param  # the field that is wrong
        self.code = code


def error_body(error):
    """Return an HTTPException as OpenAI's JSON."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kinds |= {500: "server_error", 503: "server_error"}
    kind = kinds.get(error.status_code, "invalid_request_error")
    param = getattr(error, "param", None)  # the library's own errors have none
    code = getattr(error, "code", None)
    return {"error": {"message": error.detail, "type": kind, "param": param, "code": code}}


class Strict(BaseModel):
    """Unknown fields and other types are errors; null stands for the default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)  # "3" is no number

    @model_validator(mode="before")
    @classmethod
    def drop_no_ops(cls, values):
        if not isinstance(values, dict):  # let pydantic report the type
            return values
        kept = {}
        for name, value in values.items():
            if value is not None and value not in NO_OPS.get(name, ()):
                kept[name] = value
        return kept


class StreamOptions(Strict):
    include_usage: bool = False  # send token counts in a last chunk


class Options(Strict):
    """The fields of both kinds of requests. None for a sampling option means the server's own."""

    model: str | None = None
    # sampling, as in nanochatgpt/sampling.py
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10**6)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: MaxTokens | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None  # end before any of these
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # same seed, same reply
    n: Count = 1  # replies to return per prompt
    best_of: Count | None = None  # generate this many, return the n that the reward model prefers
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_ITEMS)] = {}
    stream: bool = False  # send server-sent events
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # ignored: for the client's own use
    metadata: dict[str, str] = {}  # ignored too

    @property
    def n_replies(self):
        """Replies to generate per prompt."""
        return max(self.best_of or 0, self.n)

    @property
    def stop_strings(self):
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, stops))  # an empty string would stop at once


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]  # developer: newer name for system
    content: str | Items[TextPart]
    name: str = ""  # ignored

    @property
    def text(self):
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


def conversation(messages):
    """Return Messages as Tokenizer.render takes them, with the system messages joined."""
    system = []  # texts
    turns = []  # {"role", "content"}
    for message in messages:
        if message.role in ("user", "assistant"):
            turns.append({"role": message.role, "content": message.text})
        elif not turns:  # a system message before the first turn
            system.append(message.text)
        else:
            raise Refused(400, "system messages must come first", "messages")
    if not turns:
        raise Refused(400, "messages must include a user or assistant message", "messages")
    persona = "\n".join(system)
    return [{"role": "system", "content": persona}, *turns] if persona else turns


class ChatRequest(Options):
    messages: Items[Message]
    max_completion_tokens: MaxTokens | None = None  # OpenAI's newer name for max_tokens
    logprobs: bool = False  # return the log-probability of each token
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0  # alternatives to list, with logprobs
    truncation: Literal["auto", "disabled"] = "disabled"  # auto: drop the oldest turns if too long

    @property
    def n_logprobs(self):
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Options):
    prompt: str | Items[str] | Ids | Items[Ids] = ""  # texts or ids; "" is <|endoftext|>
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # alternatives to list

    @property
    def n_logprobs(self):
        return self.logprobs


class Feedback(Strict):
    """A conversation that ends in a reply, and whether the reader liked the reply."""

    messages: Items[Message]
    label: Literal[0, 1]  # 1 = liked


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

    def choice(self, index, content, tokens=(), finish_reason=None):
        """Return a reply or a piece of one; content: what `message` or `delta` returns."""
        logprobs = None if self.n_logprobs is None else self.logprobs(tokens)
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

    def logprobs(self, tokens):
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

    def logprobs(self, tokens):
        lists = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for token in tokens:
            lists["tokens"].append(self.token_text(token.id))
            lists["token_logprobs"].append(token.logprob)
            # the chosen token is listed too, even if it is unlikely
            pairs = [*token.top, (token.id, token.logprob)]
            lists["top_logprobs"].append({self.token_text(i): logprob for i, logprob in pairs})
        return lists
