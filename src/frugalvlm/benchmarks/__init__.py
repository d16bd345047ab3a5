"""Pocket benchmarks: small stand-ins for the official ones, with the official metrics.

`BENCHMARKS` is the suite that tables show and average. Those about large pictures, with long
answers, or about clips stand apart: a mean over the suite is the same with and without them.
"""

from dataclasses import replace

from frugalvlm.benchmarks.base import Benchmark, Sheet, prompt
from frugalvlm.benchmarks.pocket_caption import POCKET_CAPTION
from frugalvlm.benchmarks.pocket_gqa import POCKET_GQA
from frugalvlm.benchmarks.pocket_mme import POCKET_MME
from frugalvlm.benchmarks.pocket_pope import POCKET_POPE
from frugalvlm.benchmarks.pocket_sqa import POCKET_SQA
from frugalvlm.benchmarks.pocket_textvqa import POCKET_TEXTVQA
from frugalvlm.benchmarks.pocket_video import POCKET_VIDEO
from frugalvlm.benchmarks.pocket_vqav2 import POCKET_VQAV2
from frugalvlm.pocket.scenes import IMAGE_SIZE

BENCHMARKS: dict[str, Benchmark] = {
    "pocket-gqa": POCKET_GQA,
    "pocket-pope": POCKET_POPE,
    "pocket-mme": POCKET_MME,
    "pocket-textvqa": POCKET_TEXTVQA,
    "pocket-sqa": POCKET_SQA,
    "pocket-vqav2": POCKET_VQAV2,
}
# The same questions about scenes of 192 x 192 pixels, in which print and things are small.
HD_BENCHMARKS: dict[str, Benchmark] = {
    f"{id}-hd": replace(
        benchmark, id=f"{id}-hd", first_seed=benchmark.first_seed + 20_000_000, side=2 * IMAGE_SIZE
    )
    for id, benchmark in BENCHMARKS.items()
}
LONG_BENCHMARKS: dict[str, Benchmark] = {"pocket-caption": POCKET_CAPTION}
VIDEO_BENCHMARKS: dict[str, Benchmark] = {"pocket-video": POCKET_VIDEO}
ALL_BENCHMARKS = BENCHMARKS | HD_BENCHMARKS | LONG_BENCHMARKS | VIDEO_BENCHMARKS


def load_benchmark(id: str) -> Benchmark:
    """The benchmark with this id.

    Raises:
        ValueError: for an unknown id; the message lists the known ones.
    """
    if id not in ALL_BENCHMARKS:
        raise ValueError(f"Unknown benchmark '{id}'. Known: {', '.join(ALL_BENCHMARKS)}.")
    return ALL_BENCHMARKS[id]


__all__ = [
    "ALL_BENCHMARKS",
    "BENCHMARKS",
    "HD_BENCHMARKS",
    "LONG_BENCHMARKS",
    "VIDEO_BENCHMARKS",
    "Benchmark",
    "Sheet",
    "load_benchmark",
    "prompt",
]
