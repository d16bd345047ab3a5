"""The verbs of `frugalvlm` as tasks: `invoke --list`. The work is in the package."""

from invoke import Context, task
from invoke.exceptions import Exit


def _frugalvlm(verb, **options):
    """Call the command with the options that were given; its status is the task's."""
    from frugalvlm.cli import main

    arguments = [verb]
    for name, value in options.items():
        option = "-n" if name == "n" else f"--{name.rstrip('_')}"
        if value is True:
            arguments.append(option)
        elif value not in (None, False):
            # With "=", a value may begin with a minus and is told from an option.
            arguments.append(f"-n{value}" if name == "n" and value else f"{option}={value}")
    if code := main(arguments):
        raise Exit(code=code)


# None: not given. What was given goes on as the text it is, and is checked in one place.
@task
def papers(c: Context):
    """List the papers and what is published at which scale."""
    _frugalvlm("papers")


@task(
    help={
        "paper": "key of the paper, see `invoke papers`",
        "all_": "every paper that runs at this scale, sharing what can be shared",
        "scale": "pocket (laptop), blueprint (counted costs) or full (Hub weights, GPU)",
        "n": "questions per benchmark; default: 200 for one paper, 100 for all; published: 300; "
        "at the full scale 500, and 0 for all there are",
        "benchmarks": "ids of benchmarks, separated by commas; default: all",
        "budgets": "how many of the table's budgets, the first ones; default: all",
        "model": "embedded model, folder or Hub id",
        "revision": "branch, tag or commit of a Hub model",
        "device": "cpu, cuda or cuda:N",
        "repeats": "rounds of the time measurement, at least 2",
        "force": "run again although complete records exist",
        "publish": "copy the records and pages to results/",
        "plan": "at the full scale: only say what would be fetched and asked, and for how long",
        "table": "at the full scale: which of the paper's tables; default: the first one",
        "batch": "at the full scale: questions asked at once; default: as many as fit",
    }
)
def reproduce(
    c: Context, paper=None, all_=False, scale=None, n=None, benchmarks=None, budgets=None,
    model=None, revision=None, device=None, repeats=None, force=False, publish=False, plan=False,
    table=None, batch=None,
):  # fmt: skip
    """Reproduce a paper's tables, or all of them: runs, verdicts, executed notebook, HTML page."""
    _frugalvlm(
        "reproduce", paper=paper, all_=all_, scale=scale, n=n, benchmarks=benchmarks,
        budgets=budgets, model=model, revision=revision, device=device, repeats=repeats,
        force=force, publish=publish, plan=plan, table=table, batch=batch,
    )  # fmt: skip


@task(
    help={
        "paper": "key of the paper",
        "table": "which of its tables; default: the first one",
        "benchmarks": "ids of official benchmarks, separated by commas; default: all of the table",
        "model": "Hub id in the place of the paper's checkpoint",
        "revision": "branch, tag or commit of that model",
    }
)
def fetch(c: Context, paper=None, table=None, benchmarks=None, model=None, revision=None):
    """Fetch what a paper needs at the full scale: checkpoint and official benchmarks."""
    _frugalvlm("fetch", paper=paper, table=table, benchmarks=benchmarks, model=model,
               revision=revision)  # fmt: skip


@task(
    help={
        "methods": "keys of methods, for example fastv,visionzip; none: all that is recorded",
        "budgets": "visual tokens per crop (48,24) or shares (25%)",
        "data": "ids of benchmarks, or a folder of your own",
        "n": "questions per benchmark; default: 100",
        "model": "embedded model, folder or Hub id",
        "revision": "branch, tag or commit of a Hub model",
        "device": "cpu, cuda or cuda:N",
        "repeats": "rounds of the time measurement, at least 2",
        "force": "run again although there are records",
        "publish": "copy the pages to results/",
    }
)
def compare(
    c: Context, methods=None, budgets=None, data=None, n=None, model=None, revision=None,
    device=None, repeats=None, force=False, publish=False,
):  # fmt: skip
    """Compare methods at token budgets (--methods), or all that is recorded side by side."""
    _frugalvlm(
        "compare", methods=methods, budgets=budgets, data=data, n=n, model=model,
        revision=revision, device=device, repeats=repeats, force=force, publish=publish,
    )  # fmt: skip


@task(
    help={
        "model": "embedded model to train (on)",
        "method": "key of a method to train on the model, as it is",
        "folder": "where checkpoints go; an interrupted run continues from here",
        "device": "cpu, cuda or cuda:N",
        "seed": "decides initial weights and questions",
        "more": "this many more steps of instruction tuning, from the installed weights",
        "check": "only retrain the first steps of every stage and compare with the shipped losses",
    }
)
def train(
    c: Context, model=None, method=None, folder=None, device=None, seed=None, more=None, check=False
):
    """Train an embedded model, or a method on one, or continue; and install the weights."""
    _frugalvlm(
        "train", model=model, method=method, folder=folder, device=device, seed=seed, more=more,
        check=check,
    )  # fmt: skip


@task(help={"method": "key of the method", "paper": "key of the paper"})
def new(c: Context, method=None, paper=None):
    """Lay out the files of a new method or paper, which run at once."""
    _frugalvlm("new", method=method, paper=paper)


@task
def lab(c: Context):
    """Open JupyterLab at notebooks/."""
    _frugalvlm("lab")


@task(
    help={
        "only": "a path or pytest expression, for example tests/contract",
        "all_": "notebooks, whole reproductions, too",
        "faults": "only what can go wrong: kills, full disks, wrong input; all of it",
    }
)
def test(c: Context, only=None, all_=False, faults=False):
    """Run the tests; with --all also those that take long, as in CI."""
    _frugalvlm("test", only=only, all_=all_, faults=faults)


@task(
    help={
        "transformers": "oldest, newest (of those that are served) or a release such as 5.20",
        "only": "a path or pytest expression, for example tests/contract/test_units.py",
    }
)
def contracts(c: Context, transformers=None, only=None):
    """Run the contract tests on another release of Transformers, in a folder of its own."""
    _frugalvlm("contracts", transformers=transformers, only=only)


@task
def lint(c: Context):
    """Check style, types, and that source notebooks carry no outputs."""
    c.run("ruff check . && ruff format --check . && mypy")


@task(help={"device": "cpu, cuda or cuda:N"})
def bench(c: Context, device=None):
    """Measure each method's own tax on prefill, and what scores cost."""
    _frugalvlm("bench", device=device)


@task
def readme(c: Context):
    """Regenerate the tables of README.md and of the model cards from the committed records."""
    _frugalvlm("readme")


@task
def clean(c: Context):
    """Remove caches and unfinished runs; records, weights and notebooks stay."""
    kept = " ".join(f"-e '!{name}/'" for name in ("venv", ".venv", "checkpoints", "/results/.work"))
    c.run(f"git clean -fdX {kept} src tests notebooks results")
