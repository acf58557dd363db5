"""What holds for every layer of Keras and of ours; they are looked up, so a new one is held to it.

A class without a case in helpers.layer_cases fails.
"""

import functools
import importlib.util
import inspect

import keras
import numpy as np
import pytest
from helpers import gradients
from helpers.layer_cases import CASES, OURS, RANDOM, STOCK
from helpers.precision import error
from keras import ops

from kerasmp.optimizer import LossScaleOptimizer

BACKEND = keras.backend.backend()
SCALE = 2.0**7
RATE = 0.5
# What stock Keras gets wrong even in these small cases, and the hazard's number.
WRONG = {
    "tensorflow": {"Attention": 17},
    "jax": {
        "Attention": 17,
        "DepthwiseConv2D": 12,
        "Dot": 8,
        "GroupedQueryAttention": 2,
        "MultiHeadAttention": 2,
        "SpectralNormalization": 13,
        "UnitNormalization": 8,
    },
    "torch": {"SpectralNormalization": 13},
}[BACKEND]
# float16 kernels that the framework lacks on a CPU. For the first two TensorFlow has them in XLA.
XLA = {"AveragePooling3D", "MaxPooling3D"} if BACKEND == "tensorflow" else set()
NO_KERNEL = {
    "tensorflow": {"AdaptiveAveragePooling3D", "AdaptiveMaxPooling3D"},
    "torch": {"AveragePooling3D"},
}.get(BACKEND, set())
# Keras makes its windows with scipy on torch.
if BACKEND == "torch" and importlib.util.find_spec("scipy") is None:
    NO_KERNEL.add("STFTSpectrogram")


def every(classes):
    return pytest.mark.parametrize("cls", classes.values(), ids=classes)


HERE = {n: c for n, c in STOCK.items() if n not in NO_KERNEL}
RIGHT = {n: c for n, c in HERE.items() if n not in WRONG}
BOTH = {n: c for n, c in OURS.items() if hasattr(keras.layers, n)}


def takes(layer, name):
    return name in inspect.signature(layer.call).parameters


def every_mode(classes):
    """Return a mark for each class with `training` both ways, or once if it does not take it."""
    cases = [
        pytest.param(cls, training, id=f"{name}-{training}")
        for name, cls in classes.items()
        for training in (True, False)
        if takes(cls, "training") or not training
    ]
    return pytest.mark.parametrize(("cls", "training"), cases)


def symbols(case, dtype="float32", *, free=False):
    return [
        keras.Input(
            batch_shape=[None if free and i in case.free else n for i, n in enumerate(shape)],
            dtype="int32" if case.ids else dtype,
        )
        for shape in case.shapes
    ]


def with_same_weights(case, layers, **arguments):
    """Build the layers, and return the symbolic outputs of the first."""
    outputs = [case.call(layer, *symbols(case), **arguments) for layer in layers]
    random = np.random.default_rng(1)
    for variables in zip(*(layer.variables for layer in layers), strict=True):
        value = gradients.numpy(variables[-1])
        if variables[-1].trainable:
            # Not as initialised: a bias of 0 would prove nothing.
            value = (value + random.normal(size=value.shape) * 0.1).astype("float16")
        for variable in variables:
            variable.assign(value)
    return keras.tree.flatten(outputs[0])


def one_step(case, layer, shapes, way, **arguments):
    """Return the outputs, the gradients, and the weights after a step of SGD.

    A float16 layer takes it with our optimizer, a float32 layer with NumPy.
    """
    inputs = case.inputs()
    if not case.ids:
        inputs = [x.astype(layer.compute_dtype) for x in inputs]
    narrow, variables = layer.dtype_policy.name == "mixed_float16", layer.trainable_variables
    scale = SCALE if narrow else 1.0
    random = np.random.default_rng(2)
    upstream = [random.normal(size=shape).astype("float16") * np.float16(scale) for shape in shapes]
    optimizer = None
    if narrow and variables:
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(RATE), loss_scale=scale)
        optimizer.build(variables)
    call = functools.partial(case.call, layer, **arguments)
    outputs, grads, *stepped = gradients.compile_(call, variables, way, optimizer)(inputs, upstream)
    grads = [g / scale for g in grads]
    if not stepped:
        weights = [gradients.numpy(v) for v in variables]  # now: the call may have assigned to them
        of_weights = grads[len(grads) - len(weights) :]
        stepped = [[w - RATE * g for w, g in zip(weights, of_weights, strict=True)]]
    return [*outputs, *grads, *stepped[0]]


def assert_near(found, wanted, tolerance):
    for number, (f, w) in enumerate(zip(found, wanted, strict=True)):
        off = error(f, w)
        assert off is None or off <= tolerance, f"tensor {number}: {off}"


def compare(case, narrow, wide, tolerance, **arguments):
    shapes = [y.shape for y in with_same_weights(case, [narrow, wide], **arguments)]
    way = "xla" if type(narrow).__name__ in XLA else "quick"
    found, wanted = (one_step(case, layer, shapes, way, **arguments) for layer in (narrow, wide))
    assert_near(found, wanted, tolerance)


def compare_dtypes(cls, **arguments):
    case = CASES[cls.__name__]
    narrow, wide = (case.make(cls, dtype) for dtype in ("mixed_float16", "float32"))
    compare(case, narrow, wide, case.tolerance, **arguments)
    assert {v.dtype for v in narrow.trainable_variables} <= {"float32"}


def mode(cls, training):
    return {"training": training} if takes(cls, "training") else {}


# -------------------------------------------------------------------------- stock Keras and ours


def test_no_layer_is_forgotten():
    assert not [name for name in [*STOCK, *OURS] if name not in CASES]


# A random layer draws other numbers in another dtype.
@every_mode({name: cls for name, cls in RIGHT.items() if name not in RANDOM})
def test_a_float16_step_of_stock_keras_is_a_float32_step(cls, training):
    compare_dtypes(cls, **mode(cls, training))


@every({name: cls for name, cls in RIGHT.items() if name in RANDOM})
def test_so_is_that_of_a_random_layer_which_does_not_train(cls):
    compare_dtypes(cls, **mode(cls, training=False))


@every({name: STOCK[name] for name in WRONG})
@pytest.mark.keras("3.15")
def test_where_stock_keras_is_wrong_it_still_is(cls):
    with pytest.raises(Exception, match=r"tensor \d|overflow|not supported"):
        compare_dtypes(cls, **mode(cls, training=True))


@every_mode(OURS)
def test_a_float16_step_of_ours_is_a_float32_step(cls, training):
    compare_dtypes(cls, **mode(cls, training))


# ------------------------------------------------------------------------------------ ours alone


@every(BOTH)
def test_in_float32_ours_is_the_layer_of_stock_keras(cls):
    case = CASES[cls.__name__]
    ours, stock = (
        case.make(each, "float32") for each in (cls, getattr(keras.layers, cls.__name__))
    )
    assert isinstance(ours, type(stock))
    assert ours.get_config().keys() == stock.get_config().keys()
    compare(case, ours, stock, 1e-5, **mode(cls, training=True))


@every(OURS)
def test_config_file_and_open_shapes(cls, tmp_path):
    case = CASES[cls.__name__]
    layer = case.make(cls, "mixed_float16")
    inputs = symbols(case, free=True)
    model = keras.Model(inputs, case.call(layer, *inputs))
    again = cls.from_config(layer.get_config())
    assert type(again) is cls
    assert again.get_config() == layer.get_config()

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert cls in {type(each) for each in loaded.layers}
    arrays = case.larger()
    found, wanted = (
        gradients.evaluate(lambda *x, m=m: m(list(x)), arrays) for m in (loaded, model)
    )
    for f, w, symbol in zip(found, wanted, model.outputs, strict=True):
        np.testing.assert_array_equal(f, w)
        assert len(f.shape) == len(symbol.shape)
        assert all(s in {None, n} for s, n in zip(symbol.shape, f.shape, strict=True))


@pytest.mark.backend("tensorflow")
@every(OURS)
def test_a_graph_with_open_shapes_gives_what_eager_steps_give(cls):
    import tensorflow as tf

    case = CASES[cls.__name__]
    layer = case.make(cls, "mixed_float16")
    case.call(layer, *symbols(case))
    open_shapes = symbols(case, "float16", free=True)

    def gradients_of(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = keras.tree.flatten(case.call(layer, *inputs))
            total = sum(tf.reduce_sum(tf.cast(y, "float32") ** 2) for y in outputs)
        return outputs, tape.gradient(total, inputs)

    graph = tf.function(
        gradients_of, input_signature=[tf.TensorSpec(x.shape, x.dtype) for x in open_shapes]
    )
    tensors = [tf.constant(x, "float16") for x in case.larger()]
    found, wanted = (
        map(gradients.numpy, keras.tree.flatten(f(*tensors))) for f in (graph, gradients_of)
    )
    assert_near(found, wanted, case.tolerance)


# On torch Keras does not autocast the variables of a layer within another while it makes symbols:
# stock Wrapper then says float32 too.
UNSURE = {"WithDtype"} if BACKEND == "torch" else set()


@every({name: cls for name, cls in OURS.items() if name not in UNSURE})
def test_the_dtype_is_that_of_the_symbol(cls):
    case = CASES[cls.__name__]
    layer = case.make(cls, "mixed_float16")
    outputs = keras.tree.flatten(case.call(layer, *symbols(case)))
    dtypes = []

    def call(*tensors):
        found = keras.tree.flatten(case.call(layer, *tensors))
        dtypes[:] = [keras.backend.standardize_dtype(y.dtype) for y in found]
        return found

    gradients.evaluate(call, case.inputs())
    assert dtypes == [y.dtype for y in outputs]


def _minds_masks(name, cls):
    steps = all(len(shape) == 3 for shape in CASES[name].shapes)
    return steps and (takes(cls, "mask") or CASES[name].make(cls, "float32").supports_masking)


MASKED = {name: cls for name, cls in BOTH.items() if _minds_masks(name, cls)}


def masked(case, layer):
    """Return a function that passes inputs of steps, the first of which are masked, to a layer."""

    def call(*tensors):
        masking = keras.layers.Masking(dtype=layer.compute_dtype)
        return case.call(layer, *(masking(ops.cast(x, layer.compute_dtype)) for x in tensors))

    return call


@pytest.mark.keras("3.14")  # before, Keras loses a mask where a layer casts its input
@every(MASKED)
def test_masks_are_minded_as_in_stock_keras(cls):
    case = CASES[cls.__name__]
    stock = case.make(getattr(keras.layers, cls.__name__), "float32")
    ours = case.make(cls, "mixed_float16")
    with_same_weights(case, [ours, stock])
    arrays = case.inputs()
    for array in arrays:
        array[:, -2:] = 0
    found, wanted = (gradients.evaluate(masked(case, layer), arrays) for layer in (ours, stock))
    # What a masked step gives is not minded by anybody, and ours is 0 where all is masked.
    found, wanted = ([y[:, :-2] if y.ndim == 3 else y for y in each] for each in (found, wanted))
    assert_near(found, wanted, case.tolerance)
    symbols_ = [keras.layers.Masking()(x) for x in symbols(case)]
    ends = [hasattr(case.call(layer, *symbols_), "_keras_mask") for layer in (ours, stock)]
    assert ends[0] == ends[1]
