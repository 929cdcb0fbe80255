"""The pass of the unedited model over a stream that finds out which old answers it gives."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from prune_lightning.atomic_files import write_json
from prune_lightning.data.knowledge import FIRST
from prune_lightning.data.stream import EditStream
from prune_lightning.evaluation.scoring import score_encoded
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.phases import Phase, PhaseClock
from prune_lightning.requests import EditRequest
from prune_lightning.tasks.setup import build_trainer, first_process

KNOWLEDGE = "knowledge.json"


def select_records(
    config: DictConfig, stream: EditStream, model: LanguageModel, folder: Path, clock: PhaseClock
) -> None:
    """Let a stream keep the records that ``data.keep`` asks for.

    The answers are written to ``knowledge.json`` in the run's folder. A resumed run reads them there, so that its
    stream is the same even where another device rounds otherwise.

    Args:
        config: The job's configuration.
        stream: The stream, fitted to the model.
        model: The unedited model. If it is needed, it is moved to the Trainer's device.
        folder: The run's folder.
        clock: Measures the time and counts the records as the phase ``knowledge``.
    """
    if not stream.rule.needs_model:
        return
    file = folder / KNOWLEDGE
    known: dict[str, bool] = json.loads(file.read_text("utf-8")) if config.resume and file.is_file() else {}
    with clock.phase("knowledge") as phase:
        phase.expect(stream.num_candidates)

        def knows(requests: Sequence[EditRequest]) -> list[bool]:
            return _answers(config, model, requests, stream.rule.known_by, known, phase)

        division = stream.select(knows)
        phase.expect(phase.done)  # the records behind the last one that is kept are not examined
    if first_process() and division:
        write_json(file, known)
        logging.getLogger(__name__).info(division.line())


def _answers(
    config: DictConfig,
    model: LanguageModel,
    requests: Sequence[EditRequest],
    known_by: str,
    known: dict[str, bool],
    phase: Phase,
) -> list[bool]:
    """Return whether the model gives each old answer, and add what was not known yet to ``known``."""
    keys = [request.pair(request.target_old).text for request in requests]
    fresh = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
    if fresh:
        model.to(build_trainer(config, [], []).strategy.root_device)
        known |= dict(zip(fresh, gives_old_answers(model, list(fresh.values()), known_by), strict=True))
    phase.advance(len(requests))
    return [known[key] for key in keys]


def gives_old_answers(model: LanguageModel, requests: Sequence[EditRequest], known_by: str) -> list[bool]:
    """Return whether the model gives the old answer of each request in greedy decoding.

    Args:
        model: The model.
        requests: Requests with an old answer.
        known_by: ``exact_match`` compares every token of it, ``first_token`` only the first.
    """
    pairs = model.tokens.encode_pairs([request.pair(request.target_old) for request in requests])
    scores = score_encoded(model, pairs)
    if known_by == FIRST:
        return [first == pair.target[0] for first, pair in zip(scores.predicted[:, 0].tolist(), pairs, strict=True)]
    found: list[bool] = scores.hit.tolist()
    return found
