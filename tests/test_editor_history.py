"""Looks at earlier states of an editor's model: right weights inside, and the same bits as before afterwards."""

from __future__ import annotations

import pytest
import torch
from test_editor import FRANCE, ITALY, SPAIN, weights

from prune_lightning import Editor
from prune_lightning.errors import UserError


def dense(matrix, law):
    """Return the restrained weight by a full decomposition in fp64."""
    original = matrix.original().double()
    left, sigma, right = torch.linalg.svd(matrix.change.master.double(), full_matrices=False)
    reference = float(torch.linalg.svdvals(original)[0])
    sigma = torch.where(sigma > reference, law(sigma, reference), sigma)
    return original + left @ torch.diag(sigma) @ right, sigma, reference


def prune(base):
    def law(sigma, reference):
        return torch.minimum(
            (sigma / reference).log() / torch.log(torch.tensor(base, dtype=sigma.dtype)) + reference, sigma
        )

    return law


@pytest.fixture(scope="module")
def edited():
    with Editor("bundled", "rome", "prune", progress=False) as editor:
        seen = [weights(editor)]
        for fact in (FRANCE, ITALY, SPAIN):
            editor.edit(fact)
            seen.append(weights(editor))
        yield editor, seen


def test_every_state_is_the_one_that_was(edited):
    editor, seen = edited
    assert editor.history.counts == [0, 1, 2, 3]
    for count, expected in enumerate(seen):
        with editor.history.at(count):
            for name, weight in weights(editor).items():
                change = (expected[name] - seen[0][name]).norm()
                # The stored factors are multiplied again, in fp32.
                assert float((weight - expected[name]).norm()) <= 1e-6 * float(change)
        assert all(torch.equal(weight, seen[-1][name]) for name, weight in weights(editor).items())
        assert len(editor) == 3
    with editor.history.at(1):
        assert editor.ask([FRANCE["prompt"], ITALY["prompt"]]) == ["Rome.", "Rome."]
        assert editor.ask(FRANCE["prompt"], before=True) == "Paris."
    with (
        pytest.raises(UserError, match=r"no state after 4 edits: there are those after \[0, 1, 2, 3\]"),
        editor.history.at(4),
    ):
        pass


@pytest.mark.parametrize(("count", "base"), [(3, 4.0), (2, 1.5), (3, 1.2)])
def test_another_base_is_the_law_on_the_sum_of_the_updates(edited, count, base):
    editor, seen = edited
    (matrix,) = editor._session.module.edited_matrices().values()
    with editor.history.at(count, base):
        expected, sigma, reference = dense(matrix, prune(base))
        error = (matrix.weight().double() - expected).norm() / (expected - matrix.original().double()).norm()
        assert float(error) < 1e-6  # the weight is fp32
        (spectrum,) = editor.history.spectra(base)
    assert len(spectrum.before) == count
    assert spectrum.reference == pytest.approx(reference, rel=1e-6)
    # The factors are fp64, and the dense sum fp32.
    torch.testing.assert_close(spectrum.after, sigma[:count], rtol=1e-5, atol=0)
    assert bool((spectrum.after < spectrum.before).any())
    assert all(torch.equal(weight, seen[-1][name]) for name, weight in weights(editor).items())


def test_the_own_law_is_the_default_of_the_spectrum(edited):
    editor, _ = edited
    (own,), (given,) = editor.history.spectra(), editor.history.spectra(1.2)
    assert editor.history.base == 1.2
    assert torch.equal(own.after, given.after)


def test_states_under_other_restraints():
    with Editor("bundled", "rome", "prune_end", progress=False, batch_size=2) as editor:
        first = editor.edit([FRANCE, ITALY]) and weights(editor)
        editor.edit(SPAIN)
        assert editor.history.counts == [0, 2, 3]
        with editor.history.at(2):  # as if the stream had ended there: restrained
            original = {name: matrix.original() for name, matrix in editor._session.module.edited_matrices().items()}
            for name, weight in weights(editor).items():
                assert float((weight - first[name]).norm()) < 1e-5 * float((first[name] - original[name]).norm())
    with Editor("bundled", "rome", "rect", progress=False) as editor:
        assert (editor.history.base, editor.history.takes_base) == (None, False)
        with pytest.raises(UserError, match="restraint=rect does not keep"), editor.history.at(0, 2.0):
            pass
    with Editor("bundled", "rome", "none", progress=False) as editor:
        editor.edit(FRANCE)
        (plain,), (restrained,) = editor.history.spectra(), editor.history.spectra(2.0)
        assert torch.equal(plain.before, plain.after)
        assert float(restrained.after[0]) < float(restrained.before[0])


def test_report_of_some_edits(edited):
    editor, _ = edited
    assert editor.report(edits=[1]).answers.prompts == [FRANCE["prompt"]]
    with pytest.raises(UserError, match=r"there are no edits \[4\]: 3 are in place"):
        editor.report(edits=[4])
