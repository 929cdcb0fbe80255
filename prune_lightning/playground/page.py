"""The page of the playground, in Gradio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from prune_lightning.errors import UserError
from prune_lightning.playground.drawing import Drawing
from prune_lightning.playground.ground import Place, Playground
from prune_lightning.playground.parts import Parts

CSS = Path(__file__).with_name("page.css")
_SYSTEM = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
_LARGEST_BASE = 20.0


def theme() -> gr.themes.Base:
    """Return the theme: the reader's own fonts, so that none is loaded."""
    return gr.themes.Default(primary_hue="blue", font=_SYSTEM, font_mono=["ui-monospace", "monospace"])


class Page:
    """The page: what is on it, and what each control does.

    Every handler takes all that it needs from the page, so that two visitors do not disturb each other's view.

    Args:
        ground: The playground.
        kept: Whether the edits are kept when it ends.
    """

    def __init__(self, ground: Playground, kept: bool) -> None:
        self.ground, self.parts = ground, Parts(ground, kept)
        self.history = ground.editor.history

    def build(self) -> gr.Blocks:
        """Return the page."""
        with gr.Blocks(title="prune-lightning playground", analytics_enabled=False) as blocks:
            self.about = gr.HTML()
            with gr.Row():
                with gr.Column(scale=6, min_width=340):
                    self._asking()
                    self._editing()
                with gr.Column(scale=5, min_width=340):
                    self._edits()
                    self._looking()
            self._connect(blocks)
        return blocks

    # -- what is on it ----------------------------------------------------------------------------------------------
    def _asking(self) -> None:
        gr.HTML("<h2>Ask</h2>")
        edits = self.ground.editor.edits
        first = edits[0].prompt if edits else "The capital of France is"
        with gr.Group():
            self.prompt = gr.Textbox(first, label="Prompt", elem_id="ask", placeholder="The capital of France is")
            self.ask = gr.Button("Ask both models", variant="primary", elem_id="ask-button")
        self.answers = gr.HTML(elem_id="answers")

    def _editing(self) -> None:
        gr.HTML("<h2>Write an edit</h2>")
        with gr.Group():
            with gr.Row():
                self.subject = gr.Textbox("France", label="Subject", elem_id="subject", min_width=120)
                self.target = gr.Textbox("Rome", label="New answer", elem_id="target", min_width=120)
            self.fact = gr.Textbox(
                "The capital of France is", label="Prompt", info="It contains the subject.", elem_id="fact"
            )
            with gr.Accordion("Score more than the prompt", open=False):
                self.paraphrases = gr.Textbox(
                    label="Paraphrases, one a line",
                    info="They should give the new answer.",
                    lines=2,
                    elem_id="paraphrases",
                )
                self.unrelated = gr.Textbox(
                    label="Unrelated prompts, one a line",
                    info="Their answers should stay.",
                    lines=2,
                    elem_id="unrelated",
                )
            self.write = gr.Button("Write this edit", variant="primary", elem_id="write-button")
        self.outcome = gr.HTML(elem_id="outcome")

    def _edits(self) -> None:
        gr.HTML("<h2>Edits</h2>")
        self.listing = gr.HTML(elem_id="listing")
        with gr.Row(equal_height=True):
            self.which = gr.Dropdown(label="Take back", elem_id="which", scale=3, min_width=160)
            self.undo = gr.Button("Undo", elem_id="undo-button", scale=1, min_width=90, size="md")

    def _looking(self) -> None:
        gr.HTML("<h2>Look back, or under another base</h2>")
        with gr.Group():
            self.state = gr.Slider(
                0, 1, 0, step=1, label="Number of edits", info="0 is the unedited model.", elem_id="state"
            )
            own, takes = self.history.base, self.history.takes_base
            self.restrain = gr.Checkbox(
                own is not None, label="Apply PRUNE", visible=own is None and takes, elem_id="restrain"
            )
            self.base = gr.Slider(
                1.05,
                max(_LARGEST_BASE, own or 0),
                own or 1.2,
                step=0.05,
                label="PRUNE's base",
                info="The larger, the stronger. It changes what is shown here, not how edits are written.",
                visible=takes,
                elem_id="base",
            )
            self.matrix = gr.Dropdown(label="Weight", visible=False, elem_id="matrix")
        self.spectrum = gr.HTML(elem_id="spectrum")

    # -- what it does -------------------------------------------------------------------------------------------------
    def _connect(self, blocks: gr.Blocks) -> None:
        place = [self.state, self.restrain, self.base, self.matrix]
        whole = [self.about, self.answers, self.listing, self.which, self.state, self.matrix, self.spectrum]
        view = [self.answers, self.listing, self.spectrum]
        fact = [self.subject, self.fact, self.target, self.paraphrases, self.unrelated]
        further = [self.prompt, *place[1:]]
        # One queue for all, so that they are answered in the order in which they were asked: else what the page shows
        # when it is loaded could come after, and in place of, the answer to a quick visitor.
        hidden: dict[str, Any] = {
            "api_visibility": "private",
            "show_progress": "minimal",
            "concurrency_id": "model",
            "concurrency_limit": 1,
        }
        blocks.load(self._refresh, further, whole, **hidden)
        gr.on([self.ask.click, self.prompt.submit], self._ask, [self.prompt, *place], self.answers, **hidden)
        done = self.write.click(self._write, fact, [self.outcome, self.prompt], **hidden)
        done.then(self._refresh, further, whole, **hidden)
        done = self.undo.click(self._undo, [self.which], self.outcome, **hidden)
        done.then(self._refresh, further, whole, **hidden)
        looks = [control.input for control in (self.state, self.restrain, self.base, self.matrix)]
        gr.on(looks, self._look, [self.prompt, *place], view, trigger_mode="always_last", **hidden)

    def _place(self, state: float | None, restrain: bool, base: float) -> Place:
        counts = self.history.counts
        edits = counts[min(int(state), len(counts) - 1)] if state is not None else None
        shown = base if restrain and self.history.takes_base else None
        return Place(edits, shown)

    def _ask(self, prompt: str, state: float | None, restrain: bool, base: float, matrix: str | None) -> str:
        place = self._place(state, restrain, base)
        return self._said(lambda: self.parts.answers(self.ground.ask(prompt or "", place), place))

    def _write(self, *texts: str | None) -> tuple[str, Any]:
        subject, prompt, target, paraphrases, unrelated = (text or "" for text in texts)
        try:
            result = self.ground.write(subject, prompt, target, paraphrases.splitlines(), unrelated.splitlines())
        except UserError as error:
            return self.parts.error(str(error)), gr.skip()
        return self.parts.written(result), result.request.prompt

    def _undo(self, number: int | None) -> str:
        def taken() -> str:
            request = self.ground.undo(number)
            return self.parts.note(f"Taken back: {request.prompt} {request.target_new}")

        return self._said(taken)

    def _look(
        self, prompt: str, state: float | None, restrain: bool, base: float, matrix: str | None
    ) -> tuple[str, str, str]:
        place = self._place(state, restrain, base)
        spectra = {spectrum.name: spectrum for spectrum in self.ground.spectra(place)}
        shown = spectra.get(matrix or "", next(iter(spectra.values()), None))
        law = place.base is not None or self.history.base is not None
        drawing = self.parts.spectrum(Drawing.of(shown), law) if shown else ""
        return self._ask(prompt, state, restrain, base, matrix), self.parts.edits(self.ground.listing(place)), drawing

    def _refresh(self, prompt: str, restrain: bool, base: float, matrix: str | None) -> tuple[Any, ...]:
        """Show the latest state."""
        last = len(self.history.counts) - 1
        names = [spectrum.name for spectrum in self.ground.spectra(Place())]
        shown = matrix if matrix in names else next(iter(names), None)
        answers, listing, drawing = self._look(prompt, None, restrain, base, shown)
        edits = self.ground.editor.edits
        choices = [(f"{n}: {r.prompt} {r.target_new}", n) for n, r in enumerate(edits, start=1)][::-1]
        return (
            self.parts.about(),
            answers,
            listing,
            gr.Dropdown(choices, value=len(edits) or None, interactive=bool(edits)),
            gr.Slider(maximum=max(last, 1), value=last, interactive=last > 0),
            gr.Dropdown(names, value=shown, visible=len(names) > 1),
            drawing,
        )

    def _said(self, action: Callable[[], str]) -> str:
        """Return what an action shows, or why it cannot be done."""
        try:
            return action()
        except UserError as error:
            return self.parts.error(str(error))
