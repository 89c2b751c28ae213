"""Runs experiments: a Python file with `get_config()` is the config, `specjax run` the runner."""

import contextlib
import importlib.util
import json
import shutil
import sys
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import tyro
from rich.console import Console

from specjax import stopping
from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.files import locked, write_atomically
from specjax.journal import DIRECTORY as JOURNAL
from specjax.studies.decode import Prompts


class Experiment(Protocol):
    """What `get_config()` gives: a frozen dataclass that runs itself and returns the content of result.json."""

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Runs the experiment; figures and other files go into `output_dir`."""
        ...


def load_config(path: Path) -> Any:
    """Executes an experiment file and gives what its `get_config()` returns.

    Raises:
      ConfigError: no such file, none that defines `get_config`, or one whose `get_config` gives no config.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; name an experiment, e.g. experiments/smollm2_medusa.py.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE` has it: drafters may lie beside
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config(); an experiment file must.")
    config = module.get_config()
    if not is_dataclass(config) or isinstance(config, type) or not callable(getattr(config, "run", None)):
        raise ConfigError(
            f"get_config() of {path} gives {config!r}; expected a dataclass with run(output_dir, console)."
        )
    return config


def configured(path: Path, arguments: list[str]) -> Any:
    """The config of an experiment file with `--section.field VALUE` overrides.

    `--prompts FILE` is short for `--prompts.file FILE`. `--help` lists the options and exits, as a wrong one does.

    Raises:
      ConfigError: a file that is no experiment, or a value that its config refuses.
    """
    config = load_config(path)
    if isinstance(getattr(config, "prompts", None), Prompts):
        arguments = ["--prompts.file" if a == "--prompts" else a for a in arguments]
    # A field that may be None stays a group of options, not a subcommand.
    how = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(type(config), default=config, args=arguments, prog=f"specjax run {path}", config=how)


def run_file(path: Path, arguments: list[str], output_dir: Path | None = None) -> int:
    """`specjax run`: loads the config, applies the overrides (`configured`), runs, and writes result.json.

    The default for `output_dir` is results/NAME/TIME.

    Raises:
      ConfigError: as `configured`; an output directory that already holds a result; or none named where several hosts
        run together: each would take its own.
    """
    config = configured(path, arguments)
    hosts = getattr(config, "hosts", None)
    if output_dir is None and hosts is not None and hosts.coordinator is not None:
        raise ConfigError(
            f"the hosts that {hosts.coordinator!r} coordinates share one output directory, and none is named; give all "
            "of them the same --output-dir, on a disk that they all see."
        )
    return run_config(config, output_dir or Path("results") / path.stem / time.strftime("%Y%m%d-%H%M%S"), Console())


def run_config(config: Experiment, directory: Path, console: Console) -> int:
    """Runs an experiment and writes its result.json (of several hosts, the first one does); gives the exit code.

    SIGINT and SIGTERM end it with what it has: the result's `partial` then says how far it came, the exit code is 128
    and the signal's number, and the same call goes on from there.

    Raises:
      ConfigError: `directory` already holds a result that is not partial.
      DataError: another run uses `directory`.
    """
    target = directory / "result.json"
    remedy = "wait for it, or choose another --output-dir."
    hosts = getattr(config, "hosts", None)
    with contextlib.ExitStack() as held:
        if hosts is None or hosts.coordinator is None or hosts.process_id == 0:
            held.enter_context(locked(directory, "run", remedy))
        if target.exists() and not _is_partial(target):
            raise ConfigError(f"{target} exists; choose another --output-dir, or remove it first.")
        held.enter_context(stopping.on_signals())
        try:
            result = config.run(directory, console)
        except stopping.Stopped as stopped:
            name = getattr(config, "name", type(config).__name__)
            result = {"experiment": name, "config": asdict(config), "environment": environment()}  # type: ignore[call-overload]
            result["partial"] = str(stopped)
        signal = stopping.asked()
        if jax.process_index() == 0:
            write_atomically(target, json.dumps(result, indent=2) + "\n")
            console.print(f"wrote {target}")
    if not result.get("partial"):
        shutil.rmtree(directory / JOURNAL, ignore_errors=True)
        return 0
    console.print(f"It is partial ({result['partial']}). The same command with --output-dir {directory} goes on.")
    return 128 + (signal or 0)


def _is_partial(result: Path) -> bool:
    try:
        return bool(json.loads(result.read_text("utf-8")).get("partial"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
