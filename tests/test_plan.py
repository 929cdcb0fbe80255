"""The plan's figures against what the same computation does, and its word on what would not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, ROOT, load_path
from hydra.utils import instantiate
from test_configs import compose, options
from test_fuzz import command_line
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from prune_lightning.callbacks import Restraint
from prune_lightning.costs import Cost, Machine
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.tasks.counting import Counter, ShapeModel
from prune_lightning.tasks.plan import Needs


@pytest.fixture(scope="module")
def shapes() -> ShapeModel:
    return ShapeModel(AutoConfig.from_pretrained(load_path()), torch.float32)


PLAN = ("experiment=plan", "data.num_edits=3")
SLOW = Machine(1e9, 1e9, 1e9, 1e-5)


def needs(shapes, *overrides, edits=5):
    config = compose("experiment=plan", f"data.num_edits={edits}", *overrides)
    stream = instantiate(config.data)
    stream.setup()
    return Needs.of(config, shapes, stream)


def test_work_on_the_meta_device_is_the_work_of_the_model(shapes, bundled_shared):
    """The same pass, once without numbers and once with them."""
    ids = torch.zeros(3, 11, dtype=torch.long)
    mask = torch.zeros(3, 1, 11, 11)
    with torch.no_grad(), Counter() as real:
        bundled_shared.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    counted = shapes.forward(3, 11, 33)
    assert counted.flops == pytest.approx(real.flops, rel=0.02)  # attention on the CPU is one kernel, not counted
    weights = sum(p.numel() for n, p in bundled_shared.model.named_parameters() if n.startswith("transformer.h"))
    assert counted.flops == pytest.approx(2 * 33 * (weights + 2048 * 192), rel=0.03)
    assert real.operations <= counted.operations < 2 * real.operations, "attention falls into its parts there"
    step = shapes.step(1, 3, 11, 33)
    assert counted.flops < 2 * step.flops < 3 * counted.flops, "half of the blocks, forwards and backwards"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_counted(family, tiny):
    shapes = ShapeModel(tiny(family).model.config, torch.float32)
    step = shapes.step(1, 2, 5, 4)
    assert step.flops > 0 < step.saved
    assert shapes.edited_shape(1) == (32, 32)


def test_memory_of_the_matrices_is_what_they_hold(shapes, bundled_shared, bundled):
    found = needs(shapes, "method=memit").memory()
    moments = {layer: SecondMoments(None).compute(bundled_shared, [layer])[layer] for layer in (0, 1)}
    held = sum(m.matrix.nbytes + m._cholesky.nbytes for m in moments.values())
    assert found["second moments"] == held
    parameters = {p.data_ptr(): p.nbytes for p in bundled.model.parameters()}
    assert found["weights"] == pytest.approx(sum(parameters.values()), rel=0.01)
    config = compose("method=memit").method
    module = instantiate(config, language_model=bundled, second_moments=SecondMoments(None), _convert_="all")
    matrices = module.edited_matrices().values()
    assert found["originals of edited matrices"] == sum(m._original.nbytes for m in matrices)
    assert found["masters of changes"] == sum(m.change.master.nbytes for m in matrices)


def test_methods_and_restraints_say_what_they_cost(shapes):
    memit, alpha = needs(shapes, "method=memit"), needs(shapes, "method=alphaedit")
    rome = needs(shapes, "method=rome", "restraint=none")
    seven = needs(shapes, "method=memit", "method.accumulate_past_keys=true")
    square = sum(n * n * 8 for _, n in memit.cost.matrices)
    assert "protected keys" not in memit.memory()
    assert (seven.memory()["protected keys"], alpha.memory()["protected keys"]) == (square, 2 * square)
    assert rome.memory()["restraint"] == 0 < memit.memory()["restraint"]
    assert needs(shapes, "restraint=rect").memory()["restraint"] == 5 * 192 * 768 * 4
    few, many = (needs(shapes, "method=memit", edits=n) for n in (5, 500))
    assert many.disk()["ledger of edits"] == 100 * few.disk()["ledger of edits"]
    fast = Machine(2e9, 2e9, 2e9, 5e-6)
    for each in (memit, alpha, rome):
        assert sum(each.seconds(SLOW).values()) == pytest.approx(2 * sum(each.seconds(fast).values()))
    seldom = needs(shapes, "restraint.schedule=every_n", "restraint.every_n=4").seconds(SLOW)["restraint"]
    assert seldom == pytest.approx(needs(shapes).seconds(SLOW)["restraint"] / 4)
    assert needs(shapes, "restraint=prune_end").seconds(SLOW)["restraint"] == 0


def test_batches_share_their_passes(shapes):
    alone = needs(shapes, "method=memit", edits=20)
    batched = needs(shapes, "method=memit", "data.protocol=sequential_batched", "data.batch_size=5", edits=20)
    one, five = alone.seconds(SLOW), batched.seconds(SLOW)
    assert five["values"] < one["values"]
    assert five["writing"] < one["writing"] / 2
    each = needs(shapes, "method=rome", "data.protocol=sequential_batched", "data.batch_size=5", edits=20)
    assert each.seconds(SLOW)["values"] == needs(shapes, "method=rome", edits=20).seconds(SLOW)["values"]


@pytest.mark.parametrize("method", options("method"))
def test_every_shipped_method_can_be_planned(method, shapes, bundled):
    """The matrices that it says it edits are those that it edits."""
    found = needs(shapes, f"method={method}")
    assert not found.cost.unknown
    assert all(amount > 0 for amount in (*found.memory().values(), *found.disk().values()))
    weights = bool(found.cost.matrices)
    assert set(found.seconds(SLOW)) > {"writing", "restraint"} or not weights
    assert ("originals of edited matrices" in found.memory()) == weights
    assert all(seconds > 0 for seconds in found.seconds(SLOW).values())
    config, given = compose(f"method={method}").method, {"language_model": bundled}
    if "second_moments" in config:
        given["second_moments"] = SecondMoments(None)
    module = instantiate(config, _convert_="all", **given)
    edited = sorted(tuple(matrix.original().shape) for matrix in module.edited_matrices().values())
    assert sorted(found.cost.matrices) == edited


@pytest.mark.parametrize("option", [name for name in options("restraint") if name != "none"])
def test_every_shipped_restraint_can_be_planned(option, shapes):
    for method in ("rome", "ft_m"):  # of low rank, and dense
        assert needs(shapes, f"method={method}", f"restraint={option}").memory()["restraint"] > 0


@pytest.mark.parametrize(
    ("words", "packed"),
    [
        ("method=rome", True),
        ("method=ft_m", True),
        ("method=ft_m method.layers=[1,2]", False),
        ("method=memoir", True),
        ("method=wise", True),
        ("method=grace", False),  # its YAML for this model names another module than the down-projection
        ("method=grace method.module=null", True),
        ("method=elder", False),
    ],
)
def test_packed_weights_are_counted_where_lean_blocks_run(words, packed, shapes, monkeypatch):
    monkeypatch.setattr(type(shapes), "packed_bytes", lambda self, layer: 7)
    assert needs(shapes, *words.split()).memory().get("packed weights") == (7 if packed else None)


def test_more_steps_and_layers_cost_more(shapes):
    for method in ("ft_m", "lora"):
        few, many = (needs(shapes, f"method={method}", f"method.steps={n}").seconds(SLOW) for n in (10, 40))
        assert 3 < many["training"] / few["training"] < 4.1
    low, high = (needs(shapes, "method=kn", f"method.layers=[{n}]").seconds(SLOW)["attribution"] for n in (0, 3))
    assert high < low
    narrow, wide = (needs(shapes, "method=mend", f"method.network.rank={n}").memory()["network"] for n in (8, 80))
    assert narrow < wide


class Silent:
    """A method that says nothing of its costs."""


class Talkative:
    """A method that does."""

    @classmethod
    def cost(cls, model, stream, *, layers, **options):
        return Cost([model.edited_shape(layer) for layer in layers], memory={"table": 123.0})


def test_a_method_from_outside_is_asked_too_and_one_that_is_silent_counted_with_what_is_known(shapes, monkeypatch):
    monkeypatch.setattr("prune_lightning.methods.rome.ROME", Silent)
    silent = needs(shapes, "method=rome", "method.layers=[1,2]")
    assert silent.cost.unknown
    assert silent.memory()["originals of edited matrices"] == 2 * 192 * 768 * 4
    assert set(silent.seconds(SLOW)) == {"writing", "restraint"}
    monkeypatch.setattr("prune_lightning.methods.rome.ROME", Talkative)
    assert needs(shapes, "method=rome").memory()["table"] == 123.0


def test_a_restraint_that_is_silent_is_counted_with_dense_copies(shapes):
    class Own(Restraint):
        def restrain(self, matrix):
            pass

    assert Own().cost(needs(shapes, "method=memit").kept).memory == 2 * 192 * 768 * 4


def test_plan_of_a_large_model_says_what_does_not_fit(tmp_path, capsys):
    """Llama-3-8B's shape, from a configuration alone."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "model")
    arguments = ("experiment=plan", "model=llama-3-8b", f"model.path={tmp_path / 'model'}", "method=memit")
    code = command_line(tmp_path / "run", *arguments, "machine=h100", "plan.tflops=300", "plan.memory_gb=24")
    shown = capsys.readouterr().out
    assert code == 0
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert found["memory_bytes"]["weights"] == pytest.approx(16.06e9, rel=0.001)
    assert found["memory_bytes"]["second moments"] == 5 * 2 * 14336**2 * 8
    assert found["disk_bytes"]["statistics, kept"] == 5 * 14336**2 * 4
    assert found["machine"]["flops"] == 3e14
    assert [line.partition(":")[0] for line in found["does_not_fit"]] == ["memory"]
    assert "plan.disk_gb=... says" in shown.replace("\n", " ")
    assert "memory: " in shown.replace("\n", " ")
    assert "4 characters a token" in shown


def test_what_is_kept_on_the_cpu_is_compared_with_its_memory(tmp_path, capsys):
    LlamaConfig(
        hidden_size=64, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, vocab_size=99
    ).save_pretrained(tmp_path / "model")
    arguments = ["experiment=plan", "machine=h100", "model=llama-3-8b", f"model.path={tmp_path / 'model'}"]
    arguments += ["method=memit", "method.layers=[1,2]", "model.second_moments.on_cpu=true", "data.num_edits=3"]
    assert command_line(tmp_path / "unknown", *arguments) == 0
    assert "plan.cpu_memory_gb" in capsys.readouterr().out
    plan = json.loads((tmp_path / "unknown" / "plan.json").read_text())
    assert plan["does_not_fit"] == []
    assert plan["cpu_memory_bytes"]["second moments"] == 2 * 2 * 512**2 * 8  # moments and their factors
    needed = sum(plan["cpu_memory_bytes"].values())
    for name, share in (("enough", 1.01), ("short", 0.99)):
        assert command_line(tmp_path / name, *arguments, f"plan.cpu_memory_gb={share * needed / 1e9}") == 0
        problems = json.loads((tmp_path / name / "plan.json").read_text())["does_not_fit"]
        assert [line.partition(":")[0] for line in problems] == (["memory of the CPU"] if name == "short" else [])


@pytest.mark.parametrize("machine", ["h100", "here"])
def test_disk_is_compared_with_what_there_is(machine, tmp_path, monkeypatch):
    """A card's machine has another disk than the one that plans, which is full here."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1))

    def unfit(*arguments):
        assert command_line(tmp_path / "run", *PLAN, f"machine={machine}", *arguments) == 0
        plan = json.loads((tmp_path / "run" / "plan.json").read_text())
        assert 0 < sum(plan["disk_bytes"].values()) < 1e9
        return [line.partition(":")[0] for line in plan["does_not_fit"]]

    assert unfit() == (["disk"] if machine == "here" else [])
    assert unfit("plan.disk_gb=1") == []
    assert unfit("plan.disk_gb=1e-9") == ["disk"]


# The peak of a process includes what the one that started it held then, and the tests may hold more than a run.
STARTER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_of(*arguments):
    """Run `train.py` from a small process and return its largest resident memory in bytes."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    started = subprocess.run([sys.executable, "-c", STARTER, *command], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return int(started.stdout) * 1024


# Moments, their factors, inverses, originals and masters are two thirds of what the run takes beside the libraries.
MIDDLE = {
    "memit": ((384, 2304, 6), ["method.layers=[1,2,3]"]),
    "memit with past keys": ((512, 1792, 10), ["method.layers=[2,3]", "method.accumulate_past_keys=true"]),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of the resident memory is another")
@pytest.mark.parametrize("name", MIDDLE)
def test_a_run_takes_the_memory_of_its_plan(name, tmp_path):
    (hidden, intermediate, depth), options = MIDDLE[name]
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(load_path()).save_pretrained(tmp_path / "model")
    arguments = ["model=llama-3-8b", f"model.path={tmp_path / 'model'}", "method=memit", *options, "data.num_edits=3"]
    arguments += ["model.second_moments.corpus=null", "method.value.steps=3", "method.contexts.lengths=[[5,1]]"]
    arguments += [
        "evaluation.everyday.enabled=false",
        "evaluation.legacy.enabled=false",
        "progress=false",
        "control=false",
    ]
    peak_of("experiment=plan", *arguments, f"hydra.run.dir={tmp_path / 'plan'}")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())["memory_bytes"]
    measured = peak_of(*arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert sum(plan.values()) > 1.5 * plan["libraries"], "the plan is of something"
    assert sum(plan.values()) == pytest.approx(measured, rel=0.2), plan


@pytest.mark.parametrize("machine", [name for name in options("machine") if name != "here"])
def test_a_preset_gives_one_answer(machine, tmp_path, monkeypatch):
    monkeypatch.setattr("prune_lightning.tasks.machine.measure", None)  # nothing may be measured
    found = []
    for name in ("one", "two"):
        assert command_line(tmp_path / name, *PLAN, f"machine={machine}") == 0
        found.append((tmp_path / name / "plan.json").read_bytes())
    assert found[0] == found[1]
    card, plan = compose("experiment=plan", f"machine={machine}").machine, json.loads(found[0])
    dtype = "float32"  # the bundled model's, on every machine
    expected = {"flops": card.tflops[dtype] * 1e12, "flops64": card.tflops.float64 * 1e12}
    expected |= {"bandwidth": card.bandwidth_gb_s * 1e9, "overhead": card.overhead_us * 1e-6, "name": card.name}
    assert plan["machine"] == pytest.approx(expected)
    assert plan["memory_bytes"]["libraries"] == card.libraries_gb * 1e9


def test_each_figure_of_the_machine_can_be_set(tmp_path, monkeypatch, shapes, capsys):
    figures = ("plan.tflops=2", "plan.tflops64=1", "plan.bandwidth_gb_s=100", "plan.overhead_us=5")
    monkeypatch.setattr("prune_lightning.tasks.machine.measure", None)
    assert command_line(tmp_path / "here", *PLAN, *figures, "trainer=gpu", "plan.memory_gb=8") == 0
    plan = json.loads((tmp_path / "here" / "plan.json").read_text())
    machine = Machine(2e12, 1e12, 1e11, 5e-6)
    assert {name: plan["machine"][name] for name in vars(machine)} == pytest.approx(vars(machine))
    assert plan["seconds_per_edit"] == pytest.approx(needs(shapes, edits=3).seconds(machine))
    assert "1.05 to 1.35 times the time per edit" in plan["range_of_error"]
    assert plan["range_of_error"] in capsys.readouterr().out
    assert command_line(tmp_path / "card", *PLAN, "machine=l4", "plan.bandwidth_gb_s=1000") == 0
    plan = json.loads((tmp_path / "card" / "plan.json").read_text())
    assert (plan["machine"]["bandwidth"], plan["machine"]["flops64"]) == (1e12, 0.49e12)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("trainer=gpu",),
            "there is no GPU here to measure: choose a machine (machine=h100), or give plan.memory_gb=..",
        ),
        (("plan.tflops=a",), "plan.tflops is expected to be a number above 0 or null, but got 'a'"),
        (("plan.overhead_us=-1",), "plan.overhead_us is expected to be a number above 0 or null, but got -1"),
        (("machine=h101",), "unknown option machine=h101: did you mean 'h100'"),
    ],
)
def test_machines_that_cannot_be_planned_for(arguments, line, tmp_path, capsys):
    if "trainer=gpu" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line(tmp_path / "run", *PLAN, *arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_a_card_plans_in_the_dtype_of_its_accelerator(tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4, vocab_size=99
    )
    config.save_pretrained(tmp_path / "model")
    arguments = (*PLAN, "model=llama-3-8b", f"model.path={tmp_path / 'model'}", "method.layers=[1]")
    for machine, size in (("h100", 2), ("laptop-cpu", 4)):
        assert command_line(tmp_path / machine, *arguments, f"machine={machine}") == 0
        plan = json.loads((tmp_path / machine / "plan.json").read_text())
        assert plan["memory_bytes"]["originals of edited matrices"] == size * 64 * 64


def test_what_cannot_be_planned_is_reported(shapes, tmp_path, capsys):
    config = compose("experiment=plan", "method.layers=[9]")
    stream = BundledWorld(num_edits=1)
    stream.setup()
    with pytest.raises(UserError, match="layer 9 is outside"):
        Needs.of(config, shapes, stream)
    assert command_line(tmp_path / "run", "experiment=plan", "model.path=./nowhere") == 2
    assert "no folder './nowhere'" in capsys.readouterr().err
