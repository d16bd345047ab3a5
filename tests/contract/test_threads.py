"""Contract 8: a block belongs to the thread that opened it, and to those it starts inside."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

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


# -- tasks of asyncio, which share a thread --------------------------------------------------------


def test_tasks_that_take_turns_have_their_own_blocks(model):
    """Each leaves its block only after the others have opened theirs, and not in that order."""
    keys = ("fastv", None, "visionzip", "early_exit", None)

    async def work(key, pause):
        if key is None:
            await asyncio.sleep(pause)
            return said(model, PROMPTS[0])
        with make(key).on(model):
            await asyncio.sleep(pause)
            first = said(model, PROMPTS[0])
            await asyncio.sleep(pause)
            assert said(model, PROMPTS[0]) == first
        return first

    async def all_of(pauses):
        return await asyncio.gather(*map(work, keys, pauses))

    alone = [asyncio.run(work(key, 0)) for key in keys]
    assert len({str(answer) for answer in alone}) > 2
    assert asyncio.run(all_of([0.5, 0.1, 0.2, 0.4, 0.3])) == alone


def test_tasks_belong_to_the_block_in_which_they_were_started(model):
    plain = said(model, PROMPTS[0])

    async def ask():
        return said(model, PROMPTS[0])

    async def work():
        outside = asyncio.create_task(ask())
        with FastV(3, k=1).on(model):
            inside = said(model, PROMPTS[0])
            started = [asyncio.create_task(ask()) for _ in range(2)]
            in_thread = await asyncio.to_thread(said, model, PROMPTS[0])
            answers = [await task for task in (outside, *started)]
        return inside, in_thread, *answers

    inside, in_thread, outside, *started = asyncio.run(work())
    assert inside != plain
    assert outside == plain
    assert started == [inside] * 2
    assert in_thread == inside


def test_a_block_around_a_loop_belongs_to_its_tasks(model):
    async def ask():
        return said(model, PROMPTS[0])

    with FastV(3, k=1).on(model):
        assert asyncio.run(ask()) == said(model, PROMPTS[0])


def test_a_task_of_a_block_opens_none_of_its_own(model):
    async def open_another():
        with FastV(KEPT).on(model):
            await asyncio.sleep(0)

    async def work():
        with VisionZip(4, 2).on(model):
            await asyncio.gather(open_another(), open_another())

    with pytest.raises(UnsupportedError, match="task of asyncio, was started inside"):
        asyncio.run(work())
    with VisionZip(4, 2).on(model), pytest.raises(UnsupportedError, match="thread that opened"):
        asyncio.run(open_another())


def test_a_block_that_a_task_left_open_goes_on(model):
    """As the cells of a notebook, each of which is a task, may open and leave one by hand."""
    with FastV(3, k=1).on(model):
        inside = said(model, PROMPTS[0])

    async def cell(do):
        return do()

    block = FastV(3, k=1).on(model)
    asyncio.run(cell(block.__enter__))
    assert asyncio.run(cell(lambda: said(model, PROMPTS[0]))) == inside
    asyncio.run(cell(lambda: block.__exit__(None, None, None)))
    assert said(model, PROMPTS[0]) != inside


# -- threads that were there before ----------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda pool, job: pool.apply(job, ()),
        lambda pool, job: pool.apply_async(job).get(),
        lambda pool, job: pool.map(lambda _: job(), [0])[0],
        lambda pool, job: pool.starmap(lambda *_: job(), [(0, 0)])[0],
        lambda pool, job: next(pool.imap(lambda _: job(), [0])),
        lambda pool, job: next(pool.imap_unordered(lambda _: job(), [0])),
    ],
)
def test_a_pool_of_multiprocessing_serves_each_block_and_none(model, ask):
    def job():
        return said(model, PROMPTS[0])

    plain = job()
    before = dict(vars(ThreadPool))
    with ThreadPool(1) as pool:
        assert ask(pool, job) == plain
        with FastV(3, k=1).on(model):
            inside = job()
            assert ask(pool, job) == inside
        assert ask(pool, job) == plain != inside
    assert dict(vars(ThreadPool)) == before


def test_a_worker_that_takes_a_context_along_belongs_to_the_block(model):
    """As AnyIO's do: the thread was there before, and runs what it is given in a copied context."""
    jobs, answers = queue.Queue(), queue.Queue()

    def work():
        for context, job in iter(jobs.get, None):
            answers.put(job() if context is None else context.run(job))

    def ask(context):
        jobs.put((context, lambda: said(model, PROMPTS[0])))
        return answers.get(timeout=60)

    worker = threading.Thread(target=work)
    worker.start()
    plain = ask(None)
    with FastV(3, k=1).on(model):
        inside = said(model, PROMPTS[0])
        assert ask(contextvars.copy_context()) == inside
        assert ask(None) == plain != inside, "nobody can tell whom it works for"
    assert ask(contextvars.copy_context()) == plain
    jobs.put(None)
    worker.join()
