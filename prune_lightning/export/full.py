"""The whole edited model as a Hugging Face folder, for ``AutoModelForCausalLM.from_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from prune_lightning.export.sources import ExportSource

LOW_RANK_ONLY = False


def write(source: ExportSource, folder: Path) -> dict[str, Any]:
    """Write weights (safetensors), configuration and tokenizer."""
    source.language_model.model.save_pretrained(folder)
    source.language_model.tokens.tokenizer.save_pretrained(folder)
    return {}


def load(source: ExportSource, folder: Path) -> Any:
    """Load the folder."""
    model = source.language_model
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=model.model.dtype)
    return loaded.to(model.device)
