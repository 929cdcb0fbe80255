"""What `--help` and `--version` print; short, and without an import that takes time."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from prune_lightning import __version__

_WIDTH = 79
_HEAD = """\
Edit a language model with a stream of facts, and measure what it cost.
Usage: prune-lightning [GROUP=OPTION | KEY=VALUE]...      (or: python train.py)
  prune-lightning method=memit restraint=none data.num_edits=200 seed=1
  prune-lightning model=gpt2-xl data=counterfact data.path=FILE trainer=gpu
  prune-lightning resume=runs/DATE              continue an interrupted run
Groups and their options:
"""
_TAIL = """\
--cfg job: all keys. -m: sweeps. TAB: eval "$(prune-lightning -sc install=bash)"
"""


def answer(arguments: Sequence[str], folder: Path) -> str | None:
    """Return what to print for ``--help`` or ``--version``; ``None`` if neither is asked for.

    Args:
        arguments: The command line.
        folder: The folder of the configuration.
    """
    if "--version" in arguments:
        return f"prune-lightning {__version__}\n"
    if "--help" in arguments or "-h" in arguments:
        return _HEAD + "".join(f"{line}\n" for line in _groups(folder)) + _TAIL
    return None


def _groups(folder: Path) -> list[str]:
    """Return the options of each group in the defaults list, wrapped."""
    defaults = OmegaConf.load(folder / "train.yaml")["defaults"]  # type: ignore[index]
    groups = [str(group) for entry in defaults if entry != "_self_" for group in entry]
    lines = []
    for group in groups:
        options = " ".join(sorted(file.stem for file in (folder / group).glob("*.yaml")))
        lines += textwrap.wrap(f"{group:<11}{options}", _WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False)
    return lines
