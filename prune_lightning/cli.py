"""The command line: compose the configuration, run its task, turn the user's errors into one clear line.

Nothing here imports torch or Lightning, which takes seconds; the task does. So `--help` and a typo answer at once.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from prune_lightning import usage
from prune_lightning.errors import UserError, causes, near, plain_warnings
from prune_lightning.tasks.arguments import check_settings, full_arguments, record_settings, recorded_settings
from prune_lightning.tasks.choices import config_folder
from prune_lightning.threads import let_waiting_threads_sleep

_LAUNCHERS = "hydra_plugins."  # of jobs in processes of their own, of which an error says little


def _run(config: DictConfig) -> None:
    """Run the configured task; the reason of a user error is also written to the run folder."""
    try:
        if not config.resume or not recorded_settings().exists():
            record_settings(config)
        check_settings(config)
        _task(config.task)(config)
    except Exception as error:
        reason = _user_error(error)
        if reason is None:
            raise
        if _said_by_first_process(error):
            sys.exit(2)
        _leave(reason)


def _said_by_first_process(error: Exception) -> bool:
    """Whether this is not the first process, and the first process reports the same error."""
    if "lightning" not in sys.modules:  # which takes seconds to import: no other process has been started yet
        return False
    from prune_lightning.distributed import raised_on_all_ranks
    from prune_lightning.tasks.setup import first_process

    return any(map(raised_on_all_ranks, causes(error))) and not first_process()


def _leave(reason: str) -> NoReturn:
    """Write the reason into the run folder, and give up."""
    Path(HydraConfig.get().runtime.output_dir, "error.txt").write_text(reason + "\n", "utf-8")
    _give_up(reason)


def _task(name: Any) -> Callable[[DictConfig], None]:
    """Return the function of a task by its name."""
    module, _, function = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f"there is no task {str(name)!r}: {error}") from error
    if not inspect.isfunction(found):
        raise UserError(f"the task {str(name)!r} is no function that takes the configuration")
    return found


def main() -> None:
    """Run the command line; exit with 2, without a traceback, on an error that is the user's to mend."""
    let_waiting_threads_sleep()
    if text := usage.answer(sys.argv[1:], config_folder()):
        sys.stdout.write(text)
        return
    plain_warnings()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, so that they can be told apart here
    try:
        sys.argv[1:] = full_arguments(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="train")(_run)()
    except Exception as error:
        reason = _user_error(error) or _composing(error)
        if reason is None:
            raise
        _give_up(reason)


def _composing(error: Exception) -> str | None:
    """Return the message about a configuration that Hydra cannot compose; ``None`` once the task has begun."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(frame.f_code is _run.__code__ for frame in frames):
        return None
    if any(frame.f_globals.get("__name__", "").startswith(_LAUNCHERS) for frame in frames):
        return "a run of the sweep failed: error.txt or train.log in its folder says why, the same command goes on"
    return f"the configuration cannot be composed: {next(iter(str(error).splitlines()), type(error).__name__)}"


def _give_up(reason: str) -> NoReturn:
    sys.stderr.write(f"error: {reason}\n")
    sys.exit(2)


def _user_error(error: BaseException) -> str | None:
    """Return the message of a user error, or ``None`` for any other error."""
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, MissingConfigException):
            return _missing_option(cause)
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            return _unknown_key(str(cause.full_key or cause.key))
        if isinstance(cause, MissingMandatoryValue):
            return f"this setting needs a value: {cause.full_key}=..."
    for cause in chain:
        if isinstance(cause, (ConfigCompositionException, OmegaConfBaseException)):
            return str(cause).splitlines()[0]
        if isinstance(cause, HydraException) and isinstance(cause.__cause__, TypeError):
            return f"{str(cause).splitlines()[0]} ({cause.__cause__})"
        unknown = str(cause).startswith("Error locating target")
        if isinstance(cause, HydraException) and (cause.__cause__ is None or unknown):
            return str(cause).splitlines()[0]
    return None


def _missing_option(error: MissingConfigException) -> str:
    found = re.search(r"Could not find '([^']+)/([^'/]+)'", str(error))
    if not found or not error.options:
        return str(error).splitlines()[0]
    group, option = found.groups()
    options = [name for name in error.options if name != "base"]
    return f"unknown option {group}={option}: {near(option, options)}"


def _keys(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _unknown_key(name: str) -> str:
    """Return the message for an unknown key, with similar keys of the chosen groups."""
    folder = config_folder()
    groups = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("_")]
    chosen = [word for word in sys.argv[1:] if word.split("=")[0].lstrip("+~") in groups]
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        try:
            config = hydra.compose("train", overrides=chosen)
        except HydraException:
            config = hydra.compose("train")
    plain: Any = OmegaConf.to_container(config, resolve=False)
    keys = [*_keys(plain), *groups]
    scope, _, last = name.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == scope]
    return f"unknown key {name!r}: {near(last, siblings) if siblings else near(name, keys)}"
