"""Runs leave records, continue after a kill, and are not repeated; bad input gets one sentence."""

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from frugalvlm import methods
from frugalvlm.benchmarks import asking, load_benchmark
from frugalvlm.checks import OptionError
from frugalvlm.errors import FrugalError
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.papers import UnknownPaperError, load_paper
from frugalvlm.pocket.installed import WeightsError, verify
from frugalvlm.reproduce import command as rep
from frugalvlm.reproduce import runners
from frugalvlm.runs import accuracy, attention, efficiency, layout, options
from frugalvlm.runs.setting import Setting, Silent
from frugalvlm.views import BudgetError

N = 40


@pytest.fixture(scope="module")
def batches(tiny):
    return asking.Batches(load_benchmark("pocket-gqa"), tiny[1], "test", N, "cpu")


@pytest.fixture
def setting(tmp_path, folder):
    return Setting("pocket", "tiny", model_hash(str(folder)), tmp_path / "records", n=N)


def _run(setting, model, batches, method=None, budget=16):
    method = method or methods.FasterVLM(16)
    bench = load_benchmark("pocket-gqa")
    return accuracy.accuracy_run(setting, model, bench, batches, method, budget, Silent())


class _Stop(RuntimeError):
    pass


def _stop_after(model, monkeypatch, calls):
    """Let `generate` work a number of times, then fail."""
    count = {"calls": 0}
    original = asking.answer

    def answer(*args):
        if count["calls"] == calls:
            raise _Stop
        count["calls"] += 1
        return original(*args)

    monkeypatch.setattr(asking, "answer", answer)
    return count


def test_a_run_leaves_a_record_of_what_happened(setting, tiny, batches):
    record = _run(setting, tiny[0], batches)
    saved = [json.loads(p.read_text()) for p in setting.folder.glob("*.json")]
    assert len(saved) == 1
    assert saved[0]["answers"] == record["answers"]
    asked = len(batches.rows)
    assert record["counts"] == {"asked": asked, "answered": asked, "failed": 0}
    assert record["tokens"]["per_layer"] == [16.0] * 8
    assert record["request"]["method"] == {"method": "fastervlm", "kept_tokens": 16}
    assert record["provenance"]["model_hash"] == setting.model_hash
    assert not list(setting.folder.glob("*.jsonl")), "the log of a finished run is gone"


def test_a_complete_record_is_used_again_unless_forced(setting, tiny, batches, monkeypatch):
    first = _run(setting, tiny[0], batches)
    count = _stop_after(tiny[0], monkeypatch, calls=0)
    again = _run(setting, tiny[0], batches)
    assert again["answers"] == first["answers"]
    assert count["calls"] == 0
    forced = dataclasses.replace(setting, force=True)
    with pytest.raises(_Stop):
        _run(forced, tiny[0], batches)


@pytest.mark.parametrize("change", ["method", "weights", "n"])
def test_another_request_is_not_answered_by_an_old_record(
    change, setting, tiny, batches, monkeypatch
):
    _run(setting, tiny[0], batches)
    _stop_after(tiny[0], monkeypatch, calls=0)
    method, budget = methods.FasterVLM(16), 16
    if change == "method":
        method, budget = methods.FasterVLM(17), 17
    elif change == "weights":
        setting = dataclasses.replace(setting, model_hash="x")
    else:
        setting = dataclasses.replace(setting, n=N + 1)
    with pytest.raises(_Stop):
        _run(setting, tiny[0], batches, method, budget)


def test_an_interrupted_run_continues_where_it_stopped(setting, tiny, batches, monkeypatch):
    whole = _run(Setting(**{**vars(setting), "folder": setting.folder / "x"}), tiny[0], batches)
    with monkeypatch.context() as patch:
        _stop_after(tiny[0], patch, calls=1)
        with pytest.raises(_Stop):
            _run(setting, tiny[0], batches)
    assert not list(setting.folder.glob("*.json")), "an unfinished run leaves no record"
    assert len(list(setting.folder.glob("*.jsonl"))) == 1
    count = _stop_after(tiny[0], monkeypatch, calls=99)
    resumed = _run(setting, tiny[0], batches)
    assert count["calls"] == len(batches.batches) - 1
    assert resumed["answers"] == whole["answers"]
    assert resumed["metrics"] == whole["metrics"]


def test_kill_9_in_mid_run_loses_nothing(setting, tiny, batches, folder, monkeypatch):
    script = f"""
        import os, signal
        from pathlib import Path
        from frugalvlm import methods
        from frugalvlm.benchmarks import asking, load_benchmark
        from frugalvlm.loading import load_vlm, model_hash
        from frugalvlm.runs import accuracy
        from frugalvlm.runs.setting import Setting, Silent
        model, processor = load_vlm({str(folder)!r})
        bench = load_benchmark("pocket-gqa")
        setting = Setting("pocket", "tiny", model_hash({str(folder)!r}),
                               Path({str(setting.folder)!r}), n={N})
        batches = asking.Batches(bench, processor, "test", {N}, "cpu")
        original, calls = asking.answer, []
        def answer(*args):
            if calls:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(1)
            return original(*args)
        asking.answer = answer
        accuracy.accuracy_run(setting, model, bench, batches, methods.FasterVLM(16), 16, Silent())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    count = _stop_after(tiny[0], monkeypatch, calls=99)
    record = _run(setting, tiny[0], batches)
    assert count["calls"] == len(batches.batches) - 1
    assert record["counts"]["asked"] == len(batches.rows)


def test_methods_change_answers_only_inside_their_block(tiny, batches):
    bench = load_benchmark("pocket-gqa")
    before = asking.answer_all(tiny[0], batches, bench.max_new_tokens)
    with methods.Random(4).on(tiny[0]):
        asking.answer_all(tiny[0], batches, bench.max_new_tokens)
    assert asking.answer_all(tiny[0], batches, bench.max_new_tokens) == before


def test_efficiency_run_measures_all_methods_side_by_side(setting, tiny):
    plan = [(methods.Vanilla(), 144), (methods.FastV(16), 16), (methods.VisionZip(14, 2), 16)]
    record = efficiency.efficiency_run(
        setting, *tiny, plan, Silent(), batch=2, repeats=2, decode_steps=1,
        energy_window_s=0.05,
    )  # fmt: skip
    vanilla, fastv, visionzip = record["rows"]
    assert vanilla["tokens_mean"] == 144
    assert visionzip["tokens_mean"] == visionzip["tokens_after"] == 16
    assert fastv["tokens_mean"] == (2 * 144 + 6 * 16) / 8
    assert visionzip["kv_visual_bytes"] == vanilla["kv_visual_bytes"] / 9
    assert visionzip["flops_parts"]["decoder"] < fastv["flops_parts"]["decoder"]
    assert fastv["flops_parts"]["decoder"] < vanilla["flops_parts"]["decoder"]
    assert visionzip["flops_parts"]["tower"] == vanilla["flops_parts"]["tower"]
    assert sum(vanilla["flops_parts"].values()) == vanilla["flops"]
    for row in record["rows"]:
        assert row["prefill_ms"]["n"] == 2
        energy = row["energy"]
        assert energy["modelled"] is (energy["methods"].get("cpu") != "rapl")
        assert energy["reasons"] or not energy["modelled"]


def test_attention_run_leaves_the_attention_implementation_as_it_was(setting, tiny):
    record = attention.attention_run(setting, *tiny, Silent(), images=6)
    assert len(record["mass_per_layer"]) == 3
    assert all(1 / 9 <= m <= 1 for m in record["mass_per_layer"])
    assert tiny[0].model.vision_tower.config._attn_implementation == "sdpa"


def test_saved_models_load_with_auto_classes_and_keep_their_answers(folder, tiny, batches):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    inputs = batches.batches[0][1]
    torch.testing.assert_close(model(**inputs).logits, tiny[0](**inputs).logits)
    assert type(processor) is type(tiny[1])


@pytest.mark.parametrize("harm", ["flipped byte", "missing file", "missing folder"])
def test_damaged_weights_are_named_with_the_remedy(harm, folder, tmp_path):
    copy = tmp_path / "tiny"
    if harm != "missing folder":
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        verify(copy)
        weights = copy / "model.safetensors"
        if harm == "missing file":
            weights.unlink()
        else:
            data = bytearray(weights.read_bytes())
            data[-3] ^= 1
            weights.write_bytes(data)
    with pytest.raises(WeightsError, match=r"git checkout.*invoke train"):
        verify(copy)


def test_a_hub_model_out_of_reach_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("frugalvlm.loading.hub_answers", lambda: False)
    with pytest.raises(WeightsError, match=r"hf download llava-hf/llava-1.5-7b-hf.*14 GB.*16 GB"):
        load_vlm("llava-hf/llava-1.5-7b-hf", revision="main")
    with pytest.raises(WeightsError, match="Known: pocket-llava-base"):
        load_vlm("pocket-llava-huge")
    with pytest.raises(WeightsError, match="no Hub id"):
        load_vlm("nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(folder):
    with pytest.raises(OptionError, match="No GPU"):
        load_vlm(str(folder), device="cuda")


def test_an_unknown_paper_lists_the_known_ones():
    with pytest.raises(UnknownPaperError, match="visionzip"):
        rep.reproduce("visionzap")
    assert issubclass(UnknownPaperError, FrugalError)


def test_scales_that_are_not_there_say_so():
    with pytest.raises(layout.ScaleError, match="pocket, blueprint or full"):
        rep.reproduce("visionzip", "huge")
    with pytest.raises(layout.ScaleError, match="invoke papers"):
        runners.run_pocket("nvila")


@pytest.mark.parametrize("budget", [0, -3, 145, True])
def test_impossible_budgets_are_refused(budget):
    for key in ("random", "fastv", "fastervlm", "visionzip"):
        with pytest.raises(BudgetError):
            layout.budgeted(key, budget, 144)


def test_rows_follow_the_papers_layout():
    rows = layout.rows_of(layout.pocket_table(load_paper("visionzip")), options.Options())
    assert rows[0] == ("vanilla", 144)
    assert rows[1:4] == [("blank", 144), ("no_image", 0), ("no_image_after", 0)]
    controls = ["random", "uniform", "avgpool", "downsample"]
    methods_ = ["fastv", "sparsevlm", "fastervlm", "visionzip"]
    assert [name for name, _ in rows[4:12]] == [*controls, *methods_]
    assert [b for _, b in rows[4:]] == [48] * 8 + [32] * 8 + [16] * 11


def test_blueprint_counts_are_those_of_the_formulas(tmp_path, monkeypatch):
    """LLaVA-1.5-7B prefill against closed formulas, and VisionZip's exact share of the cache."""
    from frugalvlm.runs.blueprint import TEXT_AFTER, TEXT_BEFORE, blueprint, count

    model = blueprint("LLaVA-1.5-7B").build()
    vanilla = count(model, "LLaVA-1.5-7B", methods.Vanilla(), 576)
    zipped = count(model, "LLaVA-1.5-7B", methods.VisionZip(54, 10), 64)
    layers, d, m = 32, 4096, 11008

    def decoder_flops(tokens):
        return layers * (2 * tokens * (4 * d * d + 3 * d * m) + 4 * d * tokens * tokens)

    text = TEXT_BEFORE + TEXT_AFTER
    assert vanilla["flops_parts"]["decoder"] == decoder_flops(576 + text)
    assert zipped["flops_parts"]["decoder"] == decoder_flops(64 + text)
    assert vanilla["parameters"] == 7_063_427_072
    assert zipped["kv_visual_bytes"] == 64 * 2 * layers * d * 2
    assert zipped["tokens_mean"] == 64
