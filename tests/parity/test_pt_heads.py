"""Medusa's `.pt` files as torch itself writes them."""

import collections
import os

import ml_dtypes
import numpy as np
import pytest
import torch

from specjax.errors import CheckpointError
from specjax.heads import project
from specjax.loading import torch_pickle
from specjax.loading.head_files import load_heads
from specjax.target.config import ModelConfig

D, V, HEADS, LAYERS = 8, 20, 3, 2
TARGET = ModelConfig("llama", V, D, 12, 1, 2, 2, 4)


class _Block(torch.nn.Module):
    """x + SiLU(W x + b), named as Medusa's reference names it."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(D, D)

    def forward(self, x):
        return x + torch.nn.functional.silu(self.linear(x))


def _modules(seed=0):
    torch.manual_seed(seed)
    head = [[_Block() for _ in range(LAYERS)] + [torch.nn.Linear(D, V, bias=False)] for _ in range(HEADS)]
    return torch.nn.ModuleList(torch.nn.Sequential(*parts) for parts in head)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "medusa_lm_head.pt"


def test_logits_equal_torch(file):
    modules = _modules()
    torch.save(modules.state_dict(), file)  # an OrderedDict with _metadata
    features = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)
    with torch.no_grad():
        expected = torch.stack([head(torch.from_numpy(features)) for head in modules]).numpy()
    for source in (file, file.parent):
        heads = load_heads(source, TARGET)
        np.testing.assert_allclose(project(heads, None, features), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_exact(dtype, file):
    state = {name: tensor.to(dtype) for name, tensor in _modules().state_dict().items()}
    torch.save(state, file)
    heads = load_heads(file, TARGET)
    assert str(heads.params["kernel_0"].dtype) == ("bfloat16" if dtype == torch.bfloat16 else "float32")
    for i in range(HEADS):
        found = np.asarray(heads.params["kernel_1"][i]).astype(np.float32).T
        np.testing.assert_array_equal(found, state[f"{i}.1.linear.weight"].float().numpy())
        found = np.asarray(heads.params[f"projection_{i}"]).astype(np.float32)
        np.testing.assert_array_equal(found, state[f"{i}.2.weight"].float().numpy())


def test_views_and_shared_storages(file):
    state = _modules().state_dict()
    both = torch.randn(2, D, D, dtype=torch.bfloat16)
    state["0.0.linear.weight"], state["1.0.linear.weight"] = both[0].T, both[1]  # a transposed view, and an offset one
    state["2.0.linear.weight"] = both[1]  # Medusa's reference repeats one layer
    torch.save(state, file)
    kernel = np.asarray(load_heads(file, TARGET, dtype=ml_dtypes.bfloat16).params["kernel_0"]).astype(np.float32)
    np.testing.assert_array_equal(kernel[0], both[0].float().numpy())
    for i in (1, 2):
        np.testing.assert_array_equal(kernel[i], both[1].float().numpy().T)


class _Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("place", ["value", "beside", "key"])
def test_a_malicious_pickle_is_refused_unexecuted(place, file, tmp_path):
    witness, state = tmp_path / "executed", _modules().state_dict()
    if place == "value":
        state["0.0.linear.weight"] = _Malicious(witness)
    elif place == "beside":
        state._metadata["x"] = _Malicious(witness)
    else:
        state = collections.OrderedDict([((_Malicious(witness),), 1), *state.items()])
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir.*refused"):
        load_heads(file, TARGET)
    assert not witness.exists()
    torch.load(file, weights_only=False)  # executes it: the file is as malicious as the test says
    assert witness.exists()


def test_legacy_format(file):
    torch.save(_modules().state_dict(), file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"not in the zip format of torch >= 1\.6; convert it"):
        load_heads(file, TARGET)


def test_whole_modules_are_refused(file):
    torch.save(_modules(), file)
    with pytest.raises(CheckpointError, match="refused"):
        load_heads(file, TARGET)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, ml_dtypes.bfloat16])
def test_torch_reads_what_is_written_without_it(dtype, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"0.0.linear.weight": rng.normal(size=(4, 3)), "a": rng.normal(size=5), "none": np.zeros((0, 2))}
    tensors = {name: (10 * value).astype(dtype) for name, value in tensors.items()}
    torch_pickle.write(tmp_path / "t.pt", tensors)
    loaded = torch.load(tmp_path / "t.pt", weights_only=True)
    assert list(loaded) == list(tensors)
    for name, value in tensors.items():
        assert tuple(loaded[name].shape) == value.shape
        np.testing.assert_array_equal(loaded[name].double().numpy(), value.astype(np.float64))
        np.testing.assert_array_equal(torch_pickle.read(torch_pickle.scan(tmp_path / "t.pt")[name]), value)
