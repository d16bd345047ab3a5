"""Every wrong value of an option ends in one sentence, from a command line and from a notebook."""

import numpy as np
import pytest
import torch

from frugalvlm.benchmarks.base import MAX_QUESTIONS
from frugalvlm.checks import OptionError, check_device, check_present
from frugalvlm.cli import MOST_QUESTIONS, SCALES, main
from frugalvlm.papers import SCALES as PAPERS_SCALES
from frugalvlm.pocket import watch
from frugalvlm.pocket.recipe import Stage
from frugalvlm.probes import discrimination, phenomena
from frugalvlm.reproduce import command
from frugalvlm.runs.options import Options, sizes_for

ONE = ("reproduce", "--paper", "visionzip")
WHOLE = "whole number"
WRONG = [
    *(((*ONE, option), WHOLE) for option in ("-n-1", "-n0.5", "-nabc", "-n1e3", "-n=", "-n100001")),
    *(((*ONE, "--repeats", text), WHOLE) for text in ("1", "x", "")),
    *(((*ONE, "--budgets", text), WHOLE) for text in ("0", "48,24", "")),
    *(
        ((*ONE, "--device", text), "cpu, cuda")
        for text in ("gpu", "mps", "tpu", "", "CPU", "cpu:x", "cuda:", "cuda:x")
    ),
    ((*ONE, "--benchmarks", "pocket-gqq"), "Known: pocket-gqa"),
    ((*ONE, "--benchmarks", "pocket-gqa,,"), "separated by commas"),
    ((*ONE, "--model", ""), "Hub id"),
    ((*ONE, "--revision", ""), "branch, tag or commit"),
    ((*ONE, "--revision", "main"), "leave the revision out"),
    ((*ONE, "--scale", "huge"), "pocket, blueprint or full"),
    ((*ONE, "--scale", "blueprint", "-n", "3"), "-n has no effect at the blueprint scale"),
    ((*ONE, "--scale", "blueprint", "--model", "m"), "--model has no effect"),
    ((*ONE, "--frobnicate"), "--help"),
    ((*ONE, "--all"), "either --paper"),
    (("reproduce",), "either --paper"),
    (("reproduce", "--paper", ""), "known: "),
    (("reproduce", "--paper", "visionzap"), "did you mean 'visionzip'"),
    (("reproduce", "--all", "--model", "nonsense"), "no Hub id"),
    (("reproduce", "--all", "--revision", "v2"), "leave the revision out"),
    (("frobnicate",), "--help"),
    ((), "--help"),
    (("compare", "--methods", "fastv,"), "separated by commas"),
    (("compare", "--methods", "fastv", "--device", "gpu"), "cpu, cuda"),
    (("compare", "--methods", "fastv", "-n", "0"), WHOLE),
    (("compare", "--methods", "fastv", "--publish"), "without --methods"),
    (("compare", "--budgets", "48"), "--budgets needs --methods"),
    (("compare", "-n", "3"), "-n needs --methods"),
    (("train", "--device", "x"), "cpu, cuda"),
    (("train", "--seed", "-1"), WHOLE),
    (("train", "--seed", "1e3"), WHOLE),
    (("train", "--more", "0"), WHOLE),
    (("train", "--model", "pocket-none"), "Known: pocket-llava-base"),
    (("train", "--folder", __file__), "is a file"),
    (("train", "--check", "--seed", "1"), "leave --more, --seed"),
    (("train", "--method", "none"), "Known methods: vanilla"),
    (("train", "--method", "fastv"), "Methods that learn: dyvte"),
    (("train", "--method", "dyvte", "--model", "llava-hf/llava-1.5-7b-hf"), "no embedded model"),
    (("train", "--method", "dyvte", "--check"), "leave them out with --method"),
    (("bench", "--device", "x"), "cpu, cuda"),
    (("test", "--faults", "--all"), "leave --only and --all out"),
    (("test", "--faults", "--only", "tests/cli"), "leave --only and --all out"),
    (("new",), "either --method"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=str)
def test_wrong_options_end_in_a_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path / "results"))
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("verb", [(*ONE,), ("reproduce", "--all"), ("bench",), ("train",)])
def test_a_gpu_that_is_not_there_is_named_before_anything_runs(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    assert main([*verb, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("No GPU was found for device 'cuda'")
    assert not list(tmp_path.iterdir())


def test_a_gpu_behind_the_last_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_present("cuda:1") == "cuda:1"
    with pytest.raises(OptionError, match="cuda:0 to cuda:1"):
        check_present("cuda:2")
    assert check_device("cuda:7") == "cuda:7"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (-1, 0, 0.5, "20", True, None, MAX_QUESTIONS + 1)),
        *(("repeats", value) for value in (1, 0, 2.0, "9")),
        *(("budgets", value) for value in (-1, 0, "3", [3])),
        *(("energy_window_s", value) for value in (-1, 0, "1", float("nan"), float("inf"), True)),
        *(("benchmarks", value) for value in ("pocket-gqa", ("pocket-gqq",), (), 3, (3,))),
        *(("benchmarks", tuple(text)) for text in ("pocket-gqa",)),
        *(("device", value) for value in ("gpu", "", None, 0)),
        *(("model", value) for value in ("", None, 3)),
        ("guide", ""),
        ("revision", ""),
        ("force", "no"),
    ],
)
def test_options_of_notebooks_are_checked_when_they_are_made(name, value):
    with pytest.raises(OptionError, match=name) as error:
        Options(**{name: value})
    assert "\n" not in str(error.value)


def test_a_text_in_place_of_a_list_is_quoted_whole():
    for given in ("pocket-gqa", tuple("pocket-gqa")):  # a notebook makes a tuple of it first
        with pytest.raises(OptionError, match="got 'pocket-gqa'"):
            Options(benchmarks=given)


def test_numpy_numbers_and_lists_are_taken_as_they_are_meant():
    options = Options(n=np.int64(20), benchmarks=["pocket-gqa", "pocket-gqa"], budgets=np.int32(2))
    assert type(options.n) is int
    assert options == Options(n=20, benchmarks=("pocket-gqa",), budgets=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: discrimination.run(n=-1),
        lambda: discrimination.run(budgets=-1),
        lambda: discrimination.run(budgets=[-1]),
        lambda: discrimination.run(benchmarks="pocket-gqa"),
        lambda: discrimination.run(device="gpu"),
        lambda: phenomena.run(images=0),
        lambda: phenomena.run(n="20"),
        lambda: watch.exam(0, 2),
        lambda: watch.exam(4, 9),
        lambda: watch.exam("4", 2),
        lambda: Stage("tower", -5, 32, 3e-3, 20),
        lambda: Stage("tower", 5, 32, 3e-3, 20, things=(9,)),
    ],
)
def test_parameters_of_the_lessons_are_checked_first(call):
    with pytest.raises(OptionError):
        call()


def test_options_reach_the_run(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "reproduce", lambda *given: asked.append(given))
    told = ["-n", "20", "--benchmarks", "pocket-gqa,pocket-mme", "--budgets", "2", "--repeats", "3"]
    assert main([*ONE, *told, "--force"]) == 0
    options = Options(
        **sizes_for(20) | {"repeats": 3}, benchmarks=("pocket-gqa", "pocket-mme"), budgets=2,
        force=True,
    )  # fmt: skip
    assert asked == [("visionzip", "pocket", options)]


def test_what_is_repeated_for_speed_is_the_same():
    assert MOST_QUESTIONS == MAX_QUESTIONS
    assert set(PAPERS_SCALES) == set(SCALES)
