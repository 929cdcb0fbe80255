"""The Python API: the same weights as `train.py`, exact undo, and nothing left behind."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import BUNDLED, ROOT, load_path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_lightning import Editor
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.editor.facts import requests_of
from prune_lightning.editor.models import device_of
from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.rome import ROME
from prune_lightning.models.loading import load_language_model

FRANCE = {"subject": "France", "prompt": "The capital of France is", "target_new": "Rome"}
ITALY = {"subject": "Italy", "prompt": "The capital of Italy is", "target_new": "Paris"}
SPAIN = {"subject": "Spain", "prompt": "The capital of Spain is", "target_new": "Oslo"}


def weights(editor):
    return {name: matrix.weight().clone() for name, matrix in editor._session.module.edited_matrices().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def differ(one, other, original):
    """Return the largest difference, relative to the change."""
    return max(float((one[n] - other[n]).norm() / (other[n] - original[n]).norm()) for n in original)


@pytest.fixture
def editor():
    with Editor("bundled", "rome", "prune", progress=False) as editor:
        yield editor


def test_asks_and_compares_before_and_after(editor):
    assert editor.edit(FRANCE).written[0].target_new == "Rome"
    assert editor.ask(FRANCE["prompt"]).startswith("Rome")
    assert editor.ask([FRANCE["prompt"]], before=True)[0].startswith("Paris")
    found = editor.compare()
    assert (found.prompts, found.before, found.after) == ([FRANCE["prompt"]], ["Paris."], ["Rome."])
    assert (found.wanted, found.holds) == (["Rome"], [True])
    assert "✓ Rome" in str(found)
    assert editor.compare(FRANCE["prompt"]).header() == ["prompt", "before", "after"]
    with pytest.raises(UserError, match="either prompts or numbers"):
        editor.compare("x", edits=[1])
    assert "<td style='text-align:left'>Rome.</td>" in found._repr_html_()
    with pytest.warns(UserWarning, match=r"a prompt of 30\d tokens is cut to its last 236: the model's context is 256"):
        editor.ask("Paris is a city. " * 60 + FRANCE["prompt"])
    with editor.base() as model:
        assert model is editor._session.language_model.model
        assert editor.ask(FRANCE["prompt"]).startswith("Paris")
    assert editor.ask(FRANCE["prompt"]).startswith("Rome")


def test_an_edit_that_a_later_one_replaces_does_not_hold(editor):
    editor.edit([FRANCE, {**FRANCE, "target_new": "London"}, {**ITALY, "target_new": " Paris"}])
    assert editor.holds() == [False, True, True]
    assert editor.holds([3]) == editor.holds(3) == [True]
    assert [row[-1] for row in editor.compare(edits=[1, 2]).cells()] == ["✗ Rome", "✓ London"]
    with editor.base():
        assert editor.holds() == [False, False, False]


@pytest.mark.parametrize(("method", "restraint"), [("rome", "prune"), ("memit", "prune_end"), ("alphaedit", "rect")])
def test_weights_are_those_of_train_py_bit_for_bit(tmp_path, method, restraint):
    settings = ["data.num_edits=4", "control=false", "callbacks=none", "evaluation=editing", "export=full"]
    words = [f"method={method}", f"restraint={restraint}", *settings, f"hydra.run.dir={tmp_path}", "progress=false"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, ROOT / "train.py", *words], env=environment, check=True, capture_output=True)
    exported = load_file(tmp_path / "export" / "full" / "model.safetensors")
    stream = BundledWorld(num_edits=4)
    stream.setup()
    with Editor("bundled", method, restraint, progress=False) as editor:
        editor.edit(stream.requests)
        live = editor._session.language_model.model.state_dict()
        assert all(torch.equal(live[name], tensor) for name, tensor in exported.items())
    with Editor.open(tmp_path, progress=False) as opened:
        assert [r.as_dict() for r in opened.edits] == [r.as_dict() for r in stream.requests]
        live = opened._session.language_model.model.state_dict()
        assert all(torch.equal(live[name], tensor) for name, tensor in exported.items())


def test_an_edit_leaves_the_model_on_its_device(editor, monkeypatch):
    """A Trainer moves a module to the CPU at its end: 16 GB of Llama-3-8B down, and up again, for every call."""
    moved = []
    monkeypatch.setattr(EditingModule, "cpu", lambda self: moved.append(self) or self)
    editor.edit(FRANCE)
    editor.edit(ITALY)
    assert len(editor.edits) == 2
    assert moved == []


def test_undo_of_the_last_edit_is_exact(editor):
    original = weights(editor)
    editor.edit(FRANCE)
    one = weights(editor)
    editor.edit(ITALY)
    assert [request.subject for request in editor.undo(1)] == ["Italy"]
    assert differ(weights(editor), one, original) < 1e-6  # the product of the factors, in fp32
    assert len(editor) == 1
    editor.undo(1)
    assert equal(weights(editor), original)
    with pytest.raises(UserError, match="no edits to compare"):
        editor.compare()
    editor.edit(FRANCE)
    # Twenty steps of Adam carry fp32's rounding on: 1e-7 times a hundred is far below any effect of an edit.
    assert differ(weights(editor), one, original) < 1e-4


def test_undo_of_an_earlier_edit_is_as_if_it_had_never_been_written(editor):
    editor.edit([FRANCE, ITALY, SPAIN])
    editor.undo(edits=[2])
    assert [request.subject for request in editor.edits] == ["France", "Spain"]
    with Editor("bundled", "rome", "prune", progress=False) as other:
        original = weights(other)
        other.edit([FRANCE, SPAIN])
        # The keys of one window are read in one batch, which held another request here: rounding alone differs.
        assert differ(weights(editor), weights(other), original) < 1e-4
    with pytest.raises(UserError, match="there are no edits \\[3\\]: 2 are in place"):
        editor.undo(edits=[3])
    for numbers in (0, ["1"]):
        with pytest.raises(UserError, match="there are no edits"):
            editor.undo(edits=numbers)
    with pytest.raises(UserError, match="cannot take back 3 of 2 edits"):
        editor.undo(3)
    editor.undo(edits=[1])  # no step is left as it was
    assert [request.subject for request in editor.edits] == ["Spain"]
    assert editor.ask(FRANCE["prompt"]) == editor.ask(FRANCE["prompt"], before=True)


def test_facts_that_were_written_together_can_be_taken_apart():
    with Editor("bundled", "memit", "prune", batch_size=3, progress=False) as editor:
        editor.edit([FRANCE, ITALY, SPAIN])
        editor.undo(edits=[2])
        assert [request.subject for request in editor.edits] == ["France", "Spain"]
        assert editor._session.ledger.sizes == [2]


def test_saved_model_loads_anywhere_and_opens_again(editor, tmp_path, capsys):
    editor.edit([FRANCE, ITALY])
    target = tmp_path / "model"
    editor.save(target)
    assert "%|" not in capsys.readouterr().err  # no bars of transformers
    plain = AutoModelForCausalLM.from_pretrained(target)
    live = editor._session.language_model.model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in plain.state_dict().items())
    with Editor.open(target, progress=False) as opened:
        assert equal(weights(opened), weights(editor))
        opened.edit(SPAIN)
        assert [request.subject for request in opened.edits] == ["France", "Italy", "Spain"]
        assert opened.ask(SPAIN["prompt"]).startswith("Oslo")
        assert opened.ask(FRANCE["prompt"], before=True).startswith("Paris")
    with pytest.raises(UserError, match="exists"):
        editor.save(target)


def tiny_in_memory(tiny, family, text):
    built = tiny(family, torch.float32)
    options = {"model": {"second_moments": {"corpus": {"path": str(text), "samples": 100}, "cache": None}}}
    built.model.requires_grad_(True).train()
    return built.model, built.tokens.tokenizer, options


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loaded_model_is_edited_in_place_and_given_back(tiny, tmp_path, family):
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome.\n\nOslo is a city in Norway.\n" * 8)
    model, tokenizer, options = tiny_in_memory(tiny, family, text)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Editor(model, "rome", "prune", tokenizer=tokenizer, options=options, progress=False) as editor:
        editor.edit([FRANCE, ITALY])
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert changed == [name for name in editor._session.module.edited_matrices()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="closed"):
        editor.ask("The capital")


def test_loaded_model_stays_edited_once_it_is_saved(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(load_path := str(ROOT / "prune_lightning/bundled/model"))
    tokenizer = AutoTokenizer.from_pretrained(load_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Editor(model, "ft_m", "none", tokenizer=tokenizer, progress=False) as editor:
        editor.edit(FRANCE)
        edited = weights(editor)
        editor.save(tmp_path / "model")
    (name,) = edited
    assert torch.equal(model.state_dict()[name].T, edited[name])
    assert not torch.equal(model.state_dict()[name], before[name])


def test_report_shows_the_scores_that_the_facts_have_prompts_for(editor):
    editor.edit(
        {**FRANCE, "target_old": "Paris", "locality": [{"prompt": "The capital of Spain is", "answer": "Madrid"}]}
    )
    report = editor.report()
    assert report["edit/counterfact/efficacy_accuracy"] == 1.0
    assert report.before["edit/counterfact/efficacy_accuracy"] == 0.0
    lines = str(report).splitlines()
    assert any("efficacy, exact match ↑" in line and "1.000" in line for line in lines)
    assert "efficacy, difference of probabilities ↑" in str(report.all())
    assert not any("generalization" in line or "num_" in line for line in lines)


def test_random_state_and_libraries_settings_are_as_before(editor):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    editor.edit(FRANCE)
    assert torch.equal(torch.rand(1), expected)


def test_facts_come_from_a_file_or_from_memory(tmp_path):
    table = tmp_path / "facts.csv"
    table.write_text('subject,prompt,target_new,target_old\nFrance,"The capital of France is",Rome,\n')
    (request,) = requests_of(table)
    assert (request.subject, request.target_new, request.target_old) == ("France", "Rome", None)
    assert requests_of([request, ITALY], first_id=7)[1].case_id == 8
    assert requests_of(replace(request, case_id="x"))[0].case_id == "x"
    with pytest.raises(UserError, match=r"line 2: `target_new` is expected to be a text, but got 3"):
        requests_of([FRANCE, {**ITALY, "target_new": 3}])
    with pytest.raises(UserError, match="expected a fact as a dictionary, but got 'France'"):
        requests_of([FRANCE, "France"])
    table.write_text("subject,prompt,target_new\nFrance,The capital of France is,Rome,further\n")
    with pytest.raises(UserError, match="line 2: more cells than the 3 columns"):
        requests_of(table)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("bundled", "romee"), {}, "unknown method 'romee': did you mean 'rome'"),
        (("bundled", "rome", "prun"), {}, "unknown restraint 'prun': did you mean 'prune'"),
        (("bundled", "rome"), {"options": {"method": {"layer": [3]}}}, "unknown option 'method.layer'"),
        (("bundled", "ROME"), {}, "unknown method 'ROME': did you mean 'rome'"),
        (("bundled", "rome", None), {}, "unknown restraint None: did you mean 'none'"),
        (("bundled", "rome"), {"options": {"method": {"layers": [77]}}}, "^layer 77 is outside"),
        (
            ("bundled", "rome"),
            {"options": {"restraint": {"base": 0.5}}},
            "^restraint.base is expected to be a number above 1",
        ),
        (("bundled", "rome"), {"options": {"method": {"value": {"steps": "many"}}}}, "steps is expected to be a whole"),
        (("bundled", "rome"), {"options": {"method.layers": [3]}}, "'method.layers': write"),
        (("bundled", "rome"), {"device": "gpu"}, "the device 'gpu' cannot be used"),
        ((None, "rome"), {}, "the model is expected to be a name"),
        (("./missing",), {}, "no folder './missing'"),
    ],
)
def test_mistakes_are_one_clear_error(arguments, options, message):
    with pytest.raises(UserError, match=message):
        Editor(*arguments, progress=False, **options)


def test_a_bad_fact_writes_nothing(editor):
    editor.edit(FRANCE)
    before = weights(editor)
    with pytest.raises(UserError, match="line 2"):
        editor.edit([ITALY, {"subject": "Spain"}])
    with pytest.raises(UserError, match=r"^these facts cannot be used:\n  line 2: `prompt`: the target .* is longer"):
        editor.edit([ITALY, {**SPAIN, "target_new": "word " * 600}])
    assert equal(weights(editor), before)
    assert editor.holds() == [True]


def test_model_needs_its_tokenizer():
    with pytest.raises(UserError, match="needs its tokenizer"):
        Editor(load_language_model(BUNDLED).model)


@pytest.mark.parametrize(("there", "expected"), [(False, "cpu"), (True, "cuda")])
def test_the_accelerator_is_taken_only_where_there_is_one(there, expected, monkeypatch):
    """A build for CUDA names its accelerator also on a machine without a GPU."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    assert device_of(None) == torch.device(expected)
    assert device_of("cpu") == torch.device("cpu")


class Stops:
    """Raises when the target of a step is the given one."""

    def __init__(self, monkeypatch, target, error):
        compute = ROME.compute_update

        def stopping(module, requests):
            if requests[0].target_new == target:
                raise error
            return compute(module, requests)

        monkeypatch.setattr(ROME, "compute_update", stopping)


def test_after_an_interrupt_the_facts_before_it_stay(editor, monkeypatch):
    editor.edit(FRANCE)
    with monkeypatch.context() as patch:
        Stops(patch, "Oslo", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            editor.edit([ITALY, SPAIN])
    assert [request.subject for request in editor.edits] == ["France", "Italy"]
    assert editor.holds() == [True, True]
    assert len(editor.edit(SPAIN).written) == 1
    assert editor.holds() == [True, True, True]


def test_an_undo_that_is_interrupted_loses_no_edit(editor, tmp_path, monkeypatch):
    editor.edit([FRANCE, ITALY, SPAIN])
    before = weights(editor)
    with monkeypatch.context() as patch:
        Stops(patch, "Oslo", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            editor.undo(edits=1)
    assert [request.subject for request in editor.edits] == ["France", "Italy", "Spain"]
    assert equal(weights(editor), before)
    assert sorted(path.name for path in editor.folder.iterdir() if path.is_dir()) == ["ledger"]
    with Editor.open(editor.folder, progress=False) as opened:
        assert equal(weights(opened), before)


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(load_path(), tmp_path / "my model")
    with Editor("./my model", "ft_m", "none", folder="out put", progress=False) as editor:
        editor.edit(FRANCE)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        editor.edit(ITALY)
        expected = weights(editor)
        editor.save("saved")
    monkeypatch.chdir("/")
    for folder in (tmp_path / "out put", tmp_path / "elsewhere" / "saved"):
        with Editor.open(folder, progress=False) as opened:
            assert equal(weights(opened), expected)


def test_a_loaded_model_has_one_editor():
    model = AutoModelForCausalLM.from_pretrained(load_path()).train()
    tokenizer = AutoTokenizer.from_pretrained(load_path())
    with pytest.raises(UserError, match="layer 77 is outside"):
        Editor(model, "rome", tokenizer=tokenizer, options={"method": {"layers": [77]}})
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with Editor(model, "ft_m", tokenizer=tokenizer, progress=False):
        with pytest.raises(UserError, match="another editor"):
            Editor(model, "ft_m", tokenizer=tokenizer)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            Editor(other, "ft_m", tokenizer=tokenizer, progress=False).close()
        with pytest.raises(UserError, match="another editor"):
            Editor(model, "ft_m", tokenizer=tokenizer)
    Editor(model, "ft_m", tokenizer=tokenizer, progress=False)  # and is dropped without being closed
    Editor(model, "ft_m", tokenizer=tokenizer, progress=False).close()


def test_an_opened_editor_goes_on_in_batches(tmp_path):
    with Editor("bundled", "ft_m", "none", folder=tmp_path, batch_size=2, progress=False) as editor:
        editor.edit(FRANCE)
    with Editor.open(tmp_path, progress=False) as opened:
        opened.edit([ITALY, SPAIN])
        assert opened._session.ledger.sizes == [1, 2]
