"""ME-PPL: perplexity per sentence, which reveals a collapse that averages over tokens hide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from prune_lightning.errors import UserError
from prune_lightning.evaluation.measurement import Cases, Measured, Measurement
from prune_lightning.evaluation.scoring import token_nll
from prune_lightning.metrics import SentencePerplexity
from prune_lightning.metrics.functional import perplexity
from prune_lightning.models.batching import TOKEN_BUDGET
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Positive, Whole
from prune_lightning.records import read_objects


class SentencePerplexities(Measurement):
    """Perplexity of each sentence of a file, without its first token and without special tokens.

    Scores and flags are those of :class:`~prune_lightning.metrics.SentencePerplexity`. Sentences of one token are left
    out.

    Args:
        path: JSON array or JSONL of objects; ``None`` leaves the measurement out.
        key: Key of the sentence in an object.
        max_items: Use only the first sentences; ``None`` for all.
        token_budget: Padded tokens per forward pass.
        collapse_absolute: Mean perplexity above which the model counts as collapsed.
        collapse_relative: The same for corpus perplexity, as a multiple of the unedited model's.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.

    Raises:
        UserError: The file cannot be used; the message has the line and the reason.
    """

    name = "ability/me_ppl"
    title = "perplexity of sentences (ME-PPL)"
    labels: ClassVar[Mapping[str, str]] = {
        "mean": "mean perplexity",
        "median": "median perplexity",
        "max": "largest perplexity",
        "corpus": "perplexity of all sentences together",
        "collapse_absolute": "collapsed: mean above the limit",
        "collapse_relative": "collapsed: against the unedited model",
        "num_nonfinite": "sentences whose perplexity is not finite",
    }
    short: ClassVar[Sequence[str]] = ("mean",)
    lower: ClassVar[frozenset[str]] = frozenset(labels)

    def __init__(
        self,
        path: str | None,
        key: str = "Text",
        max_items: Count | None = None,
        token_budget: Count = TOKEN_BUDGET,
        collapse_absolute: Positive = 1000.0,
        collapse_relative: Positive = 10.0,
        enabled: bool = True,
        counts: Sequence[Whole] | None = None,
    ) -> None:
        super().__init__(enabled and path is not None, counts)
        self.sentences = read_sentences(path, key)[:max_items] if path and self.enabled else []
        self.token_budget = token_budget
        self.absolute, self.relative = collapse_absolute, collapse_relative
        self.reference: float | None = None

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:
        """Keep the unedited model's corpus perplexity."""
        self.reference = self._measure(model).scores["corpus"]

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return the one job."""
        return {"me_ppl": partial(self._measure, model)}

    def _measure(self, model: LanguageModel) -> Measured:
        # Every process scores all sentences, so nothing is summed over processes.
        metric = SentencePerplexity(self.absolute, self.relative, self.reference, sync_on_compute=False)
        nll, count = token_nll(model, self.sentences, self.token_budget, special_tokens=False)
        metric.to(model.device).update(nll, count)
        single = perplexity(nll.double() / count).tolist()
        cases = [{"case": i, "mean": single[i]} for i, tokens in enumerate(count.tolist()) if tokens]
        return Measured({name: float(value) for name, value in metric.compute().items()}, cases)


def read_sentences(path: str | Path, key: str) -> list[str]:
    """Return the sentences under a key of the objects of a file.

    Raises:
        UserError: A row has none, or there is none at all; the message has the line.
    """
    found: list[str] = []
    path = Path(path).expanduser()
    for line, row in read_objects(path):
        text = row if isinstance(row, str) else row.get(key)
        if isinstance(row, str) or not isinstance(text, str) or not text.strip():
            reason = row if isinstance(row, str) else f"expected a text under {key!r}, but got {text!r}"
            raise UserError(f"me_ppl: {str(path)!r}, line {line}: {reason}")
        found.append(text)
    if not found:
        raise UserError(f"me_ppl: {str(path)!r} holds no sentence")
    return found
