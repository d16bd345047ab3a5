"""AIM's table about videos, at the pocket scale: clips, with the model that takes them."""

import pytest

from frugalvlm.door import beside
from frugalvlm.papers import load_paper
from frugalvlm.paths import project_root
from frugalvlm.report import tables
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import read_records
from frugalvlm.verdicts.verdicts import all_verdicts, verdicts

SIGLIP = "pocket-siglip-base"
CLAIMS = (
    "merging-is-cheap-video", "pruning-is-free-video", "beats-fastv-video", "few-tokens-per-frame",
)  # fmt: skip


def test_the_table_quotes_what_is_printed():
    paper = load_paper("aim")
    table = paper.table("video")
    (column,), rows = table.columns, {row.method: row for row in table.rows}

    def printed(method):
        return [paper.printed(table, rows[method], column, budget) for budget in table.budgets]

    assert printed("vanilla") == [58.2] * 4
    assert printed("aim_merge") == [58.0, 56.6, 53.6, 50.9]
    assert printed("aim_video") == [58.2, 56.4, 53.6, 50.9]
    assert printed("fastv") == [None] * 4
    whole, merged = 58.2, 58.0
    assert paper.claim("merging-is-cheap-video").threshold == round(100 * merged / whole, 1)
    assert paper.claim("few-tokens-per-frame").threshold == pytest.approx(
        100 * 50.9 / whole, abs=0.06
    )
    assert paper.claim("beats-fastv-video").reported == pytest.approx(
        100 * (58.2 - 55.9) / whole, abs=0.06
    )


def test_claims_about_videos_are_decided_by_the_clips_alone():
    results = project_root() / "results"
    made = read_records(results / "pocket" / "aim" / "records")
    paper = load_paper("aim")
    own = {v.claim.id: v.value for v in verdicts(paper, made, "pocket")}
    both = {v.claim.id: v for v in all_verdicts(paper, made, "pocket", results)}
    assert [own[claim] for claim in CLAIMS] == [None] * 4
    assert all(both[claim].value is not None and both[claim].n == 150 for claim in CLAIMS)


def test_clips_have_runs_of_their_own(tmp_path, monkeypatch, beside_model):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    beside_model(SIGLIP)
    made = beside.beside_runs("aim", "video", Options(n=8))
    kept = {
        (r["request"]["method"]["method"], r["request"]["budget"]): r["tokens"]["per_layer"]
        for r in made
    }
    assert len(kept) == 1 + 2 + 4 * 3, "once without tokens, and one row of VTW"
    assert kept["no_image", 0] == [1.0] * 12, "the newline"
    assert kept["vtw", 36] == [289.0] * 2 + [0.0] * 10
    for budget, frame in ((36, 9), (18, 4), (9, 2), (4, 1)):
        assert kept["aim_merge", budget] == [8 * frame + 1] * 12
        assert kept["aim_video", budget][:7] == [8 * frame + 1] * 7, "pruning begins behind l1 = 6"
        assert kept["aim_video", budget][9:] == [0.0] * 3
        assert kept["fastv", budget][-1] == 2 * budget, "a clip is worth two pictures"
    (folder,) = (tmp_path / "pocket" / "aim").iterdir()
    assert folder.name == SIGLIP
    shown = tables.accuracy_table(load_paper("aim"), "video", made)
    assert "not measured" not in shown.to_markdown()
    assert kept["vanilla", 144] == [8 * 36 + 1] * 12
    assert shown.blocks[0].rows[0][1].short == "289"
    assert "(144 asked)" in shown.blocks[0].rows[0][1].long, "what one crop has"
    made[0]["tokens"]["per_layer"] = [144.0] * 12  # as records said before it was counted
    shown = tables.accuracy_table(load_paper("aim"), "video", made)
    assert shown.blocks[0].rows[0][1].short == "–"
    assert beside.beside_runs("aim", "video", Options(n=8, benchmarks=("pocket-gqa",))) == []
