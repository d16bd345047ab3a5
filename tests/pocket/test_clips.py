"""Clips: what moves moves once, nothing flickers, and a frame alone answers little."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from frugalvlm.pocket.clips import CLIP_FAMILIES, FRAMES, STEPS, make_clip, order, place
from frugalvlm.pocket.models import build_tokenizer
from frugalvlm.pocket.scenes import CELL, COLORS, scan_split

CLIPS = [make_clip("test", seed) for seed in range(150)]
WAYS = {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down", (0, 0): "still"}


def tracks(clip):
    """{kind: its cell in every frame, None before it appears}, from the frames' records."""
    seen = [{t.kind: (t.y // CELL, t.x // CELL) for t in clip.scene(f).things}
            for f in range(FRAMES)]  # fmt: skip
    return {kind: [frame.get(kind) for frame in seen] for kind in seen[-1]}


@pytest.mark.parametrize("clip", CLIPS[:50], ids=lambda c: str(c.seed))
def test_things_step_once_and_appear_one_after_another(clip):
    found = tracks(clip)
    starts = sorted(track.index(next(filter(None, track))) for track in found.values())
    assert len(found) == 5
    assert starts[:2] == [0, 0]
    assert 0 < starts[2] < starts[3] < starts[4] < FRAMES
    for track in found.values():
        shown = [cell for cell in track if cell is not None]
        assert track[-len(shown) :] == shown, "what appeared stays"
        changes = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(shown) if a != b]
        assert len(changes) <= 1
        assert set(changes) <= set(WAYS)
        assert not (changes and track[0] is None), "only the first things move"
    for frame in zip(*found.values(), strict=True):
        cells = [cell for cell in frame if cell is not None]
        assert len(set(cells)) == len(cells)
        assert all(0 <= row < 3 and 0 <= col < 3 for row, col in cells)


def inside(thing):
    return np.s_[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]


def test_nothing_flickers_while_things_come_and_go():
    appeared = moved = 0
    for clip in CLIPS[:12]:
        frames = [np.asarray(image) for image in clip.frames()]
        assert len(frames) == FRAMES
        assert frames[0].shape == (96, 96, 3)
        for f in range(FRAMES - 1):
            before, after = clip.scene(f).things, clip.scene(f + 1).things
            ground = np.ones((96, 96), dtype=bool)
            for t in {*before} ^ {*after}:
                ground[inside(t)] = False
            # Everywhere else, things that stay included, not one pixel changes.
            assert np.array_equal(frames[f][ground], frames[f + 1][ground])
            appeared += len(after) - len(before)
            moved += bool({*before} - {*after})
            for old, new in zip(before, after, strict=False):
                if old != new:  # it looks the same where it went
                    apart = frames[f][inside(old)].astype(int) - frames[f + 1][inside(new)]
                    far = np.linalg.norm(
                        frames[f][inside(old)] - np.array(COLORS[old.color]), axis=-1
                    )
                    assert np.median(abs(apart[far < 40])) <= 2, "its ink"
    assert appeared == 36
    assert moved > 10


def test_a_clip_is_the_same_for_ever_and_splits_share_no_scan():
    assert make_clip("test", 3) == CLIPS[3] != make_clip("dev", 3)
    for split in ("train", "dev", "test"):
        own = set(np.concatenate(list(scan_split()[split].values())).tolist())
        clips = [make_clip(split, seed) for seed in range(20)]
        assert {a.thing.scan for c in clips for a in c.actors if a.thing.is_digit} <= own


def asked(family, clips=CLIPS):
    rng = np.random.default_rng(0)
    return [(c, q) for c in clips if (q := CLIP_FAMILIES[family](c, rng)) is not None]


def test_answers_follow_from_the_frames():
    for clip, question in asked("motion"):
        kind = question.text.removeprefix("which way does the ").removesuffix(" move?")
        (r0, c0), *_, (r1, c1) = tracks(clip)[kind]
        assert question.answer == WAYS[r1 - r0, c1 - c0]
        assert set(question.about) == {(r0, c0), (r1, c1)}
    for clip, question in asked("order"):
        new = {kind: t.count(None) for kind, t in tracks(clip).items() if t[0] is None}
        wanted = (min if "first" in question.text else max)(new, key=new.__getitem__)
        assert question.answer == wanted
    for clip, question in asked("place"):
        where, end = question.text.removeprefix("what is at the ").split(" in the ")
        frame = 0 if end == "first frame?" else FRAMES - 1
        assert [t.kind for t in clip.scene(frame).things if t.place == where] == [question.answer]


def test_both_ends_are_asked_about_and_every_way():
    assert set(Counter(q.answer for _, q in asked("motion"))) == set(STEPS)
    rng = np.random.default_rng(0)
    for end in ("first", "last"):
        assert f" {end}?" in order(CLIPS[0], rng, end).text
        assert all(f"in the {end} frame" in q.text for c in CLIPS if (q := place(c, rng, end)))
    still = next(c for c in CLIPS if {a.step for a in c.actors} == {"still"})
    assert place(still, rng, "first") is None, "nothing left its place"


# ---- shortcuts


def guess(pairs):
    """Accuracy of the best answer to each clue, learnt on one half, used on the other."""
    known, right, total = defaultdict(Counter), Counter(), Counter()
    for clue, answer in pairs[::2]:
        known[clue][answer] += 1
    for clue, answer in pairs[1::2]:
        total[answer] += 1
        right[answer] += bool(known[clue]) and known[clue].most_common(1)[0][0] == answer
    return sum(right[a] / total[a] for a in total) / len(total)  # every answer counts alike


def test_a_frame_alone_does_not_show_motion():
    clips = [make_clip("train", seed) for seed in range(700)]
    found = [(tracks(clip)[a.thing.kind], a.step) for clip in clips for a in clip.actors[:2]]
    for frame in range(FRAMES):
        # The edge of the picture tells a little: who is at the left cannot go left.
        assert guess([(track[frame], step) for track, step in found]) < 0.4
    assert guess([((track[0], track[-1]), step) for track, step in found]) > 0.95


def test_a_frame_alone_does_not_show_an_order():
    for clip, question in asked("order"):
        for frame in range(FRAMES):
            shown = [t.kind for t in clip.scene(frame).things]
            assert question.answer not in shown or len(shown) >= 3


def test_a_frame_alone_answers_half_of_the_place_questions():
    """What is asked about one end is something else, or nothing, at the other."""
    for clip, question in asked("place"):
        end, cell = "first" in question.text, question.about[0]
        there = [clip.scene(f).at(*cell) for f in (0, FRAMES - 1)]
        own, other = there if end else there[::-1]
        assert own.kind == question.answer
        assert other is None or other.kind != question.answer


def test_the_models_know_every_word():
    tokenizer = build_tokenizer()
    for family in CLIP_FAMILIES:
        for _, question in asked(family):
            ids = tokenizer([question.text, question.answer]).input_ids
            assert tokenizer.unk_token_id not in ids[0] + ids[1]
