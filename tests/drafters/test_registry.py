"""Drafters by name, and one that is written outside the package: docs/write_a_drafter.md, as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import specjax as sj
from specjax.cli.main import main
from specjax.drafters import registry
from specjax.drafters.registry import build_drafter, drafter_entry, drafter_names, register_drafter
from specjax.studies.decode import Method

PAGE = Path(__file__).parents[2] / "docs" / "write_a_drafter.md"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with the page's module in it, as the one that commands are given in; what it registers goes again."""
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "periodic.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    yield tmp_path
    for name in ("periodic", "options", "clashing"):
        sys.modules.pop(name, None)


def test_the_pages_drafter_has_25_lines():
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25


def test_it_is_lossless_and_drafts(outside, model):
    import periodic

    drafter = periodic.Periodic(sj.Tree.chain(3), period=1)
    for prompt in ([1, 2, 3, 4, 5], [7] * 9):
        base = sj.generate(model, prompt, max_new_tokens=40)
        out = sj.generate(model, prompt, drafter=drafter, max_new_tokens=40)
        np.testing.assert_array_equal(out.tokens, base.tokens)
    told = sj.generate(model, [7] * 9, drafter=periodic.Periodic(sj.Tree.chain(3)), max_new_tokens=40)
    assert told.rounds <= 39


def test_it_drafts_from_the_command_line(outside, checkpoint, capsys):
    command = ["generate", "--model", str(checkpoint), "--prompt", "hi", "--max-new-tokens", "9", "--dtype", "float32"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    for drafter in (["periodic:Periodic"], ["ngram+periodic:Periodic", "--tree", "chain:2+chain:3"]):
        assert main([*command, "--drafter", *drafter]) == 0
        assert capsys.readouterr().out == plain
    for wrong, message in (("nowhere:Periodic", "no module nowhere"), ("periodic:Nothing", "cannot be imported")):
        assert main([*command, "--drafter", wrong]) == 2
        assert message in capsys.readouterr().err
    (outside / "lacking.py").write_text("import no_such_library")
    for wrong, message in (
        ("periodic:option", "expected a drafter's class"),
        ("builtins:dict", "does not say what it takes"),
        ("lacking:Drafter", "needs no_such_library, which is not installed"),
    ):
        assert main([*command, "--drafter", wrong]) == 2
        assert message in capsys.readouterr().err


OPTIONS = """
from periodic import Periodic
periods = []
def drafter(tree, period=4):
    periods.append(period)
    return Periodic(tree, period)
"""


def test_its_parameters_are_options(outside, checkpoint, capsys):
    """Of what the command line names, without a registration: with the defaults' types."""
    (outside / "options.py").write_text(OPTIONS)
    command = ["generate", "--model", str(checkpoint), "--prompt", "hi", "--max-new-tokens", "5"]
    assert main([*command, "--drafter", "options:drafter"]) == 0
    assert main([*command, "--drafter", "options:drafter", "--period", "2"]) == 0
    assert sys.modules["options"].periods == [4, 2]
    assert main([*command, "--drafter", "periodic:Periodic", "--period", "1"]) == 0
    capsys.readouterr()
    assert main([*command, "--drafter", "ngram", "--tree", "chain:2", "--reach", "1"]) == 0
    assert main([*command, "--drafter", "ngram", "--period", "2"]) == 2
    assert "--period is for the drafter periodic" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--drafter", "periodic:Periodic", "--help"])
    assert "--period INT" in capsys.readouterr().out


CLASHING = """
def clash(tree, seed=3):
    return None
"""


def test_an_option_cannot_take_a_commands_name(outside, checkpoint, capsys):
    (outside / "clashing.py").write_text(CLASHING)
    assert main(["generate", "--model", str(checkpoint), "--prompt", "hi", "--drafter", "clashing:clash"]) == 2
    assert "conflicting option string: --seed" in capsys.readouterr().err


def test_a_file_of_ones_own(outside, checkpoint, model, tmp_path):
    """It is asked for by its name, on the command line and in an experiment's method."""
    seen = []

    def build(given):
        seen.append(given.files)
        return sj.NgramDrafter(given.tree or sj.Tree.chain(1))

    register_drafter("mine", build, files={"notes": "a text file"})
    build_drafter("mine", model, files={"notes": "a.txt", "heads": None})
    assert seen == [{"notes": "a.txt"}]
    with pytest.raises(sj.ConfigError, match=r"mine needs notes \(a text file\); name it \(--notes\)"):
        build_drafter("mine", model)
    assert Method("m", drafter="mine", files={"notes": "a.txt"}).drafts_with == "mine"
    assert Method("m", files={"notes": "a.txt"}).drafts_with == "mine"
    command = ["generate", "--model", str(checkpoint), "--prompt", "hi", "--max-new-tokens", "5"]
    assert main([*command, "--notes", "b.txt"]) == 0
    assert seen[-1] == {"notes": "b.txt"}
    with pytest.raises(sj.ConfigError, match="notes is for the drafter mine"):
        assert Method("m", drafter="ngram", files={"notes": "a.txt"}).drafts_with


EXPERIMENT = """
import periodic
from specjax.studies.decode import DecodeExperiment, Decoding, Method, Prompts

def get_config():
    methods = (
        Method("autoregressive", "float32"),
        Method("registered", "float32", drafter="periodic", tree="chain:2", options={{"period": 2}}),
        Method("named", "float32", drafter="periodic:Periodic", tree="chain:2"),
    )
    return DecodeExperiment("outside", {model!r}, methods, Prompts(per_category=1), Decoding(max_new_tokens=8))
"""


def test_it_drafts_in_an_experiment(outside, checkpoint):
    (outside / "outside.py").write_text(EXPERIMENT.format(model=str(checkpoint)))
    assert main(["run", "outside.py", "--output-dir", "out"]) == 0
    _, *drafted = json.loads((outside / "out" / "result.json").read_text())["methods"]
    assert [method["tree_nodes"] for method in drafted] == [3, 3]
    for method in drafted:
        assert method["identical_to_autoregressive"]["same"] == method["identical_to_autoregressive"]["of"]


def test_a_registered_drafter_is_known_everywhere(outside):
    register_drafter("mine", lambda given: sj.NgramDrafter(given.tree or sj.Tree.chain(1)))
    assert "mine" in drafter_names()
    assert drafter_entry("mine").default_tree == "chain:4"
    for wrong, message in (
        ("none", "cannot be named"),
        ("a+b", "cannot be named"),
        ("medusa", "is a drafter 'medusa'"),
    ):
        with pytest.raises(sj.ConfigError, match=message):
            register_drafter(wrong, lambda given: None)
    with pytest.raises(sj.TreeError):
        register_drafter("other", lambda given: None, default_tree="no tree")
    with pytest.raises(sj.ConfigError, match=r"no drafter 'eagle'; expected none, or one or more of .*mine"):
        drafter_entry("eagle")


def test_a_part_may_stand_twice(model):
    both = build_drafter("ngram+ngram", model, tree="chain:2+chain:3", options={"max_n": 2})
    assert [part.tree.max_depth for part in both.parts] == [2, 3]
    assert {part.max_n for part in both.parts} == {2}


def test_a_closed_pipe_ends_quietly():
    """As of `specjax tree show mc_sim_7b_63 | head -1`."""
    shell = f"{sys.executable} -m specjax.cli tree show mc_sim_7b_63 | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stdout
    assert done.stderr == ""


def test_the_command_helps_without_loading_jax():
    probe = """
import sys
sys.argv[1:] = ["--help"]
try:
    from specjax.cli.main import main
    main()
finally:
    print('jax' in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment)
    assert done.stdout.strip().endswith("False")


def test_a_registered_name_brings_all_of_its_entry(outside, checkpoint, capsys):
    """`module:name`, with the default tree, the options' words, and files."""
    command = ["generate", "--model", str(checkpoint), "--prompt", "hi", "--max-new-tokens", "5"]
    assert main([*command, "--drafter", "periodic:periodic", "--period", "2"]) == 0
    with pytest.raises(SystemExit):
        main([*command, "--drafter", "periodic:periodic", "--help"])
    assert "how many tokens a period has" in capsys.readouterr().out
    assert main([*command, "--drafter", "periodic:ngram"]) == 2  # another module's
    assert "has no attribute 'ngram'" in capsys.readouterr().err
    (outside / "filed.py").write_text(
        "import specjax as sj\n"
        "def make(given):\n    print('file', given.files['notes'])\n    return sj.NgramDrafter(sj.Tree.chain(1))\n"
        "sj.register_drafter('filed', make, files={'notes': 'a text file'})\n"
    )
    assert main([*command, "--drafter", "filed:filed", "--notes", "a.txt"]) == 0
    assert "file a.txt" in capsys.readouterr().out
    sys.modules.pop("filed")


HEAD = """
from dataclasses import dataclass, field
import jax, jax.numpy as jnp
import specjax as sj
"""
GOOD = """
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Half(sj.DrafterBase):
    tree: sj.Tree = field(metadata={"static": True})

    def propose(self, target, state, context, key):
        return sj.Proposal(jnp.full(self.tree.size, context.root))
"""
SLIPS = {
    "unregistered": (GOOD.replace("@jax.tree_util.register_dataclass\n", ""), "Half is no pytree; put @jax"),
    "a tree that is data": (
        GOOD.replace('field(metadata={"static": True})', "field()"),
        r"Half.tree is a Tree, no array",
    ),
    "no dataclass": (
        GOOD.replace("@jax.tree_util.register_dataclass\n@dataclass(frozen=True)\n", ""),
        "cannot be made",
    ),
    "weights without a default": (GOOD.replace("    def", "    w: jax.Array\n\n    def"), r"cannot be made.*'w'"),
    "a bare array": (GOOD.replace("sj.Proposal(", "("), "proposed a .*Tracer; `propose` gives a Proposal"),
    "numbers that are no tokens": (GOOD.replace("context.root)", "1.0)"), "proposed tokens of float32"),
    "propose without a key": (GOOD.replace(", context, key)", ", context)"), "Half.propose takes .*called with"),
    "init of another shape": (GOOD + "\n    def init(self, target):\n        return None\n", "Half.init takes"),
    "no propose": (GOOD.split("    def")[0], "lacks propose"),
    "a tree's text": (GOOD + "\ndef half(tree):\n    return Half('chain:2')\n", "the tree of half:half is 'chain:2'"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_half_written_drafter_is_told_what_it_lacks(outside, checkpoint, capsys, name):
    code, message = SLIPS[name]
    (outside / "half.py").write_text(HEAD + code)
    attribute = "half" if "def half" in code else "Half"
    command = ["generate", "--model", str(checkpoint), "--prompt", "hi", "--max-new-tokens", "5"]
    try:
        assert main([*command, "--drafter", f"half:{attribute}"]) == 2
    finally:
        sys.modules.pop("half", None)
    assert re.search(message, capsys.readouterr().err)


def test_a_files_path_is_no_modules_name():
    with pytest.raises(sj.ConfigError, match=r"does not begin with a module's name; as in counting:Count"):
        drafter_entry("./counting.py:Count")


def test_options_are_checked_in_experiments_too(model):
    for wrong in ("two", 2.5, True, [2]):
        with pytest.raises(sj.ConfigError, match=r"max_n of the drafter ngram is .*; expected int"):
            build_drafter("ngram", model, options={"max_n": wrong})
    with pytest.raises(sj.ConfigError, match=r"reach of the drafter ngram is .*; expected int, any number"):
        build_drafter("ngram", model, options={"reach": ["x"]})


def test_an_experiment_finds_what_lies_beside_it(outside, checkpoint, tmp_path_factory, monkeypatch):
    registered = EXPERIMENT.replace('"periodic:Periodic"', '"periodic"')
    (outside / "outside.py").write_text(registered.format(model=str(checkpoint)))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert main(["run", str(outside / "outside.py"), "--output-dir", str(outside / "out")]) == 0
    (outside / "three.py").write_text("def get_config():\n    return 3\n")
    assert main(["run", str(outside / "three.py")]) == 2
