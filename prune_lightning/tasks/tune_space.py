"""What a search for hyper-parameters may change: settings that the method and the restraint have, and their ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from prune_lightning.errors import UserError, shown
from prune_lightning.tasks.hparams import SECTIONS


class Trial(Protocol):
    """The part of an Optuna trial that draws values."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Draw a whole number."""
        ...

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Draw one of some values."""
        ...


@dataclass(frozen=True)
class Number:
    """A number.

    Args:
        key: The setting, such as ``method.value.clamp``.
        default: Its value without a search.
        low: Smallest value.
        high: Largest value.
        log: Whether to draw its logarithm uniformly.
    """

    key: str
    default: float
    low: float
    high: float
    log: bool

    def draw(self, trial: Trial) -> Any:
        """Return a value; a whole number if the default is one."""
        if isinstance(self.default, int):
            return trial.suggest_int(self.key, max(1, round(self.low)), max(1, round(self.high)), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def defaults(self) -> dict[str, Any]:
        """Return the parameters that draw the default."""
        return {self.key: self.default}


@dataclass(frozen=True)
class Choice:
    """One of some values; see :class:`Number`."""

    key: str
    default: Any
    choices: tuple[Any, ...]

    def draw(self, trial: Trial) -> Any:
        """Return a value."""
        return trial.suggest_categorical(self.key, self.choices)

    def defaults(self) -> dict[str, Any]:
        """Return the parameters that draw the default."""
        return {self.key: self.default}


@dataclass(frozen=True)
class Layers:
    """Adjacent layers.

    Args:
        key: The setting.
        default: The layers without a search.
        low: Smallest index of the last one.
        high: Largest index of the last one.
        most: Largest number of layers; methods of one layer keep one.
    """

    key: str
    default: tuple[int, ...]
    low: int
    high: int
    most: int

    def draw(self, trial: Trial) -> list[int]:
        """Return the layers, ascending."""
        last = trial.suggest_int(f"{self.key}.last", self.low, self.high)
        count = trial.suggest_int(f"{self.key}.count", 1, self.most) if self.most > 1 else 1
        return list(range(max(0, last - count + 1), last + 1))

    def defaults(self) -> dict[str, Any]:
        """Return the parameters that draw the default."""
        count = {f"{self.key}.count": len(self.default)} if self.most > 1 else {}
        return {f"{self.key}.last": self.default[-1], **count}


Parameter = Number | Choice | Layers


@dataclass(frozen=True)
class Space:
    """All parameters of a search.

    Args:
        parameters: In the order of the configuration.
    """

    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, config: DictConfig, num_layers: int) -> Space:
        """Return the space of a configuration: the entries of ``tune.space`` that its method and restraint have.

        Args:
            config: A configuration that is settled.
            num_layers: Depth of the model.

        Raises:
            UserError: An entry is not understood, or nothing is left to search.
        """
        found = []
        for section in SECTIONS:
            plain: Any = OmegaConf.to_container(config[section], resolve=True) if config.get(section) else {}
            wanted: Any = OmegaConf.to_container(config.tune.space.get(section) or OmegaConf.create(), resolve=True)
            found += list(_parameters(wanted, plain, f"{section}.", num_layers))
        if not found:
            raise UserError("tune.space has no setting that the method or the restraint has")
        return cls(tuple(found))

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Return the values of a trial, by key."""
        return {parameter.key: parameter.draw(trial) for parameter in self.parameters}

    def defaults(self) -> dict[str, Any]:
        """Return the parameters of the trial that draws all defaults."""
        return {name: value for parameter in self.parameters for name, value in parameter.defaults().items()}

    def layers(self) -> list[int]:
        """Return the layers that a trial may edit."""
        found = {
            layer
            for p in self.parameters
            if isinstance(p, Layers)
            for layer in range(max(0, p.low - p.most + 1), p.high + 1)
        }
        return sorted(found)


def _parameters(wanted: Mapping[str, Any], own: Any, prefix: str, num_layers: int) -> Iterator[Parameter]:
    for name, node in wanted.items():
        value = own.get(name) if isinstance(own, Mapping) else None
        if node is None or value is None:
            continue
        if isinstance(value, Mapping) and not isinstance(node, Mapping):
            names = ", ".join(setting for setting in value if setting != "_target_")
            raise UserError(f"tune.space.{prefix}{name}: {shown(node)} is no entry for the settings of {name}: {names}")
        if isinstance(value, Mapping):
            yield from _parameters(node, value, f"{prefix}{name}.", num_layers)
        else:
            yield _parameter(f"{prefix}{name}", node, value, num_layers)


def _parameter(key: str, node: Any, default: Any, num_layers: int) -> Parameter:
    """Return the parameter of one entry; its range is widened to hold the default."""
    match node:
        case {"around": float() | int() as factor} if factor > 1 and default > 0:
            return Number(key, default, default / factor, default * factor, log=True)
        case {"low": float() | int() as low, "high": float() | int() as high, **rest} if low < high and rest.keys() <= {
            "log"
        }:
            return Number(key, default, min(low, default), max(high, default), bool(rest.get("log", False)))
        case {"choices": list() as choices} if choices:
            return Choice(key, default, tuple(choices if default in choices else [default, *choices]))
        case {"depth": [float() | int() as first, float() | int() as last], "most": int() as most} if (
            0 <= first <= last <= 1
        ):
            low, high = round(first * num_layers), min(num_layers - 1, round(last * num_layers))
            most = max(most, len(default)) if len(default) > 1 else 1
            return Layers(key, tuple(default), min(low, default[-1]), max(high, default[-1]), most)
    raise UserError(
        f"tune.space.{key}: {shown(node)} is none of {{around: F}} with F > 1, {{low: A, high: B, log: true}}, "
        "{choices: [...]} and {depth: [A, B], most: N}"
    )
