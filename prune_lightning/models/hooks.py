"""Hooks that read or replace the inputs and outputs of modules inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from prune_lightning.sharding import is_sharded


class _Reached(Exception):
    """Raised inside a forward pass once the last activation is recorded."""


def hidden_states(value: Any) -> Tensor:
    """Return the hidden states of a module's output, which may be a tensor or the first element of a tuple."""
    return value[0] if isinstance(value, tuple) else value


def apart(value: Tensor, rows: int | None) -> Tensor:
    """Return ``(rows, length, width)`` from a module that has rows and tokens in one axis, like OPT's MLP."""
    return value if rows is None or value.ndim != 2 else value.unflatten(0, (rows, -1))


def _changed(value: Tensor, change: Callable[[Tensor], Tensor], rows: int | None) -> Tensor:
    """Return ``change(value)`` in the shape of ``value``."""
    whole = apart(value, rows)
    return change(whole) if whole.ndim == value.ndim else change(whole).flatten(0, 1)


class Recorder:
    """Collects the activations of one forward pass; ``inputs[i]`` or ``outputs[i]`` belongs to the i-th module."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}


@contextmanager
def capture(
    inputs: list[nn.Module] | None = None,
    outputs: list[nn.Module] | None = None,
    stop: bool = True,
    rows: int | None = None,
) -> Iterator[Recorder]:
    """Record the inputs or outputs of modules during the forward pass inside the block.

    Args:
        inputs: Modules whose first positional input is recorded.
        outputs: Modules whose output is recorded.
        stop: Whether to end the forward pass as soon as everything is recorded. A pass of a sharded model is always
            completed: FSDP returns gathered blocks and synchronises its streams at the end of one.
        rows: Number of rows of the batch, if a module may have rows and tokens in one axis; they are recorded
            separately.
    """
    inputs, outputs = inputs or [], outputs or []
    recorder = Recorder()
    handles = []
    stop = stop and not any(map(is_sharded, (*inputs, *outputs)))

    def done() -> None:
        if stop and len(recorder.inputs) == len(inputs) and len(recorder.outputs) == len(outputs):
            raise _Reached

    def on_input(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            recorder.inputs[index] = apart(args[0], rows)
            done()

        return hook

    def on_output(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # A copy, since some blocks, such as Falcon's, add to their MLP's output in place.
            recorder.outputs[index] = apart(hidden_states(output), rows).clone()
            done()

        return hook

    try:
        handles += [module.register_forward_pre_hook(on_input(i)) for i, module in enumerate(inputs)]
        handles += [module.register_forward_hook(on_output(i)) for i, module in enumerate(outputs)]
        with suppress(_Reached):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_keywords(modules: Sequence[nn.Module]) -> Iterator[list[dict[str, Any]]]:
    """Record the keyword arguments of modules, in the order of the calls, inside the block."""
    found: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs)

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edit_output(module: nn.Module, change: Callable[[Tensor], Tensor], rows: int | None = None) -> Iterator[None]:
    """Replace a module's output by ``change(output)`` in every forward pass inside the block; see :func:`capture`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = _changed(hidden_states(output), change, rows)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def add_branch(module: nn.Module, branch: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add ``branch(input)`` to a module's output in every forward pass inside the block."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + branch(args[0])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edit_input(module: nn.Module, change: Callable[[Tensor], Tensor], rows: int | None = None) -> Iterator[None]:
    """Replace a module's first input by ``change(input)`` in every forward pass inside the block; see `capture`."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_changed(args[0], change, rows), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replace_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the ``forward`` of modules inside the block; their hooks still run.

    A ``forward`` that other code has set on a module, such as ``accelerate``'s, is restored.
    """
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign]


def pass_through(modules: Sequence[nn.Module], in_tuple: bool) -> AbstractContextManager[None]:
    """Replace modules by the identity inside the block."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if in_tuple else hidden

    return replace_forward(modules, forward)


def replace_output(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """Replace a module's output by ``output`` inside the block, for any input."""
    return replace_forward([module], lambda *args, **kwargs: output)


def only_at(module: nn.Module, places: Tensor) -> AbstractContextManager[None]:
    """Run a tokenwise module, such as an MLP, on some tokens only; its output is zero for the others.

    Args:
        module: The module, with inputs of shape ``(rows, length, width)``. Further tensors per token, such as the
            residual of BLOOM's MLP, have the same shape.
        places: Distinct indices into ``rows * length``.
    """
    inner = module.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def narrowed(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == hidden.shape[:2]:
                return value.flatten(0, 1).index_select(0, places)[None]
            return value

        further = {name: narrowed(value) for name, value in kwargs.items()}
        seen = inner(narrowed(hidden), *map(narrowed, args), **further)[0]
        full = seen.new_zeros(hidden.shape[0] * hidden.shape[1], seen.shape[-1])
        return full.index_copy(0, places, seen).view(*hidden.shape[:2], -1)

    return replace_forward([module], forward)


def few_rows(module: nn.Module, most: int = 32) -> AbstractContextManager[None]:
    r"""Compute a wide ``Linear`` as :math:`(W h^\top)^\top` for few rows; other modules are unchanged.

    The products are the same, but for a few rows CPU libraries need up to three times as long for :math:`h W^\top`,
    which dominates the cost of an LM head.

    Args:
        module: The LM head, with inputs of shape ``(n, 1, width)``.
        most: Largest number of rows.
    """
    if type(module) is not nn.Linear or module.bias is not None or "forward" in vars(module):
        return nullcontext()

    def forward(hidden: Tensor) -> Tensor:
        if len(hidden) > most:
            return functional.linear(hidden, module.weight)
        return functional.linear(module.weight, hidden[:, 0]).T[:, None]

    return replace_forward([module], forward)


def replace_weight(module: nn.Module, weight: Tensor) -> AbstractContextManager[None]:
    """Replace the weight of a ``Linear`` or ``Conv1D`` inside the block, with gradients to the new weight.

    Args:
        module: The module; its bias is kept.
        weight: ``(out_features, in_features)`` for both kinds of module; cast to the input's dtype.
    """
    return replace_forward(
        [module],
        lambda hidden: functional.linear(hidden, weight.to(hidden.dtype), module.bias),  # type: ignore[arg-type]
    )
