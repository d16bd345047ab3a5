"""A small reproduction, to be killed: VisionZip's table on a tiny model, and what it comes to.

As a command: `python small_run.py MODEL TABLE` answers side by side, in processes of their own, as
`reproduce` does, and writes the table when all is there.
"""

import sys
from functools import partial
from pathlib import Path

from frugalvlm.papers import load_paper
from frugalvlm.report.tables import accuracy_table
from frugalvlm.reproduce import command
from frugalvlm.reproduce.side_by_side import side_by_side
from frugalvlm.runs import records
from frugalvlm.runs.options import Options, folder_of
from frugalvlm.runs.setting import Silent

KEY = "visionzip"


def run(model: str, beside: bool) -> str:
    """Answers what is missing in the work folder; the table's numbers, bit for bit."""
    benchmarks = ("pocket-gqa", "pocket-mme")[: 2 if beside else 1]
    options = Options(model=model, n=20, benchmarks=benchmarks, budgets=1, repeats=2)
    parts = command.answer_parts(KEY, options)
    if beside:
        side_by_side(parts, partial(command.do_part, options), [Silent(), Silent()])
    else:
        for part in parts:
            command.do_part(options, part, Silent())
    made = records.read_records(folder_of(KEY, "pocket") / "records")
    return str(accuracy_table(load_paper(KEY), "table1", made).to_frame().to_csv())


if __name__ == "__main__":
    records.write_bytes(Path(sys.argv[2]), run(sys.argv[1], beside=True).encode())
