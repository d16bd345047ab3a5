"""FasterVLM's own figures, and its efficiency table made again from the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from frugalvlm import measure
from frugalvlm.hosts import host_for
from frugalvlm.papers import load_paper
from frugalvlm.report.display import Block, Cell, Table
from frugalvlm.runs.blueprint import blueprint
from frugalvlm.runs.records import Record

__all__ = ["cost_table", "dispersion_plot", "shift_plot"]

MODEL, PRINTED = "LLaVA-NeXT-7B", "efficiency LLaVA-NeXT-7B"
FULL_LAYERS = 2  # FastV runs its first two layers on all tokens
_NAMES = {"last": "last prompt token", "text": "text tokens", "image": "visual tokens",
          "cls": "[CLS] of the vision tower"}  # fmt: skip


@torch.inference_mode()
def cost_table() -> Table:
    """The printed FLOPs and cache sizes beside those counted on the architecture.

    Counted on the visual tokens alone, as the printed ones: five crops through the vision tower,
    then each decoder layer on the visual tokens that it has; no text, projector or head.
    """
    paper, layout = load_paper("fastervlm"), blueprint(MODEL)
    model = layout.build()
    host, meta = host_for(model), torch.device("meta")
    pixels = layout.inputs()[0]["pixel_values"].flatten(0, 1)
    tower = measure.count_flops(lambda: host.tower(pixels)).total
    decoder, layers = host.language_model, len(host.language_model.layers)
    width, dtype = decoder.config.hidden_size, model.dtype

    def in_one_layer(tokens: int) -> tuple[float, float]:
        """FLOPs and cache bytes of one decoder layer."""
        embeds = torch.empty(1, tokens, width, dtype=dtype, device=meta)
        caches: list[Any] = []
        counted = measure.count_flops(
            lambda: caches.append(decoder(inputs_embeds=embeds, use_cache=True).past_key_values)
        )
        return counted.total / layers, measure.kv_cache_bytes(caches[0]).total / layers

    data = []
    figures = paper.figures.query("table == @PRINTED")
    for method, tokens in figures[["method", "visual_tokens"]].drop_duplicates().to_numpy():
        own = figures.query("method == @method and visual_tokens == @tokens")
        early = 2880 if method == "FastV" else tokens
        first, later = in_one_layer(int(early)), in_one_layer(int(tokens))
        flops, cache = (
            FULL_LAYERS * a + (layers - FULL_LAYERS) * b for a, b in zip(first, later, strict=True)
        )
        printed = {
            metric: own.loc[own["metric"] == metric, "value"].iloc[0]
            for metric in ("FLOPs", "KV-cache storage of visual tokens")
        }
        row = {"method": method, "tokens": int(tokens), "tflops": (tower + flops) / 1e12,
               "kv_mib": cache / 2**20, "printed_tflops": printed["FLOPs"],
               "printed_kv": printed["KV-cache storage of visual tokens"]}  # fmt: skip
        row["tflops_off_%"] = 100 * (row["tflops"] / row["printed_tflops"] - 1)
        row["kv_off_%"] = 100 * (row["kv_mib"] / row["printed_kv"] - 1)
        data.append(row)
    frame = pd.DataFrame(data)
    rows = tuple(
        (
            Cell(r["method"]),
            Cell(f"{r['tokens']}"),
            Cell(f"{r['tflops']:.2f}"),
            Cell(f"{r['printed_tflops']:.2f}"),
            Cell(f"{r['tflops_off_%']:+.2f} %"),
            Cell(f"{r['kv_mib']:.2f}"),
            Cell(f"{r['printed_kv']:.2f}"),
            Cell(f"{r['kv_off_%']:+.2f} %"),
        )
        for r in data
    )
    return Table(
        title=f"{MODEL}: the printed efficiency table, counted again",
        headers=("method", "visual\ntokens", "TFLOPs\ncounted", "TFLOPs\nprinted", "off",
                 "KV MiB\ncounted", "KV MB\nprinted", "off"),
        blocks=(Block("", rows),),
        caption=(
            "Scale: blueprint. Counted on the real modules without weights, on the visual tokens "
            "alone and without projector and head, for so the printed figures come out: the text "
            "(about 60 tokens) and the 48 newline tokens of Transformers' LLaVA-NeXT are left out. "
            f"FastV: {FULL_LAYERS} of {layers} layers on all tokens. Caches are in 16 bits; the "
            "paper's MB are MiB.",
        ),
        data=frame,
        facts={"scale": "blueprint"},
    )  # fmt: skip


def shift_plot(record: Record) -> Figure:
    """Attention by the token's index, and its rank correlation with the index layer by layer.

    Args:
        record: of the analysis "attention".
    """
    curves, found = record["curves"], record["shift"]
    figure = plt.figure(figsize=(10.5, 4.2), layout="constrained")
    with sns.axes_style("whitegrid"):
        left, right = figure.subplots(1, 2)
    colors = dict(zip(_NAMES, sns.color_palette("colorblind"), strict=False))
    for (name, label), style in zip(_NAMES.items(), ("-", "--", ":", "-"), strict=True):
        mean = np.asarray(curves[name], dtype=float)
        mean = mean if name == "cls" else mean.mean(0)
        # Each by its own mean: they differ by an order of magnitude.
        left.plot(_smooth(mean / mean.mean()), style, color=colors[name],
                  linewidth=2.5 if name == "cls" else 1.5, label=f"from {label}")  # fmt: skip
    left.axhline(1, color="0.4", linewidth=0.8)
    left.set_xlabel("index of the visual token (row by row)")
    left.set_ylabel("attention received, over its mean\n(running mean of 9 tokens)")
    for name, rho in found["per_layer"].items():
        right.plot(range(1, len(rho) + 1), rho, marker="o", color=colors[name],
                   label=f"from {_NAMES[name]}")  # fmt: skip
    _band(right, found["cls"], colors["cls"], f"from {_NAMES['cls']}")
    right.axhline(0, color="0.4", linewidth=0.8)
    right.set_ylim(-1.05, 1.05)
    right.set_xlabel("decoder layer")
    right.set_ylabel("Spearman correlation with the index")
    for ax in (left, right):
        ax.legend(fontsize=8)
    figure.suptitle(_title(record, "Attention shift"), fontsize=10)
    return figure


def dispersion_plot(record: Record) -> Figure:
    """How fast the attention adds up over tokens, from the most attended on.

    Args:
        record: of the analysis "attention".
    """
    found = record["dispersion"]
    figure = plt.figure(figsize=(6.6, 4.2), layout="constrained")
    with sns.axes_style("whitegrid"):
        ax = figure.subplots()
    places = {"cls": "[CLS] of the vision tower",
              "last": f"last prompt token, decoder layer {found['layer'] + 1}"}  # fmt: skip
    for (name, label), color in zip(places.items(), sns.color_palette("colorblind"), strict=False):
        total = 100 * np.asarray(found["cumulative"][name], dtype=float)
        share = 100 * np.arange(1, len(total) + 1) / len(total)
        top = found[name]
        text = (
            f"{label}: top fifth holds {top['value']:.0f} % [{top['low']:.0f}, {top['high']:.0f}]"
        )
        ax.plot([0, *share], [0, *total], color=color, label=text)
    ax.plot([0, 100], [0, 100], color="0.4", linestyle=":", label="spread evenly")
    printed = load_paper("fastervlm").figures.query("table == 'figure attention dispersion'")
    ax.plot([20] * len(printed), printed["value"], "k_", markersize=14, markeredgewidth=2,
            label="read off the paper's figure (79 and 41 %)")  # fmt: skip
    ax.set_xlabel("visual tokens, most attended first, %")
    ax.set_ylabel("share of the attention on visual tokens, %")
    ax.legend(fontsize=8, loc="lower right")
    ax.set_title(_title(record, "Attention dispersion"), fontsize=10, loc="left")
    return figure


def _title(record: Record, what: str) -> str:
    request = record["request"]
    return (
        f"{what}: {request['model']} at the {request['scale']} scale\n"
        f"mean over {record['prompts']} prompts; intervals 95 % over prompts"
    )


def _band(ax: Any, figure: dict[str, float], color: Any, label: str) -> None:
    ax.axhline(figure["value"], color=color, linewidth=2.5, label=label)
    ax.axhspan(figure["low"], figure["high"], color=color, alpha=0.25)


def _smooth(values: Sequence[float] | np.ndarray, width: int = 9) -> np.ndarray:
    weight = np.convolve(np.ones(len(values)), np.ones(width), "same")
    return np.convolve(values, np.ones(width), "same") / weight
