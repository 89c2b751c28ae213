"""Tokenizers rebuilt from GGUF metadata and from Hugging Face files; chat templates in the sandbox.

tests/parity holds the comparisons with transformers' tokenizers.
"""

import dataclasses
import json
from datetime import date

import pytest
import tokenizers
from conftest import TEMPLATE, tiny_model
from gguf import TokenType
from tokenizers import models, pre_tokenizers, processors

import specjax as sj
from specjax.errors import CheckpointError, ConfigError, PromptError
from specjax.loading.gguf_tokenizer import _pre_tokenizer
from specjax.loading.load import load_model
from specjax.loading.tokenizer import Tokenizer
from specjax.target.families import config_from_gguf

USER = {"role": "user", "content": "x"}
CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"


def _byte_level(pre="gpt-2", **more):
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b", "Ġ", "ab", "aba", "<s>", "</s>", "<tool>", "c"],
        "tokenizer.ggml.token_type": [TokenType.NORMAL] * 5 + [TokenType.CONTROL] * 2
        + [TokenType.USER_DEFINED, TokenType.NORMAL],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 6,
    } | {f"tokenizer.{key}": value for key, value in more.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "IT|'|S|Ġ1234|Ġ|Ġx|'s|ĊĊ|Ġy"),
        ("default", "IT|'|S|Ġ|123|4|Ġ|Ġx|'|s|ĊĊ|Ġy"),  # llama.cpp's own, not GPT-2's
        ("smollm", "IT|'|S|Ġ|1|2|3|4|Ġ|Ġx|'s|ĊĊ|Ġy"),
        ("qwen2", "IT|'S|Ġ|1|2|3|4|Ġ|Ġx|'s|ĊĊ|Ġy"),
        ("deepseek-r1-qwen", "IT|'S|Ġ|1|2|3|4|Ġ|Ġx|'s|ĊĊ|Ġy"),
        ("llama-bpe", "IT|'S|Ġ|123|4|Ġ|Ġx|'s|ĊĊ|Ġy"),
        ("llama3", "IT|'S|Ġ|123|4|Ġ|Ġx|'s|ĊĊ|Ġy"),
        ("llama-v3", "IT|'S|Ġ|123|4|Ġ|Ġx|'s|ĊĊ|Ġy"),
    ],
)
def test_words_are_cut_as_the_model_was_trained(pre, words):
    cut = _pre_tokenizer(pre).pre_tokenize_str("IT'S 1234  x's\n\n y")
    assert [word for word, _ in cut] == words.split("|")


def test_byte_level_bpe():
    tokenizer = Tokenizer.from_gguf(_byte_level(), (6,))
    ids = tokenizer.encode("abab a</s><tool>")
    assert ids == [3, 3, 2, 0, 6, 7]
    assert tokenizer.decode(ids) == "abab a<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "abab a</s><tool>"
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (9, (6,))


def test_llama3_takes_whole_words_and_adds_the_bos():
    assert Tokenizer.from_gguf(_byte_level(), ()).encode("aba") == [3, 0]
    for name in ("llama-bpe", "llama3", "llama-v3"):
        assert Tokenizer.from_gguf(_byte_level(name), ()).encode("aba") == [5, 4]


def test_the_bos_is_never_added_twice():
    metadata = _byte_level(**{"ggml.add_bos_token": True, "chat_template": "{{ bos_token }}{{ messages[0].content }}"})
    tokenizer = Tokenizer.from_gguf(metadata, ())
    assert tokenizer.encode("ab") == [5, 3]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [5, 3]


SPIECE = {
    "<unk>": (TokenType.UNKNOWN, 0), "<s>": (TokenType.CONTROL, 0), "</s>": (TokenType.CONTROL, 0),
    "<0xC3>": (TokenType.BYTE, 0), "<0xA9>": (TokenType.BYTE, 0), "ab": (TokenType.NORMAL, -1),
    "bc": (TokenType.NORMAL, 0), "▁a": (TokenType.NORMAL, -2), "▁": (TokenType.NORMAL, -3),
    "a": (TokenType.NORMAL, -4), "b": (TokenType.NORMAL, -5), "c": (TokenType.NORMAL, -6),
}  # fmt: skip


def _sentencepiece(**more):
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(SPIECE),
        "tokenizer.ggml.scores": [score for _, score in SPIECE.values()],
        "tokenizer.ggml.token_type": [kind for kind, _ in SPIECE.values()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes():
    tokenizer = Tokenizer.from_gguf(_sentencepiece(), (2,))

    def pieces(text):
        return [list(SPIECE)[i] for i in tokenizer.encode(text)]

    # "bc" has the best score, so "ab" loses its b although it comes first.
    assert pieces("abc ab") == ["<s>", "▁a", "bc", "▁", "ab"]
    assert pieces("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert pieces("a</s>a") == ["<s>", "▁a", "</s>", "▁a"]
    for text in ("abc ab", "é a", " a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert Tokenizer.from_gguf(_sentencepiece(add_bos_token=False, add_space_prefix=False), ()).encode("bc") == [6]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (_byte_level("tekken"), r"tokenizer\.ggml\.pre is 'tekken'"),
        (_byte_level(None), r"tokenizer\.ggml\.pre is None"),
        (_byte_level() | {"tokenizer.ggml.model": "t5"}, "'t5'; supported are"),
        ({k: v for k, v in _byte_level().items() if not k.endswith("merges")}, "lacks tokenizer.ggml.merges"),
        ({k: v for k, v in _sentencepiece().items() if not k.endswith("scores")}, "lacks tokenizer.ggml.scores"),
        (_byte_level(**{"ggml.bos_token_id": 9}), r"ggml\.bos_token_id is 9; expected an id from 0 to 8"),
        (_byte_level(**{"ggml.eos_token_id": -1}), r"ggml\.eos_token_id is -1"),
        (_byte_level(**{"ggml.padding_token_id": 2**32 - 1}), r"ggml\.padding_token_id is 4294967295"),
        (_byte_level(**{"ggml.unknown_token_id": "<s>"}), r"ggml\.unknown_token_id is '<s>'"),
        (_sentencepiece(unknown_token_id=12), r"ggml\.unknown_token_id is 12; expected an id from 0 to 11"),
        (_sentencepiece(bos_token_id=[1]), r"ggml\.bos_token_id is \[1\]"),
        (_sentencepiece(tokens=[], scores=[], token_type=[]), r"ggml\.unknown_token_id is 0"),
        (_byte_level(**{"ggml.merges": ["a b", "ab"]}), r"ggml\.merges has 'ab'"),
        (_byte_level(**{"ggml.merges": ["a zz"]}), r"ggml\.merges has 'a zz'"),
        (_byte_level(**{"ggml.merges": ["zz a"]}), r"ggml\.merges has 'zz a'"),
        (_byte_level(**{"ggml.merges": ["b a"]}), r"ggml\.merges has 'b a'"),  # both known, but not "ba"
        (_byte_level(**{"ggml.token_type": [1] * 8}), r"ggml\.token_type has 8 entries .*expected 9"),
        (_byte_level(**{"ggml.token_type": 1}), r"ggml\.token_type has no entries \(1\)"),
        (_sentencepiece(token_type=[1] * 13), r"ggml\.token_type has 13 entries .*expected 12"),
        (_sentencepiece(scores=[0.0] * 11), r"ggml\.scores has 11 entries .*expected 12"),
    ],
)
def test_unsupported_metadata(metadata, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(metadata, ())


def test_no_tokenizer_at_all(tmp_path):
    assert Tokenizer.from_gguf({}, ()) is None
    assert Tokenizer.from_hf(tmp_path, ()) is None


@pytest.fixture
def hf_directory(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "hi": 2, "you": 3, "user": 4, "?": 5}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_hf_files(hf_directory):
    tokenizer = Tokenizer.from_hf(hf_directory, (1,))
    assert tokenizer.encode("hi you hi") == [0, 2, 3, 2]  # neither truncated nor padded
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == [0, 4, 2, 1]
    named = [{"name": "tool_use", "template": "you"}, {"name": "default", "template": "{{ eos_token }}"}]
    (hf_directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": named}))
    assert Tokenizer.from_hf(hf_directory, ()).render_chat([USER]) == "</s>"
    (hf_directory / "chat_template.jinja").write_text("you")  # the file wins
    assert Tokenizer.from_hf(hf_directory, ()).render_chat([USER]) == "you"


def test_damaged_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_hf(tmp_path, ())


def _render(template, messages=({"role": "user", "content": "<é>"},), **options):
    backend = tokenizers.Tokenizer(models.WordLevel({"?": 0}, "?"))
    return Tokenizer(backend, chat_template=template).render_chat(messages, **options)


def test_templates_speak_transformers_dialect():
    assert _render("{% if true %}\n  {% for m in messages %}\n{{ m.role }}\n    {% endfor %}\n{% endif %}") == "user\n"
    assert _render("{{ messages | tojson }}") == '[{"role": "user", "content": "<é>"}]'
    assert _render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert _render("{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}") == "4True"
    assert _render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"


def test_a_dated_tokenizer_has_a_day_of_its_own():
    backend = tokenizers.Tokenizer(models.WordLevel({"?": 0}, "?"))
    one = Tokenizer(
        backend, chat_template="{{ strftime_now('%d %b %Y') }} {{ bos_token }}", special_tokens={"bos_token": "<s>"}
    )
    messages = [{"role": "user", "content": "hi"}]
    assert one.dated(date(2024, 7, 26)).render_chat(messages) == "26 Jul 2024 <s>"
    assert one.render_chat(messages) != "26 Jul 2024 <s>"
    assert one.writes_the_date
    assert not Tokenizer(backend, chat_template=TEMPLATE).writes_the_date


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [USER], "no chat template"),
        ("x", [], "messages is .*at least one"),
        ("{{ raise_exception('no system role') }}", [USER], "no system role"),
        ("{% if %}", [USER], "refuses"),
        ("{{ messages.__class__.__mro__ }}", [USER], "unsafe"),
    ],
)
def test_chats_that_cannot_be_rendered(template, messages, message):
    with pytest.raises(PromptError, match=message):
        _render(template, messages)


def test_smollm2_keeps_spaces_before_digits_together():
    tokenizer = load_model("smollm2-135m-instruct").tokenizer
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a  12")] == ["a", "  ", "1", "2"]
    prompt = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_ids == (tokenizer.backend.token_to_id("<|im_end|>"),)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_settings_are_refused(tmp_path, content):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json.*download complete"):
        Tokenizer.from_hf(tmp_path, ())


def _chat_gguf(eos, **more):
    """A chat model's: what ends a text, a message and a turn, and a word that is unknown."""
    tokens = ["a", "b", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eom_id|>", "<|other|>", "Ċ"]
    kinds = [TokenType.NORMAL] * 2 + [TokenType.CONTROL] * 5 + [TokenType.NORMAL]
    return {
        "general.architecture": "llama", "llama.vocab_size": len(tokens), "llama.embedding_length": 32,
        "llama.feed_forward_length": 48, "llama.block_count": 2, "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": [], "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.chat_template": IM,
    } | {f"tokenizer.{key}": value for key, value in more.items()}  # fmt: skip


IM = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"


def test_gguf_models_stop_where_their_hugging_face_files_do():
    """At what the metadata name, and at the control tokens that are known to end something, in a chat model alone."""
    assert set(config_from_gguf(_chat_gguf(2), tied=True).eos_token_ids) == {2, 4, 5}
    assert config_from_gguf(_chat_gguf(4), tied=True).eos_token_ids[0] == 4
    named = {"ggml.eot_token_id": 4, "ggml.eom_token_id": 5, "chat_template": None}
    assert config_from_gguf(_chat_gguf(2, **named), tied=True).eos_token_ids == (2, 4, 5)
    assert config_from_gguf(_chat_gguf(2, chat_template=None), tied=True).eos_token_ids == (2,)
    # SmolLM2's <|endoftext|> is its unknown word, and its Hugging Face files do not stop there.
    assert set(config_from_gguf(_chat_gguf(4, **{"ggml.unknown_token_id": 2}), tied=True).eos_token_ids) == {4, 5}
    with pytest.raises(ConfigError, match="eos_token_ids has 8; expected ids from 0 to 7"):
        config_from_gguf(_chat_gguf(8), tied=True)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (IM, 4),
        (IM.replace("<|im_end|>", "<|other|>"), 6),  # a name that nobody knows
        (IM.replace("<|im_end|>", " <|other|>"), 6),
        (IM.replace("<|im_end|>", "b"), None),
        ("{{ raise_exception('only one turn') }}", None),
        (None, None),
    ],
)
def test_what_a_template_ends_a_turn_with(template, end):
    assert Tokenizer.from_gguf(_chat_gguf(2, chat_template=template), ()).turn_end() == end


def test_rows_that_a_converter_added_are_no_tokens():
    metadata = _byte_level()
    more = metadata | {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], "x", "[PAD10]", "[PAD11]"],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], TokenType.UNUSED, 1, 1],
    }
    padded, plain = (Tokenizer.from_gguf(one, ()) for one in (more, metadata))
    assert padded.backend.get_vocab() == plain.backend.get_vocab()
    assert padded.vocab_size == 9
    # Where the metadata call one by name it stays, with all before it.
    assert Tokenizer.from_gguf(more | {"tokenizer.ggml.padding_token_id": 10}, ()).vocab_size == 11
    # What stands among tokens is one.
    among = more | {"tokenizer.ggml.token_type": [TokenType.UNUSED] * 9 + [TokenType.NORMAL] * 3}
    assert Tokenizer.from_gguf(among, ()).vocab_size == 10


def test_models_that_differ_in_padding_draft_for_each_other(tmp_path):
    metadata = _byte_level()
    tokens = metadata["tokenizer.ggml.tokens"] + [f"t{n}" for n in range(260 - 9)]
    types = metadata["tokenizer.ggml.token_type"] + [TokenType.NORMAL] * (260 - 9)

    def padded(size, role, name="[PAD{}]"):
        """As converters fill up the rows, so that their number is a round one."""
        names = {"tokenizer.ggml.tokens": tokens + [name.format(n) for n in range(260, size)]}
        return metadata | names | {"tokenizer.ggml.token_type": types + [role] * (size - 260)}

    Tokenizer.from_gguf(padded(260, 1), ()).save(tmp_path)
    sides = {
        "GGUF": Tokenizer.from_gguf(padded(272, TokenType.UNUSED), ()),
        "more": Tokenizer.from_gguf(padded(288, TokenType.NORMAL), ()),
        "reserved": Tokenizer.from_gguf(padded(288, TokenType.CONTROL, "<|reserved_special_token_{}|>"), ()),
        "directory": Tokenizer.from_hf(tmp_path, ()),
    }
    sizes = {"GGUF": 272, "more": 288, "reserved": 288, "directory": 264}
    models = {name: dataclasses.replace(tiny_model(vocab=sizes[name]), tokenizer=one) for name, one in sides.items()}
    for draft in models.values():
        for target in models.values():
            sj.DraftModelDrafter(draft, sj.Tree.chain(2)).check(target)
    tokens[20] = "other"
    other = dataclasses.replace(models["more"], tokenizer=Tokenizer.from_gguf(padded(288, TokenType.UNUSED), ()))
    with pytest.raises(sj.ConfigError, match=r"2 entries differ, the first is token '(other|t11)' with id 20"):
        sj.DraftModelDrafter(other, sj.Tree.chain(2)).check(models["GGUF"])


SIDE = {
    "added_tokens.json": {"<|im_start|>": 6, "<|im_end|>": 7},
    "special_tokens_map.json": {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "additional_special_tokens": ["<|im_start|>", {"content": "hi"}],
    },
}
DECODER = {"6": {"content": "<|im_start|>", "special": True}, "7": {"content": "<|im_end|>", "special": True}}


def _beside(directory, files):
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return Tokenizer.from_hf(directory, ())


@pytest.mark.parametrize(
    "files",
    [
        SIDE,
        {"tokenizer_config.json": {"added_tokens_decoder": DECODER, "bos_token": "<|im_start|>",
                                   "eos_token": "<|im_end|>", "extra_special_tokens": {"greeting": "hi"}}},
        {"added_tokens.json": SIDE["added_tokens.json"], "special_tokens_map.json": SIDE["special_tokens_map.json"],
         "tokenizer_config.json": {"bos_token": None, "additional_special_tokens": ["hi"]}},
    ],
)  # fmt: skip
def test_tokens_that_only_files_beside_name(hf_directory, files):
    (hf_directory / "tokenizer_config.json").unlink()
    tokenizer = _beside(hf_directory, files)
    assert tokenizer.encode("you<|im_start|>hi<|im_end|>")[1:] == [3, 6, 2, 7]
    assert {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}.items() <= tokenizer.special_tokens.items()
    assert tokenizer.decode([3, 6, 2, 7]) == "you"
    assert {"<|im_start|>": 6, "<|im_end|>": 7, "hi": 2}.items() <= tokenizer.special_ids.items()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "you"}]) == [6, 3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": {"you": 6}}, r"contradict each other: they give 'you' the id 6.*'you' at 3"),
        ({"added_tokens.json": {"<new>": 3}}, r"give '<new>' the id 3, and tokenizer.json has 'you' there"),
        ({"added_tokens.json": {"<new>": 9}}, "ids between are missing"),
        ({"added_tokens.json": {"<new>": "6"}}, "the id '6'; expected a whole number"),
        ({"added_tokens.json": ["<new>"]}, "is not a JSON object"),
        ({"special_tokens_map.json": {"bos_token": 3}}, r"special_tokens_map\.json has bos_token 3; expected a text"),
        ({"special_tokens_map.json": {"bos_token": {"text": "x"}}}, "expected a text, or an object with its content"),
        ({"special_tokens_map.json": {"additional_special_tokens": [3]}}, "additional_special_tokens 3"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<new>"}}}},
            "expected an id with a token",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"6": {}}}}, "added_tokens_decoder 6 {}; expected a text"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "expected an object"),
        ({"tokenizer_config.json": {"eos_token": ["</s>"]}}, r"eos_token \['</s>'\]"),
    ],
)
def test_files_that_contradict_each_other(hf_directory, files, message):
    with pytest.raises(CheckpointError, match=message):
        _beside(hf_directory, files)


def test_a_token_of_spaces_is_learned():
    """Post-processors may trim spaces off the offsets."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "Ġ": 1, "b": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<end>"])
    for marked in ("{{ m.content }}<end>", "{% generation %}{{ m.content }}<end>{% endgeneration %}"):
        template = "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}{% else %}" + marked
        tokenizer = Tokenizer(backend, chat_template=template + "{% endif %}{% endfor %}", eos_token_ids=(4,))
        ids, said = tokenizer.encode_chat(
            [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a  b  "}]
        )
        assert ids == [3, 2, 0, 1, 1, 2, 1, 1, 4]
        assert said == [False] * 2 + [True] * 7
