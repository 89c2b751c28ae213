"""Our n-gram drafter beside transformers' `prompt_lookup_num_tokens`, on the same prompts in the same run."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from specjax import decode
from specjax.bench import environment
from specjax.drafters.ngram import NgramDrafter
from specjax.errors import ConfigError
from specjax.loading.load import load_model, local_path
from specjax.prompts import load_prompts
from specjax.tree import Tree


@dataclass(frozen=True)
class PromptLookup:
    """Greedy decoding with and without lookup, here and in transformers (which needs torch)."""

    name: str
    model: str  # a packaged name or a directory
    category: str = "long_context"
    lookups: tuple[int, ...] = (10, 7, 3)  # transformers' drafts per round
    trees: tuple[str, ...] = ("chain:10", "chain:7", "chain:3")
    max_new_tokens: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"  # on both sides

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints tokens per forward and speed-ups, each side against its own decoding without lookup."""
        try:
            import torch
            import transformers
        except ImportError as error:
            raise ConfigError(
                f"this comparison needs torch and transformers ({error}); `make test` installs them."
            ) from error
        model = load_model(self.model, dtype=self.dtype)
        if model.tokenizer is None:
            raise ConfigError(f"{self.model} has no tokenizer; the prompts are text.")
        prompts = [p for p in load_prompts() if p.category == self.category]
        ids = [model.tokenizer.apply_chat_template([{"role": "user", "content": p.turns[0]}]) for p in prompts]
        path = local_path(self.model)
        where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, self.dtype), **where
        )
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        theirs.register_forward_hook(count)
        ours: dict[str, NgramDrafter | None] = {"autoregressive": None}
        trees = [Tree.parse(text) for text in self.trees]
        ours |= {f"ngram {text}": NgramDrafter(tree) for text, tree in zip(self.trees, trees, strict=True)}
        other: dict[str, dict[str, Any]] = {"transformers": {}}
        other |= {f"transformers lookup:{n}": {"prompt_lookup_num_tokens": n} for n in self.lookups}
        tokens = dict.fromkeys((*ours, *other), 0)
        rounds = dict.fromkeys(tokens, 0)
        seconds: dict[str, list[float]] = {name: [] for name in tokens}
        same = dict.fromkeys(tokens, 0)
        capacity = decode.capacity_for(max(map(len, ids)), self.max_new_tokens, max(tree.max_depth for tree in trees))
        for number, prompt in enumerate([ids[0], *ids]):  # the first one once more, to warm up
            reference: list[int] = []
            for name, drafter in ours.items():
                request: dict[str, Any] = {
                    "drafter": drafter,
                    "max_new_tokens": self.max_new_tokens,
                    "capacity": capacity,
                }
                state = jax.block_until_ready(decode.prefill(model, prompt, **request))
                begin = time.perf_counter()
                done = jax.block_until_ready(decode.decode(model, state, drafter=drafter))
                taken, out = time.perf_counter() - begin, decode.summarise(done)
                reference = reference or out.tokens.tolist()
                self._add(number, name, len(out.tokens) - 1, out.rounds, taken, tokens, rounds, seconds)
                same[name] += number > 0 and out.tokens.tolist() == reference
            for name, options in other.items():
                given = torch.tensor([prompt])
                begin = time.perf_counter()
                with torch.no_grad():
                    theirs.generate(given, max_new_tokens=1, do_sample=False)  # its prefill, to take off
                prefill, forwards = time.perf_counter() - begin, 0
                begin = time.perf_counter()
                with torch.no_grad():
                    made = theirs.generate(given, max_new_tokens=self.max_new_tokens, do_sample=False, **options)
                taken = time.perf_counter() - begin - prefill
                said = made[0, len(prompt) :].tolist()
                self._add(number, name, len(said) - 1, forwards - 1, taken, tokens, rounds, seconds)
                same[name] += number > 0 and said == reference
        rows: list[dict[str, Any]] = []
        for name in tokens:
            base = "autoregressive" if name in ours else "transformers"
            gain = np.array(seconds[base]) / np.array(seconds[name])
            rows.append(
                {
                    "name": name,
                    "tokens_per_forward": tokens[name] / rounds[name],
                    "accepted_per_forward": tokens[name] / rounds[name] - 1,
                    "forwards": rounds[name],
                    "speedup": {"median": float(np.median(gain)), "min": float(gain.min()), "max": float(gain.max())},
                    "same_text": same[name],
                }
            )
        table = Table("method", "tokens per forward", "speed-up over its own", "same text", title=self.name)
        for row in rows:
            spread = row["speedup"]
            table.add_row(
                row["name"],
                f"{row['tokens_per_forward']:.3f}",
                f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})",
                f"{row['same_text']}/{len(prompts)}",
            )
        console.print(table)
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment() | {"torch": torch.__version__, "transformers": transformers.__version__},
            "prompts": len(prompts),
            "rows": rows,
        }

    def _add(
        self,
        number: int,
        name: str,
        new: int,
        forwards: int,
        taken: float,
        tokens: dict[str, int],
        rounds: dict[str, int],
        seconds: dict[str, list[float]],
    ) -> None:
        if number:  # the first one warms up
            tokens[name] += new
            rounds[name] += forwards
            seconds[name].append(taken / max(new, 1))
