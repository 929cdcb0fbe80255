"""The general abilities of the PRUNE and RECT papers, in their own protocol."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from prune_lightning.evaluation.legacy_tasks import LegacyTask
from prune_lightning.evaluation.measurement import Cases, Measured, Measurement
from prune_lightning.evaluation.scoring import continue_greedily
from prune_lightning.models.batching import TOKEN_BUDGET
from prune_lightning.models.language_model import LanguageModel


class LegacyAbilities(Measurement):
    """The tasks of PRUNE (GSM8K, SAMSum, NQ-open, RTE) and RECT (also BoolQ, MuTual, SST-2, CoNLL03), zero-shot.

    Prompts, numbers of new tokens, and scorers are the papers', so that their curves can be drawn again; as tests of
    ability they are weak. GSM8K shows the worked solution, in which the answer nearly always stands (357 of PRUNE's
    358 items); many passages of NQ-open hold it too (110 of 261); RTE is at 158 of 299 for one constant answer. Use
    lm-evaluation-harness for figures that mean something by themselves. Decoding is greedy, where the papers' code
    leaves it to each checkpoint's generation configuration; their bugs are not repeated.

    A row whose logits are not finite fails and is counted in ``{task}_nonfinite``, the share of such items.

    Args:
        tasks: By name. A task without a path is left out.
        max_items: Use at most so many items of each task.
        token_budget: Padded tokens per forward pass.
        enabled: See :class:`Measurement`; without any path nothing is taken.
        counts: See :class:`Measurement`.

    Raises:
        UserError: A file cannot be used; the message has the line and the reason.
    """

    name = "ability/legacy"
    title = "abilities, the papers' tasks"

    def __init__(
        self,
        tasks: Mapping[str, LegacyTask],
        max_items: int | None = None,
        token_budget: int = TOKEN_BUDGET,
        enabled: bool = True,
        counts: Sequence[int] | None = None,
    ) -> None:
        given = {name: task for name, task in tasks.items() if task.path}
        super().__init__(enabled and bool(given), counts)
        self.suite = given if self.enabled else {}
        self.items = {name: task.read(name)[:max_items] for name, task in self.suite.items()}
        self.tasks = tuple(self.suite)
        self.token_budget = token_budget
        self._warned: set[str] = set()

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return one job per task."""
        return {name: partial(self._measure, model, name) for name in self.suite}

    def _measure(self, model: LanguageModel, name: str) -> Measured:
        task, items = self.suite[name], self.items[name]
        prompts = list(dict.fromkeys(item.prompt for item in items))
        said = continue_greedily(model, prompts, task.max_new_tokens, token_budget=self.token_budget)
        self._warn(name, sum(said.truncated), len(prompts))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        judged = []
        for item in items:
            row = place[item.prompt]
            judged.append({**task.score(said.texts[row], item), "nonfinite": float(not said.finite[row])})
        cases = [
            {"case": item.case, "task": name, **_named(name, parts), "text": said.texts[place[item.prompt]]}
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
