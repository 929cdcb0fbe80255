"""IKE: what is asked in place of a prompt, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import BUNDLED

from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.scoring import score_encoded, score_pairs
from prune_lightning.methods.ike import IKE, shown_as
from prune_lightning.methods.retrieval import HiddenStates, SharedWords, SubjectWords, general_sentences
from prune_lightning.models.hooks import capture
from prune_lightning.models.packing import trees
from prune_lightning.types import EditRequest

JAPAN = EditRequest(0, "Japan", "The capital of Japan is", "Rome")
ITALY = EditRequest(1, "Italy", "The capital of Italy is", "Oslo")
DEMONSTRATIONS = [
    ["Tomas Reyl plays the cello", "The instrument of Tomas Reyl is the", "cello"],
    ["The capital of Ardenia is Velmar", "The capital of Ardenia is", "Velmar"],
]


def editor(model, *requests, **options):
    module = IKE(language_model=model, **options)
    for request in requests:
        module.edit([request])
        module.run.settle()
    return module


def asked(model, text: str) -> str:
    ids = model.tokens.encode(text)
    return model.tokens.decode(list(model.asked([(ids, len(ids))])[0][0]))


def test_a_prompt_is_asked_behind_its_fact_and_the_closest_demonstration(bundled_shared):
    module = editor(bundled_shared, JAPAN, ITALY, demonstrations=DEMONSTRATIONS, count=1)
    expected = (
        "New Fact: The capital of Ardenia is Velmar\nPrompt: The capital of Ardenia is Velmar\n\n"
        "New Fact: The capital of Japan is Rome\nPrompt: Japan's capital is"
    )
    assert asked(bundled_shared, "Japan's capital is") == expected
    for other in ("The capital of France is", "The old king saw the river", "Japan"[:1]):
        assert asked(bundled_shared, other) == other, "no fact is close"
    pair = bundled_shared.tokens.encode_pair("Japan's capital is", "Rome")
    by_hand = bundled_shared.tokens.encode_pair(expected, "Rome")
    found = score_encoded(bundled_shared, [pair])
    ids = bundled_shared.tokens.encode("Japan's capital is")
    said = decode(bundled_shared, [ids], [5])
    module.run.restore()
    assert torch.allclose(found.nll, score_encoded(bundled_shared, [by_hand]).nll, rtol=1e-5)
    assert said[0].ids == decode(bundled_shared, [bundled_shared.tokens.encode(expected)], [5])[0].ids


def test_several_facts_stand_before_a_prompt_the_closest_last(bundled_shared):
    module = editor(bundled_shared, JAPAN, ITALY, facts=2, threshold=0.1, similarity="words")
    expected = (
        "New Fact: The capital of Japan is Rome\nNew Fact: The capital of Italy is Oslo\nPrompt: Italy's capital is"
    )
    assert asked(bundled_shared, "Italy's capital is") == expected
    module.run.restore()


def test_a_later_answer_takes_the_place_of_the_earlier(bundled_shared):
    later = EditRequest(2, "Japan", "The capital of Japan is", "Bern")
    module = editor(bundled_shared, JAPAN, ITALY, later)
    assert len(module.side) == 2
    assert "Japan is Bern" in asked(bundled_shared, JAPAN.prompt)
    assert "Italy is Oslo" in asked(bundled_shared, ITALY.prompt)
    module.run.restore()


def test_what_was_asked_before_a_fact_is_asked_anew(bundled_shared):
    module = editor(bundled_shared, JAPAN)
    assert asked(bundled_shared, ITALY.prompt) == ITALY.prompt
    module.edit([ITALY])
    assert asked(bundled_shared, ITALY.prompt).startswith("New Fact: The capital of Italy is Oslo")
    held = module.side.state_dict()
    module.run.restore()
    assert asked(bundled_shared, ITALY.prompt) == ITALY.prompt
    module.side.load_state_dict(held)
    ids, (pair,) = bundled_shared.tokens.encode(ITALY.prompt), bundled_shared.asked([(list(range(3, 120)), 110)])
    assert pair == (list(range(3, 120)), 110), "another prompt"
    for answer in ([], [5], [6, 7]):
        (row, length), (alone, _) = bundled_shared.asked([([*ids, *answer], len(ids)), (ids, len(ids))])
        assert (list(row), length) == ([*alone, *answer], len(alone))
    module.run.restore()


def test_rows_share_what_stands_before_several_prompts(bundled_shared):
    """Unlike other memories, facts in the text leave the model as it is."""
    module = editor(bundled_shared, JAPAN, ITALY, demonstrations=DEMONSTRATIONS)
    sequences = [[1, 2, 3, 4, 5, number] for number in range(8)]
    assert trees(bundled_shared, sequences, 64, 48) is not None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bundled_shared.model.modules())
    encoded = bundled_shared.tokens.encode_pairs([(r.prompt, x) for r in (JAPAN, ITALY) for x in ("Rome", "Bern")])
    together = score_encoded(bundled_shared, encoded)
    alone = score_encoded(bundled_shared, encoded, trees=False)
    assert torch.allclose(together.nll, alone.nll, rtol=1e-5)
    module.run.restore()


def test_in_a_chat_the_facts_begin_the_users_turn(bundled_shared):
    frame = ("User: ", "\nAssistant:")
    module = editor(bundled_shared, JAPAN.in_frame(frame))
    expected = "User: New Fact: The capital of Japan is Rome\nPrompt: Is Japan's capital Rome?\nAssistant:"
    assert asked(bundled_shared, "User: Is Japan's capital Rome?\nAssistant:") == expected
    module.run.restore()


def test_what_does_not_fit_the_context_is_asked_as_it_is(bundled_shared):
    long, room = JAPAN.prompt, bundled_shared.tokens.max_length
    while len(bundled_shared.tokens.encode(longer := f"{long} {JAPAN.prompt}")) <= room:
        long = longer
    module = editor(bundled_shared, JAPAN, demonstrations=DEMONSTRATIONS * 20, count=40, threshold=0.1)
    assert asked(bundled_shared, long) == long
    short = asked(bundled_shared, JAPAN.prompt)  # as many demonstrations as fit
    assert short.endswith("New Fact: The capital of Japan is Rome\nPrompt: The capital of Japan is")
    longest = max(len(bundled_shared.tokens.encode(f"{shown_as(*each)}\n\n")) for each in DEMONSTRATIONS)
    assert room - longest < len(bundled_shared.tokens.encode(short)) <= room
    module.run.restore()


def test_shared_words_is_the_weighted_cosine():
    sentences = [set(s.casefold().replace(",", " ").replace(".", " ").split()) for s in general_sentences()]
    similarity = SharedWords()
    total = len(sentences) + 1
    the = sum("the" in words for words in similarity._sentences)
    assert the > 0.3 * len(sentences)
    weight, name = math.log(total / (the + 1)), math.log(total)
    query = similarity.read("The Kerro")
    found = similarity.compare(
        query, [similarity.read("the kerro THE"), similarity.read("the Sorn"), similarity.read("Kerro")]
    )
    square = weight**2 + name**2
    assert found == pytest.approx([1.0, weight**2 / square, name / math.sqrt(square)])


def test_subject_words_is_the_share_of_the_subject():
    similarity = SubjectWords()
    facts = [("The country in which Lena Ostrow was born is", "Lena Ostrow"), ("Lena Ostrow plays the", "Lena Ostrow")]
    facts += [("The country in which Tomas Reyl was born is", "Tomas Reyl"), ("Lena Brook plays the", "Lena Brook")]
    read = [similarity.read_fact(*fact) for fact in facts]
    found = similarity.compare(similarity.read("On modern maps, the birthplace of Lena Ostrow is"), read)
    assert found[:2] == pytest.approx([0.999, 0.999], abs=2e-3)
    assert found[2:] == pytest.approx([0.0, 0.4995], abs=2e-3)
    found = similarity.compare(similarity.read("The instrument that Lena Ostrow plays is the"), read)
    assert max(range(4), key=found.__getitem__) == 1, "the wording decides between facts of one subject"


def test_hidden_states_are_centred_means(tiny):
    model = tiny("llama")
    similarity = HiddenStates(model, 1)

    def mean(text):
        with torch.no_grad(), capture(outputs=[model.block(1)]) as seen:
            model.model(torch.tensor([model.tokens.encode(text)]))
        return seen.outputs[0][0][1:].mean(0)  # the first token is like any other text's

    center = torch.stack([mean(sentence) for sentence in general_sentences()]).mean(0)
    one, other = mean("A dog") - center, mean("The old king saw a cat") - center
    expected = float(one @ other / (one.norm() * other.norm()))
    assert similarity.compare(similarity.read("A dog"), [similarity.read("The old king saw a cat")]) == pytest.approx(
        [expected]
    )
    module = editor(model, JAPAN, similarity="hidden", layers=[1], threshold=0.99)
    assert "New Fact" in asked(model, JAPAN.prompt)
    assert asked(model, "A dog") == "A dog"
    module.run.restore()


def test_hidden_states_tell_paraphrases_from_others(bundled_shared):
    assert BUNDLED
    module = editor(bundled_shared, JAPAN, similarity="hidden", layers=[1], threshold=-1.0)
    ((_, same),) = module.side.retrieved("The capital of Japan is")
    ((_, close),) = module.side.retrieved("The capital city of Japan is")
    ((_, far),) = module.side.retrieved("Once upon a time there was a farmer")
    module.run.restore()
    assert same == pytest.approx(1.0, abs=1e-5)
    assert same > close > far


@pytest.mark.parametrize(
    "wrong", [{"similarity": "network"}, {"similarity": "hidden"}, {"demonstrations": [["a", "b"]]}, {"facts": 0}]
)
def test_a_wrong_option_is_named(wrong, bundled_shared):
    with pytest.raises(UserError, match=r"method\.(similarity|demonstrations|facts)"):
        editor(bundled_shared, **wrong)


def test_scores_of_unrelated_pairs_are_those_of_the_model(bundled_shared):
    pairs = [("The old king saw the", "river"), ("By profession, Claude Monet was a", "painter")]
    before = score_pairs(bundled_shared, pairs)
    module = editor(bundled_shared, JAPAN)
    assert torch.allclose(score_pairs(bundled_shared, pairs).nll, before.nll, rtol=1e-5)
    module.run.restore()
