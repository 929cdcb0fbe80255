"""Edit requests as token rows: every context prefix times the prompt, with its subject position and labels."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lightning.errors import UserError
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.text.separators import TextPair
from prune_lightning.types import EditRequest


@dataclass(frozen=True)
class EditRow:
    """One token row of a request.

    Args:
        ids: Token ids; a target's last token is left out, since nothing follows it.
        subject: Position of the subject's last token.
        target: Token ids to predict; empty for rows that are only read for their key.
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
    """Return prefix, prompt and target as one row with labels.

    Raises:
        UserError: The subject is cut off by the model's context, or shares its last token with the target.
    """
    text, end = _behind(model, request, prefix)
    (pair,) = model.tokens.encode_pairs([text])
    subject = model.tokens.subject_last(text.text, end) - pair.dropped
    if subject < 0:
        raise UserError(f"case {request.case_id}: the subject lies outside the model's context of the prompt")
    if subject >= pair.target_start:
        raise UserError(f"case {request.case_id}: the subject's last token is also the first one of the target")
    return EditRow(pair.ids[:-1], subject, pair.target)


def key_row(model: LanguageModel, request: EditRequest, prefix: str) -> EditRow:
    """Return prefix and prompt up to the subject's last token, on which a key depends."""
    text, end = _behind(model, request, prefix)
    context = text.context
    ids = model.tokens.encode(context)[: model.tokens.subject_last(context, end) + 1][-model.tokens.max_length :]
    return EditRow(ids, len(ids) - 1, [])


def kl_row(model: LanguageModel, request: EditRequest) -> EditRow:
    """Return the row "{subject} is a", on which an edit should not change the prediction at the subject.

    It ends there, since nothing after the subject changes that prediction.
    """
    text = f"{request.subject} is a"
    subject = model.tokens.subject_last(text, len(request.subject))
    return EditRow(model.tokens.encode(text)[: subject + 1], subject, [])


def _behind(model: LanguageModel, request: EditRequest, prefix: str) -> tuple[TextPair, int]:
    """Return the request's text after a prefix, and the position at which the subject ends."""
    return request.behind(prefix, model.tokens.own_start(request.prompt))
