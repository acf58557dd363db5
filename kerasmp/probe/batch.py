"""Checks a batch: whether it is one, fits the model, and is finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend.keras_graph import graph_of
from kerasmp.errors import ArgumentError, with_type
from kerasmp.probe.arrays import is_float, nonfinite, to_numpy
from kerasmp.probe.finding import Finding
from kerasmp.probe.findings import count

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_batch(model: Any, x: Any, name: str = "x") -> Any:
    """Return a batch with arrays in place of tensors and lists.

    Args:
        model: The model.
        x: The batch.
        name: The name of the argument, for the message.

    Raises:
        ArgumentError: If it is not a batch, or does not fit the inputs of the model.
    """
    given, x = x, keras.tree.map_structure(np.asarray, x)
    arrays = _in_order(model, x)
    if not arrays or not all(array.ndim and array.size for array in arrays):
        raise ArgumentError(
            f"`{name}` is not a batch.",
            received=with_type(given),
            expected="arrays with values, whose first axis is the batch",
            fix="Pass the same batch as to model.predict_on_batch.",
        )
    _check_inputs(model, arrays, name)
    return x


def _in_order(model: Any, x: Any) -> list[Any]:
    """Return the arrays of a batch in the order of the model's inputs."""
    graph = graph_of(model)
    if isinstance(x, dict) and graph is not None and not isinstance(graph.input, dict):
        names = [tensor.name for tensor in graph.inputs]
        if x.keys() >= set(names):  # like Keras, which ignores further names
            x = [x[name] for name in names]
    return list(keras.tree.flatten(x))


def _check_inputs(model: Any, arrays: list[Any], name: str) -> None:
    """Raise an error if a batch does not fit the model's inputs."""
    graph = graph_of(model)
    expected = [tuple(tensor.shape) for tensor in graph.inputs] if graph is not None else None
    received = [array.shape for array in arrays]
    fits = expected is None or (
        len(expected) == len(received)
        and all(
            len(one) != len(other)  # Keras may add or drop an axis
            or all(a in {None, b} for a, b in zip(one, other, strict=True))
            for one, other in zip(expected, received, strict=True)
        )
    )
    if not fits or any(array.dtype.kind == "c" for array in arrays):
        raise ArgumentError(
            f"`{name}` does not fit the inputs of this model.",
            received=", ".join(f"{array.dtype} of shape {array.shape}" for array in arrays),
            expected="real numbers" if fits else f"arrays of the shapes {expected}",
            fix="Pass the same batch as to model.predict_on_batch.",
        )


def data_findings(**data: Any) -> Iterator[Finding]:
    """Yield a finding for each array of a batch that has inf or NaN.

    Args:
        **data: The parts of the batch, arrays in any structure or None, by what they are called.
    """
    for name, part in data.items():
        for path, array in keras.tree.flatten_with_path(part):
            on_host = to_numpy(array) if is_float(array) else array
            lost = nonfinite(on_host) if isinstance(on_host, np.ndarray) else 0
            if lost:
                yield Finding(
                    "error",
                    "/".join([name, *map(str, path)]),
                    "nonfinite-data",
                    f"{count(lost, on_host.size)} are inf or NaN. Half precision is not the cause.",
                    "Find the cause, and replace these values or drop their rows.",
                )
