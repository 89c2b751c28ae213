"""What a run was begun with: how it is compared, and what a refusal shows."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import specjax as sj
from specjax import run_settings
from specjax.corpus.conversation import Conversation, text_identity
from specjax.fingerprint import arrays_fingerprint


def test_a_refusal_shows_where_two_settings_part(tmp_path):
    def refused(before, now):
        file = tmp_path / run_settings.FILE
        file.write_text(run_settings.as_json({"x": before}))
        with pytest.raises(sj.CheckpointError) as refusal:
            run_settings.check(file, {"x": now})
        return str(refusal.value).split("begun with ")[1].split(": go back")[0]

    path = [[0] * depth for depth in range(1, 40)]
    assert refused(path, [*path[:-1], [1]]) == "x[38][0] 0 (now 1)"
    assert refused(path[:-1], path[:-2]) == f"x[37] {str([0] * 38)[:60]}... (now absent)"
    assert refused("a" * 70 + "b", "a" * 70 + "c") == f"x '{'a' * 70}b' (now '{'a' * 70}c')"
    assert refused(None, "a" * 70) == f"x None (now '{'a' * 59}...)"


def test_what_is_absent_is_explained_where_an_older_version_did_not_ask_for_it(tmp_path):
    def refused(before, now):
        (tmp_path / run_settings.FILE).write_text(run_settings.as_json(before))
        with pytest.raises(sj.CheckpointError) as refusal:
            run_settings.check(tmp_path / run_settings.FILE, now)
        return str(refusal.value)

    lora = {"training": {"lora": {"rank": 4}}, "tree": [[0]]}
    without = refused(lora, {"training": {"lora": None}, "tree": [[0], [1]]})
    assert "training.lora.rank 4 (now absent)" in without
    assert "older version" not in without
    older = "(what is absent, an older version did not ask for)"
    assert older in refused(lora, lora | {"target_dtype": "float32"})
    assert older in refused(lora, lora | {"training": lora["training"] | {"z_loss": 0.1}})
    for damaged in ([], None, 3):
        assert "cannot be read (it holds no settings)" in refused(damaged, lora)


def test_text_is_recognised():
    """By every token, mask and length, and its features' width and dtype; not their bits, which CPUs differ in."""
    rng = np.random.default_rng(0)
    data = [
        Conversation(rng.integers(0, 9, 3), rng.integers(0, 9, 4), rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16))
        for _ in range(200)
    ]
    known = text_identity(data)
    assert (known["conversations"], known["tokens"]) == (200, 1400)
    assert text_identity([Conversation(*map(np.copy, (d.prompt, d.answer, d.features))) for d in data]) == known
    last = data[-1]
    changed = [
        dataclasses.replace(last, answer=(last.answer + 1) % 9),
        dataclasses.replace(last, prompt=(last.prompt + 1) % 9),
        dataclasses.replace(last, mask=np.array([1, 1, 0, 1], bool)),
        Conversation(last.prompt[:2], np.append(last.prompt[2:], last.answer)),
    ]
    marks = [text_identity([*data[:-1], item])["fingerprint"] for item in changed]
    marks.append(text_identity(data[::-1])["fingerprint"])  # the order decides the batches
    assert len({known["fingerprint"], *marks}) == 6
    features = [d.features for d in data]
    others = [
        [(f + 1).astype(f.dtype) for f in features],
        [f.astype(np.float32) for f in features],
        [f[:, :1] for f in features],
    ]
    same = [
        text_identity([dataclasses.replace(d, features=f) for d, f in zip(data, other, strict=True)]) == known
        for other in others
    ]
    assert same == [True, False, False]
    assert arrays_fingerprint(np.zeros(2, np.int32)) != arrays_fingerprint(np.zeros(1, np.int64))
