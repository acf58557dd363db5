"""Docstrings built from tables, for classes and functions that differ in only a few words."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def documented(prose: str = "", /, **sections: str | dict[str, str]) -> Callable[[T], T]:
    """Return a decorator that adds sections to a docstring.

    Args:
        prose: A paragraph that follows the docstring's own text. In all texts, `{name}` stands for
            the name of the decorated class or function.
        **sections: The text of each section by its name, in order; `output_shape` gets the title
            "Output shape:". A dict becomes one entry per key, and the lines of `example` are kept
            as they are. Empty sections are left out. If the docstring has an `Example:` of its
            own, the sections come before it.

    Example:

    >>> @documented("See `math`.", args={"x": "A number."}, raises="", returns="Twice `x`.")
    ... def double(x):
    ...     '''Double a number.'''
    ...     return 2 * x
    >>> print(double.__doc__)
    Double a number.
    <BLANKLINE>
    See `math`.
    <BLANKLINE>
    Args:
        x: A number.
    <BLANKLINE>
    Returns:
        Twice `x`.
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
