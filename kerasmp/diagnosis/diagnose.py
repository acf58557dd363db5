"""Runs a training step in float32 and under a model's policy, and says where they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from kerasmp.backend import current, probe_scope
from kerasmp.backend.keras_graph import graph_of, has_call
from kerasmp.backend.keras_internals import (
    flatten_layers,
    own_variables,
    preserve_global_seed,
    unfiltered_tracebacks,
)
from kerasmp.backend.side_effects import preserve_layers
from kerasmp.diagnosis.causes import (
    advice,
    diverging,
    float32_finding,
    gradient_finding,
    lost_mask,
    weight_findings,
)
from kerasmp.diagnosis.lint import not_shown, static_findings
from kerasmp.diagnosis.outputs import heads_that_ran
from kerasmp.diagnosis.own_step import has_own_step, is_stock, run_own_step
from kerasmp.diagnosis.result import Diagnosis, underflow
from kerasmp.errors import ArgumentError, NotCompiledError, check_model, first_line, with_type
from kerasmp.loss_scale import FixedLossScale, NoLossScale
from kerasmp.model.optimizers import all_optimizers
from kerasmp.optimizer import LossScaleOptimizer
from kerasmp.probe.arrays import is_float, to_numpy
from kerasmp.probe.backward import Gradient, backward
from kerasmp.probe.batch import check_batch, data_findings
from kerasmp.probe.finding import sorted_report
from kerasmp.probe.findings import finding
from kerasmp.probe.magnitudes import Magnitudes
from kerasmp.probe.steps import Runner, in_float32
from kerasmp.probe.tape import Tape
from kerasmp.probe.values import values_in
from kerasmp.probe.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kerasmp.diagnosis.result import Underflow
    from kerasmp.probe.finding import Finding


def diagnose(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    loss_scale: float | None = None,
) -> Diagnosis:
    """Run a training step in float32 and under a model's policy, and say where they differ and why.

    Each layer and operation runs forward and backward on one batch, in both ways side by side. Each
    is judged by itself: after a finding, both runs go on with float32's values. Layers run as in
    training, except for those that draw random numbers, such as dropout. Weights, optimizer, seeds
    and metrics stay as they are; what is not built yet is built.

    Args:
        model: A compiled Keras or kerasmp model.
        x: A batch of inputs, as for `model.train_on_batch`.
        y: The targets; default None.
        sample_weight: The weights of the samples; default None.
        loss_scale: What the loss is multiplied by. Default: the present scale of the model's
            optimizer, or 1 if it does not scale the loss.

    Returns:
        A `Diagnosis`. Print it for a table and the findings; docs/diagnose.md explains both.

    Raises:
        ArgumentTypeError: If `model` is not a Keras model.
        NotCompiledError: If it is not compiled, or was converted for inference only.
        ArgumentError: If `x`, `y` and `sample_weight` are not a batch that fits the model, or
            `loss_scale` is not a positive number.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1, dtype="mixed_float16")])
    >>> model.compile("sgd", "mse")
    >>> diagnosis = diagnose(model, np.full((4, 8), 7e4), np.ones((4, 1)))
    >>> diagnosis.findings[0].rule
    'input-range'
    """
    check_model(model, "be diagnosed", kind=keras.Model, fix="Pass the model first, then a batch.")
    _check_compiled(model)
    scale = _scale_of(model) if loss_scale is None else _positive(loss_scale)
    x, y, sample_weight = (
        keras.tree.map_structure(_array, each) for each in (check_batch(model, x), y, sample_weight)
    )
    _check_rows(x, y, sample_weight)
    if not model.built and has_call(model):
        model(x)
    tape = Tape()
    with (
        preserve_layers(model),
        probe_scope(),
        preserve_global_seed() as seed,
        unfiltered_tracebacks(),
        np.errstate(over="ignore"),
    ):
        walk = Walk(model, Runner(model, seed, (), training=True), tape)
        run = (_own_step if has_own_step(model) else _stock_step)(
            model, walk, tape, (x, y, sample_weight), scale
        )
    scales = _underflow(tape, scale)
    findings = _findings(model, {"x": x, "y": y, "sample_weight": sample_weight}, tape, run, scales)
    return Diagnosis(
        findings, tuple(tape.tensors), scales, advice(findings, scales), run.half, run.wide
    )


class _Run(NamedTuple):
    """What a training step in both runs has shown, beside what is on its tape.

    Attributes:
        half: The loss under the policy, None if the step reports none.
        wide: The loss in float32, likewise.
        troubles: What is wrong on the way forward.
        gradient_troubles: What is wrong on the way back.
        heads: Findings about the outputs.
        around: The loss in float32 before and after a step of the optimizer, or None.
    """

    half: float | None
    wide: float | None
    troubles: Sequence[Any]
    gradient_troubles: Sequence[Any]
    heads: Sequence[Finding] = ()
    around: tuple[float, float] | None = None


def _underflow(tape: Tape, scale: float) -> Underflow:
    """Return what float16 does to the gradients on a tape."""
    gradients = (each for each in tape.tensors if each.direction != "forward")
    in_float16 = [each.magnitudes for each in gradients if each.dtype == "float16"]
    return underflow(sum(in_float16, Magnitudes()), scale)


def _findings(
    model: Any, data: Mapping[str, Any], tape: Tape, run: _Run, scales: Underflow
) -> tuple[Finding, ...]:
    found = [*data_findings(**data), *weight_findings(_weights(model))]
    if not found:
        found += filter(None, [float32_finding(tape.tensors)])
    blamed = {each.place.rpartition("/")[0] for each in found if each.rule == "weight-range"}
    found += [finding(each) for each in run.troubles if each.place not in blamed]
    least = max(_least_scale(each, scales.loss_scale) for each in _optimizers(model))
    found += [gradient_finding(each, tape.tensors, scales, least) for each in run.gradient_troubles]
    if run.around is not None:
        found += filter(None, [diverging(*run.around, model.optimizer.name)])
    found += [*run.heads, *map(lost_mask, tape.lost_masks)]
    found += not_shown(static_findings(model), found)
    return sorted_report(found).findings


def _stock_step(model: Any, walk: Walk, tape: Tape, data: Any, scale: float) -> _Run:
    """Pass a batch through the model and its loss in both runs, and the gradients back.

    Args:
        model: The model.
        walk: The walk, which then has the steps on its tape.
        tape: The tape.
        data: The inputs, the targets and the weights of the samples.
        scale: The loss scale.

    Raises:
        ArgumentError: If the loss cannot be computed.
    """
    x, y, sample_weight = data
    objective = _Loss(model, x, y, sample_weight)
    outputs = walk.run(model, x)
    heads: list[Finding] = []
    if graph_of(model) is None and model.loss is not None:
        returned = [each.half for each in values_in(outputs)]
        heads += heads_that_ran(model.loss, tape.steps, returned)
    try:
        [loss] = values_in(walk.step(objective, (outputs,), {}))
    except Exception as error:
        raise ArgumentError(
            "The loss of the model cannot be computed, even in float32.",
            received=f"y = {with_type(y)}, which raises {first_line(error)}",
            expected="targets and sample weights, as for model.train_on_batch",
            fix="Check the shapes of y and sample_weight.",
        ) from error
    half, wide = (float(to_numpy(each)) for each in (loss.half, loss.wide))
    ones = [keras.ops.full_like(each, scale) for each in (loss.half, loss.wide)]
    back, gradients = backward(walk.runner, tape, {id(loss): Gradient(*ones)}, scale)
    around = _losses_around_a_step(objective, walk.runner, gradients, scale)
    return _Run(half, wide, walk.troubles, back, heads, around)


def _own_step(model: Any, walk: Walk, tape: Tape, data: Any, scale: float) -> _Run:
    """Run a train step of the user's own, and pass what it gives to layers through both runs.

    See `_stock_step` for the arguments.
    """
    tensors = keras.tree.map_structure(
        lambda each: None if each is None else keras.ops.convert_to_tensor(each), data
    )
    data = keras.utils.pack_x_y_sample_weight(*tensors)
    half, _ = run_own_step(model, data)
    with in_float32(model):
        wide, entries = run_own_step(model, data)
    factor = scale / _scale_of(model)
    start = {}
    for entry in entries:
        arguments = entry.arguments()
        if arguments is None:
            continue
        outputs = values_in(walk.step(entry.layer, *arguments))
        for value, gradient in zip(
            filter(lambda v: is_float(v.wide), outputs), entry.gradients, strict=True
        ):
            if gradient is not None and walk.has_gradient(value):
                wide_gradient = keras.ops.cast(gradient, "float32") * factor
                start[id(value)] = Gradient(
                    keras.ops.cast(wide_gradient, value.half.dtype), wide_gradient
                )
    back, _ = backward(walk.runner, tape, start, scale)
    return _Run(half, wide, walk.troubles, back)


class _Loss:
    """The loss of a model on a batch, as a step that takes the outputs."""

    name = "loss"

    def __init__(self, model: Any, x: Any, y: Any, sample_weight: Any) -> None:
        self.model = model
        self._data = x, y
        self._sample_weight = sample_weight
        self.weights = [v for v in model.trainable_variables if v.regularizer is not None]

    def __call__(self, outputs: Any) -> Any:
        x, y = self._data
        if self.model.loss is None and y is None and is_stock(self.model.compute_loss):
            # Only those that layers add, which Keras does not see here, and regularizers.
            return sum(self.model.losses, start=keras.ops.zeros(()))
        return self.model.compute_loss(x, y, outputs, self._sample_weight, training=True)

    def in_float32(self, runner: Runner, state: Sequence[tuple[Any, Any]]) -> float:
        """Return the loss in float32, with other values of variables."""

        def call() -> Any:
            return self(self.model(self._data[0], training=True))

        return float(to_numpy(runner.call_in_float32(self.model, call, state)))


def _losses_around_a_step(
    loss: _Loss, runner: Runner, gradients: Mapping[int, Any], scale: float
) -> tuple[float, float] | None:
    """Return the loss in float32 before and after a step of a copy of the optimizer.

    None if the optimizer cannot be copied.

    Args:
        loss: The loss.
        runner: Runs the model.
        gradients: The gradients in float32, by the ids of variables, multiplied by the scale.
        scale: The scale.
    """
    optimizer = getattr(loss.model.optimizer, "inner_optimizer", loss.model.optimizer)
    variables = loss.model.trainable_variables
    try:
        copy = type(optimizer).from_config(optimizer.get_config())
        # From an array, since a variable may share the memory of a tensor.
        copies = [keras.Variable(to_numpy(v.value), name=v.name) for v in variables]
        copy.build(copies)
        if optimizer.built:
            for own, other in zip(copy.variables, optimizer.variables, strict=True):
                own.assign(other.value)
        grads = [
            keras.ops.zeros_like(v.value)
            if gradients.get(id(v)) is None
            else current().to_dense(gradients[id(v)]) / scale
            for v in variables
        ]
        copy.apply(grads, copies)
    except Exception:  # noqa: BLE001 - an optimizer of the user may raise anything
        return None
    stepped = [(v, other.value) for v, other in zip(variables, copies, strict=True)]
    return loss.in_float32(runner, []), loss.in_float32(runner, stepped)


def _weights(model: Any) -> Iterator[tuple[str, str, Any]]:
    for layer in flatten_layers(model):
        for variable in own_variables(layer):
            if keras.backend.is_float_dtype(variable.dtype):
                yield variable.path, layer.compute_dtype, to_numpy(variable.value)


def _array(each: Any) -> Any:
    """Return an array as `fit` takes it: Keras turns float64 into its default float dtype."""
    if each is None:
        return None
    array = np.asarray(each)
    return array.astype(keras.config.floatx()) if array.dtype == "float64" else array


def _check_rows(*data: Any) -> None:
    """Raise an error unless all arrays of a batch have the same first axis."""
    arrays = [each for each in keras.tree.flatten(data) if each is not None]
    rows = {each.shape[:1] for each in arrays}
    if len(rows) > 1:
        raise ArgumentError(
            "The parts of the batch do not have the same number of rows.",
            received=", ".join(str(each.shape) for each in arrays),
            expected="x, y and sample_weight with an equal first axis",
            fix="Pass the same batch as to model.train_on_batch.",
        )


def _check_compiled(model: Any) -> None:
    if model.compiled and model.optimizer is not None:
        return
    inference = getattr(model, "_for_inference", False)
    raise NotCompiledError(
        "diagnose needs a compiled model.",
        received=f'model "{model.name}", '
        + ("which was converted for inference only" if inference else "which is not compiled"),
        expected="a model with an optimizer and a loss",
        fix="Convert it without variables=, to train it."
        if inference
        else "Call model.compile(...) first.",
    )


def _scale_of(model: Any) -> float:
    """Return the present loss scale of a model, 1 if none, the largest if there are several."""
    return max(map(_scale, _optimizers(model)))


def _optimizers(model: Any) -> list[Any]:
    """Return the optimizers that the train step of a model may use."""
    return list(all_optimizers(model).values()) if has_own_step(model) else [model.optimizer]


def _scale(optimizer: Any) -> float:
    if isinstance(optimizer, LossScaleOptimizer):
        return float(optimizer.loss_scale)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return (
            float(to_numpy(optimizer.dynamic_scale.value))
            if optimizer.built
            else float(optimizer.initial_scale)
        )
    return 1.0


def _least_scale(optimizer: Any, scale: float) -> float:
    """Return how far the loss scale of an optimizer may fall by itself."""
    if isinstance(optimizer, LossScaleOptimizer):
        is_fixed = isinstance(optimizer.schedule, (FixedLossScale, NoLossScale))
        return scale if is_fixed else float(optimizer.schedule.min_scale)
    return 0.0 if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else scale


def _positive(scale: Any) -> float:
    if isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < np.inf:
        return float(scale)
    raise ArgumentError(
        "`loss_scale` is not a loss scale.",
        received=with_type(scale),
        expected="a positive number",
        fix="Leave it out to use the optimizer's.",
    )
