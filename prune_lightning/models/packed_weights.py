"""Products with weights that are kept in the order in which a processor multiplies them.

A product of few tokens with a weight matrix takes twice as long as it has to: the matrix is brought into the blocks of
the processor's kernel in every product, and that takes as long as the product itself. oneDNN can keep it in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 2**30
"""Bytes of all packed copies of a model at most; a larger one runs with its weights as they are."""

_CAPABILITIES = {"AVX2", "AVX512"}


class Product(Protocol):
    """Linear modules with the same input."""

    def forward(self, hidden: Tensor) -> Sequence[Tensor]:
        """Return the output of each module for ``(n, in)``."""

    def backward(self, *gradients: Tensor) -> Tensor:
        """Return the gradient of the input, ``(n, in)``, given that of each output."""


class Plain:
    """The modules with their weights as they are.

    Args:
        modules: Linear modules.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.modules = modules

    def forward(self, hidden: Tensor) -> Sequence[Tensor]:
        """Return the output of each module for ``(n, in)``."""
        return [functional.linear(hidden, module.weight, module.bias) for module in self.modules]

    def backward(self, *gradients: Tensor) -> Tensor:
        """Return the gradient of the input, ``(n, in)``, given that of each output."""
        found = gradients[0] @ self.modules[0].weight
        for gradient, module in zip(gradients[1:], self.modules[1:], strict=True):
            found.addmm_(gradient, module.weight)
        return found


class Packed:
    """The modules as one, with one copy of their weights for the products forward and one for those backward.

    Args:
        modules: Linear modules with weights in fp32.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._sizes = [module.out_features for module in modules]
        self._bias: Tensor | None = None
        if any(module.bias is not None for module in modules):
            zeros = (module.weight.new_zeros(module.out_features) for module in modules)
            biases: list[Tensor] = [
                zero if module.bias is None else module.bias for module, zero in zip(modules, zeros, strict=True)
            ]
            self._bias = torch.cat(biases)
        weight = torch.cat([module.weight for module in modules])
        self._ahead, self._back = _pack(weight), _pack(weight.T.contiguous())

    def forward(self, hidden: Tensor) -> Sequence[Tensor]:
        """Return the output of each module for ``(n, in)``."""
        return _product(hidden, self._ahead, self._bias).split(self._sizes, dim=-1)

    def backward(self, *gradients: Tensor) -> Tensor:
        """Return the gradient of the input, ``(n, in)``, given that of each output."""
        return _product(gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=-1), self._back, None)


def _pack(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _product(hidden: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
    return found


class PackedWeights:
    """The packed copies of a model's weights. They are made anew when a weight has changed."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, tuple[list[Any], Packed]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()  # a copied model packs its own weights

    def product(self, modules: Sequence[nn.Linear]) -> Product:
        """Return the product with the packed weights of some modules, which are always asked for together."""
        parameters = [p for module in modules for p in (module.weight, module.bias) if p is not None]
        kept = self._kept.get(modules[0])
        if kept is None or not _same(kept[0], parameters):
            with torch.no_grad():
                self._kept[modules[0]] = kept = _state(parameters), Packed(modules)
        return kept[1]

    def clear(self) -> None:
        """Free all copies."""
        self._kept.clear()


def packed_bytes(modules: Sequence[nn.Module]) -> int:
    """Return the bytes of the packed copies of a model's modules on a CPU; 0 if they are not packed."""
    weights = [module.weight for module in modules if type(module) is nn.Linear and "forward" not in vars(module)]
    fits = len(weights) == len(modules) and all(w.dtype == torch.float32 and not w.is_inference() for w in weights)
    size = 2 * sum(weight.nbytes for weight in weights)
    return size if fits and size <= LARGEST else 0


def packs(modules: Sequence[nn.Module]) -> bool:
    """Whether packed copies of these modules are used here. The same machine says the same."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in _CAPABILITIES
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
        and packed_bytes(modules) > 0
        and all(parameter.is_cpu for module in modules for parameter in module.parameters())
    )


def _state(parameters: Sequence[Tensor]) -> list[Any]:
    return [(ref(p), p.data_ptr(), p._version) for p in parameters]


def _same(state: Sequence[Any], parameters: Sequence[Tensor]) -> bool:
    """Whether parameters are as they were. Writing to ``.data`` goes unnoticed, as in autograd."""
    return len(state) == len(parameters) and all(
        was() is p and (address, version) == (p.data_ptr(), p._version)
        for (was, address, version), p in zip(state, parameters, strict=True)
    )
