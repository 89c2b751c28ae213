"""Refusals, each worded once."""

import inspect
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from specjax.errors import ConfigError


def is_whole(value: Any) -> bool:
    """Whether it is a whole number by type; a bool is not, nor is 2.0."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_is(value: Any, kind: type, what: str, remedy: str) -> None:
    """Checks an argument's type, where a wrong one would fail somewhere inside.

    Raises:
      ConfigError: a value of another type; the message says `what` it is and gives the `remedy`.
    """
    if not isinstance(value, kind):
        given = repr(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"
        raise ConfigError(f"{what} is {given}, not a {kind.__name__}; {remedy}")


def check_implements(value: Any, protocol: type, examples: str, inherited: Sequence[str] = ()) -> None:
    """Checks that an object, a user's own perhaps, has what is going to be called.

    Args:
      inherited: members for which the protocol itself will do.

    Raises:
      ConfigError: a class in place of an instance, an object without some members of the protocol, or with a method
        that does not take what it is given.
    """
    name = protocol.__name__
    if isinstance(value, type):
        raise ConfigError(f"{value.__name__} is a class; pass an instance of it, such as {examples}.")
    members = sorted({*vars(protocol), *inspect.get_annotations(protocol)})
    members = [member for member in members if member not in inherited]
    wanted = [member for member in members if member == "__call__" or not member.startswith("_")]
    # Statically: a property may fail for a reason of its own. A subclass of the protocol inherits its empty bodies.
    absent = object()
    found = {member: inspect.getattr_static(value, member, absent) for member in wanted}
    missing = [m for m in wanted if found[m] is absent or found[m] is vars(protocol).get(m)]
    if hasattr(type(value), "__getattr__"):  # a wrapper that hands on what it lacks
        missing = [member for member in missing if not hasattr(value, member)]
    if missing:
        raise ConfigError(
            f"{reprlib.repr(value)} is no {name}: it lacks {', '.join(missing)}. Pass one such as {examples}."
        )
    for member in wanted:
        declared = vars(protocol).get(member)
        if inspect.isfunction(declared):
            _check_signature(value, member, inspect.signature(declared), name)


def _check_signature(value: Any, member: str, declared: inspect.Signature, protocol: str) -> None:
    _, *expected = declared.parameters.values()  # without self
    try:
        own = inspect.signature(getattr(value, member))
    except (TypeError, ValueError):  # of something that Python cannot tell
        return
    by_name = {p.name: None for p in expected if p.kind is p.KEYWORD_ONLY}
    try:
        own.bind(*[None for p in expected if p.kind is not p.KEYWORD_ONLY], **by_name)
    except TypeError as error:
        told = ", ".join(p.name for p in expected)
        raise ConfigError(
            f"{type(value).__name__}.{member} takes {own}, and a {protocol}'s is called with ({told}): {error}."
        ) from error
