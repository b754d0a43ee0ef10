"""Tasks on which a policy moves away from what its draft has learnt: prompts, and rewards for another style."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable

from miles.types import Sample

SUBJECTS = (
    *("the sea", "a cat", "winter", "a long train journey", "bread", "the moon", "a garden", "an old clock"),
    *("music", "a river", "friendship", "a mountain", "rain", "a small town", "coffee", "a lost key", "bees"),
    *("a library", "the first day of school", "a storm", "football", "an island", "a letter", "fire", "dreams"),
)
FORMS = (
    *("Write a short story about {}.", "Explain to a child what is special about {}.", "Describe {} in a paragraph."),
    *("Write five sentences about {}.", "What do people like about {}?", "Write a poem about {}."),
)

COMMON = frozenset(
    {
        *("the", "a", "an", "of", "and", "to", "in", "is", "that", "it", "with", "for", "as"),
        *("on", "was", "at", "by", "from", "his", "her", "their"),
    }
)
"""Words that a draft expects everywhere."""
FEWEST_WORDS = 10


def words_texts(count: int, seed: int) -> list[str]:
    """So many prompts for open text."""
    draw = random.Random(seed)
    return [draw.choice(FORMS).format(draw.choice(SUBJECTS)) for _ in range(count)]


def lines(response: str) -> float:
    """Share of short lines, of at most six words, among the lines of a response that says something."""
    parts = [part.split() for part in response.splitlines() if part.strip()]
    return sum(len(part) <= 6 for part in parts) / max(len(parts), 4)


async def lines_reward(sample: Sample) -> float:
    """`lines` of a sample."""
    return lines(sample.response)


def questions(response: str) -> float:
    """Share of sentences that are questions."""
    marks = [char for char in response if char in ".!?\n"]
    return marks.count("?") / max(len(marks), 4)


async def questions_reward(sample: Sample) -> float:
    """`questions` of a sample."""
    return questions(sample.response)


def rare_words(response: str) -> float:
    """Share of words that are none of the most common ones, of a response that says something."""
    words = re.findall(r"[a-z']+", response.lower())
    if len(words) < FEWEST_WORDS:
        return 0.0
    return 1 - sum(word in COMMON for word in words) / max(len(words), 2 * FEWEST_WORDS)


async def rare_words_reward(sample: Sample) -> float:
    """`rare_words` of a sample."""
    return rare_words(sample.response)


@dataclasses.dataclass(frozen=True, slots=True)
class DraftTask:
    """Prompts and a reward."""

    texts: Callable[[int, int], list[str]]
    score: Callable[[str], float]
    reward: str
    """The reward's name, for custom_rm_path."""


TASKS = {
    "lines": DraftTask(words_texts, lines, f"{__name__}.lines_reward"),
    "questions": DraftTask(words_texts, questions, f"{__name__}.questions_reward"),
    "rare-words": DraftTask(words_texts, rare_words, f"{__name__}.rare_words_reward"),
}
