"""Any task of lm-evaluation-harness on the live model."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.utilities.seed import isolate_rng

from prune_lightning.distributed import on_rank_zero
from prune_lightning.errors import UserError, near
from prune_lightning.evaluation.harness_prompts import asking
from prune_lightning.evaluation.measurement import Cases, Measured, Measurement
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Whole
from prune_lightning.sharding import logits_of_first
from prune_lightning.types import EditRequest

Results = dict[str, Any]


class HarnessTasks(Measurement):
    """Tasks of lm-evaluation-harness (``pip install 'prune-lightning[eval]'``), without saving the model first.

    The scores are those of ``lm_eval.simple_evaluate`` on the saved model: ``{task}/{metric}``, with lm-eval's own
    names (``gsm8k/exact_match,strict-match``; without the filter where there is none). Its cache of responses is off,
    since its keys do not include the weights. The model's mode, its untied weights and all random states are restored.
    In a distributed run rank 0 evaluates, and the others wait for its scores.

    Args:
        tasks: Names of tasks and groups, a task's YAML file, or its definition as a dict. A dict whose ``task`` is a
            known name overrides entries of that definition.
        main: Metric used for ``retention``, by task; by default the first one for which higher is better.
        chance: Chance level of that metric, by task; by default that of choosing at random among a document's choices,
            and 0 for tasks that are not multiple choice.
        num_fewshot: Examples in the prompt; ``None`` for each task's own. A task that is fixed to zero keeps it.
        limit: Use only the first documents of each task.
        samples: Documents to use, by task, instead of ``limit``.
        batch_size: Rows of a forward pass.
        include_path: A folder with definitions of tasks and groups, available by name.
        include_defaults: Whether lm-eval's own definitions are available by name; indexing them takes seconds.
        gen_kwargs: Options for tasks that generate, e.g. ``max_gen_toks``, which has to be below the model's context.
        apply_chat_template: Whether prompts are wrapped in the tokenizer's chat template.
        seed: Seed of Python's, numpy's and torch's generators, and of the few-shot examples.
        enabled: See :class:`Measurement`; without any task it does nothing.
        counts: See :class:`Measurement`.

    Raises:
        UserError: lm-eval is not installed, or both ``limit`` and ``samples`` are given.
    """

    name = "ability/lm_eval"
    title = "abilities, lm-evaluation-harness"

    def __init__(
        self,
        tasks: Sequence[str | dict[str, Any]] = (),
        main: Mapping[str, str] | None = None,
        chance: Mapping[str, float] | None = None,
        num_fewshot: Whole | None = None,
        limit: Count | None = None,
        samples: dict[str, list[Whole]] | None = None,
        batch_size: Count = 8,
        include_path: str | None = None,
        include_defaults: bool = True,
        gen_kwargs: dict[str, Any] | None = None,
        apply_chat_template: bool = False,
        seed: int = 0,
        enabled: bool = True,
        counts: Sequence[Whole] | None = None,
    ) -> None:
        super().__init__(enabled and bool(tasks), counts)
        self.definitions = list(tasks)
        for entry in self.definitions:
            if not isinstance(entry, str) and "task" not in entry:
                raise UserError(f"a task of evaluation.lm_eval needs an entry `task`, but got {entry}")
        if self.enabled and not importlib.util.find_spec("lm_eval"):
            raise UserError("evaluation.lm_eval needs lm-evaluation-harness: pip install 'prune-lightning[eval]'")
        if limit is not None and samples is not None:
            raise UserError("evaluation.lm_eval takes either `limit` or `samples`, but both are given")
        self.main, self.chance = dict(main or {}), dict(chance or {})
        self.batch_size, self.seed = batch_size, seed
        self.index_options = {"include_path": include_path, "include_defaults": include_defaults}
        self.options = {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "samples": samples,
            "gen_kwargs": gen_kwargs,
            "apply_chat_template": apply_chat_template,
        }
        self.tasks: dict[str, float] = {}  # known after lm-eval's first results
        self._manager: Any = None
        self._loaded: list[Any] = []

    def check(self, model: LanguageModel, requests: Sequence[EditRequest]) -> None:
        """Load the tasks with their data, and check the chat template and the metrics of ``main``.

        Raises:
            UserError: lm-eval does not know a task or cannot load it, ``main`` names none of a task's metrics, or the
                tokenizer has no chat template where one is asked for.
        """
        if self.options["apply_chat_template"] and not model.tokens.tokenizer.chat_template:
            raise UserError("evaluation.lm_eval.apply_chat_template: the tokenizer has no chat template")
        on_rank_zero(self._load_tasks)
        for task in (member for loaded in self._loaded for member in _members(loaded)):
            known = [f"{metric},{one.name}" for metric in task.higher_is_better() for one in task._filters]
            known += [name.removesuffix(",none") for name in known]
            if (chosen := self.main.get(task.task_name)) and chosen not in known:
                raise UserError(
                    f"evaluation.lm_eval.main: {task.task_name} has no metric {chosen!r}: {near(chosen, known)}"
                )

    def _load_tasks(self) -> None:
        """Load the tasks once, since each time lm-eval reads the data again."""
        with quiet(), isolate_rng():
            self._loaded = self._loaded or [task for entry in self.definitions for task in self._load(entry)]

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return one job: lm-eval batches the requests of all tasks together."""
        return {"lm_eval": partial(self._measure, model)}

    def _measure(self, model: LanguageModel) -> Measured:
        results = on_rank_zero(partial(self._evaluate, model), everywhere=model.is_sharded)
        scores = {f"{task}/{metric}": score for task in results["results"] for metric, score in metrics(results, task)}
        for task in results["counted"]:
            better = [metric for metric, _ in metrics(results, task) if _is_better_higher(results, task, metric)]
            chosen = self.main.get(task, *better[:1]) if better or task in self.main else None
            if chosen and f"{task}/{chosen}" not in scores:
                options = near(chosen, [metric for metric, _ in metrics(results, task)])
                raise UserError(f"evaluation.lm_eval.main: {task} has no metric {chosen!r}: {options}")
            if chosen:
                self.tasks[f"{task}/{chosen}"] = self.chance.get(task, results["chance"][task])
        return Measured(scores, _rows(results, scores))

    def _evaluate(self, model: LanguageModel) -> Results:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        self._load_tasks()
        with quiet(), isolate_rng(), model.frozen_mode(), untouched_ties(model.model), logits_of_first(model.model):
            tokenizer = copy.deepcopy(model.tokens.tokenizer)  # lm-eval may set its padding token
            kind, rows = (HFLM, self.batch_size) if model.memory is None else (asking(HFLM, model), 1)
            evaluated = kind(pretrained=model.model, tokenizer=tokenizer, backend="causal", batch_size=rows)
            results = lm_eval.simple_evaluate(
                model=evaluated,
                tasks=self._loaded,
                task_manager=self._manager,
                use_cache=None,
                bootstrap_iters=0,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
                **self.options,
            )
        kept = {key: results[key] for key in ("results", "higher_is_better", "samples")}
        counted = [name for task in self._loaded for name in _counted(task, results)]
        return {**kept, "counted": counted, "chance": {task: _chance(results, task) for task in counted}}

    def _load(self, entry: str | dict[str, Any]) -> list[Any]:
        """Return lm-eval's objects for one entry."""
        from lm_eval.tasks import TaskManager

        self._manager = self._manager or TaskManager(**self.index_options)
        known = self._manager.all_tasks
        if isinstance(entry, str) and entry not in known and not Path(entry).expanduser().is_file():
            raise UserError(f"lm-eval knows no task and no YAML file {entry!r}: {near(entry, known)}")
        takes_over = isinstance(entry, dict) and entry["task"] in known
        # lm-eval lets a dict override a named definition only as a member of a group.
        asked = {"group": "overridden", "task": [copy.deepcopy(entry)]} if takes_over else copy.deepcopy(entry)
        try:
            found = self._manager.load([asked])
        except Exception as error:
            title = entry if isinstance(entry, str) else entry["task"]
            raise UserError(f"lm-eval cannot load the task {title!r}: {error}") from error
        groups = [] if takes_over else list(found["groups"].values())[:1]
        return groups or list(found["tasks"].values())


def _members(task: Any) -> list[Any]:
    """Return the tasks of a group, or a task alone."""
    return [task] if hasattr(task, "task_name") else list(task.get_all_tasks())


def _counted(task: Any, results: Results) -> list[str]:
    """Return a task, a group with a score of its own, or the tasks of a group without one."""
    if hasattr(task, "task_name"):
        return [task.task_name]
    return [task.name] if metrics(results, task.name) else [member.task_name for member in task.get_all_tasks()]


def _chance(results: Results, task: str) -> float:
    """Return the mean over documents of one over the number of choices; zero for tasks without choices."""
    names, levels = [task], []
    for name in names:  # grows by the members of groups
        names += [member for member in results["group_subtasks"].get(name, ()) if member not in names]
        chooses = results["configs"].get(name, {}).get("output_type") == "multiple_choice"
        for sample in results["samples"].get(name, ()):
            choices = {continuation for _, continuation in sample["arguments"]} if chooses else ()
            levels.append(1 / len(choices) if choices else 0.0)
    return sum(levels) / len(levels) if levels else 0.0


def metrics(results: Results, task: str) -> list[tuple[str, float]]:
    """Return the metrics of a task: lm-eval's names, ``,none`` left out."""
    return [
        (name.removesuffix(",none"), float(value))
        for name, value in results["results"][task].items()
        if "," in name and "_stderr," not in name and isinstance(value, Real)
    ]


def _is_better_higher(results: Results, task: str, metric: str) -> bool:
    return bool(results["higher_is_better"].get(task, {}).get(metric.split(",")[0]))


def _rows(results: Results, scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return one row per document, with the metrics that are means over documents, and the generated text."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            row = rows.setdefault((task, sample["doc_id"]), {"case": sample["doc_id"], "task": task})
            for metric in sample["metrics"]:
                name = f"{metric},{sample['filter']}".removesuffix(",none")
                if isinstance(sample[metric], Real):
                    row[f"{task}/{name}"] = float(sample[metric])
            if isinstance(sample["resps"][0][0], str):
                row["text"] = sample["resps"][0][0]
    for name, score in scores.items():
        values = [row[name] for row in rows.values() if name in row]
        if not values or abs(sum(values) / len(values) - score) > 1e-6:
            for row in rows.values():
                row.pop(name, None)
    return list(rows.values())


@contextmanager
def untouched_ties(model: Any) -> Iterator[None]:
    """Prevent lm-eval from tying weights again that an editor has untied."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars, log records and warnings of lm-eval and its dependencies.

    lm-eval has no option for the progress bars of building requests. So this thread's output to standard error is
    dropped; other threads are not affected.
    """
    loggers = [
        logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "transformers")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(_Muted(sys.stderr)), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Muted(io.TextIOBase):
    """A stream that drops the output of the thread that created it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()
