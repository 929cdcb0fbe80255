"""General abilities: the legacy protocol, lm-evaluation-harness on the live model, ME-PPL."""

from __future__ import annotations

import json
import math
import statistics

import distributed_abilities
import hydra
import pytest
import torch
from conftest import SHARED
from test_configs import compose
from test_distributed import in_two_processes

from prune_lightning.bundled.abilities import plain_text
from prune_lightning.errors import UserError
from prune_lightning.evaluation import harness, legacy, legacy_tasks
from prune_lightning.evaluation.harness import HarnessTasks
from prune_lightning.evaluation.legacy_tasks import LegacyItem
from prune_lightning.evaluation.me_ppl import SentencePerplexities
from prune_lightning.evaluation.miniature import MiniatureAbilities
from prune_lightning.evaluation.scoring import Continuations, continue_greedily
from prune_lightning.metrics import SentencePerplexity

DATA = SHARED / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="real records are not on this machine")
FILES = {
    "gsm8k": DATA / "task_reasoning_gsm8k.jsonl",
    "samsum": DATA / "task_summarization_samsum.json",
    "nq": DATA / "task_open_domain_qa_nq.jsonl",
    "rte": DATA / "task_nli_rte.tsv",
}
CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O
. . O O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
Paris NNP B-NP B-LOC
EU NNP B-NP B-ORG"""


def measurement(name, *overrides):
    config = compose("evaluation=editing", *(f"evaluation.{name}.{override}" for override in overrides))
    return hydra.utils.instantiate(config.evaluation[name], _convert_="all")


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def scripted(monkeypatch, answer):
    """Let ``answer(prompt)`` speak for the model; ``None`` stands for logits that are not finite."""

    def said(model, prompts, max_new_tokens, **kwargs):
        texts = [answer(prompt) for prompt in prompts]
        sound = [text is not None for text in texts]
        return Continuations([text or "" for text in texts], sound, [False] * len(texts))

    monkeypatch.setattr(legacy, "continue_greedily", said)


# -- legacy -----------------------------------------------------------------------------------------------------------
@real
def test_prompts_and_gold_answers_of_real_records():
    suite = measurement("legacy", *(f"tasks.{name}.path={path}" for name, path in FILES.items()))
    assert {name: len(items) for name, items in suite.items.items()} == {
        "gsm8k": 300,
        "samsum": 149,
        "nq": 261,
        "rte": 299,
    }
    assert tuple(suite.tasks) == ("gsm8k", "samsum", "nq", "rte")
    assert suite.tasks["rte"] == 158 / 299  # always "false"
    # "5" is in "15", and any two summaries share some words.
    assert {name: round(suite.tasks[name], 2) for name in ("gsm8k", "samsum", "nq")} == {
        "gsm8k": 0.02,
        "samsum": 0.05,
        "nq": 0.0,
    }
    first = {name: items[1] for name, items in suite.items.items()}
    assert first["gsm8k"].prompt.startswith("Q: A robe takes 2 bolts")
    assert first["gsm8k"].prompt.endswith("<<2+1=3>>3 bolts of fabric\n Therefore, the answer (arabic numerals) is:")
    assert first["gsm8k"].gold == ("3",)
    assert first["samsum"].prompt.endswith("\nTL;DR:")
    assert suite.items["nq"][2].gold == ("Olivia", "MFSK")
    assert first["nq"].prompt.startswith(
        "Refer to the passage below and answer the following question. Passage: \n\nThe"
    )
    assert first["nq"].prompt.endswith(" Question: when is the next deadpool movie being released?. Answer:")
    assert first["rte"].prompt.endswith("leader of the Roman Catholic Church.. True or False? answer:")
    assert [item.gold[0] for item in suite.items["rte"][:2]] == ["false", "true"]
    # The flaws that the documentation speaks of, on the records that are here.
    plain = [(item.prompt.replace(",", ""), item.gold[0].replace(",", "")) for item in suite.items["gsm8k"]]
    assert sum(number in prompt for prompt, number in plain) == 299
    assert statistics.mean(item.gold == ("false",) for item in suite.items["rte"]) == pytest.approx(158 / 299)


@real
def test_scripted_answers_get_the_scores_they_deserve(monkeypatch):
    suite = measurement("legacy", "max_items=4", *(f"tasks.{name}.path={path}" for name, path in FILES.items()))
    right = {item.prompt: item.gold[0] for items in suite.items.values() for item in items}
    scripted(monkeypatch, right.get)
    scores = suite.measure(None).scores
    assert scores == {
        **{
            "gsm8k": 1.0,
            "samsum": 1.0,
            "samsum_bleu": 1.0,
            "nq": 1.0,
            "rte": 1.0,
            "rte_unparsable": 0.0,
            "rte_parsed": 1.0,
        },
        **{f"{name}_nonfinite": 0.0 for name in FILES},
    }
    half = {item.prompt for items in suite.items.values() for item in items[:2]}
    scripted(monkeypatch, lambda prompt: right[prompt] if prompt in half else None)
    halved = suite.measure(None)
    for name in FILES:
        assert halved.scores[name] == halved.scores[f"{name}_nonfinite"] == 0.5
    assert (halved.scores["rte_parsed"], halved.scores["rte_unparsable"]) == (1.0, 0.5)
    for name in halved.scores:  # each score is the mean of the rows that bear its name
        assert statistics.mean(row[name] for row in halved.cases if name in row) == pytest.approx(halved.scores[name])
    assert [row["case"] for row in halved.cases if row["task"] == "nq"] == [0, 1, 2, 3]


@real
def test_bundled_model_runs_every_real_task(bundled_shared):
    suite = measurement("legacy", "max_items=2", *(f"tasks.{name}.path={path}" for name, path in FILES.items()))
    with pytest.warns(UserWarning, match="prompts of samsum are longer than the model's context"):
        measured = suite.measure(bundled_shared)
    assert set(measured.scores) >= set(FILES)
    assert all(0 <= score <= 1 for score in measured.scores.values())
    row = next(row for row in measured.cases if row["task"] == "rte")
    alone = continue_greedily(bundled_shared, [suite.items["rte"][0].prompt], max_new_tokens=1)
    assert row["text"] == alone.texts[0]


def test_tasks_without_real_records(tmp_path, monkeypatch):
    """BoolQ, MuTual, SST-2 and CoNLL03, from files in their own formats."""
    boolq = written(tmp_path / "boolq.jsonl", [{"passage": "p", "question": "q", "answer": a} for a in (True, False)])
    (tmp_path / "mutual").mkdir()
    for number, answer in ((2, "B"), (10, "D")):
        record = {"answers": answer, "options": ["w", "x", "y", "z"], "article": f"m : {number}", "id": "dev"}
        (tmp_path / "mutual" / f"dev_{number}.txt").write_text(json.dumps(record))
    (tmp_path / "sst2.tsv").write_text('sentence\tlabel\n"good\t1\nbad \t0\n')
    (tmp_path / "ner.txt").write_text(CONLL)
    paths = {"boolq": boolq, "mutual": tmp_path / "mutual", "sst2": tmp_path / "sst2.tsv", "ner": tmp_path / "ner.txt"}
    suite = measurement("legacy", *(f"tasks.{name}.path={path}" for name, path in paths.items()))
    assert [item.gold for item in suite.items["boolq"]] == [("yes",), ("no",)]
    assert [item.gold for item in suite.items["mutual"]] == [("B",), ("D",)]
    assert "(A)w(B)x(C)y(D)z A: Among A through D, the answer is" in suite.items["mutual"][0].prompt
    assert [item.gold for item in suite.items["sst2"]] == [("positive",), ("negative",)]
    assert 'text: "good answer:' in suite.items["sst2"][0].prompt
    (tmp_path / "mutual" / "dev_11.txt").write_text('{"answers": "A"}')
    with pytest.raises(UserError, match=r"mutual: .*dev_11.txt', line 1: the key 'article' is missing"):
        measurement_of("mutual", tmp_path / "mutual")
    entities = [(item.kind, item.gold[0]) for item in suite.items["ner"]]
    assert entities == [
        ("organization", "EU"),
        ("miscellaneous", "German"),
        ("person", "Peter Blackburn"),
        ("location", "Paris"),
        ("organization", "EU"),
    ]
    assert suite.items["ner"][0].prompt == (
        "Please identify Organization Entity from the given text. Text: EU rejects German call. Entity:"
    )
    said = {"Organization": "EU.", "Miscellaneous": "", "Person": "Peter", "Location": "in Paris"}
    scripted(
        monkeypatch, lambda prompt: next((text for kind, text in said.items() if f"{kind} Ent" in prompt), " Yes D")
    )
    scores = suite.measure(None).scores
    assert [scores[f"ner_{kind.lower()}"] for kind in said] == [1.0, 0.0, 0.0, 1.0]
    assert scores["ner"] == 0.5
    assert (scores["boolq"], scores["boolq_unparsable"], scores["boolq_parsed"]) == (0.0, 1.0, 0.0)
    assert (scores["mutual"], scores["mutual_parsed"], scores["sst2_unparsable"]) == (0.5, 0.5, 1.0)


def scorer(kind, **options):
    defaults = {"path": None, "prompt": "", "max_new_tokens": 1, "gold": "answer"}
    return kind(**(defaults | options))


@pytest.mark.parametrize(
    ("task", "text", "gold", "expected"),
    [
        (scorer(legacy_tasks.NumberAfterSolution), " $15.", ("5",), 1.0),  # a flaw of the protocol
        (scorer(legacy_tasks.NumberAfterSolution), "seven", ("7",), 0.0),
        (scorer(legacy_tasks.AnswerSpan), "It was  Wilhelm C. Röntgen, in 1901", ("Wilhelm C Röntgen",), 1.0),
        (scorer(legacy_tasks.AnswerSpan), "the Beatles", ("Beatle",), 0.0),
        (scorer(legacy_tasks.AnswerSpan), "", ("The",), 0.0),  # nothing is left of this alias
        (scorer(legacy_tasks.AnswerSpan, after="Answer:"), "Paris. Answer: Rome", ("Paris",), 0.0),
        (scorer(legacy_tasks.Choice, labels={"1": "true", "0": "false"}, ignore_case=True), "True", ("true",), 1.0),
        (scorer(legacy_tasks.Choice, labels={"1": "yes", "0": "no"}, whole=True), "not", ("no",), 0.0),
        (scorer(legacy_tasks.Choice, labels={"1": "yes", "0": "no"}, whole=True), "no", ("no",), 1.0),
        # unigrams 2/3 and 2/4 in common: F1 4/7; bigrams 1/2 and 1/3: 2/5; longest common subsequence 2: 4/7
        (scorer(legacy_tasks.Summary), "the cat ran", ("the cat sat down",), (4 / 7 + 2 / 5 + 4 / 7) / 3),
        (scorer(legacy_tasks.Summary), "The cat.", ("the cat",), 0.0),  # capitals and full stops count
    ],
)
def test_scorers_by_hand(task, text, gold, expected):
    assert task.score(text, LegacyItem(0, "", gold))[""] == pytest.approx(expected)


def test_bleu_of_the_whole_summary_and_of_none_of_it():
    task = scorer(legacy_tasks.Summary)
    gold = LegacyItem(0, "", ("a b c d e f",))
    assert task.score("a b c d e f", gold)["bleu"] == pytest.approx(1.0)
    # precisions 4/4, 3/3, 2/2, 1/1 and a brevity penalty exp(1 - 6/4)
    assert task.score("a b c d", gold)["bleu"] == pytest.approx(math.exp(-0.5))
    assert task.score("", gold) == {"": 0.0, "bleu": 0.0}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gsm8k", '{"question": "q", "answer": "1 #### 1"}\n{"question": "q"}', "line 2: the key 'answer' is missing"),
        ("gsm8k", '{"question": "q", "answer": "one"}', "line 1: .* has no '#### '"),
        ("gsm8k", "\n{oops", "line 2: not JSON"),
        ("gsm8k", "", "holds no item"),
        ("nq", '{"question": "q", "answer": [], "output": ["p"]}', "line 1: the answer .* is empty"),
        ("nq", '{"question": "q", "answer": ["a"], "output": []}', "line 1: list index out of range"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\tmaybe", "line 2: the label 'maybe' is none of 'entailment'"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb", "line 2: 2 columns, not 3"),
        ("ner", "Bonn NNP B-NP B-CITY\n", "line 1: the label of type 'CITY'"),
    ],
)
def test_bad_files_are_named_by_line_and_reason(name, text, message, tmp_path):
    path = tmp_path / ("data.tsv" if name == "rte" else "data.json")
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        measurement_of(name, path)


def measurement_of(name, path):
    try:
        return measurement("legacy", f"tasks.{name}.path={path}")
    except hydra.errors.InstantiationException as error:
        raise error.__cause__ from error


def test_nan_model_scores_nothing_and_is_counted(bundled, tmp_path):
    passage = {"question": "who", "answer": ["Claude Monet"], "output": ["Claude Monet was a painter."]}
    suite = measurement("legacy", f"tasks.nq.path={written(tmp_path / 'nq.jsonl', [passage])}")
    sentences = written(tmp_path / "me_ppl.jsonl", [{"Text": item.text()} for item in plain_text().test[:2]])
    ppl = measurement("me_ppl", f"path={sentences}")
    ppl.take_reference(bundled, {})
    before = ppl.measure(bundled).scores
    assert (suite.measure(bundled).scores["nq_nonfinite"], before["num_nonfinite"]) == (0.0, 0)
    assert before["collapse_absolute"] == before["collapse_relative"] == 0.0
    with torch.no_grad():
        bundled.rewrite_module(1).weight.fill_(float("nan"))
    measured = suite.measure(bundled)
    assert measured.scores == {"nq": 0.0, "nq_nonfinite": 1.0}
    assert measured.cases[0]["text"] == ""
    after = ppl.measure(bundled).scores
    assert after["num_nonfinite"] == 2
    assert after["collapse_absolute"] == after["collapse_relative"] == 1.0
    assert math.isinf(after["mean"])


def test_prompts_too_long_lose_their_beginning(bundled_shared):
    end = "By profession, Claude Monet was a"
    long = "The old king walked to the river. " * 60 + end
    said = continue_greedily(bundled_shared, [end, long], max_new_tokens=4)
    assert said.truncated == [False, True]
    assert said.finite == [True, True]
    ids = bundled_shared.tokens.encode(long)[-252:]
    expected = bundled_shared.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert said.texts[1] == bundled_shared.tokens.decode(expected[0, 252:]).strip()
    with pytest.raises(UserError, match="leave no room"):
        continue_greedily(bundled_shared, [end], max_new_tokens=256)


def test_nothing_is_read_or_taken_unless_asked_for(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: pytest.fail("looked for a library"))
    assert not any(measurement(name).enabled for name in ("legacy", "lm_eval", "me_ppl"))
    assert not measurement("legacy", "tasks.gsm8k.path=/nowhere", "enabled=false").items


# -- ME-PPL -----------------------------------------------------------------------------------------------------------
def test_me_ppl_equals_a_loop_over_sentences(bundled_shared, tmp_path):
    texts = [" The old king walked to the river.", "By profession, Claude Monet was a painter.", "The king saw Bob run"]
    path = written(tmp_path / "sentences.jsonl", [{"Text": text} for text in texts])
    measured = SentencePerplexities(str(path), token_budget=40).measure(bundled_shared)
    single, total, tokens = [], 0.0, 0
    for text in texts:
        ids = bundled_shared.tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = bundled_shared.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll = -sum(float(logits[i - 1, ids[i]]) for i in range(1, len(ids)))
        single.append(math.exp(nll / (len(ids) - 1)))
        total, tokens = total + nll, tokens + len(ids) - 1
    scores = measured.scores
    assert scores["mean"] == pytest.approx(statistics.mean(single), rel=1e-4)
    assert scores["median"] == pytest.approx(statistics.median(single), rel=1e-4)
    assert scores["max"] == pytest.approx(max(single), rel=1e-4)
    assert scores["corpus"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert [row["mean"] for row in measured.cases] == pytest.approx(single, rel=1e-4)
    assert scores["num_nonfinite"] == 0


def test_collapse_flags_have_their_thresholds():
    def flags(mean_nll, **options):
        metric = SentencePerplexity(**options)
        metric.update(torch.tensor(mean_nll), torch.ones(len(mean_nll), dtype=torch.long))
        return {name: float(value) for name, value in metric.compute().items() if "collapse" in name}

    assert flags([6.0, 7.0]) == {"collapse_absolute": 0.0}
    assert flags([6.0, 8.0]) == {"collapse_absolute": 1.0}  # the mean is ruled by one sentence
    assert flags([6.0, 8.0], absolute=2000.0) == {"collapse_absolute": 0.0}
    assert flags([2.0, 2.0], reference=1.0)["collapse_relative"] == 0.0
    assert flags([2.5, 2.5], reference=1.0)["collapse_relative"] == 1.0
    assert flags([2.5, 2.5], reference=1.0, relative=20.0)["collapse_relative"] == 0.0
    assert flags([0.0, float("inf")], reference=1.0) == {"collapse_absolute": 1.0, "collapse_relative": 1.0}


def test_median_of_an_even_number_and_overflow():
    metric = SentencePerplexity()
    metric.update(torch.tensor([1.0, 2.0, 4.0, 200.0]), torch.ones(4, dtype=torch.long))
    result = metric.compute()
    assert float(result["median"]) == pytest.approx((math.exp(2) + math.exp(4)) / 2)
    assert float(result["max"]) == pytest.approx(math.exp(200))  # beyond single precision, but finite
    assert int(result["num_nonfinite"]) == 0


def test_two_processes_measure_what_one_does(tmp_path):
    both = in_two_processes("distributed_abilities.py", tmp_path)
    for name, end in (("odd", 5), ("finite", 3), ("one", 1)):
        alone = SentencePerplexity(reference=2.0)
        alone.update(distributed_abilities.NLL[:end], distributed_abilities.COUNT[:end])
        expected = {key: float(value) for key, value in alone.compute().items()}
        for result in both:
            assert {key: float(value) for key, value in result[name].items()} == pytest.approx(expected)
    assert [result["said"] for result in both] == [{"rank": 0}, {"rank": 0}]
    assert [result["error"] for result in both] == ["RuntimeError: rank 0: no such task"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"Text": 3}', "line 1: expected a text under 'Text'"), ("[", "cut off"), ("", "no sentence")],
)
def test_bad_sentences_are_named(text, message, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=message):
        SentencePerplexities(str(tmp_path / "s.json"))


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    yield
    patch.undo()


def directly(model, folder, tasks, **options):
    """Return what lm-eval itself finds on the model saved to a folder."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model.model.save_pretrained(folder)
    model.tokens.tokenizer.save_pretrained(folder)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **seeds,
        **options,
    )


def local_tasks(folder):
    """gsm8k's and nq_open's own definitions on local files, and a task of one's own whose figure is continuous."""
    lm_eval = pytest.importorskip("lm_eval")
    own = harness.Path(lm_eval.__file__).parent / "tasks"
    questions = [{"question": f"What is {n} plus one?", "answer": f"It is so.\n#### {n + 1}"} for n in range(6)]
    facts = [{"question": f"who is {name}", "answer": [name, "Bob"]} for name in ("Ann", "Claude Monet", "Bob", "Eve")]
    files = {
        "gsm8k": written(folder / "gsm8k.jsonl", questions),
        "nq_open": written(folder / "nq_open.jsonl", facts),
        "king": written(folder / "king.jsonl", [{"text": f"The old king saw {n} rivers."} for n in range(6)]),
    }
    data = {"dataset_path": "json", "dataset_name": None}
    splits = {"gsm8k": ("train", "test"), "nq_open": ("train", "validation")}
    for name, used in splits.items():
        definition = {
            "include": str(own / name / f"{name}.yaml"),
            **data,
            "dataset_kwargs": {"data_files": {split: str(files[name]) for split in used}},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(definition))
    king = {
        "task": "king",
        **data,
        "dataset_kwargs": {"data_files": {"test": str(files["king"])}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    }
    choice = {
        "task": "choice",
        **data,
        "dataset_kwargs": {"data_files": {"test": str(files["king"])}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} The king saw a",
        "doc_to_target": 0,
        "doc_to_choice": ["river", "painter", "market"],
        "metric_list": [{"metric": "acc"}],
    }
    return [str(folder / "gsm8k.yaml"), str(folder / "nq_open.yaml"), king, choice]


def test_scores_are_those_of_lm_eval_on_the_saved_model(bundled, tmp_path, offline, capfd):
    tasks = local_tasks(tmp_path)
    options = {"limit": 5, "num_fewshot": 1, "gen_kwargs": {"max_gen_toks": 3}}
    suite = HarnessTasks(tasks, include_defaults=False, batch_size=4, **options)
    before = suite.measure(bundled)
    with torch.no_grad():  # an edit: answers must be new ones
        bundled.rewrite_module(1).weight.mul_(8.0)
    bundled.model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    capfd.readouterr()
    after = suite.measure(bundled)
    assert capfd.readouterr() == ("", "")
    assert bundled.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert "tie_weights" not in vars(bundled.model)
    bundled.model.eval()
    result = directly(bundled, tmp_path / "saved", tasks, **options)
    found = {f"{name}/{key}": value for name in result["results"] for key, value in harness.metrics(result, name)}
    assert after.scores == found
    assert set(found) == {
        "gsm8k/exact_match,strict-match",
        "gsm8k/exact_match,flexible-extract",
        "nq_open/exact_match,remove_whitespace",
        "king/word_perplexity",
        "king/byte_perplexity",
        "choice/acc",
    }
    chance = {"gsm8k/exact_match,strict-match": 0, "nq_open/exact_match,remove_whitespace": 0, "choice/acc": 1 / 3}
    assert suite.tasks == pytest.approx(chance)
    rows = [row for row in after.cases if row["task"] == "choice"]
    assert [row["case"] for row in rows] == [0, 1, 2, 3, 4]
    assert statistics.mean(row["choice/acc"] for row in rows) == after.scores["choice/acc"]
    for task in ("gsm8k", "nq_open"):
        said, said_before = ([row["text"] for row in m.cases if row["task"] == task] for m in (after, before))
        assert said == [sample["resps"][0][0] for sample in result["samples"][task][: len(said)]]
        assert said != said_before
    assert before.scores["king/word_perplexity"] != after.scores["king/word_perplexity"]
    assert not any("king/word_perplexity" in row for row in after.cases)  # no mean over documents


@real
def test_own_definitions_on_real_records(bundled_shared, tmp_path, offline):
    """A known task's dict of overrides, RTE from its TSV, and chosen documents."""
    own = harness.Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    (tmp_path / "rte.yaml").write_text(json.dumps({"include": str(own / "glue" / "rte" / "default.yaml")}))
    rte = {
        "task": "rte",
        "dataset_path": "csv",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": dict.fromkeys(("train", "validation"), str(FILES["rte"])),
            "sep": "\t",
            "quoting": 3,
        },
        "doc_to_target": "{{['entailment', 'not_entailment'].index(label)}}",
    }
    suite = HarnessTasks(
        [rte], include_defaults=False, include_path=str(tmp_path), samples={"rte": [1, 4, 7, 9, 299]}, batch_size=4
    )
    measured = suite.measure(bundled_shared)
    whole = dict(rte) | {"include": str(own / "glue" / "rte" / "default.yaml")}
    (tmp_path / "rte_local.yaml").write_text(json.dumps(whole))
    expected = directly(
        bundled_shared, tmp_path / "saved", [str(tmp_path / "rte_local.yaml")], samples={"rte": [1, 4, 7, 9, 299]}
    )
    assert measured.scores == {"rte/acc": expected["results"]["rte"]["acc,none"]}
    assert [row["case"] for row in measured.cases] == [1, 4, 7, 9, 299]


def test_untied_heads_stay_untied(tiny, offline, tmp_path):
    model = tiny("gpt2", torch.float32)
    model.model.config.tie_word_embeddings = True
    model.model.lm_head.weight = torch.nn.Parameter(model.model.lm_head.weight.detach() * 2.0)
    head = model.model.lm_head.weight
    suite = HarnessTasks([local_tasks(tmp_path)[2]], include_defaults=False, limit=1)
    suite.measure(model)
    assert suite.tasks == {}  # of a perplexity, more is not better
    assert model.model.lm_head.weight is head
    assert model.model.transformer.wte.weight is not head


def test_group_with_a_score_of_its_own_counts_as_one(bundled_shared, tmp_path, offline):
    choice = local_tasks(tmp_path)[3]
    pair = {
        "group": "pair",
        "task": [{**choice, "task": "first"}, {**choice, "task": "second", "doc_to_target": 1}],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    folder = tmp_path / "definitions"
    folder.mkdir()
    (folder / "pair.yaml").write_text(json.dumps(pair))
    suite = HarnessTasks(["pair"], include_defaults=False, include_path=str(folder), limit=2)
    scores = suite.measure(bundled_shared).scores
    assert suite.tasks == pytest.approx({"pair/acc": 1 / 3})  # the documents of both members have three choices
    assert scores["pair/acc"] == (scores["pair::first/acc"] + scores["pair::second/acc"]) / 2


def test_lm_eval_mistakes_are_explained(bundled_shared, tmp_path, offline, monkeypatch):
    king = local_tasks(tmp_path)[2]
    with pytest.raises(UserError, match="knows no task and no YAML file 'kingg'"):
        HarnessTasks(["kingg"], include_defaults=False).measure(bundled_shared)
    with pytest.raises(UserError, match="needs an entry `task`"):
        HarnessTasks([{"dataset_path": "json"}])
    lost = {**king, "task": "lost", "dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}
    with pytest.raises(UserError, match="cannot load the task 'lost'"):
        HarnessTasks([lost], include_defaults=False).measure(bundled_shared)
    with pytest.raises(UserError, match="king has no metric 'perplexity'"):
        HarnessTasks([king], include_defaults=False, limit=1, main={"king": "perplexity"}).measure(bundled_shared)
    with pytest.raises(UserError, match="either `limit` or `samples`"):
        HarnessTasks([king], limit=1, samples={"king": [0]})
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prune-lightning\[eval\]'"):
        HarnessTasks([king])


# -- the miniature ----------------------------------------------------------------------------------------------------
def test_miniature_rows_give_its_scores(bundled_shared):
    measured = MiniatureAbilities(max_items=5).measure(bundled_shared)
    for task in ("reasoning", "nli", "qa", "summarization"):
        rows = [row for row in measured.cases if row["task"] == task]
        assert [row["case"] for row in rows] == list(range(5))
        assert statistics.mean(row[task] for row in rows) == pytest.approx(measured.scores[task], abs=1e-6)
    assert {row["task"] for row in measured.cases} == {"reasoning", "nli", "qa", "summarization"}
