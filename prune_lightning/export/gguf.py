"""The GGUF file that the model was loaded from, with the edited tensors in F16 and everything else unchanged."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.export.sources import ExportedMatrix, ExportSource
from prune_lightning.models.gguf_file import gguf_tensors, gguf_weights, is_gguf
from prune_lightning.models.loading import local_path

LOW_RANK_ONLY = False
EPSILON = float(torch.finfo(torch.float16).eps)
_MODELFILE = """\
# ollama create NAME -f Modelfile && ollama run NAME
FROM ./{}
PARAMETER temperature 0
"""


def check_base(base_model: str) -> None:
    """Raise an error if the model was not loaded from a GGUF file.

    Raises:
        UserError: It was not.
    """
    if not is_gguf(local_path(base_model)):
        raise UserError(
            f"a GGUF file is only exported for a model that was loaded from one, and {base_model!r} was not; export "
            "`full`, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )


def check_weights(base_model: str, weights: Mapping[str, tuple[int, int]], num_layers: int, kind: str = "F16") -> None:
    """Raise an error if weights cannot be written into the file that the model was loaded from.

    Args:
        base_model: Path of the file.
        weights: ``(out_features, in_features)`` of each weight to edit, by its name in ``transformers``.
        num_layers: Number of the model's layers.
        kind: See :func:`write_gguf`.

    Raises:
        UserError: The file has no tensor for one of them, or the type cannot hold its rows.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _names(*gguf_tensors(local_path(base_model)), weights, num_layers)
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    for name, (_, width) in weights.items():
        if width % block:
            raise UserError(
                f"{kind} stores the rows of a matrix in blocks of {block} values, and a row of {name} has {width}: "
                "take export=gguf, which stores F16"
            )


def write_gguf(source: ExportSource, folder: Path, kind: str) -> dict[str, Any]:
    r"""Write the edited file and a ``Modelfile`` for Ollama.

    The metadata and all other tensors are copied byte for byte. An edited tensor is :math:`W_0 + \Delta`, with
    :math:`W_0` as the file stores it.

    Args:
        source: The edited model.
        folder: An empty folder.
        kind: Type of the edited tensors, ``F16`` or ``Q8_0``.

    Returns:
        The file's name, the type, the edited tensors by their names in the file, and for each the share of the change
        that is left after rounding, :math:`\langle \Delta, \hat W - W_0 \rangle / \|\Delta\|^2`.

    Raises:
        UserError: The model was not loaded from a GGUF file, the type cannot hold the rows of an edited tensor, or one
            is stored in an unknown layout.
    """
    from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize

    check_base(source.provenance.base_model)
    base, num_layers = local_path(source.provenance.base_model), source.language_model.num_layers
    shapes = {matrix.name: (matrix.original.shape[0], matrix.original.shape[1]) for matrix in source.matrices}
    check_weights(source.provenance.base_model, shapes, num_layers, kind)
    reader = GGUFReader(base)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(*gguf_tensors(base), shapes, num_layers)
    replaced: dict[str, Any] = {}
    kept: dict[str, float] = {}
    for matrix in source.matrices:
        tensor = stored[names[matrix.name]]
        before = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        change = matrix.dense_change().to("cpu", torch.float32)[_order(matrix, before, source)]
        data = quantize((before + change).numpy(), GGMLQuantizationType[kind])
        after = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]))
        replaced[tensor.name] = data
        size = float(change.double().square().sum())
        kept[tensor.name] = float((change.double() * (after - before).double()).sum()) / size if size else 1.0
    path = folder / f"{base.stem}-edited.gguf"
    _copy(reader, path, replaced, int(GGMLQuantizationType[kind]))
    (folder / "Modelfile").write_text(_MODELFILE.format(path.name), "utf-8")
    note = f"{kind} keeps at least {min(kept.values(), default=1.0):.1%} of a change"
    return {"file": path.name, "type": kind, "change_kept": kept, "note": note}


def load(source: ExportSource, folder: Path) -> Any:
    """Load the file with ``transformers``."""
    (path,) = folder.glob("*.gguf")
    model = source.language_model.model
    return gguf_weights(path, model.config, model.dtype)[0].to(source.language_model.device)


write = partial(write_gguf, kind="F16")


def _names(architecture: str, stored: Collection[str], weights: Iterable[str], num_layers: int) -> dict[str, str]:
    """Return the name in the file of each weight."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, num_layers)
    found: dict[str, str] = {}
    for weight in weights:
        options = (weight, weight.partition(".")[2])  # for some models without the name of the whole model
        name = next(filter(None, (names.get_name(each, try_suffixes=(".weight",)) for each in options)), "")
        if name not in stored:
            raise UserError(f"the file has no tensor of its own for the edited weight {weight}; export `full`")
        found[weight] = name
    return found


def _order(matrix: ExportedMatrix, stored: Tensor, source: ExportSource) -> Tensor:
    """Return the order in which the file stores the rows of a weight, found by comparing the unedited weights."""
    original = matrix.original.to("cpu")
    for order in _orders(len(original), source):
        if original.shape == stored.shape and torch.equal(original[order], stored.to(original.dtype)):
            return order
    raise UserError(
        f"the file stores {matrix.name} in a layout that cannot be written back, or it has changed since it was "
        "loaded; export `full`"
    )


def _orders(rows: int, source: ExportSource) -> Iterator[Tensor]:
    """Yield the order of the model, and those of llama.cpp, in which the two rows of a rotated pair are neighbours."""
    yield torch.arange(rows)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(source.language_model.config, name, None)
        if heads and rows % (2 * heads) == 0:
            yield torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _copy(reader: Any, path: Path, replaced: Mapping[str, np.ndarray[Any, Any]], kind: int) -> None:
    """Write the file of a reader with some tensors replaced.

    In the table of tensors, the types of those and the offsets of all are changed in place. Its size stays the same.
    """
    if reader.byte_order != "I":
        raise UserError("the GGUF file has the other byte order, which is not written; export `full`")
    start, padding = int(reader.data_offset), int(reader.alignment)
    head = bytearray(reader.data[:start].tobytes())
    with path.open("wb") as file:
        file.seek(start)
        for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
            file.write(bytes(-(file.tell() - start) % padding))
            _, name, _, dims, _, _ = tensor.field.parts
            entry = int(tensor.field.offset) + 8 + len(name) + 4 + 8 * len(dims)
            if tensor.name in replaced:
                struct.pack_into("<I", head, entry, kind)
            struct.pack_into("<Q", head, entry + 4, file.tell() - start)
            whole = slice(int(tensor.data_offset), int(tensor.data_offset) + int(tensor.n_bytes))
            file.write(np.ascontiguousarray(replaced.get(tensor.name, reader.data[whole])).tobytes())
        file.write(bytes(-(file.tell() - start) % padding))
        file.seek(0)
        file.write(head)
