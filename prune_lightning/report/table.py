"""The table at the end of a run: every score, grouped by measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_GROUPS = {
    "edit/counterfact": "edits, CounterFact",
    "edit/zsre": "edits, zsRE",
    "edit/easyedit": "edits, EasyEdit",
    "edit/wild": "edits, free answers (WILD)",
    "edit/generation": "edits, generated texts",
    "ability/miniature": "abilities in miniature",
    "ability/legacy": "abilities, the papers' tasks",
    "ability/lm_eval": "abilities, lm-evaluation-harness",
    "ability/me_ppl": "perplexity of sentences (ME-PPL)",
}
_FIRST = ("edit", "stream", "ability")
_FORMS = {"score": "preferred", "accuracy": "said"}
_STREAM = {
    "acquisition": "right after",
    "final": "now",
    "forgetting": "forgotten",
    "forgetting_max": "forgotten at most",
    "bwt": "backward transfer",
    "fwt": "forward transfer",
    "half_life": "half-life, edits",
    "num_nonfinite": "not finite",
}
NAMES = {
    **{
        f"edit/counterfact/{kind}_{form}": f"{kind}, {name}"
        for kind in ("efficacy", "generalization", "locality")
        for form, name in _FORMS.items()
    },
    **{f"stream/{form}/{key}": f"{text}, {name}" for form, name in _FORMS.items() for key, text in _STREAM.items()},
    "stream/locality_agreement": "unrelated answers unchanged",
    "edit/counterfact/harmonic_score": "harmonic mean, preferred",
    "edit/zsre/efficacy": "efficacy, tokens",
    "edit/zsre/generalization": "generalization, tokens",
    "edit/zsre/specificity": "specificity, tokens",
    "edit/zsre/harmonic": "harmonic mean",
    "edit/easyedit/rewrite_acc": "rewrite, tokens",
    "edit/easyedit/rephrase_acc": "rephrase, tokens",
    "edit/easyedit/portability_acc": "portability, tokens",
    "edit/easyedit/locality_acc": "locality, tokens",
    **{
        f"edit/wild/{context}_{score}": f"{context}: {name}"
        for context in ("bare", "instruction", "chat")
        for score, name in {
            "efficacy_exact_match": "efficacy, exact",
            "efficacy_judge": "efficacy, judged",
            "generalization_exact_match": "generalization, exact",
            "generalization_judge": "generalization, judged",
            "portability_exact_match": "portability, exact",
            "locality": "locality, unchanged",
        }.items()
    },
    "edit/generation/fluency": "fluency",
    "edit/generation/consistency": "consistency",
    "ability/miniature/reasoning": "reasoning",
    "ability/miniature/nli": "inference",
    "ability/miniature/qa": "open-domain questions",
    "ability/miniature/summarization": "summarisation",
    "ability/miniature/retention": "abilities kept",
    "ability/miniature/perplexity": "perplexity",
    "spectrum/sigma_max_delta": "largest σ of the change",
    "spectrum/condition_number": "condition number",
}


def label(key: str) -> str:
    """Return a score's name for people: a friendly one where there is one, or what follows its measurement's name."""
    return NAMES.get(key, key.removeprefix(_measurement(key) + "/"))


def group_of(key: str) -> str:
    """Return the name for people of the measurement that a score belongs to."""
    return _GROUPS.get(_measurement(key), _measurement(key))


def _measurement(key: str) -> str:
    parts = key.split("/")
    return "/".join(parts[: 2 if parts[0] in ("edit", "ability") and len(parts) > 2 else 1])


def figure(value: Any) -> str:
    """Return a score as text: three decimals, or three digits where it is large."""
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _cell(scores: Mapping[str, Any], key: str) -> str:
    above = "> " if scores.get(f"{key}_censored") else ""
    return above + figure(scores.get(key))


def rows(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """Return, by group, a row per score: its name, then its value in each column.

    A figure of which it is only known that it is larger has ``>`` before it.

    Args:
        columns: Scores by column title.
    """
    keys = list(dict.fromkeys(key for scores in columns.values() for key in scores))
    known = {key: place for place, key in enumerate(NAMES)}

    def place(key: str) -> tuple[int, str, int, int]:
        first = key.split("/")[0]
        group = _FIRST.index(first) if first in _FIRST else len(_FIRST)
        return group, _measurement(key), known.get(key, len(known)), keys.index(key)

    result: dict[str, list[list[str]]] = {}
    for key in sorted(keys, key=place):
        if not key.endswith("_censored"):
            row = [label(key), *(_cell(scores, key) for scores in columns.values())]
            result.setdefault(group_of(key), []).append(row)
    return result


def result_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for group, lines in rows(columns).items():
        table.add_row(f"[bold]{group}[/bold]")
        for line in lines:
            table.add_row(*line)
        table.add_section()
    return table
