"""The shipped prompts, Spec-Bench files, and malformed ones."""

import collections
from pathlib import Path

import pytest

import specjax as sj
from specjax.corpus.prompts import load_prompts

SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_shipped_prompts_cover_the_categories():
    prompts = load_prompts()
    assert collections.Counter(p.category for p in prompts) == dict.fromkeys(
        ("chat", "code", "translation", "long_context", "math"), 10
    )
    assert len({p.turns for p in prompts}) == len({p.question_id for p in prompts}) == 50
    for prompt in prompts:
        words = len(prompt.turns[0].split())
        assert (words >= 130) == (prompt.category == "long_context")


@pytest.mark.parametrize(("name", "count"), [("mt_bench", 80), ("humaneval", 80), ("gsm8k", 77)])
def test_spec_bench_files_load(name, count):
    assert len(load_prompts(SHARED / f"{name}.jsonl")) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("{", "p.jsonl:1 is not JSON"),
        ("[1]", "p.jsonl:1 is list"),
        ('{"question_id": "a", "category": "c", "turns": ["x"]}', "question_id 'a'"),
        ('{"question_id": 1, "turns": ["x"]}', "category None"),
        ('{"question_id": 1, "category": "c", "turns": []}', "turns"),
        (
            '{"question_id": 1, "category": "c", "turns": ["ok"]}\n{"question_id": 2, "category": "c", "turns": [3]}',
            ":2",
        ),
    ],
)
def test_malformed_files_are_refused(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(sj.DataError, match=message):
        load_prompts(tmp_path / "p.jsonl")


def test_a_line_separator_inside_a_string_is_no_line_break(tmp_path):
    line = '{"question_id": 1, "category": "c", "turns": ["a\u2028b"]}'
    (tmp_path / "p.jsonl").write_text(line, "utf-8")
    assert load_prompts(tmp_path / "p.jsonl")[0].turns == ("a\u2028b",)


def test_missing_file():
    with pytest.raises(sj.DataError, match=r"nowhere\.jsonl"):
        load_prompts("nowhere.jsonl")
