"""The formulas behind the metrics, on plain tensors."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lightning.errors import UserError


def preference(nll_wanted: Tensor, nll_other: Tensor) -> Tensor:
    r"""Return CounterFact's SCORE per prompt: :math:`1[\ell(\text{wanted}) < \ell(\text{other})]`.

    :math:`\ell` is the mean negative log-likelihood per target token. A tie is a failure, and so is a non-finite value.

    Args:
        nll_wanted: :math:`\ell` of the answer that should be preferred, shape ``(n,)``.
        nll_other: :math:`\ell` of the other one, shape ``(n,)``.

    >>> preference(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([2.0, 2.0, 1.0]))
    tensor([1., 0., 0.])
    """
    better = (nll_wanted < nll_other) & torch.isfinite(nll_wanted) & torch.isfinite(nll_other)
    return better.float()


def mean_by_case(values: Tensor, case: Tensor) -> Tensor:
    """Return the mean of ``values`` within each case, one entry per case.

    Args:
        values: Shape ``(n,)``.
        case: Integer case of each value, shape ``(n,)``.

    >>> mean_by_case(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([7, 7, 9]))
    tensor([0.5000, 1.0000])
    """
    unique, index = case.unique(return_inverse=True)
    zeros = torch.zeros(len(unique), dtype=values.dtype, device=values.device)
    return zeros.index_add(0, index, values) / zeros.index_add(0, index, torch.ones_like(values))


def retention(now: Mapping[str, float], before: Mapping[str, float], chance: Mapping[str, float]) -> float:
    r"""Return the mean over tasks of :math:`(G - G_c) / (G_0 - G_c)`, the share of each ability that is kept.

    A score at or below chance keeps nothing, and neither does one that is not finite.

    Args:
        now: Score :math:`G` of each task.
        before: Score :math:`G_0` of each task on the unedited model, above chance.
        chance: Chance level :math:`G_c` of the tasks to average; the result is NaN without any.

    >>> retention({"a": 0.75, "b": 0.75}, {"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.5})
    0.625
    """
    shares = [(now[task] - level) / (before[task] - level) for task, level in chance.items()]
    return sum(share if 0 < share < math.inf else 0.0 for share in shares) / len(shares) if shares else math.nan


def constant_score(answers: Sequence[str]) -> float:
    """Return the chance level of exact match: the score of always giving the commonest of the right answers.

    >>> constant_score(["true", "false", "true", "true"])
    0.75
    """
    return max(Counter(answers).values()) / len(answers)


def perplexity(mean_nll: Tensor) -> Tensor:
    r"""Return :math:`\exp(\mathrm{nll})` of mean negative log-likelihoods per token; NaN gives infinity.

    >>> perplexity(torch.tensor([0.0, float("nan")]))
    tensor([1., inf])
    """
    return mean_nll.exp().nan_to_num(nan=float("inf"), posinf=float("inf"))


def magnitude(nll_wanted: Tensor, nll_other: Tensor) -> Tensor:
    r"""Return CounterFact's MAGNITUDE per prompt: :math:`P(\text{wanted}) - P(\text{other})`, :math:`P = e^{-\ell}`.

    :math:`P` is the geometric mean of the token probabilities. Where either is not finite, the difference is -1, the
    worst value.

    Args:
        nll_wanted: :math:`\ell` of the answer that should be preferred, shape ``(n,)``.
        nll_other: :math:`\ell` of the other one, shape ``(n,)``.

    >>> magnitude(torch.tensor([0.0, float("nan")]), torch.tensor([float(torch.log(torch.tensor(2.0))), 1.0]))
    tensor([ 0.5000, -1.0000])
    """
    finite = torch.isfinite(nll_wanted) & torch.isfinite(nll_other)
    return torch.where(finite, (-nll_wanted).exp() - (-nll_other).exp(), -torch.ones_like(nll_wanted))


def harmonic_mean(scores: Tensor) -> Tensor:
    r"""Return :math:`n / \sum_i s_i^{-1}` of non-negative scores; 0 if any is 0, NaN if any is NaN.

    Args:
        scores: Shape ``(n,)``.

    >>> harmonic_mean(torch.tensor([0.967, 0.897, 0.266]))
    tensor(0.5078)
    >>> harmonic_mean(torch.tensor([1.0, 0.0]))
    tensor(0.)
    """
    return len(scores) / scores.reciprocal().sum() if bool((scores != 0).all()) else scores.sum() * 0


def first_of_each(*keys: Tensor) -> Tensor:
    """Return the sorted indices at which a combination of keys occurs for the first time.

    Args:
        keys: Equally long tensors, shape ``(n,)``.

    >>> first_of_each(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 0, 0]))
    tensor([0, 1, 2])
    """
    _, group = torch.stack(keys).unique(dim=1, return_inverse=True)
    order = torch.arange(len(group), device=group.device)
    first = torch.full_like(order, len(order)).scatter_reduce(0, group, order, "amin")
    return first[first < len(order)].sort().values


def normalise_answer(text: str) -> str:
    """Return a text in lower case without punctuation and articles, blanks collapsed (SQuAD's normalisation).

    >>> normalise_answer(" The  Eiffel-Tower, Paris. ")
    'eiffeltower paris'
    """
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers after normalisation; an empty text never is.

    >>> exact_match("Paris.", ["the Paris", "Lutetia"])
    True
    """
    normalised = normalise_answer(text)
    return bool(normalised) and normalised in {normalise_answer(answer) for answer in answers}


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers occurs in a text, word for word, after normalisation.

    >>> contains("It is in Paris, France", ["Paris"]), contains("15", ["5"])
    (True, False)
    """
    normalised = f" {normalise_answer(text)} "
    wanted = [normalise_answer(answer) for answer in answers]
    return any(f" {answer} " in normalised for answer in wanted if answer)


def ngram_entropy(text: str) -> float:
    r"""Return the fluency of a text in bits: :math:`\tfrac12(\tfrac23 H_2 + \tfrac43 H_3)`.

    :math:`H_n = -\sum_g f(g)\log_2 f(g)` over the frequencies of the text's word n-grams. Words are split sentence by
    sentence, as by ``nltk.word_tokenize``, since the full stop is a word of its own at the end of a sentence only. The
    sentences are found without ``nltk``'s data, so that one also ends after an abbreviation such as "Mr.". It is 0 for
    a text without n-grams.

    Raises:
        UserError: ``nltk`` is not installed.

    >>> round(ngram_entropy("a b c d e"), 4)
    1.7233
    >>> ngram_entropy("so so so so so so")
    0.0
    """
    words = _words(unicodedata.normalize("NFKD", text).replace("\n\n", " "))

    def entropy(n: int) -> float:
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        total = counts.total()
        return -math.fsum(count / total * math.log2(count / total) for count in counts.values())

    return abs(2 / 3 * entropy(2) + 4 / 3 * entropy(3)) / 2


def _words(text: str) -> list[str]:
    try:
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktSentenceTokenizer
    except ImportError as error:
        raise UserError("fluency needs nltk: pip install 'prune-lightning[eval]'") from error
    split = NLTKWordTokenizer().tokenize
    return [word for sentence in PunktSentenceTokenizer().tokenize(text) for word in split(sentence)]


def tfidf_vectorizer(texts: Sequence[str]) -> Any:
    """Return a TF-IDF vectoriser fitted to some texts.

    Raises:
        UserError: ``scikit-learn`` is not installed, or the texts contain no words.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise UserError("consistency needs scikit-learn: pip install 'prune-lightning[eval]'") from error
    try:
        return TfidfVectorizer().fit(texts)
    except ValueError as error:
        raise UserError(f"consistency: the reference texts cannot be used: {error}") from error


def tfidf_similarity(vectorizer: Any, texts: Sequence[str], references: Sequence[str]) -> float:
    """Return the consistency of texts with reference texts: the cosine of their TF-IDF vectors.

    The texts are concatenated, and so are the references.

    Args:
        vectorizer: See :func:`tfidf_vectorizer`.
        texts: Generated texts about a subject.
        references: Reference texts about such subjects.

    >>> vectorizer = tfidf_vectorizer(["a river in the north", "a town in the south"])
    >>> round(tfidf_similarity(vectorizer, ["north river"], ["the river", "the north"]), 3)
    0.705
    """
    ours, theirs = vectorizer.transform([" ".join(texts), " ".join(references)])
    return float((ours @ theirs.T).toarray().item())
