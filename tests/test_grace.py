"""GRACE against the public code, and its codebook against the rule by hand."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file

from prune_lightning.errors import UserError
from prune_lightning.methods.codebook import Codebook
from prune_lightning.methods.grace import GRACE
from prune_lightning.models.hooks import capture
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditRequest

ORACLES = SHARED / "oracles"


class Given(GRACE):
    """Starts from the values of the public run instead of drawn ones."""

    given: torch.Tensor

    def _first_values(self, outputs):
        return self.given[self.run.num_requests][None]


@pytest.mark.skipif(not ORACLES.is_dir(), reason="the oracles are not part of the project")
@pytest.mark.parametrize(
    ("variant", "start", "place"), [("cold_prompt", "cold", "prompt"), ("warm_last", "warm", "last")]
)
def test_twelve_edits_match_the_public_code(variant, start, place):
    about = json.loads((ORACLES / "oracles_2026.json").read_text())["methods"]["grace"]["hyper_parameters"]
    theirs = {
        name.removeprefix(f"grace.{variant}."): tensor
        for name, tensor in load_file(ORACLES / "oracles_2026.safetensors").items()
        if name.startswith(f"grace.{variant}.")
    }
    model = load_language_model(str(ORACLES / "oracle-gpt2"), "float64")
    module = (GRACE if start == "warm" else Given)(
        language_model=model,
        layers=[4],
        module="c_fc",
        radius=about["eps_init"],
        steps=about["n_iter"],
        start=start,
        place=place,
    )
    module.given = theirs["initial_values"]
    for number, (prompt, target) in enumerate(about["edits"]):
        report = module.edit([EditRequest(number, prompt.split(" ")[0], prompt, target)])
        module.run.settle()
        (detail,) = report.details
        assert detail["placement"] == about["decisions"][f"grace.{variant}"][number]
        assert module.side.book.radii.tolist() == pytest.approx(theirs[f"edit{number}.epsilons"].tolist(), rel=1e-6)
        assert detail["losses"] == pytest.approx(theirs["losses"][number].tolist(), rel=1e-6, abs=1e-9)
    for name, ours in (("keys", module.side.book.keys), ("values", module.side.book.values)):
        assert float((ours - theirs[name]).norm() / theirs[name].norm()) < 1e-6
    rows = model.tokens.encode_all(about["queries"])
    ids, mask = model.tokens.pad(rows, model.device)  # all in one batch, which theirs are not
    last = mask.sum(1) - 1
    with torch.no_grad():
        logits = model.logits_at(ids, mask, torch.arange(len(rows)), last)
    assert module.side.held.tolist() == theirs["query.fires"].tolist()
    with torch.no_grad(), capture([module.side.host], rows=len(rows)) as seen:
        model(ids, mask)
    distance = module.side.book.nearest(seen.inputs[0][torch.arange(len(rows)), last])[1]
    assert torch.allclose(distance, theirs["query.distance"], rtol=1e-6, atol=1e-9)
    assert float((logits - theirs["query.logits"]).norm() / theirs["query.logits"].norm()) < 1e-6


def entry(book, key, label, radius=1.0):
    key = torch.tensor(key, dtype=torch.float64)
    return book.with_entry(key, key[:1] * 10, torch.tensor(label), radius, 1e-9)


def test_the_balls_of_a_codebook_meet_as_published():
    book = Codebook.empty(2, 1, torch.zeros(0, dtype=torch.float64))
    book, first = entry(book, [0.0, 0.0], [3])
    book, far = entry(book, [4.0, 0.0], [3, 4])
    assert (first.kind, far.kind, far.distance) == ("new", "new", 4.0)
    book, grown = entry(book, [0.0, 1.5], [3, -1])  # the same label, filled
    assert (grown.kind, grown.entry) == ("expand", 0)
    assert book.radii.tolist() == pytest.approx([1.5, 1.0])
    book, split = entry(book, [1.0, 0.0], [9])
    assert (split.kind, split.entry) == ("split", 2)
    assert book.radii.tolist() == pytest.approx([0.5 - 1e-5, 1.0, 0.5], abs=1e-12)
    assert book.labels.tolist() == [[3, -1], [3, 4], [9, -1]]
    queries = torch.tensor([[0.0, 0.4], [0.499995, 0.0], [0.6, 0.0], [4.5, 0.5], [2.0, 0.0]], dtype=torch.float64)
    assert book.lookup(queries).tolist() == [0, -1, 2, 1, -1]


def test_the_later_of_two_labels_of_one_key_holds():
    book = Codebook.empty(2, 1, torch.zeros(0, dtype=torch.float64))
    book, _ = entry(book, [1.0, 0.0], [3])
    book, placement = book.with_entry(torch.tensor([1.0, 1e-12]), torch.tensor([7.0]), torch.tensor([4, 5]), 1.0, 1e-9)
    assert (placement.kind, len(book), book.labels.tolist()) == ("replace", 1, [[4, 5]])
    assert (book.values.item(), book.radii.item()) == (7.0, 1.0)


@pytest.mark.parametrize("wrong", [{"layers": [0, 1]}, {"place": "first"}, {"start": "hot"}, {"module": "c_fcc"}])
def test_a_wrong_option_is_named(wrong, tiny):
    with pytest.raises(UserError, match=r"GRACE|first|hot|c_fc"):
        GRACE(language_model=tiny("gpt2"), **{"layers": [1], **wrong})


def test_the_later_of_two_targets_of_one_prompt_in_a_step_is_trained_as_alone(tiny):
    model = tiny("llama")
    first, second = (EditRequest(i, "Ann", "Ann lives in", target) for i, target in enumerate(("Rome", "Paris")))
    values = []
    for requests in ([first, second], [second]):
        module = GRACE(language_model=model, layers=[1], steps=5, learning_rate=0.5, start="warm")
        report = module.edit(requests)
        values.append(module.side.book.values.clone())
        module.run.restart()
    assert [detail["placement"] for detail in report.details] == ["new"]
    assert torch.allclose(*values, rtol=1e-9)
