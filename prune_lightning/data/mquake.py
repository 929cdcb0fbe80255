"""MQuAKE (Zhong et al., 2023, https://arxiv.org/abs/2305.14795): several edits per case, and multi-hop questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

from prune_lightning.data.counterfact import filled
from prune_lightning.data.fields import Fields
from prune_lightning.data.grouped import GroupedFile
from prune_lightning.errors import UserError
from prune_lightning.questions import Query, Question
from prune_lightning.types import EditRequest


class MQuAKE(GroupedFile):
    """Cases of one to four edits. The questions of a case are asked once all its edits are written.

    ``requested_rewrite`` holds the edits, in which ``{}`` stands for the subject. ``questions`` are phrasings of one
    multi-hop question: its answer is right if one of them is answered with ``new_answer`` or one of
    ``new_answer_alias`` (kind ``multi_hop``). ``new_single_hops`` are the facts along the way; all of them have to be
    right (kind ``single_hops``, the paper's instance-wise accuracy).

    Many cases share edits. In a sequential stream an edit that an earlier case has written is not written again.
    Under the protocols ``batch`` and ``sequential_batched`` a step holds whole cases, ``batch_size`` of them.
    """

    def parse_group(self, row: Fields, case_id: int) -> tuple[Sequence[EditRequest], Sequence[Question]]:
        """Convert one case."""
        name = row.row.get("case_id", case_id)
        rewrites = row.objects("requested_rewrite")
        if not rewrites:
            raise UserError("`requested_rewrite` is missing or empty")
        requests = [_request(rewrite, f"{name}/{place}") for place, rewrite in enumerate(rewrites)]
        return requests, [
            Question("multi_hop", tuple(Query(text, _answers(row, "new_answer")) for text in row.prompts("questions"))),
            Question("single_hops", tuple(_hop(hop) for hop in row.objects("new_single_hops")), every=True),
        ]

    def shuffled(self, requests: list[EditRequest]) -> list[EditRequest]:
        """Return the requests with the cases in random order."""
        cases: dict[str, list[EditRequest]] = {}
        for request in requests:
            cases.setdefault(_case(request), []).append(request)
        order = list(cases.values())
        random.Random(self.seed).shuffle(order)
        return [request for case in order for request in case]

    def ordered(self, requests: list[EditRequest]) -> list[EditRequest]:
        """Return the requests in the order of the stream, without edits that an earlier case has written."""
        requests = super().ordered(requests)
        if self.protocol.from_base:
            return requests
        first = {request.fact: request for request in reversed(requests)}
        return [request for request in requests if first[request.fact] is request]

    def _ends(self) -> list[int]:
        if self.protocol.one_by_one:
            return super()._ends()
        done = list(accumulate(self.done))
        start = done[-1] if done else 0
        names = [_case(request) for request in self.requests]
        starts = [start, *(at for at, two in enumerate(pairwise(names), start=1) if two[0] != two[1] and at > start)]
        return [*done, *starts[self.batch_size :: self.batch_size], len(names)] if start < len(names) else done


def _case(request: EditRequest) -> str:
    return str(request.case_id).rpartition("/")[0]


def _request(row: Fields, case_id: str) -> EditRequest:
    prompt, place = filled(row, row.text("prompt"), row.text("subject"))
    subject = row.stripped("subject")
    return EditRequest(
        case_id=case_id,
        subject=subject,
        prompt=prompt,
        target_new=row.object("target_new").target("str"),
        target_old=row.object("target_true").target("str"),
        paraphrases=(row.text("question"),) if row.optional("question") else (),
        subject_start=row.place(subject, prompt) if place is None else place,
    )


def _answers(row: Fields, key: str) -> tuple[tuple[str, ...], ...]:
    return ((row.target(key), *row.prompts(f"{key}_alias")),)


def _hop(row: Fields) -> Query:
    return Query(row.optional("cloze") or row.text("question"), _answers(row, "answer"))
