"""
Many clients, one engine: jobs come and go between two decoding steps.

Everything that computes runs in the scheduler's thread, loading the model too. A second thread that
used OpenMP would make OpenMP's workers sleep between matrix products, and a step would take twice
as long.
"""

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from nanochatgpt.sampling import Sampling
from nanochatgpt.stream import TextStream, overlap
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


@dataclass(eq=False)
class Job:
    """One reply to generate. The fields without a comment are arguments of Engine.add."""

    on_piece: Callable  # the scheduler's `deliver` calls it with each Piece
    prompt: list
    options: Sampling
    tokenizer: Tokenizer
    seed: int | None = None
    stop_ids: tuple = ()
    stop_strings: tuple = ()  # the text ends before the first of them
    logit_bias: dict | None = None
    logprobs: int | None = None
    seconds: float = math.inf  # time limit, waiting included

    def __post_init__(self):
        self.deadline = time.monotonic() + self.seconds  # on time.monotonic()'s clock
        # turns tokens into text and finds stop strings
        self.text = TextStream(self.tokenizer, self.stop_strings)
        self.n_characters = 0  # in the pieces so far
        self.held = []  # [(Token, length of the text with it)], not in a piece yet
        self.n_tokens = 0  # generated, without the end token
        self.n_cached = 0  # tokens of the prompt that the engine had in its cache

    def push(self, token, full):
        """Add the next Token, the last one if the row is `full`; return a Piece."""
        self.n_tokens += 1
        text = self.text.push(token.id)
        self.held.append((token, self.text.length + self.text.within_character))
        if self.text.stopped_at is not None:
            return self._piece(text, "stop")
        return self.finish("length", text) if full else self._piece(text, None)

    def finish(self, end, text=""):
        """Return the last Piece: `text` and what TextStream holds back."""
        rest = self.text.rest()
        n_marker = 0  # characters at the end that may be half a turn marker: do not show them
        for marker in self.tokenizer.stop_strings if end != "stop" else ():
            if marker in self.stop_strings:
                n_marker = max(n_marker, overlap(rest, marker))
        return self._piece(text + rest[: len(rest) - n_marker], end)

    def _piece(self, text, end):
        self.n_characters += len(text)
        # a token goes out with the text that ends it, not before
        tokens = []
        while self.held and self.held[0][1] <= self.n_characters:
            tokens.append(self.held.pop(0)[0])
        return Piece(text, tokens, end)


class Scheduler:
    """Runs jobs in the order in which they come, as many at once as the engine has rows."""

    def __init__(self, load, max_queue, deliver=None):
        """load() returns the Engine; what it raises is raised here. deliver([(job, Piece)]) must be
        quick. The scheduler calls both in its thread. max_queue: jobs that may wait."""
        self.max_queue = max_queue
        self.deliver = deliver
        self.waiting = deque()  # jobs
        self.running = {}  # row of the engine -> job
        self.undelivered = {}  # job -> Piece
        self.last_delivery = 0.0  # time.monotonic()
        self.lock = threading.Lock()  # for `waiting` and `next_step`
        self.next_step = None  # Future of the step that runs now or comes next
        self.executor = ThreadPoolExecutor(max_workers=1)  # the one thread that computes
        self.call = self.executor.submit  # a function, between two steps; returns a Future
        self.engine = self.call(load).result()

    def add(self, *jobs):
        """Queue jobs. Raises QueueFull unless rows and queue have room for all of them."""
        with self.lock:
            free_rows = len(self.engine.rows) - len(self.running)
            if len(jobs) > free_rows + self.max_queue - len(self.waiting):
                raise QueueFull
            self.waiting.extend(jobs)
            if self.next_step is None:  # the scheduler was idle
                self.next_step = self.call(self._step)

    def cancel(self, *jobs):
        """Let jobs run out of time: before the next step they end with the text they have."""
        for job in jobs:
            job.deadline = 0

    def cancel_all(self):
        with self.lock:
            self.cancel(*self.waiting, *self.running.values())

    def is_alive(self):
        """Return whether the thread is ready for jobs: False after a bug ended it."""
        # a step catches the engine's errors, so an exception here is a bug
        step = self.next_step
        return step is None or not step.done() or step.exception() is None

    def close(self):
        """End the thread after the step in progress."""
        self.executor.shutdown(cancel_futures=True)

    def _step(self):
        """Advance all jobs by one step, then queue the next step, after the calls that wait."""
        with self.lock:
            pieces = self._update_rows()
        try:
            pieces += self._decode()
        except Exception:  # out of memory, say: fail the running jobs, the next ones may fit
            traceback.print_exc()
            for row in list(self.running):
                job = self._end(row)
                pieces.append((job, job.finish("error")))
        self._deliver(pieces)  # outside of the lock: clients may add jobs meanwhile
        with self.lock:
            busy = self.waiting or self.running
            self.next_step = self.call(self._step) if busy else None

    def _update_rows(self):
        """End the jobs that are out of time, and give free rows to waiting jobs; return
        [(job, Piece)] of those that ended."""
        now = time.monotonic()
        pieces = []
        # out of time
        for row, job in list(self.running.items()):
            if job.deadline < now:
                self._end(row)
                pieces.append((job, job.finish("length")))
        for job in list(self.waiting):
            if job.deadline < now:
                self.waiting.remove(job)
                pieces.append((job, job.finish("late")))

        # a free row
        while self.waiting and len(self.running) < len(self.engine.rows):
            job = self.waiting.popleft()
            options = {"stop_ids": job.stop_ids, "logit_bias": job.logit_bias}
            options |= {"seed": job.seed, "logprobs": job.logprobs}
            try:
                row = self.engine.add(job.prompt, job.options, **options)
            except ValueError:  # a request that the service should have refused
                traceback.print_exc()
                pieces.append((job, job.finish("error")))
                continue
            # the shared beginning is not computed again
            job.n_cached = self.engine.rows[row].n_reused
            self.running[row] = job
        return pieces

    def _decode(self):
        """Decode a token per row; return [(job, Piece)] of the jobs that have something new."""
        pieces = []
        for token in self.engine.step():
            job = self.running[token.row]
            piece = job.push(token, full=not self.engine.rows[token.row].running)
            if piece.text or piece.tokens or piece.end:
                pieces.append((job, piece))
            if piece.end:
                self._end(token.row)
        # the other rows that no longer run drew a stop id, which is not given as a Token
        for row in self.running.keys() - set(self.engine.running):
            job = self._end(row)
            pieces.append((job, job.finish("stop")))
        return pieces

    def _end(self, row):
        """Free a row and return its job."""
        self.engine.end(row)
        return self.running.pop(row)

    def _deliver(self, pieces):
        """Hand over pieces at once if a job starts or ends, else collect them for a while."""
        # join each job's new piece with what is not delivered yet
        for job, new in pieces:
            old = self.undelivered.get(job, Piece("", [], None))
            self.undelivered[job] = Piece(old.text + new.text, old.tokens + new.tokens, new.end)
        # the first token and the end are urgent
        urgent = False
        for job, piece in self.undelivered.items():
            urgent = urgent or piece.end or len(piece.tokens) == job.n_tokens
        now = time.monotonic()
        due = now > self.last_delivery + DELIVERY_INTERVAL * len(self.running)
        if self.undelivered and (urgent or due):
            self.deliver(list(self.undelivered.items()))
            self.undelivered = {}
            self.last_delivery = now
