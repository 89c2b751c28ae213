"""The n-gram drafter beside transformers' prompt lookup, end to end on a tiny checkpoint."""

import json

import pytest
from rich.console import Console

import specjax as sj
from specjax.studies.prompt_lookup import PromptLookup
from specjax.studies.runner import run_config


@pytest.mark.full
def test_both_sides_say_the_same_in_fewer_forwards(checkpoint, tmp_path):
    settings = {"name": "tiny", "model": str(checkpoint), "category": "chat", "max_new_tokens": 40}
    assert run_config(PromptLookup(**settings, prompts=3, drafts=(4, 2)), tmp_path, Console(quiet=True)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(row["side"], row["drafts"]) for row in result["rows"]] == [
        (side, drafts) for side in ("ngram", "transformers") for drafts in (0, 4, 2)
    ]
    for row in result["rows"]:
        assert row["same_text"] == row["prompts"] == 3
        assert row["tokens_per_forward"] >= 1 if row["drafts"] else row["tokens_per_forward"] == 1
        assert row["accepted_per_forward"] == row["tokens_per_forward"] - 1
    ours, theirs = result["chosen_on_the_other_prompts"]
    assert (ours["side"], theirs["side"]) == ("ngram", "transformers")
    assert ours["prompts"] == theirs["prompts"] == 1
    assert {ours["drafts"], theirs["drafts"]} <= {4, 2}


def test_one_prompt_cannot_choose_and_compare(checkpoint, tmp_path):
    with pytest.raises(sj.ConfigError, match="1 prompts of 'chat'"):
        PromptLookup("tiny", str(checkpoint), category="chat", prompts=1).run(tmp_path, Console(quiet=True))
