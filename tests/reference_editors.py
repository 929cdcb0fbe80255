"""ROME, R-ROME, p-ROME, MEMIT, EMMET and AlphaEdit written out as their papers state them, dense and in fp64.

Nothing here comes from the package. Every text runs alone and unpadded through the plain ``transformers`` model with a
plain hook, every matrix is inverted as a matrix, and Adam is written out. Slow on purpose: what the package computes in
another order is compared with this.

``python tests/reference_editors.py`` writes ``tests/data/reference_editors.safetensors``: what the edits do to one
vector, for each method. With it a change is seen that is made here and in the package alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ORACLE = Path(__file__).parent / "data" / "reference_editors.safetensors"
METHODS = ("rome", "r_rome", "p_rome", "memit", "memit_past", "emmet", "alphaedit")
# Where the blocks are, the down-projection within a block, and whether its weight is stored in x out.
PATHS = {"gpt2": ("transformer.h", "mlp.c_proj", True), "llama": ("model.layers", "mlp.down_proj", False)}
TEXTS = (
    "The old river is a long way from Japan .",
    "Ann Lee is a painter from the north .",
    "Because it rained all day the red bridge is old .",
    "The capital of Peru is a tall town .",
    "A dog and a cat live under the bridge in Rome .",
    "Bo Berg plays the piano and speaks French .",
    "Mount Elbert lies far from the sea .",
    "It is written that the north is red and tall .",
)
PREFIXES = ("", "The river . ", "Because it rained all day . ", "Under an old bridge . ")


@dataclass(frozen=True)
class Fact:
    """A request: ``prompt`` holds ``subject`` once, ``target`` follows it."""

    subject: str
    prompt: str
    target: str


FACTS = (
    Fact("Ann Lee", "Ann Lee plays the", "piano"),
    Fact("Japan", "The capital of Japan is", "old Rome"),
    Fact("Mount Elbert", "It is written that Mount Elbert lies in", "the north of Peru"),
    Fact("Bo Berg", "The cat and the dog of Bo Berg speaks", "French"),
    Fact("the long river", "Under a bridge the long river is", "red"),
    Fact("Rome", "Rome is a", "tall town"),
)
BATCHES = (FACTS[:2], FACTS[2:5], FACTS[5:])


def tiny_model(family: str) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Return a model of four layers, the first three of which are edited, and a tokenizer of whole words.

    Above the last edited layer there has to be another one: a shift of the very last block's output reaches no token
    behind the subject, so the loss would not depend on it.

    The weights come from NumPy's legacy generator, whose numbers are fixed for good. The edited matrices are square, so
    that a wrong orientation shows in the values and not in the shape.
    """
    words = " ".join([*TEXTS, *PREFIXES, *(f"{f.prompt} {f.target} is a" for f in FACTS)]).split()
    vocabulary = {word: i for i, word in enumerate(["[PAD]", *sorted(set(words))])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="[PAD]"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[PAD]")
    width = {"n_inner": 32} if family == "gpt2" else {"intermediate_size": 32, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        family, vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0, **width,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
        scale, offset = (0.2, 0.0) if parameter.ndim == 2 else (0.1, float(parameter[0]))
        parameter.copy_(torch.from_numpy(offset + scale * numbers))
    return model, tokenizer


@contextmanager
def hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove a hook at the end of the block."""
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Settings:
    """Hyper-parameters, in the names of the papers' code."""

    layers: Sequence[int] = (0, 1, 2)
    steps: int = 4
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 0.5  # of the shift of a block's output
    clamp_mlp: float = 0.8  # of that of an MLP's
    moment_ridge: float = 0.1  # added to the diagonal of the second moment, in units of its mean
    mom2_update_weight: float = 4.0  # MEMIT's lambda
    emmet_weight: float = 3.0
    emmet_lambda: float = 0.5
    null_threshold: float = 0.1
    alpha_ridge: float = 2.0


@dataclass
class ReferenceEditor:
    """A model that is edited batch by batch; :meth:`edit` writes one batch.

    Args:
        method: ``rome``, ``r_rome``, ``p_rome``, ``memit``, ``memit_past``, ``emmet`` or ``alphaedit``.
        family: ``gpt2`` or ``llama``.
        settings: Hyper-parameters.
    """

    method: str
    family: str
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.model, self.tokenizer = tiny_model(self.family)
        blocks, down, self.transposed = PATHS[self.family]
        self.blocks = list(self.model.get_submodule(blocks))
        self.mlps = [block.mlp for block in self.blocks]
        self.downs = [block.get_submodule(down) for block in self.blocks]
        self.moments = {layer: self.second_moment(layer) for layer in self.settings.layers}
        self.past = {layer: torch.zeros_like(moment) for layer, moment in self.moments.items()}
        self.key_figures: list[tuple[float, float]] = []  # u'k / |k| and u'k / u'k_mean per rank-one update
        self.clamped = 0

    # -- the model ------------------------------------------------------------------------------------------------
    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def logits(self, ids: Sequence[int]) -> Tensor:
        return self.model(torch.tensor([list(ids)])).logits[0]

    def seen(self, module: nn.Module, ids: Sequence[int], side: str) -> Tensor:
        """Return what enters (``input``) or leaves (``output``) a module for one text, ``(length, width)``."""
        found: list[Tensor] = []

        def look(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            found.append(args[0] if side == "input" else output[0] if isinstance(output, tuple) else output)

        with hooked(module.register_forward_hook(look)):
            self.logits(ids)
        return found[0].reshape(len(ids), -1)

    def second_moment(self, layer: int) -> Tensor:
        """Return ``C``, the mean of ``k k'`` over all tokens, damped."""
        total, count = torch.zeros(32, 32, dtype=torch.float64), 0
        for text in TEXTS:
            for key in self.seen(self.downs[layer], self.ids(text), "input"):
                total += torch.outer(key, key)
                count += 1
        moment = total / count
        return moment + self.settings.moment_ridge * moment.diagonal().mean() * torch.eye(32, dtype=torch.float64)

    def weight(self, layer: int) -> Tensor:
        """Return a copy of the edited matrix, ``out x in``."""
        stored = self.downs[layer].weight
        return (stored.T if self.transposed else stored).clone()

    def write(self, layer: int, delta: Tensor) -> None:
        self.downs[layer].weight += delta.T if self.transposed else delta

    # -- what the methods read ------------------------------------------------------------------------------------
    def subject_end(self, prefix: str, fact: Fact) -> int:
        """Return the position of the subject's last token: of all tokens up to the subject's end, the last."""
        return len(self.ids(prefix + fact.prompt[: fact.prompt.index(fact.subject)] + fact.subject)) - 1

    def at_subject(self, module: nn.Module, side: str, fact: Fact, prefix: str) -> Tensor:
        return self.seen(module, self.ids(prefix + fact.prompt), side)[self.subject_end(prefix, fact)]

    def keys(self, layer: int, fact: Fact) -> list[Tensor]:
        """Return the input of the down-projection under every prefix, the clean prompt first."""
        return [self.at_subject(self.downs[layer], "input", fact, prefix) for prefix in PREFIXES]

    def mixed_key(self, layer: int, fact: Fact) -> Tensor:
        """Return MEMIT's key: the mean over two types of context, the clean prompt and the prefixed ones."""
        clean, *prefixed = self.keys(layer, fact)
        return (clean + sum(prefixed) / len(prefixed)) / 2

    def value(self, fact: Fact, layer: int, site: nn.Module) -> Tensor:
        """Optimise the shift of the output of ``site`` at the subject and return reference + shift."""
        settings = self.settings
        target = self.ids(fact.target)
        rows = [(self.ids(prefix + fact.prompt) + target, self.subject_end(prefix, fact)) for prefix in PREFIXES]
        essence = self.ids(f"{fact.subject} is a")
        essence_end = len(self.ids(fact.subject)) - 1
        reference = self.at_subject(site, "output", fact, "")
        delta = torch.zeros_like(reference)
        first, second = torch.zeros_like(delta), torch.zeros_like(delta)
        before: Tensor | None = None
        for step in range(1, settings.steps + 1):
            delta.requires_grad_()
            with torch.enable_grad():
                loss = torch.zeros((), dtype=torch.float64)
                for ids, place in rows:
                    log_p = self.shifted(site, ids, place, delta).log_softmax(-1)
                    start = len(ids) - len(target)
                    for j, token in enumerate(target):  # the logits before a token predict it
                        loss = loss - log_p[start + j - 1, token] / len(target) / len(rows)
                now = self.shifted(site, essence, essence_end, delta)[essence_end].log_softmax(-1)
                before = now.detach() if before is None else before
                loss = loss + settings.kl_factor * (now.exp() * (now - before)).sum()
                loss = loss + settings.weight_decay * delta.norm() / reference.norm() ** 2
                if step == settings.steps or float(loss.detach()) < 0.05:
                    break
                (gradient,) = torch.autograd.grad(loss, [delta])
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            corrected = (second / (1 - 0.999**step)).sqrt() + 1e-8
            delta = delta.detach() - settings.learning_rate * first / (1 - 0.9**step) / corrected
            longest = (settings.clamp if site in self.blocks else settings.clamp_mlp) * reference.norm()
            if delta.norm() > longest:
                delta = delta * longest / delta.norm()
                self.clamped += 1
        return reference + delta.detach()

    def shifted(self, site: nn.Module, ids: Sequence[int], place: int, delta: Tensor) -> Tensor:
        """Return the logits of one text with ``delta`` added to the output of ``site`` at one token."""

        def add(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            hidden = output[0] if isinstance(output, tuple) else output
            mask = torch.zeros(len(ids), 1, dtype=torch.float64)
            mask[place] = 1
            changed = hidden + (mask * delta).view(hidden.shape)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        with hooked(site.register_forward_hook(add)):
            return self.logits(ids)

    # -- the methods ----------------------------------------------------------------------------------------------
    def edit(self, batch: Sequence[Fact]) -> None:
        """Write one batch, and remember its keys."""
        self.write_batch(batch)
        self.remember(batch)

    def write_batch(self, batch: Sequence[Fact]) -> None:
        if self.method in ("rome", "r_rome", "p_rome"):
            for fact in batch:
                for layer in self.settings.layers:
                    self.write(layer, self.rank_one(fact, layer))
            return
        rule: Callable[[int, Tensor, Tensor], Tensor] = getattr(self, self.method)
        last = self.settings.layers[-1]
        targets = torch.stack([self.value(fact, last, self.blocks[last]) for fact in batch], 1)
        for position, layer in enumerate(self.settings.layers):
            keys = torch.stack([self.mixed_key(layer, fact) for fact in batch], 1)
            present = torch.stack([self.at_subject(self.blocks[last], "output", fact, "") for fact in batch], 1)
            residual = (targets - present) / (len(self.settings.layers) - position)
            self.write(layer, rule(layer, keys, residual))

    def remember(self, batch: Sequence[Fact]) -> None:
        """Add the keys of a batch to the past ones, as they are now that all layers are written."""
        for layer in self.settings.layers:
            keys = torch.stack([self.mixed_key(layer, fact) for fact in batch], 1)
            self.past[layer] = self.past[layer] + keys @ keys.T

    def rank_one(self, fact: Fact, layer: int) -> Tensor:
        """ROME, eq. 2: the direction is that of the mean key, the key that is written the clean prompt's."""
        target = self.value(fact, layer, self.mlps[layer])
        outputs = [self.at_subject(self.downs[layer], "output", fact, prefix) for prefix in PREFIXES]
        keys = self.keys(layer, fact)
        mean_key, mean_output = sum(keys) / len(keys), sum(outputs) / len(outputs)
        whitened, written, output = {
            "rome": (mean_key, keys[0], outputs[0]),
            "r_rome": (mean_key, mean_key, mean_output),
            "p_rome": (keys[0], keys[0], outputs[0]),
        }[self.method]
        direction = torch.linalg.inv(self.moments[layer]) @ whitened
        direction = direction / direction.norm()
        self.key_figures.append((
            float(direction @ written / written.norm()), float((direction @ written) / (direction @ whitened))
        ))  # fmt: skip
        return torch.outer(target - output, direction) / (direction @ written)

    def memit(self, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        moment = self.settings.mom2_update_weight * self.moments[layer]
        return residual @ keys.T @ torch.linalg.inv(moment + keys @ keys.T)

    def memit_past(self, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        moment = self.settings.mom2_update_weight * self.moments[layer]
        return residual @ keys.T @ torch.linalg.inv(moment + self.past[layer] + keys @ keys.T)

    def emmet(self, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        inverse = torch.linalg.inv(self.settings.emmet_weight * self.moments[layer])
        damping = self.settings.emmet_lambda if keys.shape[1] > 1 else 0.0
        system = keys.T @ inverse @ keys + damping * torch.eye(keys.shape[1], dtype=torch.float64)
        return residual @ torch.linalg.inv(system) @ keys.T @ inverse

    def alphaedit(self, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        projector = self.projector(layer)
        system = projector @ (keys @ keys.T + self.past[layer])
        system = system + self.settings.alpha_ridge * torch.eye(32, dtype=torch.float64)
        return (torch.linalg.inv(system) @ projector @ keys @ residual.T).T

    def projector(self, layer: int) -> Tensor:
        """Return ``P`` onto the eigenvectors of ``C`` below the threshold."""
        vectors, values, _ = torch.linalg.svd(self.moments[layer])
        null = vectors[:, values < self.settings.null_threshold]
        return null @ null.T


def probed(changes: Sequence[Tensor]) -> Tensor:
    """Return what the change of each layer makes of one fixed vector, ``(layers, out)``, fp32."""
    probe = torch.tensor(np.cos(np.arange(32.0)))
    return torch.stack([change @ probe for change in changes]).float()


def oracle(method: str) -> Tensor:
    """Return what all batches change in GPT-2's three layers, probed."""
    editor = ReferenceEditor(method, "gpt2")
    before = [editor.weight(layer) for layer in editor.settings.layers]
    for batch in BATCHES:
        editor.edit(batch)
    return probed([editor.weight(layer) - start for layer, start in zip(editor.settings.layers, before, strict=True)])


if __name__ == "__main__":
    save_file({method: oracle(method) for method in METHODS}, ORACLE)
