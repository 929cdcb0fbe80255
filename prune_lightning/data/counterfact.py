"""CounterFact, in its original schema (Meng et al., 2022) and in EasyEdit's."""

from __future__ import annotations

from typing import Any

from prune_lightning.data.files import FileStream, listed
from prune_lightning.data.portability import portability
from prune_lightning.types import EditRequest, Probe


class CounterFact(FileStream):
    """Counterfactual edits; records with ``requested_rewrite`` have the original schema, others EasyEdit's."""

    def parse(self, row: dict[str, Any], case_id: int) -> EditRequest:
        """Turn one record into a request."""
        return self._original(row, case_id) if "requested_rewrite" in row else self._easyedit(row, case_id)

    def _original(self, row: dict[str, Any], case_id: int) -> EditRequest:
        rewrite = row["requested_rewrite"]
        old = rewrite["target_true"]["str"].strip()
        return EditRequest(
            case_id=row.get("case_id", case_id),
            subject=rewrite["subject"],
            prompt=rewrite["prompt"].replace("{}", rewrite["subject"]).rstrip(),
            target_new=rewrite["target_new"]["str"].strip(),
            target_old=old,
            paraphrases=tuple(listed(row, "paraphrase_prompts")),
            locality=tuple(Probe(prompt, old) for prompt in listed(row, "neighborhood_prompts")),
            generation_prompts=tuple(listed(row, "generation_prompts")),
        )

    def _easyedit(self, row: dict[str, Any], case_id: int) -> EditRequest:
        probe = row.get("locality_prompt")
        return EditRequest(
            case_id=row.get("case_id", case_id),
            subject=row["subject"],
            prompt=row["prompt"].rstrip(),
            target_new=row["target_new"].strip(),
            target_old=row["ground_truth"].strip(),
            paraphrases=(row["rephrase_prompt"],) if row.get("rephrase_prompt") else (),
            locality=(Probe(probe, row["locality_ground_truth"].strip()),) if probe else (),
            portability=portability(row),
        )
