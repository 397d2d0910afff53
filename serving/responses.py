"""The replies to one request: generated together, sent all at once or as server-sent events."""

import asyncio
import json
import time
import traceback
from collections import Counter

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from nanochatgpt.stream import Trim
from serving.protocol import ChatRequest, Refused, error_body
from serving.response_format import ChatFormat, CompletionFormat
from serving.scheduler import Job, Piece, QueueFull
from serving.service import GENERATED_TOKENS, PROMPT_TOKENS

FAILED = "generation failed; see the server's log"


async def respond(service, http, request, prompts, options):
    """Return the response with `n_replies` replies to each of the prompts, lists of ids."""
    service.check_alive()  # otherwise nobody would answer
    generation = Generation(service, request, prompts, options)
    if request.stream:
        # nginx must not collect events before it sends them
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        # the task runs at the end, also if the client left before the first event
        task = BackgroundTask(generation.end)
        return StreamingResponse(events(generation), 200, headers, "text/event-stream", task)

    # generate until done or until the client disconnects, whichever comes first
    replies = asyncio.ensure_future(generation.whole())
    disconnect = asyncio.ensure_future(http.receive())  # the body has been read
    try:
        await asyncio.wait({replies, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not replies.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(await replies)
    finally:
        replies.cancel()  # does nothing if it is done
        disconnect.cancel()
        await generation.end()


class Generation:
    """The replies to one request, piece by piece as the scheduler delivers them."""

    def __init__(self, service, request, prompts, options):
        """options: a Sampling. Raises Refused if the queue is full."""
        self.service = service
        self.request = request
        self.prompts = prompts  # lists of ids
        self.start = time.perf_counter()

        # a chat ends at turn markers, and has no white space around its replies
        tokenizer = service.tokenizer
        stop_strings = request.stop_strings
        self.is_chat = isinstance(request, ChatRequest)
        if self.is_chat:
            stop_strings += tokenizer.stop_strings
            continues = request.continues  # then the space before the next word stays
        response_format = ChatFormat if self.is_chat else CompletionFormat
        self.format = response_format(service.name, tokenizer, request.n_logprobs)

        # one job per reply, the replies to a prompt next to each other
        self.queue = asyncio.Queue()  # (index of the reply, Piece)
        self.jobs = []
        for index in range(len(prompts) * request.n_replies):
            # each reply has its own seed, else all would be equal; negative ones draw as positive
            seed = None if request.seed is None else (request.seed + index) % 2**64
            job = Job(
                lambda piece, index=index: self.queue.put_nowait((index, piece)),
                prompts[index // request.n_replies],
                options,
                tokenizer,
                seed=seed,
                stop_ids=tokenizer.stop_ids,
                stop_strings=stop_strings,
                logit_bias=request.logit_bias,
                logprobs=request.n_logprobs,
                trim=Trim(started=continues) if self.is_chat else None,
                lists_end=not self.is_chat and request.n_logprobs is not None,
                seconds=service.config.max_seconds,
            )
            self.jobs.append(job)
        try:
            service.scheduler.add(*self.jobs)
        except QueueFull:
            message = "too many requests are waiting"
            headers = {"Retry-After": "5"}  # seconds
            raise Refused(429, message, None, "rate_limit_exceeded", headers) from None

    async def end(self):
        """Cancel what still runs; count and log what was generated."""
        self.service.scheduler.cancel(*self.jobs)  # does nothing to jobs that have ended
        usage = self.usage()
        n_prompt = usage["prompt_tokens"]
        n_new = usage["completion_tokens"]
        PROMPT_TOKENS.inc(n_prompt)
        GENERATED_TOKENS.inc(n_new)
        seconds = time.perf_counter() - self.start
        print(f"{self.format.kind}: {n_prompt} + {n_new} tokens in {seconds:.2f} s")

    def usage(self):
        # each prompt counts once, by its first job, however many replies it has
        n_prompt = sum(map(len, self.prompts))
        n_new = sum(job.n_tokens for job in self.jobs)
        n_cached = sum(job.n_cached for job in self.jobs[:: self.request.n_replies])
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }

    async def pieces(self):
        """Yield (index of the reply, Piece) until all have ended."""
        n_running = len(self.jobs)
        while n_running:
            index, piece = await self.queue.get()
            # an error in one reply fails the whole request
            if piece.end == "late":
                raise Refused(503, "timed out in the queue, or the server is shutting down")
            if piece.end == "error":
                raise Refused(500, FAILED)
            n_running -= piece.end is not None  # 1 if the reply has ended
            yield index, piece

    async def best(self):
        """Return the Jobs of each prompt's `n` best replies, when all have ended."""
        async for _ in self.pieces():
            pass
        n_replies = self.request.n_replies
        if n_replies == self.request.n:  # nothing to choose
            return self.jobs

        # score the replies to each prompt
        best = []
        for number, prompt in enumerate(self.prompts):
            group = self.jobs[number * n_replies : (number + 1) * n_replies]
            ids = [[token.id for token in job.tokens[: job.n_tokens]] for job in group]
            scores = await self.compute(self.service.score, prompt, ids)
            order = scores.argsort(descending=True, stable=True).tolist()
            best += [group[i] for i in order[: self.request.n]]  # the highest scores first
        return best

    async def echoes(self):
        """Return a Piece for each choice, with what comes before its reply: with `echo` the
        prompt, otherwise nothing."""
        echoes = []
        for prompt in self.prompts:
            echo = Piece("", [], None)
            if self.request.echo:
                tokens = []
                if self.request.n_logprobs is not None:
                    score_prompt = self.service.score_prompt
                    tokens = await self.compute(score_prompt, prompt, self.request.n_logprobs)
                echo = Piece(self.service.tokenizer.decode(prompt), tokens, None)
            echoes += [echo] * self.request.n
        return echoes

    async def compute(self, function, *args):
        """Return function(*args), called in the scheduler's thread between two steps."""
        try:
            return await asyncio.wrap_future(self.service.scheduler.call(function, *args))
        except Exception as error:  # out of memory, say
            traceback.print_exc()
            raise Refused(500, FAILED) from error

    async def stream(self):
        """Yield the echoes, then what `pieces` yields; with best_of the chosen replies, each in one
        piece."""
        for index, echo in enumerate(await self.echoes()):
            yield index, echo
        if self.request.n_replies == self.request.n:
            async for index, piece in self.pieces():
                yield index, piece
        else:  # the best replies are known only when all have ended
            for index, job in enumerate(await self.best()):
                yield index, Piece(job.text, job.tokens, job.end)

    async def whole(self):
        """Return the response with all replies."""
        choices = []
        for echo, job in zip(await self.echoes(), await self.best(), strict=True):
            message = self.format.message(echo.text + job.text)
            tokens = echo.tokens + job.tokens
            choices.append(self.format.choice(len(choices), message, tokens, job.end))
        return self.format.whole(choices, self.usage())


async def events(generation):
    """Yield the server-sent events of a response."""
    response_format = generation.format
    # the first chunk of each reply of a chat names the role
    if generation.is_chat:
        opening = {"delta": {"role": "assistant", "content": ""}}
        for index in range(generation.request.n):
            choice = response_format.choice(index, opening)
            yield event(response_format.chunk(choice))
    # then a chunk for each piece; the last one of a reply has the finish reason
    n_characters = Counter()  # sent so far, by index of the reply
    try:
        async for index, piece in generation.stream():
            if any(piece):  # else it has nothing to show yet
                delta = response_format.delta(piece.text)
                offset = n_characters[index]
                choice = response_format.choice(index, delta, piece.tokens, piece.end, offset)
                yield event(response_format.chunk(choice))
                n_characters[index] += len(piece.text)
    except Refused as refused:  # too late for another status
        yield event(error_body(refused))
        return
    if generation.request.stream_options.include_usage:
        yield event(response_format.chunk() | {"usage": generation.usage()})
    yield "data: [DONE]\n\n"  # OpenAI's end of the stream


def event(content):
    return f"data: {json.dumps(content)}\n\n"
