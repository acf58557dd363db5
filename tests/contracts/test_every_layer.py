"""What holds for every layer of Keras and of ours; they are looked up, so a new one is held to it.

A class without a case in helpers.layer_cases fails, in test_layer_classes.py.
"""

import functools
import importlib.util
import inspect

import keras
import numpy as np
import pytest
from helpers import gradients
from helpers.float16 import error
from helpers.layer_cases import CASES, OURS, STOCK
from helpers.marks import few
from keras import ops

from kerasmp.optimizer import LossScaleOptimizer

BACKEND = keras.backend.backend()
SCALE = 2.0**7
RATE = 0.5
# Layers that stock Keras computes wrong even in these small cases, with the hazard's number.
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
# Layers that draw different numbers in each dtype. Their cases have a seed: without one, Keras on
# torch draws from torch's own generator.
RANDOM = {"AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise"} | {
    f"SpatialDropout{n}D" for n in (1, 2, 3)
}
# float16 kernels that a framework lacks on a CPU. TensorFlow has the first two in XLA.
XLA = {"AveragePooling3D", "MaxPooling3D"} if BACKEND == "tensorflow" else set()
NO_KERNEL = {
    "tensorflow": {"AdaptiveAveragePooling3D", "AdaptiveMaxPooling3D"},
    "torch": {"AveragePooling3D"},
}.get(BACKEND, set())
# On torch Keras makes its windows with scipy.
if BACKEND == "torch" and importlib.util.find_spec("scipy") is None:
    NO_KERNEL.add("STFTSpectrogram")


def every(classes):
    return pytest.mark.parametrize("cls", classes.values(), ids=classes)


RIGHT = {n: c for n, c in STOCK.items() if n not in NO_KERNEL and n not in WRONG}
BOTH = {n: c for n, c in OURS.items() if hasattr(keras.layers, n)}
# One for each mechanism of kerasmp layers, for backends such as JAX that compile each for seconds.
MECHANISMS = {
    "Activation",
    "Attention",
    "BatchNormalization",
    "Conv2D",
    "Dense",
    "DenseHead",
    "GlobalAveragePooling1D",
    "LSTM",
    "MultiHeadAttention",
    "Normalization",
    "PReLU",
    "Softmax",
    "SpectralNormalization",
    "WithDtype",
}
# On JAX the quick set takes steps of these only in layers/test_hazards.py.
MEASURED = {"MultiHeadAttention", "SpectralNormalization"}


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


def give_the_same_weights(layers):
    """Give built layers the weights of the last one, after changing its trainable ones."""
    random = np.random.default_rng(1)
    for variables in zip(*(layer.variables for layer in layers), strict=True):
        value = gradients.numpy(variables[-1])
        if variables[-1].trainable:  # a bias of 0 would hide errors
            value = (value + random.normal(size=value.shape) * 0.1).astype("float16")
        for variable in variables:
            variable.assign(value)


def one_step(case, layer, shapes, way="quick", **arguments):
    """Return the outputs, the gradients, and the weights after a step of SGD.

    A float16 layer takes it with the kerasmp optimizer, a float32 layer with NumPy.
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
        weights = [
            gradients.numpy(v) for v in variables
        ]  # now, since the call may have assigned to them
        of_weights = grads[len(grads) - len(weights) :]
        stepped = [[w - RATE * g for w, g in zip(weights, of_weights, strict=True)]]
    return [*outputs, *grads, *stepped[0]]


def assert_near(found, wanted, tolerance):
    for number, (f, w) in enumerate(zip(found, wanted, strict=True)):
        off = error(f, w)
        assert off is None or off <= tolerance, f"tensor {number}: {off}"


def mode(cls, training):
    return {"training": training} if takes(cls, "training") else {}


# ----------------------------------------------------------------------------------- kerasmp only

# On torch Keras does not autocast variables of an inner layer during symbolic calls:
# the stock Wrapper then returns float32 too.
UNSURE = {"WithDtype"} if BACKEND == "torch" else set()


@pytest.mark.parametrize("name", few(OURS, MECHANISMS - MEASURED, where=BACKEND == "jax"))
def test_a_float16_step_is_near_one_in_float32_and_one_of_stock_keras(name):
    """Outputs, gradients, new weights, with and without training; dtypes as in symbolic calls."""
    cls, case = OURS[name], CASES[name]
    narrow, wide = (case.make(cls, dtype) for dtype in ("mixed_float16", "float32"))
    together = [narrow, wide]
    if name in BOTH:
        stock = case.make(getattr(keras.layers, name), "float32")
        assert isinstance(wide, type(stock))
        assert wide.get_config().keys() == stock.get_config().keys()
        together.append(stock)
    said, *_ = [keras.tree.flatten(case.call(layer, *symbols(case))) for layer in together]
    shapes = [y.shape for y in said]
    for training in [True, False] if takes(cls, "training") else [False]:
        give_the_same_weights(together)
        found, wanted, *same = (
            one_step(case, layer, shapes, **mode(cls, training)) for layer in together
        )
        assert_near(found, wanted, case.tolerance)
        for each in same:
            assert_near(wanted, each, 1e-5)
    assert {v.dtype for v in narrow.trainable_variables} <= {"float32"}
    if name not in UNSURE:
        assert dtypes_of(case, narrow) == [y.dtype for y in said]


def evaluate(function, inputs):
    """Return the outputs of a function of tensors, computed in the fastest way."""
    tensors = [ops.convert_to_tensor(x) for x in inputs]
    if keras.backend.backend() == "jax":
        import jax

        function = jax.jit(function, compiler_options=gradients.QUICK)
    return [gradients.numpy(y) for y in keras.tree.flatten(function(*tensors))]


def dtypes_of(case, layer):
    dtypes = []

    def call(*tensors):
        found = keras.tree.flatten(case.call(layer, *tensors))
        dtypes[:] = [keras.backend.standardize_dtype(y.dtype) for y in found]
        return found

    evaluate(call, case.inputs())
    return dtypes


@pytest.mark.parametrize("name", few(OURS, MECHANISMS, where=BACKEND == "jax"))
def test_a_file_with_open_shapes_gives_the_same_numbers(name, tmp_path):
    case = CASES[name]
    layer = case.make(OURS[name], "mixed_float16")
    assert OURS[name].from_config(layer.get_config()).get_config() == layer.get_config()
    inputs = symbols(case, free=True)
    model = keras.Model(inputs, case.call(layer, *inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(each) for each in loaded.layers] == [type(each) for each in model.layers]
    arrays = case.larger()
    found, wanted = (evaluate(lambda *x, m=m: m(list(x)), arrays) for m in (loaded, model))
    for f, w, symbol in zip(found, wanted, model.outputs, strict=True):
        np.testing.assert_array_equal(f, w)
        assert len(f.shape) == len(symbol.shape)
        assert all(s in {None, n} for s, n in zip(symbol.shape, f.shape, strict=True))


@pytest.mark.parametrize("name", few(BOTH, MECHANISMS & {*BOTH}))
def test_weights_files_are_those_of_stock_keras(name, tmp_path):
    models = []
    for package in (OURS[name], getattr(keras.layers, name)):
        inputs = symbols(CASES[name])
        layer = CASES[name].make(package, "float32")
        models.append(keras.Model(inputs, CASES[name].call(layer, *inputs)))
    for source, target in (models, models[::-1]):
        source.set_weights([weight + 1 for weight in source.get_weights()])
        source.save_weights(tmp_path / "model.weights.h5")
        target.load_weights(tmp_path / "model.weights.h5")
        for found, wanted in zip(target.get_weights(), source.get_weights(), strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("name", few(OURS, MECHANISMS))
def test_a_graph_with_open_shapes_gives_what_eager_steps_give(name):
    import tensorflow as tf

    case = CASES[name]
    layer = case.make(OURS[name], "mixed_float16")
    case.call(layer, *symbols(case))
    open_shapes = symbols(case, "float16", free=True)

    def gradients_of(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = keras.tree.flatten(case.call(layer, *inputs))
            total = sum(tf.reduce_sum(tf.cast(y, "float32") ** 2) for y in outputs)
        return outputs, tape.gradient(total, [x for x in inputs if x.dtype.is_floating])

    graph = tf.function(
        gradients_of, input_signature=[tf.TensorSpec(x.shape, x.dtype) for x in open_shapes]
    )
    tensors = [
        tf.constant(x, symbol.dtype) for x, symbol in zip(case.larger(), open_shapes, strict=True)
    ]
    found, wanted = (
        map(gradients.numpy, keras.tree.flatten(f(*tensors))) for f in (graph, gradients_of)
    )
    assert_near(found, wanted, case.tolerance)


def _minds_masks(name, cls):
    steps = all(len(shape) == 3 for shape in CASES[name].shapes)
    return steps and (takes(cls, "mask") or CASES[name].make(cls, "float32").supports_masking)


MASKED = [name for name, cls in BOTH.items() if _minds_masks(name, cls)]


def masked(case, layer):
    """Return a function that calls a layer on time steps of which the first are masked."""

    def call(*tensors):
        masking = keras.layers.Masking(dtype=layer.compute_dtype)
        return case.call(layer, *(masking(ops.cast(x, layer.compute_dtype)) for x in tensors))

    return call


@pytest.mark.keras("3.14")  # before, Keras loses a mask where a layer casts its input
@pytest.mark.parametrize("name", few(MASKED, MECHANISMS & {*MASKED}, where=BACKEND == "jax"))
def test_masks_are_used_as_in_stock_keras(name):
    case = CASES[name]
    stock = case.make(getattr(keras.layers, name), "float32")
    ours = case.make(OURS[name], "mixed_float16")
    for layer in (ours, stock):
        case.call(layer, *symbols(case))
    give_the_same_weights([ours, stock])
    arrays = case.inputs()
    for array in arrays:
        array[:, -2:] = 0
    found, wanted = (evaluate(masked(case, layer), arrays) for layer in (ours, stock))
    # Outputs of masked steps do not matter; kerasmp gives 0 where everything is masked.
    found, wanted = ([y[:, :-2] if y.ndim == 3 else y for y in each] for each in (found, wanted))
    assert_near(found, wanted, case.tolerance)
    symbols_ = [keras.layers.Masking()(x) for x in symbols(case)]
    ends = [hasattr(case.call(layer, *symbols_), "_keras_mask") for layer in (ours, stock)]
    assert ends[0] == ends[1]


# ----------------------------------------------------------------------------------- stock Keras


def compare_dtypes(cls, **arguments):
    case = CASES[cls.__name__]
    layers = [case.make(cls, dtype) for dtype in ("mixed_float16", "float32")]
    said, *_ = [keras.tree.flatten(case.call(x, *symbols(case), **arguments)) for x in layers]
    give_the_same_weights(layers)
    way = "xla" if cls.__name__ in XLA else "quick"
    shapes = [y.shape for y in said]
    found, wanted = (one_step(case, layer, shapes, way, **arguments) for layer in layers)
    assert_near(found, wanted, case.tolerance)
    assert {v.dtype for v in layers[0].trainable_variables} <= {"float32"}


@pytest.mark.full
@every_mode({name: cls for name, cls in RIGHT.items() if name not in RANDOM})
def test_a_float16_step_of_stock_keras_is_near_one_in_float32(cls, training):
    compare_dtypes(cls, **mode(cls, training))


@pytest.mark.full
@every({name: cls for name, cls in RIGHT.items() if name in RANDOM})
def test_outside_training_a_float16_step_of_a_random_layer_is_near_one_in_float32(cls):
    compare_dtypes(cls, **mode(cls, training=False))


@pytest.mark.full
@every({name: STOCK[name] for name in WRONG})
@pytest.mark.keras("3.15")
def test_known_errors_of_stock_keras_are_still_there(cls):
    with pytest.raises(Exception, match=r"tensor \d|overflow|not supported"):
        compare_dtypes(cls, **mode(cls, training=True))
