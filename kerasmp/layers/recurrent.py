"""Recurrent layers and cells that cast each kernel once per call, not once per time step."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
from keras import ops

from kerasmp.backend import current
from kerasmp.backend.keras_internals import AutocastScope, flatten_layers
from kerasmp.layers.base import drop_in
from kerasmp.ops.precision import upcast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# ------------------------------------------------------------------------------------------ cells


class _LoopWeights(NamedTuple):
    """The weights of a cell, as read before the first time step.

    Args:
        kernels: By attribute name, the kernel in its own dtype and in the compute dtype.
        bias: The bias in its own dtype, or None.
        inputs_projected: Whether `call` gets the product of the inputs and the kernel as `inputs`.
    """

    kernels: dict[str, tuple[Any, Any]]
    bias: Any
    inputs_projected: bool = False


# By `id(cell)`, for the cells whose loops run in this context. They are not stored in the cells,
# because another thread may call the same cell, and a cell may contain a layer with a loop.
_LOOP_WEIGHTS: ContextVar[Mapping[int, _LoopWeights]] = ContextVar(
    "loop_weights", default=MappingProxyType({})
)


@contextlib.contextmanager
def _in_loop(cell: Any, weights: _LoopWeights) -> Iterator[None]:
    token = _LOOP_WEIGHTS.set({**_LOOP_WEIGHTS.get(), id(cell): weights})
    try:
        yield
    finally:
        _LOOP_WEIGHTS.reset(token)


def _use_cast(master: Any, cast: Any) -> tuple[Any, Any]:
    """Return `cast`, a copy of `master` made outside the loop, with the gradient of a cast inside.

    Otherwise its gradient would be summed over the time steps in the dtype of `cast`, which after
    200 steps in float16 doubles the error.
    """
    dtype = keras.backend.standardize_dtype(master.dtype)

    # On torch, Keras also passes the inputs, and passes the gradient by name.
    def gradient(*args: Any, upstream: Any = None) -> tuple[Any, None]:
        return ops.cast(args[0] if upstream is None else upstream, dtype), None

    return cast, gradient


class _Kernel:
    """A descriptor that returns the variable, and inside a loop the kernel read before it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, cell: Any, value: Any) -> None:
        vars(cell)[self.name] = value

    def __get__(self, cell: Any, owner: type | None = None) -> Any:
        if cell is None:
            return self
        if self.name not in vars(cell):
            raise AttributeError(self.name)  # the cell is not built
        weights = _LOOP_WEIGHTS.get().get(id(cell))
        kernel = weights.kernels.get(self.name) if weights else None
        return vars(cell)[self.name] if kernel is None else ops.custom_gradient(_use_cast)(*kernel)


class LoopCell(keras.layers.Layer):
    """A mixin for cells whose weights a loop over time steps reads once.

    Products are computed in the compute dtype, and everything between them in float32, including
    the gradient of the bias, a sum over the batch.
    """

    kernel = _Kernel()
    recurrent_kernel = _Kernel()

    @contextlib.contextmanager
    def read_weights(self) -> Iterator[None]:
        """Read each weight now, for all steps of the loop that runs in this context."""
        if self.compute_dtype == self.variable_dtype:
            yield
            return
        kernels = {}
        for name in ("kernel", "recurrent_kernel"):
            master = _read(vars(self)[name])
            kernels[name] = (master, ops.cast(master, self.compute_dtype))
        with _in_loop(self, _LoopWeights(kernels, _read(self.bias))):
            yield

    @contextlib.contextmanager
    def project(self, sequences: Any, *, training: bool) -> Iterator[Any]:
        """Yield the inputs of the loop: if possible, one product with the kernel for all steps.

        Call this within `read_weights`.
        """
        drops = training and self.dropout > 0
        if drops or self.compute_dtype == self.variable_dtype:
            yield sequences
            return
        projected = ops.matmul(ops.cast(sequences, self.compute_dtype), self.kernel)
        weights = _LOOP_WEIGHTS.get()[id(self)]
        with _in_loop(self, weights._replace(inputs_projected=True)):
            yield projected

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's signature
        """Compute the output of one step and the new states, in the compute dtype."""
        if self.compute_dtype == self.variable_dtype:
            return super().call(inputs, states, training=training)
        weights = _LOOP_WEIGHTS.get().get(id(self))
        if not (weights and weights.inputs_projected):
            drops = training and 0 < self.dropout < 1
            mask = self.get_dropout_mask(inputs) if drops else None
            inputs = _product(inputs, self.kernel, mask)
        drops = training and 0 < self.recurrent_dropout < 1
        mask = self.get_recurrent_dropout_mask(_first(states)) if drops else None
        results = self._step(self._upcast(inputs), states, mask)
        return keras.tree.map_structure(lambda x: ops.cast(x, self.compute_dtype), results)

    def _create_dropout_mask(self, step_input: Any, dropout_rate: float) -> Any:
        """Return masks drawn in float32, where Keras draws them in the dtype of the input.

        The public methods return masks, but create only those that do not exist yet. The tests of
        the fraction of zeros fail when Keras moves this method.
        """
        masks = super()._create_dropout_mask(upcast(step_input), dropout_rate)
        return keras.tree.map_structure(lambda mask: ops.cast(mask, step_input.dtype), masks)

    def _upcast(self, tensor: Any) -> Any:
        return ops.cast(tensor, self.variable_dtype)

    def _float32_bias(self) -> Any:
        """Return the bias without a cast, so that its gradient is summed in float32."""
        weights = _LOOP_WEIGHTS.get().get(id(self))
        return weights.bias if weights else _read(self.bias)

    def _step(self, projected: Any, states: Any, mask: Any) -> Any:
        """Compute one step with float32 gates.

        Args:
            projected: The product of the inputs and the kernel, in float32.
            states: The previous states, in the compute dtype.
            mask: The dropout mask for the previous output: None, or as Keras creates them, one mask
                for all gates or a list with one for each.
        """
        raise NotImplementedError


def _read(variable: Any) -> Any:
    """Return the value of a variable in its own dtype, and None for None."""
    with AutocastScope(None):  # convert_to_tensor may return the variable itself
        return None if variable is None else ops.copy(variable)


def _first(states: Any) -> Any:
    return keras.tree.flatten(states)[0]  # the state of a GRU may be a tensor or a list


def _product(inputs: Any, kernel: Any, mask: Any) -> Any:
    """Multiply the inputs, with dropout if there is a mask, by the kernels of all gates."""
    if not isinstance(mask, list):
        return ops.matmul(inputs if mask is None else inputs * mask, kernel)
    kernels = ops.split(kernel, len(mask), axis=-1)
    products = [ops.matmul(inputs * m, k) for m, k in zip(mask, kernels, strict=True)]
    return ops.concatenate(products, axis=-1)


_HOCHREITER = "[Hochreiter and Schmidhuber, 1997](https://doi.org/10.1162/neco.1997.9.8.1735)"
_CHO = "[Cho et al., 2014](https://arxiv.org/abs/1406.1078)"


@drop_in(
    units="The size of the output and of each of the two states.",
    inputs="Inputs `(batch, features)` and two states `(batch, units)`",
    outputs="The output `(batch, units)` and the two new states",
    source=_HOCHREITER,
)
class LSTMCell(LoopCell, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell` whose kernels `kerasmp.layers.RNN` casts once for all time steps.

    Example:

    >>> layer = RNN([LSTMCell(3), LSTMCell(2)], dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 2)
    True
    """

    def _step(self, projected: Any, states: Any, mask: Any) -> Any:
        output, carry = states
        gates = projected + self._upcast(_product(output, self.recurrent_kernel, mask))
        if self.use_bias:
            gates = gates + self._float32_bias()
        enter, forget, candidate, leave = ops.split(gates, 4, axis=-1)
        gate = self.recurrent_activation
        carry = gate(forget) * self._upcast(carry) + gate(enter) * self.activation(candidate)
        output = gate(leave) * self.activation(carry)
        return output, [output, carry]


@drop_in(
    units="The size of the output, which is also the state.",
    inputs="Inputs `(batch, features)` and a state `(batch, units)`",
    outputs="The output `(batch, units)` and the new state",
    source=_CHO,
)
class GRUCell(LoopCell, keras.layers.GRUCell):
    """`keras.layers.GRUCell` whose kernels `kerasmp.layers.RNN` casts once for all time steps.

    Example:

    >>> layer = RNN(GRUCell(3), dtype="mixed_float16", return_sequences=True)
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 4, 3)
    True
    """

    def _step(self, projected: Any, states: Any, mask: Any) -> Any:
        state = _first(states)
        gates_mask, candidate_mask = mask, None
        kernel = self.recurrent_kernel
        if not self.reset_after:  # the candidate has a product of its own, with the reset state
            kernel, candidate_kernel = ops.split(kernel, [2 * self.units], axis=-1)
            gates_mask, candidate_mask = (mask[:2], mask[2]) if mask else (None, None)
        recurrent = self._upcast(_product(state, kernel, gates_mask))
        if self.use_bias and self.reset_after:
            input_bias, recurrent_bias = ops.unstack(self._float32_bias())
            projected, recurrent = projected + input_bias, recurrent + recurrent_bias
        elif self.use_bias:
            projected = projected + self._float32_bias()
        update, reset, candidate = ops.split(projected, 3, axis=-1)
        recurrent = ops.split(recurrent, 3 if self.reset_after else 2, axis=-1)
        update = self.recurrent_activation(update + recurrent[0])
        reset = self.recurrent_activation(reset + recurrent[1])
        if self.reset_after:
            candidate = self.activation(candidate + reset * recurrent[2])
        else:
            reset_state = ops.cast(reset * self._upcast(state), self.compute_dtype)
            product = self._upcast(_product(reset_state, candidate_kernel, candidate_mask))
            candidate = self.activation(candidate + product)
        state = update * self._upcast(state) + (1 - update) * candidate
        return state, [state] if keras.tree.is_nested(states) else state


# ----------------------------------------------------------------------------------------- layers


def _loop_cells(cell: Any) -> list[LoopCell]:
    """Return the cell and the cells inside it whose weights this loop may read once."""
    parts = flatten_layers(cell) if isinstance(cell, keras.Layer) else []
    # A recurrent layer inside a cell has a loop of its own, which may compute in another dtype.
    in_other_loops = {
        id(c) for part in parts if isinstance(part, keras.layers.RNN) for c in flatten_layers(part)
    }
    return [part for part in parts if isinstance(part, LoopCell) and id(part) not in in_other_loops]


@drop_in(
    cell="A cell or a list of cells, such as `kerasmp.layers.LSTMCell` and `GRUCell`.",
    inputs="`(batch, steps, ...)`",
    outputs="`(batch, units)`, or `(batch, steps, units)` with `return_sequences=True`, and the "
    "states of the cell with `return_state=True`",
    source="[Micikevicius et al., 2018](https://arxiv.org/abs/1710.03740), section 3.1: float32 "
    "weights, of which each iteration uses a float16 copy.",
)
class RNN(keras.layers.RNN):
    """`keras.layers.RNN` that reads the weights of kerasmp's cells once, before the loop.

    Stock Keras casts float32 kernels to float16 in each time step. This layer casts them once, and
    still sums their gradients over the time steps in float32. Other cells run as in stock Keras.

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
        training: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        """Run the cell over the time steps, as in `keras.layers.RNN`."""
        with contextlib.ExitStack() as stack:
            for cell in _loop_cells(self.cell):
                stack.enter_context(cell.read_weights())
            if isinstance(self.cell, LoopCell):
                sequences = stack.enter_context(self.cell.project(sequences, training=training))
            return super().inner_loop(sequences, initial_state, mask=mask, training=training)


class _FusedLoop(keras.layers.Layer):
    """A mixin before LSTM and GRU, whose loop may be a fused one of the backend, such as cuDNN's.

    The loop runs in the dtype that the fused one needs.
    """

    _cell_class: type[LoopCell]

    def __init__(self, units: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(units, *args, **kwargs)
        # Keras's constructor creates a stock cell and cannot create another one.
        self.cell.__class__ = self._cell_class

    def inner_loop(
        self,
        sequences: Any,
        initial_state: Any,
        mask: Any,
        training: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        """Run the cell over the time steps, as in `keras.layers.RNN`."""
        dtype = current().rnn_dtype(self.cell.compute_dtype)
        if dtype == self.cell.compute_dtype:
            return super().inner_loop(sequences, initial_state, mask, training=training)
        with AutocastScope(dtype):
            sequences, initial_state = keras.tree.map_structure(
                lambda x: ops.cast(x, dtype), (sequences, initial_state)
            )
            return super().inner_loop(sequences, initial_state, mask, training=training)


_PROSE = """
    Under "mixed_float16" a stock layer with 32 time steps casts its kernels and bias 33 times. This
    layer casts them once, and multiplies the inputs of all steps by their kernel in a single
    product unless there is dropout. Everything between the products is float32. The gradients of
    the kernels, sums over the steps, and of the bias, a sum over steps and batch, are summed in
    float32. Where Keras uses cuDNN, this layer uses it as well.
"""


@drop_in(
    _PROSE,
    units="The size of the output.",
    inputs="`(batch, steps, features)`",
    outputs="`(batch, units)`, or `(batch, steps, units)` with `return_sequences=True`, and two "
    "states `(batch, units)` with `return_state=True`",
    source=_HOCHREITER,
)
class LSTM(_FusedLoop, keras.layers.LSTM, RNN):
    """`keras.layers.LSTM` that casts each kernel once per call, not once per time step.

    Example:

    >>> layer = LSTM(3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 3)
    True
    """

    _cell_class = LSTMCell


@drop_in(
    _PROSE,
    units="The size of the output, which is also the state.",
    inputs="`(batch, steps, features)`",
    outputs="`(batch, units)`, or `(batch, steps, units)` with `return_sequences=True`, and the "
    "state `(batch, units)` with `return_state=True`",
    source=_CHO,
)
class GRU(_FusedLoop, keras.layers.GRU, RNN):
    """`keras.layers.GRU` that casts each kernel once per call, not once per time step.

    Example:

    >>> layer = GRU(3, dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 3)
    True
    """

    _cell_class = GRUCell

    def inner_loop(
        self,
        sequences: Any,
        initial_state: Any,
        mask: Any,
        training: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        """Run the cell over the time steps, as in `keras.layers.RNN`."""
        cell = self.cell
        if not current().GRU_SUMS_IN_COMPUTE_DTYPE or cell.compute_dtype == cell.variable_dtype:
            return super().inner_loop(sequences, initial_state, mask, training)
        # Keras's own fused loop on this backend, not cuDNN, sums gradients in the compute dtype.
        mask = mask[0] if keras.tree.is_nested(mask) else mask
        return RNN.inner_loop(self, sequences, initial_state, mask, training)
