"""Settings of the wrong type or outside their limits: one line that names the key, what is expected, and the value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pytest
from annotated_types import Ge, Le
from omegaconf import OmegaConf
from test_configs import compose, options
from test_fuzz import command_line

from prune_lightning.errors import UserError
from prune_lightning.ranges import Count, Share
from prune_lightning.tasks.components import build, check, check_arguments, check_components
from prune_lightning.value_types import check_value, described


class Shape(Protocol):
    def area(self) -> float: ...


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        (int, [0, -3, 10**30], ["1", 1.0, True, None, [1], {}], "a whole number"),
        (float, [1, 0.5, -2], ["1", True, None, math.nan, math.inf], "a number"),
        (bool, [True, False], [1, 0, "true", None], "true or false"),
        (str, ["", "1"], [1, None, ["a"]], "a text"),
        (Path, ["a/b"], [1, ["a"]], "a path"),
        (str | None, [None, "a"], [1], "a text or null"),
        (Count, [1, 2], [0, -1, 1.0, "1"], "a whole number of at least 1"),
        (Count | None, [1, None], [0, "a"], "a whole number of at least 1 or null"),
        (Share, [0, 0.5, 1], [-0.1, 1.1, math.nan], "a number from 0 to 1"),
        (Annotated[int, Ge(2), Le(3)], [2, 3], [1, 4], "a whole number from 2 to 3"),
        (Literal["a", "b"], ["a"], ["c", 1], "a or b"),
        (Sequence[str], [[], ["a"]], ["a", [1], None, {}], "a list of texts"),
        (list[int] | str, ["a", [1]], [1, ["a"]], "a list of whole numbers or a text"),
        (tuple[Count, Count], [[1, 2]], [[1], [1, 2, 3], [0, 1], 1], "a list of 2 whole numbers of at least 1"),
        (Sequence[Sequence[int]], [[[1], []]], [[1], ["a"], 1], "a list of lists of whole numbers"),
        (Mapping[str, float], [{"a": 1}], [{"a": "b"}, [1], 1], "a mapping to numbers"),
        (Mapping[str, Any], [{"a": [1]}], [[1], 1], "a mapping"),
        (Shape | None, [None], [1, "a", [1]], "an entry with a _target_ (Shape) or null"),
        (Callable[[str], str], [], ["a", 1, None], "an entry with a _target_ (Callable)"),
        (Any, [1, "a", None, [{}]], [], "an entry with a _target_ (Any)"),
    ],
)
def test_values_and_types(kind, good, bad, words):
    for value in good:
        check_value("x.y", value, kind)
    for value in bad:
        with pytest.raises(UserError, match=r"^x\.y is expected to be .*, but got .*$"):
            check_value("x.y", value, kind)
    assert described(kind) == words


class Base:
    def __init__(self, size: Count, *, names: Sequence[str] = ()) -> None:
        self.size, self.names = size, names


class Derived(Base):
    def __init__(self, inner: Base | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = inner


class Open:
    def __init__(self, text: str, **kwargs: Any) -> None:
        self.text, self.rest = text, kwargs


class Typed:
    def __init__(self, **parts: Base | None) -> None:
        self.parts = parts


def node(kind, **entries):
    return OmegaConf.create({"_target_": f"{__name__}.{kind.__name__}", **entries})


def test_components_are_built_with_what_their_bases_take():
    built = build(node(Derived, size=3, inner=node(Base, size=1)), "x", names=["a"])
    assert (built.size, built.inner.size, built.names) == (3, 1, ["a"])
    assert build(node(Open, text="a", other=5), "x").rest == {"other": 5}
    assert build(node(Typed, one=node(Base, size=2), two=None), "x").parts["one"].size == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (node(Derived, size=0), "x.size is expected to be a whole number of at least 1, but got 0"),
        (node(Derived, size=3, nmes=["a"]), "unknown key 'x.nmes': did you mean 'names'?"),
        (node(Derived, size=3, inner=node(Base, size="a")), "x.inner.size is expected to be a whole number of at lea"),
        (node(Derived, size=3, inner=4), r"x.inner is expected to be an entry with a _target_ \(Base\) or null, but g"),
        (node(Derived), r"these settings need a value: x\.size=\.\.\.$"),
        (node(Open, text=3, other=4), "x.text is expected to be a text, but got 3"),
        (node(Typed, one=node(Base, size=2.5)), "x.one.size is expected to be a whole number of at least 1, but got 2"),
        (OmegaConf.create({"_target_": "nowhere.Nothing"}), "x._target_: there is no class or function 'nowhere.Not"),
        (OmegaConf.create({"_target_": "math.pi"}), "x._target_: 'math.pi' is no class or function"),
        (OmegaConf.create({"a": 1}), "x is expected to be an entry with a _target_"),
        (5, "x is expected to be an entry with a _target_, but got 5"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(entry, message):
    with pytest.raises(UserError, match=message) as caught:
        build(entry, "x")
    assert "\n" not in str(caught.value)


def test_arguments_of_functions_are_checked_too():
    def place(path: str, dtype: str = "float32") -> None: ...

    check_arguments(place, {"path": "a"}, "model")
    with pytest.raises(UserError, match=r"model\.dtype is expected to be a text, but got 5"):
        check_arguments(place, {"path": "a", "dtype": 5}, "model")


def test_a_component_is_named_where_it_stands_not_where_it_is_referred_to():
    config = compose("model.second_moments.max_tokens=1.5")  # also `method.second_moments`
    with pytest.raises(UserError, match=r"^model\.second_moments\.max_tokens is expected to be a whole number"):
        check_components(config)


def components(plain, key=""):
    """Yield every component of a configuration with its key, without those that are references."""
    if isinstance(plain, Mapping):
        if "_target_" in plain:
            yield key, plain
        for name, entry in plain.items():
            yield from components(entry, f"{key}.{name}" if key else name)


GROUPS = ("method", "data", "restraint", "evaluation", "callbacks", "trainer", "model")
CHOICES = [f"{group}={option}" for group in GROUPS for option in options(group)]
NEEDED = {"data": ("data.path=x",), "model": ("model.path=x", "method.layers=[0]", "model.second_moments=null")}


@pytest.mark.parametrize("choice", CHOICES)
def test_no_setting_takes_everything(choice):
    """Of each setting of each option, some value of a wrong type is refused by name."""
    group, option = choice.split("=")
    more = [word for word in NEEDED.get(group, ()) if option != "bundled"]
    plain = OmegaConf.to_container(compose(choice, *more), resolve=True)
    for key, component in components({group: plain[group]}):
        for name in set(component) - {"_target_", "_partial_"}:
            refused = []
            for wrong in ({"a": "b"}, ["banana", {}], "banana", -1.5, None):
                with suppress(UserError):
                    check({**component, name: wrong}, key)
                    continue
                refused.append(wrong)
            assert refused, f"{key}.{name}"
            with pytest.raises(UserError, match=rf"^{re.escape(key)}\.{name} is expected to be [^\n]*$"):
                check({**component, name: refused[0]}, key)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.value.steps=a", "method.value.steps is expected to be a whole number of at least 1, but got 'a'"),
        (
            "method.value.learning_rate=nan",
            "method.value.learning_rate is expected to be a number above 0, but got nan",
        ),
        ("method.layers=5", "method.layers is expected to be a list of whole numbers of at least 0, but got 5"),
        ("restraint.base=a", "restraint.base is expected to be a number above 1, but got 'a'"),
        (
            "evaluation.counts=a",
            "evaluation.counts is expected to be a list of whole numbers of at least 0, but got 'a'",
        ),
        (
            "evaluation.max_cases=0",
            "evaluation.max_cases is expected to be a whole number of at least 1 or null, but got 0",
        ),
        ("data.num_edits=-1", "data.num_edits is expected to be a whole number of at least 1 or null, but got -1"),
        ("data.separator=3", "data.separator is expected to be a text, but got 3"),
        ("trainer.max_epochs=banana", "trainer.max_epochs is expected to be a whole number or null, but got 'banana'"),
        (
            "callbacks.guards.norm.factor=a",
            "callbacks.guards.norm.factor is expected to be a number above 0, but got 'a'",
        ),
        ("callbacks.guards=5", "callbacks.guards is expected to be an entry with a _target_, but got 5"),
        ("model.dtype=5", "model.dtype is expected to be a text, but got 5"),
        ("model.path=null", "model.path is expected to be a text, but got null"),
        ("export=5", "export is expected to be a text or a list of texts or null, but got 5"),
        ("+method.value.stepz=3", "unknown key 'method.value.stepz': did you mean 'steps'?"),
        ("+evaluation.max_case=3", "unknown key 'evaluation.max_case': did you mean 'max_cases' or 'max_case_mb'?"),
    ],
)
def test_the_command_line_says_what_is_expected(override, line, tmp_path, capsys):
    assert command_line(tmp_path / "run", "data.num_edits=1", override) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "run" / "summary.json").exists()


def test_what_a_logger_does_not_take_is_one_line(tmp_path, capsys):
    arguments = ("data.num_edits=1", "logger=wandb", "logger.wandb.offline=3")
    assert command_line(tmp_path / "run", *arguments) == 2
    assert capsys.readouterr().err == "error: logger.wandb.offline is expected to be true or false, but got 3\n"
    assert command_line(tmp_path / "run", "data.num_edits=1", "logger=wandb", "+logger.wandb.mode=sideways") == 2
    err = capsys.readouterr().err
    assert "error: logger.wandb: it cannot be started: " in err
    assert "Traceback" not in err
