"""Where a run's time goes: the accounting, the pace, and what the views make of it."""

from __future__ import annotations

import logging
import random
from io import StringIO

import pytest
from rich.console import Console
from test_statistics import Counted

from prune_lightning.callbacks import RunLog, RunProgress
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.phases import PhaseClock
from prune_lightning.terminal import TerminalFilter


class Time:
    """A clock that the test advances."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def time():
    return Time()


def test_each_second_belongs_to_the_innermost_phase(time):
    clock = PhaseClock(time, start=5.0)
    time.sleep(1)
    with clock.phase("edit") as edit:
        time.sleep(2)
        with clock.part("restraint"):
            time.sleep(4)
            with clock.phase("evaluate"):
                time.sleep(8)
                with clock.part("rows"):
                    time.sleep(16)
        time.sleep(32)
        with clock.phase("edit"):
            time.sleep(64)
    time.sleep(128)
    expected = {"start": 5, "other": 129, "edit": 98, "edit/restraint": 4, "evaluate": 8, "evaluate/rows": 16}
    assert clock.seconds() == expected
    assert clock.wall() == 5 + 255
    assert edit.active == 98 + 4


def test_phases_sum_to_the_wall_time_whatever_happens(time):
    chance = random.Random(0)
    clock = PhaseClock(time)

    def go(depth):
        for _ in range(4):
            time.sleep(chance.random())
            enter = chance.choice([clock.phase, clock.part])
            try:
                with clock.prefixed(chance.choice(["", "control/"])), enter(chance.choice("abc")):
                    time.sleep(chance.random())
                    if chance.random() < 0.2:
                        raise KeyError
                    if depth:
                        go(depth - 1)
            except KeyError:
                pass

    go(4)
    assert clock.wall() == pytest.approx(time.now - 100.0, rel=1e-9)
    assert clock.seconds()["other"] < clock.wall() / 2
    assert any(name.startswith("control/") for name in clock.phases)


def test_time_left_is_the_recent_pace_times_the_steps_left(time):
    clock = PhaseClock(time)
    with clock.phase("edit") as phase:
        time.sleep(50)  # before the first step, such as setting up
        phase.expect(1000, done=400)
        assert phase.time_left is None
        for _ in range(300):
            time.sleep(0.1)
            phase.advance()
        assert phase.time_left == pytest.approx(0.1 * 300)
        for _ in range(60):  # it becomes slow: after ten half-lives that is all that counts
            time.sleep(5)
            phase.advance()
        assert phase.time_left == pytest.approx(5 * 240, rel=0.05)


def test_what_is_inside_a_phase_but_not_of_it_does_not_slow_its_pace(time):
    clock = PhaseClock(time)
    with clock.phase("edit") as edit:
        edit.expect(10, done=0)
        for _ in range(5):
            time.sleep(1)
            with clock.part("ledger"):
                time.sleep(1)
            with clock.phase("evaluate"):
                time.sleep(100)
            edit.advance()
    assert edit.time_left == 5 * 2


class Slow(Counted):
    """A corpus that takes a second per text."""

    def __init__(self, samples, time):
        super().__init__(samples)
        self.time = time

    def texts(self):
        for text in super().texts():
            self.time.sleep(1)
            yield text


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_statistics_get_the_time_of_their_corpus_and_of_their_model(bundled_shared, time, max_tokens):
    """Also where the pass ends before the corpus does, in the middle of a window."""
    passes = []

    def forward(*_):
        time.sleep(2)
        passes.append(time.now)

    corpus = Slow(120, time)
    clock = PhaseClock(time)
    handle = bundled_shared.model.register_forward_hook(forward, always_call=True)
    try:
        moments = SecondMoments(corpus, max_tokens=max_tokens, token_budget=512, save_every=40)
        with clock.phase("prepare"):
            moments.compute(bundled_shared, [0], clock)
    finally:
        handle.remove()
    assert passes
    assert clock.seconds()["statistics"] == corpus.read + 2 * len(passes) == clock.wall()
    statistics = clock.phases["statistics"]
    assert statistics.done == pytest.approx(corpus.read)
    assert statistics.total == pytest.approx(corpus.read)


def test_time_left_of_statistics_is_never_far_off(bundled_shared, time):
    """Texts count when their forward pass is done, not when they are read."""
    clock = PhaseClock(time)
    seen = []

    class Watcher:
        def advanced(self, phase):
            seen.append((time.now, phase.time_left))

        def ended(self, phase, outermost):
            pass

    def forward(_, inputs, *__):
        time.sleep(0.01 * inputs[0].numel() if inputs else 0.1)

    clock.watch(Watcher())
    corpus = Counted(400)
    transformer = bundled_shared.rewrite_module(0)
    handle = transformer.register_forward_hook(forward)
    try:
        SecondMoments(corpus, token_budget=512, save_every=100).compute(bundled_shared, [0], clock)
    finally:
        handle.remove()
    end = seen[-1][0]
    assert len(seen) > 10
    for now, left in seen[: len(seen) * 3 // 4]:
        assert end - now == pytest.approx(left, rel=0.35)


def test_the_display_reads_the_clock(time):
    clock = PhaseClock(time)
    progress = RunProgress(clock, Console(quiet=True))
    with clock.phase("load"):
        time.sleep(2)
    with clock.phase("edit") as phase, clock.part("ledger"):
        phase.expect(100_000, done=0)
        time.sleep(8)
        phase.advance(80)
        time.sleep(1)
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(progress.table())
    shown = console.export_text()
    assert "✓ load" in shown
    assert "80/100,000" in shown
    assert "9.0 s, 2.8 h left" in shown  # 99,920 steps at 0.1 s
    assert "ledger" not in shown


@pytest.mark.parametrize("transient", [False, True])
def test_in_a_file_what_follows_the_display_begins_a_line(time, transient):
    clock, file = PhaseClock(time), StringIO()
    with RunProgress(clock, Console(file=file), transient), clock.phase("load"):
        time.sleep(2)
    print("error: no file", file=file)
    *display, last = file.getvalue().splitlines()
    assert last == "error: no file"
    assert any("load" in line and "2.0 s" in line for line in display) != transient


def test_the_log_has_a_line_a_minute_in_a_long_phase(time, caplog):
    clock = PhaseClock(time)
    RunLog(clock, now=time)
    with caplog.at_level(logging.INFO, "prune_lightning"):
        with clock.phase("statistics") as phase:
            phase.expect(1000)
            for _ in range(300):
                time.sleep(0.5)
                phase.advance()
        with clock.phase("bisect"):
            pass
    assert caplog.messages == [
        "statistics 120/1000, 2.0 steps/s, 7.3 min left",
        "statistics 240/1000, 2.0 steps/s, 6.3 min left",
        "statistics: 2.5 min",
    ]


@pytest.mark.parametrize(("progress", "shown"), [(True, ["b", "d"]), (False, ["a", "b", "d"])])
def test_the_terminal_gets_the_runs_own_lines_where_no_progress_is_shown(progress, shown):
    records = [
        logging.LogRecord(name, level, "", 0, message, None, None)
        for name, level, message in (
            ("prune_lightning.callbacks.run_log", logging.INFO, "a"),
            ("prune_lightning", logging.WARNING, "b"),
            ("transformers", logging.INFO, "c"),
            ("transformers", logging.WARNING, "d"),
        )
    ]
    assert [record.msg for record in records if TerminalFilter(progress).filter(record)] == shown
