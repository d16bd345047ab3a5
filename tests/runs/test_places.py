"""Where results lie: runs write into the work folder, `publish` alone changes what is public."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_up_records import accuracy

from frugalvlm import measure
from frugalvlm.paths import MissingFilesError, project_root, result_file, work_dir
from frugalvlm.report import comparison
from frugalvlm.reproduce.publish import PublishError, publish, publish_folder
from frugalvlm.runs import records
from frugalvlm.runs.options import Options, pocket_setting
from frugalvlm.runs.setting import find_run, run_name


def test_a_relative_folder_is_made_absolute_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRUGALVLM_RESULTS", "mine")
    assert work_dir() == tmp_path / "mine"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert work_dir() == tmp_path / "mine"
    script = "from frugalvlm.paths import work_dir; print(work_dir())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert told.stdout.strip() == str(tmp_path / "mine"), told.stderr


def test_the_work_folder_is_neither_a_file_nor_what_is_published(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path / "file"))
    with pytest.raises(MissingFilesError, match="is not a folder: name one, or unset it"):
        work_dir()
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(project_root() / "results"))
    with pytest.raises(MissingFilesError, match="published results, which no run may change"):
        work_dir()


def test_git_does_not_see_the_work_folder(monkeypatch):
    monkeypatch.delenv("FRUGALVLM_RESULTS", raising=False)
    if not (project_root() / ".git").exists():
        pytest.skip("no clone")
    file = work_dir() / "pocket" / "aim" / "records" / "a.json"
    done = subprocess.run(["git", "-C", str(project_root()), "check-ignore", "-q", str(file)])
    assert done.returncode == 0


def test_files_are_looked_for_in_the_work_folder_first(places):
    work, published = places
    assert result_file("benchmark", "a.json") == work / "benchmark" / "a.json"
    for place in (published, work):
        (place / "benchmark").mkdir(parents=True)
        (place / "benchmark" / "a.json").touch()
        assert result_file("benchmark", "a.json") == place / "benchmark" / "a.json"


# -- finding ---------------------------------------------------------------------------------------


def _run(setting, answer: str = "yes", **more) -> dict:
    record = accuracy(answer=answer, code="code", machine=measure.machine_id("cpu"), **more)
    return record | {"provenance": record["provenance"] | {"model_hash": setting.model_hash}}


def test_a_published_run_is_copied_and_not_touched(places):
    work, published = places
    setting = pocket_setting("visionzip", Options(), "weights")
    record = _run(setting)
    name = f"{run_name(setting, record['request'], 'code')}.json"
    assert setting.folder == work / "pocket" / "visionzip" / "records"
    public = records.write(published / "pocket" / "visionzip" / "records" / name, record)
    before = public.read_bytes()
    found = find_run(setting, "accuracy", record["request"], "code")
    assert found is not None
    assert records.read_record(setting.folder / name) == found
    assert find_run(setting, "accuracy", record["request"], "other code") is None
    own = _run(setting, "own")
    records.write(setting.folder / name, own)
    found = find_run(setting, "accuracy", record["request"], "code")
    assert found["answers"][0] == ["q1", "own"], "the work folder's own comes first"
    assert public.read_bytes() == before


def test_compare_reads_both_places_and_counts_a_copy_once(places, put):
    work, published = places
    part = Path("pocket") / "visionzip" / "records"
    put(published / part, accuracy("vanilla", 144, hours=-9))
    old = accuracy(hours=-8, answer="old")
    put(published / part, old)
    put(work / part, old)
    found = comparison.recorded()["visionzip"]
    assert len(found) == 3
    assert len(records.latest(found)) == 2
    put(work / part, accuracy(hours=-2, answer="new"))
    newest = records.latest(comparison.recorded()["visionzip"])
    assert [r["answers"][0][1] for r in newest] == ["yes", "new"]


# -- publishing ------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }  # fmt: skip


def test_published_pages_link_to_the_published_ones(places, put):
    """Not to those that were beside them in the work folder."""
    work, published = places
    for place, key in ((published, "aim"), (work, "visionzip"), (work, "sgl")):
        put(place / "pocket" / key / "records", accuracy())
        page = place / "pocket" / key / f"{key}.html"
        page.write_text("<!-- pages --><a>sgl.html</a><!-- end of pages -->")
    publish("pocket", ["visionzip"])
    shown = published / "pocket" / "visionzip" / "visionzip.html"
    assert "../aim/aim.html" in shown.read_text()
    assert "sgl.html" not in shown.read_text()
    assert "../visionzip/visionzip.html" in (published / "pocket" / "aim" / "aim.html").read_text()


def test_publishing_replaces_what_is_superseded_alone(places, put):
    work, published = places
    own = Path("pocket") / "visionzip"
    old = put(published / own / "records", accuracy(code="old", hours=-9))
    kept = [
        put(published / own / "records", accuracy(n=300, code="old", hours=-9)),
        put(published / own / "records", accuracy(code="old", machine="ba9876543210", hours=-9)),
        put(published / "pocket" / "aim" / "records", accuracy(code="old", hours=-9)),
    ]
    new = put(work / own / "records", accuracy(code="new"))
    beside = put(work / own / "hd" / "records", accuracy("fastv", code="new"))
    partial = put(work / own / "records", accuracy("tome") | {"status": "partial"})
    (work / own / "records" / "x.answers.jsonl").write_text("{}")
    for name in ("visionzip.ipynb", "visionzip.html", "kept_tokens.png"):
        (work / own / name).write_text(name)
    (work / own / "visionzip.failed.ipynb").write_text("half")
    (work / own / ".ipynb_checkpoints").mkdir()
    (work / own / ".ipynb_checkpoints" / "visionzip.ipynb").write_text("half")
    before = _files(work)
    written = publish("pocket", ["visionzip"])
    assert {p.name for p in written} == {
        new.name, beside.name, "visionzip.ipynb", "visionzip.html", "kept_tokens.png"
    }  # fmt: skip
    assert not old.exists()
    assert not (published / own / "records" / partial.name).exists()
    assert all(path.exists() for path in kept)
    assert (published / own / "records" / new.name).read_bytes() == new.read_bytes()
    assert (published / own / "hd" / "records" / beside.name).is_file()
    assert set(_files(published)) == {
        str(p.relative_to(published)) for p in (*kept, *written)
    }  # fmt: skip
    assert _files(work) == before


def test_an_older_or_edited_record_is_not_published(places, put):
    work, published = places
    own = Path("pocket") / "visionzip" / "records"
    public = put(published / own, accuracy(code="new", answer="new"))
    put(work / own, accuracy(code="old", hours=-9))
    edited = put(work / own, accuracy("fastv"))
    edited.write_text(edited.read_text().replace('"yes"', '"no"'))
    with pytest.warns(records.RecordWarning, match="fastv.*edited"):
        assert publish("pocket", ["visionzip"]) == []
    assert [p.name for p in (published / own).iterdir()] == [public.name]


def test_nothing_to_publish_is_one_sentence_and_nothing_is_copied(places, put):
    work, published = places
    put(work / "pocket" / "visionzip" / "records", accuracy())
    with pytest.raises(PublishError, match="run `invoke reproduce --paper aim --scale pocket`"):
        publish("pocket", ["visionzip", "aim"])
    assert not published.exists()


def test_a_folder_of_pages_is_published_too(places):
    work, published = places
    (work / "compare").mkdir(parents=True)
    (work / "compare" / "runs.csv").write_text("a,b\n")
    assert publish_folder("compare") == [published / "compare" / "runs.csv"]


def test_a_published_folder_that_cannot_be_written_is_one_sentence(places, put):
    work, published = places
    put(work / "pocket" / "visionzip" / "records", accuracy())
    published.write_text("a file in the way")
    with pytest.raises(records.RecordError, match="Cannot write"):
        publish("pocket", ["visionzip"])
