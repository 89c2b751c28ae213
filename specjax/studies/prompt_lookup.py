"""Our n-gram drafter beside transformers' `prompt_lookup_num_tokens`, on the same prompts in the same run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from specjax import decode
from specjax.corpus.prompts import load_prompts
from specjax.drafters.ngram import NgramDrafter
from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.fingerprint import fingerprint
from specjax.journal import Journal
from specjax.loading.load import Model, load_model, local_path
from specjax.stopping import Stopped
from specjax.tree import Tree


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    forwards: int  # after the prefill
    seconds: float  # of these

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(len(self.tokens) - 1, 1)  # the prefill gives the first one


_Method = Callable[[list[int]], _Answer]


@dataclass(frozen=True)
class PromptLookup:
    """Greedy decoding with and without lookup, here and in transformers (which needs torch).

    The best number of drafts depends on machine and text: each side's is chosen on the prompts with even numbers, by
    the median speed-up, and compared on the others.
    """

    name: str
    model: str  # a packaged name or a directory
    category: str = "long_context"
    prompts: int | None = None  # the first so many; None: all
    drafts: tuple[int, ...] = (10, 7, 5, 3)  # chains of ours, `prompt_lookup_num_tokens` of theirs
    reach: tuple[int, ...] | None = None  # of the n-gram drafter; None: its default
    max_new_tokens: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"  # on both sides

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints tokens per forward and speed-ups, each side against its own decoding without lookup.

        Raises:
          ConfigError: no torch or transformers, a model without a tokenizer, or fewer than two prompts.
        """
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
        texts = [p.turns[0] for p in load_prompts() if p.category == self.category][: self.prompts]
        if len(texts) < 2:
            raise ConfigError(f"{len(texts)} prompts of {self.category!r}; half of at least two choose the length.")
        ids = [model.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
        methods = self._ours(model, max(map(len, ids))) | self._theirs(torch, transformers)
        for answer in methods.values():  # to warm up
            answer(ids[0])

        def answered(number: int) -> dict[str, np.ndarray]:
            piece = {}
            for name, answer in methods.items():
                given = answer(ids[number])
                piece[f"{name} tokens"] = np.array(given.tokens)
                piece[name] = np.array([given.forwards, given.seconds])
            return piece

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        journal = Journal.of(self, output_dir, **versions, model=fingerprint(model.params), prompts=ids)
        done, partial = journal.pieces("prompts", len(ids), answered)
        answers = {
            name: [_Answer(p[f"{name} tokens"].tolist(), int(p[name][0]), float(p[name][1])) for p in done]
            for name in methods
        }
        if len(done) < 2:  # half of them choose the length
            raise Stopped(f"{partial}")
        ids = ids[: len(done)]
        rows = [self._row(name, answers, range(len(ids))) for name in methods]
        tuning, held_out = range(0, len(ids), 2), range(1, len(ids), 2)
        chosen = []
        for side in ("ngram", "transformers"):
            names = [f"{side}:{n}" for n in self.drafts]
            best = max(names, key=lambda name: self._row(name, answers, tuning)["speedup"]["median"])
            chosen.append(self._row(best, answers, held_out))
        console.print(_table(f"{self.name}: {len(ids)} prompts", rows))
        console.print(_table(f"lengths chosen on the other prompts: {len(held_out)} prompts", chosen))
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment() | versions,
            "prompts": len(ids),
            "rows": rows,
            "chosen_on_the_other_prompts": chosen,
            "partial": partial,
        }

    def _ours(self, model: Model, longest: int) -> dict[str, _Method]:
        capacity = decode.capacity_for(longest, self.max_new_tokens, max(self.drafts))

        def answer(prompt: list[int], drafter: NgramDrafter | None) -> _Answer:
            request: dict[str, Any] = {"drafter": drafter, "max_new_tokens": self.max_new_tokens, "capacity": capacity}
            state = jax.block_until_ready(decode.prefill(model, prompt, **request))
            begin = time.perf_counter()
            done = jax.block_until_ready(decode.decode(model, state, drafter=drafter))
            taken, out = time.perf_counter() - begin, decode.summarise(done)
            return _Answer(out.tokens.tolist(), out.rounds, taken)

        options: dict[str, Any] = {} if self.reach is None else {"reach": self.reach}
        drafters: dict[str, NgramDrafter | None] = {"ngram:0": None}
        drafters |= {f"ngram:{n}": NgramDrafter(Tree.chain(n), **options) for n in self.drafts}
        return {name: lambda prompt, d=drafter: answer(prompt, d) for name, drafter in drafters.items()}  # type: ignore[misc]

    def _theirs(self, torch: Any, transformers: Any) -> dict[str, _Method]:
        path = local_path(self.model)
        where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, self.dtype), **where
        )
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        model.register_forward_hook(count)

        def timed(given: Any, new: int, options: dict[str, Any]) -> tuple[list[int], float]:
            begin = time.perf_counter()
            with torch.no_grad():
                made = model.generate(given, max_new_tokens=new, do_sample=False, **options)
            return made[0, given.shape[1] :].tolist(), time.perf_counter() - begin

        def answer(prompt: list[int], options: dict[str, Any]) -> _Answer:
            nonlocal forwards
            given = torch.tensor([prompt])
            _, prefill = timed(given, 1, {})  # to take off
            forwards = 0
            tokens, taken = timed(given, self.max_new_tokens, options)
            return _Answer(tokens, forwards - 1, taken - prefill)

        settings: dict[str, dict[str, Any]] = {"transformers:0": {}}
        settings |= {f"transformers:{n}": {"prompt_lookup_num_tokens": n} for n in self.drafts}
        return {name: lambda prompt, o=options: answer(prompt, o) for name, options in settings.items()}  # type: ignore[misc]

    def _row(self, name: str, answers: dict[str, list[_Answer]], which: Sequence[int]) -> dict[str, Any]:
        side, drafts = name.split(":")
        mine, base, told = ([answers[key][i] for i in which] for key in (name, f"{side}:0", "ngram:0"))
        committed = sum(len(a.tokens) - 1 for a in mine)
        forwards = sum(a.forwards for a in mine)
        gain = np.array([b.seconds_per_token / a.seconds_per_token for a, b in zip(mine, base, strict=True)])
        return {
            "side": side,
            "drafts": int(drafts),
            "prompts": len(which),
            "tokens_per_forward": committed / forwards,
            "accepted_per_forward": committed / forwards - 1,
            "forwards": forwards,
            "speedup": {"median": float(np.median(gain)), "min": float(gain.min()), "max": float(gain.max())},
            "same_text": sum(a.tokens == b.tokens for a, b in zip(mine, told, strict=True)),
        }


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("side", "drafts", "tokens per forward", "speed-up over its own", "same text", title=title)
    for row in rows:
        spread = row["speedup"]
        table.add_row(
            row["side"],
            str(row["drafts"]),
            f"{row['tokens_per_forward']:.3f}",
            f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})",
            f"{row['same_text']}/{row['prompts']}",
        )
    return table
