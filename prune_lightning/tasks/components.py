"""Builds components from their configuration, after a check of its values against their constructors' annotations."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from prune_lightning.errors import UserError, near, shown
from prune_lightning.value_types import check_value

_RESERVED = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")


@dataclass(frozen=True)
class Arguments:
    """The arguments that a class or a function takes.

    Args:
        kinds: Annotation of each argument.
        rest: Annotation of arguments with other names; ``None`` if there can be none.
        required: Names without default.
    """

    kinds: Mapping[str, Any]
    rest: Any
    required: AbstractSet[str]


def build(node: DictConfig, key: str, **further: Any) -> Any:
    """Return the component that a node of the configuration describes.

    Args:
        node: The node; its ``_target_`` is a class or a function, its other entries are the arguments.
        key: Its key in the configuration, for messages.
        further: Arguments that are not in the configuration.

    Raises:
        UserError: One line that names the key of an unknown, missing or wrong argument, and what is expected.
    """
    check_component(node, key)
    check(_plain(node), key, frozenset(further))
    try:
        return instantiate(node, _convert_="all", **further)
    except HydraException as error:
        if isinstance(error.__cause__, UserError):
            raise UserError(str(error.__cause__)) from error
        raise


def check_component(node: Any, key: str) -> None:
    """Raise a :class:`UserError` if a node describes no component."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(f"{key} is expected to be an entry with a _target_, but got {shown(node)}")


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Turn any error of a library about what the user has asked of it into one line.

    Args:
        what: The beginning of the line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
        raise UserError(f"{what}: {' '.join(str(cause).split()) or type(cause).__name__}") from error


def check_components(config: DictConfig) -> None:
    """Check the arguments of every component in a configuration, each where it stands, not where it is referred to.

    Raises:
        UserError: See :func:`build`; missing arguments are not an error, since they may not come from here.
    """
    _check_entries(_without_links(_plain(config), OmegaConf.to_container(config, resolve=False)), "")


def _without_links(plain: Any, written: Any) -> Any:
    """Return plain data without the entries that are written as a reference to another node."""
    if not (isinstance(plain, Mapping) and isinstance(written, Mapping)):
        return plain
    linked = {name for name, entry in plain.items() if isinstance(entry, Mapping) and isinstance(written[name], str)}
    return {name: _without_links(entry, written[name]) for name, entry in plain.items() if name not in linked}


def check(node: Mapping[str, Any], key: str, given: AbstractSet[str] | None = None) -> None:
    """Check the arguments of one component, and of those inside it.

    Args:
        node: The component's entries, without interpolations.
        key: Its key.
        given: Arguments from elsewhere; ``None`` if they are not known, and none is missing.

    Raises:
        UserError: See :func:`build`.
    """
    target = located(node["_target_"], f"{key}._target_")
    own = {name: value for name, value in node.items() if name not in _RESERVED}
    check_arguments(target, own, key)
    if given is not None and (missing := sorted(arguments_of(target).required - set(own) - given)):
        raise UserError("these settings need a value: " + ", ".join(f"{key}.{name}=..." for name in missing))


def check_arguments(target: Callable[..., Any], values: Mapping[str, Any], key: str) -> None:
    """Check arguments by their annotations. What is not annotated, or not with a type, is taken as it is.

    Args:
        target: A class or a function.
        values: The arguments, as plain data; nested components have an entry ``_target_``.
        key: The key of which they are the entries.

    Raises:
        UserError: See :func:`build`.
    """
    expected = arguments_of(target)
    for name, value in values.items():
        if name not in expected.kinds and expected.rest is None:
            raise UserError(f"unknown key '{key}.{name}': {near(str(name), expected.kinds)}")
        kind = expected.kinds.get(name, expected.rest)
        if not _has_components(value):
            check_value(f"{key}.{name}", value, kind)
        _check_entries(value, f"{key}.{name}")


def _check_entries(value: Any, key: str) -> None:
    """Check the components anywhere inside a value."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            check(value, key)
            return
        for name, entry in value.items():
            _check_entries(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            _check_entries(entry, f"{key}[{place}]")


def _plain(node: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def _has_components(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_components, value.values()))
    return isinstance(value, list) and any(map(_has_components, value))


def located(target: Any, key: str) -> Callable[..., Any]:
    """Return a class or a function by its dotted name.

    Args:
        target: The name.
        key: Its key in the configuration, for messages.

    Raises:
        UserError: There is none.
    """
    try:
        found = pkgutil.resolve_name(str(target))
    except Exception as error:  # any error of the import
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: there is no class or function {shown(target)}: {reason}") from error
    if not callable(found):
        raise UserError(f"{key}: {shown(target)} is no class or function")
    return found  # type: ignore[no-any-return]


@functools.cache
def arguments_of(target: Callable[..., Any]) -> Arguments:
    """Return the arguments of a class or a function, with those that its ``**kwargs`` passes to the base classes."""
    kinds: dict[str, Any] = {}
    required: set[str] = set()
    rest: Any = None
    for function in _constructors(target):
        hints = _hints(function)
        rest = None
        for parameter in inspect.signature(function).parameters.values():
            kind = hints.get(parameter.name, Any)
            if parameter.kind is parameter.VAR_KEYWORD:
                rest = kind
            elif parameter.name != "self" and parameter.kind is not parameter.VAR_POSITIONAL:
                if parameter.name not in kinds and parameter.default is parameter.empty:
                    required.add(parameter.name)
                kinds.setdefault(parameter.name, kind)
        if rest is not Any:
            break
    return Arguments(kinds, rest, required)


def _constructors(target: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    if not isinstance(target, type):
        yield target
        return
    for kind in target.__mro__:
        if kind is not object and "__init__" in vars(kind):
            yield vars(kind)["__init__"]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations that can be resolved; some are only imported for type checkers."""
    plain = inspect.unwrap(function)
    found: dict[str, Any] = {}
    for name, annotation in getattr(plain, "__annotations__", {}).items():
        with suppress(NameError, TypeError, AttributeError):
            alone = types.SimpleNamespace(__annotations__={name: annotation})
            found |= typing.get_type_hints(alone, getattr(plain, "__globals__", {}), include_extras=True)
    return found
