"""Many papers in one go: processes, what they share, and that nothing timed runs beside them."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from frugalvlm import methods
from frugalvlm.benchmarks import asking, load_benchmark
from frugalvlm.engine.tower_once import tower_once
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods import METHODS, SGL, EncoderReducer, LayerReducer
from frugalvlm.methods.trained import TrainedMethod, untrained
from frugalvlm.papers import UnknownPaperError, load_paper
from frugalvlm.paths import project_root
from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.reproduce import command as rep
from frugalvlm.reproduce import runners
from frugalvlm.reproduce.side_by_side import LostProcessError, side_by_side
from frugalvlm.reproduce.side_by_side import _ready as ready
from frugalvlm.runs import accuracy, layout, options, records
from frugalvlm.runs.setting import Setting, Silent

GQA = "pocket-gqa"
N = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A large and a small model of random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for name in ("pocket-llava-tiny", "pocket-llava-small"):
        save_vlm(build_model(name), build_processor(), root / name)
    return {"model": str(root / "pocket-llava-tiny"), "guide": str(root / "pocket-llava-small")}


@pytest.fixture(scope="module")
def tiny(folders):
    return load_vlm(folders["model"])


@pytest.fixture(scope="module")
def batches(tiny):
    return asking.Batches(load_benchmark(GQA), tiny[1], "test", N, "cpu")


@pytest.fixture
def setting(tmp_path, folders):
    weights = model_hash(folders["model"])
    return Setting("pocket", "tiny", weights, tmp_path / "mine", n=N)


@pytest.fixture
def work(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import side_work

    return side_work


def _run(setting, tiny, batches, method=None):
    method = method or methods.FasterVLM(16)
    bench = load_benchmark(GQA)
    return accuracy.accuracy_run(setting, tiny[0], bench, batches, method, 16, Silent())


# -- what is shared --------------------------------------------------------------------------------


REDUCERS = [key for key, cls in METHODS.items()
            if issubclass(cls, EncoderReducer | LayerReducer) and cls is not SGL]  # fmt: skip


@pytest.mark.parametrize("key", REDUCERS)
def test_a_tower_that_runs_once_gives_every_method_the_same_bits(key, tiny, batches):
    model, inputs = tiny[0], batches.batches[0][1]
    method, known = METHODS[key].for_budget(48, 144), {}
    if isinstance(method, TrainedMethod):
        method = dataclasses.replace(method, learnt=untrained(method, model))
    with torch.inference_mode(), method.on(model):
        expected = model(**inputs).logits
    for _ in range(2):  # the second time it has seen the pictures
        with torch.inference_mode(), tower_once(model, known), method.on(model):
            assert torch.equal(model(**inputs).logits, expected)
    assert len(known) == 1


def test_towers_inside_each_other_are_restored_one_by_one(tiny, batches):
    model, inputs = tiny[0], batches.batches[0][1]
    outer, inner = {}, {}
    with torch.inference_mode(), tower_once(model, outer):
        with tower_once(model, inner):
            model(**inputs)
        model(**{**inputs, "pixel_values": -inputs["pixel_values"]})
    assert len(inner) == 1
    assert len(outer) == 2, "behind the inner block the outer one goes on"
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_tower_runs_once_for_its_own_threads_only(tiny, batches):
    """Three threads, of which the first opens its block first and leaves it first."""
    model, inputs = tiny[0], batches.batches[0][1]
    with torch.inference_mode():
        expected = model(**inputs).logits
    mine, theirs = {}, {}
    opened, left, go = threading.Event(), threading.Event(), threading.Event()
    answers = []

    def ask():
        with torch.inference_mode():
            answers.append(model(**inputs).logits)

    def other():
        opened.wait()
        with tower_once(model, theirs):
            go.set()
            left.wait()
            ask()

    def none():
        opened.wait()
        ask()
        left.wait()
        ask()

    threads = [threading.Thread(target=work) for work in (other, none)]
    for thread in threads:
        thread.start()
    with tower_once(model, mine):
        opened.set()
        go.wait()
        ask()
        inner = threading.Thread(target=ask)
        inner.start()
        inner.join()
        assert len(mine) == 1, "the pictures of this block's threads"
        model.model.vision_tower(-inputs["pixel_values"])
        assert len(mine) == 2
    left.set()
    for thread in threads:
        thread.join()
    assert len(answers) == 5
    assert all(torch.equal(answer, expected) for answer in answers)
    assert not theirs, "the other thread went on with the whole tower"
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_towers_of_two_models_are_kept_apart(setting, tiny, batches, folders):
    first = _run(setting, tiny, batches)
    other, _ = load_vlm(folders["model"])
    with torch.no_grad():  # the same lower layers on the way in, other ones behind them
        for name, weight in other.named_parameters():
            if "vision_tower" in name and "layers.0." in name:
                weight.neg_()
    changed = dataclasses.replace(setting, model_hash="other")
    alone = asking.Batches(load_benchmark(GQA), tiny[1], "test", N, "cpu")
    apart = dataclasses.replace(changed, folder=setting.folder / "apart")
    expected = _run(apart, (other, tiny[1]), alone)["answers"]
    assert expected != first["answers"], "the models must differ for this test to say anything"
    assert _run(changed, (other, tiny[1]), batches)["answers"] == expected


def test_a_run_of_another_paper_is_copied_not_repeated(setting, tiny, batches, monkeypatch):
    theirs = _run(dataclasses.replace(setting, folder=setting.folder.parent / "theirs"),
                  tiny, batches)  # fmt: skip
    mine = dataclasses.replace(setting, others=(setting.folder.parent / "theirs",))
    monkeypatch.setattr(asking, "answer", None)  # nothing may be answered
    assert _run(mine, tiny, batches) == records.read_record(*theirs_file(mine.others[0]))
    assert theirs["answers"] == records.read_record(*theirs_file(mine.folder))["answers"]
    (copy,), (original,) = (list(f.glob("*.json")) for f in (mine.folder, mine.others[0]))
    assert copy.name == original.name
    assert copy.read_bytes() == original.read_bytes()


def theirs_file(folder):
    return list(folder.glob("*.json"))


@pytest.mark.parametrize("change", ["weights", "method", "questions", "force"])
def test_a_run_that_is_not_the_same_is_not_copied(change, setting, tiny, batches, monkeypatch):
    theirs = setting.folder.parent / "theirs"
    _run(dataclasses.replace(setting, folder=theirs), tiny, batches)
    mine, method = dataclasses.replace(setting, others=(theirs,)), None
    if change == "weights":
        mine = dataclasses.replace(mine, model_hash="x")
    elif change == "force":
        mine = dataclasses.replace(mine, force=True)
    elif change == "method":
        method = methods.FasterVLM(17)
    else:
        batches = asking.Batches(load_benchmark(GQA), tiny[1], "dev", N, "cpu")
    monkeypatch.setattr(asking, "answer", None)
    with pytest.raises(TypeError):
        _run(mine, tiny, batches, method)


@pytest.mark.parametrize(("seconds", "again"), [(-60, False), (60, True)])
def test_a_forced_run_counts_from_a_moment_on(seconds, again, setting, tiny, batches, monkeypatch):
    _run(setting, tiny, batches)
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    forced = dataclasses.replace(setting, force=True, since=moment)
    monkeypatch.setattr(asking, "answer", None)
    if again:
        with pytest.raises(TypeError):
            _run(forced, tiny, batches)
    else:
        assert _run(forced, tiny, batches)["status"] == "complete"


# -- processes -------------------------------------------------------------------------------------


class _Heard(Silent):
    def __init__(self):
        self.done, self.names = 0, []

    def start(self, description, total):
        self.names.append(description)

    def advance(self, steps):
        self.done += steps


def test_parts_are_done_side_by_side_and_what_comes_last_waits(work, tmp_path):
    told, overall = [_Heard(), _Heard()], _Heard()
    side_by_side(work.parts(), work.works("note", str(tmp_path)), told, overall)
    facts = {p.name: p.read_text().split() for p in tmp_path.iterdir()}
    assert set(facts) == {"a-x", "a-y", "a-None", "b-x"}
    assert len({pid for *_, pid, _ in facts.values()}) == 2
    assert os.getpid() not in {int(pid) for *_, pid, _ in facts.values()}
    assert {threads for *_, threads in facts.values()} == {"1"}
    ended = max(float(facts[name][1]) for name in ("a-x", "a-y"))
    assert float(facts["a-None"][0]) >= ended
    assert overall.done == sum(t.done for t in told) == 4
    assert all(t.done for t in told)


def test_parts_about_one_benchmark_wait_for_each_other(work, tmp_path):
    a_x, a_last, a_y, b_x = work.parts()
    waiting = [a_last, b_x, a_y]
    assert ready(waiting, [a_x]) == a_y, "or a run that both need would be made twice"
    assert ready([a_last, b_x], [a_x]) is None
    assert ready([a_last, b_x], []) == a_last
    side_by_side([a_x, b_x], work.works("note", str(tmp_path)), [_Heard(), _Heard()])
    first, second = ((tmp_path / name).read_text().split() for name in ("a-x", "b-x"))
    assert float(second[0]) >= float(first[1])


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [("known", UnknownPaperError, "no such paper"),
     ("unknown", RuntimeError, "(?s)side_work.*ZeroDivisionError: in the depth"),
     ("killed", LostProcessError, "a, x.*same command continues")],
)  # fmt: skip
def test_what_goes_wrong_in_a_process_is_told(how, error, says, work):
    with pytest.raises(error, match=says):
        side_by_side(work.parts()[:1], work.works("fail", how), [_Heard()])


def test_an_interruption_ends_all_processes(work, tmp_path):
    class Interrupted(_Heard):
        def start(self, description, total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work.parts()[:1], work.works("forever", str(tmp_path)), [Interrupted()])
    (process,) = tmp_path.iterdir()
    with pytest.raises(ProcessLookupError):
        os.kill(int(process.name), 0)


# -- all papers ------------------------------------------------------------------------------------


def _options(folders, **more):
    return options.Options(n=N, benchmarks=(GQA,), budgets=1, repeats=2, energy_window_s=0.05,
                       **folders, **more)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", ["sgl", "early_exit", "aim"])
def test_nothing_timed_is_measured_beside_other_work(key, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    given = _options(folders)
    for part in rep.answer_parts(key, given):
        rep.do_part(given, part, Silent())
    beside = records.read_records(options.folder_of(key, "pocket") / "records")
    assert beside
    assert {r["kind"] for r in beside} <= {"accuracy", "analysis"}
    assert not {r["request"].get("analysis") for r in beside} & {"guide cost", "time", "exit"}
    monkeypatch.setattr(asking, "answer", None)  # the answers are all there
    alone = runners.run_pocket(key, given)
    names = {(r["kind"], r["request"].get("analysis")) for r in alone}
    if key == "sgl":
        assert {("efficiency", None), ("analysis", "guide cost"), ("analysis", "exit")} <= names
    if key == "early_exit":
        assert ("analysis", "time") in names
    if key == "aim":
        (costs,) = [r for r in alone if r["kind"] == "efficiency"]
        assert {"aim", "aim_merge", "aim_early"} <= {row["method"] for row in costs["rows"]}


def test_all_papers_that_run_are_meant_by_all():
    assert set(rep.runnable("pocket")) >= {"visionzip", "aim", "fastervlm", "gsearch", "sgl"}
    assert "visionzip" in rep.runnable("blueprint")
    with pytest.raises(layout.ScaleError, match="name one with --paper"):
        rep.runnable("full")


@pytest.mark.notebook
def test_one_paper_is_answered_side_by_side_too(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    monkeypatch.setattr(asking, "answer", None)  # not in this process
    folder = rep.reproduce("visionzip", options=_options(folders, force=True))
    assert (folder / "visionzip.html").stat().st_size > 10_000
    made = records.read_records(folder / "records")
    table = load_paper("visionzip").pocket_table
    rows = [row for row, budget in table.lines() if budget in (None, table.budgets[0])]
    assert [r["kind"] for r in made].count("accuracy") == len(rows)
    assert {r["kind"] for r in made} == {"accuracy", "efficiency", "attention"}


@pytest.mark.notebook
def test_all_papers_in_one_go_and_again(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    monkeypatch.setattr(rep, "runnable", lambda scale: ["visionzip", "aim"])
    pages = [folder / f"{folder.name}.html" for folder in rep.reproduce_all(
        "pocket", _options(folders))]  # fmt: skip
    assert all(page.stat().st_size > 10_000 for page in pages)
    found = {p.name: p for p in tmp_path.rglob("pocket/*/records/*.json")}
    vanilla = sorted(tmp_path.rglob("vanilla--*.json"))
    assert [p.parts[-3] for p in vanilla] == ["aim", "visionzip"]
    assert vanilla[0].read_bytes() == vanilla[1].read_bytes(), "answered once, and copied"
    said = capsys.readouterr().out
    assert "2 papers at the pocket scale" in said
    before = {name: p.stat().st_mtime_ns for name, p in found.items()}
    began = time.monotonic()
    rep.reproduce_all("pocket", _options(folders))
    again = {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("pocket/*/records/*.json")}
    assert again == before, "nothing is run twice"
    assert time.monotonic() - began < 600


@pytest.mark.parametrize("arguments", [(), ("--paper", "visionzip", "--all")])
def test_one_of_paper_and_all_must_be_given(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "reproduce", *arguments], cwd=project_root(),
        capture_output=True, text=True, env={**os.environ, "FRUGALVLM_RESULTS": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "either --paper KEY" in done.stderr
    assert "--all" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*"))
