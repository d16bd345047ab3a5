"""Command line of the kit: `invoke --list`. Tasks only compose; the work is in the package."""

import sys

from invoke import Context, task
from invoke.exceptions import Exit


def _run(function, *args, **kwargs):
    """Call into the package; a known problem ends the task with its one sentence."""
    from frugalvlm.errors import FrugalError

    try:
        return function(*args, **kwargs)
    except FrugalError as error:
        raise Exit(f"{error}", code=2) from None
    except KeyboardInterrupt:
        raise Exit(
            "Interrupted. Nothing is lost: the same command continues where this one stopped.",
            code=130,
        ) from None


@task
def papers(c: Context):
    """List the thirteen papers and what is reproduced at which scale."""
    from frugalvlm.reproduce.printed import print_papers

    _run(print_papers)


@task(
    help={
        "paper": "key of the paper, see `invoke papers`",
        "all_": "every paper that runs at this scale, sharing what can be shared",
        "scale": "pocket (laptop), blueprint (counted costs) or full (Hub weights, GPU)",
        "n": "questions per benchmark; 0: 300 for one paper, 100 for all; fewer measure shorter",
        "model": "embedded model, folder or Hub id",
        "revision": "branch, tag or commit of a Hub model",
        "device": "cpu or cuda",
        "force": "run again although complete records exist",
    }
)
def reproduce(
    c: Context, paper="", all_=False, scale="pocket", n=0, model="", revision=None, device="cpu",
    force=False,
):  # fmt: skip
    """Reproduce a paper's tables, or all of them: runs, verdicts, executed notebook, HTML page."""
    from frugalvlm.reproduce import command as study
    from frugalvlm.runs.options import POCKET_MODEL, QUESTIONS, QUICK, Options, sizes_for

    if bool(paper) == all_:
        raise Exit("Give either --paper KEY (`invoke papers` lists them) or --all.", code=2)
    options = Options(
        **sizes_for(n or (QUICK["n"] if all_ else QUESTIONS)),
        model=model or POCKET_MODEL,
        revision=revision,
        device=device,
        force=force,
    )
    if all_:
        _run(study.reproduce_all, scale, options)
    else:
        _run(study.reproduce, paper, scale, options)


@task
def compare(c: Context):
    """Set all recorded methods side by side: accuracy, efficiency, emissions; nothing is run."""
    from frugalvlm.reproduce.printed import compare

    _run(compare)


@task(
    help={
        "model": "embedded model to train",
        "folder": "where checkpoints go; an interrupted run continues from here",
        "device": "cpu or cuda",
        "seed": "decides initial weights and questions",
        "more": "this many more steps of instruction tuning, from the installed weights",
        "check": "only retrain the first steps of every stage and compare with the shipped losses",
    }
)
def train(
    c: Context, model="pocket-llava-base", folder="", device="cpu", seed=0, more=0, check=False
):
    """Train an embedded model, or continue an interrupted run, and install its weights."""
    from frugalvlm.pocket import train as training

    if check:
        _run(training.check, model, device)
    elif more:
        _run(training.train_more, model, more, folder, device, seed)
    else:
        _run(training.train_and_install, model, folder, device, seed)


@task
def lab(c: Context):
    """Open JupyterLab at notebooks/."""
    c.run(f"{sys.executable} -m jupyterlab notebooks", pty=True)


@task(help={"only": "a path or pytest expression, for example tests/contract"})
def test(c: Context, only="tests"):
    """Run the test suite, notebooks included."""
    c.run(f"{sys.executable} -m pytest {only}", pty=sys.stdout.isatty())


@task
def lint(c: Context):
    """Check style, types, and that source notebooks carry no outputs."""
    c.run("ruff check . && ruff format --check . && mypy")


@task(help={"device": "cpu or cuda"})
def bench(c: Context, device="cpu"):
    """Measure each method's own tax on prefill, and what scores cost; writes results/benchmark/."""
    from frugalvlm.bench.command import print_bench

    _run(print_bench, device)


@task
def readme(c: Context):
    """Regenerate the tables of README.md and of the model cards from the committed records."""
    from frugalvlm.reproduce.readme import update_all

    _run(update_all)


@task
def clean(c: Context):
    """Remove caches and unfinished runs; records, weights and notebooks stay."""
    kept = " ".join(f"-e '!{name}/'" for name in ("venv", ".venv", "checkpoints", "/results/.work"))
    c.run(f"git clean -fdX {kept} src tests notebooks results")
