"""What is needed to build an editing module and its restraint, as the ledger stores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from transformers import PretrainedConfig

from prune_lightning.errors import UserError, near, one_of
from prune_lightning.ledger import Ledger
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import anchored, load_language_model
from prune_lightning.phases import PhaseClock
from prune_lightning.tasks.choices import config_folder, options_of
from prune_lightning.tasks.components import build
from prune_lightning.tasks.presets import model_arguments, settled
from prune_lightning.tasks.setup import choice


@dataclass(frozen=True)
class Recipe:
    """The model, the method and the restraint of a run.

    Args:
        model: Arguments of :func:`~prune_lightning.models.loading.load_language_model`.
        method: Name of the method.
        restraint: Name of the restraint, ``none`` without one.
        method_options: Class and arguments of the method.
        restraint_options: Class and arguments of the restraint; ``None`` without one.
        seed: The run's seed.
    """

    model: Mapping[str, Any]
    method: str
    restraint: str
    method_options: Mapping[str, Any]
    restraint_options: Mapping[str, Any] | None
    seed: int = 0

    @classmethod
    def of(cls, config: DictConfig) -> Recipe:
        """Return the recipe of a composed configuration that is :func:`~.presets.settled`."""
        method: Any = OmegaConf.to_container(config.method, resolve=True)
        restraint: Any = OmegaConf.to_container(config.restraint, resolve=True) if config.restraint else None
        names = choice("method"), choice("restraint")
        model = model_arguments(config)
        return cls({**model, "path": anchored(model["path"])}, *names, method, restraint, int(config.seed))

    @classmethod
    def recorded(cls, ledger: Ledger) -> Recipe:
        """Return the recipe of the run that wrote a ledger.

        Raises:
            UserError: The ledger does not hold one, since the run was not started from a configuration.
        """
        names = ("model", "method", "restraint", "method_options", "restraint_options", "seed")
        if missing := [name for name in names if name not in ledger.base]:
            raise UserError(f"{ledger.folder / 'base.json'} has no {missing[0]!r}: build the run's module yourself")
        return cls(**{name: ledger.base[name] for name in names})

    def as_base(self) -> dict[str, Any]:
        """Return the recipe as a part of the ledger's description of the base."""
        return dict(vars(self))

    def language_model(self) -> LanguageModel:
        """Load the model."""
        return load_language_model(**self.model)

    def build(self, model: LanguageModel, clock: PhaseClock | None = None, non_finite: str = "skip") -> EditingModule:
        """Return the method on a model."""
        options = {"language_model": model, "non_finite": non_finite, "clock": clock}
        module = build(OmegaConf.create(dict(self.method_options)), "method", **options)
        assert isinstance(module, EditingModule)
        return module

    def build_restraint(self) -> Any:
        """Return a new restraint, or ``None``."""
        return build(OmegaConf.create(dict(self.restraint_options)), "restraint") if self.restraint_options else None


@contextmanager
def composed(
    choices: Mapping[str, str], options: Mapping[str, Any], loaded: PretrainedConfig | None = None
) -> Iterator[DictConfig]:
    """Yield a configuration as ``train.py`` composes it; Hydra's global state is as before after the block.

    Args:
        choices: Option by group.
        options: Settings, nested as in the configuration, that take precedence.
        loaded: The configuration of a model in memory, which is then not looked for at ``model.path``.

    Raises:
        UserError: An unknown option or key.
    """
    for group, option in choices.items():
        one_of(group, option, options_of(group))
    state, before = HydraConfig.instance(), HydraConfig.instance().cfg
    words = [f"{group}={option}" for group, option in choices.items()]
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose("train", words, return_hydra_config=True)
        state.set_config(config)
        with open_dict(config):
            del config["hydra"]
        yield settled(_merged(config, options), loaded)
    finally:
        state.cfg = before


def _merged(config: DictConfig, options: Mapping[str, Any]) -> DictConfig:
    try:
        merged = OmegaConf.merge(config, dict(options))
    except ConfigKeyError as error:
        if "." in str(error.key):
            raise UserError(f"unknown option {error.key!r}: write it nested, as {_nested(str(error.key))}") from error
        scope, _, key = str(error.full_key).rpartition(".")
        siblings = OmegaConf.select(config, scope) if scope else config
        raise UserError(f"unknown option {error.full_key!r}: {near(key, map(str, siblings))}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"options: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _nested(key: str) -> str:
    first, _, rest = key.partition(".")
    return f'{{"{first}": {_nested(rest)}}}' if rest else f'{{"{first}": ...}}'


def guard_options() -> dict[str, Any]:
    """Return class and arguments of the default guards."""
    with composed({}, {}) as config:
        options: Any = OmegaConf.to_container(config.callbacks.guards, resolve=True)
    return dict(options)


def evaluation_options(name: str) -> list[DictConfig]:
    """Return the entries of an option of the group ``evaluation`` that are measurements."""
    with composed({"evaluation": name}, {}) as config:
        return [entry for entry in config.evaluation.values() if isinstance(entry, DictConfig) and "_target_" in entry]
