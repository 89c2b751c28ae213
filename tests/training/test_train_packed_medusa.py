"""Medusa-2 end to end, as `specjax run` runs it, alone and as two processes; the README's commands for training."""

import dataclasses
import functools
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import followed_by, save_chat_model
from jax.sharding import AbstractMesh, AxisType

import specjax as sj
from specjax.cli.main import main
from specjax.drafters.registry import build_drafter
from specjax.fingerprint import fingerprint
from specjax.heads import init_heads
from specjax.loading.head_files import heads_metadata
from specjax.studies import training_study
from specjax.training.mesh import MeshConfig
from specjax.training.run import selected
from specjax.training.steps import LOG

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
from specjax.corpus.build import Corpus
from specjax.studies.train_packed_medusa import TrainPackedMedusa
from specjax.training.packed_medusa import PackedMedusaConfig
from specjax.training.lora import LoraConfig

def get_config():
    data = Corpus(
        {text!r}, {prompts!r}, shards=2, shard_size=40, batch_size=40, max_answer_tokens=24, temperature=0.3,
        evaluation_share=0.2, features=False,
    )
    training = PackedMedusaConfig(
        epochs=16, batch_size=4, length=80, lora=LoraConfig(4, 8.0, 0.05), learning_rate=2e-2, lora_learning_rate=2e-3,
        head_weight=0.2, checkpoint_every=30, select="best",
    )
    return TrainPackedMedusa(
        name="tiny_medusa2", model={model!r}, num_heads=2, reduced_vocab_size=128, data=data, training=training
    )
"""


WAITED_FOR = """
import runpy, time, types
from pathlib import Path
from specjax.studies import train_packed_medusa
from specjax.training import mesh

making, waiting = Path({directory!r}, "making"), Path({directory!r}, "waiting")
load_corpus = train_packed_medusa.load_corpus

def sleep(seconds):  # what a process does, again and again, that waits for another one's mark
    if making.exists():
        waiting.touch()
    time.sleep(seconds)

def made_while_the_other_waits(*args, make=True, **options):
    if make:
        making.touch()
        last = time.monotonic() + 120
        while not waiting.exists():
            assert time.monotonic() < last, "the other process does not wait for a mark"
            time.sleep(0.05)
    return load_corpus(*args, make=make, **options)

mesh.time = types.SimpleNamespace(sleep=sleep)
train_packed_medusa.load_corpus = made_while_the_other_waits
get_config = runpy.run_path({experiment!r})["get_config"]
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A chat model in a directory."""
    return save_chat_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def experiment(target, tmp_path_factory):
    """The experiment's file, with prompts beside it."""
    directory = tmp_path_factory.mktemp("experiment")
    lines = [{"question_id": i, "category": "c", "turns": [f"say {i}"]} for i in range(80)]
    (directory / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names = {"text": str(directory / "text"), "prompts": str(directory / "p.jsonl"), "model": str(target)}
    (directory / "tiny_medusa2.py").write_text(EXPERIMENT.format(**names))
    return directory / "tiny_medusa2.py"


@pytest.fixture(scope="module")
def alone(experiment, tmp_path_factory):
    """The run in this process: its directory and result."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(["run", str(experiment), "--output-dir", str(out)]) == 0
    return out, json.loads((out / "result.json").read_text())


def log_of(directory):
    """The records of a run."""
    return [json.loads(line) for line in (directory / LOG).read_text().splitlines()]


def losses(log):
    """The loss of every step, with its parts."""
    return np.array([[r["loss"], r["backbone"], *r["losses"]] for r in log if "loss" in r])


def test_fitted_heads_and_backbone_are_what_was_judged(target, alone):
    out, result = alone
    log = log_of(out)
    first, record = result["evaluations"][0]["eval"], result["record"]
    assert min(np.subtract(record["accuracy"]["top1"], first["accuracy"]["top1"])) > 0.2
    assert record["tokens_per_round"] > first["tokens_per_round"] + 0.3
    assert 0 <= record["backbone"] < 0.2  # nats from the frozen model, that the text is of
    chosen = selected(log, "best")
    assert (chosen["step"], chosen["eval"]) == (result["step"], record)

    model = sj.load_model(target, dtype=jnp.bfloat16)
    backbone = sj.load_model(out / "backbone", dtype=jnp.bfloat16)
    assert backbone.config == dataclasses.replace(model.config, name=backbone.config.name)
    messages = [{"role": "user", "content": "say 3"}]
    prompt = backbone.tokenizer.apply_chat_template(messages)
    assert prompt == model.tokenizer.apply_chat_template(messages)
    moved = [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (model.params, backbone.params)), strict=True)]
    assert any(moved)
    assert not all(moved)  # the embedding, for one
    heads = sj.load_heads(out / "heads.safetensors", backbone.config, dtype=jnp.bfloat16)
    assert heads.config.reduced_vocab_size == 128
    assert heads_metadata(out / "heads.safetensors")["hits"] == record["hits"]
    fresh = init_heads(heads.config, backbone.params, heads.token_map)
    fitted, begun = (
        sj.generate(backbone, prompt, drafter=sj.MedusaDrafter(h, sj.Tree.chain(2)), max_new_tokens=48).tokens_per_round
        for h in (heads, fresh)
    )
    assert fitted > begun + 0.3


def test_the_result_is_complete(alone):
    out, result = alone
    log = log_of(out)
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert all({"losses", "backbone", "gradient_norm", "learning_rate"} <= set(r) for r in steps)
    assert result["processes"] == 1
    assert result["mesh"] == {"data": 1, "model": 1}
    assert sum(result["conversations"].values()) <= 80
    assert result["answer_tokens"]["held_out"] == 24 * result["conversations"]["held_out"]
    assert result["cut_answer_tokens"] == {"training": 0, "held_out": 0}
    assert result["tree"]["nodes"] == 10
    assert [e["step"] for e in result["evaluations"]] == [*range(0, len(steps), 30), len(steps)]
    assert set(result["throughput"]) == {"steps_per_second", "tokens_per_second"}
    assert sorted(result["figures"]) == sorted(p.name for p in out.glob("*.png"))
    assert "backbone.png" in result["figures"]
    for name in result["figures"]:
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert len(list((out / "tensorboard").iterdir())) == 1
    kept = {int(p.name) for p in (out / "checkpoints").iterdir()}
    assert {len(steps), result["step"]} <= kept


@pytest.mark.full
def test_kills_change_nothing(experiment, alone, tmp_path):
    """SIGKILL at two random steps, each resumed: every loss and the weights are the uninterrupted run's, exactly."""
    out, (whole, result) = tmp_path / "out", alone
    run, log = ["run", str(experiment), "--output-dir", str(out)], out / LOG
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    for step in sorted(random.Random(0).sample(range(5, 120), 2)):
        process = subprocess.Popen(
            [sys.executable, "-m", "specjax.cli", *run], env=environment, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and (not log.exists() or f'"step": {step},' not in log.read_text()):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (out / "result.json").exists()
    assert main(run) == 0
    np.testing.assert_array_equal(losses(log_of(out)), losses(log_of(whole)))
    again = json.loads((out / "result.json").read_text())
    assert (again["record"], again["step"]) == (result["record"], result["step"])
    ours, theirs = (safetensors.numpy.load_file(directory / "heads.safetensors") for directory in (out, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.tobytes() == theirs[name].tobytes()


STAGE_ONE = """
import dataclasses, runpy

def get_config():
    config = runpy.run_path({!r})["get_config"]()
    return dataclasses.replace(config, training=dataclasses.replace(config.training, lora=None))
"""


@pytest.mark.full
def test_going_on_from_heads(target, experiment, alone, tmp_path, capsys, monkeypatch):
    """Two stages, each from heads that there are, whose number and vocabulary hold: Medusa-1, then Medusa-2."""
    whole, result = alone
    (tmp_path / "one.py").write_text(STAGE_ONE.format(str(experiment)))
    other = ["--num-heads", "1", "--reduced-vocab-size", "16", "--training.epochs", "2"]

    def stage(file, out, start):
        assert main(["run", str(file), *other, "--output-dir", str(out), "--start-from", str(start)]) == 0
        return json.loads((out / "result.json").read_text())

    one = stage(tmp_path / "one.py", tmp_path / "one", whole / "heads.safetensors")
    two = stage(experiment, tmp_path / "two", tmp_path / "one" / "heads.safetensors")
    assert not (tmp_path / "one" / "backbone").exists()
    assert (tmp_path / "two" / "backbone").is_dir()
    fresh = result["evaluations"][0]["eval"]
    for again in (one, two):
        begun = again["evaluations"][0]["eval"]
        assert min(np.subtract(begun["accuracy"]["top1"], fresh["accuracy"]["top1"])) > 0.15
        assert begun["tokens_per_round"] > fresh["tokens_per_round"] + 0.3
        assert (again["heads"]["num_heads"], again["heads"]["reduced_vocab_size"]) == (2, 128)
        assert again["tree"]["nodes"] == 10
    # Stage two begins where stage one ended, but for the bfloat16 of the file.
    np.testing.assert_allclose(begun["accuracy"]["top1"], one["record"]["accuracy"]["top1"], atol=0.02)
    files = [
        safetensors.numpy.load_file(out / "heads.safetensors") for out in (whole, tmp_path / "one", tmp_path / "two")
    ]
    for ours, theirs in itertools.pairwise(files):
        np.testing.assert_array_equal(ours["token_map"], theirs["token_map"])
        assert (ours["params.kernel_0"] != theirs["params.kernel_0"]).any()
    named = [heads_metadata(tmp_path / out / "heads.safetensors").get("backbone") for out in ("one", "two")]
    assert named == [None, fingerprint(sj.load_model(tmp_path / "two" / "backbone").params)]
    convert = ["convert", "--heads", str(tmp_path / "two" / "heads.safetensors"), "--to", "vllm", "--output-dir"]
    assert main([*convert, str(tmp_path / "b"), "--model", str(tmp_path / "two" / "backbone")]) == 0
    assert main([*convert, str(tmp_path / "a"), "--model", str(target)]) == 2
    assert "belong to a backbone that was fitted with them" in capsys.readouterr().err
    # Medusa-1 once more: on that backbone the heads belong to it, too; on another model they are a start alone.
    # What the heads' file says of that is read when they are: it may change while they are trained.
    begun = tmp_path / "begun.safetensors"
    changed_meanwhile = functools.partial(shutil.copy, whole / "heads.safetensors", begun)
    monkeypatch.setattr(training_study, "train", followed_by(training_study.train, changed_meanwhile))
    last = ["run", str(tmp_path / "one.py"), *other, "--start-from", str(begun)]
    stages = {"three": str(tmp_path / "two" / "backbone"), "four": str(target)}
    for (name, on), owner, said in zip(stages.items(), (named[1], None), (False, True), strict=True):
        shutil.copy(tmp_path / "two" / "heads.safetensors", begun)
        text = str(tmp_path / f"{name}_text")  # of that model's own
        assert main([*last, "--output-dir", str(tmp_path / name), "--model", on, "--data.directory", text]) == 0
        assert heads_metadata(begun) == heads_metadata(whole / "heads.safetensors")
        assert heads_metadata(tmp_path / name / "heads.safetensors").get("backbone") == owner
        assert ("they are a start for heads of this model" in " ".join(capsys.readouterr().out.split())) == said
    assert main(["convert", "--heads", str(tmp_path / "three" / "heads.safetensors"), *convert[3:], str(tmp_path / "c"),
                 "--model", str(target)]) == 2  # fmt: skip
    assert "or with those that they go on from" in " ".join(capsys.readouterr().err.split())
    with pytest.warns(
        UserWarning, match="name as the model the folder 'backbone' .* With this one fewer drafts are accepted"
    ):
        build_drafter("medusa", sj.load_model(target), files={"heads": str(tmp_path / "two" / "heads.safetensors")})

    run = ["run", str(experiment), *other]
    (tmp_path / "two" / "result.json").unlink()  # a run that was stopped, gone on with as if from the LM head
    capsys.readouterr()
    assert main([*run, "--output-dir", str(tmp_path / "two")]) == 2
    refused = capsys.readouterr().err
    assert "begun with" in refused
    assert "heads" in refused
    text = tmp_path / "text"
    absent = ["--start-from", str(tmp_path / "none"), "--data.directory", str(text)]
    assert main([*run, "--output-dir", str(tmp_path / "no"), *absent]) == 2
    assert "there are no heads" in capsys.readouterr().err
    deep = ["--start-from", str(whole / "heads.safetensors"), "--tree", "chain:3", "--data.directory", str(text)]
    assert main([*run, "--output-dir", str(tmp_path / "no"), *deep]) == 2
    assert "2 heads can fill a depth of 2" in capsys.readouterr().err.replace("\n", " ")
    assert not text.exists()  # both told before the text is made
    worse = ["--start-from", str(whole / "heads.safetensors"), "--training.learning-rate", "100"]
    assert main([*run, "--output-dir", str(tmp_path / "worse"), *worse]) == 0
    assert "try a lower learning rate, or more text" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tree", "nosuch"], "no tree 'nosuch'"),
        (["--num-heads", "0"], "num_heads is 0; expected an integer of at least 1"),
        (["--num-layers", "0"], "num_layers is 0 and projection 'shared'"),
        (
            ["--reduced-vocab-size", "8192"],
            "reduced_vocab_size is 8192; expected 1 to 256, the model's vocabulary. Set",
        ),
        (["--reduced-vocab-size", "0"], "reduced_vocab_size is 0; expected 1 to 256"),
        (["--mesh.data", "3"], "a batch of 4 rows does not divide over mesh axis 'data' of size 3"),
        (["--mesh.model", "3"], "of size 256 does not divide over mesh axis 'model' of size 3"),
        (["--mesh.model", "4"], "axis K of size 2 does not divide over mesh axis 'model' of size 4"),
        (["--mesh.model", "2", "--reduced-vocab-size", "127"], "heads' vocabulary of 127 tokens does not divide over"),
    ],
)
def test_what_needs_no_text_to_be_told_is_told_before_it_is_made(
    experiment, tmp_path, capsys, monkeypatch, options, message
):
    def build(self):  # as if there were so many devices
        axes = (AxisType.Auto,) * 2
        return AbstractMesh((self.data or 1, self.model), ("data", "model"), axis_types=axes)

    monkeypatch.setattr(MeshConfig, "build", build)
    text, out = tmp_path / "text", tmp_path / "out"
    command = ["run", str(experiment), "--output-dir", str(out), "--data.directory", str(text)]
    assert main([*command, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not text.exists()


@pytest.mark.full
def test_two_hosts_give_the_result_of_one(experiment, tmp_path):
    """Process 0 makes the text and writes the result. The other waits for a mark, however long it takes: in no
    collective, where XLA:CPU would give up.

    In float32: in bfloat16 the rounding depends on how many rows a process has, and grows from step to step, by how
    much depends on the kind of CPU.
    """
    same = ["--dtype", "float32", "--training.epochs", "6", "--data.directory", str(tmp_path / "text")]
    (tmp_path / "waited_for.py").write_text(WAITED_FOR.format(directory=str(tmp_path), experiment=str(experiment)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    one, two = tmp_path / "one", tmp_path / "two"
    hosts = ["--hosts.coordinator", coordinator, "--hosts.processes", "2", "--hosts.process-id"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "specjax.cli", "run", str(tmp_path / "waited_for.py"), "--output-dir", str(two)]
    both = [
        subprocess.Popen(
            [*command, *same, *hosts, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    assert ["wrote" in text for text in said] == [True, False]
    assert ["distilling" in text for text in said] == [True, False]
    assert main(["run", str(experiment), "--output-dir", str(one), *same]) == 0
    ours, theirs = (json.loads((directory / "result.json").read_text()) for directory in (two, one))
    assert (ours["processes"], ours["mesh"]) == (2, {"data": 2, "model": 1})
    for name in ("conversations", "answer_tokens", "tree", "figures", "step"):
        assert ours[name] == theirs[name]
    assert len(losses(log_of(one))) > 50
    np.testing.assert_allclose(losses(log_of(two)), losses(log_of(one)), rtol=0, atol=1e-5)  # seen: 1.4e-6
    for a, b in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        np.testing.assert_allclose(a["eval"]["accuracy"]["top1"], b["eval"]["accuracy"]["top1"], atol=0.005)
        assert a["eval"]["tokens_per_round"] == pytest.approx(b["eval"]["tokens_per_round"], abs=0.01)
    files = [safetensors.numpy.load_file(directory / "heads.safetensors") for directory in (one, two)]
    assert files[0].keys() == files[1].keys()
    for name, weight in files[0].items():  # stored in bfloat16: next to each other at the most
        np.testing.assert_allclose(files[1][name].astype(np.float32), weight.astype(np.float32), rtol=2**-7, atol=1e-5)
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert (two / "backbone").is_dir()


def test_hosts_need_one_directory_and_a_run_its_settings(experiment, alone, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    together = ["--hosts.coordinator", "127.0.0.1:1", "--hosts.processes", "2", "--hosts.process-id", "1"]
    assert main(["run", str(experiment), *together]) == 2
    assert "share one output directory, and none is named; give all of them the same --output-dir" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
    out, _ = alone
    copy = tmp_path / "out"
    copy.mkdir()
    for name in ("checkpoints", "settings.json", LOG):
        (copy / name).symlink_to(out / name)
    assert main(["run", str(experiment), "--output-dir", str(copy), "--training.head-weight", "0.5"]) == 2
    assert "begun with training.head_weight 0.2 (now 0.5): go back" in capsys.readouterr().err.replace("\n", " ")


def test_heads_are_fitted_on_the_fly_from_the_command_line(target, experiment, tmp_path):
    """Medusa-1: the backbone stays, and no features are kept."""
    prompts, text, out = experiment.parent / "p.jsonl", tmp_path / "text", tmp_path / "out"
    options = [f"--model={target}", f"--data.prompts={prompts}", f"--data.directory={text}", f"--output-dir={out}"]
    small = ["--data.shards=2", "--data.shard-size=40", "--data.batch-size=40", "--data.max-answer-tokens=24"]
    small += [
        "--data.temperature=0.3",
        "--data.evaluation-share=0.3",
        "--training.epochs=1",
        "--training.batch-size=4",
        "--training.length=80",
    ]
    command = ["run", str(ROOT / "experiments" / "train_medusa_on_the_fly.py"), "--reduced-vocab-size=64"]
    assert main([*command, *options, *small]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["training"]["lora"] is None
    assert (out / "heads.safetensors").is_file()
    assert not (out / "backbone").exists()
    with np.load(text / "shard_00000.npz") as shard:
        assert "features" not in shard


def test_the_readmes_commands_for_training(target, tmp_path, monkeypatch):
    """On a tiny model and a few chats, word for word but for the sizes; then once more, as after a stop."""
    section = (ROOT / "README.md").read_text().split("### Train heads")[1].split("\n### ")[0]
    commands = [
        shlex.split(line) for block in re.findall(r"```\n(.*?)```", section, re.DOTALL) for line in block.splitlines()
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    asked = [{"question_id": i, "category": "c", "turns": [f"say {i}"]} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    turns = ("user", "assistant", "user", "assistant")
    chats = [{"messages": [{"role": r, "content": f"{r} {i} {i % 7}"} for r in turns]} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    small = ["--reduced-vocab-size", "64", "--training.batch-size", "64", "--training.epochs", "1"]
    small += ["--data.evaluation-share", "0.3"]
    answers = (
        "--data.shards 1 --data.shard-size 40 --data.batch-size 40 --data.max-answer-tokens 16 --data.temperature 1"
    )
    answers = answers.split()  # greedily this model answers all alike
    small += answers
    done = []
    for word, command, *rest in commands:
        assert word == "specjax"
        rest = [str(target) if part == "MODEL" else part for part in rest]
        assert main([command, *rest, *(small if command == "run" else [])]) == 0
        done.append((command, rest))
    assert [command for command, _ in done] == ["run", "convert"]
    result = tmp_path / "results" / "mine" / "result.json"
    first = json.loads(result.read_text())
    assert first["data"]["training"]["conversations"] > 0
    assert (tmp_path / "heads_for_vllm" / "config.json").is_file()
    result.unlink()  # a run that was stopped has none yet
    assert main(["run", *done[0][1], *small]) == 0
    again = json.loads(result.read_text())
    assert (again["record"], again["step"]) == (first["record"], first["step"])
    # Chats as they are, as the sentence below has it.
    words = [w for w in done[0][1] if w not in ("--data.prompts", "prompts.jsonl", "--data.directory", "text")]
    chatting = [*words[:-1], "results/chats", "--data.chats", "chats.jsonl", *small[: -len(answers)]]
    assert main(["run", *chatting]) == 0
    told = json.loads((tmp_path / "results" / "chats" / "result.json").read_text())
    assert told["data"]["training"]["conversations"] > 0
