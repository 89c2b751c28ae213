"""Shards: the conversations that a model makes, on disk, each file whole or not there at all.

A shard depends on its number and on what the manifest says alone (but for bfloat16's roundings, which depend on the
batch too), so that a killed run goes on where it stopped without losing a conversation or making one twice.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from specjax import stopping
from specjax.acceptance import Acceptance
from specjax.corpus.answers import answer, chat_tokenizer
from specjax.corpus.conversation import Conversation, conversations
from specjax.corpus.manifest import Manifest
from specjax.errors import DataError
from specjax.files import locked, read_arrays, write_arrays
from specjax.loading.load import Model

Messages = Sequence[dict[str, str]]


def shard_path(directory: Path, shard: int) -> Path:
    """Where a shard is."""
    return directory / f"shard_{shard:05d}.npz"


def write_shards(
    model: Model,
    directory: Path,
    shards: int,
    prompts_for: Callable[[int], Sequence[Messages]],
    manifest: Manifest,
    *,
    acceptance: Acceptance,
    max_new_tokens: int,
    key: jax.Array,
    batch_size: int | None = None,
    progress: Callable[[int, int, float], None] = lambda shard, tokens, seconds: None,
) -> list[Path]:
    """Writes shards of answers and gives all their paths; those that are there already are kept.

    Args:
      prompts_for: shard number -> the messages to answer; must depend on nothing else.
      manifest: what the text depends on. Its counts are brought up to date after every shard.
      key: of the answers; a shard's is folded from it and its number.
      batch_size: conversations that are decoded together; None: a whole shard.
      progress: called with (shard, its answers' tokens, seconds it took) after each one.

    Raises:
      DataError: shards that another model or other settings made, or that are damaged; a directory that another process
        writes to; a disk that cannot be written (the shards before are intact); prompts that do not fit the model's
        context.
      Stopped: that was asked for; the shards before are there.
    """
    with locked(directory, "shards", "wait until it has made its shards, or name another data.directory."):
        manifest.claim(directory)
        for left in directory.glob("*.tmp"):  # by a kill
            left.unlink(missing_ok=True)
        paths = [shard_path(directory, shard) for shard in range(shards)]
        counts = dict.fromkeys(("shards", "conversations", "answer_tokens"), 0)

        def count(lengths: np.ndarray) -> None:
            for name, more in zip(counts, (1, len(lengths), int(lengths.sum())), strict=True):
                counts[name] += more

        for path in sorted(directory.glob("shard_?????.npz")):
            count(_load(path)["lengths"])
        manifest.save(directory, counts)
        for shard, path in enumerate(paths):
            if path.exists():
                continue
            stopping.check(f"{shard} of {shards} shards")
            began = time.perf_counter()
            chats = [chat_tokenizer(model).apply_chat_template(messages) for messages in prompts_for(shard)]
            made = answer(
                model,
                chats,
                acceptance=acceptance,
                max_new_tokens=max_new_tokens,
                key=jax.random.fold_in(key, shard),
                batch_size=batch_size,
            )
            arrays = {
                "tokens": made.tokens,
                "lengths": made.lengths,
                "prompts": np.concatenate([np.asarray(chat, np.int32) for chat in chats]),
                "prompt_lengths": np.array([len(chat) for chat in chats], np.int32),
            }
            if manifest.features:
                arrays["features"] = made.features.view(np.uint16)
            write_arrays(path, arrays)
            count(made.lengths)
            manifest.save(directory, counts)
            progress(shard, len(made.tokens), time.perf_counter() - began)
        return paths


def read_shards(paths: Sequence[Path]) -> list[Conversation]:
    """The conversations of shards, in order; the prompt is as the chat template writes it.

    Raises:
      DataError: no shards, or a damaged one.
    """
    if not paths:
        raise DataError("there are no data shards; run the distillation first.")
    found: list[Conversation] = []
    for path in paths:
        data = _load(path, features=True)
        prompts = np.split(data["prompts"], np.cumsum(data["prompt_lengths"])[:-1])
        features = data["features"].view(ml_dtypes.bfloat16) if "features" in data else None
        found += conversations(prompts, data["tokens"], data["lengths"], features)
    return found


def _load(path: Path, features: bool = False) -> dict[str, np.ndarray]:
    remedy = "delete the file, and run the distillation again to make it anew."

    def refuse(what: str) -> DataError:
        return DataError(f"{path} cannot be read ({what}); {remedy}")

    data = read_arrays(path, refuse, lambda name: features or name != "features")
    for name, array in data.items():
        if array.ndim != 1 + (name == "features") or array.dtype.kind not in "iu":
            raise refuse(f"{name} is {array.dtype} of shape {array.shape}")
    if missing := {"tokens", "lengths", "prompts", "prompt_lengths"} - set(data):
        raise DataError(f"{path} lacks {sorted(missing)}; {remedy}")
    rows = [data["lengths"].sum(), *(len(data[n]) for n in ("tokens", "features") if n in data)]
    prompts = data["prompt_lengths"].sum(), len(data["prompts"])
    if len(set(rows)) > 1 or len(set(prompts)) > 1 or len(data["lengths"]) != len(data["prompt_lengths"]):
        raise DataError(f"{path} holds answers of {rows} and prompts of {prompts} tokens, which disagree; {remedy}")
    if not len(data["lengths"]) or not data["lengths"].all():
        raise DataError(f"{path} holds no conversation, or an empty answer; {remedy}")
    return data
