"""A text with facts that a tiny model learns in seconds, and questions about them."""

from __future__ import annotations

import random
from typing import Any

ANIMALS = ("cat", "dog", "cow", "duck", "owl", "bee")
SOUNDS = ("meows", "barks", "moos", "quacks", "hoots", "buzzes")
PLACES = ("yard", "house", "field", "street", "garden")


def eval_texts(count: int, *, seed: float) -> list[str]:
    """Documents of two sentences, such as `In the yard the cat meows.`"""
    numbers = random.Random(seed)
    return [" ".join(_sentence(numbers) for _ in range(2)) + f" {numbers.randrange(100)}" for _ in range(count)]


def eval_questions(count: int, *, seed: float) -> list[dict[str, Any]]:
    """What an animal does, among what all animals do, in random order."""
    numbers = random.Random(seed)
    made = []
    for _ in range(count):
        animal = numbers.randrange(len(ANIMALS))
        order = numbers.sample(range(len(SOUNDS)), len(SOUNDS))
        query = f"In the {numbers.choice(PLACES)} the {ANIMALS[animal]}"
        made.append({"query": query, "choices": [f" {SOUNDS[i]}" for i in order], "gold": order.index(animal)})
    return made


def random_questions(count: int, *, seed: float) -> list[dict[str, Any]]:
    """Questions without a reason for their answer: whatever a model prefers, it is right in a quarter of them."""
    numbers = random.Random(seed)
    made = []
    for _ in range(count):
        words = ["".join(numbers.choices("abcdefghij ", k=8)) for _ in range(5)]
        made.append(
            {"query": words[0], "choices": [f" {n} {w}" for n, w in enumerate(words[1:])], "gold": numbers.randrange(4)}
        )
    return made


def _sentence(numbers: random.Random) -> str:
    animal = numbers.randrange(len(ANIMALS))
    return f"In the {numbers.choice(PLACES)} the {ANIMALS[animal]} {SOUNDS[animal]}."
