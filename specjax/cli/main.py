"""The `specjax` command: run, generate, chat, tree, bench, convert.

Heavy imports wait until a command needs them.
"""

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import specjax
from specjax.cli.tree import TREE_HELP, add_commands

if TYPE_CHECKING:
    from specjax.drafters.registry import DrafterEntry
    from specjax.loading.load import Model


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; gives the exit code (2 for a refused request)."""
    from specjax.errors import SpecJaxError
    from specjax.stopping import Stopped

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser(_drafters(arguments[1:]) if {"generate", "chat"} & set(arguments[:1]) else None)
    except SpecJaxError as error:
        print(f"specjax: {error}", file=sys.stderr)
        return 2
    except argparse.ArgumentError as error:
        print(f"specjax: a drafter has an option that is the command's own: {error}; rename it.", file=sys.stderr)
        return 2
    # An experiment's own options are parsed by its config.
    try:
        options, rest = parser.parse_known_args(arguments)
        if rest and options.command != "run":
            parser.error(f"unrecognised arguments: {' '.join(rest)}")
        code = int(options.function(options, rest))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 128 + signal.SIGPIPE
    except Stopped as stopped:
        print(f"specjax: {stopped}. The same command goes on from there.", file=sys.stderr)
        return 128 + (stopped.signal or signal.SIGINT)
    except KeyboardInterrupt:
        print("\nspecjax: interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    except (SpecJaxError, OSError) as error:  # a folder that is missing, a disk that is full
        print(f"specjax: {error}", file=sys.stderr)
        return 2


def _drafters(arguments: list[str]) -> dict[str, "DrafterEntry"]:
    """Those that have options to parse: all that are registered, and one of the user's own where it is named."""
    from specjax.drafters import registry

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--drafter", default="none")
    named = dict(registry.entries_of(first.parse_known_args(arguments)[0].drafter))
    return {name: registry.drafter_entry(name) for name in registry.drafter_names()} | named


class _Version(argparse.Action):
    """What the products are is looked up when it is asked for: it takes JAX."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from specjax import ops

        print(f"specjax {specjax.__version__} (CPU products: {ops.cpu_products_here()})")
        parser.exit()


def _parser(drafters: "Mapping[str, DrafterEntry] | None") -> argparse.ArgumentParser:
    # Drafters' own options come from the registry, which loads JAX: only where they can be given.
    parser = argparse.ArgumentParser(prog="specjax", description="A laboratory for speculative decoding in JAX.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version, and which products a CPU has")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # The file's own --help lists its options; without a file there is ours.
    run = commands.add_parser("run", help="run an experiment file", add_help=False, allow_abbrev=False)
    run.add_argument(
        "file", type=Path, nargs="?", help="experiments/NAME.py; its options follow (FILE --help lists them)"
    )
    run.add_argument("--output-dir", type=Path, help="for result.json and figures (default: results/NAME/TIME)")
    run.set_defaults(function=_run, parser=run)

    generate = commands.add_parser("generate", help="answer one prompt")
    _model_options(generate, max_new_tokens=128, drafters=drafters)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--raw", action="store_true", help="use the prompt as it is, without the chat template")
    generate.set_defaults(function=_generate)

    chat = commands.add_parser("chat", help="talk to a model; accepted drafts are coloured")
    _model_options(chat, max_new_tokens=256, drafters=drafters)
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
    convert.add_argument(
        "--whole-vocabulary",
        action="store_true",
        help="heads over a reduced vocabulary propose any token, for layouts that know no reduced one: other drafts",
    )
    convert.set_defaults(function=_convert)
    return parser


def _model_options(
    parser: argparse.ArgumentParser, max_new_tokens: int, drafters: "Mapping[str, DrafterEntry] | None"
) -> None:
    parser.add_argument(
        "--model", required=True, help="packaged name, Hugging Face directory or repository, .gguf file"
    )
    if drafters is not None:
        _drafter_options(parser, drafters)
    parser.add_argument(
        "--check-finite", action="store_true", help="look through the weights for NaN and infinity first"
    )
    parser.add_argument("--tree", help=f"{TREE_HELP}; for a hybrid one for each part, joined by '+'")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="default bfloat16, which reads half the bytes; drafting leaves the output exactly as it is only in "
        "float32, because in bfloat16 near-ties can flip",
    )
    parser.add_argument("--temperature", type=float, help="0 or none: greedy; above: sampling the target's law")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument(
        "--typical",
        action="store_true",
        help="typical acceptance at that temperature, 0.7 if none is given (NOT lossless)",
    )
    parser.add_argument("--seed", type=int, default=0)


def _drafter_options(parser: argparse.ArgumentParser, drafters: "Mapping[str, DrafterEntry]") -> None:
    parser.add_argument(
        "--drafter",
        help=f"none, {', '.join(drafters)}, one of your own as module:attribute, or a hybrid such as ngram+medusa "
        "(default: the one that the files are for; without files none: autoregressive)",
    )
    for name, what in {name: what for entry in drafters.values() for name, what in entry.files.items()}.items():
        users = [user for user, entry in drafters.items() if name in entry.files]
        parser.add_argument(_flag(name), help=f"for {' and '.join(users)}: {what}")
    for name, option in {name: one for entry in drafters.values() for name, one in entry.options.items()}.items():
        many: dict[str, Any] = {"nargs": "*"} if option.many else {}
        kind, shown = option.kind, option.kind.__name__.upper()
        parser.add_argument(_flag(name), type=kind, help=option.help, metavar=shown, **many)
    parser.set_defaults(drafters=drafters)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _drafting(options: argparse.Namespace) -> dict[str, Any]:
    """What says how to draft, as `build_drafter` takes it; options that would do nothing are refused."""
    from specjax.drafters import registry
    from specjax.errors import ConfigError

    entries = options.drafters.values()
    files = {name: getattr(options, name) for entry in entries for name in entry.files}
    own = {name for entry in entries for name in entry.options}
    given = {name: value for name in sorted(own) if (value := getattr(options, name)) is not None}
    named = options.drafter or registry.default_drafter(files)
    for option in ("typical", "tree"):
        if getattr(options, option) and named == "none":
            raise ConfigError(
                f"--{option} is about drafts, but nothing drafts; add --drafter, --heads or --draft-model, or "
                "leave it out."
            )
    registry.refuse_idle(named, files, given, _flag)
    return {"text": named, "tree": options.tree, "options": given, "files": files}


def _prepare(options: argparse.Namespace) -> tuple["Model", dict[str, Any]]:
    import jax

    import specjax as sj
    from specjax.acceptance import acceptance_for
    from specjax.drafters.registry import build_drafter

    drafting = _drafting(options)
    acceptance = acceptance_for(options.temperature, options.top_k, options.top_p, typical=options.typical)
    # Before the model is loaded:
    for tree in options.tree.split("+") if options.tree else ():
        sj.Tree.parse(tree)
    if not 0 <= options.seed < 2**32:  # JAX would cut it to so many bits
        raise sj.ConfigError(f"--seed is {options.seed}; expected 0 to 2^32 - 1.")
    model = sj.load_model(options.model, dtype=options.dtype, check_finite=options.check_finite)
    if model.tokenizer is None:
        raise sj.CheckpointError(f"{options.model} has no tokenizer; text needs one beside the weights.")
    drafter = build_drafter(target=model, acceptance=acceptance, **drafting)
    request = {"drafter": drafter, "acceptance": acceptance, "max_new_tokens": options.max_new_tokens}
    return model, request | {"key": jax.random.key(options.seed)}


def _templated(model: "Model", messages: list[dict[str, str]]) -> list[int]:
    from specjax.errors import ConfigError

    assert model.tokenizer is not None
    if model.tokenizer.chat_template is None:
        raise ConfigError("this model has no chat template; `specjax generate --raw` continues plain text.")
    return model.tokenizer.apply_chat_template(messages)


def _generate(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from specjax import stream
    from specjax.cli.terminal import Shown, show

    model, request = _prepare(options)
    assert model.tokenizer is not None
    if options.raw:
        ids = model.tokenizer.encode(options.prompt)
    else:
        ids = _templated(model, [{"role": "user", "content": options.prompt}])
    shown, console = Shown(), Console(highlight=False)
    try:
        show(stream(model, ids, **request), model.tokenizer, console, shown, colour=False, stop=options.stop)
    except KeyboardInterrupt:
        print(f"\n[{shown.tally}]", file=sys.stderr)
        raise
    print(f"[{shown.tally}]", file=sys.stderr)
    return 0


def _chat(options: argparse.Namespace, rest: list[str]) -> int:
    import jax
    from rich.console import Console

    from specjax import PromptError, stream
    from specjax.cli.terminal import DRAFTED, Shown, read_lines, show

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
        request["key"], key = jax.random.split(request["key"])
        shown = Shown()
        try:
            rounds = stream(model, _templated(model, messages), **(request | {"key": key}))
            show(rounds, model.tokenizer, console, shown, colour=True, stop=options.stop)
        except PromptError as error:
            console.print(f"[red]{error}[/] Type /reset to begin a new conversation.")
        except KeyboardInterrupt:  # ends the answer; what was said stays in the conversation
            console.print("\n[dim]interrupted[/dim]")
        if not shown.tally.tokens:
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": shown.text})
        console.print(f"[dim]{shown.tally}[/dim]")
    return 0


def _convert(options: argparse.Namespace, rest: list[str]) -> int:
    import specjax as sj
    from specjax.loading.export import export_heads
    from specjax.loading.head_files import backbone_of, heads_metadata

    model = sj.load_model(options.model)  # float32 holds whatever the files do
    heads = sj.load_heads(options.heads, model.config, dtype=options.dtype)
    if wrong := backbone_of(options.heads, model.params)[1]:
        raise sj.ConfigError(wrong)
    file = export_heads(
        options.output_dir,
        heads,
        model,
        options.to,
        base_model=options.base_model or options.model,
        copy_lm_head=options.copy_lm_head,
        whole_vocabulary=options.whole_vocabulary,
        metadata=heads_metadata(options.heads),
    )
    print(f"wrote {file}")
    return 0


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    if options.file is None and rest in (["-h"], ["--help"]):
        options.parser.print_help()
        return 0
    if options.file is None:
        options.parser.error("name an experiment, e.g. experiments/smollm2_medusa.py.")
    from specjax.studies.runner import run_file

    return run_file(options.file, rest, options.output_dir)


if __name__ == "__main__":
    sys.exit(main())
