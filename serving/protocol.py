"""OpenAI's requests and errors, as far as GPT-2 can serve them.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from difflib import get_close_matches
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

T = TypeVar("T")
MAX_ITEMS = 1000  # messages, parts of a message, prompts, biases: keeps validation quick
# fail_fast: report the first bad item, not a thousand
Items = Annotated[list[T], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]  # a prompt as token ids
Count = Annotated[int, Field(ge=1, le=128)]  # replies per prompt
MaxTokens = Annotated[int, Field(ge=0)]  # an upper bound: the context ends a reply earlier
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]  # added to a token's logit
TokenId = Annotated[int, Field(ge=0, strict=False)]  # keys of JSON are strings

# what -1 means: vLLM, llama.cpp and their clients write it for "off"
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None}
OFF |= {"max_tokens": 10**9, "max_completion_tokens": 10**9}
OFF |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# other servers' names of our fields; clients for several servers send both
ALIASES = dict.fromkeys(
    ("max_new_tokens", "max_output_tokens", "n_predict", "num_predict"), "max_tokens"
)
ALIASES |= dict.fromkeys(("stop_sequences", "stop_strings", "stopping_strings"), "stop")
ALIASES["repeat_penalty"] = "repetition_penalty"
# These fields change the form or the content of a reply in ways that this server cannot. They are
# refused, unless the value asks for nothing: an empty one, or one listed here.
UNSUPPORTED = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "typical_p": (1,),
    "typical": (1,),
    "tfs": (1,),
    "top_n_sigma": (-1,),
    "length_penalty": (1,),
    "num_beams": (1,),
}
for names in (
    ("tools", "functions", "tool_calls", "web_search_options"),
    ("image_url", "input_audio", "file", "images", "audio"),
    ("json_schema", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
    ("guided_grammar", "grammar", "suffix", "echo", "prompt_logprobs", "min_tokens", "ignore_eos"),
    ("guided_decoding", "regex", "ebnf", "format", "min_length", "ban_eos_token"),
    ("stop_token_ids", "bad_words", "allowed_token_ids"),
    ("top_a", "dynatemp_range", "smoothing_factor"),
    ("use_beam_search", "mirostat", "mirostat_mode", "xtc_probability", "dry_multiplier"),
):
    UNSUPPORTED |= dict.fromkeys(names, ())
IGNORED = ("repetition_penalty_range",)  # ours looks at the whole text
SIMILAR = 0.83  # how much an unknown field is like a known one, at least, to be a misspelling


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
    """Other types are errors; null stands for the default. A field may have one of ALIASES. An
    unknown one is an error if it is in UNSUPPORTED or seems misspelt. All others are ignored:
    clients send many for themselves."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)  # "3" is no number

    @model_validator(mode="before")
    @classmethod
    def keep_what_asks_for_something(cls, values):
        if not isinstance(values, dict):  # let pydantic report the type
            return values
        kept = {}
        for name, value in values.items():
            alias_of = ALIASES.get(name)
            if alias_of in cls.model_fields:
                if values.get(alias_of) is not None:  # both are given
                    continue
                name = alias_of
            if name in cls.model_fields:
                value = OFF[name] if name in OFF and value == -1 else value
                keep = value is not None or cls.model_fields[name].is_required()
            elif name in UNSUPPORTED:
                keep = bool(value) and value not in UNSUPPORTED[name]
                keep &= name != "tools" or values.get("tool_choice") != "none"
            elif name in IGNORED:
                keep = False
            else:  # comparing names takes time, so not for a body that is made to take long
                compare = value not in (None, "", [], {}) and len(values) <= 100
                keep = compare and nearest_field(name, cls.model_fields) is not None
            if keep:
                kept[name] = value
        return kept


def why_unknown(name):
    """Return why a field was refused that no model has."""
    nearest = nearest_field(name, ChatRequest.model_fields | CompletionRequest.model_fields)
    if name in UNSUPPORTED or nearest is None:
        return "this server does not support it"
    return f"there is no such field; did you mean {nearest}?"


def nearest_field(name, fields):
    """Return the field that an unknown one probably means, or None."""
    plain = {field.replace("_", ""): field for field in fields}  # topK is close to top_k
    matches = get_close_matches(name.replace("_", "").lower(), plain, 1, SIMILAR)
    return plain[matches[0]] if matches else None


class StreamOptions(Strict):
    include_usage: bool = False  # send token counts in a last chunk


class Options(Strict):
    """The fields of both kinds of requests. None for a sampling option means the server's own."""

    model: str | None = None
    # sampling, as in nanochatgpt/sampling.py
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10**6)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=10**6)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: MaxTokens | None = None
    stop: str | Annotated[list[str], Field(max_length=100)] | None = None  # end before any of these
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # same seed, same reply
    n: Count = 1  # replies to return per prompt
    best_of: Count | None = None  # generate this many, return the n that the reward model prefers
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_ITEMS)] = {}
    stream: bool = False  # send server-sent events
    stream_options: StreamOptions = StreamOptions()

    @property
    def limit(self):
        """New tokens, at most; None: the server's default."""
        return self.max_tokens

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
    content: str | Annotated[list[TextPart], Field(max_length=MAX_ITEMS, fail_fast=True)] | None

    @property
    def text(self):
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


def conversation(messages):
    """Return Messages as Tokenizer.render takes them: one system message, then the turns."""
    system = []  # texts of the system messages, wherever they are
    turns = []  # {"role", "content"}
    for message in messages:
        if message.role in ("user", "assistant"):
            turns.append({"role": message.role, "content": message.text})
        elif message.text.strip():
            system.append(message.text)
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
    echo: ClassVar[bool] = False
    # vLLM's names. A last message of the assistant is always continued, so they may only agree
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def continues(self):
        """Whether the reply goes on after the last word of a message of the assistant."""
        last = conversation(self.messages)[-1]
        text = last["content"]
        return last["role"] == "assistant" and text == text.rstrip() != ""

    @property
    def limit(self):
        longer = self.max_completion_tokens
        return self.max_tokens if longer is None else longer

    @property
    def n_logprobs(self):
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Options):
    prompt: str | Items[str] | Ids | Items[Ids] | None  # texts or ids; "" is <|endoftext|>
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # alternatives to list
    echo: bool = False  # return the prompt before the text, with its log-probabilities too

    @property
    def n_logprobs(self):
        return self.logprobs


class Feedback(Strict):
    """A conversation that ends in a reply, and whether the reader liked the reply."""

    messages: Items[Message]
    label: Literal[0, 1]  # 1 = liked
