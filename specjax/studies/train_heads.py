"""The training experiment: from a packaged target to heads with a record of their quality."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from specjax.corpus.build import Distillation, prepared
from specjax.corpus.split import joined
from specjax.corpus.texts import conversation_texts
from specjax.loading.load import load_model
from specjax.studies.head_fit import HeadFit


@dataclass(frozen=True, kw_only=True)
class FitHeads(HeadFit):
    """Fits Medusa heads to text of the target's own."""

    model: str
    data: Distillation = field(default_factory=Distillation)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Distils, then `fit`.

        Raises:
          As `check`, before there is any text; as `prepared` and `fit`.
        """
        model = load_model(self.model, dtype=jnp.bfloat16)
        self.check(model, console)
        training, evaluation = prepared(model, self.data, console)
        return self.fit(
            model, joined(training), joined(evaluation), conversation_texts(evaluation), output_dir, console
        )
