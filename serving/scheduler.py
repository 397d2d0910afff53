"""Many clients, one engine: jobs come and go between two decoding steps.

Everything that computes runs in the scheduler's thread, loading the model too. A second thread with
OpenMP would make its workers sleep between matrix products: a step would take twice as long.
"""

import math
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from nanochatgpt.sampling import Sampling
from nanochatgpt.stream import TextStream, Trim
from nanochatgpt.tokenizer import Tokenizer

# seconds between two deliveries, per running job: a token then costs the event loop 52 µs, with
# 0.002 it costs 73 µs
DELIVERY_INTERVAL = 0.004


class Piece(NamedTuple):
    """The next part of a job's text. `end` is None until the last piece; then it is "stop" (a stop
    id or string), "length" (no room or time left), "late" (no time left to start) or "error"."""

    text: str
    tokens: list  # the Tokens that the text consists of
    end: str | None


class QueueFull(Exception):
    """The queue has no room for the jobs."""


@dataclass(eq=False)  # equal only to itself, so it can be a key
class Job:
    """One reply to generate. The fields without a comment are arguments of Engine.add."""

    on_piece: Callable  # takes each Piece
    prompt: list
    options: Sampling
    tokenizer: Tokenizer
    seed: int | None = None
    stop_ids: tuple = ()  # the text ends before the first of them
    stop_strings: tuple = ()  # likewise
    logit_bias: dict | None = None
    logprobs: int | None = None
    trim: Trim | None = None  # strips white space around the text
    lists_end: bool = False  # whether the stop id that ends the text is among its tokens
    seconds: float = math.inf  # time limit, waiting included

    def __post_init__(self):
        self.deadline = time.monotonic() + self.seconds  # on time.monotonic()'s clock
        self.stream = TextStream(self.tokenizer, self.stop_strings)  # turns tokens into text
        self.n_tokens = 0  # generated, without the end token
        self.n_cached = 0  # tokens of the prompt that the engine had in its cache
        # all pieces so far
        self.text = ""
        self.tokens = []
        self.end = None
        # what the next piece will have
        self.new_text = ""
        self.new_tokens = deque()  # (Token, length of the stream with it)
        self.n_characters = 0  # of the stream, in the pieces so far

    def push(self, token):
        """Add the next Token."""
        self.n_tokens += 1
        self.new_text += self.stream.push(token.id)
        self.new_tokens.append((token, self.stream.length + self.stream.within_character))

    def next_piece(self):
        """Return the Piece with everything new."""
        # a token goes out with the text that ends it, not before: a stop string may follow. At the
        # end all go out, unless text was held back: the last ones may be half a character
        self.n_characters += len(self.new_text)
        complete = self.end is not None and self.n_characters == self.stream.length
        tokens = []
        while self.new_tokens and (complete or self.new_tokens[0][1] <= self.n_characters):
            tokens.append(self.new_tokens.popleft()[0])
        text = self.trim.push(self.new_text) if self.trim else self.new_text
        self.new_text = ""
        self.text += text
        self.tokens += tokens
        return Piece(text, tokens, self.end)


class Scheduler:
    """Runs jobs in the order in which they come, as many at once as the engine has rows."""

    def __init__(self, load, max_queue, deliver=None):
        """load() returns the Engine; what it raises is raised here. deliver([(job, Piece)]) must be
        quick. The scheduler calls both in its thread. max_queue: jobs that may wait."""
        self.max_queue = max_queue
        self.deliver = deliver
        self.waiting = deque()  # jobs
        self.running = {}  # row of the engine -> job
        self.changed = {}  # job -> True: those that have something to deliver, in order
        self.last_delivery = 0.0  # time.monotonic()
        self.stepping = False  # whether a step runs now or comes next
        self.alive = True  # False after a bug ended the steps
        self.executor = ThreadPoolExecutor(max_workers=1)  # the one thread that computes
        self.call = self.executor.submit  # a function, between two steps; returns a Future
        self.engine = self.call(load).result()

    def add(self, *jobs):
        """Queue jobs. Raises QueueFull unless rows and queue have room for all of them."""
        free_rows = len(self.engine.rows) - len(self.running)
        if len(jobs) > free_rows + self.max_queue - len(self.waiting):
            raise QueueFull
        self.waiting.extend(jobs)
        self.call(self._wake)

    def cancel(self, *jobs):
        """Let jobs run out of time: before the next step they end with the text they have."""
        for job in jobs:
            job.deadline = 0

    def cancel_all(self):
        self.call(lambda: self.cancel(*self.waiting, *self.running.values()))

    def close(self):
        """End the thread after the step in progress."""
        self.executor.shutdown(cancel_futures=True)

    def _wake(self):
        if not self.stepping:
            self._step()

    def _step(self):
        """Advance all jobs by one step, then queue the next step, after the calls that wait."""
        try:
            self._end_late_jobs()
            self._start_jobs()
            self._decode()
        except Exception:  # out of memory, say: fail the running jobs, the next ones may fit
            traceback.print_exc()
            for row in list(self.running):
                self._end(row, "error")
        try:
            self._deliver()
        except Exception:
            self.alive = False  # for /health
            raise
        # a job that comes after this line wakes the scheduler again
        self.stepping = bool(self.waiting or self.running)
        if self.stepping:
            self.call(self._step)

    def _end_late_jobs(self):
        now = time.monotonic()
        for row, job in list(self.running.items()):
            if job.deadline < now:
                self._end(row, "length")
        for job in list(self.waiting):
            if job.deadline < now:
                self.waiting.remove(job)
                job.end = "late"
                self.changed[job] = True

    def _start_jobs(self):
        """Give free rows to waiting jobs."""
        while self.waiting and len(self.running) < len(self.engine.rows):
            job = self.waiting.popleft()
            if job.options.max_new_tokens == 0:
                job.end = "length"
                self.changed[job] = True
                continue
            options = {"logit_bias": job.logit_bias, "seed": job.seed, "logprobs": job.logprobs}
            try:
                row = self.engine.add(job.prompt, job.options, **options)
            except Exception:  # such as a request that the service should have refused
                traceback.print_exc()
                job.end = "error"
                self.changed[job] = True
                continue
            job.n_cached = self.engine.rows[row].n_reused
            self.running[row] = job

    def _decode(self):
        """Decode a token per row, and end the jobs that are complete."""
        for token in self.engine.step():
            job = self.running[token.row]
            if token.id in job.stop_ids:
                self._end(token.row, "stop")
                job.new_text += job.stream.rest()
                if job.lists_end:
                    job.new_tokens.append((token, job.stream.length))
                continue
            job.push(token)
            self.changed[job] = True
            if job.stream.stopped_at is not None:
                self._end(token.row, "stop")
            elif not self.engine.rows[token.row].running:  # text held back may be half a marker
                self._end(token.row, "length")

    def _end(self, row, end):
        """Free a row; its job has ended."""
        self.engine.end(row)
        job = self.running.pop(row)
        job.end = end
        self.changed[job] = True

    def _deliver(self):
        """Hand over what is new at once if a job starts or ends, else collect it for a while."""
        urgent = any(job.end or job.n_tokens == 1 for job in self.changed)
        now = time.monotonic()
        due = now > self.last_delivery + DELIVERY_INTERVAL * len(self.running)
        if urgent or (due and self.changed):
            self.deliver([(job, job.next_piece()) for job in self.changed])
            self.changed = {}
            self.last_delivery = now
