"""Several methods on one model as one block: its parts entered in order, left in reverse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from frugalvlm.methods.base import Composed
from frugalvlm.operators import operates
from frugalvlm.trace import ExitTrace, Trace


@operates(Composed)
@contextmanager
def all_of(
    method: Composed, model: PreTrainedModel, placeholders: Tensor | None = None
) -> Iterator[Trace]:
    """Run a model with a composed method; see `Method.on`.

    Every block that touches visual tokens traces what all of them kept, so one trace is enough;
    where a part lets tokens leave early, it tells of these exits, too.

    Raises:
        UnsupportedError: a part does not suit the model, or two do not go together.
    """
    with ExitStack() as stack:
        traces = [stack.enter_context(part.on(model, placeholders)) for part in method.members]
        visual = [trace for trace in traces if not isinstance(trace, ExitTrace)]
        exits = [trace for trace in traces if isinstance(trace, ExitTrace)]
        yield _both(visual[0], exits[0]) if visual and exits else traces[0]


def _both(visual: Trace, leaving: ExitTrace) -> ExitTrace:
    """One trace over two that are still being written."""
    both = ExitTrace(visual.grid, visual.decoder_layers)
    both.__dict__ = visual.__dict__  # shared, not copied: prompts to come must show, too
    both.exits = leaving.exits
    return both
