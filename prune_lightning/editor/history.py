"""The model after an earlier edit or under another base of PRUNE, and the spectrum of its change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prune_lightning.callbacks import SpectralRestraint
from prune_lightning.editor.session import EditSession
from prune_lightning.errors import UserError
from prune_lightning.ledger import rebuild
from prune_lightning.spectral import Guarded, Logarithm, RestraintLaw, sigma_max, spectral_correction


@dataclass(frozen=True)
class Spectrum:
    r"""Singular values of the change of one matrix, before and after the restraint's law.

    Args:
        name: Name of the weight.
        before: Those of :math:`\Delta`, the sum of all updates, that are not zero; descending, fp64.
        after: Those of :math:`U F(\Sigma) V^\top`, in the same order.
        reference: :math:`\bar s`, the largest singular value of the original weight.
    """

    name: str
    before: Tensor
    after: Tensor
    reference: float


class History:
    """The states of an editor's model.

    Args:
        session: The editor's session.
    """

    def __init__(self, session: EditSession) -> None:
        self._session = session
        self._restraint = session.recipe.build_restraint()
        self._attached = False
        self._references: dict[str, float] = {}

    @property
    def counts(self) -> list[int]:
        """How many edits each state holds, from 0: edits that were written together make one state."""
        ledger = self._session.ledger
        return [0, *(line["num_requests"] for line in (ledger.lines if ledger else []))]

    @property
    def base(self) -> float | None:
        """PRUNE's base in the editor; ``None`` if its restraint has none, or if there is no restraint."""
        law = self._restraint.law if isinstance(self._restraint, SpectralRestraint) else None
        return float(law.base) if isinstance(law, Guarded) else None

    @property
    def takes_base(self) -> bool:
        """Whether :meth:`at` can apply another base.

        It can where the sum of all updates is known: without a restraint, and under one that withholds the excess from
        the weight and keeps the sum.
        """
        restraint = self._restraint
        if not self._session.module.edited_matrices():
            return False
        if restraint is None or self.base is None:
            return restraint is None
        return restraint.accumulate != "restrained" and restraint.parameters is None and not restraint.feedback

    @contextmanager
    def at(self, edits: int | None = None, base: float | None = None) -> Iterator[None]:
        """Inside the block the edited model is that of an earlier state; afterwards it is as before, bit for bit.

        The updates of later edits are not computed again under another base: they are those that were written.

        Args:
            edits: How many edits to keep, one of :attr:`counts`; all by default.
            base: Base of PRUNE's law on the sum of the updates, in place of the editor's restraint; that restraint by
                default.

        Raises:
            UserError: There is no such state, or the restraint does not take a base.
        """
        counts = self.counts
        if edits is not None and edits not in counts:
            raise UserError(f"there is no state after {edits} edits: there are those after {counts}")
        law = None if base is None or base == self.base else self._law(base)
        with ExitStack() as stack:
            if edits is not None and edits != counts[-1]:
                stack.enter_context(self._after(counts.index(edits)))
            if law is not None:
                stack.enter_context(self._under(law))
            yield

    @torch.no_grad()
    def spectra(self, base: float | None = None) -> list[Spectrum]:
        """Return the spectrum of each edited matrix, if there is one; inside a block of :meth:`at`, of that state.

        Args:
            base: See :meth:`at`.

        Raises:
            UserError: See :meth:`at`.
        """
        law = self._law(base) if base is not None else self._own_law()
        found = []
        for name, matrix in self._session.module.edited_matrices().items():
            sigma = matrix.change.singular_values().cpu()
            sigma = sigma[sigma > torch.finfo(matrix.change.master.dtype).eps * sigma[0]]
            after, reference = sigma.clone(), self._reference(name)
            above = sigma > reference
            if law is not None and above.any():
                after[above] = law(sigma[above], reference)
            found.append(Spectrum(name, sigma, after, reference))
        return found

    def _law(self, base: float) -> RestraintLaw:
        if not self.takes_base:
            raise UserError(f"restraint={self._session.recipe.restraint} does not keep what another base would need")
        own = self._own_law()
        return replace(own, base=base) if isinstance(own, Guarded) else Logarithm(base)

    def _own_law(self) -> RestraintLaw | None:
        return self._restraint.law if self.base is not None and self.takes_base else None

    def _reference(self, name: str) -> float:
        if name not in self._references:
            self._references[name] = sigma_max(self._session.module.edited_matrices()[name].original())
        return self._references[name]

    @contextmanager
    def _under(self, law: RestraintLaw) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._session.module.provisional())
            for name, matrix in self._session.module.edited_matrices().items():
                correction = spectral_correction(matrix.change, law, self._reference(name)).correction
                stack.enter_context(matrix.withholding(correction))
            yield

    @contextmanager
    def _after(self, steps: int) -> Iterator[None]:
        """Inside the block the module is in the state after so many steps, as if the stream had ended there."""
        session = self._session
        assert session.ledger is not None
        run = session.module.run
        kept = {name: deepcopy(part.state_dict()) for name, part in run.parts.items()}
        position = run.num_requests, run.num_steps
        try:
            for part in run.parts.values():
                part.restore()
            if self._restraint is not None and not self._attached:
                self._restraint.attach(session.module)
                self._attached = True
            restrain = self._restraint.restrain if self._restraint else None
            rebuild(session.module, session.ledger, steps, restrain, memory=False)
            if steps and self._restraint is not None and self._restraint.schedule != "each" and self.takes_base:
                self._restraint.restrain_all()
            yield
        finally:
            for name, part in run.parts.items():
                part.load_state_dict(kept[name])
            run.move_to(*position)
