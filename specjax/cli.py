"""The `specjax` command: run, generate, chat, tree, bench, convert.

Heavy imports wait until a command needs them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specjax.cli_tree import TREE_HELP, add_commands

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

    add_commands(commands)

    convert = commands.add_parser("convert", help="write Medusa heads in the layout of another engine")
    convert.add_argument("--model", required=True, help="the heads' target, as for generate")
    convert.add_argument("--heads", required=True, help="packaged name, file or directory, in any layout")
    convert.add_argument("--to", required=True, help="medusa, medusa-v2, bundled, abyo, vllm, tensorrt-llm or native")
    convert.add_argument("--output-dir", type=Path, required=True)
    convert.add_argument("--base-model", help="what the config names as the base (default: --model)")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the heads (default: as they are)")
    convert.add_argument("--copy-lm-head", action="store_true", help="for layouts in which heads cannot share it")
    convert.set_defaults(function=_convert)
    return parser


def _model_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument(
        "--model", required=True, help="packaged name, Hugging Face directory or repository, .gguf file"
    )
    parser.add_argument(
        "--drafter",
        help="none, medusa, ngram, draft, or a hybrid such as ngram+medusa (default: medusa with --heads, draft with "
        "--draft-model, otherwise none: autoregressive)",
    )
    parser.add_argument("--heads", help="Medusa heads: packaged name, file or directory")
    parser.add_argument("--draft-model", help="packaged name, Hugging Face directory or repository, .gguf file")
    parser.add_argument("--tree", help=f"{TREE_HELP}; for a hybrid one for each part, joined by '+'")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; above: lossless sampling")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--typical", action="store_true", help="typical acceptance at that temperature (NOT lossless)")
    parser.add_argument("--seed", type=int, default=0)


def _prepare(options: argparse.Namespace) -> tuple["Model", dict[str, Any]]:
    import jax

    import specjax as sj
    from specjax.drafters.build import build_drafter

    named = "medusa" if options.heads else "draft" if options.draft_model else "none"
    if options.typical and (options.drafter or named) == "none":
        raise sj.ConfigError("--typical judges drafts, but nothing drafts; add --drafter, --heads or --draft-model.")
    if options.typical:
        acceptance: Any = sj.Typical(temperature=options.temperature or 0.7)
    elif options.temperature == 0:
        acceptance = sj.Greedy()
    else:
        acceptance = sj.Sample(options.temperature, options.top_k, options.top_p)
    for tree in options.tree.split("+") if options.tree else ():
        sj.Tree.parse(tree)  # before the model is loaded
    model = sj.load_model(options.model, dtype=options.dtype)
    if model.tokenizer is None:
        raise sj.CheckpointError(f"{options.model} has no tokenizer; text needs one beside the weights.")
    drafter = build_drafter(
        options.drafter or named,
        model,
        tree=options.tree,
        heads=options.heads,
        draft_model=options.draft_model,
        acceptance=acceptance,
    )
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
    _, tally = show(
        stream(model, ids, **request),
        model.tokenizer,
        Console(highlight=False),
        colour=False,
        stop=options.stop,
    )
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
            rounds = stream(model, ids, **(request | {"key": key}))
            text, tally = show(rounds, model.tokenizer, console, colour=True, stop=options.stop)
        except PromptError as error:
            console.print(f"[red]{error}[/] Type /reset to begin a new conversation.")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})
        console.print(f"[dim]{tally}[/dim]")
    return 0


def _convert(options: argparse.Namespace, rest: list[str]) -> int:
    import specjax as sj
    from specjax.loading.export import export_heads
    from specjax.loading.heads import heads_metadata

    model = sj.load_model(options.model)
    heads = sj.load_heads(options.heads, model.config, dtype=options.dtype)
    dtype = next(iter(heads.params.values())).dtype
    if model.params.dtype != dtype:  # a stored copy of the LM head, or the base, has the heads' dtype
        model = sj.load_model(options.model, dtype=dtype)
    file = export_heads(
        options.output_dir,
        heads,
        model,
        options.to,
        base_model=options.base_model or options.model,
        copy_lm_head=options.copy_lm_head,
        metadata=heads_metadata(options.heads),
    )
    print(f"wrote {file}")
    return 0


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from specjax.experiment import run_file

    return run_file(options.file, rest)


if __name__ == "__main__":
    sys.exit(main())
