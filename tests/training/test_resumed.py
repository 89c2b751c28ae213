"""Whatever is trained: a run that was cut and resumed equals an uninterrupted one, bit for bit.

In one process; runs that are killed are in test_steps.py and test_train_packed_medusa.py, in the full tier.
"""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import noisy_heads, tiny_config, tiny_model

import specjax as sj
from specjax.corpus.conversation import Conversation
from specjax.corpus.features import with_features
from specjax.loading import checkpoint
from specjax.training.draft import DraftConfig, DraftDistillation, reduced_map
from specjax.training.lora import LoraConfig
from specjax.training.mesh import MeshConfig
from specjax.training.objective import Objective
from specjax.training.packed_medusa import PackedMedusa, PackedMedusaConfig
from specjax.training.run import train

EVERY = {"epochs": 1, "batch_size": 4, "length": 24, "checkpoint_every": 3, "accumulate": 2, "ema": 0.9}
STEPS = 8  # a checkpoint between two updates, in the midst of gathering gradients, and one behind an update


def language(count, seed):
    """Conversations in which the next token follows from the last: x -> 5x + 3 (mod 61)."""
    made = []
    for first in np.random.default_rng(seed).integers(0, 61, count):
        tokens = [int(first)]
        while len(tokens) < 12:
            tokens.append((5 * tokens[-1] + 3) % 61)
        made.append(Conversation(np.array(tokens[:3]), np.array(tokens[3:])))
    return made


def medusa(**changes):
    """Heads on the fly; with `lora`, the backbone too."""
    model = tiny_model(num_layers=1)
    settings = PackedMedusaConfig(**EVERY, remat=False, **changes)
    text = {"data": language(64, 0), "held_out": language(8, 1)}
    return PackedMedusa(model=model, heads=noisy_heads(model, 2), settings=settings, **text)


def draft():
    """A draft of a reduced vocabulary."""
    model, token_map = tiny_model(num_layers=1), reduced_map(np.arange(0, 61, 2))
    config = tiny_config(len(token_map), family="qwen2", qkv_bias=True, tie_word_embeddings=True, num_layers=1)
    data, held_out = (with_features(model, language(count, seed)) for count, seed in ((64, 0), (8, 1)))
    return DraftDistillation(
        config=config, target=model.params, token_map=token_map, data=data, held_out=held_out,
        settings=DraftConfig(**EVERY),
    )  # fmt: skip


OBJECTIVES = {
    "medusa-1": medusa,
    "medusa-2": lambda: medusa(lora=LoraConfig(2, 4.0, 0.1)),  # dropout draws anew at every step
    "draft": draft,
}


class CutError(Exception):
    """Ends a run, as a kill would."""


def untimed(record):
    """A log record without its throughputs."""
    return {name: value for name, value in record.items() if not name.endswith("_per_second")}


def leaves(result):
    """Every array of what was trained."""
    return jax.tree.leaves(vars(result) if dataclasses.is_dataclass(result) else result)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    objective = OBJECTIVES[name]()
    assert objective.steps == STEPS

    def cut(record):
        if record["step"] == 6:
            raise CutError

    whole, log = train(objective, tmp_path / "whole")
    with pytest.raises(CutError):
        train(objective, tmp_path / "cut", report=cut)
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == 3
    resumed, relog = train(objective, tmp_path / "cut")
    assert list(map(untimed, relog)) == list(map(untimed, log))
    assert len({record["loss"] for record in log if "loss" in record}) == STEPS
    for ours, theirs in zip(leaves(resumed), leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_holds_its_state_once(name, tmp_path):
    """Parameters, their average, two moments and the gradients that are gathered, beside what the objective places."""
    objective = OBJECTIVES[name]()
    params = jax.eval_shape(objective.initial)
    shape = max((leaf.shape for leaf in jax.tree.leaves(params)), key=np.prod)
    copies = 5 * sum(leaf.shape == shape for leaf in jax.tree.leaves(params))

    def held():
        return sum(array.shape == shape and array.dtype == np.float32 for array in jax.live_arrays())

    before, during = held(), []
    placed = objective.constants(MeshConfig(1, 1).build())
    constants = held() - before
    del placed

    def first(record):  # before Orbax, which holds what it writes
        during.append(held())
        raise CutError

    with pytest.raises(CutError):
        train(objective, tmp_path, report=first)
    assert during == [before + constants + copies]


def test_a_half_written_objective_is_refused(tmp_path):
    class Half(Objective):
        settings = DraftConfig(**EVERY)
        score = "acceptance"

        @property
        def steps(self):
            return 8

    with pytest.raises(sj.ConfigError, match=r"is no Objective: it lacks amounts, batches, check, .*, trained\."):
        train(Half(), tmp_path)
    with pytest.raises(sj.ConfigError, match="is a class; pass an instance"):
        train(Half, tmp_path)
    assert not list(tmp_path.iterdir())
