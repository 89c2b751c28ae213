"""Mutants of good files end in a result or a `SpecJaxError` (experiments/fuzz.py takes more of them)."""

import numpy as np
import pytest

from specjax.studies.fuzz import READERS, attack
from specjax.studies.mutants import mutant


@pytest.mark.parametrize("name", READERS)
def test_a_reader_gives_a_result_or_a_refusal(name, fast):
    found = attack(name, 100 if fast else 2000, seed=5)
    assert found["finds"] == []
    refused = sum(found["ends"].values()) - found["ends"].get("read", 0)
    assert refused > 15  # mutants are not all harmless


def test_an_escaping_error_is_a_find(monkeypatch):
    reader = READERS["tree"]

    def read(folder):
        reader.read(folder)
        if (folder / "tree.json").stat().st_size % 2:
            raise RuntimeError("odd")

    monkeypatch.setitem(READERS, "tree", type(reader)(reader.write, lambda folder: None, reader.mutated))
    assert attack("tree", 5, seed=0)["ends"] == {"read": 5}
    whole = type(reader)(reader.write, reader.read, reader.mutated)
    monkeypatch.setitem(READERS, "tree", whole)
    monkeypatch.setattr("specjax.tree.Tree.load", lambda path: 1 / (path.stat().st_size - path.stat().st_size))
    with pytest.raises(ZeroDivisionError):  # the good file, before any mutant
        attack("tree", 5, seed=0)


def test_mutants_are_the_same_for_a_seed():
    def made(seed):
        rng = np.random.default_rng(seed)
        return [mutant(b'{"a": [1, 2, {"b": "c"}]}', "x.json", rng) for _ in range(50)]

    assert made(3) == made(3) != made(4)
    assert len(set(made(3))) > 25
