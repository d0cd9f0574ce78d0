"""Chat templates of strangers: Jinja as Transformers renders it, within limits.

A template may come with any bundle or GGUF file, so everything that it does is counted against one
budget: its steps, the items of the lists that it goes through, and the bytes of the texts that it
makes. jinja2's sandbox keeps templates away from Python's internals, but not from ``'a' * 10**9``
or from ten nested loops. Here the syntax tree is rewritten before it is compiled, so that loops,
macros, list literals, comparisons and ``~`` report to the budget; operators, calls, filters and
output are intercepted (mobilevlm/templates/limits.py has the budget and the checks). Constants are
never folded, so nothing is computed uncounted when a template is compiled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from mobilevlm.console.terminal import plain
from mobilevlm.errors import PromptError
from mobilevlm.templates.limits import (
    Limits,
    TemplateLimitError,
    check_braces,
    check_filter,
    check_method,
    check_operator,
)

SOURCE_CHARACTERS = 1 << 15
"""Longest template; the longest of published models have some 20,000."""
NODES, DEPTH = 8_000, 100
"""Most parts of a template, and most of them inside each other."""

_FILTERS = (
    *("abs", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape"),
    *("first", "float", "format", "groupby", "indent", "int", "items", "join", "last", "length"),
    *("list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round"),
    *("safe", "select", "selectattr", "slice", "sort", "string", "striptags", "sum", "title"),
    *("trim", "truncate", "unique", "upper", "wordcount"),
)
_GLOBALS = ("cycler", "dict", "joiner", "namespace")
_COMPARING_TESTS = (
    *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge"),
    *("<", "lt", "lessthan", "<=", "le", "lower", "upper"),
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            *("capitalize", "casefold", "center", "count", "endswith", "find", "format", "index"),
            *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric"),
            *("isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition"),
            *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition"),
            *(
                "rsplit",
                "rstrip",
                "split",
                "splitlines",
                "startswith",
                "strip",
                "swapcase",
                "title",
            ),
            *("upper", "zfill"),
        )
    ),
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "index"]),
    int: frozenset(),
    float: frozenset(),
    bytes: frozenset(),
    range: frozenset(),
}
"""Attributes of plain values that templates may use."""
_VIEWS = ("get", "items", "keys", "values")
"""Methods that make nothing new."""

# Names of our own filters in the rewritten tree; no template can write them.
_LOOP, _SPEND, _MADE, _COMPARED, _JOINED = "<loop>", "<spend>", "<made>", "<compared>", "<joined>"


class _RefusalError(TemplateError):
    """Text that a template gave to ``raise_exception``."""


class _Generation(Extension):
    """``{% generation %}`` marks an answer for training; it means nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        scope = nodes.Scope(lineno=next(parser.stream).lineno)
        scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return scope


class _Bounded(ImmutableSandboxedEnvironment):
    """Sandbox in which operators, calls, filters, tests and output count."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_shown,
            extensions=[_Generation, loopcontrols],
        )
        self.filters = {name: _counted_filter(name, self.filters[name]) for name in _FILTERS}
        self.filters |= _OWN_FILTERS
        tests: Any = dict(self.tests)
        self.tests = {name: _counted_test(name, test) for name, test in tests.items()}
        kept = {name: self.globals[name] for name in _GLOBALS}
        self.globals = {**kept, "range": self.globals["range"]}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((_METHODS[kind] for kind in _METHODS if isinstance(obj, kind)), None)
        known = allowed is None or attr in allowed
        return known and super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, str) and attribute == "format":
            return lambda *args, **named: self._format(obj, args, named)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str) and argument == "format":
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def _format(self, text: str, args: tuple[Any, ...], named: dict[str, Any]) -> str:
        check_braces(Limits.now(), text, (args, named))
        return SandboxedFormatter(self).vformat(str(text), args, named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits = Limits.now()
        check_operator(limits, operator, left, right)
        return limits.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **named: Any) -> Any:
        limits = Limits.now()
        limits.spend(2)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            args = check_method(limits, owner, name, args, named)
        elif obj in (Namespace, dict):
            limits.size((args, named))
        else:
            for value in (*args, *named.values()):
                limits.size(value)
            if isinstance(owner, (list, tuple)):
                limits.size(owner)
        result = super().call(context, obj, *args, **named)
        return result if isinstance(owner, dict) and name in _VIEWS else limits.made(result)


def _refused(node: nodes.Node) -> nodes.Node:
    name = type(node).__name__.lower()
    raise TemplateSyntaxError(f"{{% {name} %}} is not for chat templates", node.lineno)


def _counted_loop(node: nodes.For) -> nodes.Node:
    cost = _cost(node)
    node.iter = _filter(node.iter, _LOOP, cost)
    if node.recursive:
        node.body.insert(0, _spending(cost, node.lineno))
    return node


def _counted_body(node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
    node.body.insert(0, _spending(_cost(node), node.lineno))
    return node


def _counted_list(node: nodes.List | nodes.Dict) -> nodes.Node:
    return _filter(node, _MADE)


def _counted_tuple(node: nodes.Tuple) -> nodes.Node:
    return _filter(node, _MADE) if node.ctx == "load" else node


def _counted_item(node: nodes.Getitem) -> nodes.Node:
    return _filter(node, _MADE) if isinstance(node.arg, nodes.Slice) else node


def _counted_concat(node: nodes.Concat) -> nodes.Node:
    return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)


def _counted_comparison(node: nodes.Compare) -> nodes.Node:
    node.expr = _filter(node.expr, _COMPARED)
    for operand in node.ops:
        operand.expr = _filter(operand.expr, _COMPARED)
    return node


def _counted_assignment(node: nodes.Assign) -> nodes.Node:
    if isinstance(node.target, nodes.NSRef) or node.target.find(nodes.NSRef):
        node.node = _filter(node.node, _MADE)
    return node


_REWRITTEN: dict[type[nodes.Node], Callable[[Any], nodes.Node]] = {
    nodes.Include: _refused,
    nodes.Import: _refused,
    nodes.FromImport: _refused,
    nodes.Extends: _refused,
    nodes.Block: _refused,
    nodes.EvalContextModifier: _refused,
    nodes.ScopedEvalContextModifier: _refused,
    nodes.For: _counted_loop,
    nodes.Macro: _counted_body,
    nodes.CallBlock: _counted_body,
    nodes.List: _counted_list,
    nodes.Dict: _counted_list,
    nodes.Tuple: _counted_tuple,
    nodes.Getitem: _counted_item,
    nodes.Concat: _counted_concat,
    nodes.Compare: _counted_comparison,
    nodes.Assign: _counted_assignment,
}
"""How parts that the sandbox cannot intercept are made to report to the budget."""


def _rewrite(node: nodes.Node) -> nodes.Node:
    """Return a part of the syntax tree with everything below it rewritten."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _rewrite(value))
        elif isinstance(value, list):
            value[:] = [_rewrite(item) if isinstance(item, nodes.Node) else item for item in value]
    change = _REWRITTEN.get(type(node))
    return change(node) if change is not None else node


def render_template(source: str, **values: Any) -> str:
    """Return the text of a chat template, rendered as Transformers does.

    Raises:
        PromptError: the template is damaged, takes too much, or refuses these values.
    """
    try:
        with Limits.begin():
            return _compiled(source).render(**values)
    except _RefusalError as error:
        text = plain(error.message or "no reason given")
        raise PromptError(
            f"the bundle's chat template refuses these messages: {text[:200]}"
        ) from None
    except Exception as error:  # a template is data: whatever it does wrong is the bundle's fault
        text = plain(str(error) or type(error).__name__)
        raise PromptError(f"the bundle's chat template failed: {text[:200]}") from None


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    if len(source) > SOURCE_CHARACTERS:
        raise TemplateLimitError(
            f"it has {len(source)} characters, the longest that is read has {SOURCE_CHARACTERS}"
        )
    environment = _Bounded()
    tree = environment.parse(source)
    _check_tree(tree)
    _rewrite(tree)
    return Template.from_code(environment, environment.compile(tree), environment.globals)


def _check_tree(tree: nodes.Node) -> None:
    """Raise if a template has too many parts, or too many inside each other."""
    count, level, depth = 0, [tree], 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > NODES or depth > DEPTH:
            raise TemplateLimitError(f"it has more than {NODES} parts, or {DEPTH} in each other")
        level = [child for node in level for child in node.iter_child_nodes()]


def _cost(node: nodes.Node) -> int:
    """Return the steps of running a body once: its parts, and the text that it writes."""
    cost, rest = 1, [node]
    while rest:
        part = rest.pop()
        cost += 1
        if isinstance(part, nodes.TemplateData):
            cost += len(part.data) >> 4
        elif isinstance(part, nodes.Const) and isinstance(part.value, str):
            cost += len(part.value) >> 4
        rest.extend(part.iter_child_nodes())
    return cost


def _filter(node: Any, name: str, *args: int) -> nodes.Filter:
    constants = [nodes.Const(value) for value in args]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _spending(cost: int, line: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(cost, lineno=line), _SPEND), lineno=line)


@pass_context
def _shown(context: Context, value: Any) -> str:
    """Return a value as output."""
    return Limits.now().text(value)


@pass_context
def _loop(context: Context, value: Any, cost: int) -> Iterable[Any]:
    return Limits.now().each(value, cost)


@pass_context
def _spend(context: Context, cost: int) -> None:
    Limits.now().spend(cost)


@pass_context
def _made(context: Context, value: Any) -> Any:
    return Limits.now().made(value)


@pass_context
def _compared(context: Context, value: Any) -> Any:
    Limits.now().size(value)
    return value


@pass_context
def _joined(context: Context, values: list[Any]) -> str:
    limits = Limits.now()
    return str(limits.made("".join([limits.text(value) for value in values])))


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Transformers' own filter does: no HTML escapes, letters as they are."""
    limits = Limits.now()
    width = len(indent) if isinstance(indent, str) else indent or 0
    limits.spend(limits.size(value) * max(0, width) * limits.depth_of(value) >> 5)
    if separators is not None:
        limits.spend(limits.size(value) * sum(map(len, separators)) >> 5)
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return str(limits.made(text))


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    _LOOP: _loop,
    _SPEND: _spend,
    _MADE: _made,
    _COMPARED: _compared,
    _JOINED: _joined,
    "tojson": _tojson,
}


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of jinja2's filters, its arguments checked and its result counted."""
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **named: Any) -> Any:
        limits = Limits.now()
        value = check_filter(limits, name, value, args, named)
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(passed, ())
        return limits.made(function(*first, value, *args, **named))

    return counted


def _counted_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @pass_context
    def counted(context: Context, value: Any, *args: Any) -> Any:
        limits = Limits.now()
        limits.spend(1)
        if name in _COMPARING_TESTS:
            limits.size((value, args))
        return function(*((context.environment,) if passed == "environment" else ()), value, *args)

    return counted


def _raise_exception(message: Any = "") -> None:
    raise _RefusalError(Limits.now().text(message))


def _strftime_now(form: str) -> str:
    if len(form) > 200 or re.sub("%-?[A-Za-z%]", "", form).count("%"):
        raise TemplateLimitError("strftime_now was asked for a form that is not a date's")
    return datetime.now().strftime(form)
