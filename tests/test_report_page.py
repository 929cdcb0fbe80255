"""The page of a run: what it says, in which order, how large it is, and that texts stay texts."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from report_runs import (
    CONTROL,
    EFFICACY,
    FINAL,
    GENERALIZATION,
    KEPT,
    LOCALITY,
    WORST,
    answers,
    edit,
    folder,
    stream,
    summary,
)
from rich.console import Console

from prune_lightning.report.charts import Series, draw, series
from prune_lightning.report.edits import read_edits
from prune_lightning.report.headline import sentence, tiles
from prune_lightning.report.labels import Labels
from prune_lightning.report.listing import run_table
from prune_lightning.report.page import write_page
from prune_lightning.report.printed import columns_of, finished_summary, print_result
from prune_lightning.report.table import SHORT, rows

FOUND = {"findings": [{"guard": "norm", "reason": "12 times the median", "edits": [2, 3]}]}
EDITS = [edit(1), edit(2), edit(3), edit(4, applied=False, refused="key: ill-posed")]
CASES = [
    stream(1, 2, 0.0, 0.0),  # overtaken by the next line
    stream(1, 4, 1.0, 1.0),
    stream(2, 4, 1.0, 0.0),
    stream(3, 2, 0.0, 0.0),
    answers(1, 0, None),
    answers(1, 4, "Rome"),
    answers(2, 4, "Milan", paraphrase="Bonn", other="Bergen"),
]


class Tags(HTMLParser):
    """Every opening tag with its attributes, and the text of the page outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def page_of(path, found=None, config="config: 1", remarks=()):
    found = found or summary(4, guards=FOUND)
    return write_page(folder(path, EDITS, CASES), found, config, {}, remarks).read_text()


def test_one_sentence_says_what_a_run_comes_to():
    plain = sentence(summary(100)).replace("\xa0", " ")
    kept = "70 % of the abilities kept (20 % without PRUNE)"
    assert plain == f"ROME with PRUNE, 100 edits: 86 % hold (83 % without PRUNE); {kept}."
    alone = summary(1, control=False, restraint="none", titles={"method": "AlphaEdit"})
    assert sentence(alone).startswith("AlphaEdit without a restraint, 1 edit: 86")
    assert sentence({**alone, "final": {}, "protocol": "single"}).endswith("1 edit, each from the unedited model.")


def test_tiles_have_interval_number_and_difference():
    efficacy, generalization, locality, kept = tiles(summary())
    assert (efficacy.value, efficacy.control, efficacy.n) == (FINAL[EFFICACY], CONTROL[EFFICACY], 100)
    assert efficacy.interval == pytest.approx((0.81, 0.91))
    assert (efficacy.verdict, efficacy.versus()) == ("", "no clear difference")  # its interval holds 0
    assert (generalization.verdict, generalization.versus()) == ("worse", "5 points worse")
    assert (kept.verdict, kept.versus(), kept.cases()) == ("better", "50 points better", "100 items")
    assert locality.difference == pytest.approx(0.3)
    few = tiles(summary(n=1))[0]
    assert few.interval is None
    assert few.cases() == "1 edit, too few for an interval"
    missing = tiles(summary(final={**FINAL, GENERALIZATION: math.nan}))[1]
    assert missing.key is None


def test_a_stream_stands_for_efficacy_only_if_nothing_else_does():
    labels = Labels(summary()["labels"])
    scores = {"stream/accuracy/final": 0.5, EFFICACY: 0.6}
    assert labels.quantities(scores)["efficacy"].key == EFFICACY
    assert labels.quantities({"stream/accuracy/final": 0.5})["efficacy"].key == "stream/accuracy/final"


def test_page_begins_with_the_sentence_and_ends_with_folded_details(tmp_path):
    page = page_of(tmp_path, remarks=["one remark"])
    tags = Tags(page)
    order = ["<h1>", 'class="tiles"', "Do the edits hold?", "What did it cost?", "What happened to the spectrum?"]
    order += ["The edits", "The run: command", "All scores", "All curves", "Overrides", "config: 1"]
    places = [page.index(mark) for mark in order]
    assert places == sorted(places)
    assert not any("open" in attrs for attrs in tags.named("details"))
    assert len([a for a in tags.named("svg") if a["class"] in ("wide", "narrow")]) == 6
    for text in ("pkg://here/model", "python train.py seed=0", "torch 2.13", "2026-03-01 12:00", "one remark"):
        assert text in tags.text
    assert not re.search(r"num_|_score|_accuracy|odd_one", tags.text), "raw keys are not for people"
    assert "odd one" in tags.text


def test_page_needs_no_network_and_no_mouse(tmp_path):
    tags = Tags(page_of(tmp_path))
    links = [value for _, attrs in tags.tags for name, value in attrs.items() if name in ("src", "href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    (policy,) = [a["content"] for a in tags.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert not any(name.startswith("on") for _, attrs in tags.tags for name in attrs)
    labelled = {attrs["id"] for attrs in tags.named("input") + tags.named("select") if "aria-label" in attrs}
    assert labelled == {"search"}  # the others stand within their label
    assert all(attrs.get("role") == "img" and attrs["aria-label"] for attrs in tags.named("svg"))
    assert all(attrs.get("tabindex") == "0" for attrs in tags.named("pre"))


def test_edits_say_how_they_stand(tmp_path):
    first, second, third, fourth = read_edits(folder(tmp_path, EDITS, CASES), summary(4, guards=FOUND))
    assert (first.head, first.subject, first.tail) == ("The capital of ", "Land 1", " is")
    assert (first.old, first.new, first.now, first.state, first.as_of) == ("Paris", "Rome", "Rome", "says", None)
    assert (second.state, second.now) == ("prefers", "Milan")
    assert [probe.right for probe in first.paraphrases + first.locality] == [True, True]
    assert [(probe.said, probe.right) for probe in second.paraphrases + second.locality] == [
        ("Bonn", False),
        ("Bergen", False),
    ]
    assert (third.state, third.as_of, third.now) == ("lost", 2, None)
    assert (fourth.state, fourth.findings) == ("refused", ["key: ill-posed"])
    assert (first.findings, third.findings) == ([], ["norm: 12 times the median"])
    assert fourth.rank < third.rank < second.rank < first.rank
    again = {"superseded": [{"edit": 1, "by_edits": 2}]}
    assert read_edits(tmp_path, summary(4, records=again))[0].state == "replaced"


def test_old_answer_is_what_the_unedited_model_said_if_it_is_not_given(tmp_path):
    unknown = edit(1)
    unknown["request"]["target_old"] = None
    (row,) = read_edits(folder(tmp_path, [unknown], [answers(1, 0, "Lyon"), answers(1, 1, "Rome")]), summary(1))
    assert (row.old, row.now) == ("Lyon", "Rome")


def test_page_shows_hostile_texts_as_text(tmp_path):
    finding = {"findings": [{"guard": "norm", "reason": WORST, "edits": [1, 1]}]}
    found = summary(1, guards=finding, model=WORST, model_path=WORST, command=WORST, overrides=[WORST], data=WORST)
    found["labels"]["edit/counterfact"]["scores"]["efficacy_score"] = WORST
    found["final"] = {**FINAL, f"edit/{WORST}": 0.5}
    run = folder(tmp_path, [edit(1, WORST)], [answers(1, 1, WORST, WORST, WORST)])
    page = write_page(run, found, f"path: {WORST}", {}, [WORST]).read_text()
    tags = Tags(page)
    assert len(tags.named("script")) == 1
    assert not tags.named("img")
    assert page.count("{{ 7*7 }}") > 10


def test_page_of_a_thousand_edits_is_small(tmp_path):
    text = " of a place whose name is rather long" * 2
    edits = [edit(number, text, probes=10) for number in range(1, 1001)]
    cases = [
        line
        for number in range(1, 1001)
        for line in (stream(number, 1000, 1.0, 0.0), answers(number, 1000, text, text, text))
    ]
    path = write_page(folder(tmp_path, edits, cases), summary(1000), "key: value\n" * 500)
    assert path.stat().st_size < 2e6
    assert path.read_text().count("<tr data-state") == 1000


def test_labels_of_curves_do_not_touch_and_gaps_stay_gaps():
    lines = [
        Series("one", "run", [0, 1, 2], [1.0, math.nan, 0.02]),
        Series("two", "control", [0, 1, 2], [1.0, 0.5, 0.01]),
        Series("three", "reference", [0, 2], [0.03, 0.03]),
    ]
    chart = draw(lines, 800, 400, share=True)
    left, top, right, bottom = chart.plot
    heights = sorted(line.label[1] for line in chart.lines)
    assert all(b - a >= 34 for a, b in pairwise(heights))
    assert heights[-1] + 17 < bottom
    assert chart.lines[0].path.count("M") == 2  # a value that is not finite parts the line
    assert [text for _, text in chart.y_ticks] == ["0\xa0%", "25\xa0%", "50\xa0%", "75\xa0%", "100\xa0%"]
    places = {x for x, _, _ in chart.lines[1].marks}
    assert min(places) == pytest.approx(left)
    assert max(places) == pytest.approx(right, abs=0.1)
    assert sorted(places)[1] == pytest.approx(left + (right - left) / math.log2(3), abs=0.1)
    assert chart.lines[1].marks[0][1] == pytest.approx(top)
    few = [{"num_requests": t, "edit/x": 0.5} for t in (5, 10)]
    (line,) = series("edit/x", {"run": ("run", few, [{"num_requests": t, "edit/x": [0.1, 0.9]} for t in (5, 10)])}, 10)
    assert line.band == [None, (0.1, 0.9)]


def printed(found, every=False):
    out = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_result(found, out, every)
    return out.export_text(clear=False), out.export_text(styles=True)


def test_terminal_shows_a_dozen_rows_arrows_and_the_better_column():
    many = {f"edit/counterfact/extra_{i}": 0.5 for i in range(20)}
    found = summary(100, final={**FINAL, **many})
    text, styled = printed(found)
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert 5 < len(lines) <= SHORT
    assert any("efficacy, success ↑ " in line and "0.860" in line and "100" in line for line in lines)
    assert any("largest" in line or "spectrum" in line or "retention ↑" in line for line in lines)
    bold = re.findall(r"\x1b\[1m *([\d.]+)\x1b", styled)
    assert {"0.860", "0.750", "0.800"} <= set(bold)  # the control run generalizes better
    assert "0.830" not in bold
    assert "retokenised" not in text
    everything, _ = printed(found, every=True)
    assert everything.count("extra ") == 20
    assert "tokenised differently" not in everything
    assert "num_" not in everything
    failing = summary(100, final={**FINAL, "edit/counterfact/num_retokenised": 3.0})
    assert "prompts tokenised differently before the answer ↓" in printed(failing, every=True)[0]


def test_better_follows_the_direction_of_the_score():
    labels = Labels({"m": {"title": "m", "scores": {"a": "a", "b": "b"}, "lower": ["b"]}})
    columns = {"x": {"m/a": 1.0, "m/b": 1.0, "m/c": 1.0}, "y": {"m/a": math.nan, "m/b": 2.0, "m/c": 2.0}}
    found = {row.label: (row.arrow, row.best) for row in rows(columns, labels, ("x", "y"))["m"]}
    assert found == {"a": ("↑", 0), "b": ("↓", 0), "c": ("", None)}
    same = {"x": {"m/a": 0.50001}, "y": {"m/a": 0.50002}}
    assert rows(same, labels, ("x", "y"))["m"][0].best is None


def test_columns_are_named_after_the_restraint():
    assert list(columns_of(summary())) == ["before", "with PRUNE", "without PRUNE"]
    assert list(columns_of(summary(1, control=False))) == ["before", "after 1 edit"]


def test_list_of_runs_speaks_as_the_report_does(tmp_path):
    run = tmp_path / "one"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps(summary(1000)))
    table = run_table(tmp_path)
    titles = ["run", "setup", "edits", "efficacy", "generalization", "locality", "retention"]
    assert [str(column.header) for column in table.columns] == titles
    cells = [next(iter(column.cells)).replace("\xa0", " ") for column in table.columns]
    assert cells == ["one", "ROME, PRUNE, bundled", "1,000", "86 %", "70 %", "80 %", "70 %"]
    run.rename(tmp_path / "a-run-whose-name-is-longer-than-there-is-room-for-in-80-columns")
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(run_table(tmp_path))
    shown = narrow.file.getvalue()
    assert "…" not in shown
    assert all(word in shown for word in [*titles, "1,000", "PRUNE", "bundled"])
    next(tmp_path.iterdir()).rename(run)
    (tmp_path / "one" / "summary.json").unlink()
    ledger = tmp_path / "one" / "ledger"
    ledger.mkdir()
    (ledger / "base.json").write_text(json.dumps({"model": {"path": "pkg://a/model"}}))
    (ledger / "steps.jsonl").write_text(json.dumps({"requests": [{}, {}]}) + "\n")
    table = run_table(tmp_path, model_name=lambda path: path.removeprefix("pkg://"))
    filled = {str(column.header): next(iter(column.cells)) for column in table.columns}
    assert (filled["setup"].split(", ")[-1], filled["edits"], "efficacy" in filled) == ("a/model", "2", False)


def test_scores_of_a_run_count_until_its_edits_are_changed(tmp_path):
    run = folder(tmp_path, EDITS, CASES)
    assert finished_summary(run) is None
    (run / "summary.json").write_text(json.dumps(summary(4)))
    assert finished_summary(run)["final"][KEPT] == FINAL[KEPT]
    (run / "ledger").mkdir()
    steps = [{"requests": [line["request"]]} for line in EDITS]
    (run / "ledger" / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert finished_summary(run) is not None
    (run / "ledger" / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps[:-1]))
    assert finished_summary(run) is None  # an edit has been taken back
    assert LOCALITY in FINAL
