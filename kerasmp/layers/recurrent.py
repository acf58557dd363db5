"""Recurrent layers that cast each kernel once a call, not once a time step."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.backend.keras_internals import AutocastScope, flatten_layers
from kerasmp.layers.recurrent_cells import EarlyCast, GRUCell, LSTMCell
from kerasmp.layers.twin import twin

if TYPE_CHECKING:
    from collections.abc import Callable


@twin(
    cell="A cell or a list of cells, `kerasmp.layers.LSTMCell` and `GRUCell` among them.",
    inputs="`(batch, steps, ...)`",
    outputs="`(batch, units)`, or `(batch, steps, units)` with `return_sequences=True`, and the "
    "states of the cell with `return_state=True`",
    source="[Micikevicius et al., 2018](https://arxiv.org/abs/1710.03740), section 3.1: float32 "
    "weights, of which each iteration uses a float16 copy.",
)
class RNN(keras.layers.RNN):
    """`keras.layers.RNN` that reads the weights of kerasmp's cells before the loop.

    Stock Keras casts float32 kernels to float16 in each time step. Here they are cast once, and
    their gradients are still summed over the steps in float32. Other cells run as in stock Keras.

    Example:

    >>> layer = RNN(LSTMCell(3), dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 3)
    True
    """

    def inner_loop(
        self,
        sequences: Any,
        initial_state: Any,
        mask: Any,
        training: bool = False,
    ) -> Any:
        """Run the cell over the time steps; see `keras.layers.RNN`."""
        with contextlib.ExitStack() as stack:
            for cell in _cells_of_the_loop(self.cell):
                stack.enter_context(cell.read_early())
            if isinstance(self.cell, EarlyCast):
                sequences = stack.enter_context(self.cell.projecting(sequences, training=training))
            return super().inner_loop(sequences, initial_state, mask=mask, training=training)


_PROSE = """
    In stock Keras a layer of 32 steps under "mixed_float16" casts its kernels and bias 33 times
    over. Here they are cast once, and the inputs are multiplied by their kernel in one product for
    all steps, unless there is dropout. Between the products all is float32; gradients of kernels
    are summed over the steps, and those of the bias over steps and batch, in float32. Where Keras
    finds cuDNN, it is used as in stock Keras.
"""


@twin(
    _PROSE,
    units="Size of the output.",
    inputs="`(batch, steps, features)`",
    outputs="`(batch, units)`, or `(batch, steps, units)` with `return_sequences=True`, and two "
    "states `(batch, units)` with `return_state=True`",
    source="[Hochreiter and Schmidhuber, 1997](https://doi.org/10.1162/neco.1997.9.8.1735)",
)
class LSTM(keras.layers.LSTM, RNN):
    """`keras.layers.LSTM` that casts each kernel once a call, not once a time step.

    Example:

    >>> layer = LSTM(3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 3)
    True
    """

    def __init__(self, units: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(units, *args, **kwargs)
        # Keras's constructor makes a cell of its own class and offers no other.
        self.cell.__class__ = LSTMCell

    def inner_loop(
        self,
        sequences: Any,
        initial_state: Any,
        mask: Any,
        training: bool = False,
    ) -> Any:
        """Run the cell over the time steps; see `keras.layers.RNN`."""
        return _widened(self, super().inner_loop, (sequences, initial_state), mask, training)


@twin(
    _PROSE,
    units="Size of the output, which is the state.",
    inputs="`(batch, steps, features)`",
    outputs="`(batch, units)`, or `(batch, steps, units)` with `return_sequences=True`, and the "
    "state `(batch, units)` with `return_state=True`",
    source="[Cho et al., 2014](https://arxiv.org/abs/1406.1078)",
)
class GRU(keras.layers.GRU, RNN):
    """`keras.layers.GRU` that casts each kernel once a call, not once a time step.

    Example:

    >>> layer = GRU(3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 3)
    True
    """

    def __init__(self, units: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(units, *args, **kwargs)
        self.cell.__class__ = GRUCell

    def inner_loop(
        self,
        sequences: Any,
        initial_state: Any,
        mask: Any,
        training: bool = False,
    ) -> Any:
        """Run the cell over the time steps; see `keras.layers.RNN`."""
        if (
            current().GRU_SUMS_IN_COMPUTE_DTYPE
            and self.cell.compute_dtype != self.cell.variable_dtype
        ):
            # Keras has a loop of its own here, no cuDNN, that sums gradients in the compute dtype.
            mask = mask[0] if keras.tree.is_nested(mask) else mask
            return RNN.inner_loop(self, sequences, initial_state, mask, training)
        return _widened(self, super().inner_loop, (sequences, initial_state), mask, training)


def _cells_of_the_loop(cell: Any) -> list[EarlyCast]:
    """Return the cells, the one given and those inside, whose weights this loop may read early."""
    parts = flatten_layers(cell) if isinstance(cell, keras.Layer) else []
    # A layer inside has a loop of its own, which may read them in another dtype.
    own = {
        id(c) for part in parts if isinstance(part, keras.layers.RNN) for c in flatten_layers(part)
    }
    return [part for part in parts if isinstance(part, EarlyCast) and id(part) not in own]


def _widened(
    layer: Any,
    loop: Callable[..., Any],
    tensors: tuple[Any, Any],
    mask: Any,
    training: bool,
) -> Any:
    """Run Keras's loop, which may be the backend's own, in the dtype that the latter needs."""
    dtype = current().rnn_dtype(layer.cell.compute_dtype)
    if dtype == layer.cell.compute_dtype:
        return loop(*tensors, mask, training=training)
    with AutocastScope(dtype):
        tensors = keras.tree.map_structure(lambda x: ops.cast(x, dtype), tensors)
        return loop(*tensors, mask, training=training)
