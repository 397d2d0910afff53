"""
The replies to one request of serve.py: all at once, or as they come.
"""

import asyncio
import functools
import json
import time

from fastapi.responses import Response, StreamingResponse

from nanochatgpt.stream import Trim
from rlhf.reward import scores_behind
from serving.guard import Refused, answer
from serving.protocol import usage
from serving.scheduler import Job


class Replies:
    """The replies to the prompts of one request, as they come."""

    def __init__(self, service, http, request, prompts, options, stops, trim):
        """trim: leave out white space around a text. Raises Full."""
        self.service, self.http, self.request, self.prompts = service, http, request, prompts
        self.each = request.best_of or request.n  # replies to a prompt
        self.queue, self.began, self.first = asyncio.Queue(), time.perf_counter(), None
        tokenizer, seed = service.tokenizer, request.seed
        self.jobs = [
            Job(
                lambda piece, number=number: self.queue.put_nowait((number, piece)),
                prompts[number // self.each],
                options,
                tokenizer,
                stop_strings=stops,
                stop_ids=tokenizer.stop_ids,
                seed=None
                if seed is None
                else (seed + number) % 2**64,  # of -1 and 1 random draws the same
                logit_bias={int(token): bias for token, bias in request.logit_bias.items()},
                logprobs=request.n_logprobs,
                seconds=service.config.max_seconds,
            )
            for number in range(len(prompts) * self.each)
        ]
        self.trims = [Trim() if trim else None for _ in self.jobs]
        self.texts = [""] * len(self.jobs)
        service.scheduler.add(*self.jobs)

    def end(self):
        """Give up what still runs, and note what there was."""
        self.service.scheduler.cancel(*self.jobs)
        metrics, found, seconds = (
            self.service.metrics,
            self.usage(),
            time.perf_counter() - self.began,
        )
        metrics.prompt.inc(found["prompt_tokens"])
        metrics.cached.inc(found["prompt_tokens_details"]["cached_tokens"])
        metrics.generated.inc(found["completion_tokens"])
        self.http.scope["note"] = (
            f", {found['prompt_tokens']} + {found['completion_tokens']} tokens"
        )
        if self.first is not None:
            rate = found["completion_tokens"] / seconds
            metrics.rate.observe(rate)
            self.http.scope["note"] += f", the first after {self.first:.2f} s, {rate:.0f} a second"
        if self.service.config.log_text:
            prompts = [self.service.tokenizer.decode(prompt) for prompt in self.prompts]
            self.http.scope["note"] += f"\n  {json.dumps(prompts)} -> {json.dumps(self.texts)}"

    def usage(self):
        cached = sum(job.n_cached for job in self.jobs[:: self.each])
        found = usage(sum(map(len, self.prompts)), sum(job.n_tokens for job in self.jobs))
        return found | {"prompt_tokens_details": {"cached_tokens": cached}}

    async def pieces(self):
        """Yield (number of the reply, text, Tokens, finish reason or None), of all replies as they come."""
        left = len(self.jobs)
        while left:
            number, piece = await self.queue.get()
            if self.first is None and piece.tokens:
                self.first = time.perf_counter() - self.began
                self.service.metrics.first.observe(self.first)
            if piece.ended == "late":
                raise Refused(
                    503,
                    "it did not get its turn in time, or the server is being stopped",
                    **{"Retry-After": "10"},
                )
            if piece.ended == "error":
                raise Refused(500, "generating broke off; the server's log says why")
            left -= piece.ended is not None
            text = self.trims[number].push(piece.text) if self.trims[number] else piece.text
            self.texts[number] += text
            yield number, text, piece.tokens, piece.ended

    async def chosen(self):
        """Return [(text, Tokens, finish reason)] of the replies, the best `n` of each prompt first to last."""
        found = [["", [], None] for _ in self.jobs]
        async for number, text, tokens, ended in self.pieces():
            found[number][0] += text
            found[number][1] += tokens
            found[number][2] = ended
        if self.each == self.request.n:
            return found
        best, service = [], self.service
        for k, prompt in enumerate(self.prompts):
            texts = found[k * self.each : (k + 1) * self.each]
            ids = [[token.id for token in tokens] for _, tokens, _ in texts]
            args = (service.reward_model, service.tokenizer, prompt, ids)
            scoring = service.scheduler.call(functools.partial(scores_behind, *args))
            scores = (await asyncio.wrap_future(scoring)).tolist()
            order = sorted(range(self.each), key=lambda i: -scores[i])
            best += [texts[i] for i in order[: self.request.n]]
        return best

    async def stream(self):
        """Yield what `pieces` does, of those that are chosen."""
        if self.each == self.request.n:
            async for piece in self.pieces():
                yield piece
        else:
            for number, text in enumerate(await self.chosen()):
                yield number, *text


async def whole(replies, to):
    """Return the response with all replies at once."""
    texts = asyncio.ensure_future(replies.chosen())
    gone = asyncio.ensure_future(disconnected(replies.http))
    try:
        await asyncio.wait({texts, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not texts.done():
            return Response(status_code=499)
        content = to.whole(await texts, replies.usage())
        return await asyncio.to_thread(
            answer, content
        )  # with all their logprobs that may be megabytes
    finally:
        texts.cancel()
        gone.cancel()
        replies.end()


async def disconnected(request):
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """The response with the replies as they come, in server-sent events."""

    def __init__(self, replies, to, include_usage):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(
            self.events(replies, to, include_usage), media_type="text/event-stream", headers=headers
        )
        self.replies = replies

    async def __call__(self, *asgi):
        try:
            await super().__call__(*asgi)
        finally:  # however it ended, and if it never began
            self.replies.end()

    @staticmethod
    async def events(replies, to, include_usage):
        opened = set()
        try:
            async for index, text, tokens, ended in replies.stream():
                if index not in opened and (opening := to.opening(index)):
                    yield event(opening)
                opened.add(index)
                if text or (tokens and to.logprobs is not None):
                    yield event(to.piece(index, text, tokens, None))
                if ended:
                    yield event(to.piece(index, "", [], ended))
        except Refused as refused:  # the status has gone out long ago
            yield b"data: " + refused.response.body + b"\n\n"
            return
        if include_usage:
            yield event(to.chunk(usage=replies.usage()))
        yield b"data: [DONE]\n\n"


def event(content):
    return f"data: {json.dumps(content)}\n\n".encode()
