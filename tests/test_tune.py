"""The search for hyper-parameters: its space, its budget, its resumption, and the file that it writes."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from conftest import load_path
from test_configs import compose
from test_fuzz import command_line
from test_presets import checkpoint

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.models.loading import load_language_model, load_tokens
from prune_lightning.phases import PhaseClock
from prune_lightning.tasks.hparams import compare_stream, edit_marks, leaves, weights_fingerprint, write_hparams
from prune_lightning.tasks.presets import load_model, settled
from prune_lightning.tasks.tune_space import Layers, Space
from prune_lightning.tasks.tune_trial import Outcome, Pilots, objective

optuna = pytest.importorskip("optuna")
Search = pytest.importorskip("prune_lightning.tasks.tune_study").Search


def space_of(*overrides, depth=32):
    return Space.of(settled(compose("experiment=tune", *overrides)), depth)


# -- the space --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "restraint", "expected"),
    [
        ("rome", "prune", {"layers", "value.learning_rate", "value.steps", "value.clamp", "base"}),
        ("memit", "none", {"layers", "ridge", "value.learning_rate", "value.steps", "value.clamp"}),
        ("ft_l", "none", {"layers", "epsilon", "learning_rate", "steps"}),
        ("lora", "clip", {"learning_rate", "steps"}),
    ],
)
def test_only_what_method_and_restraint_have_is_searched_and_the_first_trial_has_the_defaults(
    method, restraint, expected
):
    config = settled(compose("experiment=tune", "model=gpt2-xl", f"method={method}", f"restraint={restraint}"))
    space = Space.of(config, 48)
    assert {parameter.key.partition(".")[2] for parameter in space.parameters} == expected
    own = {**{f"method.{k}": v for k, v in leaves(config.method)}}
    own |= {f"restraint.{k}": v for k, v in leaves(config.restraint or {})}
    assert space.draw(optuna.trial.FixedTrial(space.defaults())) == {
        p.key: pytest.approx(own[p.key]) if not isinstance(p, Layers) else list(own[p.key]) for p in space.parameters
    }


def test_layers_stay_within_the_depth_that_the_space_names():
    (layers,) = (p for p in space_of("model=llama-3-8b", "method=memit").parameters if isinstance(p, Layers))
    assert (layers.low, layers.high, layers.most) == (2, 16, 5)  # 5 % and 50 % of 32 layers, five published ones
    drawn = layers.draw(optuna.trial.FixedTrial({"method.layers.last": 3, "method.layers.count": 5}))
    assert drawn == [0, 1, 2, 3]
    (single,) = (p for p in space_of("model=llama-3-8b", "method=ft").parameters if isinstance(p, Layers))
    assert (single.high, single.most) == (21, 1)  # a default beyond the range widens it


def test_an_entry_that_is_not_understood_is_named():
    with pytest.raises(UserError, match=r"tune\.space\.method\.value\.clamp: \{'around': 1\}"):
        space_of("tune.space.method.value.clamp.around=1")
    with pytest.raises(
        UserError, match=r"tune\.space\.method\.value: 5 is no entry for the settings of value: steps, "
    ):
        space_of("tune.space.method.value=5")
    kept = space_of("restraint=none", "tune.space.method.value=null", "tune.space.method.layers=null", "method=memit")
    assert [parameter.key for parameter in kept.parameters] == ["method.ridge"]
    with pytest.raises(UserError, match="no setting"):
        space_of("restraint=none", "tune.space.method=null")


# -- the objective ----------------------------------------------------------------------------------------------------
def test_objective_is_the_harmonic_mean_and_no_term_can_be_bought():
    terms = {"efficacy": 0.9, "paraphrase": 0.6, "locality": 0.8, "drift": 0.7}
    assert objective(terms) == pytest.approx(4 / (1 / 0.9 + 1 / 0.6 + 1 / 0.8 + 1 / 0.7))
    for name in terms:
        assert objective(terms | {name: 0.0}) == objective(terms | {name: math.nan}) == 0.0
    assert objective({}) == 0.0


@pytest.fixture(scope="module")
def pilots():
    overrides = ("evaluation=editing", "method.value.steps=20", "method.contexts.lengths=[[3,1]]", "restraint=prune")
    config = settled(compose("experiment=tune", *overrides))
    model = load_language_model(config.model.path)
    stream = BundledWorld(num_edits=4)
    stream.fit(model.tokens)
    return Pilots(config, model, stream.requests, rungs=2, clock=PhaseClock())


def test_trial_without_a_change_has_no_efficacy_but_all_locality_and_no_drift(pilots):
    outcome = pilots.run({"method.value.steps": 1}, range(2))  # the value is the model's own after one look
    assert outcome.terms["efficacy"] == 0.0
    assert outcome.terms["locality"] == 1.0
    assert outcome.terms["drift"] == pytest.approx(1.0, abs=1e-4)
    assert outcome.score == 0.0


def test_model_is_restored_bit_for_bit_and_trials_do_not_see_each_other(pilots):
    told = []

    def reached(edits, score):
        told.append((edits, score))
        return False

    before = weights_fingerprint(pilots.model)
    first = pilots.run({"method.layers": [0]}, range(4), reached)
    assert weights_fingerprint(pilots.model) == before
    assert [edits for edits, _ in told] == [2, 4]
    assert told[-1][1] == first.score > 0
    assert first.terms["drift"] < 1
    pilots.run({"method.layers": [1], "method.value.learning_rate": 2.0}, range(4))
    assert pilots.run({"method.layers": [0]}, range(4)) == first
    assert weights_fingerprint(pilots.model) == before


def test_a_bad_trial_is_stopped_at_a_rung(pilots):
    outcome = pilots.run({}, range(4), lambda edits, score: True)
    assert (outcome.stopped, outcome.edits) == (True, 2)


def test_values_that_a_method_refuses_cost_a_trial_and_not_the_search(pilots):
    before = weights_fingerprint(pilots.model)
    config = settled(compose("experiment=tune", "evaluation=editing", "method=alphaedit", "restraint=none"))
    found = Pilots(config, pilots.model, pilots.requests, rungs=2, clock=PhaseClock())
    outcome = found.run({"method.null_threshold": 1e-30}, range(2))
    assert (outcome.score, outcome.edits) == (0.0, 0)
    assert "finds no null space" in outcome.failed
    assert weights_fingerprint(pilots.model) == before
    found.config.method.null_threshold = 1e-30  # now it is what the job was started with
    with pytest.raises(UserError, match="finds no null space"):
        found.run({}, range(2))


# -- the search -------------------------------------------------------------------------------------------------------
def quadratic(values, reached):
    """A trial whose score is highest at a clamp of 2 and in layer 9."""
    score = 1 / (1 + (math.log(values["method.value.clamp"] / 2)) ** 2 + (values["method.layers"][-1] - 9) ** 2 / 10)
    stopped = reached(10, score)
    return Outcome(score, {"efficacy": score}, 10 if stopped else 20, stopped)


def search(folder, **settings):
    folder.mkdir(exist_ok=True)
    settings = {"seed": 0, "startup": 5, "max_edits": 600, "max_seconds": None, "about": {"model": "a"}} | settings
    return Search(folder, space_of("model=llama-3-8b", "restraint=none"), **settings)


def go(found, until=math.inf):
    while not found.over() and len(found.table()) < until:
        found.step(quadratic)
    return found


def told(found):
    return [{key: value for key, value in trial.items() if key not in ("seconds", "trial")} for trial in found.table()]


def test_search_finds_better_values_than_the_defaults_within_its_budget(tmp_path):
    found = go(search(tmp_path))
    trials = found.table()
    assert trials[0]["values"]["method.value.clamp"] == 4.0
    assert 600 <= found.edits < 620
    assert found.edits == sum(trial["edits"] for trial in trials)
    assert any(trial["state"] == "pruned" for trial in trials)
    best = found.finished()[0]
    assert best.value == max(trial["score"] for trial in trials if trial["state"] == "complete")
    assert best.value > 0.9 > trials[0]["score"] + 0.3


@pytest.mark.parametrize("interrupted", [0, 6])
def test_resumed_search_draws_what_the_straight_one_draws(tmp_path, interrupted):
    straight = go(search(tmp_path / "straight"), until=14)
    halves = go(search(tmp_path / "halves"), until=interrupted)

    def killed(values, reached):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halves.step(killed)
    assert told(go(search(tmp_path / "halves"), until=14)) == told(straight)
    with pytest.raises(UserError, match="resume: the search was begun with another model"):
        search(tmp_path / "halves", about={"model": "b"})


def test_time_ends_a_search_and_an_endless_one_is_refused(tmp_path):
    assert len(go(search(tmp_path, max_edits=None, max_seconds=0.0)).table()) == 1, "the defaults are always tried"
    with pytest.raises(UserError, match="never end"):
        search(tmp_path / "endless", max_edits=None)


def test_trials_that_fail_before_the_first_edit_use_up_the_budget(tmp_path):
    found = search(tmp_path, max_edits=3)
    while not found.over():
        found.step(lambda values, reached: Outcome(failed="refused"))
    assert [trial["edits"] for trial in found.table()] == [0, 0, 0]
    assert found.edits == 3


# -- whole runs -------------------------------------------------------------------------------------------------------
def test_what_was_found_is_taken_as_it_is(tmp_path, capsys):
    path = checkpoint(tmp_path / "model", weights=True, layers=6)
    common = (
        *(f"model.path={path}", "method=ft_m", "data.num_edits=2", "callbacks=none", "progress=false"),
        "evaluation=editing",
    )
    budget = ("tune.pilots=2", "tune.held_out=2", "tune.max_edits=6", "tune.startup=1", "tune.rungs=1")
    assert command_line(tmp_path / "tune", "experiment=tune", *common, *budget, "restraint=prune") == 0
    file = tmp_path / "tune" / "hparams.yaml"
    document = yaml.safe_load(file.read_text())
    report = json.loads((tmp_path / "tune" / "tuning.json").read_text())
    assert document["found"]["fingerprint"] == weights_fingerprint(load_language_model(str(path)))
    assert {"layers", "steps", "learning_rate"} == set(document["method"])
    assert document["found"]["score"] >= document["found"]["default_score"]
    assert document["found"]["trials"] == len(report["all_trials"]) == 3
    assert (tmp_path / "tune" / "plots" / "tuning.png").is_file()
    assert not list((tmp_path / "tune").glob("edits.jsonl"))

    stream = BundledWorld(num_edits=6)
    stream.fit(load_tokens(str(path)))
    assert document["found"]["pilots"] == {
        **{"data": "bundled", "path": None, "skip": 2, "pilots": 2, "held_out": 2},
        "edits": edit_marks(stream.requests[2:]),
    }
    assert len(set(edit_marks(stream.requests))) == 6
    capsys.readouterr()
    for changed in ("tune.rungs=2", "method.stop_loss=0.5"):
        assert command_line(tmp_path / "tune", f"resume={tmp_path / 'tune'}", changed) == 2
        assert f"the search was begun with another {changed.partition('=')[0]}\n" in capsys.readouterr().err

    document["method"] |= {"layers": [4], "steps": 3}
    document["restraint"]["base"] = 3.5
    file.write_text(yaml.safe_dump(document))
    take = (f"hparams={file}", *common)
    assert command_line(tmp_path / "run", *take, "restraint=prune", "method.steps=2") == 0
    base = json.loads((tmp_path / "run" / "ledger" / "base.json").read_text())
    assert base["method_options"]["layers"] == [4]
    assert base["method_options"]["steps"] == 2, "the command line takes precedence"
    assert base["method_options"]["learning_rate"] == document["method"]["learning_rate"]
    assert base["restraint_options"]["base"] == 3.5
    hparams = json.loads((tmp_path / "run" / "summary.json").read_text())["hparams"]
    assert hparams["source"] == "tuned"
    assert str(document["found"]["score"]) in hparams["where"]
    capsys.readouterr()
    assert command_line(tmp_path / "other", f"hparams={file}", "method=rome") == 2
    assert "is of method=ft_m, but this is rome" in capsys.readouterr().err
    file.write_text(yaml.safe_dump(document | {"method": {"step": 3}}))
    assert command_line(tmp_path / "other", *take) == 2
    assert "has no option 'step': did you mean 'steps'" in capsys.readouterr().err


def test_a_stream_with_pilots_is_warned_of(tmp_path, caplog):
    stream = BundledWorld(num_edits=9)
    stream.fit(load_tokens(load_path()))
    file = tmp_path / "hparams.yaml"
    found = {"method": "rome", "restraint": "prune", "pilots": {"edits": edit_marks(stream.requests[3:7])}}
    write_hparams(file, found, {"method.value.steps": 3}, "")
    config = compose(f"hparams={file}")
    compare_stream(config, [*stream.requests[:3], *stream.requests[7:]])
    assert not caplog.records
    compare_stream(config, stream.requests[:5])
    assert "hparams: 2 of the 5 edits of this run are among those on which" in caplog.text


def test_another_models_settings_are_warned_of(tmp_path, caplog):
    path = checkpoint(tmp_path / "model", weights=True, layers=6)
    load_model(
        settled(compose("model=llama-3-8b", f"model.path={path}", "method=memit", "model.edit.layers.window=[1]"))
    )
    assert "those of a model of 32 layers, but this one has 6: take model=auto" in caplog.text
    caplog.clear()
    load_model(settled(compose("model=auto", f"model.path={path}", "method=memit")))
    assert "this one has" not in caplog.text


def test_too_few_records_for_pilots_are_said(tmp_path, capsys):
    assert command_line(tmp_path, "experiment=tune", "data.num_edits=1290", "progress=false") == 2
    assert "needs 40 records behind the first 1290" in capsys.readouterr().err
