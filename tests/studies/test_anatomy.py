"""Rounds taken apart are the rounds of `generate`."""

import numpy as np
from conftest import noisy_heads, tiny_model

import specjax as sj
from specjax.studies.round_anatomy import take_apart


def test_the_parts_add_up_to_the_generation():
    model = tiny_model()
    tree = sj.Tree.cartesian((3, 2))
    drafter, prompt = sj.MedusaDrafter(noisy_heads(model, 2), tree), np.arange(5)
    out = sj.generate(model, prompt, drafter=drafter, max_new_tokens=30)
    rounds = list(take_apart(model, prompt, drafter=drafter, max_new_tokens=30))
    assert [len(r.committed) - 1 for r in rounds] == out.accepted_lengths.tolist()
    said = np.concatenate([prompt, out.tokens])
    np.testing.assert_array_equal(np.concatenate([rounds[0].before, *(r.committed for r in rounds)]), said)
    assert max(len(r.accepted) for r in rounds) > 0
    for r in rounds:
        assert r.drafts[0] == r.before[-1]
        for node in r.accepted:  # each is what the target says after its parent
            assert r.drafts[node] == r.choices[tree.parents[node]]
        path = (0, *r.accepted)
        full = [*(int(r.drafts[n]) for n in r.accepted), int(r.choices[path[-1]])]
        assert r.committed.tolist() == full[: len(r.committed)]
