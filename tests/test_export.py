"""Exports: what is written is what the live model says, for programs that know nothing of this one."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BUNDLED, ROOT, build_tiny, load_path, quiet_trainer
from hydra.utils import instantiate
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from test_configs import compose
from test_train import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_lightning.callbacks import PRUNE, RECT
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.export import exporting, lora
from prune_lightning.export.__main__ import main
from prune_lightning.export.delta import FILE, apply_delta
from prune_lightning.export.exporting import export
from prune_lightning.export.lowrank import lowest_rank
from prune_lightning.export.sources import ExportedMatrix, ExportSource, Provenance
from prune_lightning.export.verify import next_token_logits, prompts_for
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.tasks import exporting as exporting_task
from prune_lightning.tasks.exporting import export_all, raise_failed
from prune_lightning.tasks.preflight import formats_wanted
from prune_lightning.types import EditRequest, LowRankUpdate

FORMATS = ("full", "lora", "delta")
HOSTILE = "```\n---\n<script>alert('x')</script> {{ 7*7 }} {% raw %} # Title | \u2028 ünï"

# What a user runs: plain transformers, plain peft; nothing of ours may be imported.
PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
for kind, base, folder, rows, out in json.load(open(sys.argv[1])):
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        AutoTokenizer.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    with torch.no_grad():
        torch.save(torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1].double() for row in rows]), out)
assert not [name for name in sys.modules if name.startswith("prune_lightning")]
"""


def edited(language_model, method: str, layers, restraint=None, batch=1, edits=5):
    """Edit a model and return the module; five value steps, two prefixes, identity statistics."""
    config = compose(f"method={method}").method
    config.layers = layers
    config.contexts = {"_target_": config.contexts._target_, "fixed": ["The river. ", "Under an old bridge. "]}
    config.value.steps = 5
    module = instantiate(config, language_model=language_model, second_moments=SecondMoments(None), _convert_="all")
    protocol = "sequential" if batch == 1 else "sequential_batched"
    stream = BundledWorld(num_edits=edits, protocol=protocol, batch_size=batch)
    quiet_trainer(*([restraint] if restraint else [])).fit(module, datamodule=stream)
    return module, stream.requests


def source_of(module, requests, base=BUNDLED) -> ExportSource:
    return ExportSource.from_module(module, Provenance(str(base), None, "rome", "none", tuple(requests)))


@pytest.fixture(scope="module")
def rome():
    """The bundled model after five edits by ROME."""
    module, requests = edited(load_language_model(BUNDLED), "rome", [0])
    return source_of(module, requests, load_path())


@pytest.fixture(scope="module")
def memit(tmp_path_factory):
    """Square matrices of two families after a batch of five edits by MEMIT in two layers, the bases on disk."""
    sources = {}
    for family in ("llama", "gpt2"):
        model = build_tiny(family, torch.float32)
        base = tmp_path_factory.mktemp(family)
        model.model.save_pretrained(base)
        module, requests = edited(model, "memit", [0, 1], batch=5)
        sources[family] = source_of(module, requests, base)
    return sources


@pytest.fixture(scope="module")
def loaded_plainly(rome, memit, tmp_path_factory):
    """By case and format: the report, logits as plain libraries give them, and those of the live model."""
    folder, found, jobs = tmp_path_factory.mktemp("plain"), {}, []
    for name, source in {"rome": rome, **memit}.items():
        model, prompts = source.language_model, prompts_for(source.provenance.requests)
        rows = [model.tokens.encode(prompt) for prompt in prompts]
        for kind in ("full", "lora"):
            target, out = folder / name / kind, folder / f"{name}_{kind}.pt"
            found[name, kind] = export(source, target, kind), out, next_token_logits(model, prompts)
            jobs.append([kind, source.provenance.base_model, str(target), rows, str(out)])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-P", "-c", PLAIN, str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower(), done.stderr
    return {key: (report, torch.load(out, weights_only=True), live) for key, (report, out, live) in found.items()}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("case", ["rome", "llama", "gpt2"])
def test_plain_libraries_load_it_in_a_process_of_their_own(case, kind, loaded_plainly):
    report, theirs, ours = loaded_plainly[case, kind]
    assert float((theirs - ours).abs().max()) <= report.tolerance
    assert torch.equal(theirs.argmax(1), ours.argmax(1))
    assert report.moved > 100 * report.tolerance, "the edits have to be larger than what the comparison lets pass"
    files = [path for path in Path(report.folder).rglob("*") if path.is_file()]
    assert report.megabytes == pytest.approx(sum(path.stat().st_size for path in files) / 1e6)


def test_an_adapter_has_one_rank(bundled, tmp_path):
    """MEMIT over two layers, the lower one edited once more: the other is padded, so every loader scales by one."""
    module, requests = edited(bundled, "memit", [0, 1], batch=5)
    matrices = module.edited_matrices()
    first, second = matrices
    generator = torch.Generator().manual_seed(0)
    shape = matrices[first].weight().shape
    extra = LowRankUpdate(*(0.05 * torch.randn(size, 1, generator=generator) for size in shape))
    matrices[first].add(extra)
    with warnings.catch_warnings(action="error", category=FutureWarning):  # PEFT's, of transformers
        report = export(source_of(module, requests), tmp_path / "lora", "lora")
    assert report.details["ranks"] == {first: 6, second: 5}
    assert "rank 6, for vLLM: --max-lora-rank 8" in report.line()
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (6, 6)
    assert not adapter["rank_pattern"]
    assert not adapter["alpha_pattern"]
    assert adapter["fan_in_fan_out"] is True
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, matrix in matrices.items():
        a, b = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        assert (a.shape[0], b.shape[1]) == (6, 6)
        # llama.cpp scales by alpha over the tensor's own rank, vLLM by alpha over r.
        scaled = adapter["lora_alpha"] / a.shape[0] * b @ a
        change = matrix.delta()
        change = change.dense() if isinstance(change, LowRankUpdate) else change
        assert torch.allclose(scaled, change.float(), rtol=0, atol=1e-5 * float(change.abs().max()))


@pytest.mark.parametrize(
    ("rank", "words"), [(1, "-rank 1"), (2, "-rank 8"), (257, "-rank 320"), (512, "-rank 512"), (513, "format full")]
)
def test_what_vllm_needs_to_know_about_the_rank(rank, words):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(600, rank, generator=generator) for _ in range(2))
    assert lora._note(lowest_rank(LowRankUpdate(left, right)).left.shape[1]).endswith(words) == (rank < 513)
    assert words in lora._note(rank)


def test_delta_makes_the_live_weights_from_the_base_and_refuses_another(rome, tmp_path):
    report = export(rome, tmp_path / "delta", "delta")
    base = AutoModelForCausalLM.from_pretrained(load_path())
    about = apply_delta(base, tmp_path / "delta")
    live = rome.language_model.model
    for name, parameter in base.named_parameters():
        assert torch.allclose(parameter, live.get_parameter(name), rtol=0, atol=1e-5), name
    (name,) = about["weights"]
    assert report.details["dense"] == []
    with safe_open(tmp_path / "delta" / FILE, framework="pt") as file:
        assert file.get_tensor(f"{name}.left").shape[1] == 5
    with pytest.raises(UserError, match="is not the weight that the change applies to"):
        apply_delta(base, tmp_path / "delta")
    other = AutoModelForCausalLM.from_pretrained(load_path())
    with torch.no_grad():
        other.get_parameter(name)[0, 0] += 1e-3
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(UserError, match="unedited"):
        apply_delta(other, tmp_path / "delta")
    assert all(torch.equal(before[n], p) for n, p in other.named_parameters())


def test_damaged_or_foreign_files_are_refused(rome, tmp_path):
    export(rome, tmp_path / "delta", "delta")
    base = AutoModelForCausalLM.from_pretrained(load_path())
    path = tmp_path / "delta" / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        apply_delta(base, path)
    with pytest.raises(UserError, match="holds no change of weights"):
        apply_delta(base, ROOT / "prune_lightning" / "bundled" / "model" / "model.safetensors")
    with pytest.raises(UserError, match="no file"):
        apply_delta(base, tmp_path / "nowhere")


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
def test_what_prune_withholds_is_not_exported(accumulate, bundled, tmp_path):
    restraint = PRUNE(base=1.2, accumulate=accumulate)
    module, requests = edited(bundled, "rome", [0], restraint)
    (matrix,) = module.edited_matrices().values()
    with torch.no_grad():  # a large update, so that there is something to restrain
        matrix.add(LowRankUpdate(torch.ones(matrix.weight().shape[0], 1), torch.ones(matrix.weight().shape[1], 1)))
        restraint.restrain_all()
    held = matrix.weight() - matrix.original()
    assert torch.linalg.matrix_norm(held, 2) < torch.linalg.matrix_norm(matrix.change.master, 2) or (
        accumulate == "restrained"
    )
    change = ExportedMatrix.of(matrix).change
    assert isinstance(change, LowRankUpdate)
    assert torch.allclose(change.dense().float(), held, atol=1e-5)
    source = source_of(module, requests)
    for kind in FORMATS:
        assert export(source, tmp_path / kind, kind).max_logit_error < 1e-3


def test_dense_change_after_rect(bundled, tmp_path):
    module, requests = edited(bundled, "rome", [0], RECT(keep=0.2))
    source = source_of(module, requests)
    assert isinstance(source.matrices[0].change, torch.Tensor)
    report = export(source, tmp_path / "delta", "delta")
    assert report.details["dense"] == [source.matrices[0].name]
    export(source, tmp_path / "full", "full")
    with pytest.raises(UserError, match=r"not of low rank .*Export `full` or `delta`"):
        export(source, tmp_path / "lora", "lora")
    assert not (tmp_path / "lora").exists()
    cut = export(source, tmp_path / "cut", "lora", rank=3)
    assert cut.max_logit_error <= cut.tolerance < cut.truncation_error
    assert set(cut.details["ranks"].values()) == {3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tiny, tmp_path):
    module, requests = edited(tiny("llama", dtype), "rome", [1], edits=2)
    source = source_of(module, requests)
    for kind in FORMATS:
        export(source, tmp_path / kind, kind)


def test_rank_is_the_lowest_that_holds_the_change():
    torch.manual_seed(0)
    left, right = torch.randn(30, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    doubled = LowRankUpdate(torch.cat([left, left[:, :2] * 1e-3], 1), torch.cat([right, right[:, :2]], 1))
    for change in (doubled, doubled.dense()):
        found = lowest_rank(change)
        assert found.left.shape[1] == 4
        assert torch.allclose(found.dense(), doubled.dense(), rtol=0, atol=1e-12)
    u, s, vh = torch.linalg.svd(doubled.dense())
    assert torch.allclose(lowest_rank(doubled, 2).dense(), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-10)
    nothing = torch.zeros(3, 2, dtype=torch.float64)
    assert lowest_rank(nothing).left.shape == (3, 0)
    assert lowest_rank(LowRankUpdate(nothing, torch.ones(4, 2, dtype=torch.float64))).right.shape == (4, 0)
    assert lowest_rank(LowRankUpdate(nothing[:, :0], torch.ones(4, 0, dtype=torch.float64))).right.shape == (4, 0)


def test_card_takes_hostile_records_as_text(rome, tmp_path):
    hostile = EditRequest(0, HOSTILE, f"{HOSTILE} is", HOSTILE, HOSTILE)
    origin = Provenance(f'base"\n{HOSTILE}', None, HOSTILE, HOSTILE, (hostile,))
    source = ExportSource(rome.language_model, rome.matrices, origin)
    for kind in FORMATS:
        export(source, tmp_path / kind, kind)
        card = (tmp_path / kind / "README.md").read_text()
        _, front, body = card.split("\n---\n" if card.startswith("\n") else "---\n", 2)
        assert yaml.safe_load(front)["base_model"] == origin.base_model
        assert "<script" not in card
        assert "49" not in body.split("## Edits")[1]
        assert [line for line in body.splitlines() if line.startswith("```")] == ["```json", "```"] * 2
        facts, (edit,) = (json.loads(block.split("\n```")[0]) for block in body.split("```json\n")[1:])
        assert (facts["base model"], facts["method"], facts["edits"]) == (origin.base_model, HOSTILE, 1)
        assert (edit["subject"], edit["target_new"], edit["target_old"]) == (HOSTILE, HOSTILE.strip(), HOSTILE)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_card_is_json_that_can_be_read(rome, tmp_path, count):
    requests = tuple(EditRequest(i, f"Ann {i}", f"Ann {i} is", "é<b>", "old") for i in range(count))
    source = ExportSource(rome.language_model, rome.matrices, Provenance("base", "v1", "rome", "prune", requests))
    export(source, tmp_path / "delta", "delta")
    blocks = (tmp_path / "delta" / "README.md").read_text("utf-8").split("```json\n")[1:]
    facts, edits = (json.loads(block.split("\n```")[0]) for block in blocks)
    assert (facts["base model"], facts["revision"], facts["method"]) == ("base", "v1", "rome")
    assert facts["edited weights"] == [matrix.name for matrix in rome.matrices]
    assert [(edit["subject"], edit["target_new"]) for edit in edits] == [(r.subject, r.target_new) for r in requests]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_export_brings_its_tokenizer(rome, tmp_path, kind):
    export(rome, tmp_path / kind, kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind, local_files_only=True)
    text = "In the morning they é 12"
    assert tokenizer(text)["input_ids"] == rome.language_model.tokens.tokenizer(text)["input_ids"]
    assert tokenizer.pad_token == rome.language_model.tokens.tokenizer.pad_token


def test_failed_export_leaves_nothing(rome, tmp_path, monkeypatch):
    target = tmp_path / "out" / "lora"
    write = lora.write

    def wrong(source, folder):
        about = write(source, folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
        return about

    monkeypatch.setattr(lora, "write", wrong)
    with pytest.raises(UserError, match="its logits differ by"):
        export(rome, target, "lora")
    monkeypatch.setattr(lora, "write", write)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(rome, target, "lora")
    assert list(target.parent.iterdir()) == []


def test_existing_folders_are_refused_or_replaced(rome, tmp_path, monkeypatch):
    export(rome, tmp_path / "lora", "lora")
    with pytest.raises(UserError, match="overwrite"):
        export(rome, tmp_path / "lora", "delta")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(rome, tmp_path / "lora", "delta", overwrite=True)
    assert (tmp_path / "lora" / "adapter_config.json").exists()
    export(rome, tmp_path / "lora", "delta", overwrite=True)
    assert (tmp_path / "lora" / FILE).exists()
    assert not (tmp_path / "lora" / "adapter_config.json").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no earlier export"):
        export(rome, tmp_path / "mine", "delta", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "mine"]


def test_useless_requests_are_refused(rome, tiny, tmp_path):
    for rank, kind, message in (
        (0, "lora", "at least 1"),
        (2, "full", "lora and delta"),
        (None, "ggml", "choose from"),
        (2, "gguf", "lora and delta"),
        (None, "gguf", "only exported for a model that was loaded from one"),
    ):
        with pytest.raises(UserError, match=message):
            export(rome, tmp_path / "x", kind, rank)
    module = instantiate(
        compose("method=rome").method, language_model=tiny("llama"), second_moments=SecondMoments(None), layers=[0]
    )
    with pytest.raises(UserError, match="no weight has changed"):
        export(source_of(module, ()), tmp_path / "x", "lora")
    assert not (tmp_path / "x").exists()


def test_live_weights_are_bit_equal_afterwards(rome, tmp_path):
    before = {name: p.clone() for name, p in rome.language_model.named_parameters()}
    for kind in ("lora", "delta"):
        export(rome, tmp_path / kind, kind, rank=2)
    assert all(torch.equal(before[name], p) for name, p in rome.language_model.named_parameters())


def test_command_line_names_what_is_missing(tmp_path, monkeypatch, capsys):
    for folder, message in ((tmp_path, "holds no ledger"), (tmp_path / "x", "no run folder")):
        monkeypatch.setattr(sys, "argv", ["export", str(folder), "--to", str(tmp_path / "out"), "--format", "lora"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_run_exports_at_its_end(tmp_path):
    small = ("method.value.steps=4", "data.num_edits=2", "evaluation=editing", "progress=false", "control=false")
    done = train(f"hydra.run.dir={tmp_path}", "export=[full,lora,delta]", "model.second_moments.corpus=null", *small)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [report["format"] for report in summary["exports"]] == list(FORMATS)
    for report in summary["exports"]:
        assert report["max_logit_error"] <= report["tolerance"]
        assert json.loads((tmp_path / "export" / report["format"] / "export.json").read_text())["weights"]
        assert f"exported {report['format']}" in done.stdout


def test_wanted_formats_are_checked_before_the_first_edit():
    assert formats_wanted(compose()) == []
    assert formats_wanted(compose("export=lora")) == ["lora"]
    assert formats_wanted(compose("export=[full,delta]")) == ["full", "delta"]
    with pytest.raises(UserError, match="unknown export 'ggml'"):
        formats_wanted(compose("export=ggml"))
    with pytest.raises(UserError, match="only exported for a model that was loaded from one"):
        formats_wanted(compose("export=gguf"))


def test_a_failed_export_does_not_cost_the_run_its_results(tmp_path, bundled, monkeypatch):
    monkeypatch.setattr(exporting_task, "choice", str)  # there is no command line here
    module, _ = edited(bundled, "rome", [0], RECT(keep=0.2), edits=1)
    stream = BundledWorld(num_edits=1)
    stream.setup()
    (tmp_path / "edits.jsonl").write_text('{"applied": true}\n')
    reports = export_all(["lora", "delta"], compose(), tmp_path, module, stream, Console(quiet=True))
    assert "not of low rank" in reports[0]["failed"]
    assert (tmp_path / "export" / "delta" / FILE).exists()
    with pytest.raises(UserError, match="the run is complete, but export=lora failed"):
        raise_failed(reports)
