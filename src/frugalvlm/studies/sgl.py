"""SGL beyond its main table: where the ranking comes from, when the guide suffices, what it costs.

All at the table's smallest budget, where the ranking matters most:

- sources (Tables 2 and 3): accuracy records of variants that read other layers or other tokens, of
  the large model's own ranking (one layer; all layers, the oracle), and of a random one.
- exit (SEE): the guide's answers with confidence and consistency. The most sure questions keep the
  guide's answer, the others get that of the guided large model; each share of exits gives a score
  and a mean cost. Accuracy records at one share let the criteria be compared in pairs.
- agreement: how alike rankings are to that of the large model's layers together.
- cost: what the guide adds, part by part.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.benchmarks import Benchmark, load_benchmark, stats
from frugalvlm.benchmarks.asking import Batches
from frugalvlm.engine.guidance import Guidance, Guide
from frugalvlm.hosts import host_for
from frugalvlm.methods import SGL, FastV, Method
from frugalvlm.methods.sgl import LAST_PROMPT, confidence, exit_score
from frugalvlm.papers import load_paper
from frugalvlm.runs import records
from frugalvlm.runs.accuracy import accuracy_run
from frugalvlm.runs.costs import flops_parts
from frugalvlm.runs.guides import load_guide
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting, find_run, write_run
from frugalvlm.studies.base import Study

BENCHMARKS = ("pocket-textvqa", "pocket-gqa", "pocket-vqav2")  # paper: TextVQA, SEED, RefCOCO
CRITERIA = ("mean", "confidence", "consistency")
SHARES = tuple(i / 10 for i in range(11))
EXIT_SHARE = 0.4  # the paper speaks of 20, 40 and 60 % of the questions
IMAGES = 100  # prompts whose rankings are compared, at most

Plan = list[tuple[Method, int]]


def run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    options: Options,
    reporter: Reporter,
) -> list[Record]:
    """All records of these analyses, measured or found."""
    guide = load_guide(options, processor)
    heard: dict[bytes, Guidance] = {}
    (layout,) = [t for t in load_paper("sgl").tables if t.id == "sources"]
    patches = host_for(model).shape.patches
    budget = layout.model.kept(layout.budgets[0], patches)
    assert budget is not None
    measured = replace(SGL.for_budget(budget, patches), guide=guide)
    method = replace(measured, guide=_Remembering(guide, heard))
    names = [name for name in BENCHMARKS if name in (options.benchmarks or BENCHMARKS)]
    made, large = [], {}
    prepared = {}
    for name in names or options.benchmarks or ():
        benchmark = load_benchmark(name)
        batches = Batches(benchmark, processor, setting.split, setting.n, setting.device)
        prepared[name] = (benchmark, batches)
        large[name] = accuracy_run(setting, model, benchmark, batches, method, budget, reporter)
        made += [
            accuracy_run(setting, model, benchmark, batches, variant, budget, reporter)
            for variant in variants(method, model)
        ]
    if not setting.timed:  # the exit's costs are among what is measured below
        return made
    first = next(iter(prepared.values()))[1]
    cost = _cost_run(setting, model, measured, first, options.repeats, reporter)
    leave = _exit_run(setting, method, prepared, large, cost, reporter)
    made += [cost, leave, _agreement_run(setting, model, method, first, reporter)]
    for name, (benchmark, batches) in prepared.items():
        made += _exits(setting, method, leave, large[name], benchmark, batches)
    return made


# -- sources of the ranking ------------------------------------------------------------------------


class _Remembering(Guide):
    """A guide that is asked for the same prompts by every variant, and answers them once.

    Not for anything that measures cost.
    """

    def __init__(self, guide: Guide, heard: dict[bytes, Guidance], name: str = "") -> None:
        super().__init__(guide.model, name or guide.name, guide.max_new_tokens)
        self.heard = heard

    def forward(self, inputs: dict[str, Any], placeholders: Tensor | None = None) -> Guidance:
        digest = hashlib.blake2b(digest_size=16)
        for name in ("input_ids", "attention_mask", "pixel_values"):
            if isinstance(value := inputs.get(name), Tensor):
                raw = value.detach().contiguous().view(torch.uint8).cpu().numpy()
                digest.update(f"{name} {tuple(value.shape)}".encode() + raw.tobytes())
        key = digest.digest()
        if key not in self.heard:
            self.heard[key] = super().forward(inputs, placeholders)
        return self.heard[key]


class _Blindfold(_Remembering):
    """Ranks at random: what any ranking has to beat."""

    def forward(self, inputs: dict[str, Any], placeholders: Tensor | None = None) -> Guidance:
        found = super().forward(inputs, placeholders)
        noise = torch.rand(found.attention.shape, generator=torch.Generator().manual_seed(0))
        noise = noise.to(found.attention.device).masked_fill(found.attention < 0, -1)
        return replace(found, attention=noise)


def variants(method: SGL, model: PreTrainedModel) -> list[Method]:
    """The same cut and budget by other rankings; each under a name of its own."""
    guide = method.guide
    assert isinstance(guide, _Remembering)
    (cut,) = method.layers(host_for(model).shape.decoder_layers)
    knobs: dict[str, dict[str, Any]] = {
        "sgl_first_10": {"guide_to": 0.1},
        "sgl_first_30": {"guide_to": 0.3},
        "sgl_first_50": {"guide_to": 0.5},
        "sgl_first_70": {"guide_to": 0.7},
        "sgl_last_50": {"guide_from": 0.5},
        "sgl_last_layer": {"guide_from": 1.0},
        "sgl_oracle": {"guide": Guide(copy.deepcopy(model), "the large model")},
        "sgl_last_prompt": {"queries": "last_prompt"},
        "sgl_prompt": {"queries": "prompt"},
        "sgl_generated": {"queries": "generated"},
        "sgl_random": {"guide": _Blindfold(guide, guide.heard, "random")},
    }
    own = {name: getattr(method, name) for name in ("kept_tokens", "depth", "guide")}
    return [
        _named("sgl_one_layer", FastV)(method.kept_tokens, cut),
        *(_named(key, SGL)(**{**own, **changed}) for key, changed in knobs.items()),
    ]


def _named(key: str, method: type[Method]) -> Any:
    """The method under another key; its code is still that of the method's file."""
    return type(key, (method,), {"key": key, "__module__": method.__module__})


# -- the guide's own answer ------------------------------------------------------------------------


@torch.inference_mode()
def _answers(method: SGL, batches: Batches) -> dict[str, tuple[str, float, float]]:
    """By question: the guide's answer, its confidence and its consistency."""
    guide, found = method.guide, {}
    assert guide is not None
    padding = batches.processor.tokenizer.pad_token_id
    for ids, inputs in batches.batches:
        guidance = guide(inputs)
        said = guidance.answer.masked_fill(~guidance.valid, padding)
        texts = batches.processor.batch_decode(said, skip_special_tokens=True)
        sure = confidence(guidance.log_probs, guidance.valid).tolist()
        stable = guide.consistency(guidance, method.importance(guidance.attention)).tolist()
        for i, text, a, b in zip(ids, texts, sure, stable, strict=True):
            found[i] = (text.strip(), a, b)
    return found


def _scores(leave: Record, name: str, criterion: str) -> np.ndarray:
    sure, stable = (np.array(leave["questions"][name][key]) for key in CRITERIA[1:])
    mean = exit_score(torch.tensor(sure), torch.tensor(stable)).numpy()
    return {"mean": mean, "confidence": sure, "consistency": stable}[criterion]


def _mixed(
    leave: Record, large: Record, name: str, criterion: str, share: float
) -> tuple[list[str | None], float | None]:
    """Answers when this share of the questions exits, and the threshold that makes them exit."""
    score = _scores(leave, name, criterion)
    order = np.argsort(-score, kind="stable")
    out = order[: round(share * len(order))]
    answers = [answer for _, answer in large["answers"]]
    for i in out:
        answers[i] = leave["questions"][name]["answers"][i]
    return answers, float(score[out[-1]]) if len(out) else None


def _exit_run(
    setting: Setting, method: SGL, prepared: Mapping[str, tuple[Benchmark, Batches]],
    large: Mapping[str, Record], cost: Record, reporter: Reporter,
) -> Record:  # fmt: skip
    """Score and cost against the share of questions that the guide answers, by criterion."""
    asked = {name: batches.data_hash for name, (_, batches) in prepared.items()}

    def measured() -> dict[str, Any]:
        parts = cost["flops"]
        asking = dict.fromkeys(CRITERIA, parts["guide"] + parts["consistency"])
        asking["confidence"] = parts["guide"]  # known from the answer itself
        made: dict[str, Any] = {"questions": {}, "curve": []}
        for name, (benchmark, batches) in prepared.items():
            told = _answers(method, batches)
            columns = list(zip(*(told[i] for i in batches.ids), strict=True))
            made["questions"][name] = dict(
                zip(("answers", *CRITERIA[1:]), map(list, columns), strict=True)
            )
            for criterion in CRITERIA:
                for share in SHARES:
                    answers, threshold = _mixed(made, large[name], name, criterion, share)
                    found = stats.interval(benchmark.sheet(batches.rows, answers))
                    made["curve"].append({
                        "benchmark": name, "criterion": criterion, "share": share,
                        "threshold": threshold, "score": found.value, "low": found.low,
                        "high": found.high,
                        "flops": asking[criterion] + (1 - share) * parts["large"],
                    })  # fmt: skip
            reporter.advance(1)
        return made

    more = {"asked": asked, "shares": SHARES}
    return _analysis(setting, "exit", method, more, measured, reporter, len(prepared))


def _exits(
    setting: Setting, method: SGL, leave: Record, large: Record, benchmark: Benchmark,
    batches: Batches,
) -> list[Record]:  # fmt: skip
    """Accuracy records of the guide alone, and of the exit at one share by each criterion."""
    name, guide = benchmark.id, leave["request"]["method"]["guide"]
    assert method.guide is not None
    layers = method.guide.host.shape.decoder_layers
    patches = int(large["tokens"]["per_layer"][0])  # before the cut every token is there
    whole = {"requested": patches, "per_layer": [float(patches)] * layers, "spread": []}
    alone = leave["questions"][name]["answers"]
    made = [_told(setting, large, {"method": "sgl_small", "guide": guide}, benchmark, batches,
                  alone, whole)]  # fmt: skip
    for criterion in CRITERIA:
        key = "sgl_exit" if criterion == "mean" else f"sgl_exit_{criterion}"
        described = {**large["request"]["method"], "method": key, "exit_share": EXIT_SHARE}
        answers, _ = _mixed(leave, large, name, criterion, EXIT_SHARE)
        made.append(_told(setting, large, described, benchmark, batches, answers, large["tokens"]))
    return made


def _told(
    setting: Setting, source: Record, described: Mapping[str, Any], benchmark: Benchmark,
    batches: Batches, answers: Sequence[str | None], tokens: Mapping[str, Any],
) -> Record:  # fmt: skip
    """An accuracy record of answers that were given before, in the setting of another record."""
    request = {**source["request"], "method": described, "budget": tokens["requested"]}
    code = code_hash("methods.sgl", "studies.sgl")
    found = find_run(setting, "accuracy", request, code, batches.data_hash)
    if found is not None:
        return found
    sheet = benchmark.sheet(batches.rows, answers)
    headline = stats.interval(sheet)
    known = sum(a is not None for a in answers)
    record = {
        "kind": "accuracy", "status": "complete", "request": request, "tokens": tokens,
        "counts": {"asked": len(answers), "answered": known, "failed": len(answers) - known},
        "metrics": {
            "headline": {
                **source["metrics"]["headline"], "value": headline.value, "low": headline.low,
                "high": headline.high,
            },
            "accuracy": {"value": sheet.accuracy},
            "details": sheet.details,
        },
        "answers": [[i, a] for i, a in zip(batches.ids, answers, strict=True)],
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash, data_hash=batches.data_hash,
            device=setting.device,
        ),
    }  # fmt: skip
    write_run(setting, record)
    return record


# -- agreement and cost ----------------------------------------------------------------------------


@torch.inference_mode()
def _agreement_run(
    setting: Setting, model: PreTrainedModel, method: SGL, batches: Batches, reporter: Reporter
) -> Record:
    """Rank correlation with, and overlap of the kept tokens with, the large model's own ranking."""
    assert method.guide is not None
    guide, itself = method.guide, Guide(model, "the large model")
    (cut,) = method.layers(host_for(model).shape.decoder_layers)
    last = replace(method, guide_from=1.0)

    def measured() -> dict[str, Any]:
        values: dict[str, dict[str, list[float]]] = {}
        done = 0
        for _, inputs in batches.batches:
            small, large = guide(inputs).attention, itself(inputs).attention
            truth = method.importance(large)
            rankings = {
                "small_all": method.importance(small),
                "small_last": last.importance(small),
                "large_one": large[cut - 1, LAST_PROMPT],
            }
            for name, ranking in rankings.items():
                into = values.setdefault(name, {"spearman": [], "overlap": []})
                for own, wanted in zip(ranking.cpu(), truth.cpu(), strict=True):
                    into["spearman"].append(float(spearmanr(own, wanted).statistic))
                    both = [set(x.topk(method.kept_tokens).indices.tolist()) for x in (own, wanted)]
                    into["overlap"].append(len(both[0] & both[1]) / method.kept_tokens)
            done += len(truth)
            if done >= IMAGES:
                break
        reporter.advance(1)
        values["small_all minus large_one"] = {
            name: np.subtract(found, values["large_one"][name]).tolist()
            for name, found in values["small_all"].items()
        }
        return {
            "rankings": {
                ranking: {name: _mean(found) for name, found in quantities.items()}
                for ranking, quantities in values.items()
            }
        }

    more = {"asked": batches.data_hash, "images": IMAGES}
    return _analysis(setting, "agreement", method, more, measured, reporter, 1)


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """The mean over prompts with its interval."""
    found = stats.from_sums(stats.share, np.stack([values, np.ones(len(values))], 1))
    return {"value": found.value, "low": found.low, "high": found.high, "n": len(values)}


@torch.inference_mode()
def _cost_run(
    setting: Setting, model: PreTrainedModel, method: SGL, batches: Batches, repeats: int,
    reporter: Reporter,
) -> Record:  # fmt: skip
    """FLOPs and time of the guide's parts, for one question."""
    assert method.guide is not None
    guide = method.guide
    one = {name: value[:1] for name, value in batches.batches[0][1].items()}
    steps = {"max_new_tokens": guide.max_new_tokens, "do_sample": False}

    def measured() -> dict[str, Any]:
        guidance = guide(one)
        ranking = method.importance(guidance.attention)
        parts = {
            "untouched": lambda: model(**one, logits_to_keep=1),
            "guide": lambda: guide(one),
            "guide without reading": lambda: guide.model.generate(**one, **steps),
            "consistency": lambda: guide.consistency(guidance, ranking),
        }
        flops = {name: measure.count_flops(call).total for name, call in parts.items()}
        with method.on(model):
            guided = measure.count_flops(parts["untouched"])
        flops["guided"] = guided.total
        flops["large"] = guided.total - flops_parts(model, guided)["guide"]
        share = flops["consistency"] / flops["guide"]
        times = measure.interleaved_latency(parts, repeats=repeats, device=setting.device)
        reporter.advance(1)
        return {
            "flops": flops,
            "consistency_share": {"value": share, "low": share, "high": share, "n": 1},
            "ms": {name: found.p50_ms for name, found in times.items()},
            "parameters": {
                "guide": sum(p.numel() for p in guide.model.parameters()),
                "large": sum(p.numel() for p in model.parameters()),
            },
            "answer_tokens": int(guidance.valid.sum()),
        }

    more = {"repeats": repeats, "asked": batches.data_hash}
    return _analysis(setting, "guide cost", method, more, measured, reporter, 1)


def _analysis(
    setting: Setting, name: str, method: SGL, more: Mapping[str, Any], measured: Any,
    reporter: Reporter, steps: int,
) -> Record:  # fmt: skip
    """The record of one analysis, found or made."""
    request = {
        "scale": setting.scale, "model": setting.model_name, "split": setting.split,
        "n": setting.n, "device": torch.device(setting.device).type, "analysis": name,
        "method": method.describe(), **more,
    }  # fmt: skip
    code = code_hash("methods.sgl", "studies.sgl", "measure")
    reporter.start(f"sgl: {name}", steps)
    found = find_run(setting, "analysis", request, code)
    if found is not None:
        reporter.advance(steps)
        return found
    started = time.monotonic()
    record = {
        "kind": "analysis", "status": "complete", "request": request, **measured(),
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash, seconds=time.monotonic() - started,
            device=setting.device,
        ),
    }  # fmt: skip
    write_run(setting, record, label=name.replace(" ", "-"))
    return record


# -- what notebooks show ---------------------------------------------------------------------------


def find(made: Sequence[Record], name: str) -> Record:
    """The analysis record with this name: "exit", "agreement" or "guide cost".

    Raises:
        ValueError: when there is none.
    """
    found = records.select(made, "analysis", analysis=name)
    if not found:
        raise ValueError(f"No record of the analysis '{name}': run `run_pocket('sgl')` first.")
    return found[-1]


def exit_frame(leave: Record) -> pd.DataFrame:
    """Score and FLOPs per question, mean over benchmarks, by criterion and share of exits."""
    frame = pd.DataFrame(leave["curve"])
    return frame.groupby(["criterion", "share"])[["score", "flops"]].mean().reset_index()


def agreement_frame(agreement: Record) -> pd.DataFrame:
    """Means over prompts with their 95 % intervals."""
    return pd.DataFrame([
        {"ranking": name, "quantity": quantity, **found}
        for name, quantities in agreement["rankings"].items()
        for quantity, found in quantities.items()
    ])  # fmt: skip


def cost_frame(cost: Record) -> pd.DataFrame:
    """FLOPs and time of one question, and their share of the untouched large model's prefill."""
    flops = cost["flops"]
    return pd.DataFrame({
        "mflops": {name: n / 1e6 for name, n in flops.items()},
        "of untouched": {name: n / flops["untouched"] for name, n in flops.items()},
        "ms": cost["ms"],
    })  # fmt: skip


STUDY = Study("sgl", analysis=run)
