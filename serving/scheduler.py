"""
Many people, one engine: each hands in a Job and hears of its text; between two steps jobs come and go.

The engine's steps are taken in a thread of their own; whoever hands in jobs never waits for one. All that computes has
to be done in that thread, loading the model too: where two threads have used OpenMP its workers sleep between any two
products, and on two cores a step takes twice as long.
"""

import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

from nanochatgpt.stream import TextStream, overlap

# seconds between two deliveries, for each job that runs: of a token those who hear of it make 52 µs, with 0.002 73
PAUSE = 0.004


class Piece(NamedTuple):
    """What is new of a job: text, the Tokens it consists of, and at the end how it ended.

    ended: None while it goes on; "stop" by itself, "length" where its room or its time was over, "late" where its time
    was over before it began, "error" where something broke.
    """

    text: str
    tokens: list
    ended: str | None


class Full(Exception):
    """So many jobs wait already that another one is refused."""


class Job:
    """One reply to be generated. `hear(piece)` is called where the scheduler's `deliver` calls it."""

    def __init__(self, hear, prompt, options, tokenizer, *, stop_strings=(), seconds=None, **add):
        """prompt, options, add: as for Engine.add; stop_strings: what ends the text, besides; seconds: the time it has,
        waiting included."""
        self.hear, self.prompt, self.options, self.add = hear, prompt, options, add
        self.text = TextStream(tokenizer, stop_strings)
        self.held = []  # [(token, length of the text with it)] of tokens whose text is held back
        self.given = 0  # characters
        self.n_tokens = 0  # that were generated, the end not counted
        self.n_cached = 0  # tokens of the prompt that had been computed before
        self.deadline = time.monotonic() + seconds if seconds else float("inf")

    def push(self, token, full):
        """Take the next Token, after which the row is `full` or not; return a Piece."""
        self.n_tokens += 1
        text = self.text.push(token.id)
        self.held.append((token, self.text.length + self.text.within_character))
        if self.text.stopped_at is not None:
            return self._piece(text, "stop")
        if not full:
            return self._piece(text, None)
        first, last = self._piece(text, None), self.end("length")
        return Piece(first.text + last.text, first.tokens + last.tokens, "length")

    def end(self, how):
        """Return the last Piece of a job that ends after the tokens it has."""
        rest = self.text.rest()
        if (
            how != "stop"
        ):  # what is held back might have become the opener of a turn: no part of it is shown
            markers = [s for s in self.text.stop_strings if s in self.text.tokenizer.stop_strings]
            rest = rest[: len(rest) - max((overlap(rest, marker) for marker in markers), default=0)]
        return self._piece(rest, how)

    def _piece(self, text, ended):
        self.given += len(text)
        n = next(
            (n for n, (_, length) in enumerate(self.held) if length > self.given), len(self.held)
        )
        tokens, self.held = [token for token, _ in self.held[:n]], self.held[n:]
        return Piece(text, tokens, ended)


class Scheduler:
    """Runs the jobs that are handed in, as many at once as the engine has rows, in the order in which they came."""

    def __init__(self, load, max_queue, deliver=None):
        """Both functions are called in the scheduler's thread: load() returns the Engine, whatever it raises is raised
        here; deliver(pieces) gets [(job, Piece)] of what is new, and must not take long. max_queue: so many jobs may
        wait for a row."""
        self.max_queue, self.deliver = max_queue, deliver
        self.waiting, self.running, self.calls = deque(), {}, deque()  # running: row -> job
        self.cancelled = set()
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        engine = self.call(load)
        self.thread.start()
        try:
            self.engine = engine.result()
        except BaseException:  # Ctrl-C too: a process must not end while a thread of it computes
            self.close()
            raise

    def add(self, *jobs):
        """Hand in jobs. Raises Full where there is neither a row nor a place in the queue for all of them."""
        with self.changed:
            room = len(self.engine.rows) - len(self.running) + self.max_queue - len(self.waiting)
            if len(jobs) > room:
                raise Full
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, *jobs):
        """Give up jobs: they have their row no longer than to the end of the step that is being taken."""
        with self.changed:
            for job in jobs:
                if job in self.waiting:
                    self.waiting.remove(job)
                else:
                    self.cancelled.add(job)
            self.changed.notify()

    def call(self, function):
        """Return a Future of what a function returns that is called between two steps: one that computes, too."""
        with self.changed:
            self.calls.append((future := Future(), function))
            self.changed.notify()
        return future

    def hurry(self):
        """Let the time of all jobs be over: those that run end with what they have."""
        with self.changed:
            for job in (*self.waiting, *list(self.running.values())):
                job.deadline = 0

    def close(self):
        """End the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self):
        held, delivered = {}, 0.0  # what is not delivered yet, {job: Piece}, and when the last was
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.calls or self.closed):
                    self.cancelled.clear()
                    self.changed.wait()
                if self.closed:
                    return
                calls = [self.calls.popleft() for _ in range(len(self.calls))]
                pieces = self._make_room()
            for future, function in calls:
                if future.set_running_or_notify_cancel():  # else nobody waits for it any more
                    try:
                        future.set_result(function())
                    except Exception as error:
                        future.set_exception(error)
            try:
                pieces += self._step() if self.running else []
            except Exception:  # out of memory, say: who is running hears of it, and the next ones may have better luck
                traceback.print_exc()
                pieces += [(job, job.end("error")) for job in self.running.values()]
                self._end(*self.running)
            held = _join(held, pieces)
            pressing = any(
                piece.ended or len(piece.tokens) == job.n_tokens for job, piece in held.items()
            )
            if held and (pressing or time.monotonic() > delivered + PAUSE * len(self.running)):
                self.deliver(list(held.items()))
                held, delivered = {}, time.monotonic()

    def _make_room(self):
        """End the jobs that were cancelled or whose time is over, and give rows to those that wait; return Pieces."""
        now, pieces = time.monotonic(), []
        for row, job in list(self.running.items()):
            if job in self.cancelled:
                self._end(row)
            elif job.deadline < now:
                pieces.append((job, job.end("length")))
                self._end(row)
        self.cancelled.clear()
        late = [job for job in self.waiting if job.deadline < now]
        for job in late:
            self.waiting.remove(job)
            pieces.append((job, job.end("late")))
        while self.waiting and len(self.running) < len(self.engine.rows):
            job = self.waiting.popleft()
            try:
                row = self.engine.add(job.prompt, job.options, **job.add)
            except ValueError:
                traceback.print_exc()
                pieces.append((job, job.end("error")))
                continue
            job.n_cached = self.engine.rows[row].n_found
            self.running[row] = job
        return pieces

    def _end(self, *rows):
        for row in list(rows):
            self.engine.end(row)
            del self.running[row]

    def _step(self):
        """Take a step; return [(job, Piece)] of the jobs that have something new."""
        pieces = []
        for token in self.engine.step():
            job = self.running[token.row]
            piece = job.push(token, not self.engine.rows[token.row].running)
            pieces.append((job, piece))
            if piece.ended:
                self._end(token.row)
        running = set(self.engine.running)
        for row in (
            self.running.keys() - running
        ):  # a stop id ended it, which is no token of the text
            pieces.append((self.running[row], self.running[row].end("stop")))
            self._end(row)
        return [(job, piece) for job, piece in pieces if piece.text or piece.tokens or piece.ended]


def _join(held, pieces):
    """Return {job: Piece} with what is new of each behind what is held."""
    for job, new in pieces:
        old = held.get(job, Piece("", [], None))
        held[job] = Piece(old.text + new.text, old.tokens + new.tokens, new.ended)
    return held
