"""As :mod:`prune_lightning.export.gguf`, with the edited tensors in Q8_0: half the size of F16."""

from __future__ import annotations

from functools import partial

from prune_lightning.export import gguf
from prune_lightning.export.gguf import LOW_RANK_ONLY, check_base, load, write_gguf

EPSILON = 1 / 127
"""Distance of neighbouring values relative to the largest of their block of 32."""

check_weights = partial(gguf.check_weights, kind="Q8_0")
write = partial(write_gguf, kind="Q8_0")

__all__ = ["EPSILON", "LOW_RANK_ONLY", "check_base", "check_weights", "load", "write"]
