"""The README's generated parts: rebuilt from records, the same everywhere, hand edits found."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from frugalvlm.benchmarks import BENCHMARKS, HD_BENCHMARKS, load_benchmark
from frugalvlm.benchmarks.base import without_pictures
from frugalvlm.papers import KEYS, load_paper
from frugalvlm.report.tables import accuracy_table
from frugalvlm.reproduce import readme
from frugalvlm.reproduce.readme import ReadmeError
from frugalvlm.runs import records
from frugalvlm.verdicts.verdicts import STATUSES, all_verdicts, verdicts


def text(*opens: str) -> str:
    blocks = [f"<!-- generated: {o} -->\nold\n<!-- end: {o.split()[0]} -->\n" for o in opens]
    return "# Title\n\n" + "\nwords\n".join(blocks) + "\nlast line\n"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(load_benchmark("pocket-gqa").dataset("test", 36).remove_columns("image"))


@pytest.fixture
def results(make, rows, tmp_path: Path) -> Path:
    """Two machines; the second is newer and its VisionZip much worse."""
    folder = tmp_path / "results" / "pocket" / "visionzip" / "records"
    for machine, month, right in (("aaaaaaaaaaaa", 1, 27), ("bbbbbbbbbbbb", 2, 9)):
        for method, budget, good in (("vanilla", 144, 36), ("visionzip", 16, right)):
            mask = [True] * good + [False] * (36 - good)
            record = make.accuracy(method, budget, rows=rows, n=36, right=mask)
            record["provenance"] |= {"machine": machine, "created": f"2026-0{month}-01T00:00:00"}
            records.write(folder / f"{method}-{machine}.json", record)
    counted = tmp_path / "results" / "blueprint" / "visionzip" / "records"
    records.write(counted / "b.json", make.blueprint())
    return tmp_path / "results"


def test_blocks_are_filled_and_the_rest_is_left_alone(results: Path) -> None:
    made = readme.render(text("table1-pocket", "blueprint-visionzip", "papers"), results)
    assert made.startswith("# Title\n\n<!-- generated: table1-pocket -->\n\n**VisionZip, Table 1")
    assert made.endswith("<!-- end: papers -->\n\nlast line\n")
    assert made.count("\nwords\n") == 2
    assert "\nold\n" not in made
    assert readme.render(made, results) == made
    for key in KEYS:
        assert f"| `{key}` |" in made


def test_without_a_pin_the_newest_records_count_and_a_pin_holds(results: Path) -> None:
    newest = readme.render(text("table1-pocket"), results)
    assert "25.0 ±" in newest
    assert "machine bbbbbbbbbbbb" in newest
    pinned = readme.render(text("table1-pocket machine=aaaaaaaaaaaa n=36"), results)
    assert "75.0 ±" in pinned
    assert "machine aaaaaaaaaaaa" in pinned
    assert "<!-- generated: table1-pocket machine=aaaaaaaaaaaa n=36 -->" in pinned


def test_pins_that_nothing_meets_or_nobody_knows_are_errors(results: Path) -> None:
    with pytest.raises(ReadmeError, match=r"No record in .* meets .*cccc"):
        readme.render(text("table1-pocket machine=cccccccccccc"), results)
    with pytest.raises(ReadmeError, match=r"No record in .* meets .*13"):
        readme.render(text("table1-pocket n=13"), results)
    with pytest.raises(ReadmeError, match="pins 'maschine'"):
        readme.render(text("table1-pocket maschine=aaaaaaaaaaaa"), results)


def test_no_records_yet_is_said_and_no_error(tmp_path: Path) -> None:
    made = readme.render(text("table1-pocket", "verdicts-pocket"), tmp_path)
    assert "not measured" in made
    assert "No records yet" in made


def test_check_finds_a_hand_edit_and_update_mends_it(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(text("table1-pocket", "papers"))
    assert readme.update(path, results) is True
    assert readme.check(path, results) == []
    assert readme.update(path, results) is False
    path.write_text(path.read_text().replace("25.0 ±", "95.0 ±"))
    difference = readme.check(path, results)
    assert any(line.startswith("-") and "95.0 ±" in line for line in difference)
    assert any(line.startswith("+") and "25.0 ±" in line for line in difference)
    assert readme.update(path, results) is True
    assert "95.0 ±" not in path.read_text()
    assert not list(tmp_path.glob(".README*"))


def test_a_new_record_makes_the_readme_stale(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(text("table1-pocket"))
    readme.update(path, results)
    (results / "pocket" / "visionzip" / "records" / "visionzip-bbbbbbbbbbbb.json").unlink()
    assert readme.check(path, results)


def test_neither_file_names_nor_the_environment_matter(results, monkeypatch) -> None:
    before = readme.render(text("table1-pocket", "verdicts-pocket"), results)
    folder = results / "pocket" / "visionzip" / "records"
    for i, path in enumerate(sorted(folder.glob("*.json"), reverse=True)):
        path.rename(folder / f"{i}.json")
    monkeypatch.setenv("FRUGALVLM_RESULTS", "/nowhere")
    monkeypatch.setattr(records.measure, "machine_id", lambda device=None: "another machine")
    assert readme.render(text("table1-pocket", "verdicts-pocket"), results) == before


def test_partial_records_do_not_reach_the_readme(results: Path) -> None:
    folder = results / "pocket" / "visionzip" / "records"
    before = readme.render(text("table1-pocket"), results)
    record = records.read_record(folder / "visionzip-bbbbbbbbbbbb.json")
    record["provenance"]["created"] = "2026-09-01T00:00:00"
    records.write(folder / "later.json", record | {"status": "partial", "answers": []})
    assert readme.render(text("table1-pocket"), results) == before


@pytest.mark.parametrize(
    "broken",
    [
        "<!-- generated: papers -->\nno end\n",
        "no start\n<!-- end: papers -->\n",
        "<!-- generated: papers -->\n<!-- end: table1-pocket -->\n",
        "<!-- generated: papers machine -->\n<!-- end: papers -->\n",
    ],
)
def test_a_marker_without_its_partner_is_an_error(broken: str, tmp_path: Path) -> None:
    with pytest.raises(ReadmeError, match="needs its"):
        readme.render(broken, tmp_path)


def _rows(block: str) -> list[list[str]]:
    lines = [line for line in block.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_short_table_holds_means_and_the_papers_own(results: Path) -> None:
    # One benchmark is no suite; all six are needed for a mean.
    folder = results / "pocket" / "visionzip" / "records"
    for record in [records.read_record(path) for path in sorted(folder.glob("*bbbb*.json"))]:
        right = [answer != "wrong" for _, answer in record["answers"]]
        for name in readme.BENCHMARKS:
            if name == "pocket-gqa":
                continue
            rows = list(without_pictures(load_benchmark(name).dataset("test", 36)))
            answers = [[r["question_id"], r["answer"] if right[i % 36] else "wrong"]
                       for i, r in enumerate(rows)]  # fmt: skip
            own = record | {"answers": answers}
            own["request"] = record["request"] | {"benchmark": name}
            own["counts"] = {"asked": len(rows), "answered": len(rows), "failed": 0}
            method = record["request"]["method"]["method"]
            records.write(folder / f"{name}-{method}.json", own)
    made = readme.render(text("table1-short"), results)
    head, _, *rows = _rows(made)
    assert head == ["method", "48 of 144 tokens", "32 of 144 tokens", "16 of 144 tokens"]
    assert len(rows) <= 8
    assert len(head) <= 5
    (own,) = [row for row in rows if row[0] == "VisionZip"]
    assert own[1:3] == ["not measured", "not measured"]
    newest = records.newest_setting(records.read_records(folder))
    data = accuracy_table("visionzip", "table1", newest).data
    mean = data[(data["benchmark"] == "mean") & (data["method"] == "visionzip")]
    value = mean[mean["budget"] == 16].iloc[0]["retention"]
    assert own[3].startswith(f"{value:.1f}")
    assert own[3].endswith("(92.7)")


def test_claims_are_counted_apart_from_the_kits_own_controls() -> None:
    made = readme.render(text("claims-short"))
    head, _, *rows = _rows(made)
    assert head == [
        "paper", "its claims: accuracy", "time and counts", "findings", "controls of this kit",
        "by construction", "not tested",
    ]  # fmt: skip
    assert len(rows) <= 13
    shown = {row[0]: row[1:] for row in rows}
    results = readme.project_root() / "results"
    words = {
        "holds": "holds", "holds in direction": "in direction", "undecided": "undecided",
        "refused": "refused", "not comparable": "not comparable",
    }  # fmt: skip
    paper, found = load_paper("visionzip"), []
    for scale in ("pocket", "blueprint"):
        folder = results / scale / "visionzip" / "records"
        made_here = records.newest_setting(records.read_records(folder))
        found += all_verdicts(paper, made_here, scale, results)
    columns = [("paper", ("accuracy",)), ("paper", ("time", "count")), ("paper", ("finding",)),
               ("kit", ("accuracy", "time", "count", "finding"))]  # fmt: skip
    for cell, (origin, about) in zip(shown["VisionZip"], columns, strict=False):
        counts = Counter(v.status for v in found
                         if v.claim.origin == origin and v.claim.about in about)  # fmt: skip
        expected = [f"{counts[s]} {words[s]}" for s in words if counts[s]]
        assert cell == ", ".join(expected)
    identities = [v for v in found if v.status == "by construction"]
    assert {v.claim.origin for v in identities} == {"identity"}
    assert shown["VisionZip"][4] == str(len(identities))
    ids = {v.claim.id for v in found}
    tested = {v.claim.id for v in found if not v.status.startswith(("not testable", "not meas"))}
    assert shown["VisionZip"][5] == str(len(ids - tested))


def test_an_unknown_block_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ReadmeError, match=r"Unknown block 'tabel1'.*table1-pocket"):
        readme.render(text("tabel1"), tmp_path)


def test_the_repositorys_own_readme_agrees_with_its_records() -> None:
    path = readme.project_root() / "README.md"
    if not path.is_file():
        pytest.skip("no README.md in this checkout")
    assert readme.check(path) == []


CARDS = sorted((readme.project_root() / "data" / "models").glob("*/README.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_model_cards_agree_with_the_records(card: Path) -> None:
    assert "<!-- generated: phenomena" in card.read_text()
    assert readme.check(card) == []


def test_phenomena_of_a_model_are_those_of_its_present_weights(tmp_path: Path) -> None:
    with pytest.raises(ReadmeError, match="model=NAME"):
        readme.render(text("phenomena"), tmp_path)
    name = CARDS[0].parent.name
    none = readme.render(text(f"phenomena model={name}"), tmp_path)
    assert "Not looked for yet with these weights." in none


def test_models_are_listed_with_their_own_scores(tmp_path: Path) -> None:
    made = readme.render(text("models"), tmp_path)
    for card in CARDS:
        scores = json.loads((card.parent / "scores.json").read_text())
        suite = [s for id, s in scores.items() if id in BENCHMARKS | HD_BENCHMARKS]
        mean = sum(s["seeing_accuracy"] for s in suite) / len(suite)
        row = next(line for line in made.splitlines() if f"`{card.parent.name}`" in line)
        assert f"| {mean:.1f} %" in row
    assert "| 5.0 M | 144 |" in made


def test_claims_are_counted_for_published_papers_only(results: Path, monkeypatch) -> None:
    made = readme.render(text("claims"), results)
    rows = [line for line in made.splitlines() if line.startswith("| `visionzip` | pocket")]
    record_folder = results / "pocket" / "visionzip" / "records"
    paper = load_paper("visionzip")
    newest = records.newest_setting(records.read_records(record_folder))
    assert [row.split(" | ")[2] for row in rows] == ["paper", "kit", "identity"]
    for row in rows:
        counts = Counter(v.status for v in verdicts(paper, newest, "pocket")
                         if v.claim.origin == row.split(" | ")[2])  # fmt: skip
        assert [int(c.strip() or 0) for c in row.split("|")[4:-2]] == [counts[s] for s in STATUSES]
    assert "`vlsi`" not in made


def test_claims_about_another_model_are_judged_by_its_own_folder(make, tmp_path) -> None:
    """The record of another model answers a claim that the paper's own records leave open."""
    paper = load_paper("fastervlm")
    text_claim = paper.claim("text-spared-at-half")
    tiles = {**text_claim.quantity, "pocket_model": "pocket-llava-hd"}
    paper = replace(paper, claims=(replace(text_claim, id="tiles", quantity=tiles), text_claim))
    data = load_benchmark("pocket-textvqa").dataset("test", 36)
    rows = list(data.remove_columns("image"))
    folder = tmp_path / "pocket/fastervlm"
    own, other = folder / "records", folder / "pocket-llava-hd/records"
    for place, pairs, model in (
        (own, [("vanilla", 144)], "pocket-llava-base"),
        (other, [("vanilla", 144), ("fastervlm", 72)], "pocket-llava-hd"),
    ):
        for method, budget in pairs:
            record = make.accuracy(
                method, budget, "pocket-textvqa", rows=rows, n=36, model=model
            )  # fmt: skip
            records.write(place / f"{method}.json", record)
    alone = verdicts(paper, records.read_records(own), "pocket")
    assert [v.status for v in alone] == ["not measured"] * 2
    judged = all_verdicts(paper, records.read_records(own), "pocket", tmp_path)
    assert [v.value for v in judged] == [100, None]
