"""The general abilities of the PRUNE and RECT papers, in the papers' protocol."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from prune_lightning.evaluation.decoding import check_room
from prune_lightning.evaluation.legacy_tasks import LegacyTask
from prune_lightning.evaluation.measurement import Cases, Measured, Measurement
from prune_lightning.evaluation.scoring import continue_greedily
from prune_lightning.models.batching import TOKEN_BUDGET
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Whole
from prune_lightning.types import EditRequest


class LegacyAbilities(Measurement):
    """The tasks of PRUNE (GSM8K, SAMSum, NQ-open, RTE) and RECT (also BoolQ, MuTual, SST-2, CoNLL03), zero-shot.

    Prompts, numbers of new tokens, and scorers are the papers', so that their curves can be reproduced. As tests of
    ability they are weak: GSM8K's prompt contains the worked solution, which nearly always contains the answer (357 of
    PRUNE's 358 items); so do many passages of NQ-open (110 of 261); and one constant answer scores 158 of 299 on RTE.
    Use lm-evaluation-harness for meaningful absolute figures. Decoding is greedy, where the papers' code uses each
    checkpoint's generation configuration; their bugs are not reproduced.

    An item with non-finite logits fails; ``{task}_nonfinite`` is the share of such items.

    Args:
        tasks: Tasks by name. A task without a path is left out.
        max_items: Largest number of items of each task.
        token_budget: Padded tokens per forward pass.
        enabled: See :class:`Measurement`; without any path it does nothing.
        counts: See :class:`Measurement`.

    Raises:
        UserError: A file cannot be used; the message has the line and the reason.
    """

    name = "ability/legacy"
    title = "abilities, the papers' tasks"

    def __init__(
        self,
        tasks: Mapping[str, LegacyTask],
        max_items: Count | None = None,
        token_budget: Count = TOKEN_BUDGET,
        enabled: bool = True,
        counts: Sequence[Whole] | None = None,
    ) -> None:
        given = {name: task for name, task in tasks.items() if task.path}
        super().__init__(enabled and bool(given), counts)
        self.suite = given if self.enabled else {}
        self.items = {name: task.read(name)[:max_items] for name, task in self.suite.items()}
        self.tasks = {name: task.chance(self.items[name]) for name, task in self.suite.items()}
        self.token_budget = token_budget
        self._warned: set[str] = set()

    def check(self, model: LanguageModel, requests: Sequence[EditRequest]) -> None:
        """Check that the continuations fit the model's context."""
        for name, task in self.suite.items():
            check_room(f"evaluation.legacy.tasks.{name}.max_new_tokens", model, task.max_new_tokens)

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return one job per task."""
        return {name: partial(self._measure, model, name) for name in self.suite}

    def _measure(self, model: LanguageModel, name: str) -> Measured:
        task, items = self.suite[name], self.items[name]
        prompts = list(dict.fromkeys(item.prompt for item in items))
        continuations = continue_greedily(model, prompts, task.max_new_tokens, token_budget=self.token_budget)
        self._warn(name, sum(continuations.truncated), len(prompts))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        judged = []
        for item in items:
            row = place[item.prompt]
            judged.append(
                {**task.score(continuations.texts[row], item), "nonfinite": float(not continuations.finite[row])}
            )
        cases = [
            {"case": item.case, "task": name, **_named(name, parts), "text": continuations.texts[place[item.prompt]]}
            for item, parts in zip(items, judged, strict=True)
        ]
        return Measured(_named(name, task.summary(judged)), cases)

    def _warn(self, name: str, truncated: int, prompts: int) -> None:
        if truncated and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"{truncated} of the {prompts} prompts of {name} are longer than the model's context and lose their "
                "beginning",
                stacklevel=2,
            )


def _named(task: str, parts: Mapping[str, float]) -> dict[str, float]:
    return {f"{task}_{part}" if part else task: value for part, value in parts.items()}
