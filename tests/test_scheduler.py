"""Jobs come and go between steps; each gets the text it gets alone, within bounds of time."""

import queue
import threading
import time

import pytest
import torch

from model import GPT, GPTConfig
from nanochatgpt.engine import Engine
from nanochatgpt.generate import generate
from nanochatgpt.sampling import Sampling
from nanochatgpt.tokenizer import Tokenizer
from serving.scheduler import Job, QueueFull, Scheduler

TOKENIZER = Tokenizer()
TEXTS = ("hello there", "how are you today?", "i like tea", "what? " * 20)
PROMPTS = [TOKENIZER.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(128, 50257, 2, 2, 32))


class Listener:
    """A Scheduler, and the pieces that each job has received."""

    def __init__(self, model, rows, max_queue):
        self.queues = {}  # job -> Queue of Pieces

        def load():
            return Engine(model, rows, n_vocab=TOKENIZER.n_vocab, prefill_tokens=8)

        self.scheduler = Scheduler(load, max_queue, self.deliver)

    def deliver(self, pieces):
        for job, piece in pieces:
            self.queues.setdefault(job, queue.Queue()).put(piece)

    def add(self, *jobs):
        self.scheduler.add(*jobs)

    def wait_for_first(self, job, timeout=30):
        deadline = time.monotonic() + timeout
        while job not in self.queues:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def result(self, job):
        """Wait for the end of a job; return (text, ids, end, number of pieces)."""
        self.wait_for_first(job)
        text, ids, n_pieces, end = "", [], 0, None
        while end is None:
            piece = self.queues[job].get(timeout=30)
            text += piece.text
            ids += [token.id for token in piece.tokens]
            n_pieces += 1
            end = piece.end
        assert self.queues[job].empty()  # nothing comes after the end
        return text, ids, end, n_pieces

    def end(self, job):
        return self.result(job)[2]


@pytest.fixture
def start(model):
    """Start a Scheduler: start(rows, max_queue) -> Listener."""
    listeners = []

    def make(rows=2, max_queue=100):
        listeners.append(Listener(model, rows, max_queue))
        return listeners[-1]

    yield make
    for listener in listeners:
        listener.scheduler.close()


def job(prompt, n=10, seed=0, **options):
    return Job(None, prompt, Sampling(n, 1.0, top_k=50), TOKENIZER, seed=seed, **options)


def alone(model, prompt, n=10, seed=0, **options):
    sampling = Sampling(n, top_k=50)
    return generate(model, [prompt], sampling, seed=seed, tokenizer=TOKENIZER, **options)[0]


def test_each_of_many_jobs_gets_what_it_gets_alone(model, start):
    listener = start(rows=3)
    jobs = [job(PROMPTS[i % 4], n=3 + i, seed=i) for i in range(20)]
    listener.add(*jobs[:12])
    for each in jobs[12:]:
        time.sleep(0.01)
        listener.add(each)
    for i, each in enumerate(jobs):
        text, ids, end, _ = listener.result(each)
        expected = alone(model, PROMPTS[i % 4], n=3 + i, seed=i)
        assert ids == expected and end == "length" and each.n_tokens == 3 + i
        decoded = TOKENIZER.decode(expected)
        assert text in (decoded, decoded.rstrip("\ufffd"))


def test_a_stop_string_ends_a_job_and_takes_its_tokens(model, start):
    ids = alone(model, PROMPTS[0], n=40, seed=3)
    stop = TOKENIZER.decode(ids)[30:36]
    listener = start()
    each = job(PROMPTS[0], n=40, seed=3, stop_strings=(stop,))
    listener.add(each)
    text, new, end, _ = listener.result(each)
    assert end == "stop" and text == TOKENIZER.decode(ids).partition(stop)[0]
    assert new == alone(model, PROMPTS[0], n=40, seed=3, stop_strings=(stop,))


def test_a_stop_id_ends_a_job_and_releases_what_was_held_back(model, start):
    ids = alone(model, PROMPTS[1], n=20, seed=4)
    half_stop = TOKENIZER.decode(ids[9:10])[-1:] + "never"
    listener = start()
    each = job(PROMPTS[1], n=20, seed=4, stop_ids=(ids[10],), stop_strings=(half_stop,))
    listener.add(each)
    text, new, end, _ = listener.result(each)
    expected = ids[: ids.index(ids[10])]
    assert end == "stop" and new == expected and text == TOKENIZER.decode(expected)


def test_a_cut_reply_does_not_end_in_half_a_marker(start):
    listener = start()
    bias = {TOKENIZER.encode("[")[0]: 100}
    each = job(PROMPTS[0], n=1, logit_bias=bias, stop_strings=TOKENIZER.stop_strings)
    listener.add(each)
    assert listener.result(each)[0] == ""


def test_the_queue_is_bounded_and_cancelled_jobs_make_room(start):
    listener = start(rows=1, max_queue=2)
    running = job(PROMPTS[0], n=120)
    waiting = [job(PROMPTS[1]) for _ in range(2)]
    listener.add(running)
    listener.wait_for_first(running)
    listener.add(*waiting)
    with pytest.raises(QueueFull):
        listener.add(job(PROMPTS[2]))
    listener.scheduler.cancel(waiting[0])
    assert listener.end(waiting[0]) == "late"
    last = job(PROMPTS[2])
    listener.add(last)
    listener.scheduler.cancel(running)
    assert listener.end(last) == listener.end(waiting[1]) == "length"
    assert running.n_tokens < 100
    with pytest.raises(QueueFull):  # more than could ever have room together
        listener.add(*(job(PROMPTS[0]) for _ in range(4)))


def test_a_job_ends_with_what_it_has_when_its_time_is_over(start, monkeypatch):
    listener = start(rows=1)
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)
    running = job(PROMPTS[0], n=120, seconds=0.2)
    waiting = job(PROMPTS[1], seconds=0.1)
    listener.add(running, waiting)
    _, ids, end, _ = listener.result(running)
    assert end == "length" and 1 <= len(ids) < 20
    assert listener.result(waiting)[1:3] == ([], "late")

    running = job(PROMPTS[0], n=120)
    listener.add(running)
    listener.wait_for_first(running)
    listener.scheduler.cancel_all()
    assert listener.end(running) == "length" and running.n_tokens < 60


def test_an_error_fails_the_running_jobs_and_the_next_ones_go_on(start, monkeypatch, capsys):
    listener = start(rows=2)
    step = Engine.step
    errors = [RuntimeError("out of memory")]

    def break_once(engine):
        if errors and len(engine.running) == 2:
            raise errors.pop()
        return step(engine)

    monkeypatch.setattr(Engine, "step", break_once)
    jobs = [job(PROMPTS[i]) for i in range(3)]
    listener.add(*jobs)
    assert [listener.end(each) for each in jobs] == ["error", "error", "length"]
    assert "out of memory" in capsys.readouterr().err and listener.scheduler.alive


def test_a_prompt_that_does_not_fit_fails_alone(start):
    listener = start(rows=1)
    too_long = job([1] * 1000)
    other = job(PROMPTS[0])
    listener.add(too_long, other)
    assert (listener.end(too_long), listener.end(other)) == ("error", "length")


def test_a_job_that_cannot_start_fails_and_the_next_ones_go_on(start, monkeypatch, capsys):
    listener = start(rows=1)
    add = Engine.add
    errors = [RuntimeError("out of memory")]

    def break_once(engine, *args, **options):
        if errors:
            raise errors.pop()
        return add(engine, *args, **options)

    monkeypatch.setattr(Engine, "add", break_once)
    jobs = [job(PROMPTS[i]) for i in range(2)]
    listener.add(*jobs)
    assert [listener.end(each) for each in jobs] == ["error", "length"]
    assert "out of memory" in capsys.readouterr().err


def test_a_job_without_new_tokens_ends_at_once_however_long_its_prompt(start):
    listener = start(rows=1)
    jobs = [job([1] * 128, n=0), job(PROMPTS[0], n=0), job(PROMPTS[0], n=3)]
    listener.add(*jobs)
    results = [listener.result(each) for each in jobs]
    assert [(text, end) for text, _, end, _ in results[:2]] == [("", "length")] * 2
    assert len(results[2][1]) == 3


def test_the_tokens_of_a_job_are_complete(start):
    """The last one may be half a character, and the stop id is listed if it is asked for."""
    half = TOKENIZER.encode("🙂")[0]
    listener = start()
    cut = job(PROMPTS[0], n=2, logit_bias={half: 100})
    stops = {"stop_ids": (half,), "logit_bias": {half: 100}, "logprobs": 1}
    listed, silent = job(PROMPTS[0], **stops, lists_end=True), job(PROMPTS[0], **stops)
    listener.add(cut, listed, silent)
    assert listener.result(cut)[1] == [half, half]
    assert listener.result(listed)[:3] == ("", [half], "stop") and listed.tokens[0].logprob < 0
    assert listener.result(silent)[:3] == ("", [], "stop")
    assert listed.n_tokens == silent.n_tokens == 0


def test_calls_happen_between_steps_in_the_thread_of_the_engine(start, monkeypatch):
    threads = set()
    step = Engine.step

    def noting_step(engine):
        threads.add(threading.current_thread())
        return step(engine)

    monkeypatch.setattr(Engine, "step", noting_step)
    listener = start()
    each = job(PROMPTS[0], n=100)
    listener.add(each)
    thread = listener.scheduler.call(threading.current_thread).result(10)
    assert each.n_tokens < 100  # it did not have to wait for the end
    with pytest.raises(ZeroDivisionError):
        listener.scheduler.call(lambda: 1 / 0).result(10)
    assert listener.end(each) == "length" and threads == {thread}


def test_what_loading_raises_is_raised():
    def load():
        raise FileNotFoundError("nowhere")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        Scheduler(load, 1)


def test_pieces_between_the_first_and_the_last_are_collected(model, start, monkeypatch):
    monkeypatch.setattr("serving.scheduler.DELIVERY_INTERVAL", 10.0)
    listener = start()
    each = job(PROMPTS[0], n=20, seed=1)
    listener.add(each)
    _, ids, _, n_pieces = listener.result(each)
    assert n_pieces == 2 and ids == alone(model, PROMPTS[0], n=20, seed=1)
