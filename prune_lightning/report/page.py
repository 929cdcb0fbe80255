"""The self-contained HTML page of a run."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from prune_lightning.report.charts import Chart, Series, draw, series
from prune_lightning.report.edits import STATES, read_edits
from prune_lightning.report.headline import ENOUGH, Tile, names, points, sentence, tiles
from prune_lightning.report.labels import Labels
from prune_lightning.report.printed import columns_of, compared_of
from prune_lightning.report.table import figure, percent, rows
from prune_lightning.report.trajectories import Curve

MOST_EDITS = 2000
_WIDE, _NARROW, _SMALL = (1060, 400), (350, 300), (330, 190)
_CHANGE = "spectrum/sigma_max_delta"
Curves = dict[str, tuple[str, Curve, Curve]]


def write_page(
    folder: Path,
    summary: Mapping[str, Any],
    config: str = "",
    pictures: Mapping[str, Path] | None = None,
    remarks: Sequence[str] = (),
) -> Path:
    """Write ``report.html``; whatever comes from data or configuration is escaped.

    Args:
        folder: The run's folder, with ``edits.jsonl`` and ``cases.jsonl``.
        summary: The run's summary.
        config: The composed configuration as YAML.
        pictures: PNG files to embed, by title.
        remarks: Sentences on what the scores leave out.

    Returns:
        The page.
    """
    labels = Labels(summary.get("labels"))
    found, edits = tiles(summary), read_edits(folder, summary)
    environment = Environment(
        loader=PackageLoader("prune_lightning", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points, "figure": figure}
    page = environment.get_template("page.html.j2").render(
        sentence=sentence(summary),
        tiles=found,
        against=f"without {restraint}" if (restraint := names(summary)[1]) else "",
        questions=_questions(summary, found),
        edits=edits[:MOST_EDITS],
        num_edits=len(edits),
        asked=sum(edit.now is not None for edit in edits),
        states=STATES,
        columns=list(columns_of(summary)),
        groups=rows(columns_of(summary), labels, compared_of(summary)),
        num_cases=summary.get("num_cases", {}),
        intervals=[_last(part.get("intervals")) for part in _parts(summary)],
        small=_small(summary, labels),
        about=_about(summary),
        summary=summary,
        pictures={title: base64.b64encode(path.read_bytes()).decode() for title, path in (pictures or {}).items()},
        remarks=remarks,
        config=config,
    )
    path = folder / "report.html"
    path.write_text(page, "utf-8")
    return path


def _parts(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what the columns of the table come from: the run before and after the edits, and the control run."""
    control = summary.get("control")
    return [{"intervals": summary.get("intervals", [])[:1]}, summary, *([control] if control else [])]


def _last(intervals: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    return intervals[-1] if intervals else {}


def _curves(summary: Mapping[str, Any]) -> Curves:
    titles = list(columns_of(summary))[1:]
    parts = [("run", summary), *([("control", summary["control"])] if summary.get("control") else [])]
    return {
        title if len(parts) > 1 else names(summary)[1] or "edited model": (kind, part["curve"], part["intervals"])
        for title, (kind, part) in zip(titles, parts, strict=True)
        if "curve" in part
    }


def _question(title: str, text: str, lines: list[Series], share: bool, first: int) -> dict[str, Any] | None:
    if not any(line.kind == "run" for line in lines):
        return None
    charts = {name: draw(lines, *size, share, first=first) for name, size in (("wide", _WIDE), ("narrow", _NARROW))}
    return {"title": title, "text": text, "charts": charts, "share": share, "lines": lines}


def _questions(summary: Mapping[str, Any], found: Sequence[Tile]) -> list[dict[str, Any]]:
    """Return one chart per question: how edits hold, what they cost, and what became of the spectrum."""
    curves, by_name = _curves(summary), {tile.quantity: tile for tile in found}
    held, kept = by_name["efficacy"], by_name["retention"]
    cost = kept if kept.key else by_name["locality"]
    after = {
        name: (kind, [e for e in curve if e["num_requests"]], more) for name, (kind, curve, more) in curves.items()
    }
    questions = []
    if held.key:
        text = f"Share of the edits so far that hold. {held.meaning}"
        questions.append(_question("Do the edits hold?", text, series(held.key, after, ENOUGH), True, 1))
    if cost.key:
        text = "Abilities kept, relative to the unedited model." if cost is kept else cost.meaning
        questions.append(_question("What did it cost?", text, series(cost.key, curves), True, 0))
    questions.append(_spectrum(summary, curves))
    return [question for question in questions if question]


def _spectrum(summary: Mapping[str, Any], curves: Curves) -> dict[str, Any] | None:
    lines = series(_CHANGE, curves)
    text = "Largest singular value of the change of an edited weight."
    if lines and (originals := (summary.get("original_sigma_max") or {}).values()):
        ends = [min(lines[0].x), max(lines[0].x)]
        lines.append(Series("unedited weight", "reference", ends, [max(originals)] * 2))
        text += " Above the largest one of the unedited weight, the edits outweigh what the model has learned."
    return _question("What happened to the spectrum?", text, lines, False, 0)


def _small(summary: Mapping[str, Any], labels: Labels) -> dict[str, list[tuple[str, Chart]]]:
    """Return a small chart of every score, by measurement."""
    curves = _curves(summary)
    keys = {key for _, curve, _ in curves.values() for entry in curve for key in entry}
    shown: dict[str, list[tuple[str, Chart]]] = {}
    for title, lines in rows(columns_of(summary), labels).items():
        for row in lines:
            few = ENOUGH if row.key.startswith(("edit/", "stream/")) else 0
            drawn = series(row.key, curves, few) if row.key in keys else []
            if drawn:
                shares = all(-1e-9 <= v <= 1 + 1e-9 for line in drawn for v in line.y if v == v)
                share = shares and not row.key.startswith(("drift/", "spectrum/"))
                shown.setdefault(title, []).append((row.name, draw(drawn, *_SMALL, share, labelled=False)))
    return shown


def _about(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run was made of, by heading."""
    versions = ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())
    hparams = summary.get("hparams") or {}
    source = " ".join(str(hparams[key]) for key in ("source", "where") if hparams.get(key))
    seconds = {"edits": summary.get("edit_s"), "evaluation": summary.get("evaluate_s")}
    spent = ", ".join(f"{value:,.0f} s of {name}" for name, value in seconds.items() if value is not None)
    found = {
        "Command": summary.get("command"),
        "Date": summary.get("date"),
        "Model": summary.get("model"),
        "Model path": summary.get("model_path"),
        "Method": names(summary)[0],
        "Restraint": names(summary)[1] or "none",
        "Data": summary.get("data"),
        "Protocol": summary.get("protocol"),
        "Edits": f"{summary.get('num_requests', 0):,}",
        "Seed": summary.get("seed"),
        "Hyper-parameters": source,
        "Device": summary.get("device"),
        "Versions": versions,
        "Time": spent,
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}
