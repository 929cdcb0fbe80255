"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

NAMES = {
    "edit/counterfact/efficacy_score": "efficacy, preferred",
    "edit/counterfact/efficacy_accuracy": "efficacy, said",
    "edit/counterfact/generalization_score": "generalization, preferred",
    "edit/counterfact/generalization_accuracy": "generalization, said",
    "edit/counterfact/locality_score": "locality, preferred",
    "edit/counterfact/locality_accuracy": "locality, said",
    "edit/counterfact/harmonic_score": "harmonic mean, preferred",
    "edit/zsre/efficacy": "zsRE efficacy, tokens",
    "edit/zsre/generalization": "zsRE generalization, tokens",
    "edit/zsre/specificity": "zsRE specificity, tokens",
    "edit/zsre/harmonic": "zsRE harmonic mean",
    "edit/easyedit/rewrite_acc": "EasyEdit rewrite, tokens",
    "edit/easyedit/rephrase_acc": "EasyEdit rephrase, tokens",
    "edit/easyedit/portability_acc": "EasyEdit portability, tokens",
    "edit/easyedit/locality_acc": "EasyEdit locality, tokens",
    **{
        f"edit/wild/{context}_{score}": f"WILD {context}: {name}"
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


def figure(value: Any) -> str:
    """Return a score as text: three decimals, or three digits where it is large."""
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def rows(columns: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return a row per metric: its name, then its value in each column.

    Args:
        columns: Scores by column title.
    """
    present = [key for key in NAMES if any(key in scores for scores in columns.values())]
    return [[NAMES[key], *(figure(scores.get(key)) for scores in columns.values())] for key in present]


def result_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows(columns):
        table.add_row(*row)
    return table
