"""The command `frugalvlm`: the verbs of the kit, each a line of help; `invoke` has the same.

Verbs only read their options and call the package. What needs torch is imported when a verb runs,
so lists, help and wrong options are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from frugalvlm.checks import OptionError, check_device, check_names, check_present, read_whole
from frugalvlm.errors import NOT_WRITABLE, FrugalError, unwritable
from frugalvlm.paths import command, notebooks_dir, project_root, repository, work_dir

__all__ = ["main"]

SCALES = ("pocket", "blueprint", "full")
MOST_QUESTIONS = 100_000  # of a benchmark; `benchmarks.base`, which needs torch, says the same
# Which tests are run, if not all of a path.
FAST = "not slow and not notebook and not faults"
ALL = "not faults"
FAULTS = "tests/faults"
INTERRUPTED = "Interrupted. Nothing is lost: the same command continues where this one stopped."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; a known problem ends it with its one sentence on standard error.

    Args:
        arguments: what stands behind `frugalvlm`; default: those of this process.

    Returns:
        0; 2 for a known problem; 130 when interrupted; of tools that run, their own status.
    """
    try:
        given = _parser().parse_args(arguments)
        return given.verb(given) or 0
    except FrugalError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("frugalvlm", ""):
            raise
        print(_missing(error.name or ""), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        print(unwritable(error.filename or "the results", error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Raises where argparse prints its usage and leaves."""

    def error(self, message: str) -> NoReturn:
        """A wrong option is a known problem."""
        raise OptionError(f"{self.prog}: {message} (see `{self.prog} --help`).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="frugalvlm", allow_abbrev=False,
        description="Reproduce and compare papers on efficient vision-language models.",
    )  # fmt: skip
    version = importlib.import_module("frugalvlm").__version__
    parser.add_argument("--version", action="version", version=f"frugalvlm {version}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")

    def verb(name: str, function: Any, help_: str) -> argparse.ArgumentParser:
        own = verbs.add_parser(name, help=help_, description=help_, allow_abbrev=False)
        own.set_defaults(verb=function)
        return own

    verb("papers", _papers, "List the papers and what is published at which scale.")
    own = verb("reproduce", _reproduce, "Reproduce a paper's tables, or all of them: runs, "
               "verdicts, executed notebook, HTML page.")  # fmt: skip
    own.add_argument("--paper", metavar="KEY", help="key of the paper, see `frugalvlm papers`")
    own.add_argument("--all", action="store_true", help="every paper that runs at this scale")
    own.add_argument("--scale", default="pocket", help="pocket (laptop), blueprint (counted costs) "
                     "or full (Hub weights, GPU)")  # fmt: skip
    _add_size(own, "200 for one paper, 100 for all; published: 300")
    own.add_argument("--benchmarks", metavar="A,B", help="ids of benchmarks; default: all")
    own.add_argument("--budgets", metavar="N", help="how many of the table's budgets, first ones")
    _add_model(own)
    own.add_argument("--repeats", metavar="N", help="rounds of the time measurement, at least 2")
    own.add_argument("--force", action="store_true", help="run again although there are records")
    own.add_argument("--publish", action="store_true", help="copy records and pages to results/")
    own.add_argument("--plan", action="store_true", help="at the full scale: only say what would "
                     "be fetched and asked, and for how long")  # fmt: skip
    own.add_argument("--table", metavar="ID", help="at the full scale: which of its tables")
    own.add_argument("--batch", metavar="N", help="at the full scale: questions asked at once")
    own = verb("fetch", _fetch, "Fetch what a paper needs at the full scale: checkpoint and "
               "official benchmarks.")  # fmt: skip
    own.add_argument("--paper", metavar="KEY", required=True, help="key of the paper")
    own.add_argument("--table", metavar="ID", help="which of its tables; default: the first one")
    own.add_argument("--benchmarks", metavar="A,B", help="ids of benchmarks; default: all")
    own.add_argument("--model", help="Hub id in the place of the paper's checkpoint")
    own.add_argument("--revision", help="branch, tag or commit of that model")
    own = verb("compare", _compare, "Compare methods at token budgets (--methods), or set all "
               "that is recorded side by side.")  # fmt: skip
    own.add_argument("--methods", metavar="A,B", help="keys of methods, as fastv,visionzip")
    own.add_argument("--budgets", metavar="N,N", help="visual tokens per crop or shares (25%%)")
    own.add_argument("--data", metavar="A,B", help="ids of benchmarks, or a folder of your own")
    _add_size(own, "100")
    _add_model(own)
    own.add_argument("--repeats", metavar="N", help="rounds of the time measurement, at least 2")
    own.add_argument("--force", action="store_true", help="run again although there are records")
    own.add_argument("--publish", action="store_true", help="copy the pages to results/")
    own = verb("train", _train, "Train an embedded model, or a method on one (--method), or "
               "continue an interrupted run, and install the weights.")  # fmt: skip
    own.add_argument("--model", default="pocket-llava-base", help="embedded model to train (on)")
    own.add_argument("--method", metavar="KEY", help="method to train on the model, as it is")
    own.add_argument("--folder", default="", help="where checkpoints go, to continue from")
    own.add_argument("--device", help="cpu, cuda or cuda:N")
    own.add_argument("--seed", metavar="N", help="decides initial weights and questions")
    own.add_argument("--more", metavar="N", help="this many more steps, from the installed weights")
    own.add_argument("--check", action="store_true",
                     help="only retrain the first steps and compare the losses")  # fmt: skip
    own = verb("bench", _bench, "Measure each method's own tax on prefill, and what scores cost.")
    own.add_argument("--device", help="cpu, cuda or cuda:N")
    own = verb("new", _new, "Lay out the files of a new method or paper, which run at once.")
    own.add_argument("--method", metavar="KEY", help="key of the method")
    own.add_argument("--paper", metavar="KEY", help="key of the paper")
    verb("readme", _readme, "Regenerate the tables of README.md and of the model cards.")
    verb("lab", _lab, "Open JupyterLab at the notebooks.")
    own = verb("test", _test, "Run the tests; --all: also those that take long (in a clone).")
    own.add_argument("--only", help="a path or pytest expression")
    own.add_argument("--all", action="store_true", help="notebooks, whole reproductions, too")
    own.add_argument("--faults", action="store_true", help="only what can go wrong: kills, "
                     "full disks, wrong input; all of it")  # fmt: skip
    own = verb("contracts", _contracts, "Run the contract tests on another release of "
               "Transformers, installed into a folder of its own (in a clone).")  # fmt: skip
    own.add_argument(
        "--transformers", default="newest", metavar="RELEASE",
        help="oldest or newest of those that are served, or a release such as 5.20",
    )  # fmt: skip
    own.add_argument("--only", default="tests/contract", help="a path or pytest expression")
    return parser


def _add_size(own: argparse.ArgumentParser, default: str) -> None:
    own.add_argument("-n", metavar="N", help=f"questions per benchmark; default: {default}")


def _add_model(own: argparse.ArgumentParser) -> None:
    own.add_argument("--model", help="embedded model, folder or Hub id")
    own.add_argument("--revision", help="branch, tag or commit of a Hub model")
    own.add_argument("--device", help="cpu, cuda or cuda:N")


# -- verbs -------------------------------------------------------------------------------------


def _papers(given: argparse.Namespace) -> None:
    _from("reproduce.printed").print_papers()


def _reproduce(given: argparse.Namespace) -> None:
    if (given.paper is None) != given.all:
        raise OptionError(f"Give either --paper KEY (`{command('papers')}` lists them) or --all.")
    if given.scale not in SCALES:
        raise OptionError(f"Unknown scale '{given.scale}': pocket, blueprint or full.")
    if given.scale == "full":
        _reproduce_full(given)
        return
    for name in ("plan", "table", "batch"):
        if getattr(given, name):
            raise OptionError(f"--{name} is for the full scale: leave it out, or add --scale full.")
    if given.scale == "blueprint":
        _refuse_with_blueprint(given)
    numbers = {
        "n": _whole("-n", given.n, 1, MOST_QUESTIONS),
        "budgets": _whole("--budgets", given.budgets),
        "repeats": _whole("--repeats", given.repeats, 2),
    }
    texts = {name: getattr(given, name) for name in ("model", "revision", "device")}
    benchmarks = _names("--benchmarks", given.benchmarks)
    if given.device is not None:
        check_device(given.device)
    if given.publish:
        project_root()  # there must be a place to publish to
    if given.paper is not None:
        _from("papers").load_paper(given.paper)
    study, sizes = _from("reproduce.command"), _from("runs.options")
    told = {**numbers, **texts, "benchmarks": benchmarks, "force": given.force}
    usual = (sizes.QUICK if given.all else sizes.ONE)["n"]
    measured = sizes.sizes_for(usual if given.n is None else numbers["n"])
    options = sizes.Options(**{**measured, **{k: v for k, v in told.items() if v is not None}})
    if given.all:
        study.reproduce_all(given.scale, options)
    else:
        study.reproduce(given.paper, given.scale, options)
    if given.publish:
        keys = study.runnable(given.scale) if given.all else [given.paper]
        made = _from("reproduce.publish").publish(given.scale, keys)
        print(f"Published {len(made)} files in {project_root() / 'results' / given.scale}")


def _reproduce_full(given: argparse.Namespace) -> None:
    if given.all:
        raise OptionError("At the full scale papers are reproduced one by one: give --paper KEY.")
    if given.repeats is not None:
        raise OptionError("--repeats has no effect at the full scale, which measures no time.")
    if given.publish:
        project_root()
    told = {
        "n": _whole("-n", given.n, 0),
        "budgets": _whole("--budgets", given.budgets),
        "batch": _whole("--batch", given.batch),
        "device": None if given.device is None else check_present(given.device),
        "force": given.force or None,
        **_full_names(given),
    }
    study = _from("reproduce.command")
    options = _full_options(told)
    study.reproduce(given.paper, "full", options, plan=given.plan)
    if given.publish and not given.plan:
        made = _from("reproduce.publish").publish("full", [given.paper])
        print(f"Published {len(made)} files in {project_root() / 'results' / 'full'}")


def _fetch(given: argparse.Namespace) -> None:
    _from("reproduce.fetch").fetch(given.paper, _full_options(_full_names(given)))


def _full_names(given: argparse.Namespace) -> dict[str, Any]:
    """What tells which table, columns and checkpoint are meant."""
    names = _listed("--benchmarks", given.benchmarks)
    told = {name: getattr(given, name) for name in ("table", "model", "revision")}
    return {**told, "benchmarks": None if names is None else tuple(names)}


def _full_options(told: dict[str, Any]) -> Any:
    return _from("runs.full").FullOptions(**{k: v for k, v in told.items() if v is not None})


def _refuse_with_blueprint(given: argparse.Namespace) -> None:
    """Counting asks no questions and has its own models: an option without effect is an error."""
    for name in ("n", "benchmarks", "budgets", "model", "revision", "device", "repeats"):
        if getattr(given, name) is not None:
            option = "-n" if name == "n" else f"--{name}"
            raise OptionError(
                f"{option} has no effect at the blueprint scale, which counts costs on the "
                "papers' own architectures: leave it out."
            )


def _compare(given: argparse.Namespace) -> None:
    told = {
        "methods": _listed("--methods", given.methods),
        "budgets": _listed("--budgets", given.budgets),
        "data": _data(given.data),
        "n": _whole("-n", given.n, 1, MOST_QUESTIONS),
        "model": given.model,
        "revision": given.revision,
        "device": None if given.device is None else check_present(given.device),
        "repeats": _whole("--repeats", given.repeats, 2),
        "force": given.force or None,
    }
    told = {name: value for name, value in told.items() if value is not None}
    if "methods" in told:
        if given.publish:
            raise OptionError(
                "--publish copies the comparison of everything recorded: give it without --methods."
            )
        _print_result(_from("door").compare(**told))
        return
    if told:
        option = "-n" if "n" in told else f"--{next(iter(told))}"
        raise OptionError(
            f"{option} needs --methods, for example `--methods fastv,visionzip --budgets 48,24`; "
            "without any option all that is recorded is set side by side."
        )
    _from("reproduce.printed").compare()
    if given.publish:
        made = _from("reproduce.publish").publish_folder("compare")
        print(f"Published {len(made)} files in {project_root() / 'results' / 'compare'}")


def _print_result(result: Any) -> None:
    console = importlib.import_module("rich.console").Console()
    console.print(result.table)
    if result.costs is not None:
        console.print(result.costs)
    for row in result.skipped:
        console.print(str(getattr(row, "reason", row)))


def _train(given: argparse.Namespace) -> None:
    device = "cpu" if given.device is None else check_device(given.device)
    seed = _whole("--seed", given.seed, 0, 2**32 - 1) or 0
    more = _whole("--more", given.more)
    if given.check and (given.more is not None or given.seed is not None or given.folder):
        raise OptionError("--check takes the shipped recipe: leave --more, --seed, --folder out.")
    if given.folder and Path(given.folder).is_file():
        raise OptionError(f"--folder is a folder for checkpoints, and {given.folder} is a file.")
    if given.method is not None:
        if given.check or given.more is not None:
            raise OptionError("--check and --more are for models: leave them out with --method.")
        _from("probes.methods").train_method(given.method, given.model, given.folder, device, seed)
        return
    training = _from("probes.training")
    if given.check:
        training.check(given.model, device)
    elif more is not None:
        training.train_more(given.model, more, given.folder, device, seed)
    else:
        training.train_and_install(given.model, given.folder, device, seed)


def _bench(given: argparse.Namespace) -> None:
    device = "cpu" if given.device is None else check_present(given.device)
    _from("bench.command").print_bench(device)


def _new(given: argparse.Namespace) -> None:
    if (given.method is None) == (given.paper is None):
        raise OptionError("Give either --method KEY or --paper KEY.")
    root, scaffold = project_root(), _from("scaffold")
    made = (
        scaffold.new_paper(given.paper, root)
        if given.method is None
        else scaffold.new_method(given.method, root)
    )
    _say(made or [])


def _readme(given: argparse.Namespace) -> None:
    project_root()
    _from("reproduce.readme").update_all()


def _lab(given: argparse.Namespace) -> int:
    _require("jupyterlab")
    notebooks = notebooks_dir()
    if repository() is None:  # the installed ones are the package's own: work on a copy
        copy = work_dir() / "notebooks"
        notebooks = copy if copy.is_dir() else shutil.copytree(notebooks, copy)
    # Saving leaves outputs out of the source notebooks, so a run in JupyterLab changes no file.
    hook = f"--FileContentsManager.pre_save_hook={_from('report.saving').HOOK}"
    command = [sys.executable, "-m", "jupyterlab", str(notebooks), hook]
    return subprocess.run(command).returncode


def _test(given: argparse.Namespace) -> int:
    if given.faults and (given.all or given.only is not None):
        raise OptionError(f"--faults runs all of {FAULTS}: leave --only and --all out.")
    root = project_root()
    _require("pytest")
    _require("xdist")
    where = [FAULTS] if given.faults else (given.only or "tests").split()
    which = [] if given.faults else ["-m", ALL if given.all else FAST]
    # One process per core; what is idle takes tests from the others.
    command = [sys.executable, "-m", "pytest", *where, "-n", "auto", "--dist", "worksteal", *which]
    return subprocess.run(command, cwd=root).returncode


def _contracts(given: argparse.Namespace) -> int:
    root = project_root()
    _require("pytest")
    _require("xdist")
    release = _release("--transformers", given.transformers)
    folder = work_dir() / "transformers" / release
    # What differs stands in front of the environment, whose torch and numpy stay.
    numpy = importlib.import_module("numpy").__version__
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade"]
    install += ["--target", str(folder), f"transformers=={release}.*", f"numpy=={numpy}"]
    if code := subprocess.run(install).returncode:
        return code
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", *given.only.split(), "-n", "auto"]
    return subprocess.run(
        [*command, "--dist", "worksteal", "-m", FAST],
        cwd=root, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    ).returncode  # fmt: skip


def _release(option: str, text: str) -> str:
    """A release of Transformers, by its first two numbers."""
    oldest, newest = _from("engine.calls").TESTED
    release = {"oldest": oldest, "newest": newest}.get(text, text)
    if re.fullmatch(r"\d+\.\d+", release) is None:
        raise OptionError(
            f"{option} is oldest ({oldest}), newest ({newest}) or a release such as 5.20; "
            f"got '{text}'."
        )
    return release


# -- what verbs share --------------------------------------------------------------------------


def _from(module: str) -> Any:
    """A module of the package, imported now: the command says at once what needs no torch."""
    return importlib.import_module(f"frugalvlm.{module}")


def _whole(option: str, text: str | None, least: int = 1, most: int | None = None) -> int | None:
    return None if text is None else read_whole(option, text, least, most)


def _listed(option: str, text: str | None) -> list[str] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise OptionError(f"{option} is a list separated by commas; got '{text}'.")
    return parts


def _names(option: str, text: str | None) -> tuple[str, ...] | None:
    parts = _listed(option, text)
    return None if parts is None else check_names(option, parts, _from("benchmarks").ALL_BENCHMARKS)


def _data(text: str | None) -> str | list[str] | None:
    """A folder as it is, even with a comma in its name; otherwise a list of ids."""
    if text is not None and Path(text).is_dir():
        return text
    return _listed("--data", text)


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise OptionError(_missing(module))


def _missing(module: str) -> str:
    """One sentence for a library that an extra would have brought."""
    extra = "test" if module.split(".")[0] in ("pytest", "xdist", "nbval", "beartype") else "study"
    where = f"-e '.[{extra}]'` in the clone" if repository() else f"'frugalvlm[{extra}]'`"
    return f"This needs {module}, which is not installed: run `pip install {where}."


def _say(files: Sequence[Path]) -> None:
    for path in files:
        print(path if not path.is_relative_to(Path.cwd()) else path.relative_to(Path.cwd()))


if __name__ == "__main__":
    sys.exit(main())
