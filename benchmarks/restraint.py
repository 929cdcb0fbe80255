"""Time one restrained step with the procedure of PRUNE's public code and with the spectral engine.

    python benchmarks/restraint.py            both shapes on the CPU; the reference takes a quarter of an hour
    python benchmarks/restraint.py --shapes 6400x1600 --json FILE
    python benchmarks/restraint.py --device cuda --reference device

The reference is the public code's procedure for one matrix, in fp32 numpy: full SVDs (``full_matrices``) of the change,
of the original and of their sum, the numerical rank of the change, the law, and the product. With
``--reference device`` it is the cheapest form of that in PyTorch, on the same device: singular vectors of the change
only, and no full matrices. Its cost does not depend on the values, so for the larger shape it runs once per kind of
change. Our step is that of training: the new update is added, the law's correction is computed, and the weight is
written. The weights of both are compared.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import clock
from torch import Tensor, nn

from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.spectral import Logarithm, restrain_, sigma_max, spectral_correction, triplets_above
from prune_lightning.types import LowRankUpdate

BASE, ROUNDS = 1.2, 3
COMPARE_ALL_UP_TO = 20_000_000  # weights; above that the reference, which takes minutes, runs once per kind


def reference_step(original: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the restrained weight, computed as in the public code."""
    delta = weight - original
    left, sigma, right = np.linalg.svd(delta, full_matrices=True)
    _, original_sigma, _ = np.linalg.svd(original, full_matrices=True)
    np.linalg.svd(weight, full_matrices=True)  # the public code prints these values
    rank = np.linalg.matrix_rank(delta)
    top = original_sigma[0]
    above = sigma >= top
    sigma[above] = np.log(sigma[above]) / np.log(BASE) - np.log(top) / np.log(BASE) + top
    return original + (left[:, :rank] @ np.diag(sigma[:rank])) @ right[:rank]


def reference_on_device(original: Tensor, weight: Tensor) -> Tensor:
    """Return the restrained weight by the same decompositions on the device, without what nothing is read of."""
    delta = weight - original
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    top = torch.linalg.svdvals(original)[0]
    torch.linalg.svdvals(weight)
    sigma = torch.where(sigma >= top, sigma.log() / math.log(BASE) - top.log() / math.log(BASE) + top, sigma)
    return original + (left * sigma) @ right


def updates(rows: int, columns: int, count: int, top: float, device: torch.device) -> LowRankUpdate:
    """Return concatenated rank-one updates; every twentieth and the last one are above the reference."""
    generator = torch.Generator().manual_seed(count)
    left = nn.functional.normalize(torch.randn(rows, count, generator=generator), dim=0)
    right = nn.functional.normalize(torch.randn(columns, count, generator=generator), dim=0)
    size = torch.full((count,), 0.3 * top)
    size[19::20] = 3 * top
    size[-1] = 4 * top
    return LowRankUpdate((left * size).to(device), right.to(device))


def difference(ours: Tensor, theirs: np.ndarray | Tensor | None, original: Tensor) -> float | None:
    """Return the difference of two restrained weights relative to the restrained change."""
    if theirs is None:
        return None
    reference = torch.as_tensor(theirs).to(ours)
    return float((ours - reference).norm() / (reference - original).norm())


def factored_step(original: Tensor, top: float, behind: int) -> tuple[float, str, EditedMatrix, Tensor]:
    """Return the median time of a restrained step after ``behind`` edits, its path, matrix, and edited weight."""
    law, times = Logarithm(BASE, guard=False), []
    matrix = EditedMatrix("weight", nn.Parameter(original.clone(), requires_grad=False), transposed=False)
    stream = updates(*original.shape, behind + ROUNDS, top, original.device)
    if behind:
        matrix.add(LowRankUpdate(stream.left[:, :behind], stream.right[:, :behind]))
        matrix.withhold(spectral_correction(matrix.change, law, top).correction)
    for step in range(behind, behind + ROUNDS):
        update = LowRankUpdate(stream.left[:, step : step + 1], stream.right[:, step : step + 1])

        def work(update: LowRankUpdate = update) -> str:
            matrix.add(update)
            found = spectral_correction(matrix.change, law, top)
            matrix.withhold(found.correction)
            return found.path

        seconds, path = clock(work, original.device)
        times.append(seconds)
    return sorted(times)[ROUNDS // 2], path, matrix, original + matrix.change.master


def fine_tuned(original: Tensor, top: float) -> Tensor:
    """Return a weight whose change has full rank and five singular values above the reference."""
    rows, columns = original.shape
    stream = updates(rows, columns, 5, top, original.device)
    directions = [torch.linalg.qr(side)[0] for side in (stream.left, stream.right)]
    sigma = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.5], device=original.device) * top
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(9)).to(original.device)
    return original + directions[0] * sigma @ directions[1].T + noise * (0.3 * top / (rows**0.5 + columns**0.5))


def dense_step(original: Tensor, top: float, weight: Tensor) -> tuple[float, str, Tensor]:
    """Return the median time of a restrained step of a change that is not factored."""
    times = []
    for _ in range(ROUNDS):
        parameter = weight.clone()
        seconds, found = clock(
            lambda p=parameter: restrain_(p, original, Logarithm(BASE, guard=False), top), original.device
        )
        times.append(seconds)
    return sorted(times)[ROUNDS // 2], found.path, parameter


def benchmark(rows: int, columns: int, device: torch.device, kind: str) -> Iterator[dict[str, Any]]:
    """Yield one record per case of a shape."""
    original = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    seconds_top, top = clock(lambda: sigma_max(original), device)

    def record(case: str, seconds: float, reference: float, path: str, error: float | None) -> dict[str, Any]:
        return {
            "shape": f"{rows}x{columns}",
            "case": case,
            "path": path,
            "seconds": seconds,
            "reference_seconds": reference,
            "ratio": reference / seconds,
            "difference": error,
        }

    def reference(weight: Tensor) -> tuple[float, np.ndarray | Tensor | None]:
        if kind == "none":
            return math.nan, None
        if kind == "device":
            return clock(lambda: reference_on_device(original, weight), device)
        return clock(lambda: reference_step(original.cpu().numpy(), weight.cpu().numpy()), device)

    low_rank = None
    for behind in (1, 100, 1000):
        seconds, path, matrix, weight = factored_step(original, top, behind)
        error = None
        if low_rank is None or rows * columns <= COMPARE_ALL_UP_TO:
            low_rank, theirs = reference(weight)
            error = difference(matrix.weight(), theirs, original)
        yield record(f"factored, {behind} edits behind", seconds, low_rank, path, error)
    weight = fine_tuned(original, top)
    seconds, path, ours = dense_step(original, top, weight)
    full_rank, theirs = reference(weight)
    yield record("dense, 5 values above", seconds, full_rank, path, difference(ours, theirs, original))
    small = (weight - original) * 1e-3
    times = [clock(lambda: triplets_above(small, top), device)[0] for _ in range(30)]
    reads = [clock(small.sum, device)[0] for _ in range(30)]
    yield record("certificate, against one read of the matrix", min(times), min(reads), "certificate", None)
    yield record("sigma_max of the original, once", seconds_top, low_rank / 3, "lanczos", None)


def main() -> None:
    """Run the cases and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["6400x1600", "14336x4096"], metavar="ROWSxCOLUMNS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", choices=["numpy", "device", "none"], default="numpy")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    table = Table("shape", "case", "path", "ours (s)", "reference (s)", "ratio", "difference")
    records = []
    for shape in arguments.shapes:
        rows, columns = (int(side) for side in shape.split("x"))
        for entry in benchmark(rows, columns, device, arguments.reference):
            records.append(entry)
            if arguments.json:  # after each, since the reference takes long
                found = {"threads": torch.get_num_threads(), "records": records}
                arguments.json.write_text(json.dumps(found, indent=2))
    for entry in records:
        error = "" if entry["difference"] is None else f"{entry['difference']:.1e}"
        numbers = (f"{entry[key]:.4g}" for key in ("seconds", "reference_seconds", "ratio"))
        table.add_row(entry["shape"], entry["case"], entry["path"], *numbers, error)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
