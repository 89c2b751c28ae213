"""Distilling a draft model end to end, as `specjax run` runs it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import save_chat_model
from rich.console import Console

import specjax as sj
from specjax.cli.main import main
from specjax.corpus.build import Corpus
from specjax.errors import ConfigError
from specjax.loading import checkpoint
from specjax.studies.train_draft import EvaluateDraft
from specjax.training.run import selected
from specjax.training.steps import LOG

EXPERIMENT = """
from specjax.corpus.build import Corpus
from specjax.studies.train_draft import TrainDraft
from specjax.training.draft import DraftConfig

def get_config():
    data = Corpus(
        {text!r}, {prompts!r}, shards=2, shard_size=40, batch_size=40, max_answer_tokens=24, temperature=1.0,
        evaluation_share=0.2,
    )
    training = DraftConfig(
        epochs=30, batch_size=4, length=80, learning_rate=3e-2, schedule="constant", checkpoint_every=20, keep=1,
        select="best",
    )
    return TrainDraft(
        "tiny_draft", {model!r}, reduced_vocab_size=128, hidden_size=16, intermediate_size=32, num_layers=1,
        num_heads=2, num_kv_heads=1, data=data, training=training,
    )
"""


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The target's directory, the command, the run's directory and its result."""
    directory = tmp_path_factory.mktemp("draft")
    target = save_chat_model(directory / "target")
    lines = [{"question_id": i, "category": "c", "turns": [f"say {i}"]} for i in range(80)]
    (directory / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names = {"text": str(directory / "text"), "prompts": str(directory / "p.jsonl"), "model": str(target)}
    (directory / "tiny_draft.py").write_text(EXPERIMENT.format(**names))
    out = directory / "out"
    command = ["run", str(directory / "tiny_draft.py"), "--output-dir", str(out)]
    assert main(command) == 0
    return target, command, out, json.loads((out / "result.json").read_text())


def test_the_draft_is_accepted_more_than_at_first(distilled):
    target, _, out, result = distilled
    first, record = result["evaluations"][0]["eval"], result["record"]
    assert record["acceptance"] > first["acceptance"] + 0.2
    assert record["agreement"] > first["agreement"] + 0.2
    model = sj.load_model(target)
    draft, token_map = sj.load_draft(out / "draft", dtype="float32")
    assert len(token_map) == 128
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "say 3"}])
    request = {"max_new_tokens": 200, "eos_token_ids": ()}
    alone, drafted = (
        sj.generate(model, prompt, drafter=drafter, **request)
        for drafter in (None, sj.DraftModelDrafter(draft, sj.Tree.chain(2), token_map=token_map))
    )
    np.testing.assert_array_equal(drafted.tokens, alone.tokens)
    sampler = sj.DraftModelDrafter(draft, sj.Tree.chain(2), 1.0, token_map=token_map)
    sampled = sj.generate(
        model, prompt, drafter=sampler, acceptance=sj.Sample(), key=jax.random.key(0), **request
    ).tokens_per_round
    expected = 1 + record["acceptance"] + record["acceptance"] ** 2  # if acceptances were independent
    assert sampled == pytest.approx(expected, abs=0.25)


def test_the_best_checkpoint_is_the_one_that_is_written(distilled):
    _, command, out, result = distilled
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    chosen = selected(log, "best", "acceptance")
    assert (chosen["step"], chosen["eval"]) == (result["step"], result["record"])
    assert chosen["eval"]["acceptance"] == max(entry["eval"]["acceptance"] for entry in log if "eval" in entry)
    assert checkpoint.best(out / "checkpoints") == result["step"]
    steps = len([entry for entry in log if "loss" in entry])
    assert {int(path.name) for path in (out / "checkpoints").iterdir()} == {result["step"], steps}
    # Asked for the last one, the finished run gives that: nothing is trained again.
    other = [*command, "--training.select", "last"]
    weights = (out / "draft" / "model.safetensors").read_bytes()
    (out / "result.json").unlink()  # which would not be overwritten
    assert main(other) == 0
    again = json.loads((out / "result.json").read_text())
    assert again["step"] == steps
    assert again["record"] == log[-1]["eval"]
    assert (weights == (out / "draft" / "model.safetensors").read_bytes()) == (steps == result["step"])


def test_the_run_is_followed(distilled):
    _, _, out, result = distilled
    assert sorted(result["figures"]) == sorted(p.name for p in out.glob("*.png"))
    for name in result["figures"]:
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert list((out / "tensorboard").iterdir())
    assert result["answer_tokens"]["held_out"] == 24 * result["conversations"]["held_out"]
    assert result["cut_answer_tokens"] == {"training": 0, "held_out": 0}
    assert set(result["throughput"]) == {"steps_per_second", "tokens_per_second"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (["--reduced-vocab-size", size], f"reduced_vocab_size is {size}; expected 2 to 256")
            for size in ("0", "1", "257", "8192")
        ),
        (["--num-heads", "0"], "num_heads is 0 at hidden_size 16; expected at least 1"),
        (["--num-heads", "3"], "num_heads is 3 at hidden_size 16; expected at least 1, and an even width for each"),
        (["--num-kv-heads", "0"], "num_kv_heads is 0; expected a positive integer"),
        (["--hidden-size", "64"], "hidden_size is 64; expected at most 32, the target's"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_before_the_text_is_made(distilled, tmp_path, capsys, options, message):
    _, (run, file, *_), _, _ = distilled
    text = tmp_path / "text"
    command = [run, file, "--output-dir", str(tmp_path / "out"), "--data.directory", str(text)]
    assert main([*command, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not text.exists()


def test_a_draft_is_evaluated_on_new_answers(distilled, tmp_path):
    """To other prompts than those that the draft learned from; before training, the target took next to nothing."""
    target, _, out, result = distilled
    lines = [{"question_id": i, "category": "c", "turns": [f"say {i}"]} for i in range(80, 100)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = Corpus(
        str(tmp_path / "text"), str(tmp_path / "p.jsonl"), shards=1, shard_size=20, batch_size=20, max_answer_tokens=24,
        temperature=1.0, answer_seed=1, evaluation_share=0.2,
    )  # fmt: skip
    evaluated = EvaluateDraft("evaluated", str(target), str(out / "draft"), data).run(tmp_path, Console())
    assert 10 < evaluated["conversations"] <= 20
    assert 0 < evaluated["answer_tokens"] <= 24 * evaluated["conversations"]
    assert evaluated["cut_answer_tokens"] == 0
    before = result["evaluations"][0]["eval"]
    assert evaluated["evaluation"]["acceptance"] > before["acceptance"] + 0.1
    assert evaluated["evaluation"]["text"] < before["text"]
    with pytest.raises(ConfigError, match="has no token map"):
        EvaluateDraft("evaluated", str(target), str(target), data).run(tmp_path, Console())
    unmade = dataclasses.replace(data, directory=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="batch_size"):
        EvaluateDraft("evaluated", str(target), str(out / "draft"), unmade, batch_size=0).run(tmp_path, Console())
    assert not (tmp_path / "none").exists()
