"""torch.save's archives without torch: files built here by hand; tests/parity/test_pt_heads.py reads torch's own."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from specjax.errors import CheckpointError
from specjax.loading import torch_pickle

D = 8


def _values(*values):
    """Opcodes that push `values`."""
    return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)


def _call(module, name, *arguments):
    """Opcodes that call `module.name`, written without importing it."""
    return f"c{module}\n{name}\n(".encode() + _values(*arguments) + b"tR"


def _archive(path, data, storages=(), compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for key, raw in enumerate(storages):
            file.writestr(f"archive/data/{key}", raw, compress)


def _tensor(key, numel, offset, shape, stride):
    """Opcodes of one float32 tensor, as torch writes them."""
    storage = b"(" + _values("storage") + b"ctorch\nFloatStorage\n" + _values(str(key), "cpu", numel) + b"tQ"
    rest = _values(offset, shape, stride, False) + _call("collections", "OrderedDict")
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def _dict(items):
    return b"\x80\x02}(" + b"".join(_values(name) + value for name, value in items.items()) + b"u."


@pytest.fixture
def pt(tmp_path):
    return tmp_path / "medusa_lm_head.pt"


def _load(path):
    return {name: torch_pickle.read(tensor) for name, tensor in torch_pickle.scan(path).items()}


def test_contiguous_tensors(pt):
    a, b = np.arange(D * D, dtype=np.float32).reshape(D, D), np.arange(D, dtype=np.float32)
    items = {"a": _tensor(0, a.size, 0, a.shape, (D, 1)), "b": _tensor(1, b.size, 0, b.shape, (1,))}
    _archive(pt, _dict(items), [a.tobytes(), b.tobytes()])
    loaded = _load(pt)
    assert list(loaded) == ["a", "b"]
    np.testing.assert_array_equal(loaded["a"], a)
    np.testing.assert_array_equal(loaded["b"], b)


def test_transposed_and_offset_tensors(pt):
    stored = np.arange(3 * D * D, dtype=np.float32)
    items = {"a": _tensor(0, stored.size, 5, (D, D), (1, D)), "b": _tensor(0, stored.size, 1, (D,), (2,))}
    _archive(pt, _dict(items), [stored.tobytes()])
    loaded = _load(pt)
    np.testing.assert_array_equal(loaded["a"], stored[5 : 5 + D * D].reshape(D, D).T)
    np.testing.assert_array_equal(loaded["b"], stored[1 : 1 + 2 * D : 2])


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("subprocess", "call"), ("torch", "load"),
     ("collections", "namedtuple"), ("torch.storage", "_load_from_bytes")],
)  # fmt: skip
def test_a_pickle_that_asks_for_anything_else_is_refused_unexecuted(module, name, pt, tmp_path):
    witness = tmp_path / "executed"
    _archive(pt, b"\x80\x02" + _call(module, name, f"touch {witness}") + b".")
    with pytest.raises(CheckpointError, match=rf"asks for {module}\.{name}.*refused"):
        _load(pt)
    assert not witness.exists()


def test_what_a_pickle_changes_dies_with_it():
    rebuild = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    changed = torch_pickle._Unpickler(io.BytesIO(rebuild + _values({"changed": True}) + b"b.")).load()  # BUILD sets it
    assert changed.changed
    assert not hasattr(torch_pickle._Unpickler(io.BytesIO(rebuild + b".")).load(), "changed")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [((0, 64, 0, (D, D + 1), (D, 1)), "exceeds its storage of 64"), ((0, 64, 1, (D, D), (D, 1)), "exceeds"),
     ((0, 64, 0, (10**6, 10**6), (0, 0)), "exceeds"), ((0, 10**9, 0, (10**4, 10**4), (10**4, 1)), "exceeds"),
     ((0, 64, -1, (D,), (1,)), "not a tensor"), ((0, 64, 0, (D,), (-1,)), "not a tensor"),
     ((0, 64, 0, (D, D), (1,)), "not a tensor"), ((1, 64, 0, (D, D), (D, 1)), "missing or compressed")],
)  # fmt: skip
def test_tensors_outside_their_storage(tensor, message, pt):
    _archive(pt, _dict({"0.0.linear.weight": _tensor(*tensor)}), [bytes(4 * 64)])
    with pytest.raises(CheckpointError, match=message):
        _load(pt)


def test_other_pickles(pt):
    _archive(pt, pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="holds a list, expected a state dict"):
        _load(pt)
    _archive(pt, pickle.dumps({"epoch": 3}))
    with pytest.raises(CheckpointError, match="entry 'epoch' is not a tensor"):
        _load(pt)
    _archive(pt, b"\x80\x02}(")
    with pytest.raises(CheckpointError, match="cannot be read as a state dict"):
        _load(pt)
    _archive(pt, _dict({"0.0.linear.weight": _tensor(0, 64, 0, (D, D), (D, 1))}), [bytes(256)], zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="missing or compressed"):
        _load(pt)
    with zipfile.ZipFile(pt, "w") as file:
        file.writestr("no pickle", b"")
    with pytest.raises(CheckpointError, match="holds 0 pickles"):
        _load(pt)
    pt.write_bytes(pickle.dumps({"0.0.linear.weight": 1}))  # torch < 1.6
    with pytest.raises(CheckpointError, match=r"not in the zip format.*convert it"):
        _load(pt)
