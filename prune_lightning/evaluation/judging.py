"""A language model as judge of answers: its prompt, and how its reply is parsed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Judge = Callable[[Sequence[str]], Sequence[str]]
"""A function that takes prompts and returns one reply to each, from any language model."""

_RUBRIC = """You grade the answer to a question against a target.
A: the answer is correct. It holds the key information of the target, contradicts nothing in it, and does not repeat \
itself.
B: the answer is incorrect.

Question: {question}
Target: {target}
Answer: {answer}

Reply with the letter A or B and nothing else."""


def judge_prompt(question: str, target: str, answer: str) -> str:
    """Return the judge's prompt for an answer; one trailing full stop of the answer is dropped."""
    return _RUBRIC.format(question=question, target=target, answer=answer.strip().removesuffix("."))


def verdict(reply: str) -> bool | None:
    """Return whether a reply's first letter says that the answer is correct; ``None`` if it is neither A nor B.

    >>> verdict(" A."), verdict("b"), verdict("Surely")
    (True, False, None)
    """
    return {"a": True, "b": False}.get(reply.strip()[:1].lower())
