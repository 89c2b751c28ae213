"""Drafters by name: what `--drafter`, an experiment's methods and `build_drafter` know, and how to add one.

A drafter of one's own is named as `module:attribute`: its class, or any function of a tree that gives a drafter. Who
imports the module that registers it (`register_drafter`) has it by its name, too.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from specjax.acceptance import Acceptance, Sample
from specjax.checks import check_is
from specjax.drafters.base import Drafter
from specjax.drafters.draft_model import DraftModelDrafter
from specjax.drafters.hybrid import HybridDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.ngram import NgramDrafter
from specjax.errors import ConfigError
from specjax.fingerprint import fingerprint
from specjax.heads import Heads
from specjax.loading.head_files import heads_for
from specjax.loading.load import Model, load_draft
from specjax.tree import Tree


@dataclass(frozen=True)
class Ingredients:
    """What a drafter is built from.

    Attributes:
      target: the model that verifies.
      tree: None: the drafter's default one.
      files: by name those that its entry lists, as their loaders take them.
      acceptance: a drafter may sample as `Sample` does.
      options: the drafter's own that are given.
    """

    target: Model
    tree: Tree | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    acceptance: Acceptance | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DrafterOption:
    """A setting of a drafter, for the command line (`--max-n`) and for experiments.

    Attributes:
      kind: int, float or str; with `many`, any number of them.
      help: says the default, too.
    """

    kind: type
    help: str
    many: bool = False


@dataclass(frozen=True)
class DrafterEntry:
    """What is known of a drafter by its name.

    Attributes:
      build: makes it.
      default_tree: as `Tree.parse` takes it. Small ones: on a CPU a wide round costs more than it accepts.
      files: by name those that must be given, and what each may be.
      options: by name.
      auto: whether `tree="auto"` can be chosen by timing this machine (Medusa: from its rank table or accuracies).
    """

    build: Callable[[Ingredients], Drafter]
    default_tree: str = "chain:4"
    files: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, DrafterOption] = field(default_factory=dict)
    auto: bool = False


_ENTRIES: dict[str, DrafterEntry] = {}


def register_drafter(
    name: str,
    build: Callable[[Ingredients], Drafter],
    *,
    default_tree: str = "chain:4",
    files: Mapping[str, str] | None = None,
    options: Mapping[str, DrafterOption] | None = None,
    auto: bool = False,
) -> None:
    """Gives a drafter a name, for `build_drafter` and experiments of a process that imports this call, and for the
    command line where the package makes it; arguments as in `DrafterEntry`. A module that is loaded anew replaces what
    it registered.

    Raises:
      ConfigError: a name that stands for another module's drafter or means something else.
      TreeError: a default tree that is none.
    """
    if name in ("none", "auto") or not name or set(name) & set("+:"):
        raise ConfigError(f"a drafter cannot be named {name!r}; choose a word without '+' and ':', not none or auto.")
    Tree.parse(default_tree)
    entry = DrafterEntry(build, default_tree, dict(files or {}), dict(options or {}), auto)
    if name in _ENTRIES and _ENTRIES[name].build.__module__ != build.__module__:
        raise ConfigError(f"there is a drafter {name!r} already, of {_ENTRIES[name].build.__module__}; choose another.")
    _ENTRIES[name] = entry


def drafter_names() -> tuple[str, ...]:
    """All that are registered."""
    return tuple(_ENTRIES)


def drafter_entry(name: str) -> DrafterEntry:
    """What is known of a drafter: one that is registered, or `module:attribute`, also where the module registers it.

    Raises:
      ConfigError: no such drafter, module or attribute.
    """
    if name in _ENTRIES:
        return _ENTRIES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"no drafter {name!r}; expected none, or one or more of {', '.join(_ENTRIES)}, joined by '+', or one of "
            "your own as module:attribute."
        )
    made = _imported(name, module, attribute)
    if isinstance(made, DrafterEntry):
        return made
    try:
        parameters = list(inspect.signature(made).parameters.items())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} does not say what it takes ({error}); name a function of a tree.") from error
    options = {}
    for option, parameter in parameters[1:]:  # the first one is the tree
        if type(parameter.default) in (int, float, str):
            told = f"{attribute}: {option.replace('_', ' ')} (default {parameter.default})"
            options[option] = DrafterOption(type(parameter.default), told)

    def build(given: Ingredients) -> Drafter:
        try:
            return made(given.tree or Tree.parse("chain:4"), **given.options)
        except TypeError as error:
            raise ConfigError(
                f"{name} cannot be made of a tree and its options: {error}. A function of a tree can give "
                "it what else it needs: name that, or register one."
            ) from error

    return DrafterEntry(build, options=options)


def _imported(name: str, module: str, attribute: str) -> Callable[..., Drafter] | DrafterEntry:
    if not all(map(str.isidentifier, module.split("."))):
        raise ConfigError(f"{name!r} does not begin with a module's name; as in {module_name(module)}:{attribute}.")
    try:
        with _from_this_folder():
            imported = importlib.import_module(module)
        registered = _ENTRIES.get(attribute)
        if registered is not None and registered.build.__module__ == module and not hasattr(imported, attribute):
            return registered
        made = getattr(imported, attribute)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"the drafter {name!r} needs {error.name}, which is not installed; install it."
            ) from error
        raise ConfigError(f"no module {module} for the drafter {name!r}; go to the folder that it is in.") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the drafter {name!r} cannot be imported: {error}.") from error
    if not callable(made):
        raise ConfigError(f"{name} is {made!r}; expected a drafter's class, or a function of a tree that gives one.")
    return made


def module_name(path: str) -> str:
    """What a file's module is called."""
    return path.replace("\\", "/").rpartition("/")[2].removesuffix(".py") or "module"


@contextmanager
def _from_this_folder() -> Iterator[None]:
    # As `python -m` has it; the `specjax` command does not.
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def entries_of(text: str) -> list[tuple[str, DrafterEntry]]:
    """The parts of a drafter's name ("none": no parts)."""
    return [] if text == "none" else [(name, drafter_entry(name)) for name in text.split("+")]


def default_drafter(files: Mapping[str, str | None]) -> str:
    """What drafts where only files are named: the first drafter that needs no others."""
    named = {name for name, file in files.items() if file is not None}
    return next((name for name, entry in _ENTRIES.items() if entry.files and set(entry.files) <= named), "none")


def refuse_idle(
    text: str, files: Mapping[str, str | None], options: Mapping[str, Any], spelled: Callable[[str], str] = str
) -> None:
    """Refuses files and options that no part of the drafter uses.

    Args:
      spelled: an option's name as the user gave it, for the message.

    Raises:
      ConfigError: the first such one.
    """
    parts = entries_of(text)
    for kind, given in (("files", files), ("options", options)):
        for name, value in given.items():
            if value is None or any(name in getattr(entry, kind) for _, entry in parts):
                continue
            users = [user for user, entry in _ENTRIES.items() if name in getattr(entry, kind)]
            whose = f"for the drafter {' or '.join(users)}" if users else "no drafter's"
            raise ConfigError(f"{spelled(name)} is {whose}; the drafter {text} leaves it out.")


def _check_option(drafter: str, name: str, option: DrafterOption, value: Any) -> None:
    kinds = (int, float) if option.kind is float else option.kind
    values = value if option.many and isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, kinds) and not isinstance(one, bool) for one in values):
        expected = f"{option.kind.__name__}{', any number of them' if option.many else ''}"
        raise ConfigError(f"{name} of the drafter {drafter} is {value!r}; expected {expected}.")


def build_drafter(
    text: str,
    target: Model,
    *,
    tree: str | None = None,
    files: Mapping[str, str | None] | None = None,
    acceptance: Acceptance | None = None,
    options: Mapping[str, Any] | None = None,
) -> Drafter | None:
    """The drafter that `text` names, with its files loaded in the target's dtype.

    Args:
      text: "none", a drafter's name, or several joined by "+": a hybrid, tried in that order.
      tree: what `Tree.parse` takes; for a hybrid one for each part, joined by "+". None: the drafters' own.
      files: by name: `heads` for medusa, as in `load_heads`; `draft_model` for draft, as in `load_draft`.
      acceptance: a draft model samples as `Sample` does, and is greedy otherwise.
      options: of the drafters, by name; each takes its own.

    Raises:
      ConfigError: an unknown name, another number of trees than of parts, or a file that is needed and not named.
      SpecJaxError: what loading the files or parsing the trees raises.
    """
    parts = entries_of(text)
    if not parts:
        return None
    trees = [None] * len(parts) if tree is None else [Tree.parse(part) for part in tree.split("+")]
    if len(trees) != len(parts):
        raise ConfigError(
            f"the drafter {text!r} has {len(parts)} parts, the tree {tree!r} {len(trees)}; give one each."
        )
    made = []
    for (name, entry), shape in zip(parts, trees, strict=True):
        named = {need: file for need in entry.files if (file := (files or {}).get(need)) is not None}
        if missing := [need for need in entry.files if need not in named]:
            flag = "--" + missing[0].replace("_", "-")
            raise ConfigError(f"the drafter {name} needs {missing[0]} ({entry.files[missing[0]]}); name it ({flag}).")
        own = {option: value for option, value in (options or {}).items() if option in entry.options}
        for option, value in own.items():
            _check_option(name, option, entry.options[option], value)
        made.append(entry.build(Ingredients(target, shape, named, acceptance, own)))
        check_is(made[-1].tree, Tree, f"the tree of {name}", "a drafter's tree is a specjax Tree.")
    return made[0] if len(made) == 1 else HybridDrafter(tuple(made))


def _warn_of_other_heads(tree: Tree, loaded: Heads, name: str) -> None:
    table = tree.provenance.get("table")  # free-form
    searched = table.get("heads") if isinstance(table, dict) else None
    if searched is not None and searched != fingerprint((loaded.params, loaded.token_map)):
        warnings.warn(
            f"the tree {tree.name!r} of {tree.size} nodes was searched for other heads ({searched}) than {name}: it "
            "fits, but another may be faster. `specjax tree measure` and `specjax tree optimise` find one for these.",
            stacklevel=4,
        )


_MEDUSA_TREE = "paths:0,1,2,3,0.0"  # cut to the number of heads


def _medusa(given: Ingredients) -> Drafter:
    source = given.files["heads"]
    loaded = heads_for(given.target, source, dtype=given.target.params.dtype)
    if given.tree is not None:
        _warn_of_other_heads(given.tree, loaded, source)
    deep = [path for path in Tree.parse(_MEDUSA_TREE).rank_paths if len(path) <= loaded.config.num_heads]
    return MedusaDrafter(loaded, given.tree or Tree.from_paths(deep))


def _ngram(given: Ingredients) -> Drafter:
    return NgramDrafter(given.tree or Tree.parse("chain:4"), **given.options)


def _draft(given: Ingredients) -> Drafter:
    draft, ids = load_draft(given.files["draft_model"], dtype=given.target.params.dtype)
    token_map, tree = None if ids is None else jnp.asarray(ids), given.tree or Tree.parse("chain:4")
    rule = given.acceptance
    if not isinstance(rule, Sample):
        return DraftModelDrafter(draft, tree, token_map=token_map)
    return DraftModelDrafter(draft, tree, rule.temperature, rule.top_k, rule.top_p, token_map)


register_drafter(
    "medusa", _medusa, default_tree=_MEDUSA_TREE, files={"heads": "packaged name, file or directory"}, auto=True
)
register_drafter("draft", _draft, files={"draft_model": "packaged name, directory, repository or .gguf file"})
register_drafter(
    "ngram",
    _ngram,
    options={
        "max_n": DrafterOption(int, "n-grams: the longest match (default 3)"),
        "min_n": DrafterOption(int, "n-grams: the shortest match to draft after (default 1)"),
        "reach": DrafterOption(
            int,
            "n-grams: how far to draft after a match of 1, 2, ... tokens; after longer ones, the whole tree "
            "(default 3 7; without numbers always the whole tree)",
            many=True,
        ),
    },
)
