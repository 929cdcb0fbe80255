"""Pretraining of the bundled model: tokenizer, data and the training module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from prune_lightning.bundled.corpus import PackedWindows, training_documents

END = "<|endoftext|>"


def train_tokenizer(documents: Mapping[str, list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts ``<|endoftext|>`` before every text.

    Args:
        documents: Training text by kind.
        vocab_size: Size of the vocabulary, including the 256 bytes and the special token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for texts in documents.values() for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


class PretrainingData(L.LightningDataModule):
    """Packed windows of the bundled world's training text.

    Args:
        shares: Probability of each kind of document at every draw.
        vocab_size: Size of the tokenizer's vocabulary.
        length: Tokens per window.
        batch_size: Windows per step.
        steps: Optimizer steps.
        seed: Seed of the windows.
    """

    def __init__(
        self, shares: Mapping[str, float], vocab_size: int, length: int, batch_size: int, steps: int, seed: int
    ) -> None:
        super().__init__()
        documents = training_documents()
        self.tokenizer = train_tokenizer(documents, vocab_size)
        encoded = {
            kind: self.tokenizer(texts, add_special_tokens=False)["input_ids"] for kind, texts in documents.items()
        }
        separator = int(self.tokenizer.vocab[END])
        self.windows = PackedWindows(encoded, dict(shares), length, separator, steps * batch_size, seed)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the windows, in order."""
        return DataLoader(self.windows, batch_size=self.batch_size)


class Pretraining(L.LightningModule):
    """Next-token training of a GPT-2 from scratch with AdamW, linear warm-up and cosine decay.

    Args:
        width: Hidden size.
        layers: Number of blocks.
        heads: Attention heads.
        positions: Longest input.
        vocab_size: Size of the vocabulary.
        weight_decay: AdamW's weight decay.
        warmup_steps: Steps of linear warm-up.

    Attributes:
        learning_rate: Peak learning rate of the present stage.
        steps: Optimizer steps of the present stage.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        positions: int,
        vocab_size: int,
        weight_decay: float,
        warmup_steps: int,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.steps = 0.0, 0
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of one batch of windows, shape ``(batch, length)``."""
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _schedule(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return min(1.0, (step + 1) / self.hparams["warmup_steps"]) * (0.02 + 0.98 * cosine)

    def configure_optimizers(self) -> Any:
        """Return AdamW on all parameters, without decay of biases, norms and embeddings."""
        decayed = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "wte" not in n and "wpe" not in n]
        kept = {id(p) for p in decayed}
        others = [p for p in self.model.parameters() if id(p) not in kept]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.hparams["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=(0.9, 0.98),
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
