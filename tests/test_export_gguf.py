"""GGUF out: edited tensors hold the edits, every other byte is that of the file the model was loaded from."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from conftest import build_tiny
from test_export import edited, source_of
from test_fuzz import command_line
from test_train import train
from tiny_gguf import interleaved, write_gguf

from prune_lightning.errors import UserError
from prune_lightning.export import gguf as gguf_format
from prune_lightning.export import gguf_q8_0
from prune_lightning.export.exporting import export
from prune_lightning.export.sources import ExportedMatrix, ExportSource, Provenance
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import LowRankUpdate

TYPES = {"ffn_down.weight": "Q4_1", "ffn_up.weight": "Q8_0", "attn_v.weight": "F16"}


def tiny_file(folder, family="llama", **further):
    return write_gguf(build_tiny(family, torch.float32, **further), folder / "tiny.gguf", TYPES)


def table(path):
    """Return a file's header up to the table of tensors, and the type and the bytes of each tensor."""
    reader = gguf.GGUFReader(path)
    start = min(int(tensor.field.offset) for tensor in reader.tensors)
    whole = path.read_bytes()
    tensors = {
        t.name: (t.tensor_type.name, list(t.shape), whole[int(t.data_offset) : int(t.data_offset) + int(t.n_bytes)])
        for t in reader.tensors
    }
    assert all(int(t.data_offset) % reader.alignment == 0 for t in reader.tensors)
    return whole[:start], tensors


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "stored", "kept"), [("gguf", "F16", 0.999), ("gguf_q8_0", "Q8_0", 0.98)])
def test_only_the_edited_tensors_differ(family, kind, stored, kept, tmp_path):
    sizes = {"n_inner": None, "max_position_embeddings": 1024} if family == "gpt2" else {}
    path = tiny_file(tmp_path, family, **sizes)
    module, requests = edited(load_language_model(str(path)), "memit", [0, 1], batch=5)
    report = export(source_of(module, requests, path), tmp_path / "out", kind)
    assert report.max_logit_error <= report.tolerance < report.moved
    (old_head, old), (new_head, new) = table(path), table(tmp_path / "out" / "tiny-edited.gguf")
    assert new_head == old_head
    assert list(new) == list(old)
    changed = {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert {name for name in new if new[name] != old[name]} == changed
    loaded = load_language_model(str(tmp_path / "out" / "tiny-edited.gguf"))
    for name, matrix in module.edited_matrices().items():
        live, got = matrix.weight(), loaded.model.get_parameter(name).detach()
        got = got.T if matrix.transposed else got
        # F16 rounds to 11 bits. Q8_0 rounds to 1/127 of the largest of 32 values, which itself is rounded to 11 bits.
        error = live.abs() * 2**-11
        if stored == "Q8_0":
            largest = live.abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1)
            error = largest * (0.5 / 127 + 2**-11)
        assert bool(((live - got).abs() <= error + 1e-6).all())
    for name in changed:
        assert new[name][0] == stored
        assert kept < report.details["change_kept"][name] < 1.02
    assert (tmp_path / "out" / "Modelfile").read_text().splitlines()[1] == "FROM ./tiny-edited.gguf"
    with pytest.raises(UserError, match="exists"):
        export(source_of(module, requests, path), tmp_path / "out", kind)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_rows_in_the_order_of_llama_cpp(name, tmp_path):
    """llama.cpp stores the rows of queries and keys in another order than `transformers`."""
    path = tiny_file(tmp_path)
    model = load_language_model(str(path))
    weight = model.model.model.layers[1].self_attn.get_submodule(name).weight
    change = LowRankUpdate(torch.randn(len(weight), 1), torch.randn(32, 1))
    matrix = ExportedMatrix(f"model.layers.1.self_attn.{name}.weight", weight.detach().clone(), change)
    with torch.no_grad():
        weight.add_(change.dense())
    source = ExportSource(model, [matrix], Provenance(str(path)))
    gguf_format.write(source, tmp_path)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "tiny-edited.gguf").tensors}
    written = torch.from_numpy(tensors[f"blk.1.attn_{name[0]}.weight"].data.copy()).float()
    heads = {"q_proj": 4, "k_proj": 2}.get(name)
    expected = interleaved(weight.detach(), heads) if heads else weight.detach()
    assert torch.equal(written, expected.half().float())
    assert export(source, tmp_path / "out", "gguf").max_logit_error < 0.05


def test_what_cannot_be_written_is_refused(tmp_path):
    path = tiny_file(tmp_path)
    model = load_language_model(str(path))
    weight = model.rewrite_module(0).weight.detach().clone()
    change, edited = LowRankUpdate(torch.ones(32, 1), torch.ones(32, 1)), model.rewrite_name(0)

    def source(name=edited, original=weight, base=path):
        return ExportSource(model, [ExportedMatrix(name, original, change)], Provenance(str(base)))

    for broken, message in (
        (source(original=weight + 1), "has changed since it was loaded; export `full`"),
        (source(name="model.layers.0.unknown.weight"), "no tensor of its own for the edited weight"),
        (source(base=tmp_path), "only exported for a model that was loaded from one"),
    ):
        with pytest.raises(UserError, match=message):
            gguf_format.write(broken, tmp_path)


def test_what_a_file_cannot_hold_is_found_before_the_first_edit(tmp_path, capsys, monkeypatch):
    path = write_gguf(build_tiny("llama", torch.float32, intermediate_size=40), tmp_path / "tiny.gguf")
    monkeypatch.setattr(LanguageModel, "__call__", lambda *_: pytest.fail("the model was run"))
    words = ("model=auto", f"model.path={path}", "restraint=none", "callbacks=none", "progress=false")
    small = ("data.num_edits=1", "evaluation=editing", "control=false", "method.layers=[1]")
    assert command_line(tmp_path / "run", *words, *small, "export=[gguf,gguf_q8_0]") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "blocks of 32 values, and a row of model.layers.1.mlp.down_proj.weight has 40: take export=gguf" in line
    model = load_language_model(str(path))
    weight = model.rewrite_module(1).weight.detach().clone()
    change = LowRankUpdate(torch.ones(32, 1), torch.ones(40, 1))
    source = ExportSource(model, [ExportedMatrix(model.rewrite_name(1), weight, change)], Provenance(str(path)))
    with pytest.raises(UserError, match="blocks of 32 values"):
        gguf_q8_0.write(source, tmp_path)
    gguf_format.write(source, tmp_path)
    written = {t.name: t for t in gguf.GGUFReader(tmp_path / "tiny-edited.gguf").tensors}["blk.1.ffn_down.weight"]
    assert torch.equal(torch.from_numpy(written.data.copy()).float(), (weight + 1).half().float())
    with pytest.raises(UserError, match="no tensor of its own"):
        gguf_format.check_weights(str(path), {"model.layers.1.mlp.other_proj.weight": (32, 32)}, 3)


def test_a_run_exports_the_file_it_was_given(tmp_path):
    path = tiny_file(tmp_path)
    small = ("method.value.steps=4", "data.num_edits=2", "evaluation=editing", "progress=false")
    done = train(
        "model=auto",
        f"model.path={path}",
        f"hydra.run.dir={tmp_path / 'run'}",
        "export=[gguf,gguf_q8_0,full,lora]",
        "model.second_moments.corpus=null",
        *small,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "run" / "summary.json").read_text())["exports"]
    assert [report["format"] for report in reports] == ["gguf", "gguf_q8_0", "full", "lora"]
    assert all(report["max_logit_error"] <= report["tolerance"] for report in reports)
    assert "F16 keeps at least" in done.stdout
    again = load_language_model(str(tmp_path / "run" / "export" / "gguf" / "tiny-edited.gguf"))
    full = load_language_model(str(tmp_path / "run" / "export" / "full"))
    for name, parameter in full.model.named_parameters():
        assert torch.allclose(again.model.get_parameter(name), parameter, rtol=2**-10, atol=1e-6)
