"""Plots of spectra, and saving figures to files or loggers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure
from PIL import Image


@dataclass(frozen=True)
class Spectra:
    """Singular values of one edited matrix, each in descending order.

    Args:
        name: Name of the weight.
        original: Of the original weight.
        edited: Of the original weight plus the whole change.
        restrained: Of the current weight, without the part that a restraint withholds.
        change: Of the whole change.
        restrained_change: Of the part of the change that is in the weight.
    """

    name: str
    original: np.ndarray[Any, Any]
    edited: np.ndarray[Any, Any]
    restrained: np.ndarray[Any, Any]
    change: np.ndarray[Any, Any]
    restrained_change: np.ndarray[Any, Any]


def plot_spectra(spectra: Sequence[Spectra]) -> Figure | None:
    """Draw the singular values of original, edited and restrained matrices, and of changes; ``None`` without any."""
    if not spectra:
        return None
    columns = min(len(spectra), 3)
    rows = -(-len(spectra) // columns)
    figure = Figure(figsize=(6 * columns, 4.2 * rows), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for axes in all_axes[len(spectra) :]:
        axes.set_axis_off()
    for axes, matrix in zip(all_axes, spectra, strict=False):
        lines = {
            "original weight": (matrix.original, "C0-"),
            "edited weight": (matrix.edited, "C3-"),
            "edited weight, restrained": (matrix.restrained, "C2-"),
            "change": (matrix.change, "C3:"),
            "change, restrained": (matrix.restrained_change, "C2:"),
        }
        if np.array_equal(matrix.change, matrix.restrained_change):
            lines = {label: line for label, line in lines.items() if "restrained" not in label}
        for label, (sigma, style) in lines.items():
            axes.plot(np.arange(1, len(sigma) + 1), sigma, style, label=label)
        axes.axhline(float(matrix.original[0]), color="grey", lw=0.8, ls="--", label="largest of the original")
        floor = max(float(np.nanmin(matrix.original)) / 10, 1e-6)
        axes.set(yscale="log", xscale="log", xlabel="index", title=matrix.name, ylim=(floor, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("Singular values")
    return figure


def show_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Log a figure to a logger that accepts images, such as Weights & Biases or TensorBoard.

    Args:
        logger: A Lightning logger; one that accepts no images is skipped.
        name: Name of the image.
        figure: The figure.
        step: The logger's x-axis.
    """
    if hasattr(logger, "log_image"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        logger.log_image(key=f"plots/{name}", images=[Image.open(buffer)], step=step)
    elif hasattr(writer := getattr(logger, "experiment", None), "add_figure"):
        writer.add_figure(f"plots/{name}", figure, global_step=step)  # type: ignore[union-attr]


def save_plots(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write figures as PNG.

    Args:
        folder: Created if it does not exist.
        figures: By file name without the extension.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths
