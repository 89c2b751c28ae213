"""The README is short, and every command in it works: on a tiny model, word for word but for sizes and names.

Its Python runs on the real model in tests/real/test_smollm2.py, its training in test_train_packed_medusa.py.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

import specjax as sj
from specjax.cli.main import main
from specjax.report.records import Record, spread

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
SMALL = {
    "measure": ["--max-new-tokens", "16"],
    "bench": ["--sizes", "1", "2", "4"],
    "simulate": [],
    "generate": ["--max-new-tokens", "8"],
}


def test_it_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_the_commands_come_first():
    first = README.split("```")[1]
    assert "make demo" in first
    assert "make test" in first
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README)) <= set(targets)


def test_what_it_links_to_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:tests|experiments|notebooks|docs)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path


def test_its_figures_are_those_of_the_records():
    """Every row is of the record that it links to, and says the machine that it was made on."""
    rows = [row.split(" | ") for row in README.splitlines() if row.startswith("| [")]
    assert len(rows) == 6
    for place, drafts, dtype, rounds, speedup, faster, same in rows:
        label, link = re.match(r"\| \[(.*)\]\((.*)\)$", place).groups()
        record = Record(Path(link).stem, json.loads((ROOT / link).read_text()))
        assert record.machine in {
            f"AMD EPYC {label}",
            f"Intel {label}",
            f"AMD EPYC {label.removesuffix(', earlier heads')}",
        }
        assert ("first-heads" in record.name) == label.endswith(", earlier heads")
        assert record.result["prompts"] == 10
        name, nodes = drafts.split(", ")
        key = {"n-grams + Medusa": "ngram+medusa", "Medusa": "medusa"}[name]
        (method,) = [m for m in record.result["methods"] if m["dtype"] == dtype and m["name"] in (key, f"{key}_bf16")]
        assert str(method["tree_nodes"]) == nodes
        assert rounds == f"{method['tokens_per_round']:.2f} ({method['accepted_per_round']:.2f})"
        assert speedup == spread(method["speedup"])
        # Of none there, no other dtype is faster.
        fastest = method.get("speedup_over_fastest_autoregressive") or method["speedup"]
        assert faster == f"{fastest['median']:.2f}"
        found = method["identical_to_autoregressive"]
        assert same == f"{found['same']} of {found['of']} |"


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """A folder with prompts and the experiments, and how names in the README are to be read there."""
    lines = [{"question_id": i, "category": "ab"[i % 2], "turns": [f"say {i}"]} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    heads = str(checkpoint / "heads" / "heads.safetensors")
    return {"MODEL": str(checkpoint), "HEADS": heads}


def test_the_commands_that_choose_a_tree(folder, capsys):
    section = README.split("### Choose a tree")[1].split("\n### ")[0]
    commands = [shlex.split(line) for line in re.findall(r"```\n(.*?)```", section, re.DOTALL)[0].splitlines()]
    assert [word for word, *_ in commands] == ["specjax"] * 5
    for _, *rest in commands:
        name = rest[1] if rest[0] == "tree" else rest[0]
        # The checkpoint's two heads fill a depth of two.
        read = [{"mc_sim_7b_63": "chain:2"}.get(part, folder.get(part, part)) for part in rest]
        assert main([*read, *SMALL.get(name, [])]) == 0, (read, capsys.readouterr())
    assert sj.Tree.parse("mine").size > 1


@pytest.mark.parametrize(
    "command", [line for line in SHELL if line.startswith(("specjax generate --model smollm2", "specjax chat"))]
)
def test_the_commands_that_decode(folder, capsys, monkeypatch, command):
    _, *rest = shlex.split(command)
    names = iter([folder["MODEL"], folder["HEADS"]])
    read = [next(names) if part == "smollm2-135m-instruct" else part for part in rest]
    said = iter(["hi", "/exit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *args, **options: next(said))
    assert main([*read, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out


def test_the_experiment(folder, capsys):
    (command,) = [line for line in SHELL if "train_tiny_qwen2" in line]
    _, *rest = shlex.split(command)
    assert main([*rest, "--training.epochs", "1", "--conversations", "64"]) == 0
    assert json.loads(Path("results/tiny/result.json").read_text())["record"]["tokens_per_round"] > 0


def test_every_command_is_tested():
    tested = (
        "make ",
        "specjax tree",
        "specjax bench",
        "specjax generate",
        "specjax chat",
        "specjax convert",
        "specjax run",
    )
    assert all(line.startswith(tested) for line in SHELL)
