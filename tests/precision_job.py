"""What test_precision.py compares: decoding with every drafter and rule, ranks, and with an argument three trainings.

A program of its own, because JAX reads its settings when it starts; prints the outcomes as JSON.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from conftest import noisy_heads, tiny_model

import specjax as sj
from specjax.corpus.texts import Text
from specjax.ranks.measuring import measure
from specjax.ranks.simulation import simulate


def decoded():
    """Tokens by drafter and rule, alone, in a batch and streamed; and a rank table."""
    model, draft = tiny_model(num_layers=1), tiny_model(9, num_layers=1)
    heads, tree = noisy_heads(model, 2), sj.Tree.cartesian((2, 1))
    drafters = {
        "none": None,
        "medusa": sj.MedusaDrafter(heads, tree),
        "ngram": sj.NgramDrafter(sj.Tree.chain(3)),
        "draft": sj.DraftModelDrafter(draft, tree),
        "sampled draft": sj.DraftModelDrafter(draft, tree, 0.7),
    }
    drafters["hybrid"] = sj.HybridDrafter((drafters["ngram"], drafters["sampled draft"]))
    sampled = sj.Sample(0.8, top_k=7, top_p=0.9)
    cases = [
        ("none", sampled), ("medusa", sj.Typical(0.8)), ("medusa", sj.Sample(0.8, top_p=0.7)), ("ngram", sj.Greedy()),
        ("draft", sj.Greedy()), ("hybrid", sj.Greedy()), ("hybrid", sampled),
    ]  # fmt: skip
    found, key = {}, jax.random.key(0)
    for name, rule in cases:
        how = {"drafter": drafters[name], "acceptance": rule, "max_new_tokens": 12}
        out = sj.generate(model, [1, 2, 3, 4], key=key, **how).tokens.tolist()
        assert [t for item in sj.stream(model, [1, 2, 3, 4], key=key, **how) for t in item.tokens.tolist()] == out
        found[f"{name} {rule}"] = out
        if name == "hybrid" and rule == sampled:
            batch = sj.generate_batch(model, [[1, 2, 3], [4, 5]], keys=jax.random.split(key, 2), **how)
            found[f"batch {rule}"] = [one.tokens.tolist() for one in batch]
    table = measure(model, heads, [Text(np.array([1, 2, 3]), np.array([4, 5, 6, 7, 8, 9]), "a")])
    return found | {"ranks": [table.ranks.tolist(), simulate(table, [tree])[0].tokens_per_round]}


def trained():
    """Losses of every step, by what is trained."""
    sys.path.insert(0, str(Path(__file__).parent / "training"))
    from test_resumed import OBJECTIVES

    from specjax.training.run import train

    found = {}
    for name, make in OBJECTIVES.items():
        with tempfile.TemporaryDirectory() as directory:
            found[name] = [record["loss"] for record in train(make(), Path(directory)).log if "loss" in record]
    return found


if __name__ == "__main__":
    print(json.dumps(trained() if "train" in sys.argv else decoded()))
