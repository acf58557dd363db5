"""What each layer under the name of one of Keras's has: a name in files, and a docstring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerasmp.docstrings import T, documented
from kerasmp.ops.precision import registered

if TYPE_CHECKING:
    from collections.abc import Callable


def twin(
    prose: str = "",
    *,
    inputs: str = "Any",
    outputs: str = "As the input",
    raises: str = "",
    source: str = "",
    example: str = "",
    **args: str,
) -> Callable[[T], T]:
    """Return a decorator that registers a layer with Keras, and completes its docstring.

    Args:
        prose: A paragraph on what the layer does.
        inputs: Their shape.
        outputs: Their shape.
        raises: When there is a ValueError.
        source: Where the layer comes from.
        example: Its lines; default those that the docstring has.
        **args: What the arguments of the constructor are; those left out are left to Keras.
    """
    document = documented(
        prose,
        args={**args, "**kwargs": "As for `keras.layers.{name}`."},
        input_shape=f"{inputs}, of any float dtype.",
        output_shape=f"{outputs}, in the policy's compute dtype.",
        raises={"ValueError": raises} if raises else "",
        references=source,
        example=example,
    )
    return lambda cls: registered(document(cls))
