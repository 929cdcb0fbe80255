r"""Second moments of keys, :math:`C = \frac1N \sum_i k_i k_i^\top`, and linear solves with them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from prune_lightning.distributed import fail_together, true_on_all_ranks
from prune_lightning.errors import UserError, one_of
from prune_lightning.fingerprint import sampled_fingerprint
from prune_lightning.models.batching import by_length
from prune_lightning.models.corpora import SELF, CheckedCorpus, Corpus, CorpusUnavailable
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import local_path
from prune_lightning.models.running_moments import RunningMoments
from prune_lightning.models.second_moment import Keep, SecondMoment
from prune_lightning.models.self_sampled import SampledText, SelfSampledCorpus
from prune_lightning.models.statistics_store import StatisticsStore
from prune_lightning.models.tokenization import token_rows
from prune_lightning.phases import Phase, PhaseClock
from prune_lightning.ranges import Count, NonNegative


class SecondMoments:
    """Computes the second moments of a model's keys over a corpus, for all layers in one pass.

    With a ``cache``, results are stored under the fingerprints of model and corpus and these settings, and an
    interrupted pass is resumed. In a distributed run the batches are divided among the processes.

    Args:
        corpus: The texts; ``self`` for text that the model samples itself; ``None`` for the identity matrix (an
            uncalibrated choice in some published settings).
        max_tokens: Stop after this many tokens; ``None`` for the whole corpus.
        max_length: Longest piece of a text, in tokens.
        ridge: Added to the diagonal, in units of its mean.
        token_budget: Padded tokens per forward pass.
        cache: Folder for finished and interrupted statistics; ``None`` for no cache.
        save_every: Number of texts between two saves of the running sums.
        shipped: Read-only folder of finished statistics that are shipped with the model, checked first;
            ``pkg://package/folder`` for one in a package.
        sampled: How the model samples its own text.
        fallback: Whether the model's own text takes the place of a corpus that cannot be read here.
        on_cpu: See :class:`~.second_moment.Keep`; the sums of the pass are in the CPU's memory, too.
        dtype: See :class:`~.second_moment.Keep`.

    Raises:
        UserError: ``corpus`` is another text than ``self``.
    """

    def __init__(
        self,
        corpus: Corpus | str | None,
        max_tokens: Count | None = None,
        max_length: Count = 1024,
        ridge: NonNegative = 0.0,
        token_budget: Count = 8192,
        cache: str | Path | None = None,
        save_every: Count = 8192,
        shipped: str | None = None,
        sampled: SampledText | None = None,
        fallback: bool = False,
        on_cpu: bool = False,
        dtype: str = "float64",
    ) -> None:
        self.keep = Keep(on_cpu, dtype)
        if isinstance(corpus, str):
            one_of("model.second_moments.corpus", corpus, (SELF,))
        self.sampled, self.fallback = sampled or SampledText(), fallback
        self.corpus, self.max_tokens, self.max_length = corpus, max_tokens, max_length
        self.ridge, self.token_budget = ridge, token_budget
        self.cache, self.save_every = Path(cache).expanduser() if cache else None, save_every
        self.shipped = local_path(shipped) if shipped else None
        self._read: Corpus | None = None
        self.num_tokens, self.convergence = 0, math.nan

    def limited(self, tokens_per_feature: float, key_size: int) -> SecondMoments:
        """Return a copy that reads, or samples, so many tokens per entry of a key, if it does not stop earlier."""
        limited, most = copy.copy(self), math.inf if self.max_tokens is None else self.max_tokens
        limited.max_tokens = math.ceil(min(tokens_per_feature * key_size, most))
        limited.sampled = self.sampled.limited(tokens_per_feature)
        if isinstance(self.corpus, SelfSampledCorpus):
            limited.corpus = SELF
        return limited

    def compute(
        self,
        model: LanguageModel,
        layers: Sequence[int],
        clock: PhaseClock | None = None,
        tokens_per_feature: float | None = None,
    ) -> dict[int, SecondMoment]:
        """Return the second moment of the down-projection's input at each layer.

        Args:
            model: The unedited model.
            layers: Layers.
            clock: Measures the time as the phase ``statistics``.
            tokens_per_feature: Stop after this multiple of the keys' width (FastMEMIT,
                https://arxiv.org/abs/2506.04226); statistics of more tokens are used where they exist.

        Raises:
            UserError: The corpus has no text, or a file of the cache is damaged.
        """
        clock = clock or PhaseClock()
        with clock.phase("statistics"):
            if self.corpus is None:
                return {n: SecondMoment(torch.eye(model.key_size(n)).to(model.device), keep=self.keep) for n in layers}
            try:
                moments = self._moments(model, layers, clock, tokens_per_feature)
            except CorpusUnavailable as error:
                if not self.fallback:
                    raise
                rank_zero_warn(f"{error}. Until then, the second moments are of text that the model samples itself")
                self.corpus = SELF
                moments = self._moments(model, layers, clock, tokens_per_feature)
            return self._factored(model, moments)

    def _moments(
        self, model: LanguageModel, layers: Sequence[int], clock: PhaseClock, tokens_per_feature: float | None
    ) -> Mapping[int, Tensor]:
        """Return the moments that are known, or else take and store them."""
        self._read = self.resolved(model, layers, clock)
        moments, few = self._known(model, layers), self
        if moments is None and tokens_per_feature is not None:
            few = self.limited(tokens_per_feature, max(map(model.key_size, layers)))
            self._read = few.resolved(model, layers, clock)
            moments = few._known(model, layers)
        if moments is not None:
            return moments
        taken = few.take(model, layers, StatisticsStore(self.cache, few.manifest(model)) if self.cache else None, clock)
        self.num_tokens, self.convergence = few.num_tokens, few.convergence
        return taken

    def resolved(self, model: LanguageModel, layers: Sequence[int], clock: PhaseClock | None = None) -> Corpus:
        """Return the corpus; the model samples its own if that is what was chosen."""
        if self.corpus == SELF:
            size = max(map(model.key_size, layers))
            self.corpus = SelfSampledCorpus(model, self.sampled, size, self.cache, clock or PhaseClock())
        assert not isinstance(self.corpus, str | None)
        return self.corpus

    def _known(self, model: LanguageModel, layers: Sequence[int]) -> Mapping[int, Tensor] | None:
        """Return what is shipped or cached, if every process finds it."""
        for folder in (self.shipped, self.cache):
            with fail_together():
                store = StatisticsStore(folder, self.manifest(model)) if folder else None
                found = store.load(layers, self.keep.device(model.device)) if store else None
            if true_on_all_ranks(found is not None):
                return found
        return None

    def _factored(self, model: LanguageModel, moments: Mapping[int, Tensor]) -> dict[int, SecondMoment]:
        exact = not (self.cache or self.shipped) and next(model.parameters()).dtype == torch.float64  # files hold fp32
        precision = torch.float64 if exact else torch.float32
        return {n: SecondMoment(self._damped(m.to(model.device)), precision, self.keep) for n, m in moments.items()}

    def _damped(self, moment: Tensor) -> Tensor:
        moment.diagonal().add_(self.ridge * moment.diagonal().mean())
        return moment

    def num_texts(self, key_size: int) -> int:
        """Return the number of texts for keys of a width."""
        texts = () if self.corpus is None else self.corpus
        return self.sampled.num_texts(key_size) if isinstance(texts, str) else len(texts)

    def summary(self) -> dict[str, Any]:
        """Return the corpus and, if they were not read from the cache, the number of tokens and the last change."""
        known = self._read or (None if isinstance(self.corpus, str | None) else self.corpus)
        taken = {"tokens": self.num_tokens, "convergence": self.convergence} if self.num_tokens else {}
        return {"corpus": known and known.identity(), **taken}

    def check(self, model: LanguageModel, layers: Sequence[int]) -> None:
        """Raise if the second moments are not kept anywhere and cannot be computed; nothing is computed yet.

        Args:
            model: The unedited model.
            layers: Layers.

        Raises:
            UserError: A file is damaged or missing, the corpus cannot be read, or the cache cannot be written.
        """
        if isinstance(self.corpus, str | None):  # nothing to read
            return
        if self.shipped and not self.shipped.is_dir():
            raise UserError(f"model.second_moments.shipped: there is no folder {str(self.shipped)!r}")
        manifest = self.manifest(model)
        if any(StatisticsStore(folder, manifest).holds(layers) for folder in (self.shipped, self.cache) if folder):
            return
        if isinstance(self.corpus, CheckedCorpus):
            try:
                self.corpus.check()
            except CorpusUnavailable:
                if not self.fallback:
                    raise
        if self.cache:
            StatisticsStore(self.cache, manifest).make_folder()

    def manifest(self, model: LanguageModel) -> dict[str, Any]:
        """Return all settings that the statistics depend on."""
        assert not isinstance(self.corpus, str | None)
        return {
            "model": sampled_fingerprint(dict(model.model.named_parameters())),
            "corpus": self.corpus.identity(),
            "max_tokens": self.max_tokens,
            "max_length": min(self.max_length, model.tokens.max_length),
            "dtype": str(next(model.parameters()).dtype),
        }

    @torch.no_grad()
    def take(
        self,
        model: LanguageModel,
        layers: Sequence[int],
        store: StatisticsStore | None = None,
        clock: PhaseClock | None = None,
    ) -> dict[int, Tensor]:
        """Run the model on the corpus and return the second moments without ridge, fp64; see :meth:`compute`.

        Args:
            model: The unedited model.
            layers: Layers.
            store: Where to resume from and to store the result; ``None`` for neither.
            clock: Measures the time and counts the texts as the phase ``statistics``.
        """
        sizes = [model.key_size(layer) for layer in layers]
        running = RunningMoments(sizes, self.keep.device(model.device), model.device)
        if store:
            store.load_partial(layers, running)
        with (clock or PhaseClock()).phase("statistics") as phase:
            self._sum(model, layers, running, store, phase)
        if not running.tokens:
            raise UserError("the statistics corpus holds no text")
        moments = dict(zip(layers, running.finish(), strict=True))
        self.num_tokens, self.convergence = running.tokens, running.convergence
        if store:  # rounded as in the store, so that a run from the cache gives the same results
            moments = {layer: moment.float().double() for layer, moment in moments.items()}
            store.save(moments, {"tokens": running.tokens, "texts": running.texts, "convergence": self.convergence})
        return moments

    def _sum(
        self,
        model: LanguageModel,
        layers: Sequence[int],
        running: RunningMoments,
        store: StatisticsStore | None,
        phase: Phase,
    ) -> None:
        """Add the corpus to the sums, from the first text that they do not include."""
        assert not isinstance(self.corpus, str | None)
        modules = [model.rewrite_module(layer) for layer in layers]
        texts = itertools.islice(iter(self.corpus.texts()), running.texts, None)
        phase.expect(len(self.corpus), done=running.texts)
        while True:
            with fail_together():  # saving communicates between processes
                window = list(itertools.islice(texts, min(2048, self.save_every)))
                self._add(model, modules, window, running, phase)
            if not window:
                break
            running.texts += len(window)
            if store and running.texts % self.save_every < len(window):
                store.save_partial(layers, running)
            if self.max_tokens is not None and running.tokens >= self.max_tokens:
                break

    def _add(
        self,
        model: LanguageModel,
        modules: list[nn.Module],
        window: Sequence[str],
        running: RunningMoments,
        phase: Phase,
    ) -> None:
        """Add this process's share of some texts."""
        left = None if self.max_tokens is None else self.max_tokens - running.tokens
        pieces = token_rows(model.tokens, window, min(self.max_length, model.tokens.max_length), left)
        tokens = sum(map(len, pieces))
        phase.expect(self._texts_in_all(running.texts + len(window), running.tokens + tokens))
        for done in running.add_batches(model, modules, list(self.batches(pieces))):
            # The batches of a window are sorted by length, so progress is measured by tokens.
            phase.advance(len(window) * done / tokens)

    def _texts_in_all(self, texts: int, tokens: int) -> float:
        """Return the expected number of texts, if the others are as long as those so far."""
        assert not isinstance(self.corpus, str | None)
        if self.max_tokens is None or not tokens:
            return len(self.corpus)
        return min(len(self.corpus), texts * self.max_tokens / tokens)

    def batches(self, pieces: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Yield groups of pieces of similar length, each within the token budget once padded."""
        for group in by_length([len(piece) for piece in pieces], self.token_budget):
            yield [pieces[i] for i in group]
