"""Cells whose kernels are cast before the loop over time steps, and not in it."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
from keras import ops

from kerasmp.backend.keras_private import AutocastScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class _Early(NamedTuple):
    """What a loop knows of a cell before its first step.

    Args:
        weights: By name, what was read of each: as it is, and in the compute dtype.
        projected: Whether `inputs` of `call` are the product of the inputs and the kernel.
    """

    weights: dict[str, tuple[Any, Any]]
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


class _Weight:
    """A cell's weight: the variable; in a loop, what was read of it before."""

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
        early = known.weights.get(self.name) if known else None
        return vars(cell)[self.name] if early is None else ops.custom_gradient(_cast_before)(*early)


class EarlyCast:
    """What both cells share: weights that a loop reads once, and the loop's way to do so."""

    kernel = _Weight()
    recurrent_kernel = _Weight()
    bias = _Weight()

    @contextlib.contextmanager
    def read_early(self) -> Iterator[None]:
        """Read each weight now, for all steps of the loop that runs in this context."""
        cell: Any = self
        if cell.compute_dtype == cell.variable_dtype:
            yield
            return
        early = {}
        for name in ("kernel", "recurrent_kernel", "bias"):
            variable = vars(cell)[name]
            if variable is None:
                continue
            with AutocastScope(None):
                master = ops.copy(variable)  # a tensor; convert_to_tensor may hand on the variable
            early[name] = (master, ops.cast(master, cell.compute_dtype))
        with _known(cell, _Early(early)):
            yield

    @contextlib.contextmanager
    def projecting(self, sequences: Any, *, training: bool) -> Iterator[Any]:
        """Yield what the steps of a loop take: one product for all of them, where it can be.

        The weights must have been read early.
        """
        cell: Any = self
        dropping = training and cell.dropout > 0
        if dropping or cell.compute_dtype == cell.variable_dtype or not self._can_project():
            yield sequences
            return
        projected = ops.matmul(ops.cast(sequences, cell.compute_dtype), cell.kernel)
        with _known(cell, _EARLY.get()[id(cell)]._replace(projected=True)):
            yield projected

    def _can_project(self) -> bool:
        cell: Any = self
        return bool(cell.implementation == 2)  # noqa: PLR2004 - Keras's number for one product

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 - Keras's
        """Return the output of one step and the new states, in the compute dtype."""
        cell: Any = self
        known = _EARLY.get().get(id(cell))
        if known and known.projected:
            results = self._step(self._wide(inputs), states)
        else:
            results = super().call(inputs, states, training=training)  # type: ignore[misc]  # the layer mixed in has it
        return keras.tree.map_structure(lambda x: ops.cast(x, cell.compute_dtype), results)

    def _wide(self, tensor: Any) -> Any:
        cell: Any = self
        return ops.cast(tensor, cell.variable_dtype)

    def _wide_bias(self) -> Any:
        """Return the bias as it is, in float32: so is the sum that is its gradient."""
        return _EARLY.get()[id(self)].weights["bias"][0]

    def _step(self, projected: Any, states: Any) -> Any:
        """Do a step whose gates are float32, from the inputs' product and the old states."""
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="kerasmp")
class LSTMCell(EarlyCast, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell` whose kernels `kerasmp.layers.RNN` casts once for all time steps.

    Args:
        units: Size of the output and of each of the two states.
        **kwargs: As for `keras.layers.LSTMCell`.

    Input shape:
        Inputs `(batch, features)` and states, two of `(batch, units)`, any float dtype.

    Output shape:
        The output, `(batch, units)`, and the two new states, in the policy's compute dtype.

    References:
        Hochreiter and Schmidhuber, Long Short-Term Memory, 1997,
        https://doi.org/10.1162/neco.1997.9.8.1735.

    Example:

    >>> from kerasmp.layers import RNN
    >>> layer = RNN([LSTMCell(3), LSTMCell(2)], dtype="mixed_float16")
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 2)
    True
    """

    def _step(self, projected: Any, states: Any) -> Any:
        output, carry = states
        gates = projected + self._wide(ops.matmul(output, self.recurrent_kernel))
        if self.use_bias:
            gates = gates + self._wide_bias()
        enter, forget, candidate, leave = ops.split(gates, 4, axis=-1)
        gate = self.recurrent_activation
        carry = gate(forget) * self._wide(carry) + gate(enter) * self.activation(candidate)
        output = gate(leave) * self.activation(carry)
        return output, [output, carry]


@keras.saving.register_keras_serializable(package="kerasmp")
class GRUCell(EarlyCast, keras.layers.GRUCell):
    """`keras.layers.GRUCell` whose kernels `kerasmp.layers.RNN` casts once for all time steps.

    Args:
        units: Size of the output, which is the state.
        **kwargs: As for `keras.layers.GRUCell`.

    Input shape:
        Inputs `(batch, features)` and a state `(batch, units)`, any float dtype.

    Output shape:
        The output, `(batch, units)`, and the new state, in the policy's compute dtype.

    References:
        Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014,
        https://arxiv.org/abs/1406.1078.

    Example:

    >>> from kerasmp.layers import RNN
    >>> layer = RNN(GRUCell(3), dtype="mixed_float16", return_sequences=True)
    >>> layer(keras.ops.ones((1, 4, 5))).shape == (1, 4, 3)
    True
    """

    def _can_project(self) -> bool:
        return bool(self.reset_after) and super()._can_project()

    def _step(self, projected: Any, states: Any) -> Any:
        (state,) = keras.tree.flatten(states)
        recurrent = self._wide(ops.matmul(state, self.recurrent_kernel))
        if self.use_bias:
            of_inputs, of_state = ops.unstack(self._wide_bias())
            projected, recurrent = projected + of_inputs, recurrent + of_state
        update, reset, candidate = ops.split(projected, 3, axis=-1)
        old_update, old_reset, old_candidate = ops.split(recurrent, 3, axis=-1)
        update = self.recurrent_activation(update + old_update)
        reset = self.recurrent_activation(reset + old_reset)
        candidate = self.activation(candidate + reset * old_candidate)
        state = update * self._wide(state) + (1 - update) * candidate
        return state, [state] if keras.tree.is_nested(states) else state
