"""Jobs come and go between steps: each gets the text it would get alone; how many wait, and how long, is bounded."""

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
from serving.scheduler import Full, Job, Scheduler

TOKENIZER = Tokenizer()
PROMPTS = [
    TOKENIZER.encode(text)
    for text in ("hello there", "how are you today?", "i like tea", "what? " * 20)
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(128, 50257, 2, 2, 32))


@pytest.fixture
def start(model):
    """Start a Scheduler: start(rows, max_queue) -> (scheduler, what each job has heard so far)."""
    started = []

    def make(rows=2, max_queue=100):
        heard = {}

        def deliver(pieces):
            for job, piece in pieces:
                heard.setdefault(job, queue.Queue()).put(piece)

        def load():
            return Engine(model, rows, n_vocab=TOKENIZER.n_vocab, prefill_tokens=8)

        started.append(Scheduler(load, max_queue, deliver))
        return started[-1], heard

    yield make
    for scheduler in started:
        scheduler.close()
        assert not scheduler.thread.is_alive()


def job(prompt, n=10, seed=0, **options):
    return Job(None, prompt, Sampling(n, 1.0, top_k=50), TOKENIZER, seed=seed, **options)


def result(heard, job, timeout=30):
    """Return (text, Tokens, how it ended) of a job, and how many pieces it came in."""
    deadline, text, tokens, n = time.monotonic() + timeout, "", [], 0
    while True:
        while job not in heard:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        piece = heard[job].get(timeout=timeout)
        text, tokens, n = text + piece.text, tokens + piece.tokens, n + 1
        if piece.ended:
            assert heard[job].empty()  # nothing comes behind the end
            return text, tokens, piece.ended, n


def alone(model, prompt, n=10, seed=0, **options):
    return generate(
        model, [prompt], max_new_tokens=n, top_k=50, seed=seed, tokenizer=TOKENIZER, **options
    )[0]


def test_of_many_jobs_each_gets_what_it_would_get_alone(model, start):
    scheduler, heard = start(rows=3)
    jobs = [job(PROMPTS[i % 4], n=3 + i, seed=i) for i in range(20)]
    scheduler.add(*jobs[:12])
    for each in jobs[12:]:
        time.sleep(0.01)
        scheduler.add(each)
    for i, each in enumerate(jobs):
        text, tokens, ended, _ = result(heard, each)
        expected = alone(model, PROMPTS[i % 4], n=3 + i, seed=i)
        assert [token.id for token in tokens] == expected and ended == "length"
        assert text == TOKENIZER.decode(expected).rstrip("\ufffd") or text == TOKENIZER.decode(
            expected
        )
        assert each.n_tokens == 3 + i


def test_a_stop_string_ends_a_job_before_it_and_takes_its_tokens(model, start):
    ids = alone(model, PROMPTS[0], n=40, seed=3)
    stop = TOKENIZER.decode(ids)[30:36]
    scheduler, heard = start()
    scheduler.add(each := job(PROMPTS[0], n=40, seed=3, stop_strings=(stop,)))
    text, tokens, ended, _ = result(heard, each)
    assert ended == "stop" and text == TOKENIZER.decode(ids).partition(stop)[0]
    assert [token.id for token in tokens] == alone(
        model, PROMPTS[0], n=40, seed=3, stop_strings=(stop,)
    )


def test_a_stop_id_ends_a_job_with_what_was_held_back(model, start):
    ids = alone(model, PROMPTS[1], n=20, seed=4)
    scheduler, heard = start()
    stops = {"stop_ids": (ids[10],), "stop_strings": (TOKENIZER.decode(ids[9:10])[-1:] + "never",)}
    scheduler.add(each := job(PROMPTS[1], n=20, seed=4, **stops))
    text, tokens, ended, _ = result(heard, each)
    first = ids.index(ids[10])
    assert ended == "stop" and [token.id for token in tokens] == ids[:first]
    assert text == TOKENIZER.decode(ids[:first])


def test_the_queue_is_bounded_and_cancelled_jobs_make_room(start):
    scheduler, heard = start(rows=1, max_queue=2)
    running, waiting = job(PROMPTS[0], n=120), [job(PROMPTS[1]) for _ in range(2)]
    scheduler.add(running)
    while running not in heard:
        time.sleep(0.001)
    scheduler.add(*waiting)
    with pytest.raises(Full):
        scheduler.add(job(PROMPTS[2]))
    scheduler.cancel(waiting[0])
    scheduler.add(last := job(PROMPTS[2]))
    scheduler.cancel(running)
    assert result(heard, last)[2] == result(heard, waiting[1])[2] == "length"
    assert waiting[0] not in heard and running.n_tokens < 100
    with pytest.raises(Full):  # more than could ever have a place together
        scheduler.add(*(job(PROMPTS[0]) for _ in range(4)))


def test_a_job_whose_time_is_over_ends_with_what_it_has_or_before_it_began(start, monkeypatch):
    scheduler, heard = start(rows=1)
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.02), step(engine))[1])
    running, waiting = job(PROMPTS[0], n=120, seconds=0.2), job(PROMPTS[1], seconds=0.1)
    scheduler.add(running, waiting)
    _, tokens, ended, _ = result(heard, running)
    assert ended == "length" and 1 <= len(tokens) < 20
    assert result(heard, waiting)[1:3] == ([], "late")
    scheduler.add(running := job(PROMPTS[0], n=120))
    while running not in heard:
        time.sleep(0.001)
    scheduler.hurry()
    assert result(heard, running)[2] == "length" and running.n_tokens < 60


def test_what_breaks_is_heard_by_those_who_run_and_the_next_ones_go_on(start, monkeypatch, capsys):
    scheduler, heard = start(rows=2)
    step, broken = Engine.step, threading.Event()

    def breaks(engine):
        if not broken.is_set() and len(engine.running) == 2:
            broken.set()
            raise RuntimeError("out of memory")
        return step(engine)

    monkeypatch.setattr(Engine, "step", breaks)
    jobs = [job(PROMPTS[i]) for i in range(3)]
    scheduler.add(*jobs)
    assert [result(heard, each)[2] for each in jobs] == ["error", "error", "length"]
    assert "out of memory" in capsys.readouterr().err


def test_what_is_called_between_steps_is_called_in_the_engines_thread(start):
    scheduler, heard = start()
    scheduler.add(each := job(PROMPTS[0]))
    assert scheduler.call(threading.current_thread).result(10) is scheduler.thread
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 / 0).result(10)
    assert result(heard, each)[2] == "length"


def test_what_loading_raises_is_raised():
    def load():
        raise FileNotFoundError("nowhere")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        Scheduler(load, 1)


def test_the_more_jobs_run_the_more_of_each_is_told_at_once(model, start, monkeypatch):
    monkeypatch.setattr("serving.scheduler.PAUSE", 10.0)
    scheduler, heard = start(rows=2)
    scheduler.add(each := job(PROMPTS[0], n=20, seed=1))
    _, tokens, _, pieces = result(heard, each)
    assert pieces == 2  # the first token at once, the others with the end
    assert [token.id for token in tokens] == alone(model, PROMPTS[0], n=20, seed=1)


def test_a_call_that_nobody_waits_for_any_more_and_a_prompt_that_is_too_long_stop_nothing(start):
    scheduler, heard = start()
    scheduler.call(lambda: time.sleep(0.2))
    assert scheduler.call(lambda: 1).cancel()
    scheduler.add(long := job([5] * 500), short := job(PROMPTS[0]))
    assert result(heard, long)[2] == "error" and result(heard, short)[2] == "length"


def test_where_a_reply_is_cut_only_what_may_be_a_marker_is_held_back(start):
    scheduler, heard = start()
    stops = (TOKENIZER.stop_strings[0], "iXX")
    jobs = [
        job(PROMPTS[0], n=1, logit_bias={TOKENIZER.encode(t)[0]: 100}, stop_strings=stops)
        for t in ("[", "i")
    ]
    scheduler.add(*jobs)
    assert [result(heard, each)[0] for each in jobs] == ["", "i"]
