"""Time CounterFact's scores with one pair at a time and with shared passes, on a model with random weights.

    python benchmarks/evaluation.py                          GPT-2's 124M shape on the CPU
    python benchmarks/evaluation.py --layers 2 --edits 4     a small one
    python benchmarks/evaluation.py --json FILE

An edit is scored on its prompt, two paraphrases and ten neighbours, each with two targets: 26 pairs. The plain path is
that of the public code: each pair has its own forward pass with logits at all positions. Both paths tokenise, score,
and update the same metric; their numbers are compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from shapes import random_model
from timing import clock
from torch import Tensor

from prune_lightning.bundled.world import EDIT_PHRASING, load_world
from prune_lightning.evaluation.counterfact import CounterFactScores, pairs_by_kind
from prune_lightning.evaluation.measurement import Cases, Measured
from prune_lightning.evaluation.scoring import score_encoded, score_pairs
from prune_lightning.metrics import CounterFactScore
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.text.separators import Pair
from prune_lightning.types import EditRequest, Probe

NEIGHBOURS = 10


def requests(count: int) -> dict[int, EditRequest]:
    """Return edits of the bundled world; their neighbours have different wordings, as in CounterFact."""
    world = load_world()
    facts = [fact for fact in world.facts if len(world.by_relation[fact.relation]) > NEIGHBOURS][
        :: len(world.facts) // 64
    ]
    cases = {}
    for case, fact in enumerate(facts[:count]):
        related = [other for other in world.by_relation[fact.relation] if other.subject != fact.subject]
        neighbours = related[case : case + NEIGHBOURS] if len(related) >= case + NEIGHBOURS else related[:NEIGHBOURS]
        cases[case] = EditRequest(
            case_id=case,
            subject=fact.subject,
            prompt=fact.phrasings[EDIT_PHRASING],
            target_new=next(other.answer for other in related if other.answer != fact.answer),
            target_old=fact.answer,
            paraphrases=(fact.phrasings[0], fact.phrasings[2]),
            locality=tuple(
                Probe(other.phrasings[i % len(other.phrasings)], other.answer) for i, other in enumerate(neighbours)
            ),
        )
    return cases


@torch.no_grad()
def plain_nll(model: LanguageModel, text: Pair) -> tuple[Tensor, bool]:
    """Return the mean NLL per target token and whether all are first choices, from a separate pass of the pair."""
    (pair,) = model.tokens.encode_pairs([text])
    ids = torch.tensor([pair.ids], device=model.device)
    logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
    places = torch.arange(pair.target_start - 1, len(pair.ids) - 1, device=model.device)
    losses = -logits.float().log_softmax(-1)[places, ids[0, places + 1]]
    return losses.mean(), bool((logits[places].argmax(-1) == ids[0, places + 1]).all())


def plain(model: LanguageModel, cases: Cases) -> Measured:
    """Score the cases one pair at a time."""
    metric = CounterFactScore().to(model.device)
    for case, request in cases.items():
        for kind in metric.KINDS:
            scored = [
                (plain_nll(model, wanted), plain_nll(model, other or wanted)[0])
                for wanted, other in pairs_by_kind(request, kind)
            ]
            wanted, other = torch.stack([s[0][0] for s in scored]), torch.stack([s[1] for s in scored])
            hit = torch.tensor([s[0][1] for s in scored], device=model.device)
            metric.update(kind, wanted, other, hit, torch.full_like(hit, case, dtype=torch.long))
    return Measured({name: float(value) for name, value in metric.compute().items()}, metric.rows(cases))


def difference(one: Measured, other: Measured) -> float:
    """Return the largest difference between the numbers of two measurements, case by case."""
    return max(
        abs(a[name] - b[name]) for a, b in zip(one.cases, other.cases, strict=True) for name in a if name != "case"
    )


def main() -> None:
    """Run both paths and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--plain-edits", type=int, default=4, help="edits on which the plain path is timed")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = random_model("gpt2", getattr(torch, options.dtype), device, n_layer=options.layers)
    cases = requests(options.edits)
    few = {case: cases[case] for case in list(cases)[: options.plain_edits]}
    measurement = CounterFactScores()
    measurement.measure(model, {0: cases[0]})  # warm up
    plain_nll(model, ("The river", "runs"))

    pairs = [
        pair
        for request in cases.values()
        for kind in CounterFactScore.KINDS
        for both in pairs_by_kind(request, kind)
        for pair in both
        if pair
    ]
    slow, theirs = clock(lambda: plain(model, few), device)
    fast, _ = clock(lambda: measurement.measure(model, cases), device)
    rows, _ = clock(
        lambda: score_encoded(model, model.tokens.encode_pairs(list(dict.fromkeys(pairs))), trees=False), device
    )
    those = pairs[: 2 * (3 + NEIGHBOURS) * len(few)]
    nll = torch.stack([plain_nll(model, pair)[0] for pair in those])
    slow, rows, fast = slow / len(few), rows / len(cases), fast / len(cases)
    record = {
        "edits": len(cases),
        "pairs_per_edit": len(pairs) / len(cases),
        "plain_seconds_per_edit": slow,
        "rows_seconds_per_edit": rows,
        "seconds_per_edit": fast,
        "ratio_rows": slow / rows,
        "ratio": slow / fast,
        "difference_of_scores": difference(measurement.measure(model, few), theirs),
        "difference_of_nll": float((score_pairs(model, those).nll - nll).abs().max()),
        "threads": torch.get_num_threads(),
    }
    table = Table(
        "path", "seconds per edit", "ratio", title=f"GPT-2 shape, {options.layers} layers, {record['threads']} threads"
    )
    table.add_row("one pair at a time", f"{slow:.3f}", "1.0")
    table.add_row("batches of rows", f"{rows:.3f}", f"{record['ratio_rows']:.1f}")
    table.add_row("shared beginnings", f"{fast:.3f}", f"{record['ratio']:.1f}")
    out = Console(width=100)
    out.print(table)
    out.print(
        f"largest difference: {record['difference_of_scores']:.1e} (scores), {record['difference_of_nll']:.1e} (NLL)"
    )
    if options.json:
        settings = {**vars(options), "json": None}
        options.json.write_text(json.dumps({**settings, **record}, indent=2))


if __name__ == "__main__":
    main()
