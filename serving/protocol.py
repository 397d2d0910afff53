"""
OpenAI's requests and answers, as far as a GPT-2 speaks them: what a request may hold, and what is said in return.

https://platform.openai.com/docs/api-reference/chat and .../completions. What is not here is refused, never ignored.
"""

import codecs
import time
import uuid
from collections import defaultdict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MANY = 1000  # messages, parts of one, prompts: what a person could mean, and is checked in no time
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Id = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,6}$")]
# what is not supported, and the values of it that clients send though they ask for nothing
NOTHING = {
    "tools": ([],),
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
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Options(Strict):
    """What both kinds of request have in common; where a knob of sampling is None, the server's own value counts."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10**6)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    best_of: Annotated[int, Field(ge=1, le=128)] | None = (
        None  # the n with the highest reward of so many
    )
    logit_bias: Annotated[
        dict[Id, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MANY)
    ] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # for the client's own books, as metadata is
    metadata: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def drop_nothing(cls, values):
        """Leave out what is null or asks for nothing."""
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        return {name: value for name, value in given.items() if value not in NOTHING.get(name, ())}

    @property
    def stops(self):
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """A message; the name is for the client's own books."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MANY, fail_fast=True)]
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def drop_null(cls, values):
        """Leave out what is null, such as the refusal that is sent back with each reply."""
        return (
            {k: v for k, v in values.items() if v is not None}
            if isinstance(values, dict)
            else values
        )

    @property
    def text(self):
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )


def conversation(messages):
    """Return Messages as Tokenizer.render takes them. Raises ValueError where a system message does not come first."""
    roles = [message.role.replace("developer", "system") for message in messages]
    n = next((n for n, role in enumerate(roles) if role != "system"), len(roles))
    if n == len(roles) or "system" in roles[n:]:
        raise ValueError(
            "messages must begin with those of the system, if any, and go on with the user's"
        )
    system = "\n".join(message.text for message in messages[:n])
    turns = [
        {"role": role, "content": message.text}
        for role, message in zip(roles[n:], messages[n:], strict=True)
    ]
    return [{"role": "system", "content": system}] * bool(system) + turns


class ChatRequest(Options):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MANY, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    truncation: Literal["auto", "disabled"] = (
        "disabled"  # auto: of what is too long, the oldest turns are dropped
    )

    @model_validator(mode="after")
    def fits_together(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        conversation(self.messages)
        return self

    @property
    def n_logprobs(self):
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Options):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MANY, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MANY, fail_fast=True)]
    ) = ""  # texts or ids; of none it is <|endoftext|>
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def n_logprobs(self):
        return self.logprobs


class Feedback(Strict):
    """A conversation up to a reply, and whether this was liked."""

    messages: Annotated[list[Message], Field(min_length=2, max_length=MANY, fail_fast=True)]
    label: Literal[0, 1]

    @model_validator(mode="after")
    def ends_in_a_reply(self):
        if conversation(self.messages)[-1]["role"] != "assistant":
            raise ValueError("messages must end in the reply that is judged")
        return self


def error(message, kind="invalid_request_error", param=None, code=None):
    """Return OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt_tokens, completion_tokens):
    total = prompt_tokens + completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total,
    }


class Answer:
    """The parts of an answer: chunks of a stream, or all of it. `texts` are [(text, Tokens, finish_reason)]."""

    def __init__(self, model, tokenizer, logprobs):
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def whole(self, texts, usage):
        choices = [self.choice(index, *text) for index, text in enumerate(texts)]
        return self.head | {"object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, *choices, usage=None):
        return (
            self.head
            | {"object": self.chunk_kind, "choices": choices}
            | ({"usage": usage} if usage else {})
        )


class ChatAnswer(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index, text, tokens, reason):
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self.probabilities(tokens),
            "finish_reason": reason,
        }

    def opening(self, index):
        """Return the chunk that opens a choice."""
        delta = {"role": "assistant", "content": ""}
        return self.chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def piece(self, index, text, tokens, reason):
        delta, logprobs = (
            {"content": text} if text else {},
            self.probabilities(tokens) if tokens else None,
        )
        return self.chunk(
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        )

    def probabilities(self, tokens):
        if self.logprobs is None:
            return None
        content = [
            self.token(token.id, token.logprob)
            | {"top_logprobs": [self.token(*pair) for pair in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def token(self, token, logprob):
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token))}


class CompletionAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *of):
        super().__init__(*of)
        self.decoders = defaultdict(
            lambda: codecs.getincrementaldecoder("utf-8")("replace")
        )  # of each choice
        self.lengths = defaultdict(int)  # of its text so far

    def choice(self, index, text, tokens, reason):
        return {
            "index": index,
            "text": text,
            "logprobs": self.probabilities(index, tokens),
            "finish_reason": reason,
        }

    def opening(self, index):
        return None

    def piece(self, index, text, tokens, reason):
        return self.chunk(self.choice(index, text, tokens, reason))

    def probabilities(self, index, tokens):
        if self.logprobs is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self.lengths[index])
            self.lengths[index] += len(
                self.decoders[index].decode(self.tokenizer.token_bytes(token.id))
            )
        return {
            "tokens": [self.name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.name(i): logprob for i, logprob in (*token.top, (token.id, token.logprob))}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def name(self, token):
        """Return the text of a token, or where it is no whole characters its bytes: bytes:\\xe2\\x80."""
        of_token = self.tokenizer.token_bytes(token)
        try:
            return of_token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in of_token)
