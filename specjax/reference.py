"""The slow oracle: speculative decoding in plain Python and NumPy, one token at a time, obviously right.

A `Decoder` observes tokens, says what it expects next, and can be rolled back. Every root-to-leaf path of a draft tree
is walked on it from the start; nothing is batched, cached or clever. The tests hold the fast loop against this file.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from specjax.errors import ConfigError, PromptError, TreeError
from specjax.target.config import ModelConfig
from specjax.target.model import forward, unembed
from specjax.target.params import Params
from specjax.tree import Tree


class Decoder(Protocol):
    """A language model with a memory."""

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        ...

    def observe(self, token: int) -> None:
        """Appends a token to what it has seen."""
        ...

    def next_logits(self) -> Float[np.ndarray, "V"]:
        """Logits of the token after everything observed, of which there is at least one."""
        ...

    def roll_back(self, count: int) -> None:
        """Forgets the last `count` tokens observed."""
        ...


class ModelDecoder:
    """A `Decoder` over the real model: each question recomputes the whole sequence, without any key/value cache.

    Sequences are padded to a multiple of 64, which causal attention cannot see, so that few lengths are compiled;
    features already computed for a sequence are remembered.
    """

    def __init__(self, params: Params, config: ModelConfig):
        self._params, self._config = params, config
        self._tokens: list[int] = []
        self._known: dict[tuple[int, ...], np.ndarray] = {}  # token sequence -> features [D]

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return self._config.vocab_size

    def observe(self, token: int) -> None:
        """Appends a token.

        Raises:
          PromptError: an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise PromptError(f"token id {token} is not in the vocabulary; expected 0 to {self.vocab_size - 1}.")
        self._tokens.append(token)

    def features(self) -> Float[np.ndarray, "D"]:
        """The hidden state at the last position after the final norm: what the LM head and Medusa heads read.

        Raises:
          PromptError: nothing has been observed.
        """
        sequence = tuple(self._tokens)
        if not sequence:
            raise PromptError("nothing has been observed yet; observe a prompt of at least one token first.")
        if sequence not in self._known:
            padded = np.zeros(-(-len(sequence) // 64) * 64, np.int32)
            padded[: len(sequence)] = sequence
            self._known[sequence] = np.asarray(_all_features(self._params, self._config, padded)[len(sequence) - 1])
        return self._known[sequence]

    def next_logits(self) -> Float[np.ndarray, "V"]:
        """Logits of the next token, float32; raises as `features`."""
        return np.asarray(unembed(self._params, jnp.asarray(self.features())[None])[0])

    def roll_back(self, count: int) -> None:
        """Forgets the last `count` tokens."""
        del self._tokens[len(self._tokens) - count :]


@functools.partial(jax.jit, static_argnames="config")
def _all_features(params: Params, config: ModelConfig, tokens: Int[jax.Array, "T"]) -> Float[jax.Array, "T D"]:
    return forward(params, config, tokens).features


# --- draft trees ----------------------------------------------------------------------------------------------------


def top_k(logits: Float[np.ndarray, "V"], k: int) -> list[int]:
    """The k best token ids, highest first, ties to the lowest id; k is clamped to the vocabulary."""
    return np.argsort(-np.asarray(logits), kind="stable")[:k].tolist()


def build_chain(root: int, candidates: Sequence[Sequence[int]], num_heads: int) -> tuple[list[int], tuple[int, ...]]:
    """The best candidate of every head, one below the other. Gives M tokens, root first, and M parents.

    Raises:
      TreeError: another number of candidate lists than heads, or an empty list.
    """
    _check_candidates(candidates, num_heads)
    return [root, *(offered[0] for offered in candidates)], tuple(range(-1, num_heads))


def build_cartesian(
    root: int, candidates: Sequence[Sequence[int]], num_heads: int
) -> tuple[list[int], tuple[int, ...]]:
    """Every combination, breadth first, parent-major, then rank: 1 + k1 + k1 k2 + ... nodes. Else as `build_chain`."""
    _check_candidates(candidates, num_heads)
    tokens, parents, level = [root], [-1], [0]
    for offered in candidates:
        below = []
        for parent in level:
            for token in offered:
                below.append(len(tokens))
                tokens.append(token)
                parents.append(parent)
        level = below
    return tokens, tuple(parents)


def build(tree: Tree, root: int, candidates: Sequence[Sequence[int]]) -> list[int]:
    """Fills any tree: a node of rank r at depth d takes candidates[d - 1][r]. Gives the M tokens, root first.

    Raises:
      TreeError: fewer lists than the tree is deep, or a list shorter than the ranks that the tree takes from it.
    """
    if len(candidates) < tree.max_depth:
        raise TreeError(
            f"there are {len(candidates)} candidate lists; the tree is {tree.max_depth} deep and takes one per depth."
        )
    for depth, (offered, needed) in enumerate(zip(candidates, tree.max_rank_by_depth, strict=False), 1):
        if len(offered) < needed:
            raise TreeError(f"at depth {depth} there are {len(offered)} candidates; the tree takes the best {needed}.")
    return [root, *(candidates[len(path) - 1][path[-1]] for path in tree.rank_paths)]


def _check_candidates(candidates: Sequence[Sequence[int]], num_heads: int) -> None:
    if len(candidates) != num_heads:
        raise TreeError(f"there are {len(candidates)} candidate lists for {num_heads} heads; expected one per head.")
    for head, offered in enumerate(candidates):
        if not offered:
            raise TreeError(f"head {head} offers no candidates; expected at least one token per head.")


# --- acceptance -----------------------------------------------------------------------------------------------------

Judge = Callable[[Float[np.ndarray, "V"], int], float | None]
"""Given the parent's logits and a child's token: its score where it is accepted, None where it is not.

Among equally long accepted paths the largest sum of scores wins, then the first path.
"""


def greedy(logits: Float[np.ndarray, "V"], token: int) -> float | None:
    """Accepts the arg-max (ties to the lowest id). Lossless. All scores are 0."""
    return 0.0 if token == int(np.argmax(logits)) else None


def typical(
    temperature: float = 0.7, epsilon: float = 0.09, delta: float = 0.3, rule: Literal["paper", "abyo"] = "paper"
) -> Judge:
    """Typical acceptance (Cai et al. 2024, section 2.3.1). NOT lossless: the output is not the target's own.

    With p = softmax(logits / temperature) and H = -sum p ln(p + 1e-5), the paper's rule accepts while
    p[token] > min(epsilon, delta exp(-H)); the Rust system's while p[token] >= max(epsilon, delta exp(-H)).
    Scores are ln p[token].

    Raises:
      ConfigError: a temperature that is not positive, or an unknown rule.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature is {temperature}; typical acceptance needs a positive one.")
    if rule not in ("paper", "abyo"):
        raise ConfigError(f"rule is {rule!r}; expected 'paper' or 'abyo'.")

    def judge(logits: Float[np.ndarray, "V"], token: int) -> float | None:
        scaled = np.asarray(logits, np.float64) / temperature
        p = np.exp(scaled - scaled.max())
        p /= p.sum()
        typicality = delta * np.exp(np.sum(p * np.log(p + 1e-5)))
        accepted = p[token] > min(epsilon, typicality) if rule == "paper" else p[token] >= max(epsilon, typicality)
        return float(np.log(p[token])) if accepted else None

    return judge


def walk(
    decoder: Decoder, tokens: Sequence[int], parents: Sequence[int], judge: Judge = greedy
) -> tuple[list[int], int]:
    """Verifies a draft tree path by path. Gives the accepted drafts and the target's own next token after them.

    Each path from the root to a leaf is observed token by token. Every child is judged by its parent's logits; a path
    stops at its first failure. The longest accepted prefix wins, ties to the largest sum of scores, then to the first
    path in depth-first order. The next token is the arg-max after the deepest accepted node. The decoder is left as
    it was found.

    Args:
      decoder: has observed everything before the root.
      tokens: M token ids, root first.
      parents: M parents, -1 for the root, each before its child.
      judge: `greedy` or a `typical(...)`.
    """
    best: tuple[int, float] | None = None
    accepted, next_token = [], -1
    for path in _paths(parents):
        score, observed = 0.0, 1
        with _observed(decoder, [tokens[path[0]]]):
            logits = decoder.next_logits()
        for node in path[1:]:
            verdict = judge(logits, tokens[node])
            if verdict is None:
                break
            score, observed = score + verdict, observed + 1
            with _observed(decoder, [tokens[n] for n in path[:observed]]):
                logits = decoder.next_logits()
        if best is None or (observed, score) > best:
            best = (observed, score)
            accepted, next_token = [tokens[n] for n in path[1:observed]], int(np.argmax(logits))
    return accepted, next_token


def _paths(parents: Sequence[int]) -> list[list[int]]:
    """Root-to-leaf paths, depth first: the order of their node numbers."""
    paths = []
    for leaf in range(len(parents)):
        if leaf in parents:
            continue
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return sorted(paths)


@contextmanager
def _observed(decoder: Decoder, tokens: Sequence[int]) -> Iterator[None]:
    """The decoder having seen these tokens too, for as long as the block lasts."""
    count = 0
    try:
        for token in tokens:
            decoder.observe(token)
            count += 1
        yield
    finally:
        decoder.roll_back(count)


# --- decoding -------------------------------------------------------------------------------------------------------

Propose = Callable[[list[int], Float[np.ndarray, "D"] | None], Sequence[Sequence[int]]]
"""Given all tokens so far (the last one is the root) and the features that predicted the root (None where the decoder
has none): candidate tokens for each depth, best first."""


@dataclass(frozen=True)
class Decoded:
    """Generated tokens, and how many drafts each round committed: its tokens less the target's own one.

    The first token comes from the prompt alone, before the first round. What the budget or an EOS cuts off counts
    nowhere; the last token that a cut round keeps stands for the target's own.
    """

    tokens: list[int]
    accepted_lengths: list[int]


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    propose: Propose,
    tree: Tree,
    *,
    judge: Judge = greedy,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
) -> Decoded:
    """Speculative decoding: exactly `max_new_tokens` tokens, or up to and including the first EOS.

    The decoder is left as it was found.

    Raises:
      PromptError: an empty prompt, an id outside the vocabulary, or a negative budget.
      TreeError: candidates that do not fill the tree.
    """
    _check_prompt(decoder, prompt, max_new_tokens)
    features = getattr(decoder, "features", lambda: None)
    tokens: list[int] = []
    accepted_lengths = []

    def finished() -> bool:
        return len(tokens) >= max_new_tokens or (bool(tokens) and tokens[-1] in eos_token_ids)

    if not finished():
        with _observed(decoder, prompt):
            tokens.append(int(np.argmax(decoder.next_logits())))
    while not finished():
        context = [*prompt, *tokens]
        with _observed(decoder, context[:-1]):
            drafts = build(tree, context[-1], propose(context, features()))
            accepted, next_token = walk(decoder, drafts, tree.parents, judge)
        before = len(tokens)
        for token in [*accepted, next_token]:
            if not finished():
                tokens.append(token)
        accepted_lengths.append(len(tokens) - before - 1)
    return Decoded(tokens, accepted_lengths)


def autoregressive(
    decoder: Decoder, prompt: Sequence[int], *, max_new_tokens: int, eos_token_ids: Collection[int] = ()
) -> Decoded:
    """Greedy decoding, one token after the other; the same bounds and errors as `generate`."""
    _check_prompt(decoder, prompt, max_new_tokens)
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        with _observed(decoder, [*prompt, *tokens]):
            tokens.append(int(np.argmax(decoder.next_logits())))
        if tokens[-1] in eos_token_ids:
            break
    return Decoded(tokens, [0] * (len(tokens) - 1))


def _check_prompt(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> None:
    if len(prompt) == 0:
        raise PromptError(
            "the prompt is empty; decoding needs at least one token to continue from (the BOS token will do)."
        )
    strays = [token for token in prompt if not 0 <= token < decoder.vocab_size]
    if strays:
        raise PromptError(f"the prompt holds {strays}; token ids are 0 to {decoder.vocab_size - 1} in this vocabulary.")
    if max_new_tokens < 0:
        raise PromptError(f"max_new_tokens is {max_new_tokens}; expected 0 or more.")
