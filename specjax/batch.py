"""Many requests at once: a batch of prompts by `vmap` of the same round."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.decode import Generation, RequestOptions, check_key, check_request, nothing, summarise
from specjax.errors import PromptError
from specjax.loading.load import Model
from specjax.loop import Plan, State, batch_rounds, first_token
from specjax.target.cache import KVCache
from specjax.target.model import read

_read_prompts = jax.jit(jax.vmap(read, in_axes=(None, None, 0, 0)), static_argnums=1)


@functools.partial(jax.jit, donate_argnames="caches")
def _batch(
    plan: Plan,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    keys: jax.Array,
    features: Float[Array, "B D"],
    caches: KVCache,
) -> State:
    states = jax.vmap(functools.partial(first_token, plan))(tokens, lengths, limits, keys, features, caches)
    return batch_rounds(plan, states)


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    keys: jax.Array | None = None,
    **options: Unpack[RequestOptions],
) -> list[Generation]:
    """`generate` for prompts of any lengths at once, by `vmap`: in float32 each member gets what it would get alone.

    In bfloat16 a batch takes other matrix products, whose rounding differs, so that near-ties can flip. A batch takes
    as many rounds as its slowest member. The arguments are `generate`'s, but for:

    Args:
      prompts: token ids, at least one prompt.
      keys: one PRNG key per prompt [B], `jax.random.split(key, B)`; needed by rules that sample. `key` is refused.

    Raises:
      PromptError: no prompts, another number of keys, or what `generate` refuses about any of them.
      SpecJaxError: whatever `drafter.check` finds, and what `generate` raises.
    """
    if len(prompts) == 0:
        raise PromptError("there are no prompts; pass at least one.")
    if options.get("key") is not None:
        raise PromptError(f"a batch takes a key for each prompt: pass keys=jax.random.split(key, {len(prompts)}).")
    request = check_request(model, prompts, options)
    keys = check_key(keys, request.plan.acceptance, len(prompts))
    if request.new_tokens == 0:
        return [nothing() for _ in prompts]
    tokens, lengths, limits = (jnp.asarray(x) for x in (request.tokens, request.lengths, request.limits))
    features, caches = _read_prompts(model.params, model.config, tokens, lengths)
    states = _batch(request.plan, tokens, lengths, limits, keys, features, caches)
    slim = dataclasses.replace(states, cache=None, draft=None, key=None)  # type: ignore[arg-type]
    return [summarise(jax.tree.map(lambda leaf, i=i: leaf[i], slim), request.plan) for i in range(len(prompts))]
