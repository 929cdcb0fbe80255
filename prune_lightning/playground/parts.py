"""Parts of the page as HTML, in which every text is escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from prune_lightning.playground.drawing import Drawing
from prune_lightning.playground.ground import Asked, Listed, Place, Playground, Written
from prune_lightning.tasks.choices import model_name


class Parts:
    """Renders what a playground shows.

    Args:
        ground: The playground.
        kept: Whether the edits are kept when it ends.
    """

    def __init__(self, ground: Playground, kept: bool) -> None:
        environment = Environment(
            loader=PackageLoader("prune_lightning", "playground"), autoescape=True, undefined=StrictUndefined
        )
        self._template = environment.get_template("parts.html.j2").module
        self._ground, self._kept = ground, kept

    def _render(self, macro: str, *arguments: object) -> str:
        return str(getattr(self._template, macro)(*arguments))

    def about(self) -> str:
        """Return the heading."""
        editor = self._ground.editor
        recipe, folder = editor.recipe, str(editor.folder) if self._kept else None
        model = model_name(str(recipe.model["path"]))
        return self._render("about", model, recipe.method, recipe.restraint, editor.history.base, len(editor), folder)

    def error(self, message: str) -> str:
        """Return a message about what a visitor has to mend."""
        return self._render("error", message)

    def note(self, message: str) -> str:
        """Return a message."""
        return self._render("note", message)

    def answers(self, asked: Asked, place: Place) -> str:
        """Return the answers of both models side by side."""
        count = len(self._ground.editor) if place.edits is None else place.edits
        base = None if place.base == self._ground.editor.history.base else place.base
        return self._render("answers", asked, count, base)

    def written(self, result: Written) -> str:
        """Return the outcome of an edit with its scores."""
        return self._render("written", result, list(result.scores.cells()))

    def edits(self, listed: list[Listed]) -> str:
        """Return the list of edits."""
        return self._render("edits", listed, len(self._ground.editor))

    def spectrum(self, drawing: Drawing, law: bool) -> str:
        """Return the drawing of a spectrum."""
        return self._render("spectrum", drawing, law)
