"""Second moments on disk: safetensors with a manifest of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune_lightning.atomic_files import write_tensors
from prune_lightning.devices import in_own_memory
from prune_lightning.distributed import on_rank_zero
from prune_lightning.errors import UserError
from prune_lightning.models.running_moments import RunningMoments


class StatisticsStore:
    """The statistics of one model over one corpus.

    Each file holds one layer, ``second_moment`` in fp32, so that runs with other layers can share it. The manifest is
    in the file's metadata and is compared on loading.

    Args:
        folder: Folder of the files; created if missing.
        manifest: Everything that the statistics depend on, JSON-serializable.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.manifest = json.dumps(dict(manifest), sort_keys=True)
        self.folder = folder / hashlib.blake2b(self.manifest.encode(), digest_size=8).hexdigest()

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}.safetensors"

    def load(self, layers: Sequence[int], device: torch.device) -> dict[int, Tensor] | None:
        """Return the second moments, fp64, or ``None`` if one of the layers is missing.

        Raises:
            UserError: A file is damaged, or of another model or corpus.
        """
        if not all(self._path(layer).exists() for layer in layers):
            return None
        return {layer: self._read(self._path(layer))["second_moment"].to(device).double() for layer in layers}

    def holds(self, layers: Sequence[int]) -> bool:
        """Whether the second moments of all layers are there; only the files' headers are read.

        Raises:
            UserError: See :meth:`load`.
        """
        if not all(self._path(layer).exists() for layer in layers):
            return False
        return all(self._read(self._path(layer), headers=True) == {} for layer in layers)

    def make_folder(self) -> None:
        """Make the folder.

        Raises:
            UserError: It cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(f"model.second_moments.cache: {str(self.folder)!r} cannot be written: {error}") from error

    def _read(self, path: Path, headers: bool = False) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                manifest = (file.metadata() or {}).get("manifest")
                if manifest != self.manifest:
                    raise UserError(f"{path} was taken from another model or corpus: {manifest}; delete it")
                names = [] if headers else file.keys()
                return in_own_memory({name: file.get_tensor(name) for name in names})
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); delete it to compute it again") from error

    def _write(self, path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.make_folder()
        write_tensors(path, tensors, {"manifest": self.manifest, "facts": json.dumps(dict(facts))})

    def save(self, moments: Mapping[int, Tensor], facts: Mapping[str, Any]) -> None:
        """Write finished statistics and delete partial sums, on rank 0."""

        def write() -> None:
            for layer, moment in moments.items():
                self._write(self._path(layer), {"second_moment": moment.float()}, facts)
            self._partial(list(moments)).unlink(missing_ok=True)

        on_rank_zero(write)

    def _partial(self, layers: Sequence[int]) -> Path:
        return self.folder / f"unfinished_{'_'.join(map(str, layers))}.safetensors"

    def save_partial(self, layers: Sequence[int], running: RunningMoments) -> None:
        """Reduce the running sums over the processes and write them."""
        running.gather()
        tensors = {f"{kind}.{i}": t for kind in ("sums", "half") for i, t in enumerate(getattr(running, kind))}
        counts = torch.tensor([running.tokens, running.half_tokens, running.texts])
        on_rank_zero(lambda: self._write(self._partial(layers), {**tensors, "counts": counts}, {}))

    def load_partial(self, layers: Sequence[int], running: RunningMoments) -> None:
        """Load the sums of an interrupted pass, if there is one, on rank 0."""

        def read() -> list[int] | None:
            path = self._partial(layers)
            if not path.exists():
                return None
            tensors = self._read(path)
            running.half = [torch.zeros_like(total) for total in running.sums if "half.0" in tensors]
            for kind in ("sums", "half"):
                for i, total in enumerate(getattr(running, kind)):
                    total.copy_(tensors[f"{kind}.{i}"])
            return tensors["counts"].tolist()

        if counts := on_rank_zero(read):
            running.tokens, running.half_tokens, running.texts = counts
            if running.half_tokens and not running.half:
                running.half = [torch.zeros_like(total) for total in running.sums]
