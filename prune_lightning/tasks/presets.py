"""Settings of a run from its model's YAML: layers, dtype, family, and the source of the hyper-parameters."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import PretrainedConfig

from prune_lightning.errors import UserError, near, shown
from prune_lightning.models.depth import FROM_DEPTH
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_config, load_language_model
from prune_lightning.tasks.components import check_arguments
from prune_lightning.tasks.hparams import apply_hparams, compare_model, leaves, overrides, source_of
from prune_lightning.tasks.setup import choice, first_process

SOURCES = ("published", "tuned", "default")
_LAYERS = re.compile(r"model\.edit\.layers\.(\w+)")
_READ = re.compile(r"model\.edit\.([\w.]+)")
_OWN_CORPUS = "model.second_moments.corpus.path="
_LOG = logging.getLogger(__name__)


def settled(config: DictConfig, loaded: PretrainedConfig | None = None) -> DictConfig:
    """Return a copy of a configuration with the settings filled in that depend on the model and the machine.

    - ``model.family``: from a YAML outside the package (``--config-dir``), if there is one for the architecture
    - ``model.dtype``: ``float32`` on a CPU, ``model.gpu_dtype`` elsewhere, which defaults to the checkpoint's
    - ``model.edit.layers``: from the depth, if the method refers to layers that the model's YAML does not set

    Explicit settings are kept. The model's own configuration is loaded only if needed.

    Args:
        config: The composed configuration.
        loaded: The model's own configuration, if it is in memory.

    Raises:
        UserError: The model's configuration is needed but cannot be loaded, or the model's YAML sets an unknown option
            of the method.
    """
    config = copy.deepcopy(config)
    _check_model(config)
    _check_section(config)
    apply_hparams(config)
    moments = config.model.get("second_moments") or {}
    if moments.get("fallback") and any(word.startswith(_OWN_CORPUS) for word in overrides()):
        config.model.second_moments.fallback = False  # the text that the user names, or an error
    model = config.model
    folders, open_layers = _outside_families(), _open_layers(config)
    inherits = model.dtype is None and not _on_cpu(config) and model.get("gpu_dtype") is None
    needed = open_layers or inherits or (folders and model.get("family") is None)
    if needed and loaded is None:
        loaded = load_config(model.path, model.revision)
    with open_dict(model):
        if loaded is not None and model.get("family") is None:
            model.family = _family(folders, loaded.model_type)
        if model.dtype is None:
            model.dtype = _dtype(config, loaded)
        if loaded is not None and open_layers:
            _fill_layers(config, open_layers, int(loaded.num_hidden_layers))
    return config


def _check_model(config: DictConfig) -> None:
    """Raise if the model's entries have values of a wrong type."""
    if not isinstance(config.model, DictConfig):
        raise UserError(f"model is expected to be an option, or a mapping, but got {shown(config.model)}")
    given = {name: value for name, value in model_arguments(config).items() if value is not None or name == "path"}
    check_arguments(load_language_model, given, "model")


def _on_cpu(config: DictConfig) -> bool:
    accelerator = config.trainer.accelerator
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())


def _dtype(config: DictConfig, loaded: PretrainedConfig | None) -> str:
    preferred = config.model.get("gpu_dtype")
    if _on_cpu(config):
        if preferred not in (None, "float32"):
            _say(f"on a CPU the weights are loaded in float32; model.dtype={preferred} loads them as on a GPU")
        return "float32"
    stored = getattr(loaded, "dtype", None) or torch.float32
    return str(preferred or stored).removeprefix("torch.")


def _check_section(config: DictConfig) -> None:
    """Raise if the model's section for the method has an option that the method lacks, or does not read there."""
    if not HydraConfig.initialized():
        return
    section = (config.model.get("edit") or {}).get(name := choice("method")) or {}
    options = dict(leaves(OmegaConf.to_container(config.method, resolve=False)))  # type: ignore[arg-type]
    files = [path for folder in _config_folders() for path in (folder / "method").rglob("*.yaml")]
    read = set(_READ.findall("".join(path.read_text("utf-8") for path in files)))
    for key, _ in leaves(OmegaConf.to_container(OmegaConf.create(section))):  # type: ignore[arg-type]
        if key not in options:
            raise UserError(f"model.edit.{name}.{key}: method={name} has no option {key!r}: {near(key, options)}")
        if not any(f"{name}.{key}.".startswith(f"{known}.") for known in read):
            instead = [f"model.edit.{other}" for other in _READ.findall(str(options[key]))]
            raise UserError(
                f"model.edit.{name}.{key} is not read by method={name}: set " + " or ".join([*instead, f"method.{key}"])
            )


def _unresolved(node: DictConfig) -> str:
    return str(OmegaConf.to_container(node, resolve=False))


def _open_layers(config: DictConfig) -> list[str]:
    """Return the kinds of layers that the method refers to but the model's YAML does not set."""
    layers = (config.model.get("edit") or {}).get("layers") or {}
    wanted = _LAYERS.findall(_unresolved(config.method))
    return [kind for kind in dict.fromkeys(wanted) if layers.get(kind) is None and kind in FROM_DEPTH]


def _fill_layers(config: DictConfig, kinds: list[str], depth: int) -> None:
    for kind in kinds:
        layers = FROM_DEPTH[kind](depth)
        OmegaConf.update(config, f"model.edit.layers.{kind}", layers, force_add=True)
        _say(
            f"no {kind} layers are known for this model: taking {layers}, from its depth of {depth} layers "
            "(experiment=tune searches for better ones)"
        )
    OmegaConf.update(config, "model.edit.from_depth", kinds, force_add=True)


def _say(text: str) -> None:
    if first_process():
        _LOG.warning(text)


def _config_folders() -> list[Path]:
    """Return Hydra's search path of folders for this run, the shipped one last."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    outside = [Path(source.path) for source in sources if source.schema == "file" and source.provider != "main"]
    return outside + [Path(source.path) for source in sources if source.schema == "file" and source.provider == "main"]


def _outside_families() -> list[Path]:
    folders = [folder / "model" / "family" for folder in _config_folders()[:-1]]
    return [folder for folder in folders if folder.is_dir()]


def _family(folders: list[Path], model_type: str) -> Any:
    found = [path for folder in folders if (path := folder / f"{model_type}.yaml").is_file()]
    return yaml.safe_load(found[0].read_text("utf-8")) if found else None


def model_arguments(config: DictConfig) -> dict[str, Any]:
    """Return the arguments of :func:`~prune_lightning.models.loading.load_language_model`, JSON-serializable."""
    found = {key: config.model.get(key) for key in ("path", "dtype", "revision", "family")}
    return {key: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for key, v in found.items()}


def load_model(config: DictConfig) -> LanguageModel:
    """Load the model of a configuration that is :func:`settled`."""
    model = load_language_model(**model_arguments(config))
    compare_model(config, model)
    _compare_depth(config, model.num_layers)
    return model


def _compare_depth(config: DictConfig, depth: int) -> None:
    """Warn if the settings of ``model.edit`` are another model's: those of a preset end with its highest layers."""
    top = ((config.model.get("edit") or {}).get("layers") or {}).get("top")
    if top and top[-1] != depth - 1 and config.get("hparams") is None:
        _say(
            f"the editing settings are those of a model of {top[-1] + 1} layers, but this one has {depth}: take "
            "model=auto, whose settings follow from the depth, or find them by experiment=tune"
        )


def model_label(config: DictConfig) -> str:
    """Return a label of the model: its option, or its path if that is not the option's own."""
    option, path = choice("model"), str(config.model.path)
    files = [file for folder in _config_folders() if (file := folder / "model" / f"{option}.yaml").is_file()]
    own = (yaml.safe_load(files[0].read_text("utf-8")) or {}).get("path") if files else None
    if own is None:
        return path
    return option if path == own else f"{path} (preset {option})"


def model_facts(config: DictConfig) -> dict[str, Any]:
    """Return the entries of a run's summary about its model and the source of the hyper-parameters.

    Args:
        config: A configuration that is :func:`settled`.

    Returns:
        ``model``, the label; ``model_path``; and ``hparams``: ``source`` (``published``, ``tuned`` or ``default``),
        ``where``, and ``changed``, the settings that the command line changed.

    Raises:
        UserError: The model's YAML names another kind of source.
    """
    return {"model": model_label(config), "model_path": config.model.path, "hparams": _hparams(config)}


def _hparams(config: DictConfig) -> dict[str, Any]:
    edit: Any = OmegaConf.to_container(config.model.get("edit") or OmegaConf.create(), resolve=True)
    source = (
        source_of(config)
        or (edit.get("sources") or {}).get(choice("method"))
        or {"default": "nothing is published for this model"}
    )
    if not isinstance(source, dict) or len(source) != 1 or not set(source) <= set(SOURCES):
        raise UserError(
            f"model.edit.sources.{choice('method')} is expected to be one of {', '.join(SOURCES)} with a text, such as "
            f'{{published: "Table 5"}}, but got {shown(source)}'
        )
    ((kind, where),) = source.items()
    from_depth = set(edit.get("from_depth") or ()) & set(_LAYERS.findall(_unresolved(config.method)))
    if from_depth and not config.get("hparams"):
        kind, where = "default", "the layers follow from the model's depth, the other values are the method's own"
    changed = [word for word in overrides() if word.startswith(("method.", "model.edit."))]
    return {"source": kind, "where": where, "changed": changed}
