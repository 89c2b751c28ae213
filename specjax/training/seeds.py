"""Seed prompts of our own for self-distillation: task templates filled from word lists (`data/seed_prompts.json`).

They cover what a small chat model is asked to do (questions, explanations, writing, code, translation, arithmetic) and
share no sentence with the evaluation prompts that ship with the package.
"""

import json
from importlib import resources

import numpy as np


def seed_prompts(count: int, seed: int) -> list[str]:
    """`count` user messages: about half questions and writing, a sixth each of code, translation and arithmetic."""
    rng = np.random.default_rng(seed)
    words = json.loads((resources.files("specjax") / "data" / "seed_prompts.json").read_text("utf-8"))

    def pick(items: list[str]) -> str:
        return items[int(rng.integers(len(items)))]

    def one() -> str:
        kind = int(rng.integers(6))
        if kind == 0:
            return f"Write a {pick(['Python', 'Python', 'JavaScript', 'Java'])} function that {pick(words['code'])}."
        if kind == 1:
            return f"Translate to {pick(words['languages'])}: {pick(words['sentences'])}"
        if kind == 2:
            a, b, c = int(rng.integers(3, 40)), int(rng.integers(41, 200)), int(rng.integers(2, 13))
            return pick(words["sums"]).format(n=pick(words["names"]), a=a, b=b, c=c)
        return pick(words["ask"]).format(t=pick(words["topics"]), u=pick(words["topics"]))

    return [one() for _ in range(count)]
