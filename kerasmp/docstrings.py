"""Docstrings made from a table, for classes and functions that differ in a few words only."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def documented(prose: str = "", /, **sections: str | dict[str, str]) -> Callable[[T], T]:
    """Return a decorator that adds to a docstring what a table says.

    Args:
        prose: A paragraph. In all texts `{name}` stands for the name of what is decorated.
        **sections: Each becomes a section, in this order, before an `Example:` that the docstring
            has; `output_shape` gets the title "Output shape:". A dict has a paragraph for each
            name, and `example` lines that stay as they are. What is empty is left out.

    Example:

    >>> @documented("See `math`.", args={"x": "A number."}, raises="", returns="`{name}` of it.")
    ... def double(x):
    ...     '''Return twice the number.'''
    ...     return 2 * x
    >>> print(double.__doc__)
    Return twice the number.
    <BLANKLINE>
    See `math`.
    <BLANKLINE>
    Args:
        x: A number.
    <BLANKLINE>
    Returns:
        `double` of it.
    """

    def document(thing: T) -> T:
        own, title, example = inspect.cleandoc(thing.__doc__ or "").partition("\n\nExample:")
        made = [_section(*each) for each in sections.items() if each[1]]
        text = "\n\n".join(filter(None, [own, _fill(prose), *made])) + title + example
        thing.__doc__ = text.replace("{name}", thing.__name__)
        return thing

    return document


def _section(name: str, content: str | dict[str, str]) -> str:
    title = f"{name.replace('_', ' ').capitalize()}:\n"
    if name == "example":
        return f"{title}\n{content}"
    if isinstance(content, str):
        return title + _fill(content, 4, 4)
    return title + "\n".join(_fill(f"{key}: {text}", 4, 8) for key, text in content.items())


def _fill(text: str, indent: int = 0, hang: int = 0) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        96,
        initial_indent=" " * indent,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
