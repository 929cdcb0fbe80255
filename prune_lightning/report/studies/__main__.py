"""Draw a study: `python -m prune_lightning.report.studies NAME FOLDER... --out docs/studies`.

Each folder holds the run folders of an experiment. What is not finished is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prune_lightning.errors import UserError
from prune_lightning.report.groups import FinishedRun
from prune_lightning.report.studies.batches import batch
from prune_lightning.report.studies.butterfly import butterfly, write_hard
from prune_lightning.report.studies.mirage import mirage
from prune_lightning.report.studies.page import write
from prune_lightning.report.studies.restrained import prune, rect
from prune_lightning.report.studies.runs import read_study

STUDIES: dict[str, Callable[[Sequence[FinishedRun]], tuple[str, Figure]]] = {
    "prune": prune,
    "rect": rect,
    "batch": batch,
    "butterfly": butterfly,
    "mirage": mirage,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a study's figure and table and print the table."""
    parser = argparse.ArgumentParser(prog="python -m prune_lightning.report.studies", description=__doc__)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("folders", nargs="+", type=Path, help="folders of run folders")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"), help="folder of the pages")
    parser.add_argument(
        "--hard", type=Path, help="butterfly: only write the edits that collapse the model to this file"
    )
    options = parser.parse_args(arguments)
    try:
        runs = read_study(options.folders)
        if options.hard:
            sys.stdout.write(f"{write_hard(runs, options.hard)} edits collapse the model\n")
            return 0
        table, drawing = STUDIES[options.study](runs)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    write(options.out, options.study, table, drawing)
    sys.stdout.write(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
