"""What can be known to fail is found before the first computation: before a baseline, a statistic or an edit."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import BUNDLED, SHARED, quiet_trainer
from test_fuzz import command_line
from test_guards import Counted

from prune_lightning.callbacks import EditEvaluation
from prune_lightning.data.corpus import TextCorpus
from prune_lightning.errors import UserError
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoments

QUICK = ("data.num_edits=1", "callbacks=none", "evaluation=editing", "progress=false")


@pytest.fixture
def computing(monkeypatch):
    """Make every pass of a model an error."""

    def refused(*args, **kwargs):
        pytest.fail("the model was run")

    monkeypatch.setattr(LanguageModel, "__call__", refused)
    monkeypatch.setattr(torch.nn.Module, "__call__", refused)


LIKE_A_USERS_MODEL = ("model=auto", f"model.path={BUNDLED}")
FAILING = [
    (
        ("restraint=rect", "export=lora"),
        "export=lora holds changes of low rank only, and those of restraint=rect are",
    ),
    (("restraint=rect", "export=[full,lora]"), "export=lora holds changes of low rank only"),
    (("method=ft_m", "export=lora"), "those of method=ft_m are not; export full or delta"),
    (("method=ft", "restraint=rect", "export=lora"), "those of method=ft and restraint=rect are not"),
    (("data.protocol=single", "export=full"), "data.protocol=single leaves no edited model"),
    (
        ("data.protocol=single", "restraint=none", "bisect_collapse=true"),
        "bisect_collapse rebuilds states along",
    ),
    (("restraint=prune_end", "bisect_collapse=true"), "bisect_collapse rebuilds earlier states: it needs ledger=true"),
    (
        ("evaluation.wild.enabled=true", "evaluation.wild.max_new_tokens=5000"),
        "evaluation.wild.max_new_tokens: 5000",
    ),
    (("evaluation.generation.enabled=true",), "edit/generation: no request has `generation_prompts`"),
    (("evaluation.me_ppl.path=./nowhere",), "no file 'nowhere'"),
    (("evaluation.legacy.tasks.gsm8k.path=./nowhere",), "no file 'nowhere'"),
    (("method=mend", "method.hypernetwork=./nowhere"), "method.hypernetwork: no "),
    (("method=serac", "restraint=none", "method.path=./nowhere"), "method.path: no serac.safetensors in"),
    (("method=lora", "method.target_modules=[foo]"), "no module 'foo' in transformer.h.0"),
    (
        (
            *LIKE_A_USERS_MODEL,
            "+model.edit.sources.rome={paper: 3}",
        ),
        "model.edit.sources.rome is expected to be one of published, tuned,",
    ),
    (
        (
            *LIKE_A_USERS_MODEL,
            "+model.edit.sources.rome=paper",
        ),
        "model.edit.sources.rome is expected to be one of published, tuned,",
    ),
    (
        (
            *LIKE_A_USERS_MODEL,
            "+model.edit.sources.rome={tuned: a, default: b}",
        ),
        "model.edit.sources.rome is expected to be one of",
    ),
    (("method.layers=[99]",), "layer 99 is outside the model's layers 0 to 3"),
    (("model.second_moments.shipped=./nowhere",), "model.second_moments.shipped: there is no folder"),
    (
        ("callbacks=guards", "callbacks.guards.perplexity.path=./nowhere"),
        "guards.perplexity.path: 'nowhere' cannot be read",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), FAILING, ids=lambda value: value[-1] if isinstance(value, tuple) else ""
)
def test_what_cannot_go_well_is_refused_at_once(arguments, message, computing, tmp_path, capsys):
    assert command_line(tmp_path / "run", *QUICK, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run" / "metrics.csv").exists(), "no logger was started"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist: did you mean 'missing.text'?"),
        ("bad.txt", b"good\nb\xf6se\n", "line 2: 'utf-8' codec can't decode"),
        ("empty.txt", b" \n\n", "holds no text"),
        ("cut.jsonl", b'{"text": "a"}\n\n{"text": "b', "line 3: Unterminated string"),
        (
            "key.jsonl",
            b'{"text": "a"}\n{"txt": "b"}\n',
            "line 2: expected an object with a text under 'text'",
        ),
        ("null.jsonl", b'{"text": null}\n', "line 1: expected an object with a text under 'text'"),
        ("list.jsonl", b'["a"]\n', "line 1: expected an object with a text under 'text', but got ['a']"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_found_at_once(name, content, message, computing, tmp_path, capsys):
    path = tmp_path / name
    if content is None:
        (tmp_path / "missing.text").touch()
    else:
        path.write_bytes(content)
    arguments = (
        *LIKE_A_USERS_MODEL,
        f"model.second_moments.corpus.path={path}",
        "model.second_moments.corpus.name=null",
    )
    assert command_line(tmp_path / "run", *QUICK, *arguments, f"model.second_moments.cache={tmp_path}/cache") == 2
    assert message in capsys.readouterr().err


def test_a_corpus_is_as_long_as_its_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ntwo\n".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n')
    corpus = TextCorpus(str(tmp_path))
    assert (len(corpus), [text.strip() for text in corpus.texts()]) == (3, ["one", "two", "three"])
    assert len(TextCorpus(str(tmp_path), samples=2)) == 2


def test_a_data_set_out_of_reach_is_found_at_once(computing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prune_lightning.data.corpus.hub_is_offline", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    sys.modules["datasets"].load_dataset = None
    arguments = (*LIKE_A_USERS_MODEL, "model.second_moments.fallback=false", f"model.second_moments.cache={tmp_path}/c")
    assert command_line(tmp_path / "run", *QUICK, *arguments) == 2
    assert "the statistics corpus 'wikimedia/wikipedia' is no local file, and the hub cannot be reached; give " in (
        capsys.readouterr().err
    )


def test_a_cache_that_cannot_be_written_is_found_at_once(bundled_shared, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "corpus.txt").write_text("Ann plays the oboe.\n")
    moments = SecondMoments(TextCorpus(str(tmp_path / "corpus.txt")), cache=tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"model\.second_moments\.cache: .* cannot be written"):
        moments.check(bundled_shared, [0])


def test_moments_that_are_kept_need_no_corpus(bundled_shared, tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("Ann plays the oboe.\n" * 9)
    corpus = TextCorpus(str(tmp_path / "corpus.txt"))
    moments = SecondMoments(corpus, cache=tmp_path / "cache")
    moments.compute(bundled_shared, [0])
    monkeypatch.setattr(TextCorpus, "check", lambda self: pytest.fail("the corpus was read"))
    moments.check(bundled_shared, [0])
    (damaged,) = (tmp_path / "cache").rglob("layer_0.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(UserError, match="is damaged"):
        moments.check(bundled_shared, [0])


def test_a_method_is_prepared_before_the_baseline(tiny):
    class Prepared(Counted):
        def prepare(self):
            raise UserError("no null space")

    class Baseline(EditEvaluation):
        def on_train_start(self, trainer, pl_module):
            pytest.fail("the baseline came first")

    from test_conformance import REQUESTS
    from torch.utils.data import DataLoader

    from prune_lightning.types import EditBatch

    loader = DataLoader([EditBatch(REQUESTS[:1])], batch_size=None)
    with pytest.raises(UserError, match="no null space"):
        quiet_trainer(Baseline([1])).fit(Prepared(tiny("gpt2"), [1]), loader)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not part of the project")
def test_real_prose_is_a_corpus():
    corpus = TextCorpus(str(SHARED / "data" / "wiki_text.txt"))
    corpus.check()
    assert len(corpus) == 1500
