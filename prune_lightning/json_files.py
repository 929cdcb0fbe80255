"""Strictly valid JSON: non-finite numbers become ``null``."""

from __future__ import annotations

import math
from typing import Any


def nan_to_null(value: Any) -> Any:
    """Return ``value`` with NaN and infinities replaced by ``None``, at any depth.

    >>> nan_to_null({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(item) for item in value]
    return value
