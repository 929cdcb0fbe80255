"""The restraints in other loops than Lightning's Trainer: what the examples show, and the Hugging Face Trainer."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from conftest import ROOT
from prune_lightning.callbacks.hugging_face import RestraintCallback
from test_spectral import dense_law
from transformers import Trainer, TrainingArguments

from prune_lightning.callbacks import PRUNE
from prune_lightning.errors import UserError
from prune_lightning.spectral import Logarithm, sigma_max


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plain_pytorch", "hugging_face_trainer", "litgpt_style"])
def test_example_runs_and_restrains(name, capsys):
    example(name).main(steps=6)
    shown = capsys.readouterr().out
    assert "restrain" in shown or "above" in shown
    assert not any(f"{word} 0" in shown.splitlines()[-1] for word in ("restrained", "above", "num_above':"))


def test_lightning_example_keeps_more_with_prune_and_draws(tmp_path, monkeypatch, capsys):
    module = example("lightning_finetune")
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "20", "--items", "20", "--plot", str(tmp_path / "plot.png")])
    module.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if "retention" in line)
    _, before, alone, restrained = (cell.strip() for cell in row.strip("│ ").split("│"))
    assert (float(before), float(restrained) > float(alone) + 0.2) == (1.0, True)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def train(model, folder, restraint, steps, save=None, resume=None, watch=()):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(8, 12) + 20]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=30.0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps" if save else "no",
        save_steps=save or 500,
        seed=0,
    )
    restraints = restraint if isinstance(restraint, list) else [restraint] if restraint else []
    callbacks = [*watch, *(RestraintCallback(each) for each in restraints)]
    Trainer(model.requires_grad_(True), arguments, train_dataset=rows, callbacks=callbacks).train(
        resume_from_checkpoint=str(resume) if resume else None
    )
    return model


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
def test_hugging_face_trainer_restrains_and_resumes(tiny, tmp_path, accumulate):
    def restraint():
        return PRUNE(3.0, parameters=["*.mlp.c_proj.weight"], accumulate=accumulate)

    original = {name: p.detach().clone() for name, p in tiny("gpt2").model.named_parameters()}
    straight = train(tiny("gpt2").model, tmp_path, callback := restraint(), steps=4, save=2)
    assert callback.metrics["restraint/num_above"] > 0
    name = next(iter(callback.matrices))
    change = straight.get_parameter(name).detach() - original[name]
    assert sigma_max(change) < 1.5 * sigma_max(original[name])
    if accumulate == "raw":
        expected = dense_law(callback.matrices[name].change, Logarithm(3.0), sigma_max(original[name]))
        assert torch.allclose(change, expected.T, atol=1e-9)  # a Conv1D, which stores in x out
    resumed = train(tiny("gpt2").model, tmp_path, restraint(), steps=4, resume=tmp_path / "checkpoint-2")
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_hugging_face_checkpoint_without_state_is_refused(tiny, tmp_path):
    train(tiny("gpt2").model, tmp_path, None, steps=2, save=2)
    with pytest.raises(UserError, match="written without this restraint"):
        train(tiny("gpt2").model, tmp_path, PRUNE(), steps=4, resume=tmp_path / "checkpoint-2")


def test_hugging_face_state_of_another_run_is_refused(tiny, tmp_path):
    for name, base in (("a", 3.0), ("b", 9.0)):
        train(tiny("gpt2").model, tmp_path / name, PRUNE(base, parameters=["*.mlp.c_proj.weight"]), steps=2, save=2)
    with pytest.raises(UserError, match="belongs to another checkpoint"):
        train(
            tiny("gpt2").model,
            tmp_path / "a",
            PRUNE(3.0, parameters=["*.mlp.c_proj.weight"]),
            steps=4,
            resume=tmp_path / "b" / "checkpoint-2",
        )
