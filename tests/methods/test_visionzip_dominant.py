"""VisionZip without contextual tokens is VisionZip whose whole budget is dominant."""

import pytest
import torch
from tiny_hosts import model_for, prompt

from frugalvlm.methods import VisionZip, VisionZipDominant
from frugalvlm.views import BudgetError


def test_the_whole_budget_is_dominant():
    method = VisionZipDominant.for_budget(64)
    assert (method.dominant, method.contextual) == (64, 0)
    assert method.describe()["method"] == "visionzip_dominant"
    with pytest.raises(BudgetError):
        VisionZipDominant(54, 10)
    with pytest.raises(BudgetError):
        VisionZipDominant.for_budget(577)


@pytest.mark.parametrize("host", ["llava_clip", "llava_siglip"])
def test_answers_are_those_of_visionzip_with_c_of_0(host):
    model, inputs = model_for(host), prompt(host)

    def run(method):
        with torch.no_grad(), method.on(model) as trace:
            return model(**inputs).logits, trace

    ours, trace = run(VisionZipDominant(6))
    assert torch.equal(ours, run(VisionZip(6, 0))[0])
    assert not torch.allclose(ours[:, -1], run(VisionZip(4, 2))[0][:, -1])
    assert trace.tokens_per_layer == [6.0] * 4
