"""
The replies to one request: generated together, sent all at once or as server-sent events.
"""

import asyncio
import functools
import json
import time

from fastapi.responses import Response, StreamingResponse

from nanochatgpt.stream import Trim
from serving.access import Refused, json_response
from serving.protocol import ChatFormat, ChatRequest, CompletionFormat
from serving.scheduler import Job, QueueFull


async def respond(service, http, request, prompts, options):
    """Return the response with `n_replies` replies to each of the prompts, lists of ids."""
    try:
        generation = Generation(service, http, request, prompts, options)
    except QueueFull:
        # clients should wait longer the more rounds of rows the queue holds
        seconds = 1 + service.config.max_queue // service.config.max_rows
        headers = {"Retry-After": str(seconds)}
        message = "too many requests are waiting"
        raise Refused(429, message, code="rate_limit_exceeded", headers=headers) from None
    if request.stream:
        return EventStream(generation)
    return await whole_response(generation)


class Generation:
    """The replies to one request, piece by piece as the scheduler delivers them."""

    def __init__(self, service, http, request, prompts, options):
        """http: the HTTP request; options: a Sampling. Raises QueueFull."""
        self.service = service
        self.http = http
        self.request = request
        self.prompts = prompts  # lists of ids
        self.start = time.perf_counter()  # seconds, for the rates in the log
        self.first_token = None  # seconds until it came

        # a chat ends at turn markers, and has no white space around its replies
        stop_strings = request.stop_strings
        is_chat = isinstance(request, ChatRequest)
        if is_chat:
            stop_strings += service.tokenizer.stop_strings
        response_format = ChatFormat if is_chat else CompletionFormat
        self.format = response_format(service.name, service.tokenizer, request.n_logprobs)

        # one job per reply, the replies to a prompt next to each other
        n = len(prompts) * request.n_replies
        self.queue = asyncio.Queue()  # (index of the reply, Piece)
        self.jobs = [self._job(index, options, stop_strings) for index in range(n)]
        # one per reply: strips white space at both ends
        self.trims = [Trim() if is_chat else None for _ in range(n)]
        self.texts = [""] * n  # so far
        service.scheduler.add(*self.jobs)  # all of them, or QueueFull

    def _job(self, index, options, stop_strings):
        request = self.request  # shared by all jobs
        seed = request.seed
        if seed is not None:
            # each reply has its own seed, else all would be equal
            seed = (seed + index) % 2**64  # not negative: Random(-1) and Random(1) draw the same
        return Job(
            lambda piece: self.queue.put_nowait((index, piece)),  # called in the event loop
            # `n_replies` jobs in a row have the same prompt
            self.prompts[index // request.n_replies],
            options,
            self.service.tokenizer,
            seed=seed,
            stop_ids=self.service.tokenizer.stop_ids,
            stop_strings=stop_strings,
            # keys of JSON are strings
            logit_bias={int(token): bias for token, bias in request.logit_bias.items()},
            logprobs=request.n_logprobs,
            seconds=self.service.config.max_seconds,
        )

    def end(self):
        """Cancel what still runs; count and log what was generated."""
        self.service.scheduler.cancel(*self.jobs)  # does nothing to jobs that have ended
        usage = self.usage()
        n_prompt = usage["prompt_tokens"]
        n_new = usage["completion_tokens"]

        # metrics
        metrics = self.service.metrics
        metrics.prompt_tokens.inc(n_prompt)
        metrics.cached_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])
        metrics.generated_tokens.inc(n_new)

        # the end of the request's log line
        note = f", {n_prompt} + {n_new} tokens"
        if self.first_token is not None:
            # tokens per second, all replies together
            rate = n_new / (time.perf_counter() - self.start)
            metrics.rate.observe(rate)
            note += f", the first after {self.first_token:.2f} s, {rate:.0f} per second"
        if self.service.config.log_text:  # off by default: texts are private
            prompts = [self.service.tokenizer.decode(prompt) for prompt in self.prompts]
            note += f"\n  {json.dumps(prompts)} -> {json.dumps(self.texts)}"
        self.http.scope["note"] = note  # AccessControl logs it

    def usage(self):
        # each prompt counts once, however many replies it has
        n_prompt = sum(map(len, self.prompts))
        n_new = sum(job.n_tokens for job in self.jobs)
        # by the first job of each prompt
        n_cached = sum(job.n_cached for job in self.jobs[:: self.request.n_replies])
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }

    async def pieces(self):
        """Yield (index of the reply, text, Tokens, finish reason or None) until all have ended."""
        n_running = len(self.jobs)
        while n_running:
            index, piece = await self.queue.get()
            # note when the first token of any reply comes
            if self.first_token is None and piece.tokens:
                self.first_token = time.perf_counter() - self.start
                self.service.metrics.first_token.observe(self.first_token)
            # an error in one reply fails the whole request
            if piece.end == "late":
                message = "timed out waiting in the queue, or the server is shutting down"
                raise Refused(503, message, headers={"Retry-After": "10"})
            if piece.end == "error":
                raise Refused(500, "generation failed; see the server's log")
            # hold back white space until text follows it
            trim = self.trims[index]
            text = trim.push(piece.text) if trim else piece.text
            self.texts[index] += text
            n_running -= piece.end is not None  # 1 if the reply has ended
            yield index, text, piece.tokens, piece.end

    async def whole(self):
        """Return [(text, Tokens, finish reason)] of the replies: all, or each prompt's best `n`."""
        tokens = [[] for _ in self.jobs]  # a list of Tokens per reply
        ends = [None] * len(self.jobs)  # finish reasons
        # collect the pieces; `pieces` itself joins the texts
        async for index, _, new_tokens, end in self.pieces():
            tokens[index] += new_tokens
            ends[index] = end
        replies = list(zip(self.texts, tokens, ends, strict=True))
        n_replies = self.request.n_replies
        if n_replies == self.request.n:  # no best_of, so nothing to choose
            return replies

        # score the replies to each prompt in the scheduler's thread
        best = []
        for number, prompt in enumerate(self.prompts):
            group = replies[number * n_replies : (number + 1) * n_replies]
            ids = [[token.id for token in tokens] for _, tokens, _ in group]
            score = functools.partial(self.service.score, prompt, ids)
            scores = await asyncio.wrap_future(self.service.scheduler.call(score))
            order = scores.argsort(descending=True, stable=True).tolist()
            best += [group[i] for i in order[: self.request.n]]  # the highest scores first
        return best

    async def stream(self):
        """Yield what `pieces` yields; with best_of the chosen replies, each in one piece."""
        if self.request.n_replies == self.request.n:
            async for piece in self.pieces():
                yield piece
        else:  # the best replies are known only when all have ended
            for index, reply in enumerate(await self.whole()):
                yield index, *reply


async def whole_response(generation):
    """Return the response with all replies."""
    # generate until done or until the client disconnects, whichever comes first
    replies = asyncio.ensure_future(generation.whole())
    disconnect = asyncio.ensure_future(wait_for_disconnect(generation.http))
    try:
        await asyncio.wait({replies, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not replies.done():
            return Response(status_code=499)  # nobody reads it
        content = generation.format.whole(await replies, generation.usage())
        return await asyncio.to_thread(json_response, content)  # logprobs can make it megabytes
    finally:
        replies.cancel()  # does nothing if it is done
        disconnect.cancel()
        generation.end()  # frees the engine's rows


async def wait_for_disconnect(http):
    while (await http.receive())["type"] != "http.disconnect":
        pass  # the body has been read; ignore anything else


class EventStream(StreamingResponse):
    """The response that sends the replies as they come."""

    def __init__(self, generation):
        # X-Accel-Buffering: nginx must not collect events before it sends them
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events(generation), media_type="text/event-stream", headers=headers)
        self.generation = generation

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if the client left before the first event
            self.generation.end()


async def events(generation):
    """Yield the server-sent events of a response."""
    response_format = generation.format
    opening = response_format.opening()
    started = set()  # indices of replies
    try:
        async for index, text, tokens, end in generation.stream():
            # the first chunk of a chat reply names the role
            if index not in started and opening:
                yield event(response_format.chunk(index, opening))
            started.add(index)
            # skip chunks with nothing to show
            if text or (tokens and response_format.n_logprobs is not None):
                yield event(response_format.chunk(index, response_format.delta(text), tokens))
            if end:  # the finish reason has a chunk of its own
                delta = response_format.delta("")
                yield event(response_format.chunk(index, delta, finish_reason=end))
    except Refused as refused:  # too late for another status
        yield b"data: " + refused.response.body + b"\n\n"
        return
    if generation.request.stream_options.include_usage:
        yield event(response_format.usage_chunk(generation.usage()))
    yield b"data: [DONE]\n\n"  # OpenAI's end of the stream


def event(content):
    return f"data: {json.dumps(content)}\n\n".encode()
