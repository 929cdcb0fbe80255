"""What a run takes from its model's YAML, and what it finds out where the YAML says nothing."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import yaml
from conftest import ROOT, load_path
from omegaconf import OmegaConf
from test_configs import compose, options
from test_fuzz import command_line
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prune_lightning.errors import UserError
from prune_lightning.models.depth import FROM_DEPTH
from prune_lightning.models.family import ModelFamily
from prune_lightning.tasks.arguments import full_arguments
from prune_lightning.tasks.presets import SOURCES, settled

QUICK = ("data.num_edits=1", "evaluation=editing", "callbacks=none", "restraint=none", "ledger=true", "progress=false")


def checkpoint(folder, model_type="llama", layers=8, dtype=torch.bfloat16, weights=False):
    """Write a small model, or its configuration alone."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    if weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(load_path()).save_pretrained(folder)
    else:
        config.dtype = dtype
        config.save_pretrained(folder)
    return folder


# -- layers from the depth --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", [12, 16, 22, 24, 26, 28, 30, 32, 36, 40, 48, 62, 80])
def test_layers_from_the_depth_lie_where_published_ones_do(depth):
    found = {kind: layers(depth) for kind, layers in FROM_DEPTH.items()}
    (single,) = found["single"]
    assert 0.15 <= single / depth <= 0.25
    assert single in found["window"]
    assert min(found["window"]) / depth >= 0.08
    assert max(found["window"]) / depth <= 0.25
    assert found["top"] == [depth - 3, depth - 2, depth - 1]


def test_layers_from_the_depth_are_llamas_published_ones():
    published = compose("model=llama-3-8b").model.edit.layers
    assert {kind: layers(32) for kind, layers in FROM_DEPTH.items()} == OmegaConf.to_container(published)


@pytest.mark.parametrize("depth", range(1, 12))
def test_layers_of_a_shallow_model_exist(depth):
    for layers in FROM_DEPTH.values():
        assert layers(depth) == sorted(set(layers(depth)) & set(range(depth))) != []


@pytest.mark.parametrize(("method", "layers"), [("rome", [1]), ("memit", [0, 1, 2]), ("mend", [5, 6, 7]), ("ft", [5])])
def test_any_model_needs_nothing_but_its_path(method, layers, tmp_path, caplog):
    config = compose("model=auto", f"model.path={checkpoint(tmp_path)}", f"method={method}")
    assert config.method.layers is None
    with caplog.at_level(logging.WARNING):
        found = settled(config)
    assert list(found.method.layers) == layers
    assert f"taking {layers}, from its depth of 8 layers" in caplog.text
    assert config.method.layers is None, "the configuration that was given is left as it is"


def test_what_the_user_says_of_the_layers_wins(tmp_path):
    path = f"model.path={checkpoint(tmp_path)}"
    said = settled(compose("model=auto", path, "method=memit", "model.edit.layers.window=[2,3]"))
    assert list(said.method.layers) == [2, 3]
    assert list(settled(compose("model=auto", path, "method=rome", "method.layers=[4]")).method.layers) == [4]
    assert list(settled(compose("method=rome", "model.edit.layers.single=[2]")).method.layers) == [2]


def test_no_configuration_is_loaded_where_the_yaml_says_everything():
    for method in options("method"):
        config = compose("model=gpt2-xl", "model.path=./nowhere", f"method={method}")
        assert settled(config).method.layers == config.method.layers
    for method in ("kn", "lora", "adalora"):  # all layers, whatever the model
        assert settled(compose("model=gpt2-xl", "model.path=./nowhere", f"method={method}")).method.layers is None
    with pytest.raises(UserError, match="nowhere"):
        settled(compose("model=auto", "model.path=./nowhere", "method=rome"))


# -- dtype ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (("model=llama-3-8b",), "float32"),
        (("model=llama-3-8b", "trainer=gpu"), "bfloat16"),
        (("model=llama-3-8b", "model.dtype=bfloat16"), "bfloat16"),
        (("model=llama-3-8b", "trainer=gpu", "model.dtype=float16"), "float16"),
        (("model=gpt-j-6b", "trainer=gpu"), "float32"),
        (("trainer=gpu",), "float32"),
    ],
)
def test_dtype_is_the_users_then_the_machines(overrides, dtype, caplog):
    with caplog.at_level(logging.WARNING):
        found = settled(compose(*overrides)).model.dtype
    assert found == dtype
    assert ("loaded in float32" in caplog.text) == (overrides == ("model=llama-3-8b",))


def test_dtype_of_any_model_on_a_gpu_is_its_checkpoints(tmp_path):
    path = f"model.path={checkpoint(tmp_path, dtype=torch.float16)}"
    assert settled(compose("model=auto", path, "trainer=gpu")).model.dtype == "float16"
    assert settled(compose("model=auto", path)).model.dtype == "float32"


# -- the shipped YAMLs ------------------------------------------------------------------------------------------------
def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("model", options("model"))
def test_every_value_of_a_models_yaml_is_read_by_a_method(model):
    methods = "".join(path.read_text() for path in (ROOT / "configs" / "method").rglob("*.yaml"))
    edit = yaml.safe_load((ROOT / "configs" / "model" / f"{model}.yaml").read_text()).get("edit", {})
    for key in leaves({name: section for name, section in edit.items() if name != "sources"}):
        assert f"model.edit.{key}," in methods or f"model.edit.{key}}}" in methods, key
    for method, source in edit.get("sources", {}).items():
        assert method in options("method")
        ((kind, where),) = source.items()
        assert kind in SOURCES
        assert where


def test_no_file_is_for_one_method_and_one_model():
    assert not (ROOT / "configs" / "hparams").exists()
    methods, models = options("method"), options("model")
    pairs = {f"{method}_{model}" for method in methods for model in models}
    assert not pairs & {path.stem for path in (ROOT / "configs").rglob("*.yaml")}


# -- whole runs -------------------------------------------------------------------------------------------------------
def run_with(folder, *arguments):
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"Person {i} lives in town {i % 7} and plays the oboe.\n" for i in range(40)))
    statistics = (f"model.second_moments.corpus.path={corpus}", "model.second_moments.cache=null")
    steps = ("method.value.steps=2", "method.contexts.lengths=[[3,1]]", "model.second_moments.ridge=0.1")
    assert command_line(folder / "run", *statistics, *steps, *QUICK, *arguments) == 0
    return json.loads((folder / "run" / "summary.json").read_text())


def test_run_of_any_model_says_what_its_settings_are(tmp_path, capsys):
    path = checkpoint(tmp_path / "model", weights=True)
    summary = run_with(tmp_path, "model=auto", f"model.path={path}", "method=rome")
    assert summary["model"] == summary["model_path"] == str(path)
    assert summary["hparams"]["source"] == "default"
    assert "depth" in summary["hparams"]["where"]
    assert "method.value.steps=2" in summary["hparams"]["changed"]
    base = json.loads((tmp_path / "run" / "ledger" / "base.json").read_text())
    assert base["method_options"]["layers"] == [1]
    assert base["model"]["dtype"] == "float32"
    assert str(path) in "".join(capsys.readouterr().out.split("\n"))


def test_preset_for_another_path_says_so(tmp_path):
    path = checkpoint(tmp_path / "model", weights=True)
    summary = run_with(tmp_path, "model=llama-3-8b", f"model.path={path}", "method=rome")
    assert summary["model"] == f"{path} (preset llama-3-8b)"
    assert summary["hparams"]["source"] == "published"
    assert "EasyEdit" in summary["hparams"]["where"]


def test_default_run_is_called_by_its_option(tmp_path):
    assert command_line(tmp_path / "run", *QUICK, "method.value.steps=2") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"] == "bundled"
    assert summary["hparams"]["source"] == "tuned"


def test_model_and_family_from_a_folder_outside_the_package(tmp_path):
    """OLMo is built as Llama is, and has no YAML here."""
    path = checkpoint(tmp_path / "checkpoint", "olmo", weights=True)
    with pytest.raises(UserError, match="--config-dir"):
        ModelFamily.find("olmo")
    family = yaml.safe_load((ROOT / "configs" / "model" / "family" / "llama.yaml").read_text())
    mine = tmp_path / "mine"
    (mine / "model" / "family").mkdir(parents=True)
    (mine / "model" / "family" / "olmo.yaml").write_text(yaml.safe_dump(family | {"model_type": "olmo"}))
    (mine / "model" / "olmo.yaml").write_text(
        f"defaults: [base/hub@_here_, _self_]\npath: {path}\nedit:\n  layers: {{single: [3]}}\n"
        "  sources: {rome: {tuned: on ten facts}}\n"
    )
    summary = run_with(tmp_path, "model=olmo", "method=rome", "--config-dir", str(mine))
    assert summary["model"] == "olmo"
    assert summary["hparams"]["source"] == "tuned"
    assert summary["hparams"]["where"] == "on ten facts"
    base = json.loads((tmp_path / "run" / "ledger" / "base.json").read_text())
    assert base["method_options"]["layers"] == [3]
    assert base["model"]["family"]["rewrite"] == "model.layers.{}.mlp.down_proj"


def test_misspelt_value_in_a_models_yaml_is_found(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [bundled, _self_]\nedit: {rome: {value: {step: 3}}}\n")
    assert command_line(tmp_path / "run", *QUICK, "model=mine", "--config-dir", str(tmp_path)) == 2
    assert "model.edit.rome.value.step" in (said := capsys.readouterr().err)
    assert "did you mean 'value.steps'" in said


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("rome: {layers: [1]}", "model.edit.rome.layers is not read by method=rome: set model.edit.layers.single or"),
        ("r_rome: {value: {clamp: 2}}", "set model.edit.rome.value.clamp or method.value.clamp"),
        ("ft_m: {steps: 3}", "model.edit.ft_m.steps is not read by method=ft_m: set method.steps"),
    ],
)
def test_value_in_a_models_yaml_that_its_method_does_not_read_is_found(section, said, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(f"defaults: [bundled, _self_]\nedit: {{{section}}}\n")
    words = f"method={section.partition(':')[0]}", "model=mine", "--config-dir", str(tmp_path)
    assert command_line(tmp_path / "run", *QUICK, *words) == 2
    assert said in capsys.readouterr().err


# -- a path alone -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["model.path=/a/folder"], "model=auto"),
        (["experiment=tune", "model.path=./file.gguf", "method=memit"], "model=auto"),
        (["model.path='/a (b)/folder'"], "model=auto"),
        (["model.path=openai-community/gpt2-xl"], "model=gpt2-xl"),
        (["model.path=pkg://prune_lightning.bundled/model"], "model=bundled"),
        (["model=llama-3-8b", "model.path=/a/folder"], None),
        (["experiment=smollm2", "model.path=/a/folder"], None),
        (["method=rome"], None),
    ],
)
def test_a_path_without_an_option_is_no_bundled_model(words, option):
    assert full_arguments(words) == [*([option] if option else []), *words]


def test_a_path_alone_takes_the_settings_of_any_model(tmp_path, caplog):
    path = checkpoint(tmp_path, layers=12)
    config = settled(compose(*full_arguments([f"model.path={path}"])))
    assert list(config.method.layers) == list(settled(compose("model=auto", f"model.path={path}")).method.layers) == [2]
    assert config.model.second_moments.corpus.path == "wikimedia/wikipedia"
    assert "taking [2], from its depth of 12 layers" in caplog.text
