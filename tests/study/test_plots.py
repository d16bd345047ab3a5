"""Figures: the right patches are bright, curves show the table's numbers, titles say what it is."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from frugalvlm.report import plots
from frugalvlm.report.tables import accuracy_table, efficiency_table

mpl.use("Agg")

SHARE = {"random": 0.5, "fastv": 0.6, "fastervlm": 0.7, "visionzip": 0.9}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def table(make):
    return accuracy_table("visionzip", "table1", make.table1(SHARE), benchmarks=make.benchmarks)


def shades(ax) -> np.ndarray:
    """Mean colour of each patch of a 2 x 3 grid on a 60 x 40 picture."""
    shown = np.asarray(ax.images[0].get_array())
    return shown.reshape(2, 20, 3, 20, 3).mean((1, 3))


# --- kept patches ----------------------------------------------------------------------------


def test_kept_patches_stay_bright_where_they_are() -> None:
    image = Image.new("RGB", (60, 40), (200, 100, 50))
    ax = plots.draw_kept_patches(image, (2, 3), [1, 5], {7: [0, 2], 8: [3]})
    shown = shades(ax)
    original = np.array([200, 100, 50]) / 255
    for row, col in ((0, 1), (1, 2)):  # patch 1 is row 0, column 1: not the transposed grid
        assert np.allclose(shown[row, col], original)
    assert shown[1, 1].max() < 0.35 * original.max()  # dropped
    groups = [shown[0, 0], shown[0, 2], shown[1, 0]]
    assert np.allclose(groups[0], groups[1])  # one token, one tint
    assert np.abs(groups[0] - groups[2]).max() > 0.15  # another token, another tint
    for tint in groups:
        assert np.abs(tint - original).max() > 0.15
        assert tint.mean() > 1.5 * shown[1, 1].mean()
    assert ax.get_title() == "2 of 6 patches kept, 3 merged into 2 tokens"


def test_keeping_all_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    ax = plots.draw_kept_patches(image, (2, 3), range(6), None)
    assert np.allclose(ax.images[0].get_array(), np.asarray(image) / 255)


def test_kept_patches_have_an_edge_around_their_region() -> None:
    image = Image.new("RGB", (60, 40))
    _, figure_axes = plt.subplots()
    ax = plots.draw_kept_patches(image, (2, 3), [0, 1], {}, figure_axes)
    assert ax is figure_axes
    (edge,) = [c for c in ax.collections if to_hex(c.get_color()[0]) == plots.KEPT_EDGE]
    assert len(edge.get_segments()) == 6  # around both; none between them


def test_a_picture_need_not_divide_by_the_grid() -> None:
    ax = plots.draw_kept_patches(Image.new("RGB", (100, 70), "white"), (12, 12), [143], {})
    shown = np.asarray(ax.images[0].get_array())
    assert shown[-1, -1].min() == 1
    assert shown[0, 0].max() < 0.5


def test_a_patch_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="Patch 6 lies outside a grid of 2 x 3"):
        plots.draw_kept_patches(Image.new("RGB", (60, 40)), (2, 3), [6], {})


@pytest.mark.parametrize("runs", [1, 4, 5])
def test_the_panel_shows_the_picture_and_every_run(runs: int) -> None:
    image = Image.new("RGB", (60, 40))
    kept = {f"method {i}": ((2, 3), [i % 6], {}) for i in range(runs)}
    figure = plots.kept_patches_panel(image, kept, "one picture")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[0].startswith("the picture")
    assert [t.splitlines()[0] for t in titles[1:]] == list(kept)
    assert all("1 of 6 patches kept" in t for t in titles[1:])
    assert len(figure.legends[0].get_texts()) == 3


# --- curves and bars -------------------------------------------------------------------------


def test_the_curve_shows_the_tables_means_and_intervals(table) -> None:
    ax = plots.retention_curve(table)
    drawn = {c.get_label(): c for c in ax.containers}
    controls = ["random", "even grid", "avg. pooling", "small picture"]
    assert list(drawn) == [*controls, "FastV", "FasterVLM", "VisionZip"]
    means = table.data[table.data["benchmark"] == "mean"]
    own = means[means["method"] == "visionzip"].sort_values("budget")
    line, _, (bars,) = drawn["VisionZip"]
    assert np.allclose(line.get_ydata(), own["retention"])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert np.allclose(ends, own[["retention_low", "retention_high"]])
    assert np.allclose(line.get_xdata(), 100 * own["tokens_mean"] / 144, rtol=0.06)
    (fastv,) = [c[0] for name, c in drawn.items() if name == "FastV"]
    least = 100 * means[means["method"] == "fastv"]["tokens_mean"].min() / 144
    assert min(fastv.get_xdata()) == pytest.approx(least, rel=0.06), "not what was asked for"


def test_the_papers_curve_is_dashed_in_the_same_colour(table) -> None:
    ax = plots.retention_curve(table)
    lines = {line.get_label(): line for line in ax.lines}
    dashed = lines["VisionZip, printed"]
    assert dashed.get_linestyle() == "--"
    assert np.allclose(dashed.get_ydata(), [92.7, 96.3, 97.7], atol=0.06)
    assert np.allclose(dashed.get_xdata(), [100 / 9, 200 / 9, 100 / 3])
    measured = {c.get_label(): c for c in ax.containers}["VisionZip"][0]
    assert to_rgb(dashed.get_color()) == to_rgb(measured.get_color())
    assert "random, printed" not in lines  # nobody printed it


def test_figures_say_scale_n_and_interval(table, make) -> None:
    title = plots.retention_curve(table).get_title(loc="left")
    for needed in ("pocket", "n = 240 questions on 6 benchmarks", "95 % interval"):
        assert needed in title
    figure = plots.efficiency_bars(efficiency_table([make.efficiency()], "visionzip"))
    for needed in ("pocket", "Test CPU", "9 paired rounds", "95 % interval"):
        assert needed in figure.get_suptitle()
    title = plots.attention_mass_plot(make.attention([0.2, 0.4, 0.3])).get_title(loc="left")
    for needed in ("pocket", "100 images"):
        assert needed in title


def test_an_empty_table_still_draws(make) -> None:
    ax = plots.retention_curve(accuracy_table("visionzip", "table1", []))
    assert [c for c in ax.containers if len(c[0].get_xdata())] == []


def test_bars_have_the_tables_heights(make) -> None:
    table = efficiency_table([make.efficiency()], "visionzip")
    axes = plots.efficiency_bars(table).axes
    assert len(axes) == 3
    data = table.data.set_index(["label", "budget"])
    bars = {c.get_label(): c for c in axes[0].containers if c.get_label() in SHARE_LABELS}
    for label in SHARE_LABELS:
        heights = [patch.get_height() for patch in bars[label]]
        assert heights == [data.loc[(label, b), "prefill_speedup"] for b in (48, 32, 16)]
    cache = {c.get_label(): c for c in axes[2].containers if c.get_label() in SHARE_LABELS}
    assert [p.get_height() for p in cache["VisionZip"]] == pytest.approx(
        [100 / 3, 200 / 9, 100 / 9]
    )


SHARE_LABELS = ("random", "FastV", "FasterVLM", "VisionZip")


def test_attention_mass_marks_the_second_last_layer_and_the_even_share(make) -> None:
    ax = plots.attention_mass_plot(make.attention([0.2, 0.3, 0.5, 0.4]))
    lines = {line.get_label(): line for line in ax.lines}
    assert np.allclose(lines["measured"].get_ydata(), [20, 30, 50, 40])
    marked = next(line for label, line in lines.items() if label.startswith("second-last"))
    assert (marked.get_xdata()[0], marked.get_ydata()[0]) == (3, 50)
    assert lines["attention spread evenly"].get_ydata()[0] == pytest.approx(100 / 9)
