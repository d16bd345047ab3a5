"""AIM's printed costs, rebuilt: every figure, and the rows that contradict themselves."""

import pytest

from frugalvlm.papers import load_paper
from frugalvlm.studies import aim
from frugalvlm.verdicts.verdicts import verdicts

VICUNA, QWEN = aim.DECODERS["LLaVA-1.5-7B"], aim.DECODERS["LLaVA-OneVision-7B"]


def test_printed_rows_follow_from_their_settings_but_for_four():
    frame = aim.cost_rows()
    assert len(frame) == 44
    unknown = frame[frame["fits"].isna()]
    assert set(unknown["method"]) == {"PDrop"}
    wrong = frame[frame["fits"].eq(False)]
    assert list(wrong["tokens"]) == [768, 384, 192, 96]
    assert set(wrong["table"]) == {"adaptive inference"}
    assert list(wrong["tflops"].round(2)) == [7.75, 4.50, 2.89, 2.10]
    printed = frame[~frame["inferred"] & frame["fits"].eq(True)]
    assert (printed["tflops"] - printed["printed_tflops"]).abs().max() < 0.01


def test_costs_by_hand():
    """A decoder of one layer, width 2, two heads and a vocabulary of 3, on one token and a word."""
    tiny = aim.Decoder(1, 2, 2, 4, 2, 3, text=1)
    linear = 2 * 2 * (4 * 4 + 3 * 8)
    attention = 2 * (2 * 2 * 2 * 2) + 5 * 2 * 2 * 2
    rest = 2 * 7 * 2 * 2 + 2 * 2 * 2 + 2 * 2 * 2
    ops, _ = aim.prefill_cost(tiny, [1])
    assert ops * 1e12 == pytest.approx(linear + attention + rest + 2 * 3)
    less, _ = aim.prefill_cost(aim.Decoder(1, 2, 2, 4, 2, 3, text=1, mlp_add=False), [1])
    assert (ops - less) * 1e12 == pytest.approx(2 * 2)


@pytest.mark.parametrize(
    ("decoder", "tokens", "l1", "l2", "printed"),
    [
        (QWEN, 6272, None, None, (99.63, 439.58)),
        (QWEN, 1568, 14, 22, (14.76, 55.03)),
        (VICUNA, 252, 13, 21, (2.22, 10.92)),
        (VICUNA, 72, 13, 21, (1.00, 8.98)),
    ],
)
def test_the_headline_figures(decoder, tokens, l1, l2, printed):
    found = aim.prefill_cost(decoder, aim.scheduled(decoder.layers, tokens, l1, l2))
    assert [round(x, 2) for x in found] == list(printed)


def test_a_schedule_one_layer_late_would_be_seen():
    """The released code applies a ratio behind the layer that computes it, the cost model in it."""
    visual = aim.scheduled(28, 1568, 14, 22)
    assert visual[:16] == [1568] * 14 + [1568 * 7 / 8, 1568 * 6 / 8]
    late = aim.prefill_cost(QWEN, [1568, *visual[:-1]])
    assert round(late[0], 2) != 14.76


def test_overhead():
    assert aim.overhead_gflops(6272, 2, 3584, 28, 100) == pytest.approx((88.252, 4.179), abs=1e-3)
    assert sum(aim.overhead_gflops(576, 3, 1024, 32, 40)) == pytest.approx(0.2554, abs=1e-4)


def test_the_record_decides_the_claims(tmp_path):
    made = aim.cost_model(tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    status = {v.claim.id: v.status for v in verdicts("aim", made, "blueprint")}
    exact = ("video-flops", "video-time", "image-flops", "small-overhead", "small-overhead-image")
    assert {status[name] for name in exact} == {"by construction"}
    assert status["schedules-give-their-flops"] == "refused"


def test_the_table_names_the_rows_that_contradict_themselves():
    table = aim.cost_table()
    assert "4 rows do not follow" in table.caption[1]
    assert "11.14" in table.caption[1]
    assert "PDrop" in table.to_markdown()
    assert sum(cell.short == "differs" for b in table.blocks for row in b.rows for cell in row) == 4


def test_every_row_of_the_layout_is_a_figure_of_the_paper():
    paper = load_paper("aim")
    table = paper.table("image")
    row = next(r for r in table.rows if r.method == "aim")
    numbers = [paper.printed(table, row, column, table.budgets[1]) for column in table.columns]
    assert numbers == [54.6, 79.5, 1277.7, 48.4, 67.1, 69.0]


def test_accuracy_claims_quote_the_tables():
    """Means over the columns of our layout, and shares of VideoMME, from the printed cells."""
    paper = load_paper("aim")
    image = paper.figures.query("table == 'image benchmarks' and model == 'LLaVA-1.5-7B'")
    video = paper.figures.query("benchmark == 'VideoMME (w/o subs)'")

    def kept(method: str, setting: str, *names: str) -> float:
        names = names or tuple(str(c.paper_benchmark) for c in paper.table("image").columns)
        rows = image[(image["method"] == method) & image["setting"].str.startswith(setting)]
        own, whole = (
            [float(f.loc[f["benchmark"] == name, "value"].iloc[0]) for name in names]
            for f in (rows, image[image["method"] == "Vanilla"])
        )
        return 100 * sum(a / b for a, b in zip(own, whole, strict=True)) / len(names)

    def seen(setting: str, table: str) -> float:
        rows = video[video["setting"].str.contains(setting) & (video["table"] == table)]
        (value,) = rows["value"]
        return 100 * value / 58.2

    mild, strong = kept("AIM", "merge 43.75%"), kept("AIM", "merge 12.5%")
    fast = kept("FastV", "budget A"), kept("FastV", "budget B")
    merged = {t: seen(f"retain {t}%", "ablation: merging only") for t in ("25", "12.5", "1.6")}
    pruned = {
        ends: seen("l1={} l2={}$".format(*ends), "ablation: pruning schedule")
        for ends in ((14, 22), (14, 15), (7, 15))
    }
    expected = {
        "retention-mild": mild,
        "retention-strong": strong,
        "beats-fastv": strong - fast[1],
        "beats-fastv-mild": mild - fast[0],
        "pope-spared": kept("AIM", "merge 12.5%", "POPE") - kept("FastV", "budget B", "POPE"),
        "textvqa-suffers": kept("AIM", "merge 43", "TextVQA")
        - kept("FastV", "budget A", "TextVQA"),
        "merging-is-cheap": merged["25"],
        "pruning-is-free": pruned[14, 22] - merged["25"],
        "prune-late": pruned[14, 22] - pruned[7, 15],
        "few-tokens-per-frame": merged["1.6"],
    }
    for name, value in expected.items():
        assert paper.claim(name).reported == pytest.approx(value, abs=0.06), name
