"""
The model that the API serves: what a request asks of it, and what is counted.
"""

import functools
import time
from dataclasses import fields
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nanochatgpt.checkpoint import load_model
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.engine import Engine
from nanochatgpt.sampling import Sampling, for_template
from nanochatgpt.tokenizer import END_OF_TEXT, fit_context
from serving.access import Refused
from serving.protocol import conversation
from serving.scheduler import Scheduler


class Metrics:
    """Counters for Prometheus."""

    def __init__(self, scheduler):
        # leave out the creation time of each counter
        prometheus_client.disable_created_metrics()
        # our own, so that two servers fit in one process (tests)
        self.registry = CollectorRegistry()
        common = {"namespace": "nanochatgpt", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **common)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens", **common)
        about = "Prompt tokens that were in the cache"
        self.cached_tokens = Counter("cached_prompt_tokens", about, **common)
        self.generated_tokens = Counter("generated_tokens", "Reply tokens", **common)

        # histograms, with buckets a factor of three apart
        buckets = [m * 10**n for n in range(-2, 4) for m in (1, 3)]  # 0.01 to 3,000
        about = "Seconds from a request to its first token"
        # 0.01 to 100 s
        self.first_token = Histogram("first_token_seconds", about, buckets=buckets[:9], **common)
        about = "Reply tokens of a request per second"
        # 1 to 3,000 tokens per second
        self.rate = Histogram("reply_tokens_per_second", about, buckets=buckets[4:], **common)

        # gauges, read from the scheduler at each scrape
        running = Gauge("running_replies", "Replies that are being generated", **common)
        running.set_function(lambda: len(scheduler.running))
        queued = Gauge("queued_replies", "Replies that wait for a row", **common)
        queued.set_function(lambda: len(scheduler.waiting))


class Service:
    """A model with its scheduler; turns requests into prompts and sampling options."""

    def __init__(self, config):
        self.created = int(time.time())  # Unix time, for /v1/models
        self.name = config.model_name or config.init_from
        # a directory is called by its last part
        if not config.model_name and Path(config.init_from).exists():
            self.name = Path(config.init_from).resolve().name
        self.score = None  # with a reward model: (prompt ids, ids of replies) -> scores
        # the scheduler loads the models in its own thread and waits for it
        self.scheduler = Scheduler(lambda: self.load(config), config.max_queue)
        self.metrics = Metrics(self.scheduler)

    def load(self, config):
        """Load the models and return the Engine."""
        # the model
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device, inference=True)
        model, self.tokenizer = load_model(config.init_from, device, dtype, inference=True)
        # the reward model, which best_of needs
        if config.reward:
            from rlhf.reward_model import load_reward_model
            from rlhf.scoring import score_replies

            options = {"dtype": dtype, "inference": True}
            reward_model = load_reward_model(config.reward, self.tokenizer, device, **options)
            self.score = functools.partial(score_replies, reward_model, self.tokenizer)
        # fills in the template's sampling defaults
        self.config = for_template(config, self.tokenizer.template)
        self.context = model.config.block_size  # tokens
        # long prompts are read in chunks, so that other replies do not stall
        chunk = config.prefill_tokens or (64 if device == "cpu" else 2048)
        n_vocab = self.tokenizer.n_vocab
        return Engine(model, config.max_rows, n_vocab=n_vocab, prefill_tokens=chunk)

    def model_card(self):
        """Return the model as /v1/models lists it. What the page needs comes after `owned_by`."""
        # the server's own sampling options, under the names that the API uses
        sampling = {"max_tokens": self.config.max_new_tokens}
        for field in fields(Sampling):
            if field.name not in ("max_new_tokens", "no_repeat_ngram_size"):
                sampling[field.name] = getattr(self.config, field.name)
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
            message = f"there is no model {name}, only {self.name}"
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
        max_tokens = min(max_tokens or self.config.max_new_tokens, self.context // 2)
        start = 0  # turns dropped
        try:
            # replay the conversation up to each user message
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
                # a model needs one token at least
                prompt = self.tokenizer.encode(prompt) or [END_OF_TEXT]
            for token in prompt:
                if not 0 <= token < self.tokenizer.n_vocab:
                    # an embedding lookup would fail
                    raise Refused(400, f"prompt: there is no token {token}", "prompt")
            encoded.append(prompt)
        return encoded

    def sampling(self, request, prompts, max_tokens):
        """Return the Sampling of a request. Raises Refused if this server cannot serve it."""
        if request.model is not None:
            self.check_model(request.model)

        # the number of replies
        if request.best_of and self.score is None:
            raise Refused(400, "best_of needs a server with --reward=out/reward", "best_of")
        if request.n_replies < request.n:
            raise Refused(400, f"best_of={request.best_of} is less than n={request.n}", "best_of")
        limit = self.config.max_rows
        total_limit = limit + self.config.max_queue
        if request.n_replies > limit or request.n_replies * len(prompts) > total_limit:
            message = f"too many replies: the limit is {limit} per prompt, {total_limit} in all"
            raise Refused(400, message, "best_of" if request.best_of else "n")

        # token ids and the length
        for token in request.logit_bias:
            if int(token) >= self.tokenizer.n_vocab:
                raise Refused(400, f"logit_bias: there is no token {token}", "logit_bias")
        n_prompt = max(map(len, prompts))  # the longest prompt decides
        n_new = max_tokens or 1  # without max_tokens, room for one token is enough
        if n_prompt + n_new > self.context:
            message = f"the context is {self.context} tokens; the prompt has {n_prompt} and the "
            message += f'reply needs {n_new}. A chat may set truncation: "auto"'
            raise Refused(400, message, code="context_length_exceeded")

        # the request's options, else the server's
        options = {}
        for field in fields(Sampling):
            value = getattr(request, field.name, None)
            options[field.name] = getattr(self.config, field.name) if value is None else value
        options["max_new_tokens"] = max_tokens or self.config.max_new_tokens
        return Sampling(**options)
