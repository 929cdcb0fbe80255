"""Every combination of groups composes, and every target can be imported."""

from __future__ import annotations

import re

import hydra
import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from prune_lightning.callbacks import Restraint
from prune_lightning.cli import _keys

CONFIGS = ROOT / "configs"
FILES = (".py", ".md", ".yaml", ".json")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def compose(*overrides: str):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def targets(node) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets(value)]
    return [target for value in node for target in targets(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("model", options("model"))
@pytest.mark.parametrize("method", options("method"))
def test_method_has_settings_for_model(model, method):
    config = compose(f"model={model}", f"method={method}")
    layers = config.method.layers
    assert layers is None or list(layers) == sorted(layers)
    assert OmegaConf.missing_keys(config) == ({"model.path"} if model == "auto" else set())


@pytest.mark.parametrize(
    "choice",
    [
        f"{g}={o}"
        for g in ("data", "restraint", "callbacks", "evaluation", "trainer", "logger", "experiment")
        for o in options(g)
    ],
)
def test_option_composes_and_its_targets_exist(choice):
    config = OmegaConf.to_container(compose(choice), resolve=False)
    config.pop("hydra", None)
    for target in targets(config):
        assert callable(hydra.utils.get_object(target)), target


@pytest.mark.parametrize("option", options("editor_data"))
@pytest.mark.parametrize(("editor", "layers"), [("mend", [45, 46, 47]), ("serac", [35])])
def test_editor_training_composes_for_a_model(option, editor, layers):
    composed = compose(f"experiment=train_{editor}", "model=gpt2-xl", f"editor_data={option}")
    config = OmegaConf.to_container(composed, resolve=False)
    config.pop("hydra", None)
    for target in targets(config):
        assert callable(hydra.utils.get_object(target)), target
    assert composed.method.layers == layers  # the experiment's method and the model's settings for it
    assert composed.method.training.learning_rate == {"mend": 1e-6, "serac": None}[editor]
    assert composed.trainer.gradient_clip_val == 100
    assert ("hard_negatives" in composed.editor_data) == (editor == "serac")


def test_published_settings_reach_the_method():
    config = compose("model=gpt2-xl", "method=memit")
    assert (list(config.method.layers), config.method.ridge, config.method.value.clamp) == (
        [13, 14, 15, 16, 17],
        20000,
        0.75,
    )
    assert list(compose("model=gpt2-xl", "method=r_rome").method.layers) == [17]
    assert compose("model=gpt2-xl", "method=memit", "method.ridge=7").method.ridge == 7
    constrained = compose("model=gpt-j-6b", "method=ft_l").method
    assert (list(constrained.layers), constrained.epsilon, constrained.loss) == ([0], 5e-5, "prompt_last")
    adapters = compose("model=llama-2-7b", "method=adalora").method
    assert (list(adapters.target_modules), adapters.steps, adapters.rank) == (["q_proj", "v_proj"], 70, 8)


def test_keys_that_the_docs_name_are_keys_of_the_configuration():
    overrides = [(f"method={name}",) for name in options("method")]
    overrides += [(f"{g}={name}",) for g in ("model", "data", "restraint", "callbacks") for name in options(g)]
    overrides += [
        ("experiment=train_mend",),
        ("experiment=train_serac", "editor_data=zsre"),
        ("experiment=plan",),
        ("evaluation=editing",),
    ]
    composed = [OmegaConf.to_container(compose(*each), resolve=False) for each in overrides]
    known = {".".join(key.split(".")[:n]) for one in composed for key in _keys(one) for n in range(1, 6)}
    groups = "model|method|data|restraint|callbacks|evaluation|plan|editor_data|editor_training"
    pages = [ROOT / "README.md", *(page for page in (ROOT / "docs").glob("*.md") if page.stem != "adding_a_method")]
    text = re.sub(r"```python.*?```", "", "".join(page.read_text() for page in pages), flags=re.DOTALL)
    named = set(re.findall(rf"(?<![/\w.+])((?:{groups})\.[a-z_.]*[a-z_])\b", text))
    assert len(named) > 15
    assert not {key for key in named - known if not key.endswith(FILES)}


@pytest.mark.parametrize("option", options("restraint"))
def test_restraint_is_built_or_empty(option):
    config = compose(f"restraint={option}").restraint
    assert (option == "none") == (not config)
    if config:
        assert isinstance(hydra.utils.instantiate(config), Restraint)


@pytest.mark.parametrize("option", options("evaluation"))
def test_protocols_of_editing_are_there_and_only_one_is_taken(option):
    evaluation = compose(f"evaluation={option}").evaluation
    taken = {name: evaluation[name].enabled for name in ("counterfact", "zsre", "easyedit", "wild", "generation")}
    assert [name for name, enabled in taken.items() if enabled] == ["counterfact"]
    wild = compose(
        f"evaluation={option}", "evaluation.wild.enabled=true", "evaluation.wild.max_cases=7"
    ).evaluation.wild
    built = hydra.utils.instantiate(wild, _convert_="all")
    assert (built.enabled, built.stops, built.max_cases) == (True, [".", "\n"], 7)


def test_zsre_experiment_scores_zsre():
    assert compose("experiment=zsre", "data.path=FILE").evaluation.zsre.enabled
