"""`specjax tree` and `specjax bench`: draw, measure, optimise and simulate draft trees, and time rounds."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

TREE_HELP = "a preset, chain:4, cartesian:3,2,1, paths:0,1,0.0, a .json file, or the name of a saved tree"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `tree` and `bench` to the command line."""
    tree = commands.add_parser("tree", help="draw, measure, optimise and simulate draft trees")
    trees = tree.add_subparsers(dest="action", required=True, metavar="ACTION")

    trees.add_parser("list", help="the published trees").set_defaults(function=_list)

    show = trees.add_parser("show", help="draw a tree")
    show.add_argument("tree", help=TREE_HELP)
    show.add_argument("--png", type=Path, metavar="FILE.png", help="also draw it into this file")
    show.add_argument("--ranks", type=Path, help="with --png: write on each edge how often it is right in this table")
    show.set_defaults(function=_show)

    measure = trees.add_parser("measure", help="record the heads' ranks on the model's own answers")
    measure.add_argument("--model", required=True)
    measure.add_argument("--heads", required=True)
    measure.add_argument("--prompts", help="Spec-Bench JSONL (default: the prompts that ship with specjax)")
    measure.add_argument("--max-new-tokens", type=int, default=128)
    measure.add_argument("--batch-size", type=int, default=16, help="prompts answered at once; fewer take less memory")
    measure.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    measure.add_argument("--cap", type=int, default=32, help="ranks from here on are not told apart")
    measure.add_argument(
        "--typical-temperature", type=float, help="also record what typical acceptance at this temperature depends on"
    )
    measure.add_argument("--save", type=Path, required=True, metavar="RANKS.npz")
    measure.set_defaults(function=_measure)

    optimise = trees.add_parser("optimise", aliases=["optimize"], help="the best tree for recorded ranks")
    optimise.add_argument("--ranks", type=Path, required=True, help="what `specjax tree measure` saved")
    optimise.add_argument("--search", choices=("walk", "joint", "independent", "sequoia"), default="walk")
    size = optimise.add_mutually_exclusive_group(required=True)
    size.add_argument("--nodes", type=int, help="the tree's size, root included")
    size.add_argument("--round-times", type=Path, help="result.json of `specjax bench`: take the fastest size")
    _add_model(optimise)
    optimise.add_argument("--max-depth", type=int)
    optimise.add_argument("--max-branching", type=int)
    optimise.add_argument("--save", metavar="TREE", help="a name, for --tree NAME later, or a .json file")
    optimise.set_defaults(function=_optimise)

    simulate = trees.add_parser("simulate", help="what trees would do on recorded text")
    simulate.add_argument("trees", nargs="+", metavar="TREE", help=TREE_HELP)
    simulate.add_argument("--ranks", type=Path, required=True)
    simulate.add_argument("--round-times", type=Path, help="also predict the speed")
    simulate.add_argument("--by-category", action="store_true")
    typical = "under typical acceptance, EPSILON DELTA (0.09 0.3 in the paper), at the table's temperature; not exact"
    simulate.add_argument("--typical", type=float, nargs=2, metavar=("EPSILON", "DELTA"), help=typical)
    _add_model(simulate)
    simulate.set_defaults(function=_simulate)

    bench = commands.add_parser("bench", help="time a round against the number of tree nodes on this machine")
    bench.add_argument("--model", required=True)
    bench.add_argument("--heads", required=True)
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    bench.add_argument("--sizes", type=int, nargs="+", help="default: 1 to 64, closest where steps are")
    bench.add_argument("--output-dir", type=Path, default=Path("results/bench"))
    bench.set_defaults(function=_bench)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="with --heads: refuse a table that was not measured with these")
    parser.add_argument("--heads")


def _list(options: argparse.Namespace, rest: list[str]) -> int:
    from specjax.tree import Tree

    for name in Tree.presets():
        tree = Tree.preset(name)
        print(f"{name}: {tree.size} nodes, depth {tree.max_depth}")
    return 0


def _show(options: argparse.Namespace, rest: list[str]) -> int:
    from specjax.errors import ConfigError
    from specjax.tree import Tree

    if options.png and options.png.suffix != ".png":
        raise ConfigError(f"--png is {options.png}; it must end in .png.")
    if options.ranks and not options.png:
        raise ConfigError(f"--ranks is {options.ranks}, but nothing is drawn; add --png FILE.png.")
    tree = Tree.parse(options.tree)
    print(tree.ascii())
    print(f"{tree.size} nodes, depth {tree.max_depth}, {len(tree.leaves)} paths")
    if tree.provenance:
        print("provenance:", json.dumps(dict(tree.provenance)))
    if options.png:
        from matplotlib.figure import Figure

        from specjax.ranks.table import RankTable
        from specjax.report.rank_figures import edge_acceptance
        from specjax.report.tree_figure import draw_tree

        figure = Figure(figsize=(9, 6), layout="constrained")
        rates = None if options.ranks is None else edge_acceptance(RankTable.load(options.ranks), tree).tolist()
        draw_tree(tree, figure.add_subplot(), edge_values=rates)
        figure.savefig(options.png, dpi=130)
        print(f"wrote {options.png}")
    return 0


def _measure(options: argparse.Namespace, rest: list[str]) -> int:
    import specjax as sj
    from specjax.corpus.prompts import load_prompts
    from specjax.corpus.texts import greedy_answers
    from specjax.files import locked
    from specjax.fingerprint import fingerprint, text_fingerprint
    from specjax.journal import Journal
    from specjax.loading.head_files import heads_for
    from specjax.ranks.measuring import check_measure, measure
    from specjax.ranks.table import check_path
    from specjax.stopping import Stopped, on_signals

    check_path(options.save)
    if options.max_new_tokens < 2:
        raise sj.ConfigError(f"--max-new-tokens is {options.max_new_tokens}; a text to measure needs at least 2.")
    check_measure(options.cap, options.typical_temperature)  # before the prompts are answered, which takes minutes
    options.save.parent.mkdir(parents=True, exist_ok=True)
    prompts = load_prompts(options.prompts)
    model = sj.load_model(options.model, dtype=options.dtype)
    heads = heads_for(model, options.heads, dtype=options.dtype)
    kept = options.save.with_name(options.save.name + ".journal")
    remedy = "wait for the other `specjax tree measure`, or choose another --save."
    with locked(options.save.parent, options.save.name, remedy), on_signals():
        settings = {
            **{name: getattr(options, name) for name in ("max_new_tokens", "batch_size", "cap", "typical_temperature")},
            **{"model": fingerprint(model.params), "heads": fingerprint((heads.params, heads.token_map))},
            **{"dtype": options.dtype, "prompts": text_fingerprint(repr(prompts))},
        }
        journal = Journal.open(kept, settings)
        sizes = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
        texts = greedy_answers(model, prompts, **sizes, journal=journal)
        texts = [text for text in texts if len(text.answer) > 1]
        how = {"cap": options.cap, "typical_temperature": options.typical_temperature}
        table = measure(model, heads, texts, **how, journal=journal)
        if "partial" in table.manifest:
            raise Stopped(table.manifest["partial"])
        table.save(options.save)
        shutil.rmtree(kept, ignore_errors=True)
    speed, answers = table.manifest["tokens_per_second"], len(table.lengths)
    print(f"{len(table.tokens)} tokens of {answers} answers, {speed:.0f} a second")
    for k in sorted({min(k, table.cap) for k in (1, 3, 5)}):
        print(f"top-{k} accuracy by head:", " ".join(f"{share:.3f}" for share in table.accuracy(k)))
    print(f"wrote {options.save}")
    return 0


def _optimise(options: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import asdict, replace

    from rich.console import Console
    from rich.table import Table

    from specjax.errors import TreeError
    from specjax.ranks.search import Limits
    from specjax.ranks.validate import search_trees
    from specjax.tree import writable

    if options.save:
        writable(options.save)  # before the search
    table, limits = _table(options), Limits(options.max_depth, options.max_branching)
    times = _round_times(options.round_times, table)
    sizes = [options.nodes] if times is None else [n for n in times.nodes if n > 1]
    most = limits.largest(table.num_heads, table.cap)
    if times is not None and (beyond := [n for n in sizes if n > most]):
        print(f"left out {beyond} nodes: the limits allow {most}")
        sizes = [n for n in sizes if n <= most]
    if not sizes:
        raise TreeError(f"no size is left: the round times are of {times and times.nodes} nodes; measure others.")
    found = search_trees(table, sizes, search=options.search, limits=limits)
    columns = ("nodes", "tokens per round", "accepted per round", *_speed_columns(times))
    view = Table(*columns, caption="on the text that was searched: other text gives fewer tokens per round")
    for one in found:
        cells = [str(one.tree.size), f"{one.tokens_per_round:.3f}", f"{one.accepted_per_round:.3f}"]
        view.add_row(*cells, *_speed(times, one))
    Console().print(view)
    best = found[0].tree
    if times is not None:
        fastest = times.fastest(found)
        best, gain = fastest.tree, times.speedup(fastest.tree.size, fastest.tokens_per_round)
        if gain <= 1:
            print(f"No tree pays here: the best is predicted at {gain:.2f} of autoregressive decoding.")
        best = replace(best, provenance={**best.provenance, "round_times": asdict(times)})
    print(best.ascii())
    if options.save:
        print(f"wrote {best.save(options.save)}")
    return 0


def _simulate(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from specjax.acceptance import Greedy, Typical
    from specjax.ranks.simulation import simulate
    from specjax.tree import Tree

    table = _table(options)
    times = _round_times(options.round_times, table)
    rule: Greedy | Typical = Greedy()
    if options.typical is not None:
        epsilon, delta = options.typical
        rule = Typical(table.manifest.get("temperature") or 1.0, epsilon, delta)
    trees = [Tree.parse(text) for text in options.trees]
    names = sorted(set(table.categories)) if options.by_category else []
    parts = [simulate(table.category(name), trees, rule) for name in names]
    columns = ["tree", "nodes", "tokens per round", "accepted per round", "acceptance by depth", *names]
    view = Table(*columns, *_speed_columns(times), *([] if rule.lossless else ["judged rightly"]))
    for i, (text, one) in enumerate(zip(options.trees, simulate(table, trees, rule), strict=True)):
        cells = [text, str(one.tree.size), f"{one.tokens_per_round:.3f}", f"{one.accepted_per_round:.3f}"]
        cells.append(" ".join(f"{share:.2f}" for share in one.acceptance_by_depth))
        cells += [f"{part[i].tokens_per_round:.3f}" for part in parts]
        view.add_row(*cells, *_speed(times, one), *([] if rule.lossless else [f"{one.on_text:.0%} of rounds"]))
    Console().print(view)
    return 0


def _table(options: argparse.Namespace):  # type: ignore[no-untyped-def]  # RankTable is imported late
    import specjax as sj
    from specjax.ranks.table import RankTable

    table = RankTable.load(options.ranks)
    if (options.model is None) != (options.heads is None):
        raise sj.ConfigError(f"--model is {options.model}, --heads is {options.heads}; give both, or neither.")
    if options.model is None:
        return table
    try:
        dtype, heads_dtype = table.manifest["dtype"], table.manifest["heads_dtype"]
    except KeyError as error:
        raise sj.DataError(
            f"{options.ranks} does not say which dtype it was measured in (no {error}); measure it anew."
        ) from error
    model = sj.load_model(options.model, dtype=dtype)
    return table.check(model, sj.load_heads(options.heads, model.config, dtype=heads_dtype))


def _speed_columns(times) -> list[str]:  # type: ignore[no-untyped-def]
    return [] if times is None else ["predicted tokens/s", "predicted speed-up"]


def _speed(times, one) -> list[str]:  # type: ignore[no-untyped-def]
    if times is None:
        return []
    of = one.tree.size, one.tokens_per_round
    return [f"{times.tokens_per_second(*of):.1f}", f"{times.speedup(*of):.2f}"]


def _round_times(path: Path | None, table):  # type: ignore[no-untyped-def]  # RoundTimes is imported late
    from specjax.environment import environment
    from specjax.errors import DataError
    from specjax.studies.round_time import RoundTimes

    if path is None:
        return None
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the round times {path} ({error}); make them with `specjax bench`.") from error
    times, dtype = RoundTimes.from_result(result), table.manifest.get("dtype")
    timed = (result.get("config") or {}).get("dtype", dtype)
    if timed != dtype:
        raise DataError(f"the rounds of {path} were timed in {timed}, the ranks measured in {dtype}; use one dtype.")
    for name in ("model", "heads"):
        theirs, ours = result.get(name), table.manifest.get(name)
        if None not in (theirs, ours) and theirs != ours:
            raise DataError(
                f"the rounds of {path} were timed with {name} {theirs}, the ranks measured with {ours}: other weights. "
                "Time these, `specjax bench`."
            )
    places = result.get("environment") or {}, environment()
    then, now = (_place(place) for place in places)
    if then not in (now, "None with None cores"):
        print(f"{path} was timed on {then}, here are {now}: speeds are theirs.")
    return times


def _place(environment: dict[str, Any]) -> str:
    """The machine that an environment is of, as far as it says."""
    cpu = environment.get("cpu")
    named = cpu.get("microarchitecture") or cpu.get("model") if isinstance(cpu, dict) else None
    return f"{environment.get('device')} with {environment.get('cpu_count')} cores" + (f" ({named})" if named else "")


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from specjax.studies.round_time import SIZES, RoundTime
    from specjax.studies.runner import run_config

    config = RoundTime("bench", options.model, options.heads, options.dtype, tuple(options.sizes or SIZES))
    return run_config(config, options.output_dir, Console())
