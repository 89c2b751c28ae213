"""The `specjax` command: run, generate, chat, tree. Heavy imports wait until a command needs them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specjax.loading.load import Model


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; gives the exit code (2 for a refused request)."""
    from specjax.errors import SpecJaxError

    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # An experiment's own options are parsed by its config.
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "run":
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return int(options.function(options, rest))
    except SpecJaxError as error:
        print(f"specjax: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="specjax", description="A laboratory for speculative decoding in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment file", add_help=False)
    run.add_argument("file", type=Path, help="experiments/NAME.py; its options follow (--help lists them)")
    run.set_defaults(function=_run)

    generate = commands.add_parser("generate", help="answer one prompt")
    _model_options(generate, max_new_tokens=128)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--raw", action="store_true", help="use the prompt as it is, without the chat template")
    generate.set_defaults(function=_generate)

    chat = commands.add_parser("chat", help="talk to a model; accepted drafts are coloured")
    _model_options(chat, max_new_tokens=256)
    chat.set_defaults(function=_chat)

    tree = commands.add_parser("tree", help="look at draft trees")
    trees = tree.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = trees.add_parser("list", help="the published trees")
    listing.set_defaults(function=_tree_list)
    drawing = trees.add_parser("show", help="draw a tree")
    drawing.add_argument("tree", help=_TREE_HELP)
    drawing.add_argument("--png", type=Path, help="also draw it into this file")
    drawing.set_defaults(function=_tree_show)
    return parser


_TREE_HELP = "a published name, chain:4, cartesian:3,2,1, or a .json file"


def _model_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument(
        "--model", required=True, help="packaged name, Hugging Face directory or repository, .gguf file"
    )
    parser.add_argument("--heads", help="Medusa heads: packaged name, file or directory; without, autoregressive")
    parser.add_argument("--tree", default="cartesian:4,1,1", help=f"{_TREE_HELP} (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; above: lossless sampling")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--typical", action="store_true", help="typical acceptance at that temperature (NOT lossless)")
    parser.add_argument("--seed", type=int, default=0)


def _prepare(options: argparse.Namespace) -> tuple["Model", dict[str, Any]]:
    import jax

    import specjax as sj

    if options.typical and options.heads is None:
        raise sj.ConfigError("--typical judges drafts, but there are no heads to draft; add --heads.")
    if options.typical:
        acceptance: Any = sj.Typical(temperature=options.temperature or 0.7)
    elif options.temperature == 0:
        acceptance = sj.Greedy()
    else:
        acceptance = sj.Sample(options.temperature, top_p=options.top_p)
    tree = sj.Tree.parse(options.tree)
    model = sj.load_model(options.model, dtype=options.dtype)
    if model.tokenizer is None:
        raise sj.CheckpointError(f"{options.model} has no tokenizer; text needs one beside the weights.")
    drafter = None
    if options.heads is not None:
        drafter = sj.MedusaDrafter(sj.load_heads(options.heads, model.config, dtype=options.dtype), tree)
    request = {"drafter": drafter, "acceptance": acceptance, "max_new_tokens": options.max_new_tokens}
    return model, request | {"key": jax.random.key(options.seed)}


def _generate(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from specjax import stream
    from specjax.chat import show

    model, request = _prepare(options)
    assert model.tokenizer is not None
    if options.raw:
        ids = model.tokenizer.encode(options.prompt)
    else:
        ids = model.tokenizer.apply_chat_template([{"role": "user", "content": options.prompt}])
    _, tally = show(stream(model, ids, **request), model.tokenizer, Console(highlight=False), colour=False)
    print(f"[{tally}]", file=sys.stderr)
    return 0


def _chat(options: argparse.Namespace, rest: list[str]) -> int:
    import jax
    from rich.console import Console

    from specjax import PromptError, stream
    from specjax.chat import DRAFTED, read_lines, show

    model, request = _prepare(options)
    assert model.tokenizer is not None
    console = Console(highlight=False)
    console.print(f"[{DRAFTED}]accepted drafts[/] and the target's own tokens. /reset begins anew, /exit ends.")
    messages: list[dict[str, str]] = []
    for line in read_lines(console):
        if line == "/reset":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        ids = model.tokenizer.apply_chat_template(messages)
        request["key"], key = jax.random.split(request["key"])
        try:
            text, tally = show(stream(model, ids, **(request | {"key": key})), model.tokenizer, console, colour=True)
        except PromptError as error:
            console.print(f"[red]{error}[/] Type /reset to begin a new conversation.")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})
        console.print(f"[dim]{tally}[/dim]")
    return 0


def _tree_list(options: argparse.Namespace, rest: list[str]) -> int:
    from specjax.tree import Tree

    for name in Tree.presets():
        tree = Tree.preset(name)
        print(f"{name}: {tree.size} nodes, depth {tree.max_depth}")
    return 0


def _tree_show(options: argparse.Namespace, rest: list[str]) -> int:
    from specjax.tree import Tree

    tree = Tree.parse(options.tree)
    print(tree.ascii())
    print(f"{tree.size} nodes, depth {tree.max_depth}, {len(tree.leaves)} paths")
    if options.png:
        from matplotlib.figure import Figure

        from specjax.analysis.tree_plot import draw_tree

        figure = Figure(figsize=(9, 6), layout="constrained")
        draw_tree(tree, figure.add_subplot())
        figure.savefig(options.png, dpi=130)
        print(f"wrote {options.png}")
    return 0


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from specjax.experiment import run_file

    return run_file(options.file, rest)


if __name__ == "__main__":
    sys.exit(main())
