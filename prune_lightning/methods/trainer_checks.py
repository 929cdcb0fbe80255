"""Checks the Trainer's arguments: each edit is written once, in order, by the method's own optimisation."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities import rank_zero_warn

from prune_lightning.errors import UserError
from prune_lightning.methods.editing_method import EditingMethod

_DTYPES = {"64-true": "float64", "16-true": "float16", "bf16-true": "bfloat16"}
_LIGHTNINGS_OWN = (None, 1000, -1)  # values of `max_epochs` if it is not set


def check_trainer(trainer: L.Trainer, method: type[EditingMethod] | None = None) -> None:
    """Refuse arguments that have no meaning for an edit stream, and set ``max_epochs=1`` if it is not set.

    Args:
        trainer: The Trainer.
        method: The class of the editing method, if it is known.

    Raises:
        UserError: One line that names the argument and what to use instead.
    """
    _check_epochs(trainer)
    zero: tuple[Any, ...] = (None, 0, 0.0, False)
    for name, useless, instead in (
        ("accumulate_grad_batches", (None, 1), "use data.batch_size for edits that are made together"),
        ("gradient_clip_val", zero, "methods optimise by themselves; see their clamp and epsilon"),
        ("gradient_clip_algorithm", zero, "methods optimise by themselves; see their clamp and epsilon"),
        ("fast_dev_run", zero, "use data.num_edits=1"),
        ("overfit_batches", zero, "use data.num_edits for a shorter stream"),
        ("min_epochs", (None, 0, 1), "a stream is run once"),
        ("min_steps", (None, 0), "a stream ends with its last edit"),
    ):
        value = getattr(trainer, name)
        if value not in useless:
            raise UserError(f"trainer.{name}={value} has no meaning for a stream of edits; {instead}")
    for name in ("limit_train_batches", "max_steps"):
        if getattr(trainer, name) == 0:
            raise UserError(f"trainer.{name}=0 leaves no edit to make; use data.num_edits for a shorter stream")
    _check_precision(trainer)
    _check_strategy(trainer, method)


def weights_dtype(trainer: L.Trainer) -> str | None:
    """Return the dtype to which ``precision`` converts the weights; ``None`` if it does not."""
    return _DTYPES.get(str(trainer.precision))


def _check_strategy(trainer: L.Trainer, method: type[EditingMethod] | None) -> None:
    strategy = trainer.strategy
    served = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
    if not served or isinstance(strategy, (DeepSpeedStrategy, XLAStrategy)):
        raise UserError(
            f"{type(strategy).__name__} does not keep whole matrices, which an edit changes; use a single device, "
            "trainer=ddp, or trainer=fsdp2 for a model that does not fit one device"
        )
    if isinstance(strategy, ModelParallelStrategy) and method is not None and not method.takes_shards:
        raise UserError(
            f"{method.__name__} needs the whole model on each device: use a single device or trainer=ddp. Of a model "
            "that is divided by trainer=fsdp2, the methods that optimise values (rome, memit, alphaedit, ...) edit"
        )


def _check_epochs(trainer: L.Trainer) -> None:
    epochs = trainer.max_epochs
    if epochs in _LIGHTNINGS_OWN:
        if trainer.state.fn is not None:  # running, not only checked
            rank_zero_warn("`max_epochs` was not set; a stream of edits is run once, so it is set to 1")
        trainer.fit_loop.max_epochs = 1
    elif epochs != 1:
        raise UserError(f"trainer.max_epochs={epochs}: a stream of edits is run once; set trainer.max_epochs=1")


def _check_precision(trainer: L.Trainer) -> None:
    plain = type(trainer.precision_plugin) in (Precision, HalfPrecision, DoublePrecision)
    if not plain:
        raise UserError(
            f"trainer.precision={trainer.precision} is for training: edits are computed in fp32 at least, whatever the "
            "weights are stored in; choose the weights' dtype by model.dtype or by trainer.precision=bf16-true, "
            "16-true or 64-true"
        )
