"""The model that the API serves, and what a request asks of it."""

import functools
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

from prometheus_client import Counter, Gauge

from nanochatgpt.checkpoint import load_model
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.engine import Engine
from nanochatgpt.sampling import Sampling, for_template
from nanochatgpt.tokenizer import END_OF_TEXT, fit_context
from serving.protocol import Refused, conversation
from serving.scheduler import Scheduler

SAMPLING = {field.name for field in fields(Sampling)}  # the names of the sampling options

# for Prometheus, next to its defaults, such as the memory of the process
REFUSED = Counter("nanochatgpt_refused", "Requests answered with an error", ["status"])
PROMPT_TOKENS = Counter("nanochatgpt_prompt_tokens", "Prompt tokens")
GENERATED_TOKENS = Counter("nanochatgpt_generated_tokens", "Reply tokens")
RUNNING = Gauge("nanochatgpt_running_replies", "Replies that are being generated")
QUEUED = Gauge("nanochatgpt_queued_replies", "Replies that wait for a row")


class Service:
    """A model with its scheduler; turns requests into prompts and sampling options."""

    def __init__(self, config):
        self.created = int(time.time())  # Unix time, for /v1/models
        self.name = config.model_name or Path(config.init_from).resolve().name
        self.score = None  # with a reward model: (prompt ids, ids of replies) -> scores
        # the scheduler loads the models in its own thread and waits for it
        self.scheduler = Scheduler(lambda: self.load(config), config.max_queue)

    def load(self, config):
        """Load the models and return the Engine."""
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device, inference=True)
        model, self.tokenizer = load_model(config.init_from, device, dtype, inference=True)
        if self.tokenizer.notice:
            print(self.tokenizer.notice, file=sys.stderr)
        # the reward model, which best_of needs
        if config.reward:
            from rlhf.reward_model import load_reward_model
            from rlhf.scoring import score_replies

            options = {"dtype": dtype, "inference": True}
            reward_model = load_reward_model(config.reward, self.tokenizer, device, **options)
            self.score = functools.partial(score_replies, reward_model, self.tokenizer)
        # the server's sampling options; the template may have its own defaults
        self.config = for_template(config, self.tokenizer.template)
        options = {name: getattr(self.config, name) for name in SAMPLING}
        self.defaults = Sampling(**options)
        self.context = model.config.block_size  # tokens
        # long prompts are read in chunks, so that other replies do not stall
        chunk = 64 if device == "cpu" else 2048
        n_vocab = self.tokenizer.n_vocab  # draw only ids that have a text
        return Engine(model, config.max_rows, n_vocab=n_vocab, prefill_tokens=chunk)

    def model_card(self):
        """Return the model as /v1/models lists it. What the page needs comes after `owned_by`."""
        sampling = asdict(self.defaults)
        sampling["max_tokens"] = sampling.pop("max_new_tokens")  # the API's name for it
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochatgpt",
            "context_length": self.context,
            "best_of": self.score is not None,
            "sampling": sampling,
        }

    def check_model(self, name):
        if name != self.name:  # one server serves one model
            message = f"this server has one model, {self.name}"
            raise Refused(404, message, "model", "model_not_found")

    def chat_prompt(self, request):
        """Return (ids of a conversation and the opener of a reply, max_tokens or None)."""
        messages = conversation(request.messages)
        max_tokens = request.max_completion_tokens or request.max_tokens
        # a prompt that is too long is refused later, by `sampling`
        if request.truncation == "disabled":
            return self.tokenizer.render(messages, add_generation_prompt=True)[0], max_tokens

        # drop turns as chat.py does, one message of the user after the other: what was dropped
        # stays dropped, so the next prompt begins like the last one, which is in the cache
        max_tokens = min(max_tokens or self.defaults.max_new_tokens, self.context // 2)
        start = 0  # turns dropped
        try:
            for n, message in enumerate(messages, 1):
                if message["role"] == "user" or n == len(messages):
                    room = self.context - max_tokens  # tokens that the prompt may have
                    ids, start = fit_context(self.tokenizer, messages[:n], room, start)
        except ValueError as error:
            raise Refused(400, str(error), "messages", "context_length_exceeded") from error
        return ids, max_tokens

    def completion_prompts(self, request):
        """Return the prompts of a completion request, a list of ids each."""
        # a single prompt, text or ids, becomes a list of one
        prompts = request.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        encoded = []  # lists of ids
        for prompt in prompts:
            if isinstance(prompt, str):
                prompt = self.tokenizer.encode(prompt) or [END_OF_TEXT]  # one token at least
            self.check_ids(prompt, "prompt")
            encoded.append(prompt)
        return encoded

    def check_ids(self, ids, param):
        for token in ids:
            if not 0 <= token < self.tokenizer.n_vocab:
                raise Refused(400, f"{param}: there is no token {token}", param)

    def sampling(self, request, prompts, max_tokens):
        """Return the Sampling of a request. Raises Refused if this server cannot serve it."""
        if request.model is not None:
            self.check_model(request.model)

        n_replies = request.n_replies
        if n_replies > request.n and self.score is None:
            raise Refused(400, "best_of needs a server with --reward=out/reward", "best_of")
        limit = self.config.max_rows + self.config.max_queue
        if n_replies * len(prompts) > limit:
            param = "best_of" if request.best_of else "n"
            raise Refused(400, f"too many replies: the limit is {limit}", param)

        self.check_ids(request.logit_bias, "logit_bias")
        n_prompt = max(map(len, prompts))  # the longest prompt decides
        n_new = max_tokens or 1  # without max_tokens, room for one token is enough
        if n_prompt + n_new > self.context:
            message = f"the context is {self.context} tokens; the prompt has {n_prompt} and the "
            message += f'reply needs {n_new}. A chat may set truncation: "auto"'
            raise Refused(400, message, code="context_length_exceeded")

        # the request's options, else the server's
        options = request.model_dump(include=SAMPLING, exclude_none=True)
        if max_tokens:
            options["max_new_tokens"] = max_tokens
        return replace(self.defaults, **options)
