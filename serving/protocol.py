"""
OpenAI's request and response types, as far as GPT-2 can serve them; other fields are refused.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

import codecs
import time
import uuid
from collections import defaultdict
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

T = TypeVar("T")
MAX_ITEMS = 1000  # messages, parts of a message, prompts, biases: keeps validation quick
# fail_fast: report the first bad item, not a thousand
Items = Annotated[list[T], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]  # a prompt as token ids
Count = Annotated[int, Field(ge=1, le=128)]  # replies per prompt
MaxTokens = Annotated[int, Field(ge=1, le=10**9)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]  # added to a token's logit
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,6}$")]  # keys of JSON are strings

# default values that clients send for unsupported fields
NO_OPS = {
    "tools": ([],),  # field -> values that change nothing
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


class Strict(BaseModel):
    # strict: "3" is no number
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Nullable(Strict):
    """Null and default values are dropped."""

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
    include_obfuscation: Literal[False] = False  # random padding, which we do not send


class Options(Nullable):
    """The fields of both kinds of requests. None for a sampling option means the server's own."""

    model: str | None = None
    # sampling
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    # sample from the most likely tokens with this total
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # sample from the k most likely tokens (0 = all)
    top_k: Annotated[int, Field(ge=0, le=10**6)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None  # 1 = off
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # length, number, randomness
    max_tokens: MaxTokens | None = None
    # the reply ends before any of these
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    # the same seed gives the same reply
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Count = 1  # replies to return per prompt
    best_of: Count | None = None  # generate this many, return the n that the reward model prefers
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_ITEMS)] = {}
    # the response
    stream: bool = False  # send server-sent events
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # ignored: for the client's own use
    metadata: dict[str, str] = {}  # ignored too

    @property
    def n_replies(self):
        """Replies to generate per prompt."""
        return self.best_of or self.n

    @property
    def stop_strings(self):
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, stops))  # an empty string would stop at once


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Nullable):
    # developer: OpenAI's newer name for system
    role: Literal["system", "developer", "user", "assistant"]
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
            turns.append({"role": message.role, "content": message.text})  # the conversation itself
        elif not turns:  # a system message before the first turn
            system.append(message.text)
        else:
            raise ValueError("system messages must come first")
    if not turns:
        raise ValueError("messages must include a user or assistant message")
    # the system text is the bot's persona
    persona = "\n".join(system)
    return [{"role": "system", "content": persona}, *turns] if persona else turns


class ChatRequest(Options):
    messages: Items[Message]
    max_completion_tokens: MaxTokens | None = None  # OpenAI's newer name for max_tokens
    logprobs: bool = False  # return the log-probability of each token
    # most likely tokens to list at each position
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    truncation: Literal["auto", "disabled"] = "disabled"  # auto: drop the oldest turns if too long

    @model_validator(mode="after")
    def check(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        conversation(self.messages)  # raises ValueError for a wrong order
        return self

    @property
    def n_logprobs(self):
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Options):
    prompt: str | Items[str] | Ids | Items[Ids] = ""  # texts or ids; "" is <|endoftext|>
    # most likely tokens to list (0 = only the chosen one)
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def n_logprobs(self):
        return self.logprobs


class Feedback(Strict):
    """A conversation that ends in a reply, and whether the reader liked the reply."""

    messages: Annotated[list[Message], Field(min_length=2, max_length=MAX_ITEMS, fail_fast=True)]
    label: Literal[0, 1]  # 1 = liked

    @model_validator(mode="after")
    def check(self):
        if conversation(self.messages)[-1]["role"] != "assistant":
            raise ValueError("messages must end with the reply that was rated")
        return self


class ResponseFormat:
    """Builds the JSON of a response, whole or in chunks."""

    def __init__(self, model, tokenizer, n_logprobs):
        """n_logprobs: alternatives to list for each token; None: no log-probabilities at all."""
        self.tokenizer = tokenizer
        self.n_logprobs = n_logprobs
        response_id = f"{self.prefix}-{uuid.uuid4().hex}"
        # the fields that all chunks of a response share
        self.head = {"id": response_id, "created": int(time.time()), "model": model}

    def whole(self, replies, usage):
        """replies: [(text, Tokens, finish reason)]."""
        choices = []
        for index, (text, tokens, finish_reason) in enumerate(replies):
            choices.append(self.choice(index, self.message(text), tokens, finish_reason))
        return self.head | {"object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, index, content, tokens=None, finish_reason=None):
        # a chunk has one choice, the reply with this index
        choice = self.choice(index, content, tokens or None, finish_reason)
        return self.head | {"object": self.chunk_kind, "choices": [choice]}

    def usage_chunk(self, usage):
        return self.head | {"object": self.chunk_kind, "choices": [], "usage": usage}

    def choice(self, index, content, tokens, finish_reason):
        logprobs = None if self.n_logprobs is None else self.logprobs(index, tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


class ChatFormat(ResponseFormat):
    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self):
        """Return the content of the first chunk, None if there is no special one."""
        return {"delta": {"role": "assistant", "content": ""}}

    def message(self, text):
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text):
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, _, tokens):
        if tokens is None:
            return None
        content = []
        for token in tokens:
            # the alternatives at this position, [(id, logprob)]
            top = [self.token(*pair) for pair in token.top]
            content.append(self.token(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def token(self, token, logprob):
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token))}


class CompletionFormat(ResponseFormat):
    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, model, tokenizer, n_logprobs):
        super().__init__(model, tokenizer, n_logprobs)
        decoder = codecs.getincrementaldecoder("utf-8")
        self.decoders = defaultdict(lambda: decoder("replace"))  # index of a choice -> decoder
        self.offsets = defaultdict(int)  # index of a choice -> characters so far

    def opening(self):
        return None

    def message(self, text):
        return {"text": text}

    delta = message  # a chunk and a whole reply look the same here

    def logprobs(self, index, tokens):
        lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens or ():
            # the chosen token is listed too, even if it is unlikely
            pairs = [*token.top, (token.id, token.logprob)]
            lists["tokens"].append(self.name(token.id))
            lists["token_logprobs"].append(token.logprob)
            lists["top_logprobs"].append({self.name(i): logprob for i, logprob in pairs})
            lists["text_offset"].append(self.offsets[index])
            # a character can span tokens, so decode bytes incrementally to count characters
            data = self.tokenizer.token_bytes(token.id)
            self.offsets[index] += len(self.decoders[index].decode(data))
        return lists

    def name(self, token):
        """Return the text of a token; if it is not whole characters, its bytes: bytes:\\xe2."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()  # whole characters
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
