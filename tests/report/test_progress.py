"""Progress bars: a count never stands above its total."""

import io

import pytest
from rich.console import Console

from frugalvlm.reproduce.progress import Bars, progress


@pytest.fixture
def bars():
    with progress(Console(file=io.StringIO(), width=80)) as made:
        yield made


def counts(bars: Bars) -> tuple[float, float | None]:
    (task,) = bars.bar.tasks
    return task.completed, task.total


def test_whole_pictures_may_bring_more_questions_than_were_asked_for(bars: Bars) -> None:
    bars.start("attention", 20)
    bars.advance(18)
    assert counts(bars) == (18, 20)
    bars.advance(3)
    assert counts(bars) == (21, 21)


def test_a_new_run_takes_the_place_of_the_last(bars: Bars) -> None:
    bars.start("one", 2)
    bars.advance(2)
    bars.start("two", 5)
    assert counts(bars) == (0, 5)
