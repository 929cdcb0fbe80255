"""Edit requests as token rows: every context prefix times the prompt, with its subject position and labels."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lightning.errors import UserError
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest


@dataclass(frozen=True)
class EditRow:
    """One token row of a request.

    Args:
        ids: Token ids; with a target, the target's last token is left out (nothing follows it).
        subject: Position of the subject's last token.
        target: Token ids to be predicted; empty for rows that only carry a key.
    """

    ids: list[int]
    subject: int
    target: list[int]

    @property
    def label_positions(self) -> list[int]:
        """Positions whose logits predict ``target``."""
        end = len(self.ids)
        return list(range(end - len(self.target), end))


def target_row(model: LanguageModel, request: EditRequest, prefix: str) -> EditRow:
    """Return prefix, prompt and target as one row with labels."""
    text = prefix + request.prompt.rstrip()
    pair = model.tokens.encode_pair(text, request.target_new)
    subject = _subject(model, text, prefix, request) - pair.dropped
    if subject < 0:
        raise UserError(f"case {request.case_id}: the subject lies outside the model's context of the prompt")
    return EditRow(pair.ids[:-1], subject, pair.target)


def key_row(model: LanguageModel, request: EditRequest, prefix: str) -> EditRow:
    """Return prefix and prompt up to the subject's last token: all that a key depends on."""
    text = prefix + request.prompt.rstrip()
    ids = model.tokens.encode(text)[: _subject(model, text, prefix, request) + 1][-model.tokens.max_length :]
    return EditRow(ids, len(ids) - 1, [])


def kl_row(model: LanguageModel, request: EditRequest) -> EditRow:
    """Return the row "{subject} is a" on which an edit shall not change the prediction at the subject."""
    text = f"{request.subject} is a"
    return EditRow(model.tokens.encode(text), model.tokens.subject_last(text, len(request.subject)), [])


def _subject(model: LanguageModel, text: str, prefix: str, request: EditRequest) -> int:
    end = len(prefix) + request.prompt.index(request.subject) + len(request.subject)
    return model.tokens.subject_last(text, end)
