"""The search itself: an Optuna study in the run's folder, which can be resumed, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from prune_lightning.errors import UserError
from prune_lightning.tasks.tune_space import Space
from prune_lightning.tasks.tune_trial import Outcome, Reached

STORAGE = "trials.log"
Run = Callable[[Mapping[str, Any], Reached], Outcome]


class Search:
    """A study of trials.

    Each trial's sampler is seeded by the seed and the trial's number, so that a resumed search draws what the straight
    one would have drawn.

    Args:
        folder: The run's folder; the study is kept in ``trials.log``.
        space: What to search.
        about: What the study depends on; a resumed one must have the same.
        seed: Seed of the sampler.
        startup: Trials before the sampler learns from them, and before any is stopped.
        max_edits: Pilot edits of all trials; ``None`` for no limit.
        max_seconds: Time of all trials; ``None`` for no limit.

    Raises:
        UserError: There is no limit, or the study in the folder is another one.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        about: Mapping[str, Any],
        seed: int,
        startup: int,
        max_edits: int | None,
        max_seconds: float | None,
    ) -> None:
        if max_edits is None and max_seconds is None:
            raise UserError("tune.max_edits and tune.max_minutes are both null: the search would never end")
        self.space, self.seed, self.startup = space, seed, startup
        self.max_edits, self.max_seconds = max_edits, max_seconds
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(folder / STORAGE)))
        pruner = optuna.pruners.MedianPruner(n_startup_trials=startup)
        self.study = optuna.create_study(
            storage=storage, study_name="tune", direction="maximize", load_if_exists=True, pruner=pruner
        )
        self._begin(about)

    def _begin(self, about: Mapping[str, Any]) -> None:
        """Begin with the defaults; a trial in which an earlier run was interrupted is drawn again, as it was."""
        earlier = self.study.user_attrs.get("about")
        if earlier is None:
            self.study.set_user_attr("about", dict(about))
        elif different := sorted(name for name in about if earlier.get(name) != about[name]):
            raise UserError(f"resume: the search was begun with another {', '.join(different)}")
        for trial in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if not self._ended() and not self.study.get_trials(states=(optuna.trial.TrialState.WAITING,)):
            self.study.enqueue_trial(self.space.defaults())

    @property
    def edits(self) -> int:
        """Pilot edits so far; a trial that failed before its first counts as one, so that every search ends."""
        return sum(max(1, trial.user_attrs["edits"]) for trial in self._ended())

    @property
    def seconds(self) -> float:
        """Time of the trials so far."""
        return sum(trial.user_attrs.get("seconds", 0.0) for trial in self.study.trials)

    def over(self) -> bool:
        """Whether the budget is used up. The defaults are always tried."""
        if not self.finished():
            return False
        edits = self.max_edits is not None and self.edits >= self.max_edits
        return edits or (self.max_seconds is not None and self.seconds >= self.max_seconds)

    def _ended(self) -> list[Any]:
        """Return the trials that were not interrupted."""
        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        return self.study.get_trials(states=states)

    def finished(self) -> list[Any]:
        """Return the trials that made all their edits, the best first; of equal ones the earliest."""
        trials = self.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        return sorted(trials, key=lambda trial: -trial.value)

    def step(self, run: Run) -> tuple[dict[str, Any], Outcome]:
        """Run one trial and record it; return its values and what they led to."""
        number = len(self._ended())
        self.study.sampler = optuna.samplers.TPESampler(
            seed=self.seed * 100_003 + number, n_startup_trials=self.startup
        )
        trial, started = self.study.ask(), time.perf_counter()
        values = self.space.draw(trial)

        def reached(edits: int, score: float) -> bool:
            trial.report(score, edits)
            return trial.should_prune()

        outcome = run(values, reached)
        facts = {"edits": outcome.edits, "seconds": time.perf_counter() - started, "values": values}
        for name, value in (facts | {"terms": outcome.terms, "failed": outcome.failed}).items():
            trial.set_user_attr(name, value)
        if outcome.stopped:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, outcome.score)
        return values, outcome

    def table(self) -> list[dict[str, Any]]:
        """Return the trials that have ended, in order: number, state, score, edits, seconds, values and terms."""
        return [
            {"trial": t.number, "state": t.state.name.lower(), "score": t.value, **t.user_attrs} for t in self._ended()
        ]
