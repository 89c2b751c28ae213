"""The rank pass at size: its speed and memory over many tokens, and how fast a thousand trees are then simulated."""

import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress

from specjax.corpus.prompts import load_prompts
from specjax.corpus.texts import greedy_answers
from specjax.environment import environment
from specjax.errors import ConfigError, DataError
from specjax.fingerprint import fingerprint, text_fingerprint
from specjax.journal import Journal
from specjax.loading.head_files import heads_for
from specjax.loading.load import load_model
from specjax.ranks.measuring import Text, measure
from specjax.ranks.search import UNLIMITED
from specjax.ranks.simulation import simulate
from specjax.tree import Tree

_RANKS = 10  # of the random trees' nodes


@dataclass(frozen=True)
class RankPass:
    """Measures the same answers over and over until there are `tokens` of them, then simulates random trees.

    The pass computes every sequence anew, so that its time and memory are those of as many different ones. The
    simulation gains from the repetition, for it looks up every pattern of ranks once.
    """

    name: str
    model: str
    heads: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    prompts: str | None = None  # Spec-Bench JSONL; None: the ones that ship with specjax
    max_new_tokens: int = 128
    batch_size: int = 4  # prompts answered at once; larger batches take more memory than the pass does
    tokens: int = 200_000
    trees: int = 1000
    nodes: int = 64
    seed: int = 0

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Writes the table to `output_dir` and gives speed, peak memory and the time of the simulation."""
        for name in ("tokens", "trees"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        model = load_model(self.model, dtype=self.dtype)
        heads = heads_for(model, self.heads, dtype=self.dtype)
        UNLIMITED.check(self.nodes, heads.config.num_heads, _RANKS)
        with console.status("answering prompts"):
            prompts = load_prompts(self.prompts)
            weights = {"model": fingerprint(model.params), "heads": fingerprint((heads.params, heads.token_map))}
            journal = Journal.of(self, output_dir, **weights, text=text_fingerprint(repr(prompts)))
            asked: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
            answers = greedy_answers(model, prompts, **asked, journal=journal)
        answers = [text for text in answers if len(text.answer) > 1]
        if not answers:
            raise DataError(f"no answer has two tokens (max_new_tokens is {self.max_new_tokens}); allow longer ones.")
        texts: list[Text] = []
        while (have := sum(len(text.answer) for text in texts)) < self.tokens:
            texts.append(replace(answers[len(texts) % len(answers)]))
        before = peak_bytes()
        apart = reset_peak()
        with Progress(console=console) as progress:
            task = progress.add_task("measuring ranks", total=have)
            table = measure(model, heads, texts, progress=lambda n: progress.advance(task, n), journal=journal)
        peak = peak_bytes()
        table.save(output_dir / "pass.ranks.npz")
        rng = np.random.default_rng(self.seed)
        trees = [random_tree(rng, self.nodes, table.num_heads, _RANKS) for _ in range(self.trees)]
        simulate(table, trees[:1])
        begin = time.perf_counter()
        simulate(table, trees)
        seconds = time.perf_counter() - begin
        speed = table.manifest["tokens_per_second"]
        of_what = "of the pass" if apart else "of the whole process"
        console.print(
            f"{len(table.tokens)} tokens at {speed:.0f} a second; peak memory {of_what} {peak / 1e9:.2f} GB "
            f"({before / 1e9:.2f} GB before it)"
        )
        console.print(f"{self.trees} trees of {self.nodes} nodes over them: {seconds:.1f} s")
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "tokens": len(table.tokens),
            "tokens_per_second": speed,
            "peak_bytes": peak,  # of the process while it measures, the model's weights included
            "peak_is_of_the_pass_alone": apart,
            "peak_bytes_before_the_pass": before,
            "file_bytes": (output_dir / "pass.ranks.npz").stat().st_size,
            "simulation_seconds": seconds,
            "partial": table.manifest.get("partial"),
        }


def random_tree(rng: np.random.Generator, nodes: int, depth: int, ranks: int) -> Tree:
    """A tree that grows at random, each node below one that stands; there must be so many nodes (`Limits.check`)."""
    paths: set[tuple[int, ...]] = set()
    open_paths: list[tuple[int, ...]] = [()]
    while len(paths) < nodes - 1:
        path = (*open_paths[int(rng.integers(len(open_paths)))], int(rng.integers(ranks)))
        if path not in paths:
            paths.add(path)
            if len(path) < depth:
                open_paths.append(path)
    return Tree.from_paths(paths)


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """The most this process has held since its start, or since `reset_peak`; a model's weights are in it."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def reset_peak() -> bool:
    """Forgets the peak, to tell what measuring takes from what answering prompts did. False where the system cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
