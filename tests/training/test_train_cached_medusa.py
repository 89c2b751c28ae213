"""Fitting end to end: the tiny Qwen2's experiment as `specjax run` runs it, and the Qwen2.5 one without a network."""

import dataclasses
import functools
import io
import json
import struct
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from conftest import followed_by, save_chat_model
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

import specjax as sj
from specjax.corpus.build import Corpus
from specjax.fingerprint import fingerprint
from specjax.loading.head_files import heads_metadata, save_heads
from specjax.ranks.simulation import simulate
from specjax.ranks.table import RankTable
from specjax.studies import train_draft_heads, train_random, training_study
from specjax.studies.runner import load_config, run_config
from specjax.studies.train_cached_medusa import TrainCachedMedusa
from specjax.training.cached_medusa import CachedMedusaConfig
from specjax.training.quality import default_tree
from specjax.training.steps import LOG

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def run(config, directory):
    """The result of an experiment, and what it printed."""
    console = Console(file=io.StringIO(), width=1000)
    assert run_config(config, directory, console) == 0
    return json.loads((directory / "result.json").read_text()), console.file.getvalue()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The tiny experiment, run."""
    directory, config = tmp_path_factory.mktemp("fit"), load_config(EXPERIMENTS / "train_tiny_qwen2.py")
    return directory, config, *run(config, directory)


def scalars(directory):
    """Every scalar in a folder of TensorBoard event files: {tag: {step: value}}."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(directory.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_trained_heads_beat_the_lm_head_by_the_stated_margin(fitted):
    directory, config, result, printed = fitted
    assert result["gain"]["top1"][0] > 0.15
    assert min(result["gain"]["top1"]) > 0.03
    assert result["gain"]["tokens_per_round"] > 0.3
    first, last = result["evaluations"][0]["eval"], result["evaluations"][-1]["eval"]
    assert all(b < a for a, b in zip(first["losses"], last["losses"], strict=True))
    assert f"step 0: top-1 {first['accuracy']['top1']}" in printed.replace("\n", " ")
    assert "tokens/s" in printed
    assert "larger start_share" not in printed
    # What is on disk is what was judged: the same accuracies once more, from the exported heads and from decoding.
    model = config.target()
    heads = sj.load_heads(directory / "heads.safetensors", model.config)
    table = RankTable.load(directory / "heads.ranks.npz").check(model, heads)
    np.testing.assert_allclose(table.accuracy(1), result["record"]["accuracy"]["top1"], atol=0.02)  # bfloat16 heads
    simulated = simulate(table, [default_tree(3)])[0].tokens_per_round
    assert simulated == pytest.approx(result["record"]["tokens_per_round"], abs=0.03)
    assert heads_metadata(directory / "heads.safetensors")["hits"] == result["record"]["hits"]


def test_the_record_is_complete(fitted):
    directory, _, result, _ = fitted
    log = [json.loads(line) for line in (directory / LOG).read_text().splitlines()]
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert all(r["gradient_norm"] > 0 and r["learning_rate"] >= 0 and len(r["losses"]) == 3 for r in steps)
    assert set(result["throughput"]) == {"steps_per_second", "tokens_per_second", "labels_per_second"}
    evaluation = result["evaluations"][1]["eval"]
    assert set(evaluation["accuracy"]) == {"top1", "top2", "top3", "top5", "top10"}
    best = max(result["evaluations"][1:], key=lambda r: (r["eval"]["tokens_per_round"], r["step"]))
    assert best["step"] == result["step"]
    assert result["record"]["losses"] == best["eval"]["losses"]
    assert result["data"]["training"]["tokens"] == result["record"]["trained_tokens"]
    for name in result["figures"]:
        assert (directory / name).read_bytes()[:4] == b"\x89PNG"
    assert len(result["figures"]) == 4
    events = scalars(directory / "tensorboard")
    assert events["loss"] == pytest.approx({r["step"]: r["loss"] for r in steps}, rel=1e-6)
    top1 = {r["step"]: r["eval"]["accuracy"]["top1"][1] for r in result["evaluations"]}
    assert events["eval/accuracy/top1/head_2"] == pytest.approx(top1, rel=1e-6)
    assert {"gradient_norm", "learning_rate", "losses/head_3", "eval/tokens_per_round", "tokens_per_second"} <= set(
        events
    )


@pytest.mark.full
def test_going_on_from_heads_and_averaging(fitted, tmp_path, monkeypatch):
    directory, config, result, _ = fitted
    training = CachedMedusaConfig(
        epochs=1, batch_size=256, learning_rate=1e-2, distillation=0.5, accumulate=2, ema=0.9, weighting="decay"
    )
    changed = dataclasses.replace(
        config, start_from=str(directory / "heads.safetensors"), num_heads=1, reduced_vocab_size=None,
        training=training, tree="chain:3",
    )  # fmt: skip
    further, printed = run(changed, tmp_path)
    start = further["evaluations"][0]["eval"]
    np.testing.assert_allclose(start["accuracy"]["top1"], result["record"]["accuracy"]["top1"], atol=0.02)
    assert sj.load_heads(tmp_path / "heads.safetensors", config.target().config).config.reduced_vocab_size == 48
    assert ("larger start_share" in printed) == (further["record"]["tokens_per_round"] < start["tokens_per_round"])
    assert further["tree"]["nodes"] == 4
    assert further["evaluations"][-1]["step"] % 2 == 0
    # As if the heads were Medusa-2's, of this backbone and of another one.
    target = config.target()
    for number, (owner, kept, said) in enumerate([
        (fingerprint(target.params), {"backbone": fingerprint(target.params)}, False), ("0" * 16, {}, True)
    ]):  # fmt: skip
        begun = tmp_path / f"begun_{number}.safetensors"
        heads = sj.load_heads(directory, target.config)
        save_heads(begun, heads, {"backbone": owner})
        changed_meanwhile = functools.partial(save_heads, begun, heads, {"backbone": "1" * 16})
        with monkeypatch.context() as patch:
            patch.setattr(training_study, "train", followed_by(training_study.train, changed_meanwhile))
            _, printed = run(dataclasses.replace(changed, start_from=str(begun)), tmp_path / f"next_{number}")
        assert heads_metadata(begun)["backbone"] == "1" * 16
        assert {k: v for k, v in heads_metadata(tmp_path / f"next_{number}").items() if k == "backbone"} == kept
        assert ("they are a start for heads of this model" in " ".join(printed.split())) == said
    # The same run goes on from its end, and averages its heads with those that it began with.
    (tmp_path / "result.json").unlink()
    ended, begun = (sj.load_heads(path, config.target().config).params for path in (tmp_path, directory))
    averaged, printed = run(dataclasses.replace(changed, start_share=0.25), tmp_path)
    assert "whose share is 0.25" in printed
    assert ("larger start_share" in printed) == (averaged["record"]["tokens_per_round"] < start["tokens_per_round"])
    assert averaged["evaluations"] == further["evaluations"]
    assert averaged["record"]["losses"] != further["record"]["losses"]
    table = RankTable.load(tmp_path / "heads.ranks.npz")
    np.testing.assert_allclose(table.accuracy(1), averaged["record"]["accuracy"]["top1"], atol=0.02)
    exported = sj.load_heads(tmp_path, config.target().config).params
    for name in exported:
        near = {"rtol": 0.02, "atol": 1e-4}
        np.testing.assert_allclose(exported[name], 0.25 * begun[name] + 0.75 * ended[name], **near)
        for share in (0.0, 0.5, 0.75, 1.0):  # others would be seen
            assert not np.allclose(exported[name], share * begun[name] + (1 - share) * ended[name], **near)
    wild = dataclasses.replace(training, learning_rate=1e3)
    assert "try a larger start_share" in run(dataclasses.replace(changed, training=wild), tmp_path / "worse")[1]
    with pytest.raises(sj.ConfigError, match=r"start_share is 0.5, but there are no heads to average with"):
        dataclasses.replace(config, start_share=0.5)
    with pytest.raises(sj.ConfigError, match=r"start_share is 1.0"):
        dataclasses.replace(config, start_share=1.0)
    with pytest.raises(sj.CheckpointError, match="there are no heads"):
        run(dataclasses.replace(changed, start_from=str(tmp_path / "none")), tmp_path / "absent")
    with pytest.raises(sj.TreeError, match="3 heads can fill a depth of 3"):
        run(dataclasses.replace(changed, tree="chain:4"), tmp_path / "deep")


REDUCED = r"reduced_vocab_size is 9999; expected 1 to \d+, the model's vocabulary\. Set it to None"
TOLD_AT_ONCE = [
    ({"start_from": "none"}, sj.CheckpointError, "there are no heads"),
    ({"tree": "chain:9"}, sj.TreeError, "4 heads can fill a depth of 4"),
    ({"tree": "nosuch"}, sj.TreeError, "no tree 'nosuch'"),
    ({"num_heads": 0}, sj.ConfigError, "num_heads is 0; expected an integer of at least 1"),
    ({"num_layers": 0}, sj.ConfigError, "num_layers is 0 and projection 'shared'"),
    ({"reduced_vocab_size": 9999}, sj.ConfigError, REDUCED),
    ({"reduced_vocab_size": 0}, sj.ConfigError, "reduced_vocab_size is 0; expected 1 to 256"),
]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("target")))


@pytest.mark.parametrize(("changes", "error", "message"), TOLD_AT_ONCE)
def test_what_needs_no_text_to_be_told_is_told_before_it_is_made(chat_model, tmp_path, changes, error, message):
    data = Corpus(
        str(tmp_path / "text"), "seeds", shards=2, shard_size=2, batch_size=2, max_answer_tokens=4, evaluation_share=0.5
    )
    if "start_from" in changes:
        changes = {"start_from": str(tmp_path / changes["start_from"])}
    config = TrainCachedMedusa(name="tiny", model=chat_model, data=data, **({"reduced_vocab_size": None} | changes))
    with pytest.raises(error, match=message):
        run(config, tmp_path / "out")
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (train_random, "train_tiny_qwen2"),
        pytest.param(train_draft_heads, "train_smollm2_draft_medusa", marks=pytest.mark.full),
    ],
)
def test_other_text_is_not_made_either(tmp_path, monkeypatch, module, name):
    monkeypatch.setattr(module, "answer", lambda *args, **options: pytest.fail("the text was made"))
    config = load_config(EXPERIMENTS / f"{name}.py")
    for changes, error, message in (
        ({"tree": "chain:9"}, sj.TreeError, "heads can fill a depth of"),
        ({"reduced_vocab_size": 9999}, sj.ConfigError, REDUCED),
    ):
        with pytest.raises(error, match=message):
            run(dataclasses.replace(config, **changes), tmp_path)


def test_heads_for_distilled_text_name_the_target_as_it_is_loaded(tmp_path):
    """A file's own name for itself, such as a GGUF's "Smollm2 135M 8k Lc100K Mix1 Ep2", loads nothing."""
    target, text = str(save_chat_model(tmp_path / "target")), str(tmp_path / "text")
    sizes = {"shards": 2, "shard_size": 4, "batch_size": 4, "max_answer_tokens": 8}
    data = Corpus(text, "seeds", temperature=1.0, evaluation_share=0.4, **sizes)
    training = CachedMedusaConfig(epochs=1, batch_size=16, select="best")
    config = TrainCachedMedusa(
        name="tiny", model=target, data=data, num_heads=2, reduced_vocab_size=None, training=training
    )
    result, _ = run(config, tmp_path / "out")
    assert heads_metadata(tmp_path / "out" / "heads.safetensors")["target"] == target
    counts = [result["data"][side]["conversations"] for side in ("training", "held_out")]
    assert min(counts) > 0
    assert sum(counts) <= 8
    table = RankTable.load(tmp_path / "out" / "heads.ranks.npz")
    assert table.manifest["model_name"] == target
    assert len(table.lengths) == counts[1]


def test_qwen2_5_without_a_network(tmp_path, monkeypatch):
    config = load_config(EXPERIMENTS / "train_qwen2_5_0_5b_medusa.py")
    assert config.model == "Qwen/Qwen2.5-0.5B-Instruct"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        sj.CheckpointError, match=r"Qwen2.5-0.5B-Instruct' .* cannot be downloaded .* check the name and"
    ):
        run(config, tmp_path / "out")


@pytest.mark.full
def test_the_draft_models_own_heads(tmp_path):
    """The experiment that made them, on less text: prompts in another model's tokens, and heads that load."""
    config = load_config(EXPERIMENTS / "train_smollm2_draft_medusa.py")
    training = dataclasses.replace(config.training, epochs=2, batch_size=64)
    less = {"prompts": 48, "batch_size": 48, "max_answer_tokens": 24, "evaluation_share": 0.2, "training": training}
    result, _ = run(dataclasses.replace(config, **less), tmp_path)
    first, last = result["evaluations"][0]["eval"], result["evaluations"][-1]["eval"]
    assert all(b < a for a, b in zip(first["losses"], last["losses"], strict=True))
    held_out, trained = (result["data"][side]["conversations"] for side in ("held_out", "training"))
    assert held_out > 0
    assert 24 < held_out + trained <= 48
    model = sj.load_draft("smollm2-draft")[0]
    heads = sj.load_heads(tmp_path / "heads.safetensors", model.config)
    assert 0 < len(RankTable.load(tmp_path / "heads.ranks.npz").check(model, heads).lengths) <= held_out
