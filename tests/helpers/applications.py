"""Convert architectures of `keras.applications`, train them for a step and convert them back."""

import sys
import time
import warnings
from typing import NamedTuple

import keras
import numpy as np
from helpers.photos import crops
from keras import ops

import kerasmp as mp

CLASSES = 10
CALIBRATED_ON = 16
# With 32 pixels and two pictures the last BatchNormalization of many models sees two values per
# channel, and the gradients of ResNet50 reach 8e8 even in float32. With these sizes it sees 16.
SIZE, BATCH = 64, 4
LARGER = 128  # for architectures that need more, such as Inception
SCALES = (2.0**15, 2.0**10, 2.0**7, 2.0**4, 1.0)  # tried in turn until a step is not skipped


def architectures():
    """Return the names of all architectures, grouped by family.

    A family is the module in which Keras defines them. Everything else in `keras.applications` is
    a module with a lower-case name.
    """
    families = {}
    for name in sorted(dir(keras.applications)):
        function = getattr(keras.applications, name)
        if name[0].isupper() and callable(function):
            families.setdefault(function.__module__.rpartition(".")[2], []).append(name)
    return families


def build(name):
    """Return an untrained architecture for small images, and their size."""
    architecture = getattr(keras.applications, name)
    try:
        return architecture(weights=None, classes=CLASSES, input_shape=(SIZE, SIZE, 3)), SIZE
    except ValueError:
        shape = (LARGER, LARGER, 3)
        return architecture(weights=None, classes=CLASSES, input_shape=shape), LARGER


def inputs(name, size):
    """Return pictures, preprocessed for this architecture."""
    module = sys.modules[getattr(keras.applications, name).__module__]
    return module.preprocess_input(crops(CALIBRATED_ON, size))


class Result(NamedTuple):
    """The result of `check` for one architecture."""

    name: str
    size: int
    parameters: int
    float16: int  # number of layers
    float32: int
    error: float  # relative error of the logits, in norm
    rounded: float  # the same in float32 with rounded weights and inputs: unavoidable
    scale: float
    skipped: bool
    moved: bool
    restored: bool
    converted_back: bool
    seconds: float


def check(name, *, eager=True):
    """Convert an architecture, train it for one step, and convert it back.

    Args:
        name: The architecture.
        eager: Whether the training step runs eagerly, which is fastest for one step.
    """
    started = time.perf_counter()
    keras.utils.set_random_seed(0)
    model, size = build(name)
    x = inputs(name, size)
    calibrate(model, x)
    x, y = x[:BATCH], np.arange(BATCH)
    exact, weights = _predict(model, x), model.get_weights()
    model.set_weights([_rounded(each) if each.ndim > 1 else each for each in weights])
    rounded = _predict(model, _rounded(x))
    model.set_weights(weights)
    report = mp.convert(model)
    dtypes = [keras.dtype_policies.get(row.after).compute_dtype for row in report.rows[1:]]
    half = _predict(model, x)
    report.restore()
    restored = np.array_equal(_predict(model, x), exact)
    mp.convert(model)
    scale, skipped = _train(model, x, y, eager)
    moved = not all(map(np.array_equal, model.get_weights(), weights))
    model.set_weights(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.convert(model, "float32")
    return Result(
        name,
        size,
        model.count_params(),
        dtypes.count("float16"),
        dtypes.count("float32"),
        _error(half, exact),
        _error(rounded, exact),
        scale,
        skipped,
        moved,
        restored,
        np.array_equal(_predict(model, x), exact),
        time.perf_counter() - started,
    )


def calibrate(model, x):
    """Give BatchNormalization the statistics of `x`.

    An untrained layer normalises nothing in inference: after a hundred layers the values would be
    larger than in any trained network.
    """
    normalizations = [
        layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momenta = [layer.momentum for layer in normalizations]
    for layer in normalizations:
        layer.momentum = 0.0
    model(x, training=True)
    for layer, momentum in zip(normalizations, momenta, strict=True):
        layer.momentum = momentum


def _rounded(array):
    return array.astype("float16").astype("float32")


def _error(probabilities, exact):
    """Return the error of the logits, relative to their norm."""
    wanted = _logits(exact)
    return float(np.linalg.norm(_logits(probabilities) - wanted) / np.linalg.norm(wanted))


def _predict(model, x):
    return ops.convert_to_numpy(model(x, training=False)).astype("float64")


def _logits(probabilities):
    """Return the inputs of the softmax, up to a constant."""
    logits = np.log(np.maximum(probabilities, np.finfo("float32").tiny))
    return logits - logits.mean(axis=-1, keepdims=True)


def _train(model, x, y, eager):
    """Take a step; return its scale, and whether even the smallest scale overflowed."""
    for scale in SCALES:
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(1e-3), loss_scale=scale)
        model.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=eager)
        model.train_on_batch(x, y)
        if not optimizer.last_step_skipped:
            return scale, False
    return scale, True
