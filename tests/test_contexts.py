"""Sampled prefixes, against sampling written out."""

from __future__ import annotations

import pytest
import reference_editors as reference
import torch
from transformers import PreTrainedTokenizerFast

from prune_lightning.errors import UserError
from prune_lightning.models.contexts import ContextOptions, sample_prefixes
from prune_lightning.models.language_model import LanguageModel

END = 7


def with_specials(**specials):
    """A model whose start token has the id 0 and whose end token another one."""
    model, tokenizer = reference.tiny_model("gpt2")
    inner = tokenizer.backend_tokenizer
    named = {name: inner.id_to_token(token) for name, token in specials.items()}
    return LanguageModel(model, PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[PAD]", **named))


def by_hand(model, start, length, count, top_k=5, seed=0):
    generator, texts = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        ids = [start]
        while len(ids) < length:
            top = model.model(torch.tensor([ids])).logits[0, -1].float().softmax(0).topk(top_k)
            ids.append(int(top.indices[torch.multinomial(top.values, 1, generator=generator)]))
        texts.append(model.tokens.tokenizer.decode(ids, skip_special_tokens=True).strip() + ". ")
    return tuple(texts)


@pytest.mark.parametrize(
    ("specials", "start"),
    [({"bos_token": 0, "eos_token": END}, 0), ({"eos_token": END}, END), ({}, 0)],
    ids=["start", "end", "neither"],
)
def test_without_first_words_a_text_begins_with_the_start_token_whatever_its_id(specials, start):
    model = with_specials(**specials)
    found = sample_prefixes(model, ContextOptions(lengths=[(6, 3)], starts=()))
    assert found == by_hand(model, start, 6, 3)


def test_a_text_that_has_no_word_yet_goes_on(monkeypatch):
    """After the start token alone, and where special tokens follow it."""
    model = with_specials(bos_token=0, eos_token=END)
    word = model.tokens.encode("river")[0]

    def logits(ids, mask, rows, positions):
        wanted = word if ids.shape[1] > 4 else END
        return torch.nn.functional.one_hot(torch.tensor([wanted]), int(model.config.vocab_size)).double()

    monkeypatch.setattr(model, "logits_at", logits)
    for length in (1, 3, 5):
        options = ContextOptions(lengths=[(length, 2)], starts=(), top_k=1)
        assert sample_prefixes(model, options) == ("river. ", "river. ")
    word = END
    with pytest.raises(UserError, match="starts"):
        sample_prefixes(model, ContextOptions(lengths=[(3, 1)], starts=(), top_k=1))
