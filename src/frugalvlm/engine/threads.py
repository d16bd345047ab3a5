"""Which threads a block belongs to: the one that opened it, and those that it starts inside.

A server's other threads see the untouched model, or have blocks of their own. A thread that streams
an answer, or a task that is handed to a pool, belongs to the block in which it was started. Python
(before 3.14) does not tell who started a thread; while blocks are open, `Thread.start` and the ways
to hand a task to a pool therefore note it, as tracing libraries do to carry their context along.

Tasks of asyncio share one thread and take turns wherever one awaits something. A block that was
opened in a task belongs to that task and to those that it starts inside; the others see the
untouched model. What runs in a context that was copied inside (`asyncio.to_thread`, the threads of
AnyIO) belongs to the block, too.

Nobody can tell for whom a thread works that was there before the block and takes its work from a
queue of the user's own: it sees the untouched model. And `generate`, once the last block is left,
is the model's own again, whoever calls it.

Code that `torch.compile` made does not run hooks as they come, and says nothing. While blocks are
open, compiled models therefore run as they are written.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from multiprocessing.pool import ThreadPool
from typing import Any
from weakref import WeakSet

import torch

_LOCK = threading.RLock()
_OPEN: list[Crew] = []
_EAGER = ExitStack()  # what the first block to open does to compiled code, and the last one undoes
_START, _SUBMIT = threading.Thread.start, ThreadPoolExecutor.submit
_HERE = threading.local()  # `hiring`: this thread is inside `submit`, which may start workers
_INSIDE: ContextVar[frozenset[Crew]] = ContextVar("_INSIDE", default=frozenset())
_HANDED = (
    "apply",
    "apply_async",
    "map",
    "map_async",
    "starmap",
    "starmap_async",
    "imap",
    "imap_unordered",
)  # fmt: skip - how a `ThreadPool` takes a task


class Crew:
    """The threads of one block.

    Attributes:
        opener: the thread that opened it.
    """

    def __init__(self) -> None:
        self.opener = threading.current_thread()
        self._task = _running_task()  # in which it was opened
        self._members: WeakSet[threading.Thread] = WeakSet([self.opener])
        self._visits: Counter[threading.Thread] = Counter()  # of workers, task by task
        self._busy: Counter[threading.Thread] = Counter()
        self._idle = threading.Condition()

    def here(self) -> bool:
        """Whether the running thread, and the task in it, belong to the block."""
        thread = threading.current_thread()
        if self._visits[thread] > 0 or self in _INSIDE.get():
            return True
        return self._whole_thread() if thread is self.opener else thread in self._members

    def leads(self) -> bool:
        """Whether the running thread, and the task in it, are those that opened the block."""
        if threading.current_thread() is not self.opener:
            return False
        left_open = self._task is not None and self._task.done()  # by the cell of a notebook
        return left_open or _running_task() is self._task

    def _whole_thread(self) -> bool:
        """Whether the block belongs to all that its opener's thread does."""
        return self._task is None or self._task.done() or _running_task() is self._task

    def add(self, thread: threading.Thread) -> None:
        """A thread that one of them starts."""
        self._members.add(thread)

    @contextmanager
    def visit(self) -> Iterator[None]:
        """The running thread belongs to the block for as long as a task takes."""
        thread = threading.current_thread()
        self._visits[thread] += 1
        try:
            yield
        finally:
            self._visits[thread] -= 1

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The running thread generates."""
        thread = threading.current_thread()
        with self._idle:
            self._busy[thread] += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy[thread] -= 1
                self._idle.notify_all()

    def open(self) -> None:
        """Begin to note which threads the members start."""
        with _LOCK:
            if not _OPEN:
                _EAGER.enter_context(torch.compiler.set_stance("force_eager"))
                threading.Thread.start = _start  # type: ignore[method-assign,assignment]
                ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign,assignment]
                for name in _HANDED:
                    setattr(ThreadPool, name, _handing(getattr(ThreadPool, name)))
            _OPEN.append(self)
        _INSIDE.set(_INSIDE.get() | {self})

    def close(self) -> None:
        """Stop it."""
        _INSIDE.set(_INSIDE.get() - {self})
        with _LOCK:
            _OPEN.remove(self)
            if not _OPEN:
                _EAGER.close()
                threading.Thread.start = _START  # type: ignore[method-assign]
                ThreadPoolExecutor.submit = _SUBMIT  # type: ignore[method-assign]
                for name in _HANDED:
                    delattr(ThreadPool, name)  # they are its base class's

    def wait(self) -> None:
        """Wait until no other thread of the block generates."""
        me = threading.current_thread()
        with self._idle:
            self._idle.wait_for(lambda: not any(n for t, n in self._busy.items() if t is not me))

    def started(self) -> list[threading.Thread]:
        """Its threads but the one that opened it."""
        return [thread for thread in self._members if thread is not self.opener]


def _mine() -> list[Crew]:
    with _LOCK:
        return [crew for crew in _OPEN if crew.here()]


@functools.wraps(_START)
def _start(thread: threading.Thread) -> None:
    if not getattr(_HERE, "hiring", False):
        for crew in _mine():
            crew.add(thread)
    _START(thread)


@functools.wraps(_SUBMIT)  # type: ignore[arg-type]
def _submit(pool: ThreadPoolExecutor, task: Callable, /, *args: Any, **kwargs: Any) -> Future:
    work = _of_the_block(task)
    _HERE.hiring = True  # a worker serves others, too: it belongs to a block task by task
    try:
        return _SUBMIT(pool, work, *args, **kwargs)
    finally:
        _HERE.hiring = False


def _handing(hand: Callable) -> Callable:
    """A method of pools that takes a task."""

    @functools.wraps(hand)
    def handed(pool: ThreadPool, func: Callable, *args: Any, **kwargs: Any) -> Any:
        return hand(pool, _of_the_block(func), *args, **kwargs)

    return handed


def _of_the_block(task: Callable) -> Callable:
    """A task that belongs, wherever it runs, to the blocks that are open here."""
    crews = _mine()
    if not crews:
        return task

    @functools.wraps(task)
    def work(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for crew in crews:
                stack.enter_context(crew.visit())
            return task(*args, **kwargs)

    return work


def _running_task() -> asyncio.Task | None:
    """The task of asyncio that the running thread is in."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs
        return None
