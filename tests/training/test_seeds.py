"""Seed prompts: reproducible, varied, and apart from the evaluation prompts."""

import re

import pytest

from specjax.corpus.prompts import load_prompts
from specjax.corpus.seeds import seed_prompts


@pytest.fixture(scope="module")
def prompts():
    return seed_prompts(3000, 5)


def test_they_are_reproducible_and_varied(prompts):
    assert prompts == seed_prompts(3000, 5)
    assert prompts[:50] == seed_prompts(50, 5)
    assert prompts[:50] != seed_prompts(50, 6)
    assert len(set(prompts)) > 2000
    assert not any(re.search(r"\{[a-z]+\d?\}|\{\d+-\d+\}", p) for p in prompts)  # no slot is left open


def test_a_fifth_are_about_a_passage(prompts):
    passages = [max(p.split("\n\n"), key=len) for p in prompts]
    words = [len(p.split()) for p in passages if len(p.split()) >= 80]
    assert 0.17 < len(words) / len(prompts) < 0.23
    assert max(words) <= 200
    first = [len(p.split("\n\n")[0].split()) >= 80 for p in prompts if len(p.split()) >= 80]
    assert {True, False} == set(first)  # the request stands before or after


@pytest.mark.parametrize("words", ["return", "Write a letter", "recipe", "plan", "recommend", "Translate to", "email"])
def test_every_kind_of_task_occurs(prompts, words):
    assert sum(words in p for p in prompts) >= 15


def test_no_sentence_is_one_of_the_evaluation_prompts(prompts):
    def sentences(texts):
        parts = (part.strip(" :.!?").lower() for text in texts for part in re.split(r"(?<=[.!?:])\s|\n", text))
        return {part for part in parts if part}

    shared = sentences(prompts) & sentences(turn for p in load_prompts() for turn in p.turns)
    assert not shared
