"""The tokenizer that GGUF metadata describes (`tokenizer.ggml.*`), rebuilt with the `tokenizers` package."""

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from specjax.checks import is_whole
from specjax.errors import CheckpointError


def read(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]] | None:
    """The tokenizer, and the special tokens that a chat template may ask for by name; None where there is none.

    Raises:
      CheckpointError: a tokenizer model or pre-tokenizer that is not supported, or one of which parts are missing or do
        not fit one another.
    """
    kind, pre = metadata.get("tokenizer.ggml.model", "none"), metadata.get("tokenizer.ggml.pre")
    if kind == "none":
        return None
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"tokenizer.ggml.model is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece). "
            "Load the Hugging Face checkpoint of this model instead."
        )
    for part in ("tokens", "merges" if kind == "gpt2" else "scores"):
        if f"tokenizer.ggml.{part}" not in metadata:
            raise CheckpointError(f"the GGUF metadata lacks tokenizer.ggml.{part}, which tokenizer {kind!r} needs.")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    for part in ("token_type", *(["scores"] if kind == "llama" else [])):
        values = metadata.get(f"tokenizer.ggml.{part}", tokens)
        if not isinstance(values, Sequence) or len(values) != len(tokens):
            length = len(values) if isinstance(values, Sequence) else "no"
            raise CheckpointError(
                f"tokenizer.ggml.{part} has {length} entries ({reprlib.repr(values)}); expected {len(tokens)}, one "
                "for each of tokenizer.ggml.tokens. Convert the model again."
            )
    metadata = _without_padding(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    backend = _byte_level(metadata, pre) if kind == "gpt2" else _sentencepiece(metadata)
    types = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    for token, role in zip(tokens, types, strict=True):
        if role in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            backend.add_tokens([AddedToken(token, special=role != TokenType.USER_DEFINED, normalized=False)])
    special = {}
    for key in ("bos", "eos", "padding", "unknown"):
        if metadata.get(f"tokenizer.ggml.{key}_token_id") is not None:
            special[f"{key[:3]}_token"] = tokens[_special_id(metadata, key)]
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _LLAMA3)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [special["bos_token"]] if adds_bos and "bos_token" in special else []
    after = [special["eos_token"]] if adds_eos and "eos_token" in special else []
    if before or after:
        ids = [(token, tokens.index(token)) for token in dict.fromkeys(before + after)]
        backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
    return backend, special


PADDING = re.compile(r"\[PAD\d*\]|\[unused\d+\]|<\|?(reserved|extra|unused|dummy)[^<>]*>", re.IGNORECASE)


def _without_padding(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Without the rows at the end that a converter added so that their number is a round one: they are no tokens."""
    names = [f"tokenizer.ggml.{part}" for part in ("tokens", "token_type", "scores")]
    tokens, types = metadata[names[0]], metadata.get(names[1])
    special = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "unknown")]
    named = max([int(i) for i in special if i is not None and is_whole(i)], default=-1) + 1
    end = len(tokens)
    while end > named and (tokens[end - 1] == f"[PAD{end - 1}]" or (types and types[end - 1] == TokenType.UNUSED)):
        end -= 1
    return {**metadata, **{name: metadata[name][:end] for name in names if name in metadata}}


# Where words are cut before merging, by `tokenizer.ggml.pre`. GPT-2's own rule is built into `ByteLevel`.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# By the names that llama.cpp knows for tokenizers of the architectures that can be loaded; cut one after the other.
_LLAMA3, _QWEN2 = ("llama-bpe", "llama3", "llama-v3"), ("qwen2", "deepseek-r1-qwen")
_CUTS = {
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(_LLAMA3, (_LLAMA3_WORDS,)),
    **dict.fromkeys(_QWEN2, (_QWEN2_WORDS,)),
}


def _pre_tokenizer(pre: str | None) -> pre_tokenizers.PreTokenizer:
    if pre not in _CUTS:
        *others, last = sorted(map(repr, _CUTS))
        raise CheckpointError(
            f"tokenizer.ggml.pre is {pre!r}; supported are {', '.join(others)} and {last}. Load the Hugging Face "
            "checkpoint of this model instead."
        )
    splits = [pre_tokenizers.Split(Regex(words), "isolated") for words in _CUTS[pre]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _special_id(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    name, count = f"tokenizer.ggml.{key}_token_id", len(metadata["tokenizer.ggml.tokens"])
    token_id = metadata.get(name, default)
    if not is_whole(token_id) or not 0 <= token_id < count:
        raise CheckpointError(
            f"{name} is {token_id!r}; expected an id from 0 to {count - 1}, as tokenizer.ggml.tokens has {count} "
            "entries. Convert the model again."
        )
    return token_id


def _byte_level(metadata: Mapping[str, Any], pre: str | None) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = []
    for pair in metadata["tokenizer.ggml.merges"]:
        a, space, b = pair.partition(" ")
        if not (space and a in vocab and b in vocab and a + b in vocab):
            raise CheckpointError(
                f"tokenizer.ggml.merges has {pair!r}; expected two of tokenizer.ggml.tokens with a space between them, "
                "which together make a third. Convert the model again."
            )
        merges.append((a, b))
    # Llama 3 takes a word that is in the vocabulary whole, whatever the merges say.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3))
    if pre in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece BPE (Llama 1 and 2, Mistral): scores instead of merges, the best score merges first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, i in vocab.items():
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(-scores[i], vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab]
    unknown = tokens[_special_id(metadata, "unknown", 0)]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
