"""Which threads a block belongs to: the one that opened it, and those that it starts inside.

A server's other threads see the untouched model, or have blocks of their own. A thread that streams
an answer, or a task that is handed to a pool, belongs to the block in which it was started. Python
(before 3.14) does not tell who started a thread; while blocks are open, `Thread.start` and
`ThreadPoolExecutor.submit` therefore note it, as tracing libraries do to carry their context along.

Code that `torch.compile` made does not run hooks as they come, and says nothing. While blocks are
open, compiled models therefore run as they are written.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch

_LOCK = threading.RLock()
_OPEN: list[Crew] = []
_EAGER = ExitStack()  # what the first block to open does to compiled code, and the last one undoes
_START, _SUBMIT = threading.Thread.start, ThreadPoolExecutor.submit
_HERE = threading.local()  # `hiring`: this thread is inside `submit`, which may start workers


class Crew:
    """The threads of one block.

    Attributes:
        opener: the thread that opened it.
    """

    def __init__(self) -> None:
        self.opener = threading.current_thread()
        self._members: WeakSet[threading.Thread] = WeakSet([self.opener])
        self._visits: Counter[threading.Thread] = Counter()  # of workers, task by task
        self._busy: Counter[threading.Thread] = Counter()
        self._idle = threading.Condition()

    def here(self) -> bool:
        """Whether the running thread belongs to the block."""
        thread = threading.current_thread()
        return thread in self._members or self._visits[thread] > 0

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
            _OPEN.append(self)

    def close(self) -> None:
        """Stop it."""
        with _LOCK:
            _OPEN.remove(self)
            if not _OPEN:
                _EAGER.close()
                threading.Thread.start = _START  # type: ignore[method-assign]
                ThreadPoolExecutor.submit = _SUBMIT  # type: ignore[method-assign]

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
    crews = _mine()

    @functools.wraps(task)
    def work(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for crew in crews:
                stack.enter_context(crew.visit())
            return task(*args, **kwargs)

    _HERE.hiring = True  # a worker serves others, too: it belongs to a block task by task
    try:
        return _SUBMIT(pool, work if crews else task, *args, **kwargs)
    finally:
        _HERE.hiring = False
