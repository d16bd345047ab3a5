"""Contract 8: a block belongs to the thread that opened it, and to those it starts inside."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_hosts import KEPT, Picture, fingerprint_of, make, model_for, prompt
from transformers.generation.streamers import BaseStreamer

from frugalvlm.engine import session
from frugalvlm.methods import FasterVLM, FastV, Vanilla, VisionZip
from frugalvlm.views import UnsupportedError

STEPS = 6
PROMPTS = [[[3, Picture(n), 4 + n]] for n in range(1, 4)]


def said(model, rows, **more):
    return model.generate(
        **prompt("llava_clip", rows), max_new_tokens=STEPS, do_sample=False, **more
    ).tolist()


@pytest.fixture
def model():
    """A model whose threads take turns as often as can be, and that is left as it was."""
    model, often = model_for("llava_clip"), sys.getswitchinterval()
    said(model, PROMPTS[0])
    before = fingerprint_of(model)
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    sys.setswitchinterval(1e-5)
    yield model
    sys.setswitchinterval(often)
    assert fingerprint_of(model) == before
    assert not session._SESSIONS
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == (start, submit)


def together(*jobs):
    """What the jobs give, each in a thread of its own that starts with the others."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def work(place, job):
        barrier.wait()
        try:
            results[place] = job()
        except Exception as problem:
            results[place] = problem

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    "keys",
    [
        ("fastervlm", "fastv"), ("fastervlm", "fastervlm"), ("fastv", "fastv"),
        ("visionzip", None), ("sgl", "sgl"), ("sparsevlm", None), ("early_exit", None),
        ("aim", "pyramiddrop"), ("vanilla", "fastv"),
    ],
)  # fmt: skip
def test_each_thread_has_its_own_block(model, keys):
    """None: a thread that runs the untouched model."""

    def job(key):
        def run():
            if key is None:
                return [said(model, rows) for rows in PROMPTS]
            with make(key).on(model) as trace:
                answers = [said(model, rows) for rows in PROMPTS]
                return answers, trace.tokens_per_layer

        return run  # fmt: skip

    alone = [job(key)() for key in keys]
    for _ in range(3):
        assert together(*map(job, keys)) == alone


def test_two_threads_inside_one_block(model):
    with FastV(KEPT).on(model):
        alone = [said(model, rows) for rows in PROMPTS]
        jobs = [lambda rows=rows: said(model, rows) for rows in PROMPTS]
        assert together(*jobs) == alone
    assert alone != [said(model, rows) for rows in PROMPTS]


def test_a_thread_of_the_server_keeps_the_untouched_model(model):
    """It was there before the block, as workers of a server are."""
    asked, answered, answers = threading.Event(), threading.Event(), []

    def serve():
        asked.wait()
        answers.append(said(model, PROMPTS[0]))
        answered.set()

    plain = said(model, PROMPTS[0])
    thread = threading.Thread(target=serve)
    thread.start()
    with VisionZip(4, 2).on(model):
        inside = said(model, PROMPTS[0])
        asked.set()
        assert answered.wait(60)
    thread.join()
    assert answers == [plain]
    assert inside != plain


def test_a_pool_serves_each_block_and_none(model):
    """A worker belongs to the block of whoever hands in the task, whenever it was hired."""
    plain = said(model, PROMPTS[0])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(said, model, PROMPTS[0]).result() == plain
        with FastV(3, k=1).on(model):
            inside = said(model, PROMPTS[0])
            assert pool.submit(said, model, PROMPTS[0]).result() == inside
        assert inside != plain
        assert pool.submit(said, model, PROMPTS[0]).result() == plain
    with FastV(3, k=1).on(model), ThreadPoolExecutor(1) as pool:
        assert pool.submit(said, model, PROMPTS[0]).result() == inside


class Slow(BaseStreamer):
    """Waits for the reader after the third token."""

    def __init__(self):
        self.seen, self.go, self.reached = 0, threading.Event(), threading.Event()

    def put(self, value):
        self.seen += 1
        if self.seen == 3:
            self.reached.set()
            assert self.go.wait(60)

    def end(self):
        pass


@pytest.mark.parametrize("key", ["visionzip", "fastv", "early_exit"])
def test_leaving_waits_for_a_thread_that_still_generates(model, key):
    with make(key).on(model):
        expected = said(model, PROMPTS[0])
    answers, slow = [], Slow()
    timer = threading.Timer(0.3, slow.go.set)
    with make(key).on(model):
        thread = threading.Thread(
            target=lambda: answers.append(said(model, PROMPTS[0], streamer=slow))
        )
        thread.start()
        assert slow.reached.wait(60)
        timer.start()
    thread.join()
    timer.join()
    assert answers == [expected], "the block was left while the answer was under way"


def test_an_inner_block_waits_for_the_outer_ones_thread(model):
    with VisionZip(4, 2).on(model):
        expected = said(model, PROMPTS[0])
        answers, slow = [], Slow()
        timer = threading.Timer(0.3, slow.go.set)
        thread = threading.Thread(
            target=lambda: answers.append(said(model, PROMPTS[0], streamer=slow))
        )
        thread.start()
        assert slow.reached.wait(60)
        timer.start()
        with FastV(3).on(model):
            inside = said(model, PROMPTS[0])
        thread.join()
        timer.join()
    assert answers == [expected]
    assert inside != expected


def test_a_thread_that_comes_too_late_is_told(model):
    go, problems = threading.Event(), []

    def work(generate):
        go.wait()
        try:
            generate(**prompt("llava_clip"), max_new_tokens=1)
        except UnsupportedError as problem:
            problems.append(str(problem))

    with FastV(KEPT).on(model):
        thread = threading.Thread(target=work, args=(model.generate,))
        thread.start()
    go.set()
    thread.join()
    assert problems
    assert "join the thread inside the block" in problems[0]


def test_a_thread_of_a_block_opens_none_of_its_own(model):
    def open_another():
        with FastV(KEPT).on(model):
            pass

    with VisionZip(4, 2).on(model):
        (problem,) = together(open_another)
    assert isinstance(problem, UnsupportedError)
    assert "thread that opened" in str(problem)


def test_a_trace_tells_of_one_prompt(model):
    """Two prompts at once: the trace is that of one of them, never a mixture."""
    rows = [[[3, Picture(1), 1, Picture(2), 4]], [[2, Picture(3), 5]]]
    with FastV(KEPT).on(model) as trace, torch.no_grad():
        for _ in range(10):
            together(*(lambda r=r: model(**prompt("llava_clip", r)) for r in rows))
            assert len(trace.kept) == len(trace._crops)
            assert trace.tokens_per_layer == [16, 16, KEPT, KEPT]
        assert trace.calls == 20


def test_blocks_that_only_watch_see_their_own_threads_prompts(model):
    with Vanilla().on(model) as trace:
        said(model, PROMPTS[0])
        with ThreadPoolExecutor(1) as pool:
            pool.submit(said, model, PROMPTS[1]).result()
        assert trace.calls == 2
    other = threading.Thread(target=said, args=(model, PROMPTS[0]))
    with FasterVLM(KEPT).on(model) as trace:
        pass
    other.start()
    other.join()
    assert trace.calls == 0
