"""Cells whose kernels are cast before the loop over time steps, and not in it."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
from keras import ops

from kerasmp.backend.keras_internals import AutocastScope
from kerasmp.layers.twin import twin
from kerasmp.ops.precision import upcast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class _Early(NamedTuple):
    """What a loop knows of a cell before its first step.

    Args:
        kernels: By name, what was read of each: as it is, and in the compute dtype.
        bias: What was read of it, as it is; None without one.
        projected: Whether `inputs` of `call` are the product of the inputs and the kernel.
    """

    kernels: dict[str, tuple[Any, Any]]
    bias: Any
    projected: bool = False


# Of the cells whose loops run in this context, by `id(cell)`. Not in the cells: another thread may
# be calling them, and a cell may hold a layer whose loop runs inside of this one.
_EARLY: ContextVar[Mapping[int, _Early]] = ContextVar("early", default=MappingProxyType({}))


@contextlib.contextmanager
def _known(cell: Any, early: _Early) -> Iterator[None]:
    before = _EARLY.set({**_EARLY.get(), id(cell): early})
    try:
        yield
    finally:
        _EARLY.reset(before)


def _cast_before(master: Any, cast: Any) -> tuple[Any, Any]:
    """Return `cast`, which is `master` cast outside the loop, and its gradient as if cast inside.

    Were `cast` used as it is, its gradient would be summed over the steps in its own dtype: after
    200 steps in float16 that doubles the error.
    """
    dtype = keras.backend.standardize_dtype(master.dtype)

    # Keras on torch hands on the inputs too, and names the gradient.
    def gradient(*args: Any, upstream: Any = None) -> tuple[Any, None]:
        return ops.cast(args[0] if upstream is None else upstream, dtype), None

    return cast, gradient


class _Kernel:
    """A cell's kernel: the variable; in a loop, what was read of it before."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, cell: Any, value: Any) -> None:
        vars(cell)[self.name] = value

    def __get__(self, cell: Any, owner: type | None = None) -> Any:
        if cell is None:
            return self
        if self.name not in vars(cell):
            raise AttributeError(self.name)  # not built
        known = _EARLY.get().get(id(cell))
        early = known.kernels.get(self.name) if known else None
        return vars(cell)[self.name] if early is None else ops.custom_gradient(_cast_before)(*early)


class EarlyCast(keras.layers.Layer):
    """What both cells share: weights that a loop reads once, and the loop's way to do so.

    Products are in the compute dtype, and what is between them is in float32: so is the gradient of
    the bias, a sum over the batch.
    """

    kernel = _Kernel()
    recurrent_kernel = _Kernel()

    @contextlib.contextmanager
    def read_early(self) -> Iterator[None]:
        """Read each weight now, for all steps of the loop that runs in this context."""
        if self.compute_dtype == self.variable_dtype:
            yield
            return
        kernels = {}
        for name in ("kernel", "recurrent_kernel"):
            master = _as_it_is(vars(self)[name])
            kernels[name] = (master, ops.cast(master, self.compute_dtype))
        with _known(self, _Early(kernels, _as_it_is(self.bias))):
            yield

    @contextlib.contextmanager
    def projecting(self, sequences: Any, *, training: bool) -> Iterator[Any]:
        """Yield what the steps of a loop take: one product for all of them, where it can be.

        The weights must have been read early.
        """
        dropping = training and self.dropout > 0
        if dropping or self.compute_dtype == self.variable_dtype:
            yield sequences
            return
        projected = ops.matmul(ops.cast(sequences, self.compute_dtype), self.kernel)
        with _known(self, _EARLY.get()[id(self)]._replace(projected=True)):
            yield projected

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        """Return the output of one step and the new states, in the compute dtype."""
        if self.compute_dtype == self.variable_dtype:
            return super().call(inputs, states, training=training)
        known = _EARLY.get().get(id(self))
        if not (known and known.projected):
            dropping = training and 0 < self.dropout < 1
            mask = self.get_dropout_mask(inputs) if dropping else None
            inputs = _product(inputs, self.kernel, mask)
        dropping = training and 0 < self.recurrent_dropout < 1
        mask = self.get_recurrent_dropout_mask(_first(states)) if dropping else None
        results = self._step(self._wide(inputs), states, mask)
        return keras.tree.map_structure(lambda x: ops.cast(x, self.compute_dtype), results)

    def _create_dropout_mask(self, step_input: Any, dropout_rate: float) -> Any:
        """Return masks drawn in float32: Keras draws them in the dtype of the input.

        Public methods return masks, but make them only where there are none. The tests of their
        share of zeros tell when this one moves.
        """
        masks = super()._create_dropout_mask(upcast(step_input), dropout_rate)
        return keras.tree.map_structure(lambda mask: ops.cast(mask, step_input.dtype), masks)

    def _wide(self, tensor: Any) -> Any:
        return ops.cast(tensor, self.variable_dtype)

    def _wide_bias(self) -> Any:
        """Return the bias as it is, in float32: so is the sum that is its gradient."""
        known = _EARLY.get().get(id(self))
        return known.bias if known else _as_it_is(self.bias)

    def _step(self, projected: Any, states: Any, mask: Any) -> Any:
        """Do a step whose gates are float32.

        Args:
            projected: The product of the inputs and their kernel.
            states: The old states, in the compute dtype.
            mask: What the old output is multiplied by before its product: None, or as Keras makes
                them, one for each gate or one for all.
        """
        raise NotImplementedError


def _as_it_is(variable: Any) -> Any:
    """Return what a variable holds, as a tensor in the variable's dtype; None for None."""
    with AutocastScope(None):  # convert_to_tensor may hand on the variable
        return None if variable is None else ops.copy(variable)


def _first(states: Any) -> Any:
    return keras.tree.flatten(states)[0]  # a GRU's may be one tensor, or a list of it


def _product(inputs: Any, kernel: Any, mask: Any) -> Any:
    """Return the product of inputs, of which some are dropped, and the kernels of all gates."""
    if not isinstance(mask, list):
        return ops.matmul(inputs if mask is None else inputs * mask, kernel)
    kernels = ops.split(kernel, len(mask), axis=-1)
    products = [ops.matmul(inputs * m, k) for m, k in zip(mask, kernels, strict=True)]
    return ops.concatenate(products, axis=-1)


@twin(
    units="Size of the output and of each of the two states.",
    inputs="Inputs `(batch, features)` and states, two of `(batch, units)`",
    outputs="The output, `(batch, units)`, and the two new states",
    source="[Hochreiter and Schmidhuber, 1997](https://doi.org/10.1162/neco.1997.9.8.1735)",
)
class LSTMCell(EarlyCast, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell` whose kernels `kerasmp.layers.RNN` casts once for all time steps.

    Example:

    >>> from kerasmp.layers import RNN
    >>> layer = RNN([LSTMCell(3), LSTMCell(2)], dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 2)
    True
    """

    def _step(self, projected: Any, states: Any, mask: Any) -> Any:
        output, carry = states
        gates = projected + self._wide(_product(output, self.recurrent_kernel, mask))
        if self.use_bias:
            gates = gates + self._wide_bias()
        enter, forget, candidate, leave = ops.split(gates, 4, axis=-1)
        gate = self.recurrent_activation
        carry = gate(forget) * self._wide(carry) + gate(enter) * self.activation(candidate)
        output = gate(leave) * self.activation(carry)
        return output, [output, carry]


@twin(
    units="Size of the output, which is the state.",
    inputs="Inputs `(batch, features)` and a state `(batch, units)`",
    outputs="The output, `(batch, units)`, and the new state",
    source="[Cho et al., 2014](https://arxiv.org/abs/1406.1078)",
)
class GRUCell(EarlyCast, keras.layers.GRUCell):
    """`keras.layers.GRUCell` whose kernels `kerasmp.layers.RNN` casts once for all time steps.

    Example:

    >>> from kerasmp.layers import RNN
    >>> layer = RNN(GRUCell(3), dtype="mixed_float16", return_sequences=True)
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 4, 3)
    True
    """

    def _step(self, projected: Any, states: Any, mask: Any) -> Any:
        state = _first(states)
        of_gates, of_candidate = mask, None
        kernel = self.recurrent_kernel
        if not self.reset_after:  # the candidate has a product of its own, of what is reset
            kernel, last = ops.split(kernel, [2 * self.units], axis=-1)
            of_gates, of_candidate = (mask[:2], mask[2]) if mask else (None, None)
        recurrent = self._wide(_product(state, kernel, of_gates))
        if self.use_bias and self.reset_after:
            of_inputs, of_state = ops.unstack(self._wide_bias())
            projected, recurrent = projected + of_inputs, recurrent + of_state
        elif self.use_bias:
            projected = projected + self._wide_bias()
        update, reset, candidate = ops.split(projected, 3, axis=-1)
        old = ops.split(recurrent, 3 if self.reset_after else 2, axis=-1)
        update = self.recurrent_activation(update + old[0])
        reset = self.recurrent_activation(reset + old[1])
        if self.reset_after:
            candidate = self.activation(candidate + reset * old[2])
        else:
            was_reset = ops.cast(reset * self._wide(state), self.compute_dtype)
            product = self._wide(_product(was_reset, last, of_candidate))
            candidate = self.activation(candidate + product)
        state = update * self._wide(state) + (1 - update) * candidate
        return state, [state] if keras.tree.is_nested(states) else state
