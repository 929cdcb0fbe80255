"""The model card of an edited model. Texts of records are escaped in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

from prune_lightning.export.sources import ExportSource


def write_card(folder: Path, format_name: str, source: ExportSource, about: dict[str, Any]) -> None:
    """Write ``README.md``.

    Whatever comes from records or configuration enters as JSON with ``<``, ``>``, ``&`` and ``'`` escaped, inside a
    code block: it can end neither the block nor the front matter, and no page runs it. Each of the two blocks is one
    JSON document: an object of facts, and an array with an edit per line.

    Args:
        folder: Where to write.
        format_name: Name of the format.
        source: The exported model.
        about: Figures of the export.
    """
    environment = Environment(
        loader=PackageLoader("prune_lightning", "export"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    # Only the front matter is ASCII, since YAML treats further characters as line breaks.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    origin = source.provenance
    edits = [
        {"subject": r.subject, "prompt": r.prompt, "target_new": r.target_new, "target_old": r.target_old}
        for r in origin.requests
    ]
    facts = {
        "base model": origin.base_model,
        "revision": origin.revision,
        "fingerprint of the base": source.base_fingerprint(),
        "method": origin.method,
        "restraint": origin.restraint,
        "edits": len(edits),
        "edited weights": [matrix.name for matrix in source.matrices],
        **about,
    }
    text = environment.get_template("card.md.j2").render(
        format=format_name, base_model=htmlsafe_json_dumps(origin.base_model), facts=facts, edits=edits
    )
    (folder / "README.md").write_text(text, "utf-8")
