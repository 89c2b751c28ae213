"""Seed prompts of our own for self-distillation: task templates filled from word lists.

They cover what a small chat model is asked to do (questions, explanations, letters, recipes, plans, code, translation,
arithmetic, and questions about a passage) and share no sentence with the evaluation prompts that ship with the package.
`data/seed_prompts.json` holds the short tasks, `data/seed_passages.json` the passages: a kind of document is a list of
steps, each with several wordings, whose `{slots}` are filled from word lists, a slot alike throughout one document.
"""

import json
import re
from importlib import resources
from typing import Any

import numpy as np

LONG_SHARE = 0.2  # of the prompts: those with a passage
_SLOT = re.compile(r"\{(?:(\d+)-(\d+)|([a-z]+)\d?)\}")  # {10-50}: a number; {town2}: another word of the list `town`


def seed_prompts(count: int, seed: int) -> list[str]:
    """`count` user messages.

    A fifth are about a passage of 80 to 200 words; of the others a sixth each are code, translation, arithmetic and
    everyday writing (letters, recipes, plans, recommendations), the rest questions and explanations.
    """
    rng = np.random.default_rng(seed)
    short, long = _read("seed_prompts.json"), _read("seed_passages.json")

    def pick(items: list[Any]) -> Any:
        return items[int(rng.integers(len(items)))]

    def fill(text: str, chosen: dict[str, str]) -> str:
        """Fills the slots: words as in `chosen`, which grows, and each number anew."""

        def slot(match: re.Match[str]) -> str:
            low, high, kind = match.groups()
            if low is not None:
                return str(rng.integers(int(low), int(high) + 1))
            name = match.group()
            if name not in chosen:
                taken = {word for other, word in chosen.items() if other.strip("{}0123456789") == kind}
                chosen[name] = pick([word for word in long["words"][kind] if word not in taken])
            return chosen[name]

        return _SLOT.sub(slot, text)

    def passage() -> str:
        document, chosen = pick(long["passages"]), dict[str, str]()
        sentences = [fill(pick(step), chosen) for step in document["steps"]]
        parts = [" ".join(filter(None, sentences)), fill(pick(document["requests"]), chosen)]
        return "\n\n".join(parts if rng.random() < 0.4 else parts[::-1])

    def one() -> str:
        if rng.random() < LONG_SHARE:
            return passage()
        kind = int(rng.integers(6))
        if kind == 0 and rng.random() < 0.5:
            snippet = fill(pick(long["code"]["snippets"]), {})
            return f"{pick(long['code']['requests'])}\n\n{snippet}"
        if kind == 0:
            return f"Write a {pick(['Python', 'Python', 'JavaScript', 'Java'])} function that {pick(short['code'])}."
        if kind == 1:
            steps = [step for step in pick(long["passages"])["steps"] if "" not in step]
            sentence = pick(short["sentences"]) if rng.random() < 0.5 else fill(pick(pick(steps)), {})
            return f"Translate to {pick(short['languages'])}: {sentence}"
        if kind == 2:
            a, b, c = int(rng.integers(3, 40)), int(rng.integers(41, 200)), int(rng.integers(2, 13))
            return pick(short["sums"]).format(n=pick(short["names"]), a=a, b=b, c=c)
        if kind == 3:
            return fill(pick(long["tasks"]), {})
        return pick(short["ask"]).format(t=pick(short["topics"]), u=pick(short["topics"]))

    return [one() for _ in range(count)]


def _read(name: str) -> dict[str, Any]:
    return json.loads((resources.files("specjax") / "data" / name).read_text("utf-8"))
