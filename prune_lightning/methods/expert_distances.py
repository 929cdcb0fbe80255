"""How far ELDER's codes are apart: what `epsilon` is chosen by."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from prune_lightning.methods.expert_codes import hamming, number_of_codes
from prune_lightning.methods.expert_memory import ExpertMemory, unrelated_queries

QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}


@torch.no_grad()
def distance_facts(memory: ExpertMemory) -> dict[str, Any]:
    """Return how far unrelated text is from the closest edit, and how far the codes of the edits have moved.

    Args:
        memory: The memory, with at least one edit.

    Returns:
        ``distance_unrelated``: how many texts are at each Hamming distance, and quantiles of it;
        ``answered_unrelated``: the share of texts that experts answer; ``codes_moved``: the mean distance of an edit's
        present code to that at the end of its training; ``codes_lost``: the share of edits for which it is ``epsilon``
        or more, so that an old code would not find them; ``codes``: the number of different codes.
    """
    routing, (layers, experts, _) = memory.routing, memory.experts.routers.shape
    with memory.unedited():
        inputs = unrelated_queries(memory.language_model, memory.below)
    queries = memory.read(inputs[:, None], torch.zeros(len(inputs), dtype=torch.long, device=inputs.device))
    distances = memory.distances(memory.code(memory.experts.log_scores(queries)))
    quantiles = distances.double().quantile(torch.tensor([*QUANTILES.values()], dtype=torch.double).to(queries.device))
    moved = hamming(memory.present(), memory.codes).diagonal()
    return {
        "epsilon": routing.epsilon,
        "codes": number_of_codes(layers, experts, routing.active),
        "distance_unrelated": {str(d): n for d, n in sorted(Counter(distances.tolist()).items())},
        **{f"distance_unrelated_{name}": float(q) for name, q in zip(QUANTILES, quantiles, strict=True)},
        "answered_unrelated": float((distances < routing.epsilon).double().mean()),
        "codes_moved": float(moved.double().mean()),
        "codes_lost": float((moved >= routing.epsilon).double().mean()),
    }
