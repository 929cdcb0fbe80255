"""The page of a run in a browser, where Playwright and Chromium are installed."""

from __future__ import annotations

import shutil

import pytest
from report_runs import answers, edit, folder, stream, summary

from prune_lightning.report.page import write_page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
NUMBER = 60


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    edits = [edit(number) for number in range(1, NUMBER + 1)]
    cases = [
        line
        for number in range(1, NUMBER + 1)
        for line in (stream(number, NUMBER, 1.0, float(number != 7)), answers(number, NUMBER, f"City {number}"))
    ]
    run = folder(tmp_path_factory.mktemp("run"), edits, cases)
    return write_page(run, summary(NUMBER), "key: value").as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def opened(browser, address, width=1200, scheme="light"):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.wrong.append(request.url) if request.url != address else None)
    page.goto(address)
    return page


def prompts(page):
    return page.locator(".edits tbody tr:visible td:nth-child(2) mark").all_inner_texts()


def test_edits_are_searched_sorted_and_shown_by_keyboard(browser, address):
    page = opened(browser, address)
    assert len(prompts(page)) == 25
    page.get_by_role("button", name="Show all").focus()
    page.keyboard.press("Enter")
    assert len(prompts(page)) == NUMBER
    page.get_by_label("Search the edits").fill("city 42")
    assert prompts(page) == ["Land 42"]
    assert page.get_by_role("status").inner_text() == f"1 of {NUMBER} edits"
    page.get_by_label("Search the edits").fill("")
    page.locator("#state").select_option("prefers")
    assert prompts(page) == ["Land 7"]
    page.locator("#state").select_option("")
    page.locator("#order").select_option("4")
    assert prompts(page)[0] == "Land 7"  # what does not hold comes first
    header = page.get_by_role("button", name="#")
    header.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert prompts(page)[0] == f"Land {NUMBER}"
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("#")
    assert page.wrong == []
    page.close()


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_window_and_can_be_read(browser, address, width, scheme):
    page = opened(browser, address, width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.evaluate(
        """() => [...document.querySelectorAll('svg text')].filter((text) => text.getClientRects().length)
        .map((text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"""
    )
    assert min(small) >= 10
    ratio = page.evaluate(_CONTRAST)
    assert min(ratio.values()) >= 4.5, ratio
    assert page.wrong == []
    page.close()


_CONTRAST = """() => {
  const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  const found = {};
  for (const name of ["h1", ".quiet", ".state", ".better", ".run .name", ".control .name", ".reference .name", "th"]) {
    const each = document.querySelector(name);
    if (!each) continue;
    const style = getComputedStyle(each);
    const ink = light(each.closest("svg") ? style.fill : style.color);
    found[name] = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  }
  return found;
}"""
