"""PRUNE under the Hugging Face Trainer (``pip install 'prune-lightning[hf-trainer]'``), by one more callback.

python examples/hugging_face_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from prune_lightning.callbacks.hugging_face import RestraintCallback
from transformers import Trainer, TrainingArguments

from prune_lightning.callbacks import PRUNE
from prune_lightning.models.loading import load_language_model

TEXT = (Path(__file__).parent / "lighthouse.txt").read_text().splitlines()


def main(steps: int = 20) -> None:
    language_model = load_language_model("pkg://prune_lightning.bundled/model")
    model, tokens = language_model.model.requires_grad_(True), language_model.tokens
    ids, mask = tokens.pad([tokens.encode(text) for text in TEXT], language_model.device)
    labels = ids.masked_fill(mask == 0, -100)
    rows = [{"input_ids": i, "attention_mask": m, "labels": t} for i, m, t in zip(ids, mask, labels, strict=True)]
    restraint = PRUNE(base=10.0, parameters=["*.mlp.*.weight"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=5,
            learning_rate=1e-2,
            logging_steps=5,
            report_to=[],
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[RestraintCallback(restraint)]).train()
    print({name: round(value, 3) for name, value in restraint.metrics.items()})


if __name__ == "__main__":
    main()
