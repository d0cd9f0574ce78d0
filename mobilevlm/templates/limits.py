"""Budget of a chat template that is rendered, and the size of everything that it may do.

One unit is a step of the template, an item of a list that is looked at, or 32 bytes of text that is
made or read. What would take more than the rest of the budget is refused before it is done.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

UNITS = 500_000
"""A chat of a hundred messages takes some tens of thousands."""
CHARACTERS = 1 << 22
"""Longest text."""
WIDTH = 10_000
"""Largest number that a filter or a method of text takes."""
INTEGER_BITS = 256
DEPTH = 64
"""Most lists inside each other."""

_PERCENT = re.compile(r"%(?:%|(?:\(\w*\))?[-#0 +]?\d{0,3}(?:\.\d{0,3})?[a-zA-Z])")
_BRACES = re.compile(
    r"\{\{|\}\}"
    r"|\{[\w.\[\]]*(?:![rsa])?(?::[^{}\d]{0,4}\d{0,3}[,_]?(?:\.\d{0,3})?[a-zA-Z%]?)?\}"
)
"""Fields of ``str.format`` and ``%`` with widths below a thousand; any other is refused."""
_FIELD = 2000
"""Characters that a formatted number has at most."""
_BY_ITEM = frozenset(
    (
        *("batch", "dictsort", "first", "groupby", "join", "last", "list", "map", "max", "min"),
        *("reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "striptags"),
        *("sum", "title", "unique", "wordcount"),
    )
)
"""Filters that go through a text letter by letter."""
_SORTING = frozenset(["dictsort", "groupby", "max", "min", "sort", "unique"])
_SORTING_COST = 20
_SPLITTING = frozenset(["partition", "rpartition", "rsplit", "split", "splitlines"])


class TemplateLimitError(SecurityError):
    """A chat template that asks for too much."""


class Limits:
    """Budget of one rendering."""

    def __init__(self) -> None:
        self._left = UNITS

    @staticmethod
    @contextmanager
    def begin() -> Iterator[None]:
        """Give everything in the block one new budget."""
        token = _CURRENT.set(Limits())
        try:
            yield
        finally:
            _CURRENT.reset(token)

    @staticmethod
    def now() -> Limits:
        """Return the budget of the rendering that runs."""
        return _CURRENT.get()

    def spend(self, units: int) -> None:
        """Take units from the budget."""
        self._left -= units
        if self._left < 0:
            raise TemplateLimitError(f"it takes more than {UNITS} steps, many more than a chat")

    def size(self, value: Any) -> int:
        """Return the units of a value with all that is in it, and spend them."""
        spent = 0
        rest: list[tuple[Any, int]] = [(value, 0)]
        while rest:
            item, depth = rest.pop()
            spent += 1
            if isinstance(item, str):
                spent += len(item) >> 5
            elif isinstance(item, range):
                spent += len(item)
            elif isinstance(item, dict):
                spent += len(item)
                rest += [(part, depth + 1) for pair in item.items() for part in pair]
            elif isinstance(item, _LISTS):
                spent += len(item)
                if spent <= self._left:
                    rest += [(part, depth + 1) for part in item]
            elif depth > 0 and isinstance(item, Namespace):
                raise TemplateLimitError("it puts a namespace into a list or another namespace")
            if depth > DEPTH:
                raise TemplateLimitError(f"it makes lists of more than {DEPTH} levels")
            if spent > self._left:
                break
        self.spend(spent)
        return spent

    def depth_of(self, value: Any) -> int:
        """Return how many lists of a value are inside each other, and spend its size."""
        deepest, level = 0, [value]
        while level:
            self.spend(len(level))
            deepest += 1
            lists = [item.values() if isinstance(item, dict) else item for item in level]
            level = [part for item in lists if isinstance(item, _LISTS) for part in item]
        return deepest

    def made(self, value: Any) -> Any:
        """Return a value that the template has made, if it is small enough."""
        if isinstance(value, str):
            if len(value) > CHARACTERS:
                raise TemplateLimitError(f"it makes a text of more than {CHARACTERS} characters")
            self.spend(1 + (value.__sizeof__() >> 5))
        elif isinstance(value, int):
            if value.bit_length() > INTEGER_BITS:
                raise TemplateLimitError(f"it makes a number of more than {INTEGER_BITS} bits")
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.each(value, 1)
        elif isinstance(value, (*_LISTS, dict)):
            self.size(value)
        return value

    def each(self, values: Any, cost: int) -> Iterator[Any]:
        """Return the items of a value one by one, at a cost for each."""
        for item in values:
            self.spend(cost)
            yield item

    def text(self, value: Any) -> str:
        """Return a value as text."""
        if isinstance(value, Namespace):
            raise TemplateLimitError("it shows a namespace as text")
        self.size(value)
        return str(self.made(str(value)))

    def room(self, characters: int) -> None:
        """Raise if a text of so many characters must not be made."""
        if characters > CHARACTERS:
            raise TemplateLimitError(f"it makes a text of more than {CHARACTERS} characters")
        self.spend(characters >> 5)


_LISTS: tuple[type[Collection[Any]], ...] = (
    list,
    tuple,
    set,
    frozenset,
    *map(type, ({}.items(), {}.keys(), {}.values())),
)
_CURRENT: ContextVar[Limits] = ContextVar("limits of the template that is rendered")


def check_operator(limits: Limits, operator: str, left: Any, right: Any) -> None:
    """Raise if the result of ``left operator right`` would be too large."""
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * right > INTEGER_BITS:
            raise TemplateLimitError(f"it makes a number of more than {INTEGER_BITS} bits")
    elif operator == "*" and isinstance(left, _REPEATED) != isinstance(right, _REPEATED):
        sequence, times = (left, right) if isinstance(left, _REPEATED) else (right, left)
        if isinstance(times, int):
            _check_repeated(limits, sequence, max(0, times))
    elif operator == "%" and isinstance(left, str):
        check_percent(limits, left, right)
    elif operator == "+":
        limits.size(left)
        limits.size(right)


_REPEATED = (str, list, tuple)


def _check_repeated(limits: Limits, sequence: Any, times: int) -> None:
    if isinstance(sequence, str):
        limits.room(len(sequence) * times)
    else:
        limits.spend(limits.size(sequence) * times)


def check_percent(limits: Limits, text: str, values: Any) -> None:
    """Raise if ``text % values`` could be large: a width of four digits or ``*``, or long values
    that are used many times."""
    if "%" in _PERCENT.sub("", text):
        raise TemplateLimitError("it formats with % in a way that is not for chat templates")
    limits.room(len(text) + text.count("%") * (_FIELD + 32 * limits.size(values)))


def check_braces(limits: Limits, text: str, values: Any) -> None:
    """Raise if ``text.format(values)`` could be large."""
    rest = _BRACES.sub("", text)
    if "{" in rest or "}" in rest:
        raise TemplateLimitError("it uses str.format in a way that is not for chat templates")
    limits.room(len(text) + text.count("{") * (_FIELD + 32 * limits.size(values)))


def check_method(
    limits: Limits, owner: str, name: str, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments for a method of text; raise if its result could be too large."""
    limits.spend(1 + (len(owner) >> 5))
    if name == "join" and args:
        args = (_joined_items(limits, args[0], len(owner)),)
    for value in args:
        _check_number(value)
        limits.size(value)
    if name == "replace" and len(args) >= 2:
        _check_replaced(limits, owner, args[0], args[1])
    elif name in _SPLITTING:
        limits.spend(len(owner) >> 2)
    return args


def check_filter(
    limits: Limits, name: str, value: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """Return the value for one of jinja2's filters; raise if its result could be too large."""
    units = limits.size(value)
    options = (*args, *named.values())
    for option in options:
        limits.size(option)
        if name not in ("d", "default"):
            _check_number(option)
    if name in _BY_ITEM and isinstance(value, str):
        limits.spend(len(value))
    if name in _SORTING:
        limits.spend(units * _SORTING_COST)
    if name == "join":
        mark = named.get("d", args[0] if args else "")
        return _joined_items(limits, value, len(limits.text(mark)))
    if name == "format":
        check_percent(limits, str(value), options)
    elif name == "replace":
        text = limits.text(value)
        old, new = (*args, named.get("old"), named.get("new"))[:2]
        _check_replaced(limits, text, named.get("old", old), named.get("new", new))
    elif name == "indent":
        text, width = limits.text(value), named.get("width", args[0] if args else 4)
        limits.spend(len(text) >> 2)
        width = len(width) if isinstance(width, str) else int(width)
        limits.room(len(text) + len(text.splitlines()) * max(0, width))
    elif name == "sum" and not all(isinstance(option, int | float | str) for option in options):
        raise TemplateLimitError("it adds up what are not numbers")
    return value


def _check_number(value: Any) -> None:
    if isinstance(value, int) and abs(value) > WIDTH:
        raise TemplateLimitError(f"it gives a number above {WIDTH} to a filter or a method")


def _joined_items(limits: Limits, values: Iterable[Any], mark: int) -> list[Any]:
    """Return items that are joined; raise if their text would be too long."""
    items = list(limits.each(values, 1 + (mark >> 5)))
    limits.room(32 * limits.size(items) + mark * len(items))
    return items


def _check_replaced(limits: Limits, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        times = text.count(old) if old else len(text) + 1
        limits.room(len(text) + times * len(new))
