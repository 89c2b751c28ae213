"""Experiments end to end on a tiny real model in a directory: result.json, figures, overrides, refusals."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HITS
from rich.console import Console

import specjax as sj
from specjax import decode
from specjax.cli.main import main
from specjax.ranks.search import expected_tokens, greedy_tree
from specjax.studies import compare as bench
from specjax.studies.decode import DecodeExperiment, Decoding, Method, Prompts
from specjax.studies.round_time import choose_tree
from specjax.studies.runner import configured, load_config


@pytest.fixture
def experiment(checkpoint, tmp_path):
    heads = checkpoint / "heads" / "heads.safetensors"
    file = tmp_path / "tiny.py"
    file.write_text(
        f"""
from specjax.studies.decode import DecodeExperiment, Decoding, Method, Prompts
def get_config():
    return DecodeExperiment("tiny", {str(checkpoint)!r}, (
        Method("autoregressive", "float32"),
        Method("medusa", "float32", {str(heads)!r}, "cartesian:2,1"),
        Method("medusa_auto", "float32", {str(heads)!r}),
    ), Prompts(per_category=1), Decoding(max_new_tokens=12), tree_sizes=(2, 4))
"""
    )
    return file


def test_run_writes_the_result_and_the_figures(experiment, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", str(experiment), "--output-dir", str(out), "--decoding.max-new-tokens", "9"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["experiment"] == "tiny"
    assert result["prompts"] == 5
    assert result["config"]["decoding"]["max_new_tokens"] == 9
    assert result["environment"]["jax"] == jax.__version__
    base, medusa, auto = result["methods"]
    assert "speedup" not in base
    assert base["tokens_per_round"] == 1.0
    for method in (medusa, auto):
        assert method["identical_to_autoregressive"] == {"same": 5, "of": 5}
        assert method["tokens_per_round"] == pytest.approx(method["accepted_per_round"] + 1)
        assert 0 < method["speedup"]["min"] <= method["speedup"]["median"] <= method["speedup"]["max"]
        assert set(method["per_category"]) == {"chat", "code", "translation", "long_context", "math"}
        assert all(
            a >= b for a, b in zip(method["acceptance_by_depth"], method["acceptance_by_depth"][1:], strict=False)
        )
    assert auto["tree_nodes"] in (2, 4)
    assert result["tree_choice"][0]["seconds"] > 0
    assert sj.Tree.load(out / "tree_medusa_auto.json").size == auto["tree_nodes"]
    for figure in ("tokens_per_round", "acceptance_by_depth", "speed"):
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert "medusa_auto" in capsys.readouterr().out
    # A result is never overwritten.
    assert main(["run", str(experiment), "--output-dir", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_prompts_from_a_file(experiment, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"question_id": 7, "category": "mine", "turns": ["hello there"]}\n')
    out = tmp_path / "out"
    assert main(["run", str(experiment), "--prompts", str(prompts), f"--output-dir={out}"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["prompts"] == 1
    assert list(result["methods"][1]["per_category"]) == ["mine"]


@pytest.mark.parametrize(
    ("skip", "wanted", "left"), [(0, 2, (0, 1, 2, 3)), (1, 1, (2, 3)), (2, None, (4, 5)), (3, 1, ())]
)
def test_prompts_are_taken_by_category(checkpoint, tmp_path, skip, wanted, left):
    """Prompt number n is of n + 1 words."""
    file = tmp_path / "mine.jsonl"
    lines = [{"question_id": n, "category": "ab"[n % 2], "turns": ["hi " * (n + 1)]} for n in range(6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DecodeExperiment("tiny", str(checkpoint), (), Prompts(str(file), wanted, skip))
    model = sj.load_model(checkpoint)
    if left:
        ids = [model.tokenizer.apply_chat_template([{"role": "user", "content": lines[n]["turns"][0]}]) for n in left]
        assert [request.ids for request in config._requests(model)] == list(map(tuple, ids))
    else:
        with pytest.raises(sj.PromptError, match="skip=3 leaves none"):
            config._requests(model)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "experiments").glob("*.py")), ids=lambda f: f.stem)
def test_every_experiment_loads_and_takes_overrides(file, capsys):
    """`--help` lists its options; a nested field, or where there is none its own, can be set."""
    config = load_config(file)
    assert config == load_config(file)
    assert config.name == file.stem
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--help"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    found = [
        (outer, inner.name)
        for outer in (f.name for f in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, f.name)))
        for inner in dataclasses.fields(getattr(config, outer))
        if type(getattr(getattr(config, outer), inner.name)) is int
    ]
    numbers = [f.name for f in dataclasses.fields(config) if type(getattr(config, f.name)) is int]
    path = found[0] if found else (numbers[0],) if numbers else ("name",)
    option, value = "--" + ".".join(path).replace("_", "-"), "8"
    assert option in listed
    changed = configured(file, [option, value])
    expected, at = dataclasses.asdict(config), dataclasses.asdict(changed)
    for name in path[:-1]:
        expected, at = expected[name], at[name]
    assert at == expected | {path[-1]: type(expected[path[-1]])(value)}


def test_files_that_are_no_experiment(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert main(["run", str(tmp_path / "empty.py")]) == 2
    assert "get_config" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "missing.py")]) == 2
    assert "missing.py" in capsys.readouterr().err


def test_generate_prints_the_text_and_the_statistics(checkpoint, capsys):
    heads = str(checkpoint / "heads" / "heads.safetensors")
    command = ["generate", "--model", str(checkpoint), "--prompt", "hi", "--max-new-tokens", "9", "--dtype", "float32"]
    assert main(command) == 0
    plain = capsys.readouterr()
    assert main([*command, "--heads", heads, "--tree", "chain:2"]) == 0
    drafted = capsys.readouterr()
    assert plain.out == drafted.out
    assert "9 tokens" in plain.err
    assert "rounds" in drafted.err
    assert main([*command, "--temperature", "1", "--seed", "3"]) == 0
    one = capsys.readouterr().out
    assert main([*command, "--temperature", "1", "--seed", "3"]) == 0
    assert capsys.readouterr().out == one
    draft = ["--draft-model", str(checkpoint)]
    tuned = ["--max-n", "4", "--min-n", "2", "--reach"]
    for drafter, files in (
        ("ngram", []),
        ("ngram", tuned),
        ("ngram+medusa", ["--heads", heads]),
        ("ngram+draft", draft),
    ):
        assert main([*command, "--drafter", drafter, *files]) == 0
        assert capsys.readouterr().out == plain.out
    stop = plain.out.strip()[3:6]
    for drafter in ("none", "ngram"):
        assert main([*command, "--drafter", drafter, "--stop", stop, "--stop", "never said"]) == 0
        assert capsys.readouterr().out == plain.out[: plain.out.index(stop)] + "\n"
    assert main([*command, "--raw", "--typical", "--heads", heads, "--tree", "chain:2"]) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--heads", "nowhere"], "nowhere"),
        (["--tree", "chain:x", "--drafter", "ngram"], "chain:x"),
        (["--max-new-tokens", "-1"], "-1"),
        (["--typical"], "--heads"),
        (["--drafter", "eagle"], "eagle"),
        (["--drafter", "ngram+medusa", "--tree", "chain:3"], "2 parts"),
        (["--drafter", "medusa"], "--heads"),
        (["--drafter", "ngram+draft"], "--draft-model"),
        (["--draft-model", "nowhere"], "nowhere"),
        (["--stop", ""], "stop string"),
        (["--temperature", "-1"], "temperature"),
        (["--raw", "--prompt", ""], "at least one"),
        (["--tree", "chain:2"], "--tree is about drafts"),
        (["--drafter", "ngram", "--heads", "h"], "--heads is for the drafter medusa"),
        (["--drafter", "ngram", "--draft-model", "d"], "--draft-model is for the drafter draft"),
        (["--drafter", "draft", "--draft-model", "d", "--min-n", "0"], "--min-n is for the drafter ngram"),
        (["--drafter", "ngram", "--reach", "3", "0"], "reach is [3, 0]"),
        (["--drafter", "ngram", "--max-n", "1", "--min-n", "2"], "min_n is 2 and max_n 1"),
        (["--top-k", "3"], "top_k 3 and top_p 1.0 shape sampling, but greedy decoding has none"),
        (["--top-p", "0.9", "--drafter", "ngram", "--typical"], "typical acceptance has none"),
        (["--temperature", "0", "--drafter", "ngram", "--typical"], "temperature is 0.0"),
    ],
)
def test_generate_refuses_in_one_line(checkpoint, capsys, extra, message):
    assert main(["generate", "--model", str(checkpoint), "--prompt", "hi", "--max-new-tokens", "4", *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_model_without_a_template_takes_raw_prompts(checkpoint, tmp_path, capsys):
    directory = tmp_path / "plain"
    shutil.copytree(checkpoint, directory, ignore=shutil.ignore_patterns("heads", "tokenizer_config.json"))
    command = ["generate", "--model", str(directory), "--prompt", "hi", "--max-new-tokens", "2"]
    assert main(command) == 2
    assert "--raw" in capsys.readouterr().err
    assert main([*command, "--raw"]) == 0


def test_an_interrupted_answer_stays_in_the_chat(checkpoint, monkeypatch, capsys):
    lines, asked = iter(["hello", "again", "/exit"]), []
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    stream = sj.stream

    def interrupted(model, ids, **request):
        asked.append(model.tokenizer.decode(ids))
        rounds = stream(model, ids, **request)
        yield next(rounds)
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from rounds

    monkeypatch.setattr(sj, "stream", interrupted)
    assert main(["chat", "--model", str(checkpoint), "--max-new-tokens", "4", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "interrupted" in out
    assert "4 tokens" in out
    assert asked[1].startswith("<user>hello<assistant>")
    assert asked[1].endswith("<user>again<a>")


def test_chat_keeps_the_conversation(checkpoint, monkeypatch, capsys):
    lines = iter(["hello", "again", "/reset", "x" * 2100, "short", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    heads = str(checkpoint / "heads" / "heads.safetensors")
    command = ["chat", "--model", str(checkpoint), "--heads", heads, "--tree", "chain:2", "--max-new-tokens", "8"]
    assert main([*command, "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert out.count("8 tokens") == 3
    assert "context of 2048" in " ".join(out.split())


def test_trees_are_listed_and_shown(tmp_path, capsys):
    assert main(["tree", "list"]) == 0
    assert "mc_sim_7b_63: 64 nodes, depth 4" in capsys.readouterr().out
    assert main(["tree", "show", "cartesian:2,1", "--png", str(tmp_path / "t.png")]) == 0
    assert "5 nodes, depth 2, 2 paths" in capsys.readouterr().out
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert main(["tree", "show", "nonsense"]) == 2


def test_help_names_every_command():
    text = subprocess.run(
        [Path(sys.executable).with_name("specjax"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(name in text for name in ("run", "generate", "chat", "tree"))


def test_run_has_help_with_and_without_a_file(experiment, capsys):
    assert main(["run", "--help"]) == 0
    assert "--output-dir" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["run", str(experiment), "--help"])
    assert ended.value.code == 0
    assert "--decoding.max-new-tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["run"])
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert sj.__version__ in capsys.readouterr().out


def test_files_that_cannot_be_written_are_one_line(experiment, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "--output-dir", str(tmp_path / "file" / "sub"), str(experiment)]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "experiments").glob("*.py")), ids=lambda f: f.stem)
def test_the_shipped_experiments_load(file):
    config = load_config(file)
    assert callable(config.run)
    trees = [method.tree for method in getattr(config, "methods", ())]
    if isinstance(getattr(config, "trees", None), tuple):
        trees += config.trees
    trees += [tree for _, tree in getattr(config, "drafters", ())]
    for tree in trees:
        for part in tree.split("+"):
            assert part == "auto" or sj.Tree.parse(part).size > 1
    for method in getattr(config, "methods", ()):
        assert method.acceptance is not None


@pytest.mark.parametrize("wrong", [{"skip": -1}, {"per_category": 0}])
def test_impossible_choices_of_prompts_are_refused(wrong):
    with pytest.raises(sj.ConfigError, match="expected at least 0 and 1"):
        Prompts(**wrong)


def test_methods_have_settings_for_ngrams():
    assert Method("a", drafter="ngram+medusa", options={"min_n": 2, "reach": ()}).drafts_with == "ngram+medusa"
    assert Method("a", drafter="ngram").drafts_with == "ngram"
    assert Method("a", heads="h").drafts_with == "medusa"
    assert Method("a", draft_model="d").drafts_with == "draft"
    assert Method("a").drafts_with == "none"
    for drafter in (None, "medusa"):
        with pytest.raises(sj.ConfigError, match="a: max_n is for the drafter ngram"):
            _ = Method("a", drafter=drafter, options={"max_n": 2}).drafts_with
    with pytest.raises(sj.ConfigError, match="a: length is no drafter's"):
        _ = Method("a", drafter="ngram", options={"length": 2}).drafts_with


def test_methods_say_how_they_accept():
    assert Method("a").acceptance == sj.Greedy()
    assert Method("a", temperature=0.7, top_p=0.9, top_k=5).acceptance == sj.Sample(0.7, 5, 0.9)
    assert Method("a", temperature=0.7, typical=True).acceptance == sj.Typical(0.7)
    assert Method("a", typical=True).acceptance == sj.Typical() == sj.Typical(0.7)  # as on the command line
    assert Method("a", temperature=0.0).acceptance == sj.Greedy()
    typical = {"temperature": 1.0, "typical": True}
    for settings in ({"top_k": 5}, {"top_p": 0.9, **typical}, {**typical, "temperature": 0.0}):
        with pytest.raises(sj.ConfigError):
            _ = Method("a", **settings).acceptance


def test_sampling_is_compared_with_sampling(checkpoint, tmp_path):
    methods = (
        Method("autoregressive", "float32"),
        Method("autoregressive_T", "float32", temperature=0.8),
        Method("ngram_T", "float32", drafter="ngram", tree="chain:2", temperature=0.8),
        Method("typical", "float32", drafter="ngram", tree="chain:2", temperature=0.8, typical=True),
    )
    config = DecodeExperiment("t", str(checkpoint), methods, Prompts(per_category=1), Decoding(max_new_tokens=8))
    greedy, base, ngram, typical = config.run(tmp_path, Console(quiet=True))["methods"]
    assert [m["temperature"] for m in (greedy, base, ngram, typical)] == [0.0, 0.8, 0.8, 0.8]
    assert "speedup" not in base
    assert "speedup" in ngram
    assert "identical_to_autoregressive" not in ngram  # samples differ, whatever their law
    assert ngram["lossless"]
    assert not typical["lossless"]


def test_choose_tree_takes_the_fastest_measured_size(checkpoint):
    model = sj.load_model(checkpoint)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=(9,)))
    heads = sj.load_heads(checkpoint / "heads" / "heads.safetensors", model.config)
    trees = [greedy_tree(np.array(HITS), size) for size in (2, 3, 5)]
    candidates = [(tree, expected_tokens(tree, np.array(HITS))) for tree in trees]
    choice = choose_tree(model, heads, candidates, [1, 2, 3], rounds=4, capacity=128)
    assert [row["nodes"] for row in choice.rows] == [2, 3, 5]
    fastest = max(choice.rows, key=lambda row: row["expected_tokens_per_second"])
    assert choice.tree.size == fastest["nodes"]
    for row in choice.rows:
        assert row["expected_tokens_per_second"] == pytest.approx(
            1e3 * row["expected_tokens"] / row["milliseconds"]["median"]
        )
    programs = decode._run_rounds._cache_size()
    sj.generate(model, [1, 2, 3], drafter=sj.MedusaDrafter(heads, choice.tree), max_new_tokens=30, capacity=128)
    assert decode._run_rounds._cache_size() == programs  # what was timed is what decodes


def test_compare_refuses(checkpoint):
    model = sj.load_model(checkpoint)
    plain = bench.Contender("ar", model)
    request = bench.Request((1, 2), "c")
    with pytest.raises(sj.DataError, match="no prompts"):
        bench.compare([plain], [], max_new_tokens=4)
    with pytest.raises(sj.ConfigError, match="max_new_tokens is 1"):
        bench.compare([plain], [request], max_new_tokens=1)
    heads = sj.load_heads(checkpoint / "heads" / "heads.safetensors", model.config)
    alone = bench.Contender("medusa", model, sj.MedusaDrafter(heads, sj.Tree.chain(1)))
    with pytest.raises(sj.ConfigError, match="no autoregressive"):
        bench.compare([alone], [request], max_new_tokens=4)


def test_the_gap_is_that_of_the_two_best_logits(checkpoint):
    model = sj.load_model(checkpoint)
    from specjax.target.model import forward, unembed

    ids = [5, 9, 200]
    logits = np.sort(unembed(model.params, forward(model.params, model.config, jnp.array(ids)).features)[-1])
    assert bench._top_gap(model, ids) == pytest.approx(float(logits[-1] - logits[-2]), abs=1e-5)
    assert math.isfinite(bench._top_gap(model, ids * 50))
