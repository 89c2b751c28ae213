"""The text that heads and draft models are trained on, as a config: of the model's own, or chats from a file."""

import datetime
import itertools
import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specjax.acceptance import Acceptance, acceptance_for
from specjax.corpus.answers import TODAY, chat_tokenizer, check_prompt, user_turns
from specjax.corpus.chats import read_conversations, read_prompts
from specjax.corpus.features import check_budget, with_features
from specjax.corpus.manifest import Manifest
from specjax.corpus.seeds import seed_prompts
from specjax.corpus.shards import Messages, read_shards, shard_path, write_shards
from specjax.corpus.split import Split, split
from specjax.errors import ConfigError, DataError, PromptError
from specjax.fingerprint import text_fingerprint
from specjax.loading.load import Model

_SOURCES = ("model+seeds", "model", "seeds")


@dataclass(frozen=True)
class Corpus:
    """The text: `shards` of `shard_size` conversations, or the chats of a file."""

    directory: str = "results/distill"  # shards that are already there are used, if the same settings made them
    prompts: str = "model+seeds"  # by the model itself, seed prompts, or both in turn shard by shard; or a JSONL file
    chats: str | None = None  # a JSONL file of chats to train on as they are; nothing is distilled then
    shards: int = 64  # of a file of prompts at most as many as it fills
    shard_size: int = 96
    batch_size: int = 96  # conversations that are decoded together
    max_answer_tokens: int = 192
    max_chat_tokens: int = 1024  # longer chats are cut
    temperature: float = 0.0  # of the answers; 0: greedy
    top_k: int | None = None
    top_p: float = 1.0
    turn_seed: int = 7  # of the user turns that the model writes
    prompt_seed: int = 1000  # of the seed prompts
    answer_seed: int = 0  # of sampled answers
    date: str = (
        TODAY.isoformat()
    )  # today, to chat templates that write it (Llama 3.2's): the same whenever a run goes on
    evaluation_share: float = 0.02  # of the prompts, by hash; never trained on
    features: bool = True  # kept on disk beside the text: 2 bytes a token and unit of width
    feature_budget_gb: float = 8.0  # GB (1e9 bytes) that they may take; in memory twice that while they are joined

    def __post_init__(self) -> None:
        sizes = (self.shards, self.shard_size, self.batch_size, self.max_answer_tokens, self.max_chat_tokens)
        if min(sizes) < 1 or not 0 < self.evaluation_share < 1:
            raise ConfigError(
                f"{self}: expected shards, shard_size, batch_size, max_answer_tokens and max_chat_tokens of at least 1 "
                "and 0 < evaluation_share < 1."
            )
        try:
            datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"date is {self.date!r}; expected a day as in 2026-01-31.") from error
        if self.chats is not None and (self.prompts, self.temperature) != ("model+seeds", 0):
            raise ConfigError(
                f"chats is {self.chats!r}, which is trained on as it is; prompts {self.prompts!r} and temperature "
                f"{self.temperature} would do nothing. Leave them out, or chats."
            )
        self.acceptance  # noqa: B018  # checks temperature, top_k and top_p

    @property
    def acceptance(self) -> Acceptance:
        """How answers are decoded."""
        return acceptance_for(self.temperature, self.top_k, self.top_p)


def make_corpus(model: Model, data: Corpus, console: Console, *, features: bool = False) -> list[Path]:
    """The files of `data`'s shards; those that are not there yet are made.

    Args:
      features: whether every conversation is to have features later, kept in shards or not: text that may be too much
        for the budget is refused before it is made.

    Raises:
      DataError: as `write_shards`; a bad file of prompts; features beyond the budget; or a model that ends too few of
        the user turns that it writes.
    """
    model = _dated(model, data)
    directory, shards, size = Path(data.directory), data.shards, data.shard_size
    asked: list[list[dict[str, str]]] = []
    prompts: dict[str, Any] = {"source": data.prompts}
    if data.prompts in _SOURCES:
        if "model" in data.prompts:
            prompts["turn_seed"] = data.turn_seed
        if "seeds" in data.prompts:  # the fingerprint tells when a release of specjax has other seed prompts
            prompts |= {
                "prompt_seed": data.prompt_seed,
                "seed_prompts": text_fingerprint(json.dumps(seed_prompts(64, data.prompt_seed))),
            }
    elif not Path(data.prompts).exists():
        raise DataError(f"prompts is {data.prompts!r}; expected a JSONL file that exists, or one of {_SOURCES}.")
    else:
        asked = read_prompts(data.prompts, console.print)
        if len(asked) > shards * size:
            console.print(
                f"{data.prompts} has {len(asked)} different prompts, {shards} shards take the first {shards * size}: "
                f"set shards to {-(-len(asked) // size)} for all."
            )
        shards = min(shards, -(-len(asked) // size))
        _check_prompts(model, data, asked[: shards * size])
        prompts = {"source": "file", "fingerprint": text_fingerprint(json.dumps(asked))}
    if chat_tokenizer(model).writes_the_date:
        prompts["date"] = data.date
    answers = {
        "temperature": data.temperature,
        "top_k": data.top_k,
        "top_p": data.top_p,
        "seed": data.answer_seed if data.temperature else None,
        "max_tokens": data.max_answer_tokens,
    }
    if features or data.features:
        # Of the shards that are asked for alone; the directory may hold more.
        there = [path for path in (shard_path(directory, i) for i in range(shards)) if path.exists()]
        missing = (shards - len(there)) * size * data.max_answer_tokens
        check_budget(sum(map(_answer_tokens, there)) + missing, model.config, data.feature_budget_gb)

    def prompts_for(shard: int) -> list[Messages]:
        if asked:
            return list(asked[shard * size : (shard + 1) * size])
        turns: list[str] = []
        if data.prompts == "model" or (data.prompts == "model+seeds" and shard % 2 == 0):
            turns = _user_turns(model, data, shard)
        turns += seed_prompts(size - len(turns), data.prompt_seed + shard)
        return [[{"role": "user", "content": turn}] for turn in turns]

    spent, made = 0.0, 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        present = sum(shard_path(directory, i).exists() for i in range(shards))
        task = progress.add_task("distilling: shards", total=shards, completed=present)

        def report(shard: int, tokens: int, seconds: float) -> None:
            nonlocal spent, made
            spent, made = spent + seconds, made + tokens
            progress.update(task, advance=1, description=f"distilling: {made / spent:.0f} tokens/s, shards")

        return write_shards(
            model,
            directory,
            shards,
            prompts_for,
            Manifest.of(model, prompts, answers, size, data.features),
            acceptance=data.acceptance,
            max_new_tokens=data.max_answer_tokens,
            key=jax.random.key(data.answer_seed),
            batch_size=data.batch_size,
            progress=report,
        )


def _answer_tokens(shard: Path) -> int:
    try:
        with np.load(shard, allow_pickle=False) as file:
            return int(file["lengths"].sum())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return 0  # damaged: `write_shards` says so, before it makes anything


def _dated(model: Model, data: Corpus) -> Model:
    return replace(model, tokenizer=chat_tokenizer(model).dated(datetime.date.fromisoformat(data.date)))


def _check_prompts(model: Model, data: Corpus, asked: list[list[dict[str, str]]]) -> None:
    # Before the first shard: a file that is mended later has another fingerprint, and what was made would be lost.
    for number, messages in enumerate(asked, 1):
        start = f"prompt {number} of the different ones in {data.prompts} ({messages[-1]['content'][:40]!r}...)"
        try:
            length = len(chat_tokenizer(model).apply_chat_template(messages))
        except PromptError as error:
            raise DataError(f"{start}: {error}") from error
        check_prompt(start, length, model.config, data.max_answer_tokens)


def _user_turns(model: Model, data: Corpus, shard: int) -> list[str]:
    """Up to `shard_size` turns; exactly that many where no seed prompts may stand in for those that it did not end."""
    key, turns = jax.random.fold_in(jax.random.key(data.turn_seed), shard), list[str]()
    size = data.shard_size
    for attempt in itertools.count():
        turns += user_turns(
            model,
            size + size // 2,
            key=jax.random.fold_in(key, attempt) if attempt else key,
            batch_size=data.batch_size,
        )
        if len(turns) >= size or data.prompts != "model":
            return turns[:size]
        if attempt == 7:
            raise DataError(
                f"the model ended only {len(turns)} of {8 * (size + size // 2)} user turns that it began, {size} are "
                'needed; set prompts to "model+seeds", "seeds" or a file.'
            )
    raise AssertionError("unreachable")


def load_corpus(model: Model, data: Corpus, console: Console, *, features: bool = True, make: bool = True) -> Split:
    """The conversations to train on and to evaluate with; text that is missing is made.

    Args:
      make: False only reads the shards that are there: of several processes one makes them.
      features: whether those that no shard keeps are computed now, by one pass of the target over the text.

    Raises:
      DataError: as `make_corpus`, `read_conversations`, `split` and `with_features`.
    """
    if data.chats is None:
        there = sorted(Path(data.directory).glob("shard_*.npz"))[: data.shards]
        text = read_shards(make_corpus(model, data, console, features=features) if make else there)
    else:
        model = _dated(model, data)
        limit = min(data.max_chat_tokens, model.config.max_positions)
        text = read_conversations(data.chats, chat_tokenizer(model), max_tokens=limit, report=console.print)
    training, evaluation = split(text, data.evaluation_share, console.print)
    if features:
        every = with_features(model, training + evaluation, budget_gb=data.feature_budget_gb)
        training, evaluation = every[: len(training)], every[len(training) :]
    return Split(training, evaluation)
