"""Early exit without training: how deep tokens must go, what gates find, what copying costs.

Three sources of answers: `captions` (long ones), `digits` (numbers on plates, the one kind of word
that the pocket vocabulary cuts into pieces) and `text`, where the decoder alone, a plain language
model then, goes on with the first half of a caption. Three records, each on all sources:

- depth: the model's own greedy answers in one pass; the state behind every block, and between
  attention and MLP inside it, is read through the final norm and output layer.
- decoding: exits really happen. *Forced*: the untouched model's answer is fed back token by token,
  so every place is judged behind the same text. *Free*: answers are generated and scored.
- time: decoding side by side, methods taking turns.

A token's *first match* is the first block that says what the last one says, its *saturation* the
first one from which on all do. The paper does not settle which it counts. Both look at the last
block: they bound what a gate can save and are no method.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.benchmarks import Benchmark, load_benchmark, prompt, stats
from frugalvlm.benchmarks.asking import BATCH_SIZE, Batches, chunks
from frugalvlm.digest import request_hash
from frugalvlm.engine.exits import Reader
from frugalvlm.methods import EarlyExit
from frugalvlm.methods.early_exit import Gate, KVCopy
from frugalvlm.runs import records
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting, find_run, write_run
from frugalvlm.studies.early_exit.readings import (
    PARTS,
    Answered,
    Readings,
    ends,
    generate,
    no_padding,
    read,
    word_parts,
)

GATES: dict[Gate, tuple[float, ...]] = {  # swept; no threshold of the paper is known
    "confidence": (0.5, 0.7, 0.9, 0.99),
    "entropy": (0.3, 0.1, 0.03, 0.01),
    "patience": (1, 2, 3, 4),
}
COPIES: tuple[KVCopy, ...] = ("hidden", "keys_values", "recompute")
EAGER = 0.5  # the confidence threshold at which copying is judged: it skips most
BINS = (1, 8, 16, 32, 64)  # places in an answer, counted from 0, between which agreement is shown
ITEMS = 100  # answers per source, at most

Decoded = tuple[Tensor, Tensor]  # what is said and after which block, [batch, places] both


@dataclass(eq=False)
class Source:
    """Prompts of one kind, the model that answers, and the benchmark that scores it, if any."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    rows: list[dict[str, Any]]
    batches: Sequence[tuple[Sequence[int], Mapping[str, Any]]]
    max_new_tokens: int
    benchmark: Benchmark | None = None

    @cached_property
    def answers(self) -> list[Answered]:
        """The untouched model's answers."""
        found = []
        for items, inputs in self.batches:
            ids, real = generate(self.model, inputs, self.max_new_tokens)
            found.append(Answered(inputs, ids, real, np.array(items)))
        return found

    def texts(self, answers: Sequence[tuple[np.ndarray, Tensor]]) -> list[str | None]:
        """Answers as text, in the order of the rows."""
        texts: list[str | None] = [None] * len(self.rows)
        for items, ids in answers:
            decoded = self.processor.batch_decode(ids, skip_special_tokens=True)
            for item, text in zip(items, decoded, strict=True):
                texts[item] = text.strip()
        return texts


def run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    options: Options,
    reporter: Reporter,
) -> list[Record]:
    """The three records, measured or found."""
    items = min(ITEMS, setting.n)
    sources = make_sources(model, processor, setting.split, items, setting.device)
    data_hash = request_hash([[source.name, source.rows] for source in sources])
    code = code_hash(
        "methods.early_exit", "studies.early_exit.analysis", "studies.early_exit.readings",
        "measure",
    )  # fmt: skip
    shared = {
        "scale": setting.scale, "model": setting.model_name, "split": setting.split,
        "n": setting.n, "items": items, "gates": GATES,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "device": torch.device(setting.device).type,
    }  # fmt: skip
    steps: dict[str, tuple[dict[str, Any], Callable[[Source], dict[str, Any]]]] = {
        "depth": ({}, depth),
        "decoding": ({}, decoding),
        "time": (
            {"repeats": options.repeats, "threads": torch.get_num_threads()},
            lambda source: decode_time(source, options.repeats, setting.device),
        ),
    }
    made = []
    if not setting.timed:
        del steps["time"]
    for name, (more, step) in steps.items():
        request = {**shared, "analysis": name, **more}
        reporter.start(f"early exit: {name}", len(sources))
        found = find_run(setting, "analysis", request, code, data_hash)
        if found is not None:
            reporter.advance(len(sources))
            made.append(found)
            continue
        started, measured = time.monotonic(), {}
        for source in sources:
            measured[source.name] = step(source)
            reporter.advance(1)
        record = {
            "kind": "analysis", "status": "complete", "request": request, "sources": measured,
            "provenance": records.provenance(
                code=code, model_hash=setting.model_hash, data_hash=data_hash,
                seconds=time.monotonic() - started, device=setting.device,
            ),
        }  # fmt: skip
        write_run(setting, record)
        made.append(record)
    return made


# -- prompts and answers ---------------------------------------------------------------------------


def make_sources(
    model: PreTrainedModel, processor: ProcessorMixin, split: str, items: int, device: str
) -> list[Source]:
    """Captions, digits, and captions that the decoder alone goes on with."""
    sources = []
    for name, benchmark in (("captions", "pocket-caption"), ("digits", "pocket-textvqa")):
        asked = load_benchmark(benchmark)
        data = Batches(asked, processor, split, items, device)
        place = {id: i for i, id in enumerate(data.ids)}
        batches = [([place[i] for i in ids], inputs) for ids, inputs in data.batches]
        sources.append(
            Source(name, model, processor, data.rows, batches, asked.max_new_tokens, asked)
        )
    texts = [half_a_caption(row["question"], row["answer"]) for row in sources[0].rows]
    batches = [
        (list(part), processor.tokenizer([texts[i] for i in part], return_tensors="pt",
                                         padding=True).to(device))
        for part in chunks(range(len(texts)), BATCH_SIZE)
    ]  # fmt: skip
    rows = [{"question": text} for text in texts]
    alone = Source("text", text_model(model), processor, rows, batches, sources[0].max_new_tokens)
    return [*sources, alone]


def half_a_caption(question: str, caption: str) -> str:
    """A prompt without picture that stops after half of the things of a caption."""
    parts = caption.split(", ")
    asked = prompt(question).replace("<image>\n", "")
    return f"{asked} {', '.join(parts[: (len(parts) + 1) // 2])},"


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder and output layer of a vision-language model as a plain language model.

    The weights are shared, not copied.
    """
    decoder: Any = model.get_decoder()
    with torch.device("meta"):
        alone: Any = AutoModelForCausalLM.from_config(copy.deepcopy(decoder.config))
    alone.model, alone.lm_head = decoder, model.get_output_embeddings()
    alone.generation_config = copy.deepcopy(model.generation_config)
    return alone.eval()


# -- depth: one pass over whole answers ------------------------------------------------------------


def depth(source: Source) -> dict[str, Any]:
    """Oracle layers, word pieces, half blocks and gates of one source."""
    layers, images = len(Reader(source.model).layers), len(source.rows)
    item, part = [], []
    readings = []
    for batch in source.answers:
        readings.append(read(source.model, batch, GATES))
        for row, real, number in zip(batch.ids, batch.real, batch.items, strict=True):
            tokens = source.processor.tokenizer.convert_ids_to_tokens(row[real].tolist())
            part += word_parts(tokens)
            item += [number] * len(tokens)
    where, kinds = np.array(item), np.array(part)
    whole = Readings(
        np.concatenate([r.halves for r in readings], 1),
        {gate: np.concatenate([r.scores[gate] for r in readings], 1) for gate in GATES},
    )
    said = np.concatenate([b.ids[b.real].cpu().numpy() for b in source.answers])
    ones, first = np.ones(len(where)), whole.first_match
    oracles = {"first_match": first, "saturation": whole.saturation}
    table: dict[str, Any] = {
        "layers": layers, "tokens": len(where), "items": images,
        # 100 unless one pass and step-by-step generation round apart.
        "generated_again_%": 100 * float((whole.words[-1] == said).mean()),
        "after_attention": ratio(where, images, 100.0 * whole.after_attention, ones),
    }  # fmt: skip
    for name, exits in oracles.items():
        counts = np.zeros((images, layers), dtype=int)
        np.add.at(counts, (where, exits - 1), 1)
        table[name] = {
            "per_item": counts.tolist(),  # tokens by block, for shares with intervals
            "mean": ratio(where, images, exits, ones),
            "depth_%": ratio(where, images, 100.0 / layers * exits, ones),
            "parts": {kind: ratio(where, images, exits * (kinds == kind), kinds == kind)
                      for kind in PARTS},
            "first_minus_later": difference(where, images, exits, kinds == PARTS[1],
                                            kinds == PARTS[2]),
        }  # fmt: skip
    table["gates"] = [
        _gate(whole, EarlyExit(gate, threshold), first, where, images)
        for gate, thresholds in GATES.items()
        for threshold in thresholds
    ]
    table["best_gate"] = max((row["hits"] for row in table["gates"]), key=lambda hit: hit["value"])
    return table


def _gate(
    readings: Readings, method: EarlyExit, oracle: np.ndarray, where: np.ndarray, items: int
) -> dict[str, Any]:
    """How well a gate finds the oracle's layer (`hits`), and what it says when it does not."""
    exits, ones = readings.exits(method), np.ones(len(where))
    may = (readings.words == readings.words[-1])[:-1]
    fires = readings.fires(method)
    agrees = np.take_along_axis(readings.words, exits[None] - 1, 0)[0] == readings.words[-1]
    return {
        "gate": method.gate, "threshold": method.threshold,
        "mean_exit": ratio(where, items, exits, ones),
        "hits": ratio(where, items, 100.0 * (exits == oracle), ones),
        "agreement": ratio(where, items, 100.0 * agrees, ones),
        # Of all readings before the last block: is firing right, and are the right ones found?
        "precision": ratio(where, items, 100.0 * (fires & may).sum(0), fires.sum(0)),
        "recall": ratio(where, items, 100.0 * (fires & may).sum(0), may.sum(0)),
    }  # fmt: skip


# -- decoding: exits really happen -----------------------------------------------------------------


@torch.inference_mode()
def begin(model: PreTrainedModel, batch: Answered) -> tuple[Tensor, DynamicCache]:
    """First tokens [batch] and the prompt's cache. Prompts never exit: one pass for all methods."""
    positions = (batch.inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as generate counts
    out = model(**batch.inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1), out.past_key_values


@torch.inference_mode()
def decode(
    model: PreTrainedModel, batch: Answered, method: EarlyExit,
    begun: tuple[Tensor, DynamicCache], places: int, force: bool,
) -> Decoded:  # fmt: skip
    """What is said with early exits, and after which block.

    Args:
        model: the untouched model.
        batch: prompts, and the untouched model's answers.
        method: the exits.
        begun: what `begin` gave; as before afterwards.
        places: tokens per answer, at most.
        force: the untouched model's answers are fed back, not what is said.
    """
    (token, cache), mask = begun, batch.inputs["attention_mask"]
    position = mask.sum(-1, keepdim=True)
    said, ended = [token], ends(model, token)
    with method.on(model) as trace:
        while len(said) < places and (force or not ended.all()):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            token = batch.ids[:, len(said) - 1] if force else said[-1]
            out = model(
                input_ids=token[:, None], attention_mask=mask,
                position_ids=position + len(said) - 1, past_key_values=cache,
            )  # fmt: skip
            said.append(out.logits[:, -1].argmax(-1))
            ended |= ends(model, said[-1])
    if len(said) > 1:
        cache.crop(1 - len(said))
    left = [[trace.decoder_layers] * len(mask), *trace.exits]
    return torch.stack(said, 1), torch.tensor(left, device=mask.device).T


def decoding(source: Source) -> dict[str, Any]:
    """Forced agreement by place, and free answers, with every gate and every copy."""
    untouched = source.texts([(b.items, b.ids) for b in source.answers])
    plan = [EarlyExit(gate, t) for gate, swept in GATES.items() for t in swept]
    plan += [EarlyExit("confidence", t, c) for c in COPIES[1:] for t in GATES["confidence"]]
    forced: dict[EarlyExit, list[Decoded]] = {method: [] for method in plan}
    free: dict[EarlyExit, list[Decoded]] = {method: [] for method in plan}
    for batch in source.answers:
        begun = begin(source.model, batch)
        for method in plan:
            args = source.model, batch, method, begun
            forced[method].append(decode(*args, batch.ids.shape[1], force=True))
            free[method].append(decode(*args, source.max_new_tokens, force=False))
    rows, halves = [], {}
    for method in plan:
        row, half = _forced_row(source, method, forced[method])
        rows.append(row | _free_row(source, free[method], untouched))
        if method.gate == "confidence" and method.threshold == EAGER:
            halves[method.kv_copy] = half
    return {
        "bins": list(BINS), "methods": rows, "eager": EAGER,
        # Against recomputing: the same gate, another cache.
        "copying": {c: copying(halves["recompute"], halves[c]) for c in COPIES[:-1]},
        "score": None if source.benchmark is None else _score(source, untouched),
    }  # fmt: skip


def _forced_row(
    source: Source, method: EarlyExit, decoded: Sequence[Decoded]
) -> tuple[dict[str, Any], np.ndarray]:
    """Agreement at each place behind the untouched model's text; hits and tokens by half answer."""
    where, place, length, exits, right = [], [], [], [], []
    for batch, (said, left) in zip(source.answers, decoded, strict=True):
        real = batch.real.cpu().numpy()
        real[:, 0] = False  # never exits
        line, column = real.nonzero()
        where.append(batch.items[line])
        place.append(column)
        length.append(batch.real.sum(1).cpu().numpy()[line])
        exits.append(left.cpu().numpy()[real])
        right.append((said == batch.ids).cpu().numpy()[real])
    w, p, n, e, r = (np.concatenate(parts) for parts in (where, place, length, exits, right))
    items, ones = len(source.rows), np.ones(len(w))
    late = p > n / 2
    row = {
        "gate": method.gate, "threshold": method.threshold, "kv_copy": method.kv_copy,
        "mean_layers": ratio(w, items, e, ones),
        "agreement": ratio(w, items, 100.0 * r, ones),
        "by_place": [
            ratio(w, items, 100.0 * r * inside, inside)
            for low, high in zip(BINS, (*BINS[1:], 10**9), strict=True)
            for inside in [(low <= p) & (p < high)]
        ],
    }  # fmt: skip
    return row, per_item(w, items, r & ~late, ~late, r & late, late)


def _free_row(
    source: Source, decoded: Sequence[Decoded], untouched: Sequence[str | None]
) -> dict[str, Any]:
    """Answers as they come out, exits and all, and their score where there is one."""
    answers, layers, tokens = [], 0, 0
    for batch, (said, left) in zip(source.answers, decoded, strict=True):
        real = no_padding(ends(source.model, said))
        padding = source.processor.tokenizer.pad_token_id
        answers.append((batch.items, said.masked_fill(~real, padding)))
        layers += int(left[:, 1:][real[:, 1:]].sum())
        tokens += int(real[:, 1:].sum())
    texts = source.texts(answers)
    same = [a == b for a, b in zip(texts, untouched, strict=True)]
    free: dict[str, Any] = {
        "mean_layers": layers / tokens if tokens else None,
        "same_answer_%": 100 * float(np.mean(same)),
    }
    if source.benchmark is not None:
        free["score"] = _score(source, texts)
        own, theirs = (source.benchmark.sheet(source.rows, t) for t in (texts, untouched))
        free["score_change"] = figure(stats.paired_difference(own, theirs))
    return {"free": free}


def _score(source: Source, texts: Sequence[str | None]) -> dict[str, Any]:
    assert source.benchmark is not None
    return figure(stats.interval(source.benchmark.sheet(source.rows, texts)))


# -- time ------------------------------------------------------------------------------------------


def decode_time(source: Source, repeats: int, device: str) -> dict[str, Any]:
    """Milliseconds per decoded token of one prompt, runs taking turns; the longest answer's.

    "gate alone" reads every block and never leaves: what looking costs.
    """
    batch = max(source.answers, key=lambda b: int(b.real.sum(1).max()))
    row = int(batch.real.sum(1).argmax())
    inputs = {k: v[row : row + 1] for k, v in batch.inputs.items()}
    steps = max(1, int(batch.real[row].sum()) - 1)
    layers = len(Reader(source.model).layers)
    half = layers // 2
    plan: dict[str, EarlyExit | None] = {
        "untouched": None,
        "gate alone": EarlyExit(threshold=2.0),
        **{f"confidence {t:g}, {c}": EarlyExit("confidence", t, c)
           for t in (EAGER, 0.9) for c in COPIES[:-1]},
        f"always after block {half}": EarlyExit(threshold=0.0, first_layer=half),
    }  # fmt: skip
    exits: dict[str, Any] = {}

    @contextmanager
    def on(name: str, method: EarlyExit) -> Iterator[None]:
        with method.on(source.model) as trace:
            yield
        exits[name] = trace.mean_layers

    arms = {
        name: measure.Arm(source.model, inputs)
        if method is None
        else measure.Arm(source.model, inputs, lambda n=name, m=method: on(n, m))  # type: ignore[misc]
        for name, method in plan.items()
    }
    timed = measure.prefill_decode_ms(arms, decode_steps=steps, repeats=repeats, device=device)
    reference = timed["untouched"].decode
    rows = []
    for name in plan:
        mine = timed[name].decode
        gain = measure.ratio(reference, mine) if repeats > 1 else None
        rows.append({
            "run": name, "mean_layers": exits.get(name, float(layers)), "p50_ms": mine.p50_ms,
            "p95_ms": mine.p95_ms, "rounds": mine.n,
            "speedup": gain and {"value": gain.median, "low": gain.low, "high": gain.high},
        })  # fmt: skip
    return {"steps": steps, "prompt_tokens": inputs["input_ids"].shape[1], "runs": rows}


# -- intervals: a bootstrap over prompts, not tokens -----------------------------------------------


def per_item(where: np.ndarray, items: int, *columns: np.ndarray) -> np.ndarray:
    """Sums of token values by prompt, [items, columns]."""
    sums = np.zeros((items, len(columns)))
    np.add.at(sums, where, np.stack([np.asarray(c, dtype=float) for c in columns], 1))
    return sums


def figure(found: stats.Estimate) -> dict[str, Any]:
    """A figure as records keep it."""
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n_questions}


def ratio(where: np.ndarray, items: int, top: np.ndarray, bottom: np.ndarray) -> dict[str, Any]:
    """Sum over sum of token values."""
    return figure(stats.from_sums(stats.share, per_item(where, items, top, bottom)))


def difference(
    where: np.ndarray, items: int, values: np.ndarray, a: np.ndarray, b: np.ndarray
) -> dict[str, Any]:
    """Mean value of the tokens `a` minus that of the tokens `b`."""
    table = per_item(where, items, values * a, a, values * b, b)
    return figure(
        stats.from_sums(lambda t: stats.share(t[..., :2]) - stats.share(t[..., 2:]), table)
    )


def copying(own: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Points of agreement that a copied cache costs, and how many more in the second half.

    Args:
        own: hits and tokens of the first half of each answer, then of the second, with a cache
            that was recomputed, [items, 4].
        other: the same with copies.
    """

    def costs(t: np.ndarray) -> np.ndarray:
        """[..., 2], in the first and the second half."""
        rates = [100 * stats.share(t[..., i : i + 2]) for i in (0, 2, 4, 6)]
        return np.stack([rates[0] - rates[2], rates[1] - rates[3]], -1)

    def cost(t: np.ndarray) -> np.ndarray:
        rates = [100 * stats.share(t[..., i : i + 2] + t[..., i + 2 : i + 4]) for i in (0, 4)]
        return rates[0] - rates[1]

    both = np.hstack([own, other])
    return {
        "hurts": figure(stats.from_sums(cost, both)),
        "hurts_more_later": figure(
            stats.from_sums(lambda t: costs(t)[..., 1] - costs(t)[..., 0], both)
        ),
    }
