"""What may a chat template do, and how much of it: Jinja's sandbox with what transformers adds, under a budget.

Loops and calls count as steps, and the clock is read every few hundred of them; `+`, `*`, `**`, `~` and calls are kept
from making large values. The budget lives in a context variable for the time of one rendering, so one environment
serves any number of threads.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_CLOCK_INTERVAL = 256
_MAX_POWER_BASE = 10**18
_MAX_INTEGER_BITS = 100_000


class RefusedByTemplateError(jinja2.TemplateError):
    """The template called `raise_exception`."""


class LimitExceededError(jinja2.TemplateError):
    """The rendering has used up its budget."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may take."""

    max_chars: int = 16_000_000
    """Characters of the prompt, and of any one string made on the way."""
    max_steps: int = 5_000_000
    """Loop iterations and calls."""
    max_seconds: float = 5.0
    """Wall-clock time."""

    def __post_init__(self) -> None:
        if self.max_chars <= 0 or self.max_steps <= 0 or self.max_seconds <= 0:
            raise ValueError("every template limit must be positive")


class _Budget:
    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._steps = 0
        self._deadline = time.monotonic() + limits.max_seconds

    def step(self) -> None:
        self._steps += 1
        if self._steps > self._limits.max_steps:
            raise LimitExceededError(f"more than {self._limits.max_steps} loop iterations and calls")
        if self._steps % _CLOCK_INTERVAL == 0 and time.monotonic() > self._deadline:
            raise LimitExceededError(f"longer than {self._limits.max_seconds:g} s")

    def check_length(self, length: int) -> None:
        if length > self._limits.max_chars:
            raise LimitExceededError(f"a text of more than {self._limits.max_chars} characters")

    def check_value(self, value: object) -> None:
        if isinstance(value, str | list | tuple):
            self.check_length(len(cast("list[object]", value)))


_budget: ContextVar[_Budget] = ContextVar("kvbaton_template_budget")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and renders chat templates with the names that transformers gives them."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, limits: TemplateLimits, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._limits = limits

        def strftime_now(format: str) -> str:
            return now().strftime(format)

        # Jinja's annotations know only its own filters and globals.
        filters: Any = self.filters
        variables: Any = self.globals
        filters |= {"tojson": _tojson, _COUNTED: _counted, _MEASURED: _measured}
        variables |= {"raise_exception": _raise_exception, "strftime_now": strftime_now}

    def render_bounded(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Renders within the limits; raises `LimitExceededError`, and whatever the template raises."""
        budget = _Budget(self._limits)
        token = _budget.set(budget)
        try:
            chunks: list[str] = []
            length = 0
            for chunk in template.generate(variables):
                length += len(chunk)
                budget.check_length(length)
                chunks.append(chunk)
            return "".join(chunks)
        finally:
            _budget.reset(token)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return cast("nodes.Template", _AddCounters().visit(tree))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, int):
                budget.check_length(argument)
        value = super().call(context, obj, *args, **kwargs)
        budget.check_value(value)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "**":
            _check_power(left, right)
        elif operator == "*":
            _check_product(budget, left, right)
        value = super().call_binop(context, operator, left, right)
        budget.check_value(value)
        return value


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only lets its body through."""

    tags = {"generation"}  # noqa: RUF012  # typed as an instance attribute in Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as the call block of transformers is: what is set inside is not seen outside.
        return [nodes.Scope(body, lineno=line)]


class _AddCounters(NodeTransformer):
    """Sends what every loop iterates over, and every `~`, through the filters that count and measure."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # Jinja names visitors after node classes
        node = cast("nodes.For", self.generic_visit(node))
        node.iter = _filtered(cast("nodes.Expr", node.iter), _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _filtered(cast("nodes.Concat", self.generic_visit(node)), _MEASURED)


class _CountedIterable:
    def __init__(self, values: Iterable[object]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[object]:
        budget = _budget.get()
        for value in self._values:
            budget.step()
            yield value

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]  # Jinja catches the TypeError


_COUNTED, _MEASURED = "kvbaton_counted", "kvbaton_measured"


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context  # keeps the compiler from evaluating the filter on constants
def _counted(_context: Context, values: Iterable[object]) -> Iterable[object]:
    return _CountedIterable(values)


@jinja2.pass_context
def _measured(_context: Context, value: object) -> object:
    _budget.get().check_value(value)
    return value


def _check_power(base: object, exponent: object) -> None:
    if isinstance(exponent, int | float) and abs(exponent) > 64:
        raise LimitExceededError("a power with an exponent beyond 64")
    if isinstance(base, int | float) and abs(base) > _MAX_POWER_BASE:
        raise LimitExceededError("a power of a number beyond 10^18")


def _check_product(budget: _Budget, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_INTEGER_BITS:
            raise LimitExceededError(f"a number of more than {_MAX_INTEGER_BITS} bits")
        return
    for value, factor in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(factor, int):
            budget.check_length(len(cast("list[object]", value)) * factor)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; templates are written for this one of transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise RefusedByTemplateError(message)
