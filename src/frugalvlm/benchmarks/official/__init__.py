"""Official benchmarks: the papers' own questions, prompts and scores, from the Hugging Face Hub.

One file each. Data sets are taken at a fixed commit; of two that no source gave one for, the newest
one is taken when it is fetched.
"""

from __future__ import annotations

from frugalvlm.benchmarks.official.base import Asked, Official, RefusedError
from frugalvlm.benchmarks.official.chartqa import CHARTQA
from frugalvlm.benchmarks.official.data import DataError, Source
from frugalvlm.benchmarks.official.docvqa import DOCVQA
from frugalvlm.benchmarks.official.gqa import GQA
from frugalvlm.benchmarks.official.mmbench import MMBENCH, MMBENCH_CN
from frugalvlm.benchmarks.official.mme import MME, MME_PERCEPTION
from frugalvlm.benchmarks.official.ocrbench import OCRBENCH
from frugalvlm.benchmarks.official.pope import POPE
from frugalvlm.benchmarks.official.scienceqa import SCIENCEQA
from frugalvlm.benchmarks.official.seed import SEED
from frugalvlm.benchmarks.official.textvqa import TEXTVQA, TEXTVQA_PLAIN
from frugalvlm.benchmarks.official.vizwiz import VIZWIZ
from frugalvlm.benchmarks.official.vqav2 import VQAV2

__all__ = ["OFFICIAL", "REFUSED", "Asked", "DataError", "Official", "RefusedError", "Source",
           "official"]  # fmt: skip

OFFICIAL: dict[str, Official] = {
    benchmark.id: benchmark
    for benchmark in (
        GQA, MMBENCH, MMBENCH_CN, MME, MME_PERCEPTION, POPE, SCIENCEQA, VQAV2, TEXTVQA,
        TEXTVQA_PLAIN, SEED, VIZWIZ, CHARTQA, DOCVQA, OCRBENCH,
    )
}  # fmt: skip
_JUDGE = "its answers are graded by a chat model, and without one there is no number"
_CLOSED = (
    "its answers were graded by a GPT-3.5 that is retired, and two of its versions differ by more "
    "than ten points"
)
# What papers print and this kit gives no number for, and why.
REFUSED: dict[str, str] = {
    "mmvet": f"MM-Vet needs a judge: {_JUDGE}",
    "llava-bench": f"LLaVA-Bench needs a judge: {_JUDGE}",
    "tgif": f"TGIF-QA needs a judge: {_CLOSED}",
    "msvd": f"MSVD-QA needs a judge: {_CLOSED}",
    "msrvtt": f"MSRVTT-QA needs a judge: {_CLOSED}",
    "activitynet": f"ActivityNet-QA needs a judge: {_CLOSED}",
    "vqav2-testdev": "VQAv2 test-dev needs the challenge's server: take vqav2, its validation",
    "vizwiz-test": "VizWiz test needs the challenge's server: take vizwiz, its val split",
    "mmmu": "MMMU is not wired up yet: its questions hold up to seven pictures",
}


def official(name: str) -> Official:
    """The official benchmark with this id.

    Raises:
        RefusedError: it gives no number here, or nobody knows it; says why.
    """
    if name in REFUSED:
        raise RefusedError(f"{REFUSED[name]}.")
    if name not in OFFICIAL:
        raise RefusedError(
            f"Unknown official benchmark '{name}'. Known: {', '.join(OFFICIAL)}; without a number: "
            f"{', '.join(REFUSED)}."
        )
    return OFFICIAL[name]
