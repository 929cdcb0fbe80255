"""The playground: what a visitor can do, and the page in a real browser."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_editor import FRANCE, ITALY

from prune_lightning import Editor
from prune_lightning.editor.history import Spectrum
from prune_lightning.errors import UserError
from prune_lightning.playground.drawing import Drawing
from prune_lightning.playground.ground import Place, Playground
from prune_lightning.playground.parts import Parts
from prune_lightning.playground.serving import check_gradio, served

HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{ 3 * 3 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDED = importlib.util.find_spec("gradio") and importlib.util.find_spec("playwright") and CHROMIUM
in_browser = pytest.mark.skipif(not NEEDED, reason="needs gradio, playwright and chromium")


@pytest.fixture(scope="module")
def editor():
    with Editor("bundled", "rome", "prune", progress=False) as editor:
        yield editor


@pytest.fixture
def ground(editor):
    while len(editor):
        editor.undo(len(editor))
    return Playground(editor)


def fact(given):
    return given["subject"], given["prompt"], given["target_new"]


def test_a_visitor_asks_edits_looks_back_and_undoes(ground):
    asked = ground.ask(FRANCE["prompt"], Place())
    assert (asked.before, asked.after, asked.changed) == ("Paris.", "Paris.", False)
    written = ground.write(
        *fact(FRANCE), ["People say that the capital of France is", " "], ["The capital of Japan is"]
    )
    assert written.refused is None
    shown = Parts(ground, False).written(written)
    rows = re.findall(r"<td>(.+)</td>\s*<td>(.+)</td><td><b>(.+)</b></td>", shown)
    assert ("efficacy, exact match ↑", "0.000", "1.000") in rows
    before, after = written.probability
    assert before < 0.05
    assert after > 0.9
    assert written.scores["edit/counterfact/efficacy_accuracy"] == 1.0
    assert written.scores.before["edit/counterfact/efficacy_accuracy"] == 0.0
    (probe,) = written.request.locality
    assert (probe.prompt, probe.answer) == ("The capital of Japan is", "Tokyo.")
    assert written.scores.before["edit/counterfact/locality_accuracy"] == 1.0
    ground.write(*fact(ITALY))
    assert ground.ask(FRANCE["prompt"], Place(0)).after == "Paris."
    assert [(edit.number, edit.now, edit.holds) for edit in ground.listing(Place(1))] == [
        (2, "", None),
        (1, "Rome.", True),
    ]
    assert [edit.holds for edit in ground.listing(Place())] == [True, True]
    assert ground.undo(1).subject == "France"
    assert ground.ask(FRANCE["prompt"], Place()).after == "Paris."
    assert ground.undo().subject == "Italy"
    with pytest.raises(UserError, match="no edits to take back"):
        ground.undo()


def test_an_edit_that_a_later_one_replaces_is_not_lost(ground):
    ground.write(*fact(FRANCE))
    ground.write("France", FRANCE["prompt"], "Oslo")
    last, first = ground.listing(Place())
    assert (last.holds, last.replaced, first.holds, first.replaced) == (True, False, False, True)
    assert "replaced" in Parts(ground, False).edits([last, first])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("", "The capital of France is", "Rome"), "the subject is empty"),
        (("France", "The capital of France is", "  "), "the new answer is empty"),
        (("France", "The capital of Italy is", "Rome"), "has to contain the subject 'France'"),
    ],
)
def test_what_a_visitor_forgets_is_said_and_nothing_is_written(ground, given, message):
    with pytest.raises(UserError, match=message):
        ground.write(*given)
    assert len(ground.editor) == 0
    with pytest.raises(UserError, match="write a prompt first"):
        ground.ask(" ", Place())


def test_the_end_waits_for_what_a_visitor_has_begun(editor):
    ground, done = Playground(editor), []
    with ground._lock:  # a computation
        ending = threading.Thread(target=lambda: (ground.end(), done.append("end")))
        ending.start()
        ending.join(0.1)
        assert done == []
    ending.join()
    assert done == ["end"]
    with pytest.raises(UserError, match="has ended"):
        ground.ask(FRANCE["prompt"], Place())


def test_texts_are_escaped(ground):
    written = ground.write(HOSTILE, f"The capital of {HOSTILE} is", "Rome")
    parts = Parts(ground, True)
    html = parts.written(written) + parts.edits(ground.listing(Place())) + parts.error(HOSTILE) + parts.note(HOSTILE)
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;${alert(2)}{{ 3 * 3 }}") == 4


def test_marks_of_a_spectrum_lie_at_its_values():
    before = torch.tensor([16.0, 8.0, 2.0], dtype=torch.float64)
    drawing = Drawing.of(Spectrum("w", before, torch.tensor([9.0, 6.0, 2.0], dtype=torch.float64), 4.0))
    (zero, _), *_, (top, text) = drawing.ticks
    assert text == "20"
    for mark, old, new in zip(drawing.marks, before.tolist(), [9.0, 6.0, 2.0], strict=True):
        assert mark.before == pytest.approx(zero + (top - zero) * old / 20, abs=0.01)
        assert mark.after == pytest.approx(zero + (top - zero) * new / 20, abs=0.01)
    assert drawing.reference == pytest.approx(zero + (top - zero) * 4 / 20, abs=0.01)
    assert (drawing.num_above, drawing.num_moved, drawing.total) == (2, 2, 3)


def test_missing_gradio_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prune-lightning\[play\]'"):
        check_gradio()


# -- in a browser -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def only_loopback(monkeypatch):
    """Refuse any connection to another machine."""
    connect, elsewhere = socket.socket.connect, []

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            elsewhere.append(address)
            raise OSError(f"a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    return elsewhere


@in_browser
def test_a_persons_path_in_a_browser(ground, browser, only_loopback):
    from playwright.sync_api import expect

    with served(ground.editor) as address:
        assert address.startswith("http://127.0.0.1:")
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        requested, dialogs = [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        box = lambda name: page.locator(f"#{name} textarea, #{name} input").first  # noqa: E731
        # Ask.
        box("ask").fill("The capital of Italy is")
        page.click("#ask-button")
        expect(page.locator("#pl-before")).to_have_text("Rome.")
        expect(page.locator("#pl-after")).to_have_text("Rome.")
        # Edit, and see the change.
        for name, text in (("subject", "Italy"), ("fact", "The capital of Italy is"), ("target", "Paris")):
            box(name).fill(text)
        page.click("#write-button")
        expect(page.locator("#outcome")).to_contain_text("Edit 1 is written")
        expect(page.locator("#pl-after")).to_have_text("Paris.")
        expect(page.locator("#pl-before")).to_have_text("Rome.")
        expect(page.locator("#pl-edits")).to_contain_text("✓ holds")
        expect(page.locator("#pl-count")).to_have_text("1")
        # Another base: the spectrum is drawn again.
        page.locator("#base input[type=number]").fill("20")
        page.keyboard.press("Tab")
        expect(page.locator("#answers")).to_contain_text("base 20")
        low = float(page.locator("#pl-spectrum .pl-new").first.get_attribute("cy"))
        old = float(page.locator("#pl-spectrum .pl-old").first.get_attribute("cy"))
        assert low > old + 10  # lower in the drawing
        # Back to the unedited model.
        page.locator("#state input[type=number]").fill("0")
        page.keyboard.press("Tab")
        expect(page.locator("#pl-after")).to_have_text("Rome.")
        expect(page.locator("#pl-edits")).to_contain_text("later")
        # Texts are shown, not run.
        box("ask").fill(HOSTILE)
        box("subject").fill(HOSTILE)
        page.click("#write-button")
        expect(page.locator("#outcome")).to_contain_text(HOSTILE)
        # Undo.
        page.click("#undo-button")
        expect(page.locator("#outcome")).to_contain_text("Taken back: The capital of Italy is Paris")
        expect(page.locator("#listing")).to_contain_text("No edits yet")
        box("ask").fill("The capital of Italy is")
        page.click("#ask-button")
        expect(page.locator("#pl-after")).to_have_text("Rome.")
        assert not page.locator("#listing img, #outcome img, #answers img").count()
        page.close()
    assert len(ground.editor) == 0
    assert dialogs == []
    assert {re.match(r"\w+://[^/]*", url)[0] for url in requested if not url.startswith(("data:", "blob:"))} == {
        address.rstrip("/")
    }
    assert only_loopback == []


@in_browser
def test_a_taken_port_is_one_line(ground):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1"), served(ground.editor, port=port):
            pass


def test_a_run_is_played_on_a_copy(tmp_path: Path, editor):
    code = (
        "import prune_lightning.playground.serving as s, prune_lightning.verbs.playing as p, contextlib, sys\n"
        "s.check_gradio = lambda: None\n"
        "@contextlib.contextmanager\n"
        "def served(editor, *rest):\n"
        "    editor.undo(1); yield 'http://127.0.0.1:1/'\n"
        "s.served = served; p._wait = lambda: None\n"
        "from prune_lightning.commands import app; app(sys.argv[1:])\n"
    )
    run, copy = tmp_path / "run", tmp_path / "copy"
    with Editor("bundled", "ft_m", "none", folder=run, progress=False) as kept:
        kept.edit([FRANCE, ITALY])
    words = [sys.executable, "-c", code, "play", str(run), "--to", str(copy)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert f"The edits are in {copy}" in done.stdout
    assert [len((folder / "ledger/steps.jsonl").read_text().splitlines()) for folder in (run, copy)] == [2, 1]
