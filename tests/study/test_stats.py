"""The bootstrap over pictures, against closed forms and synthetic data of known spread."""

import math
import time

import numpy as np
import pytest
from scipy.stats import bootstrap

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.benchmarks.base import Sheet, mean_sheet
from frugalvlm.benchmarks.stats import (
    FEWEST,
    from_sums,
    interval,
    mean_difference,
    mean_interval,
    mean_retention,
    over_trainings,
    paired_difference,
    paired_retention,
    share,
)


def sheet(scores: np.ndarray, headline_max: float = 100.0) -> Sheet:
    """Scores [pictures, questions per picture] as a sheet; headline 0 to 100."""
    rows = [{"image_id": f"i{i}", "category": ""} for i, line in enumerate(scores) for _ in line]
    plain = mean_sheet(rows, scores.ravel().tolist())
    return Sheet(plain.image_ids, plain.stats, plain.correct, plain.value, headline_max)


def flips(rng: np.random.Generator, p: float, *shape: int) -> np.ndarray:
    return (rng.random(shape) < p).astype(float)


def width(estimate) -> float:
    return estimate.high - estimate.low


def test_width_is_that_of_the_normal_approximation():
    s = sheet(flips(np.random.default_rng(1), 0.7, 400, 1))
    p = s.headline / 100
    expected = 2 * 1.96 * 100 * math.sqrt(p * (1 - p) / 400)
    estimate = interval(s)
    assert width(estimate) == pytest.approx(expected, rel=0.08)
    assert estimate.low < estimate.value == s.headline < estimate.high
    assert (estimate.n_questions, estimate.n_images, estimate.reason) == (400, 400, "")
    narrower = interval(s, level=0.68)
    assert width(narrower) == pytest.approx(expected / 1.96 * 0.9945, rel=0.1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    covered = 0
    for i in range(300):
        # A quality per picture, shared by its four questions: truth 60.
        quality = rng.beta(3, 2, (60, 1))
        estimate = interval(sheet((rng.random((60, 4)) < quality).astype(float)), 400, seed=i)
        covered += estimate.low <= 60 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98  # 95 % +- 4 standard errors, a percentile's bias down


def test_pictures_are_drawn_not_questions():
    # Five questions per picture that always agree are worth one question.
    one = flips(np.random.default_rng(3), 0.6, 200, 1)
    clustered = sheet(np.repeat(one, 5, axis=1))
    as_if_independent = sheet(np.repeat(one, 5, axis=1).reshape(-1, 1))
    ratio = width(interval(clustered)) / width(interval(as_if_independent))
    assert ratio == pytest.approx(math.sqrt(5), rel=0.1)
    assert clustered.headline == pytest.approx(as_if_independent.headline)


def test_pairing_narrows_what_is_correlated_and_widens_what_is_opposed():
    rng = np.random.default_rng(4)
    vanilla = flips(rng, 0.8, 300, 1)
    method = np.where(rng.random((300, 1)) < 0.05, 0, vanilla)  # loses a twentieth
    a, b = sheet(method), sheet(vanilla)
    paired = paired_difference(a, b)
    assert paired.value == pytest.approx(a.headline - b.headline)
    unpaired = math.hypot(width(interval(a)), width(interval(b, seed=1)))
    assert width(paired) < 0.6 * unpaired
    p = float((vanilla != method).mean())  # differences are 0 or -1
    assert width(paired) == pytest.approx(2 * 1.96 * 100 * math.sqrt(p * (1 - p) / 300), rel=0.12)
    assert width(paired_difference(sheet(1 - vanilla), b)) > 1.3 * unpaired


def test_retention_is_a_paired_ratio():
    rng = np.random.default_rng(5)
    vanilla = flips(rng, 0.8, 300, 2)
    method = vanilla * flips(rng, 0.9, 300, 2)
    estimate = paired_retention(sheet(method), sheet(vanilla))
    assert estimate.value == pytest.approx(100 * method.sum() / vanilla.sum())
    assert estimate.low < estimate.value < estimate.high
    itself = sheet(vanilla)
    same = paired_retention(itself, itself)
    assert (same.value, same.low, same.high) == (100, 100, 100)
    twin = paired_retention(itself, sheet(vanilla))  # another run that answers alike
    most = 100 * (1 - 0.025 ** (1 / 300))  # Clopper-Pearson: none of 300 pictures differs
    assert (twin.value, twin.low) == (100, pytest.approx(100 - most))
    assert (estimate.n_questions, estimate.n_images) == (600, 300)


def test_metrics_that_are_no_means_are_recomputed_in_every_draw():
    pope = load_benchmark("pocket-pope")
    rng = np.random.default_rng(6)
    categories = ("random", "popular", "adversarial")
    rows = [
        {"image_id": f"i{i}", "answer": truth, "category": categories[i % 3]}
        for i in range(60)
        for truth in ("yes", "yes", "yes", "no", "no", "no")
    ]
    scored = pope.sheet(rows, [r["answer"] if rng.random() < 0.8 else "yes" for r in rows])
    estimate = interval(scored)
    # The slow way: draw pictures by name, gather their rows, compute three F1 by counting.
    by_image = {}
    for i, r in enumerate(rows):
        by_image.setdefault(r["image_id"], []).append(i)
    slow = []
    for _ in range(400):
        drawn = [i for name in rng.choice(list(by_image), 60) for i in by_image[name]]
        scores = []
        for category in categories:
            cell = [i for i in drawn if rows[i]["category"] == category]
            tp = sum(rows[i]["answer"] == "yes" and scored.correct[i] for i in cell)
            wrong = sum(not scored.correct[i] for i in cell)
            scores.append(2 * tp / (2 * tp + wrong))
        slow.append(100 * np.mean(scores))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert width(estimate) == pytest.approx(high - low, rel=0.2)
    assert estimate.low == pytest.approx(low, abs=0.25 * (high - low))


def test_mean_retention_averages_benchmarks_and_draws_them_apart():
    rng = np.random.default_rng(7)

    def pair(p):
        vanilla = flips(rng, 0.8, 200, 1)
        return sheet(vanilla * flips(rng, p, 200, 1)), sheet(vanilla)

    pairs = {"x": pair(0.9), "y": pair(0.7)}
    single = {name: paired_retention(*ab) for name, ab in pairs.items()}
    both = mean_retention(pairs)
    assert both.value == pytest.approx((single["x"].value + single["y"].value) / 2)
    apart = math.hypot(width(single["x"]), width(single["y"])) / 2
    together = (width(single["x"]) + width(single["y"])) / 2
    assert width(both) == pytest.approx(apart, rel=0.1)
    assert width(both) < 0.85 * together
    assert (both.n_questions, both.n_images) == (400, 400)
    # One benchmark under two names: drawn apart, so the mean of both is steadier.
    twice = mean_retention({"x": pairs["x"], "x2": pairs["x"]})
    assert width(twice) == pytest.approx(width(single["x"]) / math.sqrt(2), rel=0.12)
    assert mean_retention(dict(reversed(pairs.items()))).low == pytest.approx(both.low)


def test_mean_difference_is_in_points_of_each_full_scale():
    rng = np.random.default_rng(8)
    good, bad = flips(rng, 0.9, 100, 1), flips(rng, 0.5, 100, 1)
    pairs = {
        "hundred": (sheet(bad), sheet(good)),
        "thousand": (sheet(bad * 10, 1000.0), sheet(good * 10, 1000.0)),
    }
    estimate = mean_difference(pairs)
    points = 100 * (bad.mean() - good.mean())
    assert estimate.value == pytest.approx(points)
    wrong = (points + 10 * points) / 2  # MME's thousand would drown the rest
    assert estimate.value != pytest.approx(wrong)
    assert estimate.low < estimate.value < estimate.high


def test_nothing_to_retain_is_nan_and_says_why():
    zero, some = sheet(np.zeros((20, 1))), sheet(np.ones((20, 1)))
    estimate = paired_retention(some, zero)
    assert math.isnan(estimate.value)
    assert math.isnan(estimate.low)
    assert "scores zero" in estimate.reason
    estimate = mean_retention({"a": (some, some), "b": (some, zero)})
    assert math.isnan(estimate.value)
    assert "scores zero" in estimate.reason
    assert "zero on b," in estimate.reason
    assert paired_difference(zero, some).value == -100


def test_draws_without_anything_to_retain_are_counted():
    rare = np.zeros((20, 1))
    rare[0] = 1
    itself = sheet(rare)
    estimate = paired_retention(itself, itself)
    assert (estimate.value, estimate.low, estimate.high) == (100, 100, 100)
    undefined = int(estimate.reason.split()[0])
    assert undefined / 2000 == pytest.approx((19 / 20) ** 20, abs=0.05)


@pytest.mark.parametrize("pictures", [1, 9, 10])
def test_fewer_than_ten_pictures_give_a_value_without_an_interval(pictures: int) -> None:
    few = sheet(np.array([[1.0, 0.0]] * (pictures - 1) + [[0.0, 0.0]]))
    other = sheet(np.ones((pictures, 2)))
    for estimate in (
        interval(few), paired_retention(few, other), mean_retention({"a": (few, other)}),
        from_sums(share, few.stats, top=1),
    ):  # fmt: skip
        assert not math.isnan(estimate.value)
        assert math.isnan(estimate.low) == math.isnan(estimate.high) == (pictures < FEWEST)
        assert ("fewer than 10 pictures" in estimate.reason) == (pictures < FEWEST)


def test_where_all_pictures_agree_the_interval_is_clopper_and_pearsons() -> None:
    most = 100 * (1 - 0.025 ** (1 / 40))  # what 0 of 40 does not exclude
    for every, low, high in ((1.0, 100 - most, 100), (0.0, 0, most)):
        estimate = interval(sheet(np.full((40, 3), every)))
        assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
        sums = np.stack([np.full(40, 300 * every), np.full(40, 3.0)], 1)
        shared = from_sums(share, sums, top=100)
        assert (shared.low, shared.high) == (pytest.approx(low), pytest.approx(high))
    apart = paired_difference(sheet(np.full((40, 3), 0.0)), sheet(np.full((40, 3), 0.0)))
    assert (apart.low, apart.high) == (pytest.approx(-most), pytest.approx(most))


def test_trainings_are_drawn_as_well_as_pictures() -> None:
    """Models that differ by 10 points: the interval is theirs, not that of the pictures."""
    rng = np.random.default_rng(11)
    alike = [interval(sheet(flips(rng, 0.7, 400, 1))) for _ in range(3)]
    assert over_trainings(alike[:1]) == alike[0]
    together = over_trainings(alike)
    assert together.value == pytest.approx(np.mean([e.value for e in alike]))
    assert together.trainings == 3
    apart = over_trainings([interval(sheet(flips(rng, p, 400, 1))) for p in (0.6, 0.7, 0.8)])
    assert width(apart) > 1.8 * width(together)
    assert apart.low < apart.value < apart.high


def test_intervals_over_trainings_cover_new_ones_better_than_those_of_one() -> None:
    """Truth 60; a training moves it by 4 points, which its pictures cannot tell."""
    rng = np.random.default_rng(12)
    one = many = 0
    for i in range(200):
        truths = 0.6 + 0.04 * rng.normal(size=3)
        found = [interval(sheet(flips(rng, p, 300, 1)), 400, seed=i) for p in truths]
        joined = over_trainings(found, seed=i)
        one += found[0].low <= 60 <= found[0].high
        many += joined.low <= 60 <= joined.high
    assert one / 200 < 0.85
    assert many / 200 > 0.88


def test_different_questions_are_refused():
    a, b = sheet(np.ones((3, 2))), sheet(np.ones((4, 2)))
    more = sheet(np.ones((3, 3)))
    shuffled = Sheet(a.image_ids[::-1], a.stats, a.correct, a.value)
    for other in (b, more, shuffled):
        with pytest.raises(ValueError, match="different questions"):
            paired_retention(a, other)
        with pytest.raises(ValueError, match="different questions"):
            paired_difference(other, a)
        with pytest.raises(ValueError, match="x: the sheets"):
            mean_difference({"x": (a, other)})
    with pytest.raises(ValueError, match="at least one"):
        mean_retention({})
    with pytest.raises(ValueError, match="level"):
        interval(a, level=95)


def test_the_seed_decides_and_nothing_else():
    s = sheet(flips(np.random.default_rng(9), 0.5, 50, 2))
    assert interval(s) == interval(s)
    assert interval(s) != interval(s, seed=1)


def test_two_thousand_draws_of_three_hundred_pictures_are_quick():
    s = sheet(flips(np.random.default_rng(10), 0.5, 300, 6))
    interval(s)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        interval(s)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.25  # about 0.01 s on an idle laptop core; leaves room for a busy one


@pytest.mark.parametrize("shape", [(30,), (30, 4)])
def test_interval_of_a_mean_is_that_of_means_over_drawn_pictures(shape):
    values = np.random.default_rng(3).normal(size=shape)
    drawn = np.random.default_rng(0).integers(30, size=(2000, 30))
    mean, low, high = mean_interval(values.tolist())
    assert mean == pytest.approx(values.mean(0))
    assert np.stack([low, high]) == pytest.approx(
        np.quantile(values[drawn].mean(1), [0.025, 0.975], axis=0)
    )


def test_the_interval_is_scipys_up_to_the_luck_of_the_draws():
    scores = np.random.default_rng(7).random((80, 1))
    own = interval(sheet(scores))
    theirs = bootstrap(
        (100 * scores[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=0
    ).confidence_interval
    wide = theirs.high - theirs.low
    assert own.low == pytest.approx(theirs.low, abs=0.05 * wide)
    assert own.high == pytest.approx(theirs.high, abs=0.05 * wide)
