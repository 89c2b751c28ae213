"""Logits, hidden states and greedy text against transformers, float32 on both sides."""

import dataclasses
import functools
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from specjax.errors import ConfigError
from specjax.loading.hf import save_hf
from specjax.loading.load import _packaged, load_model
from specjax.loading.tokenizer import Tokenizer
from specjax.ops.plain import rms_norm
from specjax.target import cache as kv
from specjax.target.config import ModelConfig, RopeScaling
from specjax.target.families import config_from_hf
from specjax.target.model import forward, rope_frequencies, unembed
from specjax.target.params import init

TOLERANCE = 1e-4
LENGTH = 24  # tokens in a test sequence: more than the sliding windows below
# A tree that branches at three depths and has leaves at all of them, parents before children.
PARENTS = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 9)

SHAPE = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 1000.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0}


def _llama(**more):
    return transformers.LlamaConfig(**SHAPE | more)


def _qwen2(**more):
    return transformers.Qwen2Config(**SHAPE | more)


CASES = {
    "qwen2-tied": _qwen2(tie_word_embeddings=True),
    "qwen2-untied": _qwen2(tie_word_embeddings=False),
    "qwen2-window": _qwen2(use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "llama": _llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-3),
    "llama-tied": _llama(tie_word_embeddings=True, head_dim=10),
    "llama-llama3": _llama(rope_parameters=LLAMA3),
    "llama-linear": _llama(rope_parameters=LINEAR),
    "mistral-window": transformers.MistralConfig(**SHAPE, sliding_window=7),
    "qwen2-all-sliding": _qwen2(  # layer_types win over max_window_layers, whose default is beyond the last layer
        use_sliding_window=True, sliding_window=7, layer_types=["sliding_attention"] * SHAPE["num_hidden_layers"]
    ),
    "qwen2-all-full": _qwen2(
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=0,
        layer_types=["full_attention"] * SHAPE["num_hidden_layers"],
    ),
}


@functools.cache
def _pair(name, tmp):
    """(transformers' model, ours), the latter loaded from what the former saved; every second case in shards."""
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(CASES[name], attn_implementation="eager").float()
    with torch.no_grad():
        # Biases and norms too: transformers starts them at 0 and 1. With a deviation of 0.3 the residual stream reaches
        # 30, and transformers' own float32 is 1.1e-4 from its float64 there: more than the tolerance.
        for key, p in theirs.named_parameters():
            p.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.2)
    directory = tmp / name
    theirs.save_pretrained(directory, max_shard_size="60KB" if list(CASES).index(name) % 2 else "5GB")
    return theirs.eval(), load_model(directory)


@pytest.fixture(params=CASES)
def pair(request, tmp_path_factory):
    return _pair(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2-135m-instruct")


TOKENS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], LENGTH)


def _theirs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))[None], output_hidden_states=True)


def _logits(model, tokens):
    return _theirs(model, tokens).logits[0].numpy()


@functools.partial(jax.jit, static_argnames="config")
def _ours(params, config, tokens, cache=None, positions=None, mask=None):
    out = forward(params, config, tokens, cache=cache, positions=positions, mask=mask)
    return unembed(params, out.features), out.rows


def _close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=TOLERANCE, rtol=0)


def test_the_cases_cover_single_files_and_shards(tmp_path_factory):
    for name, sharded in (("qwen2-tied", False), ("qwen2-untied", True)):
        _pair(name, tmp_path_factory.getbasetemp())
        files = list((tmp_path_factory.getbasetemp() / name).glob("*.safetensors"))
        assert (len(files) > 2) == sharded


def test_prefill(pair):
    theirs, model = pair
    logits, _ = _ours(model.params, model.config, TOKENS)
    assert np.ptp(logits) > 1  # not a trivial comparison
    _close(logits, _logits(theirs, TOKENS))


@pytest.mark.full
def test_layer_by_layer(pair):
    theirs, model = pair
    config, states = model.config, _theirs(theirs, TOKENS).hidden_states
    out = forward(model.params, config, jnp.asarray(TOKENS), taps=tuple(range(config.num_layers)))
    for ours, expected in zip(out.taps[:-1], states[1:-1], strict=True):
        _close(ours, expected[0].numpy())
    # transformers gives the last layer's state after the final norm only
    _close(rms_norm(out.taps[-1], model.params.final_norm, config.rms_norm_eps), states[-1][0].numpy())
    _close(out.features, states[-1][0].numpy())


@pytest.mark.full
def test_cached_step_by_step(pair):
    theirs, model = pair
    cache, steps = kv.zeros(model.config, LENGTH), []
    for token in TOKENS:
        logits, rows = _ours(model.params, model.config, token[None], cache)
        cache = kv.write(cache, rows, 1)
        steps.append(logits[0])
    _close(np.stack(steps), _logits(theirs, TOKENS))


@pytest.mark.full
def test_every_node_of_a_tree(pair):
    theirs, model = pair
    prefix, nodes = TOKENS[:10], TOKENS[10 : 10 + len(PARENTS)]
    paths = []
    for node, parent in enumerate(PARENTS):
        paths.append([*(paths[parent] if node else []), node])
    depths = np.array([len(path) - 1 for path in paths], np.int32)
    mask = np.zeros((len(PARENTS),) * 2, bool)
    for node, path in enumerate(paths):
        mask[node, path] = True
    cache = kv.zeros(model.config, 16)
    cache = kv.write(cache, _ours(model.params, model.config, prefix)[1], len(prefix))
    logits, _ = _ours(model.params, model.config, nodes, cache, len(prefix) + depths, mask)
    for node, path in enumerate(paths):
        _close(logits[node], _logits(theirs, [*prefix, *nodes[path]])[-1])


SAVED = ModelConfig("llama", 67, 32, 48, 2, 4, 2, 8, max_positions=64, eos_token_ids=(3, 5), bos_token_id=1)


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 6, "rope_theta": 5e5},
        {"rope_scaling": RopeScaling("llama3", 4.0, 1.0, 4.0, 32)},
        {"rope_scaling": RopeScaling("linear", 3.0)},
        {"sliding_window": 5},
        {"family": "qwen2", "qkv_bias": True},
        {"family": "qwen2", "qkv_bias": True, "sliding_window": 5},
    ],
    ids=lambda change: "-".join(map(str, change)) or "plain",
)
def test_what_we_save_transformers_loads(change, tmp_path):
    config = dataclasses.replace(SAVED, **change)
    params = init(jax.random.key(0), config, stddev=0.3)
    save_hf(tmp_path, params, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == ([3, 5], 1)
    _close(_ours(params, config, TOKENS % 67)[0], _logits(theirs, TOKENS % 67))


TEXTS = (
    "Hello, world! It's a fine day; I'll take 2 of them.",
    "def f(x: int) -> int:\n\treturn x**2 + 10  # 3.14159\n\n\nprint(f(12))",
    "2024-01-31 costs $1,234.50",
    "naïve café — “quotes” 日本語 한국어 العربية 🙂👨‍👩‍👧 e\u0301 Å",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>tail <|im_start",
    "  leading, trailing and    inner spaces\t\ttabs   \n \n",
    "\x00\x7f\r\nĀ\u200b",
    "",
)


@pytest.mark.full
def test_smollm2_tokenizer(smollm2):
    # transformers ignores `tokenizer.ggml.pre`, so it would merge spaces before a digit as GPT-2 does; no text here has
    # several of them. tests/loading/test_tokenizer.py holds that case.
    path, ours = _packaged("smollm2-135m-instruct"), smollm2.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi! "},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "1 + 1?\n"}]  # fmt: skip
    for messages in (chat, chat[1:2]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected


@pytest.mark.full
def test_qwen2_tokenizer_from_gguf_and_from_hf(tmp_path):
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])
    theirs.chat_template = "{% for m in messages %}{{ m.role }}: {{ m | tojson }}{{ eos_token }}\n{% endfor %}"
    theirs.save_pretrained(tmp_path)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": sorted(vocab, key=lambda token: vocab[token]),
        "tokenizer.ggml.token_type": [gguf.TokenType.NORMAL] * (len(vocab) - 1) + [gguf.TokenType.CONTROL],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": vocab["<|endoftext|>"],
        "tokenizer.chat_template": theirs.chat_template,
    }
    messages = [{"role": "user", "content": "<é> & 'x'"}]
    expected = theirs.apply_chat_template(messages, return_dict=False)
    for ours in (Tokenizer.from_gguf(metadata, ()), Tokenizer.from_hf(tmp_path, ())):
        assert ours.vocab_size == len(vocab)
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text), text
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
        assert ours.apply_chat_template(messages) == expected


THETAS = {"nowhere": {}, "beside": {"rope_theta": 3000.0}}
ROPES = {
    "none": {},
    "scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "scaling-with-theta": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 70.0}},
    "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "parameters-without-theta": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "parameters-without-type": {"rope_parameters": {"rope_theta": 5e5}},
    "llama3": {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    "llama3-without-length": {"rope_parameters": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
    "llama3-with-length-beside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    "both": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
    "both-one-empty": {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "both-types": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "partial": {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    "by-layer-type": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}},
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("rope", ROPES)
def test_every_spelling_of_rope_is_read_as_transformers_does_or_refused(kind, theta, rope):
    """From the JSON that a checkpoint has. What transformers itself cannot compute may be either."""
    raw = {"model_type": kind, **SHAPE, **THETAS[theta], **ROPES[rope]}
    try:
        config = config_from_hf(json.loads(json.dumps(raw)))
    except ConfigError:
        assert rope in ("dynamic", "partial") or (rope, kind) in (
            ("by-layer-type", "llama"),
            ("by-layer-type", "mistral"),
        )
        return
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    module = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[kind]
    rotary = getattr(getattr(transformers.models, kind), f"modeling_{kind}")
    try:
        frequencies = getattr(rotary, f"{module}RotaryEmbedding")(theirs).inv_freq.numpy()
    except KeyError:
        assert rope == "by-layer-type"
        assert config.rope_theta == 5e5
        return
    np.testing.assert_allclose(rope_frequencies(config), frequencies, rtol=1e-6)


@pytest.mark.full
def test_generation_config_ends_the_answer(tmp_path):
    config = _llama(eos_token_id=7)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(tmp_path).config.eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(tmp_path).config.eos_token_ids == (7, 9)


def _backend(kind, trimmed):
    """Byte-level, or falling back to bytes, with a few merges and two markers."""
    if kind == "bytes":
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {c: i for i, c in enumerate([*alphabet, "ĠĠ", "ab", "Ġa"])}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("Ġ", "Ġ"), ("a", "b"), ("Ġ", "a")]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "words")
        backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trimmed)
        backend.decoder = tokenizers.decoders.ByteLevel()
    else:
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁▁", "▁▁▁▁"]
        merges = [("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁")]
        vocab = {token: i for i, token in enumerate(pieces)}
        model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        backend.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        )
    backend.add_special_tokens(["<s>", "<end>"])
    return backend


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
@pytest.mark.parametrize("seed", range(20))
def test_the_loss_mask_is_transformers(kind, seed):
    """Over templates and chats made at random, spaces in any number among them.

    Turns end in a letter: of a last character of several tokens transformers marks the first one alone.
    """
    rng = np.random.default_rng(seed)

    def text(least=0):
        return "".join(rng.choice(["a", "b", " ", "  ", "\n", "é", "🙂", "ab a"], rng.integers(least, 8)))

    # Not `before` a space alone, where a token would be half the assistant's.
    opening, inside, after = (
        rng.choice(["<s>", "b", "<s>\n"]),
        rng.choice(["", "<end>", "<end>\n"]),
        rng.choice(["", "<s>"]),
    )
    turn = "{% generation %}{{ m.content }}" + inside + "{% endgeneration %}" + after
    template = (
        "{% for m in messages %}" + opening + "{% if m.role == 'assistant' %}" + turn
        + "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    )  # fmt: skip
    chat = [
        {"role": role, "content": text(1) if role == "user" else f"a{text()}b"}
        for _ in range(rng.integers(1, 4))
        for role in ("user", "assistant")
    ]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=_backend(kind, False), chat_template=template)
    told = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    for trimmed in (False, True):
        ours = Tokenizer(_backend(kind, trimmed), chat_template=template)
        ids, said = ours.encode_chat(chat)
        assert ids == told["input_ids"]
        assert list(map(int, said)) == told["assistant_masks"]
