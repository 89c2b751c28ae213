"""Chat templates: jinja2 in transformers' dialect. They come with a checkpoint, so they run in a sandbox, on a budget.

The sandbox keeps a template from Python's internals, the budget from loops without an end and texts that fill the
memory: every step and every character that it makes counts, and before something is multiplied its size is reckoned.
"""

import contextvars
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from specjax.errors import PromptError

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode keeps for such internal use
_LONGEST = 200_000  # characters of a template, and of what it may add to the messages; published ones have up to 30,000
_PER_CHARACTER = 8  # how often it may repeat them
_STEP = 60  # what a step counts beside the characters that it makes
_BUDGET, _BUDGET_PER_CHARACTER = 20_000_000, 50  # of a rendering, and for each character of the messages

_left: contextvars.ContextVar[int] = contextvars.ContextVar("left")


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    strftime_now: Callable[[str], str],
    tools: Sequence[Any] | None = None,
    special_tokens: Mapping[str, str],
) -> str:
    """The text, with `OPEN` and `CLOSE` around what `{% generation %}` blocks write.

    Raises:
      PromptError: a template that is none, that refuses the messages, fails on them, or does not come to an end.
    """
    if len(source) > _LONGEST:
        raise PromptError(f"the chat template has {len(source)} characters; at most {_LONGEST} are read.")
    given = {"messages": [dict(m) for m in messages], "tools": None if tools is None else list(tools)}
    size = len(repr(given))
    token = _left.set(_BUDGET + _BUDGET_PER_CHARACTER * size)
    try:
        text = _template(source).render(
            **given,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=strftime_now,
            **special_tokens,
        )
        if len(text) > _LONGEST + _PER_CHARACTER * size:  # reading it as tokens would take long
            raise jinja2.TemplateError(f"it makes {len(text)} characters of messages of {size}.")
        return text
    except jinja2.TemplateError as error:
        raise PromptError(f"the chat template refuses these messages: {error}") from error
    except (Exception, RecursionError, MemoryError) as error:  # a template is a program: it can fail in any way
        raise PromptError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error
    finally:
        _left.reset(token)


def without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it the marked spans are."""
    text, spans = "", []
    for part in marked.split(OPEN):
        inside, closed, outside = part.partition(CLOSE)
        if closed:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


@functools.lru_cache(maxsize=8)
def _template(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=1)
def _environment() -> "_Environment":
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own filter escapes HTML

    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # otherwise constants are folded before there is a budget
        finalize=_made,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlocks],
    )
    environment.filters = {
        name: _reckoned(function) for name, function in {**environment.filters, "tojson": tojson}.items()
    }
    environment.globals["raise_exception"] = raise_exception
    environment.globals.pop("lipsum")
    return environment


def _spend(amount: int) -> None:
    left = _left.get() - amount
    _left.set(left)
    if left < 0:
        raise jinja2.TemplateError("it makes too many steps or too much text; is there a loop without an end?")


def _made(value: Any) -> Any:
    _spend(_STEP + _size(value))
    return value


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, list | tuple):
        return sum(8 + len(item) if isinstance(item, str) else 8 for item in value)
    return 1


def _reckon(*operands: Any) -> None:
    """Refuses an operation of which the result could be larger than what is left."""
    widths = [int(digits[:9]) for text in operands if isinstance(text, str) for digits in _WIDTHS.findall(text)]
    if math.prod(max(1, _size(operand)) for operand in operands) * max(widths, default=1) > max(_left.get(), 1 << 20):
        raise jinja2.TemplateError("it multiplies text or numbers beyond what a prompt can hold.")


_WIDTHS = re.compile(r"[%{:.<>^][^%{}]{0,8}?(\d{4,})")  # of fields in formats, such as {:>1000000000}


def _reckoned(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with what jinja2 marks filters by
    def call(*args: Any, **options: Any) -> Any:
        _reckon(*args, *options.values())
        return _made(function(*args, **options))

    return call


class _Steps(jinja2.compiler.CodeGenerator):
    """Code that counts: every block that is run, and every text that is joined."""

    def blockvisit(self, nodes: Any, frame: Any) -> None:
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        self.write("environment.made(")
        super().visit_Concat(node, frame)
        self.write(")")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _Steps
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def step(self) -> None:
        _spend(_STEP)

    def made(self, value: Any) -> Any:
        return _made(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and numbers and abs(right) * math.log2(abs(left) + 2) > 64:
            raise jinja2.TemplateError(f"{left} ** {right} is beyond what a prompt needs.")
        if not numbers and operator != "+":
            _reckon(left, right)
        found = super().call_binop(context, operator, left, right)
        return found if numbers else _made(found)

    def call(self, context: Any, function: Any, *args: Any, **options: Any) -> Any:
        receiver = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        if isinstance(receiver, str | bytes):  # its methods; others do not multiply
            _reckon(receiver, *args, *options.values())
        found = super().call(context, function, *args, **options)
        return _made(found) if isinstance(found, str | bytes | list | tuple) else found

    def get_template(self, *args: Any, **options: Any) -> NoReturn:
        raise jinja2.TemplateError("it includes another file, which a chat template cannot.")


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`: what the template writes inside is the assistant's."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"
