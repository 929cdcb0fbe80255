"""A trial of a search: the pilot edits with some hyper-parameters, and their score."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from typing_extensions import override

from prune_lightning.data.loader import EditLoader
from prune_lightning.errors import UserError
from prune_lightning.evaluation.counterfact import CounterFactScores
from prune_lightning.evaluation.drift import Drift
from prune_lightning.evaluation.easyedit import EasyEditScores
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.contexts import sample_prefixes
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.phases import PhaseClock
from prune_lightning.spectral import NonFiniteChange
from prune_lightning.tasks.hparams import weights_fingerprint
from prune_lightning.tasks.setup import build_trainer
from prune_lightning.types import EditBatch, EditRequest

Reached = Callable[[int, float], bool]
"""Is told a number of edits and their score; returns whether the trial should stop."""


def objective(terms: Mapping[str, float]) -> float:
    """Return the harmonic mean of the terms that could be measured; 0 if one of them is 0 or not finite.

    The harmonic mean is low if any term is low, so that no term can be bought with another.

    >>> round(objective({"efficacy": 1.0, "paraphrase": 0.5}), 3)
    0.667
    >>> objective({"efficacy": 1.0, "locality": 0.0})
    0.0
    """
    values = list(terms.values())
    if not values or any(not value > 0 for value in values):
        return 0.0
    return len(values) / sum(1 / value for value in values)


class PilotScores:
    """Scores of pilot edits, each term in [0, 1].

    - ``efficacy``: share of the edits whose new answer is given in greedy decoding (exact match)
    - ``paraphrase``: share of the paraphrases for which the new answer is likelier than the old one; exact match
      where no old answer is known
    - ``locality``: share of the tokens of the probes' answers for which the first choice is the unedited model's
    - ``drift``: ``exp(-KL)``, with the divergence from the unedited model on a general text, in nats per token

    A term that the pilots cannot measure, for want of paraphrases or probes, is left out.

    Args:
        model: The unedited model.
        requests: All requests that will be scored.
    """

    def __init__(self, model: LanguageModel, requests: Sequence[EditRequest]) -> None:
        self.model = model
        self._cases = dict(enumerate(requests))
        self._edits, self._locality, self._drift = CounterFactScores(), EasyEditScores(), Drift()
        self._locality.take_reference(model, self._cases)
        self._drift.measure(model)

    def terms(self, places: Sequence[int]) -> dict[str, float]:
        """Return the terms over some of the requests, by their places."""
        cases = {place: self._cases[place] for place in places}
        edits = self._edits.measure(self.model, cases).scores
        nearby = self._locality.measure(self.model, cases).scores
        kl = self._drift.measure(self.model).scores["kl"]
        success = edits.get("generalization_score", math.nan)
        found = {
            "efficacy": edits["efficacy_accuracy"],
            "paraphrase": edits.get("generalization_accuracy", math.nan) if math.isnan(success) else success,
            "locality": nearby.get("locality_acc", math.nan),
        }
        drift = math.exp(-kl) if math.isfinite(kl) else 0.0
        return {name: value for name, value in found.items() if not math.isnan(value)} | {"drift": drift}


@dataclass
class Outcome:
    """What a trial led to.

    Args:
        score: The objective after its last scored edit.
        terms: Its terms.
        edits: Number of edits that were made.
        stopped: Whether it was stopped early.
        failed: Why it failed, if it did; its score is 0.
    """

    score: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    edits: int = 0
    stopped: bool = False
    failed: str | None = None


class _Watch(L.Callback):
    """Scores a trial at its rungs, and ends it if asked."""

    def __init__(
        self, scores: PilotScores, places: Sequence[int], rungs: Sequence[int], reached: Reached, clock: PhaseClock
    ) -> None:
        self.scores, self.places, self.rungs = scores, places, sorted(rungs)
        self.reached, self.clock, self.outcome = reached, clock, Outcome()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, EditingModule)
        before, now = self.outcome.edits, pl_module.num_requests
        self.outcome.edits = now
        self.clock.current.advance(now - before)
        if not any(before < rung <= now for rung in self.rungs):
            return
        if now == len(self.places):
            pl_module.run.finish()  # a restraint of the end belongs to the score
        with pl_module.run.evaluation_view():
            self.outcome.terms = self.scores.terms(self.places[:now])
        self.outcome.score = objective(self.outcome.terms)
        if self.reached(now, self.outcome.score) and now < len(self.places):
            self.outcome.stopped = trainer.should_stop = True


class Pilots:
    """Runs trials on one model, which is restored bit for bit after each.

    Args:
        config: The job's configuration, settled.
        model: The unedited model.
        requests: The pilot edits, and those held out.
        rungs: Number of scores within a trial.
        clock: Its running phase counts the edits.
    """

    def __init__(
        self, config: DictConfig, model: LanguageModel, requests: Sequence[EditRequest], rungs: int, clock: PhaseClock
    ) -> None:
        self.config, self.model, self.requests = copy.deepcopy(config), model, requests
        self.num_rungs, self.clock = rungs, clock
        model.to(build_trainer(config, [], []).strategy.root_device)
        if config.method.get("contexts"):  # the same prefixes for all trials, sampled once
            prefixes = sample_prefixes(model, instantiate(config.method.contexts, _convert_="all"))
            OmegaConf.update(self.config, "method.contexts.fixed", list(prefixes), force_add=True)
        self.scores = PilotScores(model, requests)
        self.fingerprint = weights_fingerprint(model)

    def run(self, values: Mapping[str, Any], places: Sequence[int], reached: Reached = lambda *_: False) -> Outcome:
        """Make some of the edits one step after another, and score them.

        Args:
            values: Hyper-parameters by their key.
            places: Places of the requests.
            reached: See :data:`Reached`.

        Raises:
            UserError: The method refuses the values that the job was started with, so that no trial would succeed.
            RuntimeError: The model could not be restored.
        """
        config = copy.deepcopy(self.config)
        for key, value in values.items():
            OmegaConf.update(config, key, value)
        module: EditingModule = instantiate(
            config.method, language_model=self.model, non_finite=config.non_finite, _convert_="all"
        )
        restraint = [instantiate(config.restraint)] if config.restraint else []
        rungs = [math.ceil(len(places) * (i + 1) / self.num_rungs) for i in range(self.num_rungs)]
        watch = _Watch(self.scores, places, rungs, reached, self.clock)
        try:
            trainer = build_trainer(config, [*restraint, watch], [])
            trainer.fit(module, EditLoader(self._steps(places)))
        except (NonFiniteChange, LinAlgError, UserError) as error:
            if isinstance(error, UserError) and config == self.config:
                raise
            watch.outcome.failed, watch.outcome.score = str(error), 0.0
        finally:
            module.run.restart()
        self.model.to(build_trainer(config, [], []).strategy.root_device)  # a Trainer leaves it on the CPU
        if weights_fingerprint(self.model) != self.fingerprint:
            raise RuntimeError("the model is not the unedited one after a trial")
        return watch.outcome

    def _steps(self, places: Sequence[int]) -> list[EditBatch]:
        size = self.config.data.batch_size
        chosen = [self.requests[place] for place in places]
        return [EditBatch(tuple(chosen[start : start + size])) for start in range(0, len(chosen), size)]
