"""`specjax tree measure / optimise / simulate`, `specjax bench`, the tree-search experiment and its figures."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import noisy_heads
from rank_tables import table_of

import specjax as sj
from specjax.cli.main import main
from specjax.corpus.prompts import load_prompts
from specjax.corpus.texts import per_category
from specjax.drafters.registry import build_drafter
from specjax.ranks.search import Limits
from specjax.ranks.simulation import simulate
from specjax.ranks.table import RankTable
from specjax.ranks.validate import SEARCHES
from specjax.report import rank_figures as rank_plots
from specjax.studies.rank_pass import RankPass
from specjax.studies.round_time import choose_tree, time_rounds
from specjax.studies.tree_search import TreeSearch, packaged_trees


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Four prompts of two categories."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"question_id": i, "category": "ab"[i % 2], "turns": [f"say {i}"]} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def ranks(checkpoint, prompts, tmp_path_factory):
    """A table that the command line measured."""
    file = tmp_path_factory.mktemp("ranks") / "t.npz"
    heads = str(checkpoint / "heads")
    command = ["tree", "measure", "--model", str(checkpoint), "--heads", heads, "--prompts", str(prompts)]
    typical = ["--typical-temperature", "0.7", "--save", str(file)]
    assert main([*command, "--dtype", "float32", "--max-new-tokens", "20", "--cap", "16", *typical]) == 0
    return file


def test_measured_tables_hold_the_models_own_answers(checkpoint, prompts, ranks, capsys):
    table, model = RankTable.load(ranks), sj.load_model(checkpoint)
    assert table.categories == ("a", "b", "a", "b")
    assert table.cap == 16
    for i, prompt in enumerate(load_prompts(prompts)):
        ids = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt.turns[0]}])
        told = sj.generate(model, ids, max_new_tokens=20).tokens
        np.testing.assert_array_equal(table.tokens[table.starts[i] :][: table.lengths[i]], told)
    table.check(model, sj.load_heads(checkpoint / "heads", model.config))


def test_optimise_saves_the_best_tree(ranks, tmp_path, capsys):
    table, file = RankTable.load(ranks), tmp_path / "tree.json"
    assert main(["tree", "optimise", "--ranks", str(ranks), "--nodes", "4", "--save", str(file)]) == 0
    assert sj.Tree.load(file) == SEARCHES["walk"](table, 4, Limits())
    (best,) = simulate(table, [SEARCHES["walk"](table, 4, Limits())])
    assert f"{best.tokens_per_round:.3f}" in capsys.readouterr().out
    times = tmp_path / "result.json"
    rows = [{"nodes": n, "milliseconds": {"median": ms}} for n, ms in ((1, 10.0), (2, 10.0), (3, 50.0))]
    times.write_text(json.dumps({"rows": rows}))
    assert main(["tree", "optimise", "--ranks", str(ranks), "--round-times", str(times), "--save", str(file)]) == 0
    assert sj.Tree.load(file).size == 2
    assert sj.Tree.load(file).provenance["round_times"]["nodes"] == [1, 2, 3]
    assert "No tree pays" not in capsys.readouterr().out
    small = ["--max-depth", "1", "--max-branching", "1", "--round-times", str(times)]
    assert main(["tree", "optimise", "--ranks", str(ranks), *small]) == 0
    assert "left out [3] nodes: the limits allow 2" in capsys.readouterr().out
    limited = ["tree", "optimise", "--ranks", str(ranks), "--nodes", "4", "--max-branching", "4", "--max-depth", "1"]
    assert main([*limited, "--search", "sequoia", "--save", str(file)]) == 0
    assert sj.Tree.load(file).max_depth == 1


def test_optimise_says_when_no_tree_pays_and_refuses_times_of_another_dtype(ranks, tmp_path, capsys):
    times = tmp_path / "result.json"
    rows = [{"nodes": n, "milliseconds": {"median": ms}} for n, ms in ((1, 10.0), (2, 90.0))]
    times.write_text(json.dumps({"rows": rows}))
    command = ["tree", "optimise", "--ranks", str(ranks), "--round-times", str(times)]
    assert main(command) == 0
    assert "No tree pays here" in capsys.readouterr().out
    times.write_text(json.dumps({"rows": rows, "config": {"dtype": "bfloat16"}}))
    for one in (command, ["tree", "simulate", "--ranks", str(ranks), "chain:1", "--round-times", str(times)]):
        assert main(one) == 2
        assert "timed in bfloat16, the ranks measured in float32" in capsys.readouterr().err
    times.write_text(json.dumps({"rows": rows, "heads": "others"}))
    assert main(command) == 2
    assert "timed with heads others" in capsys.readouterr().err
    times.write_text(json.dumps({"rows": rows, "environment": {"device": "abacus", "cpu_count": 1}}))
    assert main(command) == 0
    assert "was timed on abacus with 1 cores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"), [(["--cap", "0"], "cap is 0"), (["--typical-temperature", "0"], "typical_temperature is 0")]
)
def test_measure_refuses_before_it_answers(checkpoint, prompts, tmp_path, capsys, monkeypatch, option, message):
    monkeypatch.setattr("specjax.corpus.texts.greedy_answers", lambda *args, **more: pytest.fail("answered"))
    command = ["tree", "measure", "--model", str(checkpoint), "--heads", str(checkpoint / "heads")]
    assert main([*command, "--prompts", str(prompts), "--save", str(tmp_path / "t.npz"), *option]) == 2
    assert message in capsys.readouterr().err


def test_a_table_goes_to_a_folder_that_is_not_there_yet(checkpoint, prompts, tmp_path):
    command = ["tree", "measure", "--model", str(checkpoint), "--heads", str(checkpoint / "heads")]
    file = tmp_path / "new" / "t.npz"
    assert main([*command, "--prompts", str(prompts), "--max-new-tokens", "4", "--save", str(file)]) == 0
    assert len(RankTable.load(file).lengths) == 4


def test_bench_refuses_sizes_that_do_not_rise(checkpoint, tmp_path, capsys):
    command = ["bench", "--model", str(checkpoint), "--heads", str(checkpoint / "heads"), "--sizes", "1", "4", "4"]
    assert main([*command, "--output-dir", str(tmp_path)]) == 2
    assert "each must be above the one before" in capsys.readouterr().err


def test_a_tree_for_other_heads_is_pointed_out(checkpoint, ranks, tmp_path, recwarn):
    file, model = tmp_path / "tree.json", sj.load_model(checkpoint)
    assert main(["tree", "optimise", "--ranks", str(ranks), "--nodes", "3", "--save", str(file)]) == 0
    build_drafter("medusa", model, tree=str(file), files={"heads": str(checkpoint / "heads")})
    build_drafter("medusa", model, tree="chain:2", files={"heads": str(checkpoint / "heads")})
    assert not [one for one in recwarn if "searched for other heads" in str(one.message)]
    sj.save_heads(tmp_path / "other.safetensors", noisy_heads(model, 2))
    with pytest.warns(UserWarning, match="searched for other heads"):
        build_drafter("medusa", model, tree=str(file), files={"heads": str(tmp_path / "other.safetensors")})


def test_a_tree_saved_by_name_is_simulated_and_shown_by_name(ranks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPECJAX_TREES", str(tmp_path))
    assert main(["tree", "optimise", "--ranks", str(ranks), "--nodes", "3", "--save", "mine"]) == 0
    assert main(["tree", "simulate", "--ranks", str(ranks), "mine"]) == 0
    assert main(["tree", "show", "mine"]) == 0
    assert capsys.readouterr().out.count(sj.Tree.load("mine").ascii()) == 2  # found, and shown


def test_simulate_prints_every_tree(ranks, capsys, tmp_path):
    assert main(["tree", "simulate", "--ranks", str(ranks), "chain:1", "cartesian:3,2", "--by-category"]) == 0
    out = capsys.readouterr().out
    for tree in (sj.Tree.chain(1), sj.Tree.cartesian((3, 2))):
        assert f"{simulate(RankTable.load(ranks), [tree])[0].tokens_per_round:.3f}" in out

    assert main(["tree", "simulate", "--ranks", str(ranks), "chain:2", "--typical", "0.09", "0.3"]) == 0
    (typical,) = simulate(RankTable.load(ranks), [sj.Tree.chain(2)], sj.Typical(0.7))
    out = capsys.readouterr().out
    assert f"{typical.tokens_per_round:.3f}" in out
    assert "judged" in out


def test_rounds_are_timed_after_prompts_of_any_length(checkpoint):
    model = sj.load_model(checkpoint)
    heads = sj.load_heads(checkpoint / "heads", model.config)
    (taken,) = time_rounds(model, heads, [sj.Tree.chain(1)], [1] * 600, rounds=2, repeats=1, capacity=128)
    assert 0 < taken["min"] <= taken["median"] <= taken["max"]


def test_no_trees_are_not_timed(checkpoint):
    model = sj.load_model(checkpoint)
    with pytest.raises(sj.TreeError, match="no trees to time"):
        time_rounds(model, sj.load_heads(checkpoint / "heads", model.config), [], [1])


@pytest.mark.parametrize(
    ("trees", "changes", "error", "message"),
    [
        ([sj.Tree.chain(1), sj.Tree.chain(5)], {}, sj.TreeError, "5 deep, but there are 2 heads"),
        ([sj.Tree.chain(1), sj.Tree.from_paths([(500,)])], {}, sj.TreeError, "501 candidates"),
        ([sj.Tree.chain(1)], {"repeats": 0}, sj.ConfigError, "repeats 0"),
        ([sj.Tree.chain(1)], {"rounds": 1.5}, sj.ConfigError, "rounds is 1.5"),
    ],
)
def test_what_cannot_be_timed_is_refused(checkpoint, monkeypatch, trees, changes, error, message):
    monkeypatch.setattr("specjax.studies.round_time.prefill", lambda *args, **more: pytest.fail("decoded"))
    model = sj.load_model(checkpoint)
    heads = sj.load_heads(checkpoint / "heads", model.config)
    with pytest.raises(error, match=message):
        choose_tree(model, heads, [(tree, 9.0) for tree in trees], [1], **changes)


def test_shown_trees_say_where_they_come_from_and_how_often_edges_are_right(ranks, tmp_path, capsys):
    file, png = tmp_path / "tree.json", tmp_path / "tree.png"
    assert main(["tree", "optimise", "--ranks", str(ranks), "--nodes", "3", "--save", str(file)]) == 0
    assert main(["tree", "show", str(file), "--png", str(png), "--ranks", str(ranks)]) == 0
    assert RankTable.load(ranks).manifest["heads"] in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    for option, message in ((["--png", "x.foo"], "must end in .png"), (["--ranks", str(ranks)], "add --png")):
        assert main(["tree", "show", "chain:2", *option]) == 2
        assert message in capsys.readouterr().err


def test_samples_are_of_every_category():
    categories = ["chat", "code"] * 5
    assert per_category(categories, 2) == [0, 1, 2, 3]
    assert per_category(["a", "a", "a", "b"], 1) == [0, 3]
    with pytest.raises(sj.DataError, match="count per category is 0"):
        per_category(categories, 0)


def test_bench_gives_round_times(checkpoint, ranks, tmp_path, capsys):
    heads = str(checkpoint / "heads")
    command = ["bench", "--model", str(checkpoint), "--heads", heads, "--sizes", "1", "3", "--dtype", "float32"]
    assert main([*command, "--output-dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["nodes"] for row in result["rows"]] == [1, 3]
    times = str(tmp_path / "result.json")
    capsys.readouterr()
    assert main(["tree", "optimise", "--ranks", str(ranks), "--round-times", times]) == 0
    assert "was timed on" not in capsys.readouterr().out
    manifest = RankTable.load(ranks).manifest
    assert (result["model"], result["heads"]) == (manifest["model"], manifest["heads"])


def test_bench_takes_heads_without_recorded_accuracies(checkpoint, tmp_path):
    model = sj.load_model(checkpoint)
    heads = sj.load_heads(checkpoint / "heads", model.config)
    sj.save_heads(tmp_path / "plain.safetensors", heads)
    command = ["bench", "--model", str(checkpoint), "--heads", str(tmp_path / "plain.safetensors"), "--sizes", "1", "3"]
    assert main([*command, "--dtype", "float32", "--output-dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["nodes"] for row in rows] == [1, 3]
    assert "expected_tokens" not in rows[1]


def test_tables_of_other_heads_are_refused(checkpoint, ranks, tmp_path, capsys):
    model = sj.load_model(checkpoint)
    heads = sj.load_heads(checkpoint / "heads", model.config)
    (tmp_path / "heads.ranks.npz").write_bytes(ranks.read_bytes())
    sj.save_heads(tmp_path / "heads.safetensors", heads)
    (found,) = packaged_trees(str(tmp_path / "heads.safetensors"), (3,), model, heads)
    assert found[0].size == 3
    other = noisy_heads(model, 2)
    with pytest.raises(sj.DataError, match="measured with heads"):
        packaged_trees(str(tmp_path / "heads.safetensors"), (3,), model, other)
    sj.save_heads(tmp_path / "other.safetensors", other)
    for name, code in (("heads", 0), ("other", 2)):
        same = ["--model", str(checkpoint), "--heads", str(tmp_path / f"{name}.safetensors")]
        assert main(["tree", "simulate", "--ranks", str(ranks), "chain:1", *same]) == code
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["optimise", "--ranks", "nowhere.npz", "--nodes", "4"], "nowhere.npz"),
        (["optimise", "--ranks", "RANKS", "--nodes", "0"], "size is 0"),
        (["show", "nowhere"], "nowhere"),
        (["optimise", "--ranks", "RANKS", "--round-times", "nowhere.json"], "nowhere.json"),
        (["optimise", "--ranks", "nowhere.npz", "--nodes", "4", "--save", "my tree"], "'my tree' is no place"),
        (["optimise", "--ranks", "nowhere.npz", "--nodes", "4", "--save", "chain"], "take another name"),
        (["simulate", "--ranks", "RANKS", "chain:5"], "5 deep"),
        (["simulate", "--ranks", "RANKS", "nonsense"], "nonsense"),
        (["simulate", "--ranks", "RANKS", "paths:12", "--typical", "0.09", "0.3"], "ranks below 10"),
        (["simulate", "--ranks", "RANKS", "chain:1", "--model", "m"], "give both"),
    ],
)
def test_refusals_in_one_line(ranks, capsys, command, message):
    assert main(["tree", *(str(ranks) if part == "RANKS" else part for part in command)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_experiment_chooses_and_checks_a_tree(checkpoint, prompts, ranks, tmp_path, capsys):
    from rich.console import Console

    config = TreeSearch(
        "tiny", str(checkpoint), str(checkpoint / "heads"), "float32",
        str(ranks), str(prompts), max_new_tokens=16, sizes=(2, 3, 5), timed_sizes=(2, 3, 5), timed_per_category=1,
        repeats=1,
    )  # fmt: skip
    result = config.run(tmp_path, Console())
    json.dumps(result)
    # The error on text of the same kind, by hand: searched on the even texts and checked on the odd ones, and back.
    halves = [RankTable.load(ranks).select(lambda i, side=side: i % 2 == side) for side in (0, 1)]
    errors = []
    for here, there in (halves, halves[::-1]):
        for size in (2, 3, 5):
            tree = SEARCHES["walk"](here, size, Limits())
            promised, found = (simulate(half, [tree])[0].tokens_per_round for half in (here, there))
            errors.append(found / promised - 1)
    assert result["error_on_same_kind"]["walk"]["mean"] == pytest.approx(np.mean(errors))
    assert result["error_on_same_kind"]["walk"]["largest"] == pytest.approx(np.max(np.abs(errors)))
    # Simulated and decoded on the same texts: the same, but for the prompts that were not decoded.
    assert {row["nodes"] for row in result["rows"]} == {2, 3, 5}
    # The predicted best on the searched text, set beside whatever was fastest: autoregressive decoding, perhaps.
    promised = {p["nodes"]: p["searched_text"]["tokens_per_second"] for p in result["predictions"]}
    chosen = result["chosen_nodes"]
    assert promised[chosen] == max(promised.values())
    speed = {m["tree_nodes"]: m["tokens_per_second"]["median"] for m in result["measured"]}
    assert sorted(speed) == [1, 2, 3, 5]
    assert result["chosen_speed_against_the_measured_best"] == speed[chosen] / max(speed.values())
    gain = next(m["speedup"]["median"] for m in result["measured"] if m["tree_nodes"] == chosen)
    assert result["chosen_speed_against_autoregressive"] == gain
    assert ("no tree pays here" in " ".join(capsys.readouterr().out.split())) == (gain <= 1)
    saved = sj.Tree.load(tmp_path / "tree.json")
    assert saved.size == chosen
    assert saved.provenance["round_times"]["nodes"] == [1, 2, 3, 5]
    assert saved.provenance["round_times"]["device"] == result["environment"]["device"]
    table = RankTable.load(tmp_path / "check.ranks.npz")
    for method in result["measured"][1:]:
        (predicted,) = [p for p in result["predictions"] if p["nodes"] == method["tree_nodes"]]
        # One prompt of each category was decoded: the first two.
        tree = SEARCHES["walk"](RankTable.load(ranks), method["tree_nodes"], Limits())
        both = simulate(table.select(lambda i: i < 2), [tree])[0]
        assert both.tokens_per_round == pytest.approx(method["tokens_per_round"])
        assert predicted["same_text"]["tokens_per_round"] == pytest.approx(method["tokens_per_round"])
    figures = {path.stem for path in tmp_path.glob("*.png")}
    assert figures >= {"rank_heatmap", "calibration", "tokens_against_nodes", "tree", "predicted_against_measured"}


def test_the_rank_pass_reports_speed_and_memory(checkpoint, prompts, tmp_path):
    from rich.console import Console

    heads = str(checkpoint / "heads")
    config = RankPass("tiny", str(checkpoint), heads, "float32", str(prompts), 20, tokens=200, trees=3, nodes=5)
    result = config.run(tmp_path, Console())
    assert result["tokens"] >= 200
    assert RankTable.load(tmp_path / "pass.ranks.npz").manifest["tokens_per_second"] == result["tokens_per_second"]
    assert min(result["peak_bytes_before_the_pass"], result["peak_bytes"], result["simulation_seconds"]) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 2000}, "size is 2000"),
        ({"max_new_tokens": 1}, "no answer has two tokens"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_rank_pass_that_cannot_be_is_refused(checkpoint, prompts, tmp_path, changes, message):
    from rich.console import Console

    config = RankPass("tiny", str(checkpoint), str(checkpoint / "heads"), "float32", str(prompts), **changes)
    with pytest.raises(sj.SpecJaxError, match=message):
        config.run(tmp_path, Console())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (8, 4)}, r"sizes is \(8, 4\)"),
        ({"sizes": (1, 2)}, r"sizes is \(1, 2\)"),
        ({"sizes": ()}, r"sizes is \(\)"),
        ({"sizes": (2, 4), "timed_sizes": (4, 6)}, r"timed_sizes has \[6\]"),
        ({"repeats": 0}, "repeats 0"),
    ],
)
def test_a_tree_search_that_cannot_be_is_refused_at_once(tmp_path, changes, message):
    from rich.console import Console

    with pytest.raises(sj.ConfigError, match=message):
        TreeSearch("tiny", "nowhere", "nowhere", **changes).run(tmp_path, Console())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_the_peak_of_the_pass_is_its_own():
    """In a process of its own: in this one, other tests' threads take and give back memory meanwhile."""
    script = """
import numpy as np
from specjax.studies import rank_pass
large = np.ones(40_000_000)  # 320 MB
del large
before = rank_pass.peak_bytes()
assert rank_pass.reset_peak()
print(before - rank_pass.peak_bytes())
"""
    freed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 100e6


def test_edge_acceptance_by_hand():
    table = table_of(ranks=[(0, 1), (0, 0), (2, 0), (0, 1), (9, 9), (0, 0), (0, 0)])
    rates = rank_plots.edge_acceptance(table, sj.Tree.from_paths([(0,), (1,), (0, 1), (1, 0)]))
    np.testing.assert_allclose(rates, [np.nan, 4 / 6, 0, 2 / 3, np.nan])
    with pytest.raises(sj.TreeError, match="rank 8"):  # 9s were recorded as the cap, 8, and all beyond
        rank_plots.edge_acceptance(table, sj.Tree.from_paths([(8,)]))


def test_text_figures_take_any_text():
    pieces = ["Hello", ",", " $world", "\n", "\n  x = 1", " and a line that is far too long for the width of the page"]
    figure = rank_plots.text_acceptance(pieces, np.array([0, 2, 1, 0, 3, -1]), width=40)
    shown = "".join(text.get_text() for text in figure.axes[0].texts)
    assert "Hello" in shown
    assert r"\$world" in shown
    figure.canvas.draw()
