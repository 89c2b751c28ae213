"""PRNG keys that compile and run fast: a hash of a few multiplications in place of threefry's twenty rounds.

Every round splits its key, so that threefry is a good part of what small test programs cost. The laws are
tested with it alone; JAX's own keys are tested in tests/real/test_sampling.py and tests/test_decode.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl


def _mix(x):
    """The finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _word(key, counter):
    return _mix(_mix(_mix(counter * np.uint32(0x9E3779B9) ^ key[0]) + key[1]) ^ key[0])


def _pair(key, counter):
    return jnp.stack([_word(key, 2 * counter), _word(key, 2 * counter + 1)], -1)


def _counters(shape):
    return jnp.arange(int(np.prod(shape)), dtype=jnp.uint32).reshape(shape)


def _seed(seed):
    seed = jnp.asarray(seed).astype(jnp.uint32)
    return jnp.stack([_mix(seed + np.uint32(1)), _mix(seed ^ np.uint32(0xDEADBEEF))])


def _split(key, shape):
    return _pair(key ^ np.uint32(0xA5A5A5A5), _counters(shape))


def _fold_in(key, data):
    return _pair(key ^ np.uint32(0x3C3C3C3C), jnp.asarray(data).astype(jnp.uint32))


def _bits(key, width, shape):
    assert width == 32, width
    return _word(key, _counters(shape))


_HASH = define_prng_impl(key_shape=(2,), seed=_seed, split=_split, random_bits=_bits, fold_in=_fold_in, name="hash")


def fast_key(seed: int) -> jax.Array:
    """As `jax.random.key(seed)`."""
    return jax.random.key(seed, impl=_HASH)
