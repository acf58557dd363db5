"""What holds for every layer of Keras and of ours; they are looked up, so a new one is held to it.

A class without a case in helpers.layer_cases fails.
"""

import functools
import inspect

import keras
import numpy as np
import pytest
from helpers import gradients
from helpers.layer_cases import CASES, OURS, RANDOM, STOCK
from helpers.precision import error
from keras import ops

from kerasmp.optimizer import LossScaleOptimizer

SCALE = 2.0**7
RATE = 0.5
BACKEND = keras.backend.backend()


def every(classes):
    return pytest.mark.parametrize("cls", classes.values(), ids=classes)


def takes(layer, name):
    return name in inspect.signature(layer.call).parameters


def symbols(case, dtype="float32", *, free=False):
    return [
        keras.Input(
            batch_shape=[None if free and i in case.free else n for i, n in enumerate(shape)],
            dtype="int32" if case.ids else dtype,
        )
        for shape in case.shapes
    ]


def twins(case, cls, **arguments):
    """Return a mixed_float16 and a float32 layer with the same weights, and the output shapes."""
    layers = [case.make(cls, dtype) for dtype in ("mixed_float16", "float32")]
    outputs = [case.call(layer, *symbols(case), **arguments) for layer in layers]
    random = np.random.default_rng(1)
    for pair in zip(*(layer.variables for layer in layers), strict=True):
        value = gradients.numpy(pair[1])
        if value.dtype.kind == "f" and pair[1].trainable:
            # Not as initialised: a bias of 0 would prove nothing.
            value = (value + random.normal(size=value.shape) * 0.1).astype("float16")
        for variable in pair:
            variable.assign(value)
    return layers, [y.shape for y in keras.tree.flatten(outputs[0])]


def one_step(case, layer, shapes, way, **arguments):
    """Return the outputs, the gradients, and the weights after a step of SGD.

    The float16 layer takes it with our optimizer, the float32 layer with NumPy.
    """
    inputs = case.inputs()
    if not case.ids:
        inputs = [x.astype(layer.compute_dtype) for x in inputs]
    narrow, variables = layer.compute_dtype == "float16", layer.trainable_variables
    scale = SCALE if narrow else 1.0
    random = np.random.default_rng(2)
    upstream = [random.normal(size=shape).astype("float16") * np.float16(scale) for shape in shapes]
    optimizer = None
    if narrow and variables:
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(RATE), loss_scale=scale)
        optimizer.build(variables)
    weights = [gradients.numpy(v) for v in variables]
    call = functools.partial(case.call, layer, **arguments)
    run = gradients.compile_(call, variables, way, optimizer)
    outputs, grads, *stepped = run(inputs, upstream)
    grads = [g / scale for g in grads]
    if not stepped:
        stepped = [[w - RATE * g for w, g in zip(weights, grads[len(grads) - len(weights):], strict=True)]]
    return [*outputs, *grads, *stepped[0]]


def compare(case, cls, way="quick", **arguments):
    layers, shapes = twins(case, cls, **arguments)
    assert {v.dtype for v in layers[0].trainable_variables} <= {"float32"}
    found, wanted = (one_step(case, layer, shapes, way, **arguments) for layer in layers)
    for number, (f, w) in enumerate(zip(found, wanted, strict=True)):
        off = error(f, w)
        assert off is None or off < case.tolerance, f"tensor {number}: {off}"


def test_no_layer_is_forgotten():
    assert not [name for name in [*STOCK, *OURS] if name not in CASES]


@every(STOCK)
def test_a_float16_step_of_stock_keras_is_a_float32_step(cls):
    case = CASES[cls.__name__]
    random = cls.__name__ in RANDOM  # which draws other numbers in other dtypes
    arguments = {"training": not random} if takes(cls, "training") else {}
    compare(case, cls, **arguments)


@every(OURS)
@pytest.mark.parametrize("training", [True, False])
def test_a_float16_step_of_ours_is_a_float32_step(cls, training):
    if not takes(cls, "training"):
        if training:
            compare(CASES[cls.__name__], cls)
        return
    compare(CASES[cls.__name__], cls, training=training)
