"""Export the edited model of a run.

python -m prune_lightning.export RUN --to FOLDER --format full|lora|delta|gguf|gguf_q8_0
python -m prune_lightning.export RUN --to FOLDER --after 50
python -m prune_lightning.export RUN --to FOLDER --without 3,17
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers
from rich.console import Console

from prune_lightning.errors import UserError
from prune_lightning.export.exporting import export
from prune_lightning.export.formats import FORMATS
from prune_lightning.export.sources import load_run


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    """Run the command line; a user error exits with 2 and one line."""
    title = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m prune_lightning.export", description=title)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--format", choices=FORMATS, default="full")
    parser.add_argument("--after", type=int, metavar="T", help="export the model after T edits")
    parser.add_argument("--without", type=_numbers, default=(), metavar="3,17", help="undo these edits, by number")
    parser.add_argument("--rank", type=int, help="approximate each change by one of this rank (lora, delta)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--merged", action="store_true", help="merge WISE's memory into the weights, for every prompt")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    try:
        source = load_run(options.run, options.after, options.without)
        report = export(source, options.to, options.format, options.rank, options.overwrite, options.merged)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    Console().print(report.line(), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
