"""The manifest beside the shards: which model, template and settings made the text, and how much of it there is."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from specjax.errors import DataError
from specjax.files import write_atomically
from specjax.fingerprint import fingerprint, text_fingerprint
from specjax.loading.load import Model

FILE = "manifest.json"
_FORMAT, _VERSION = "specjax.conversations", 1


@dataclass(frozen=True)
class Manifest:
    """What every shard of a directory depends on, besides its number; in bfloat16 the batch moves near-ties too.

    Attributes:
      model: fingerprint of the parameters, whatever their dtype.
      model_name: for the reader; not compared.
      template: fingerprint of the chat template.
      prompts: where the prompts come from, with their seeds or, for a file, its fingerprint.
      answers: sampling, seed and the longest answer in tokens.
      shard_size: conversations in a shard.
      features: whether the shards hold features.
    """

    model: str
    model_name: str
    template: str
    prompts: dict[str, Any]
    answers: dict[str, Any]
    shard_size: int
    features: bool

    @classmethod
    def of(
        cls, model: Model, prompts: dict[str, Any], answers: dict[str, Any], shard_size: int, features: bool
    ) -> "Manifest":
        """The manifest of text that `model` makes."""
        template = "" if model.tokenizer is None else model.tokenizer.chat_template or ""
        mark, name = fingerprint(model.params), model.config.name
        return cls(mark, name, text_fingerprint(template), prompts, answers, shard_size, features)

    def claim(self, directory: Path) -> None:
        """Makes `directory` one of this text: writes the manifest, or checks the one that is there.

        Raises:
          DataError: shards of another model, template, prompts or settings, or shards without a manifest; a directory
            that cannot be written.
        """
        file = directory / FILE
        if file.exists():
            self._check(load(directory)[0], directory)
            return
        if shards := sorted(directory.glob("shard_*.npz")):
            raise DataError(
                f"{directory} holds {len(shards)} shards and no {FILE}, so that nobody can tell what made them; name "
                "another directory or delete them."
            )
        self.save(directory, {})

    def _check(self, other: "Manifest", directory: Path) -> None:
        wrong = []
        for field in fields(self):
            mine, theirs = _plain(getattr(self, field.name)), getattr(other, field.name)
            if field.name != "model_name" and mine != theirs:
                wrong.append(f"{field.name} {theirs} (now {mine})")
        if wrong:
            raise DataError(
                f"the shards in {directory} were made with {'; '.join(wrong)}. Name another directory, delete this "
                "one, or go back to the settings that made it."
            )

    def save(self, directory: Path, counts: dict[str, int]) -> None:
        """Writes the manifest with the counts of what the shards hold, atomically.

        Raises:
          DataError: it cannot be written.
        """
        record = {"format": _FORMAT, "version": _VERSION, **asdict(self), "counts": counts}
        text = json.dumps(record, indent=1).encode()
        write_atomically(directory / FILE, text)


def load(directory: Path) -> tuple[Manifest, dict[str, int]]:
    """The manifest in `directory` and its counts (`shards`, `conversations`, `answer_tokens`).

    Raises:
      DataError: none, a damaged one, or another format or version.
    """
    file = directory / FILE
    try:
        record = json.loads(file.read_text("utf-8"))
        found = record.pop("format"), record.pop("version")
        if found == (_FORMAT, _VERSION):
            counts = record.pop("counts")
            return Manifest(**record), counts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file} is not a manifest ({type(error).__name__}: {error}); name another directory or delete this one."
        ) from error
    raise DataError(f"{file} has format and version {found}; expected {(_FORMAT, _VERSION)}. Make the data again.")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
