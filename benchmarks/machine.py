"""Print, as JSON, what a benchmark ran on: processor, card, and versions."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console


def machine() -> dict[str, Any]:
    """Return the description."""
    processor = Path("/proc/cpuinfo")
    names = [line for line in processor.read_text().splitlines() if line.startswith("model name")]
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "processor": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": os.cpu_count(),
        "card": card and card.name,
        "card_gib": card and round(card.total_memory / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lightning", "torchmetrics", "peft")},
    }


if __name__ == "__main__":
    Console(width=200).print_json(json.dumps(machine()))
