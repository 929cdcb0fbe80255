"""The hyper-parameters of every method on every model are the published ones, wherever they are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from conftest import ROOT
from omegaconf import OmegaConf
from test_configs import compose, options

TABLE = yaml.safe_load((ROOT / "tests" / "data" / "hparams.yaml").read_text())


def flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def expected(method: str) -> dict[str, dict[str, Any]]:
    """Return, by model, what the table has for a method."""
    table = TABLE[method]
    return {name: table["all"] | group["values"] for group in table["models"] for name in group["names"]}


@pytest.mark.parametrize("method", TABLE)
def test_every_model_keeps_the_values_of_the_table(method):
    for model, values in expected(method).items():
        composed = OmegaConf.to_container(compose(f"model={model}", f"method={method}").method, resolve=True)
        composed.pop("second_moments", None)
        found = dict(flat(composed))
        assert {key: found.get(key) for key in values} == values, model  # options that came later are not in the table


def test_the_table_has_every_method_and_ten_models():
    assert set(TABLE) <= set(options("method"))
    assert len(TABLE) == 13
    assert all(len(expected(method)) == 10 for method in TABLE)
