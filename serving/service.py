"""The model that the API serves, and what a request asks of it."""

import functools
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from prometheus_client import Counter, Gauge

from nanochatgpt.checkpoint import load_model
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.engine import Engine, Token
from nanochatgpt.sampling import Sampling, for_template
from nanochatgpt.tokenizer import END_OF_TEXT, TEMPLATES, fit_context
from serving.protocol import Refused, conversation
from serving.scheduler import Scheduler

SAMPLING = {field.name for field in fields(Sampling)}  # the names of the sampling options
SCORED_POSITIONS = 64  # of a prompt, at a time

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

    def check_alive(self):
        if not self.scheduler.alive:
            raise Refused(503, "the engine has stopped; see the server's log")

    def check_model(self, name):
        if name != self.name:  # one server serves one model
            message = f"this server has one model, {self.name}"
            raise Refused(404, message, "model", "model_not_found")

    def chat_prompt(self, request):
        """Return the ids of a conversation and the beginning of the next reply: its opener, and a
        last message of the assistant, which the reply continues."""
        messages = conversation(request.messages)
        continues = messages[-1]["role"] == "assistant"
        flags = {"continue_final_message": continues, "add_generation_prompt": not continues}
        for name, value in flags.items():
            if getattr(request, name) not in (None, value):
                message = f"{name}: a last message of the assistant is continued, no other"
                raise Refused(400, message, name)
        opening = self.open_reply(messages.pop()["content"]) if continues else []

        # a prompt that is too long is refused later, by `sampling`
        ids, _ = self.tokenizer.render(messages, add_generation_prompt=True)
        if request.truncation == "disabled":
            return ids + opening

        # drop turns as chat.py does, one message of the user after the other: what was dropped
        # stays dropped, so the next prompt begins like the last one, which is in the cache
        n_new = self.defaults.max_new_tokens if request.limit is None else request.limit
        free = self.context - len(opening)
        room = free - min(n_new, free // 2)  # tokens that the messages may have
        start = 0  # turns dropped
        try:
            for n, message in enumerate(messages, 1):
                if message["role"] == "user" or n == len(messages):
                    ids, start = fit_context(self.tokenizer, messages[:n], room, start)
        except ValueError as error:
            message = str(error)  # about the persona
            if len(opening) > self.context // 2:
                message = f"the message to continue is too long: {len(opening)} tokens"
            raise Refused(400, message, "messages", "context_length_exceeded") from error
        return ids + opening

    def open_reply(self, text):
        """Return the ids of the beginning of a reply, after its opener. The white space around it
        is left out: the model writes the space before the next word itself."""
        if not text.strip():
            return []
        ids, mask = self.tokenizer.render([{"role": "assistant", "content": text.strip()}])
        after = TEMPLATES[self.tokenizer.template].after
        return ids[mask.index(1) : -len(self.tokenizer.encode(after)) - 1]  # not its end

    def completion_prompts(self, request):
        """Return the prompts of a completion request, a list of ids each."""
        # a single prompt, text or ids, becomes a list of one
        prompts = request.prompt or ""
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        encoded = []  # lists of ids
        for prompt in prompts:
            if isinstance(prompt, str):
                prompt = self.tokenizer.encode(prompt) or [END_OF_TEXT]  # one token at least
            self.check_ids(prompt, "prompt")
            encoded.append(prompt)
        return encoded

    @torch.inference_mode()
    def score_prompt(self, ids, n_top):
        """Return a Token with its log-probability and `n_top` alternatives for each id of a prompt;
        the first has none. Other replies wait meanwhile, so they stall for a long prompt."""
        engine = self.scheduler.engine
        tokens = [Token(0, ids[0], None, [])]
        hidden = engine.model.hidden(torch.tensor([ids], device=engine.device))[0]  # (T, C)
        # a few positions at a time: the logits of a long prompt take hundreds of megabytes
        for start in range(0, len(ids) - 1, SCORED_POSITIONS):
            targets = ids[start + 1 : start + 1 + SCORED_POSITIONS]
            logits = engine.model.lm_head(hidden[start : start + len(targets)])  # (n, V)
            logprobs = logits[:, : engine.n_vocab].float().log_softmax(-1)
            values, top_ids = logprobs.topk(n_top)  # (n, n_top)
            for i, target in enumerate(targets):
                top = list(zip(top_ids[i].tolist(), values[i].tolist(), strict=True))
                tokens.append(Token(0, target, logprobs[i, target].item(), top))
        return tokens

    def check_ids(self, ids, param):
        for token in ids:
            if not 0 <= token < self.tokenizer.n_vocab:
                raise Refused(400, f"{param}: there is no token {token}", param)

    def sampling(self, request, prompts):
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
        if request.limit == 0 and not request.echo:
            raise Refused(400, "max_tokens: a reply has at least one token", "max_tokens")
        n_prompt = max(map(len, prompts))  # the longest prompt decides
        n_new = 0 if request.limit == 0 else 1  # room for one token is enough
        if n_prompt + n_new > self.context:
            message = f"the context is {self.context} tokens, too few for a prompt of {n_prompt} "
            message += 'and a reply. A chat may set truncation: "auto"'
            raise Refused(400, message, code="context_length_exceeded")

        # the request's options, else the server's
        options = request.model_dump(include=SAMPLING, exclude_none=True)
        if request.limit is not None:
            options["max_new_tokens"] = request.limit
        return replace(self.defaults, **options)
