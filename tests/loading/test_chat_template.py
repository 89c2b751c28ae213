"""Chat templates of strangers: what transformers gives them is there, and each ends in text or in a refusal."""

import json
import time

import pytest
import tokenizers
from gguf import TokenType

import specjax as sj
from specjax.loading.tokenizer import Tokenizer

USER = {"role": "user", "content": "<é>"}
BACKEND = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, "?"))


def render(template, messages=(USER,), **options):
    return Tokenizer(BACKEND, chat_template=template).render_chat(messages, **options)


def test_what_nobody_gave_is_none_as_in_transformers():
    for name in ("tools", "documents"):
        assert render(f"{{% if {name} is not none %}}{{{{ {name} }}}}{{% else %}}none{{% endif %}}") == "none"
        assert render(f"{{{{ {name} is defined }}}}") == "True"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert json.loads(render("{{ tools | tojson }}", tools=tools)) == tools


def test_messages_may_hold_more_than_a_text():
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    names = "{{ (m.tool_calls or []) | map(attribute='name') | join }}"
    template = "{% for m in messages %}{{ m.content or '' }}" + names + "{% endfor %}"
    assert render(template, [USER, called]) == "<é>f"
    assert render("{{ messages[1].reasoning_content }}", [USER, {**called, "reasoning_content": "hm"}]) == "hm"
    for content in ("\ufdd0", None):
        message = {"role": "assistant", "content": content, "tool_calls": [{"name": "\ufdd1"}]}
        with pytest.raises(sj.PromptError, match="noncharacter"):
            render(template, [USER, message])


FAILING = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages + 1 }}": "TypeError",
    "{{ messages[0].content + none }}": "TypeError",
    "{{ 'x' | xmlattr }}": "AttributeError",
    "{{ undefined_thing() }}": "'undefined_thing' is undefined",
    "{% include 'other.jinja' %}": "includes another file",
    "{% import 'other.jinja' as other %}": "includes another file",
    "{% extends 'other.jinja' %}": "includes another file",
    "{{ 'a' | no_such_filter }}": "no_such_filter",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "RecursionError",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
    "{{ ''.__class__.__mro__ }}": "unsafe|access to attribute",
    "{{ x }}" * 50_000: "at most 200000 are read",
    # Without an end.
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "loop without an end",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}": "loop without an end",
    "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(99) }}": "loop without an end",
    "{% set x %}{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}": "too much text",
    # Too large.
    "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "too much text",
    "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}": "too much text",
    "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}": "too much text",
    "{{ 'x' * 10**10 }}": "multiplies",
    "{{ [0] * 10**10 }}": "multiplies",
    "{{ 9 ** 9 ** 9 ** 9 }}": "beyond what a prompt needs",
    "{{ 'x' | center(10000000000) }}": "multiplies",
    "{{ 'x'.ljust(10000000000) }}": "multiplies",
    "{{ '%10000000000d' % 1 }}": "multiplies",
    "{{ '%10000000000s' | format('a') }}": "multiplies",
    "{{ '{:>10000000000}'.format(1) }}": "multiplies",
    "{{ '{:>{}}'.format(1, 10000000000) }}": "multiplies",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}": "multiplies",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}": "multiplies",
    "{{ (['x' * 1000000] * 1000000) | join }}": "multiplies",
    "{{ ('x\n' * 100000) | indent(1000000) }}": "multiplies",
    "{{ {'a': 1} | tojson(indent=10000000000) }}": "multiplies",
    "{{ range(1000000000) | list }}": "Range too big",
}


@pytest.mark.parametrize("template", FAILING, ids=lambda template: template[:60])
def test_a_template_ends_in_a_refusal(template):
    begin = time.process_time()
    with pytest.raises(sj.PromptError, match=FAILING[template]):
        render(template)
    assert time.process_time() - begin < 2


def test_a_long_chat_is_within_the_budget():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim | replace('\n', '\n\n') }}{% endfor %}"
    messages = [{"role": "user", "content": "word\n" * 1000}, {"role": "assistant", "content": "yes" * 1000}] * 200
    text = render(template, messages)
    assert len(text) > 200 * (len("word\n\n" * 999) + 3000)


@pytest.mark.parametrize("wrong", [3, {"a": 1}, ["x"], [{"name": "default", "template": 3}]])
def test_a_template_of_a_wrong_type_is_refused(tmp_path, wrong):
    BACKEND.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": wrong}))
    with pytest.raises(sj.CheckpointError, match=r"chat_template is .*; expected a text"):
        Tokenizer.from_hf(tmp_path, ())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.token_type": [TokenType.NORMAL],
        "tokenizer.chat_template": wrong,
    }
    with pytest.raises(sj.CheckpointError, match=r"chat_template is .*; expected a text"):
        Tokenizer.from_gguf(metadata, ())


def test_a_template_in_another_encoding_is_refused(tmp_path):
    BACKEND.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes("é".encode("utf-16"))
    with pytest.raises(sj.CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.from_hf(tmp_path, ())
