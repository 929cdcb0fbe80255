"""Annotations of numbers with limits, by which the values of a configuration are checked before anything is built."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

Count: TypeAlias = Annotated[int, Ge(1)]
Whole: TypeAlias = Annotated[int, Ge(0)]
Positive: TypeAlias = Annotated[float, Gt(0)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
AboveOne: TypeAlias = Annotated[float, Gt(1)]
Share: TypeAlias = Annotated[float, Ge(0), Le(1)]
ShareBelowOne: TypeAlias = Annotated[float, Ge(0), Lt(1)]
KeptShare: TypeAlias = Annotated[float, Gt(0), Le(1)]
