"""The generated parts of README.md and the model cards, rebuilt from committed records.

A block stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`. The opening marker may
pin what its records must have, e.g. `<!-- generated: table1-pocket machine=0123456789ab n=200 -->`;
then a newer run on another machine does not change it. Without pins the newest complete records
count.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import torch
from rich.console import Console

from frugalvlm.benchmarks import BENCHMARKS, HD_BENCHMARKS
from frugalvlm.errors import FrugalError
from frugalvlm.formats import NONE_PRINTED, NOT_MEASURED, plus_minus
from frugalvlm.loading import model_hash
from frugalvlm.papers import ORIGINS, SCALES, Paper, all_papers, load_paper
from frugalvlm.paths import project_root, published_dir
from frugalvlm.pocket.installed import models_dir
from frugalvlm.pocket.models import IMAGE_TOKEN, SPECS, build_model, build_processor, spec
from frugalvlm.probes import phenomena
from frugalvlm.report.display import name_of
from frugalvlm.report.support import support_table
from frugalvlm.report.tables import accuracy_table, blueprint_table
from frugalvlm.report.verdict_table import verdict_table
from frugalvlm.reproduce.problems import problems_told
from frugalvlm.runs.records import Record, latest, newest_setting, read_records
from frugalvlm.verdicts.decision import DECIDED, SHARE, STATUSES, UNTESTED, Verdict
from frugalvlm.verdicts.verdicts import all_verdicts

__all__ = ["BLOCKS", "ReadmeError", "check", "render", "update", "update_all"]

_BLOCK = re.compile(
    r"(?P<open><!-- generated: (?P<name>[\w-]+)(?P<pins>(?: [\w-]+=[^\s>]+)*) -->)\n"
    r"(?P<body>.*?)(?P<close><!-- end: (?P=name) -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!-- (?:generated|end): .*?-->")
_PINS = ("machine", "n", "device", "model", "split")


class ReadmeError(FrugalError, ValueError):
    """A marker that cannot be filled; the message names it and the remedy."""


def render(text: str, results: Path | None = None) -> str:
    """The text with every generated block rebuilt.

    Args:
        text: of a README.
        results: the folder of results; default: the repository's own, whatever the environment.

    Raises:
        ReadmeError: for an unknown block, a marker without its partner, or pins no record meets.
    """
    results = published_dir() if results is None else results
    markers, blocks = len(_MARKER.findall(text)), len(_BLOCK.findall(text))
    if markers != 2 * blocks:
        raise ReadmeError(
            f"{markers} markers but {blocks} blocks: each `<!-- generated: NAME -->` needs its "
            "`<!-- end: NAME -->` below it."
        )
    return _BLOCK.sub(lambda match: _filled(match, results), text)


def update(path: Path | None = None, results: Path | None = None) -> bool:
    """Rebuild the blocks of a README in place; returns whether anything changed."""
    path = project_root() / "README.md" if path is None else path
    old = path.read_text(encoding="utf-8")
    new = render(old, results)
    if new == old:
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(new, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def update_all() -> bool:
    """Rebuild the blocks of README.md and of the model cards; returns whether anything changed."""
    pages = [project_root() / "README.md", *sorted(models_dir().glob("*/README.md"))]
    with problems_told(Console(stderr=True)):
        changed = [update(page) for page in pages]
    return any(changed)


def check(path: Path | None = None, results: Path | None = None) -> list[str]:
    """Lines by which a README differs from its records, as a diff; none when it agrees."""
    path = project_root() / "README.md" if path is None else path
    old = path.read_text(encoding="utf-8")
    new = render(old, results)
    lines = old.splitlines(), new.splitlines()
    return list(difflib.unified_diff(*lines, path.name, "from the records", lineterm="", n=1))


def _filled(match: re.Match[str], results: Path) -> str:
    name = match["name"]
    if name not in BLOCKS:
        raise ReadmeError(f"Unknown block '{name}'. Known: {', '.join(BLOCKS)}.")
    pins = dict(pin.split("=", 1) for pin in match["pins"].split())
    unknown = [pin for pin in pins if pin not in _PINS]
    if unknown:
        raise ReadmeError(f"Block '{name}' pins '{unknown[0]}'. Known: {', '.join(_PINS)}.")
    # Blank lines around it: GitHub reads Markdown after a comment only then.
    return f"{match['open']}\n\n{BLOCKS[name](results, pins).strip()}\n\n{match['close']}"


def _pinned(folder: Path, pins: Mapping[str, str]) -> list[Record]:
    """The newest records of a folder that meet the pins; none when the folder has none at all."""
    known = read_records(folder)
    wanted: dict[str, Any] = {k: v for k, v in pins.items() if k != "machine"}
    if "n" in wanted:
        wanted["n"] = int(pins["n"])
    # A pin like n says nothing about kinds of runs that have no such thing.
    found = [
        r
        for r in known
        if r["provenance"]["machine"] == pins.get("machine", r["provenance"]["machine"])
        and all(r["request"][k] == v for k, v in wanted.items() if k in r["request"])
    ]
    if known and not found:
        raise ReadmeError(
            f"No record in {folder} meets {dict(pins)}: correct the marker or restore the records."
        )
    return newest_setting(found)


def _accuracy(paper: str, table: str) -> Callable[[Path, Mapping[str, str]], str]:
    def block(results: Path, pins: Mapping[str, str]) -> str:
        records = _pinned(results / "pocket" / paper / "records", pins)
        return accuracy_table(paper, table, records).to_markdown()

    return block


def _short(paper: str, table: str) -> Callable[[Path, Mapping[str, str]], str]:
    """Mean retention alone: a row per method, a column per budget, the paper's in brackets."""

    def block(results: Path, pins: Mapping[str, str]) -> str:
        records = _pinned(results / "pocket" / paper / "records", pins)
        data = accuracy_table(paper, table, records).data
        total = data["budget"].max()
        means = data[(data["benchmark"] == "mean") & (data["budget"] < total) & ~data["once"]]
        budgets = sorted(means["budget"].unique(), reverse=True)
        lines = [
            f"| method | {' | '.join(f'{b} of {total} tokens' for b in budgets)} |",
            f"| --- | {' | '.join('---:' for _ in budgets)} |",
        ]
        for label, own in means.groupby("label", sort=False):
            if own["retention"].isna().all() and means["retention"].notna().any():
                continue
            at = {line["budget"]: _mean(line) for line in own.to_dict("records")}
            cells = [at.get(b, NOT_MEASURED) for b in budgets]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        n = int(means["n"].max())
        note = (
            f"Mean score over {data['benchmark'].nunique() - 1} benchmarks, in % of the untouched "
            f"model's, with half of its 95 % interval (n = {n:,}). In brackets: what the paper's "
            "own numbers give on its model, where it has any."
        )
        return "\n".join([*lines, "", note])

    return block


def _mean(line: Mapping[str, Any]) -> str:
    if pd.isna(line["retention"]):
        return NOT_MEASURED
    printed = line["paper_retention"]
    beside = "" if pd.isna(printed) else f" ({printed:.1f})"
    ends = line["retention_low"], line["retention_high"]
    return f"{plus_minus(line['retention'], *ends, 1)}{beside}"


def _blueprint(paper: str) -> Callable[[Path, Mapping[str, str]], str]:
    def block(results: Path, pins: Mapping[str, str]) -> str:
        records = _pinned(results / "blueprint" / paper / "records", pins)
        return blueprint_table(paper, records).to_markdown()

    return block


def _verdicts(paper: str, scale: str) -> Callable[[Path, Mapping[str, str]], str]:
    def block(results: Path, pins: Mapping[str, str]) -> str:
        records = _pinned(results / scale / paper / "records", pins)
        found = all_verdicts(load_paper(paper), records, scale, results)
        return verdict_table(found).to_markdown()

    return block


def _papers(results: Path, pins: Mapping[str, str]) -> str:
    lines = [
        f"| key | paper | arXiv | kind | {' | '.join(SCALES)} |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in SCALES)} |",
    ]
    for paper in all_papers():
        states = " | ".join(paper.status[scale] for scale in SCALES)
        link = f"[{paper.arxiv}]({paper.url})"
        kinds = ", ".join(paper.kind)
        lines.append(f"| `{paper.key}` | {paper.title} | {link} | {kinds} | {states} |")
    return "\n".join(lines)


def _phenomena(results: Path, pins: Mapping[str, str]) -> str:
    if "model" not in pins:
        raise ReadmeError("Block 'phenomena' needs a pin: model=NAME.")
    known = [
        r
        for r in read_records(results / "pocket" / "benchmarks" / "records")
        if r["request"].get("model") == pins["model"]
        and r["provenance"]["model_hash"] == model_hash(pins["model"])
    ]
    maps = latest(r for r in known if r["kind"] == "phenomena")
    if not maps:
        return "Not looked for yet with these weights."
    found = phenomena.findings(maps[-1], phenomena.removal_frame(latest(known)))
    n = maps[-1]["images"]
    lines = [f"- **{PHENOMENA[key]}.** {sentence}" for key, sentence in found.items()]
    return "\n".join([*lines, "", f"Maps from {n} test pictures; 95 % intervals."])


def _models(results: Path, pins: Mapping[str, str]) -> str:
    lines = [
        "| model | architecture | parameters | visual tokens | right answers | blank picture | n |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in SPECS:
        path = models_dir() / name / "scores.json"
        if not path.is_file():
            continue
        known = json.loads(path.read_text())
        suite = [s for id, s in known.items() if id in BENCHMARKS | HD_BENCHMARKS]
        means = " | ".join(
            f"{np.mean([s[f'{state}_accuracy'] for s in suite]):.1f} %"
            for state in ("seeing", "blank")
        )
        with torch.device("meta"):
            model = build_model(name)
        picture = PIL.Image.new("RGB", (spec(name).side,) * 2)
        ids = build_processor(name)(images=picture, text=IMAGE_TOKEN)["input_ids"][0]
        lines.append(
            f"| [`{name}`](data/models/{name}/README.md) | `{type(model).__name__}` "
            f"| {model.num_parameters() / 1e6:.1f} M | {ids.count(model.config.image_token_id)} "
            f"| {means} | {len(suite)} x {suite[0]['n']} |"
        )
    return "\n".join(lines)


def _judged(results: Path) -> Iterator[tuple[Paper, str, list[Verdict]]]:
    """Published papers and scales with their verdicts."""
    for paper in all_papers():
        for scale in SCALES:
            if paper.status[scale] == "published":
                made = newest_setting(read_records(results / scale / paper.key / "records"))
                yield paper, scale, all_verdicts(paper, made, scale, results)


def _claims(results: Path, pins: Mapping[str, str]) -> str:
    """A line per paper, scale and origin of the claims."""
    lines = [
        f"| paper | scale | claims | {' | '.join(STATUSES)} | page |",
        f"| --- | --- | --- | {' | '.join('---:' for _ in STATUSES)} | --- |",
    ]
    for paper, scale, found in _judged(results):
        name = f"results/{scale}/{paper.key}/{paper.key}.ipynb"
        shown = (results / scale / paper.key / f"{paper.key}.ipynb").is_file()
        page = f"[notebook]({name})" if shown else "records"
        for origin in ORIGINS:
            counts = Counter(v.status for v in found if v.claim.origin == origin)
            cells = " | ".join(str(counts[status] or "") for status in STATUSES)
            if counts:
                lines.append(f"| `{paper.key}` | {scale} | {origin} | {cells} | {page} |")
    who = "; ".join(f"*{origin}*: made by {what}" for origin, what in ORIGINS.items())
    return "\n".join([*lines, "", f"{who}."])


def _claims_short(results: Path, pins: Mapping[str, str]) -> str:
    """A line per paper: its claims by what they are about, and what this kit adds, apart."""
    lines = [
        "| paper | its claims: accuracy | time and counts | findings | controls of this kit | "
        "by construction | not tested |",
        "| --- | --- | --- | --- | --- | ---: | ---: |",
    ]
    judged: dict[str, list[Verdict]] = {}
    for paper, _, found in _judged(results):
        judged.setdefault(paper.key, []).extend(found)
    for key, found in judged.items():
        own = [v for v in found if v.claim.origin == "paper"]
        tested = {v.claim.id for v in found if v.status not in UNTESTED}
        cells = [
            *(
                _tally(v for v in own if v.claim.about in about)
                for about in (("accuracy",), ("time", "count"), ("finding",))
            ),
            _tally(v for v in found if v.claim.origin == "kit"),
            str(sum(v.status == "by construction" for v in found)),
            str(len({v.claim.id for v in found} - tested)),
        ]
        lines.append(f"| {' | '.join([name_of(key), *cells])} |")
    note = (
        "Holds: the whole 95 % interval, corrected over the page by Holm's method, lies within "
        f"the claim's margin or beyond {100 * SHARE:.0f} % of the paper's effect. In direction: "
        "only its sign is sure. Refused: none of the interval meets the claim. Undecided: it holds "
        "both. By construction: identities, which test this kit and not the paper. A claim that is "
        "tested at two scales counts twice. The models here are small ones trained for this kit: "
        "what they refuse is refused for them."
    )
    return "\n".join([*lines, "", note])


def _tally(found: Iterable[Verdict]) -> str:
    counts = Counter(v.status for v in found)
    words = [s for s in (*DECIDED, "not comparable") if counts[s]]
    said = [f"{counts[s]} {s.removeprefix('holds ')}" for s in words]
    return ", ".join(said) or NONE_PRINTED


PHENOMENA = {
    "objects": "The tower looks at objects",
    "stages": "The text reads the image in three stages",
    "ranking": "Neighbouring layers rank visual tokens alike",
    "exit": "Late layers do not need the image",
}
BLOCKS: Mapping[str, Callable[[Path, Mapping[str, str]], str]] = {
    "table1-pocket": _accuracy("visionzip", "table1"),
    "table1-short": _short("visionzip", "table1"),
    "verdicts-pocket": _verdicts("visionzip", "pocket"),
    "blueprint-visionzip": _blueprint("visionzip"),
    "verdicts-blueprint": _verdicts("visionzip", "blueprint"),
    "papers": _papers,
    "phenomena": _phenomena,
    "models": _models,
    "support": lambda results, pins: support_table(),
    "claims": _claims,
    "claims-short": _claims_short,
}
