"""Runs a train step of the user's own, and notes which layers it calls with which gradients."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend import current
from kerasmp.backend.keras_internals import copy_mask, flatten_layers
from kerasmp.backend.layer_calls import takes_training, watch_calls
from kerasmp.backend.nested import optimizer_chain
from kerasmp.backend.optimizer_internals import undo_building
from kerasmp.model.optimizers import all_optimizers
from kerasmp.probe.arrays import is_float, to_numpy
from kerasmp.probe.steps import draws
from kerasmp.probe.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def has_own_step(model: Any) -> bool:
    """Return whether the class of a model defines a train step that is not Keras's or kerasmp's."""
    return not is_stock(model.train_step)


def is_stock(method: Any) -> bool:
    """Return whether a method is Keras's or kerasmp's."""
    module = getattr(method, "__module__", "keras")
    return module.partition(".")[0] in {"keras", __name__.partition(".")[0]}


class Entry:
    """The call of a layer by a train step.

    Args:
        layer: The layer.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Attributes:
        layer: The layer.
        gradients: The gradient of each float tensor that it returns, None where there is none.
    """

    def __init__(self, layer: Any, args: Any, kwargs: Any) -> None:
        self.layer = layer
        self.gradients: list[Any] = []
        self._structure = args, kwargs
        self._leaves = keras.tree.flatten(self._structure)

    def run(self, call: Any) -> Any:
        """Call the layer; its gradients are noted when the train step computes them."""
        tapped = [self._tapped_input(i, leaf) for i, leaf in enumerate(self._leaves)]
        args, kwargs = keras.tree.pack_sequence_as(self._structure, tapped)
        if takes_training(self.layer) and draws(self.layer):
            kwargs["training"] = False  # both runs would draw other numbers
        return keras.tree.map_structure(self._tapped_output, call(self.layer, *args, **kwargs))

    def _tapped_input(self, index: int, leaf: Any) -> Any:
        # JAX shows the numbers only when gradients are computed.
        return _tapped(leaf, lambda value, _: self._leaves.__setitem__(index, value))

    def _tapped_output(self, output: Any) -> Any:
        if not is_float(output):
            return output
        index = len(self.gradients)
        self.gradients.append(None)
        return _tapped(output, lambda _, gradient: self.gradients.__setitem__(index, gradient))

    def arguments(self) -> Any:
        """Return the arguments with values in place of tensors, or None if they are not known."""
        tensors = [leaf for leaf in self._leaves if keras.ops.is_tensor(leaf)]
        if not all(map(current().is_concrete, tensors)):
            return None
        leaves = [Value(leaf, leaf) if keras.ops.is_tensor(leaf) else leaf for leaf in self._leaves]
        return keras.tree.pack_sequence_as(self._structure, leaves)


def _tapped(tensor: Any, callback: Callable[[Any, Any], None]) -> Any:
    if not is_float(tensor):
        return tensor
    return copy_mask(tensor, current().tap(tensor, callback))


def run_own_step(model: Any, data: Any) -> tuple[float | None, list[Entry]]:
    """Run the train step of a model eagerly, and put back what it changes.

    Args:
        model: The model. It computes under its present policies.
        data: The batch, as for `train_step`.

    Returns:
        The loss that it reports, or None; and the outermost calls of layers, in order.
    """
    entries: list[Entry] = []
    own = {id(layer) for layer in flatten_layers(model)}

    def watcher(call: Any, layer: Any, args: Any, kwargs: Any) -> Any:
        if id(layer) not in own:  # such as one that the step creates
            return call(layer, *args, **kwargs)
        entries.append(Entry(layer, args, kwargs))
        return entries[-1].run(call)

    with _variables_restored(model), watch_calls(watcher):
        logs = current().run_train_step(model, data)
    loss = logs.get("loss") if isinstance(logs, dict) else None
    return None if loss is None else float(to_numpy(loss)), entries


@contextlib.contextmanager
def _variables_restored(model: Any) -> Iterator[None]:
    """Restore the variables of a model, its optimizers and metrics on exit."""
    optimizers = [each for each in all_optimizers(model).values() if each is not None]
    if not model.optimizer.built and any(each is model.optimizer for each in optimizers):
        model.optimizer.build(model.trainable_variables)
    # Only the train step knows the variables of its other optimizers.
    unbuilt = [part for each in optimizers if not each.built for part in optimizer_chain(each)]
    undo = undo_building(unbuilt)
    held = [model.variables, *(each.variables for each in optimizers)]
    held.append(model.metrics_variables)
    before = {id(v): (v, keras.ops.copy(v.value)) for group in held for v in group}
    try:
        yield
    finally:
        undo()
        for variable, value in before.values():
            variable.assign(value)
