"""Probes the first batch of `fit`, so that what half precision does to it is known at the start."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from kerasmp.backend import current
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.errors import PolicyWarning, first_line
from kerasmp.policy.spec import HALVES
from kerasmp.probe import probe_findings
from kerasmp.probe.finding import lines


class FirstBatch(keras.callbacks.Callback):
    """Probes the first batch that a model is trained on, once, and warns of what it finds.

    The batch is taken when the first step asks for it, and handed on to that step. So no data is
    lost or drawn twice, whatever it comes from.
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's
        """Let the first call of the train function probe its batch."""
        look_at_first_batch(self.model)


def with_first_batch(callbacks: Any) -> Any:
    """Return callbacks, as `fit` takes them, with a `FirstBatch`."""
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [*keras.tree.flatten([] if callbacks is None else callbacks), FirstBatch()]
    if not any(isinstance(each, FirstBatch) for each in callbacks.callbacks):
        added = FirstBatch()
        added.set_model(callbacks.model)
        callbacks.append(added)
    return callbacks


def look_at_first_batch(model: Any) -> None:
    """Let the next call of a model's train function probe its batch first.

    It does so once for a model, and again after layers have changed their policies.

    Args:
        model: A model, when its training begins.
    """
    policies = tuple(str(layer.compute_dtype) for layer in flatten_layers(model))
    if not set(HALVES) & set(policies) or getattr(model, "_probed", None) == policies:
        return
    # A user's own `fit` may have no train function; one that was never called still looks.
    if callable(model.train_function) and not isinstance(model.train_function, _Look):
        model.train_function = _Look(model, policies)


def look_no_longer(model: Any) -> None:
    """Put the train function back if no step has called it, at the end of training."""
    if isinstance(model.train_function, _Look):
        model.train_function = model.train_function.function


class _Look:
    """The train function of a model until its first call, which probes the batch.

    It is not a function that refers to itself, since such a cycle would keep the compiled step
    alive, and JAX would take that one for the next step that Keras compiles.
    """

    def __init__(self, model: Any, policies: tuple[str, ...]) -> None:
        self._model = model
        self.function = model.train_function
        self._policies = policies
        self._is_first = True

    def __call__(self, *arguments: Any) -> Any:
        model, is_first = self._model, self._is_first
        self._is_first = False  # another function may stand for this one, and call it again
        if model.train_function is self:
            model.train_function = self.function
        if not is_first:
            return self.function(*arguments)
        *state, source = arguments
        batch, source = current().peek(source, model.steps_per_execution)
        object.__setattr__(model, "_probed", self._policies)
        if batch is None:
            _warn(["The first batch could not be taken without losing it, and was not probed."])
        else:
            _probe(model, batch, state[0] if state else None)
        return self.function(*state, source)


def _probe(model: Any, batch: Any, state: Any) -> None:
    x = keras.utils.unpack_x_y_sample_weight(batch)[0]
    values: Any = ()
    if state is not None:  # Keras has taken the values out of the variables
        variables = [*model.trainable_variables, *model.non_trainable_variables]
        values = list(zip(variables, [*state[0], *state[1]], strict=True))
    try:
        found = probe_findings(model, x, values)
    except Exception as error:  # noqa: BLE001 - the step itself says it better, if it fails, too
        _warn([f"The first batch was not probed: the probe raised {first_line(error)}."])
        return
    texts = lines(each for each in found if each.severity != "hint")
    if texts:
        head = "The first batch, in float32 and under the policy (for more, call kerasmp.lint):"
        _warn([head, *texts])


def _warn(texts: list[str]) -> None:
    warnings.warn("\n".join(texts), PolicyWarning, stacklevel=2)
