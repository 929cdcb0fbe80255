"""Dequantises checkpoints on loading, since an edit changes a matrix of floats."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PretrainedConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
)

from prune_lightning.errors import UserError


def prepare_dequantisation(config: PretrainedConfig) -> Callable[[Any], Any]:
    """Request dequantised weights if a configuration is of a quantised model.

    Args:
        config: The model's configuration; changed if the weights can be dequantised while loading.

    Returns:
        A function to apply to the loaded model.

    Raises:
        UserError: ``transformers`` cannot dequantise these weights, or a required package is not installed.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return lambda model: model
    try:
        parsed = AutoQuantizationConfig.from_dict(settings) if isinstance(settings, dict) else settings
        method = str(getattr(parsed.quant_method, "value", parsed.quant_method))
        if method == "bitsandbytes":  # one name for two quantisers
            method = "bitsandbytes_4bit" if parsed.load_in_4bit else "bitsandbytes_8bit"
        quantiser, parser = AUTO_QUANTIZER_MAPPING[method], AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        while_loading = "dequantize" in inspect.signature(parser).parameters
        afterwards = "_dequantize" in vars(quantiser)
        if not while_loading and not afterwards:
            raise UserError(
                f"the model is quantised ({method}), and transformers cannot dequantise that; give the unquantised "
                "model that it was made from"
            )
        if while_loading:
            config.quantization_config = parsed.to_dict() | {"dequantize": True}
        quantiser(parsed, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the model is quantised, and it cannot be dequantised here: {reason}; install what is missing, or give "
            "the unquantised model that it was made from"
        ) from error
    rank_zero_warn(f"the model is quantised ({method}); it is dequantised, edited and exported so")
    return (lambda model: model) if while_loading else (lambda model: model.dequantize())
