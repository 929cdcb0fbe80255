"""Checks requests once before the first edit: remarks about doubtful ones, and whether they fit a model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prune_lightning.data.rows import BadRow, Located
from prune_lightning.errors import UserError, shown
from prune_lightning.models.tokenization import Tokens
from prune_lightning.requests import EditRequest, Frame
from prune_lightning.text.separators import AUTO, TextPair, infer


def doubts(request: EditRequest) -> list[str]:
    """Return remarks about the texts of a request."""
    found = []
    if request.target_old is not None and request.target_old.strip() == request.target_new.strip():
        found.append(f"`target_old` and `target_new` are both {shown(request.target_new)}")
    elif request.target_old is not None and _alike(request.target_old) == _alike(request.target_new):
        found.append(
            f"`target_old` {shown(request.target_old)} and `target_new` {shown(request.target_new)} differ only in "
            "case or Unicode form"
        )
    if re.search(rf"(^|\W){re.escape(request.target_new.strip())}\W*$", request.prompt):
        found.append(f"`prompt` {shown(request.prompt)} ends in `target_new` already, which is put behind it once more")
    for name, probes in (("locality", request.locality), ("portability", request.portability)):
        for place, probe in enumerate(probes):
            if probe.pair("x").context == request.pair("x").context:
                found.append(f"`{name}[{place}].prompt` is the edited prompt itself, whose answer the edit changes")
    asked = [(request.separator, prompt, request.target_new) for prompt in (request.prompt, *request.paraphrases)]
    probes = (*request.locality, *request.portability)
    asked += [(probe.separator, probe.prompt, probe.answer or "") for probe in probes]
    for separator, prompt, target in asked:
        doubt = infer(prompt, target).doubt if separator == AUTO else None
        if doubt:
            found.append(f"{shown(prompt)} and {shown(target)}: {doubt} (set `separator` to choose)")
    return list(dict.fromkeys(found))


def _alike(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip().casefold()


@dataclass(frozen=True)
class Fit:
    """Whether a request fits a model.

    Args:
        reason: The reason why it cannot be written or scored; ``None`` if it can.
        doubts: Remarks, if it can.
    """

    reason: str | None = None
    doubts: tuple[str, ...] = ()


def fit_to_model(request: EditRequest, tokens: Tokens) -> Fit:
    """Return whether a request can be written into a model and scored on it."""
    name = "prompt"
    try:
        (pair,) = tokens.encode_pairs([request.pair()])
        if pair.dropped:
            return Fit(
                f"`prompt` and target {shown(request.pair().text)} are {len(pair.ids) + pair.dropped} tokens long, the "
                f"model's context is {tokens.max_length}"
            )
        text, end = request.behind("")
        subject = tokens.subject_last(text.text, end)
        if subject >= pair.target_start:
            return Fit(f"the last token of the subject {shown(request.subject)} is also the first one of the target")
        scored = list(_scored(request))
        try:
            encoded = tokens.encode_pairs([text for _, text in scored])
        except UserError:
            for name, text in scored:  # noqa: B007 - used below for the one that fails
                tokens.encode_pairs([text])
            raise
    except UserError as error:
        return Fit(f"`{name}`: {error}")
    found = [
        f"`{name}` {shown(text.context)} is cut by {pair.dropped} tokens to the model's context of {tokens.max_length}"
        for (name, text), pair in zip(scored, encoded, strict=True)
        if pair.dropped
    ]
    if subject == 0:
        found.append(
            f"the subject {shown(request.subject)} is the first token of its text, on which ROME-like methods write "
            "into every text (docs/guards.md)"
        )
    return Fit(doubts=tuple(found))


def fitting(
    candidates: Sequence[Located],
    tokens: Tokens,
    frame: Frame,
    unusable: Callable[[EditRequest], str | None] | None,
    count: int | None,
) -> tuple[list[Located], list[BadRow]]:
    """Return the records that fit a model and a method, in the frame of a chat if there is one, and the others.

    Args:
        candidates: The records.
        tokens: The model's tokens.
        frame: The text of a chat template before and after each prompt.
        unusable: Returns the reason why a method cannot use a request, or ``None``.
        count: Stop after this many.
    """
    found: list[Located] = []
    misfits: list[BadRow] = []
    for one in candidates:
        if len(found) == count:
            break
        request = one.request.in_frame(frame) if any(frame) else one.request
        fit = fit_to_model(request, tokens)
        if reason := (unusable and unusable(request)) or fit.reason:
            misfits.append(BadRow(one.line, reason))
        else:
            found.append(Located(request, one.line, (*one.remarks, *fit.doubts)))
    return found, misfits


def _scored(request: EditRequest) -> Iterator[tuple[str, TextPair]]:
    """Yield the other scored texts of a request, with their names."""
    old = request.target_old
    if old:
        yield "target_old", request.pair(old)
    for answer in (None, old) if old else (None,):
        for place, pair in enumerate(request.paraphrase_pairs(answer)):
            yield f"paraphrases[{place}]", pair
    for name, probes in (("locality", request.locality), ("portability", request.portability)):
        for place, probe in enumerate(probes):
            if probe.answer:
                yield f"{name}[{place}]", probe.pair()
                yield f"{name}[{place}]", probe.pair(request.target_new)
