"""Broken model folders are reported in one line, before anything is computed."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import build_tiny, load_path
from safetensors.torch import load_file, save_file

from prune_lightning.errors import UserError
from prune_lightning.models.loading import load_config, load_language_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"


def configured(folder: Path, **keys) -> None:
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def quantised(method: str, **keys):
    return lambda folder: configured(folder, quantization_config={"quant_method": method, **keys})


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + b"1" * 500)


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "pointer instead of the tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "git lfs pull"),
    "truncated": (cut, "damaged or incomplete.*download it again"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or incomplete"),
    "damaged pickle": (pickled, "could not be loaded"),
    "missing shard": (sharded, "model-00002-of-00002.safetensors; download"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "more layers than weights": (lambda f: configured(f, num_hidden_layers=4), "lacks .* weights"),
    "other width than weights": (lambda f: configured(f, intermediate_size=64), "could not be loaded"),
    "fewer embeddings than tokens": (lambda f: configured(f, vocab_size=1000), "2048 tokens.*1000 embeddings"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer could not be loaded"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "unknown type": (lambda f: configured(f, model_type="lama"), "'lama'.*did you mean 'llama'"),
    "no type": (lambda f: configured(f, model_type=None), "no `model_type`"),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), "bitsandbytes.*unquantised"),
    "gptq": (quantised("gptq", bits=4), "gptq.*unquantised"),
    "an unknown quantisation": (quantised("crumbs"), "crumbs.*unquantised"),
}


def saved(folder: Path, family: str = "llama") -> Path:
    model = build_tiny(family, torch.float32)
    model.model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(load_path()) / name, folder)
    return folder


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(what, tmp_path):
    change, message = BROKEN[what]
    change(saved(tmp_path / "model"))
    with pytest.raises(UserError, match=message) as caught:
        load_language_model(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge_and_unload"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize("load", [load_language_model, load_config])
def test_paths_that_are_no_folder(load, tmp_path):
    saved(tmp_path / "model")
    for path, message in (
        (tmp_path / "model" / "config.json", "is a file"),
        (tmp_path / "modell", "did you mean 'model'"),
        (tmp_path / "a" / "b", f"no folder '{tmp_path / 'a'}' either"),
        ("/nonexistent", "nothing in '/' has a name like it$"),
    ):
        with pytest.raises(UserError, match=message):
            load(str(path))


def test_a_hub_name_without_network_is_refused_quickly(monkeypatch):
    def nobody(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for name in ("https_proxy", "http_proxy", "all_proxy", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    started = time.perf_counter()
    with pytest.raises(UserError, match="the hub cannot be reached; download"):
        load_language_model("nobody/nothing-of-that-name")
    assert time.perf_counter() - started < 5


def test_quantised_weights_are_dequantised(tmp_path):
    folder = saved(tmp_path / "model")
    expected, stored = load_file(folder / "model.safetensors"), {}
    for name, weight in expected.items():
        stored[name] = weight
        if "proj" in name:
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            stored[name], stored[f"{name}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)
            expected[name] = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    quantised("fp8", weight_block_size=[32, 32], activation_scheme="dynamic")(folder)
    with pytest.warns(UserWarning, match="dequantised"):
        model = load_language_model(str(folder)).model
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name), weight)
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
