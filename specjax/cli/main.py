"""The `specjax` command: run, generate, chat, tree, bench, convert.

Heavy imports wait until a command needs them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import specjax
from specjax.cli.tree import TREE_HELP, add_commands

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
    except (SpecJaxError, OSError) as error:  # a folder that is missing, a disk that is full
        print(f"specjax: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="specjax", description="A laboratory for speculative decoding in JAX.")
    parser.add_argument("--version", action="version", version=f"specjax {specjax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # The file's own --help lists its options; without a file there is ours.
    run = commands.add_parser("run", help="run an experiment file", add_help=False, allow_abbrev=False)
    run.add_argument(
        "file", type=Path, nargs="?", help="experiments/NAME.py; its options follow (FILE --help lists them)"
    )
    run.add_argument("--output-dir", type=Path, help="for result.json and figures (default: results/NAME/TIME)")
    run.set_defaults(function=_run, parser=run)

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
    convert.add_argument(
        "--whole-vocabulary",
        action="store_true",
        help="heads over a reduced vocabulary propose any token, for layouts that know no reduced one: other drafts",
    )
    convert.set_defaults(function=_convert)
    return parser


_NGRAM = ("max_n", "min_n", "reach")


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
    parser.add_argument("--max-n", type=int, help="n-grams: the longest match (default 3)")
    parser.add_argument("--min-n", type=int, help="n-grams: the shortest match to draft after (default 1)")
    parser.add_argument(
        "--reach",
        type=int,
        nargs="*",
        metavar="TOKENS",
        help="n-grams: how far to draft after a match of 1, 2, ... tokens; after longer ones, the whole tree "
        "(default 3 7; without numbers always the whole tree)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="default bfloat16, which reads half the bytes; drafting leaves the output exactly as it is only in "
        "float32, because in bfloat16 near-ties can flip",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; above: sampling the target's law")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--typical", action="store_true", help="typical acceptance at that temperature (NOT lossless)")
    parser.add_argument("--seed", type=int, default=0)


def _prepare(options: argparse.Namespace) -> tuple["Model", dict[str, Any]]:
    import jax

    import specjax as sj
    from specjax.drafters.registry import build_drafter

    named = options.drafter or ("medusa" if options.heads else "draft" if options.draft_model else "none")
    _refuse_idle(options, named.split("+"))
    if options.typical:
        acceptance: Any = sj.Typical(temperature=options.temperature or 0.7)
    elif options.temperature == 0:
        acceptance = sj.Greedy()
    else:
        acceptance = sj.Sample(options.temperature, options.top_k, options.top_p)
    # Before the model is loaded:
    for tree in options.tree.split("+") if options.tree else ():
        sj.Tree.parse(tree)
    if not 0 <= options.seed < 2**32:  # JAX would cut it to so many bits
        raise sj.ConfigError(f"--seed is {options.seed}; expected 0 to 2^32 - 1.")
    model = sj.load_model(options.model, dtype=options.dtype)
    if model.tokenizer is None:
        raise sj.CheckpointError(f"{options.model} has no tokenizer; text needs one beside the weights.")
    drafter = build_drafter(
        named,
        model,
        tree=options.tree,
        heads=options.heads,
        draft_model=options.draft_model,
        acceptance=acceptance,
        ngram={name: value for name in _NGRAM if (value := getattr(options, name)) is not None},
    )
    request = {"drafter": drafter, "acceptance": acceptance, "max_new_tokens": options.max_new_tokens}
    return model, request | {"key": jax.random.key(options.seed)}


def _refuse_idle(options: argparse.Namespace, drafters: list[str]) -> None:
    """Refuses options that would do nothing."""
    from specjax.errors import ConfigError

    remedy = "add --drafter, --heads or --draft-model, or leave it out."
    for option in ("typical", "tree"):
        if getattr(options, option) and drafters == ["none"]:
            raise ConfigError(f"--{option} is about drafts, but nothing drafts; {remedy}")
    users = (("heads", "medusa"), ("draft_model", "draft"), *((option, "ngram") for option in _NGRAM))
    for option, user in users:
        if getattr(options, option) is not None and user not in drafters:
            flag = "--" + option.replace("_", "-")
            raise ConfigError(f"{flag} is for the drafter {user}; --drafter {'+'.join(drafters)} leaves it out.")
    if (options.top_k is not None or options.top_p != 1.0) and (options.typical or not options.temperature):
        reason = "typical acceptance has none" if options.typical else "greedy decoding has none; set --temperature too"
        raise ConfigError(f"--top-k {options.top_k} and --top-p {options.top_p} shape sampling, but {reason}.")


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
    show(stream(model, ids, **request), model.tokenizer, console, shown, colour=False, stop=options.stop)
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
