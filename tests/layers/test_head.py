"""DenseHead: a low-precision matmul, then float32 up to the loss."""

import keras
import numpy as np
import pytest
from helpers.gradients import float64
from helpers.marks import few, full, full_on, marks_on
from keras import ops

from kerasmp.layers import DenseHead
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("jax")

MIXED = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}
# Policy, then the dtype of variables, of the matmul, and of the output.
POLICIES = [
    ("mixed_float16", "float32", "float16", "float32"),
    ("mixed_bfloat16", "float32", "bfloat16", "float32"),
    ("float32", "float32", "float32", "float32"),
    ("float16", "float16", "float16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16", "float32"),
    ("float64", "float64", "float64", "float64"),
]
POLICY = pytest.mark.parametrize("policy", ["mixed_float16", full("mixed_bfloat16")])
# The largest integer such that the next one is rounded back to it.
LAST_WHOLE = {"float16": 2**11, "bfloat16": 2**8, "float32": 2**24}


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def numpy_of(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def compile_(model, rate, scale, loss):
    """Compile a model for steps too few to be worth XLA."""
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(rate), loss_scale=scale)
    model.compile(optimizer, loss, run_eagerly=keras.backend.backend() == "tensorflow")


@pytest.fixture
def _wide_jax():
    with float64():
        yield


@pytest.mark.usefixtures("_wide_jax")
@pytest.mark.parametrize(("policy", "variables", "compute", "output"), POLICIES)
@pytest.mark.parametrize("activation", [full(None), "softmax"])
def test_symbolic_and_eager_outputs_have_the_same_dtypes(
    policy, variables, compute, output, activation
):
    head = DenseHead(3, activation, dtype=policy)
    symbolic = head(keras.Input((4,), dtype=compute))
    actual = head(ops.ones((2, 4), dtype=compute))
    assert {v.dtype for v in head.variables} == {variables}
    assert head.compute_dtype == compute
    assert dtype_of(actual) == symbolic.dtype == head.output_dtype == output
    assert symbolic.shape == (None, 3)
    assert actual.shape == (2, 3)


@full_on("jax")
@pytest.mark.parametrize("dtype", LAST_WHOLE)
def test_the_matmul_rounds_to_the_compute_dtype(dtype):
    """`last` + 1 is not representable in that dtype, so the result shows which dtype multiplied."""
    last = LAST_WHOLE[dtype]
    inputs = np.array([[last, 1.0]])
    settings = {"kernel_initializer": "ones", "use_bias": False}
    head = DenseHead(1, dtype="float32" if dtype == "float32" else f"mixed_{dtype}", **settings)
    assert numpy_of(head(inputs)).item() == last
    wider = DenseHead(1, dtype="float64" if dtype == "float32" else "float32", **settings)
    if dtype != "float32":
        assert numpy_of(wider(inputs)).item() == last + 1


FINE = 1 + 2.0**-20  # rounds to 1 in either low precision


@POLICY
def test_the_bias_is_added_in_float32(policy):
    head = DenseHead(1, bias_initializer=keras.initializers.Constant(FINE), dtype=policy)
    assert numpy_of(head(np.zeros((1, 2)))).item() == FINE


SIGMOID = {"kernel_initializer": "ones", "activation": "sigmoid"}


@POLICY
def test_the_activation_is_computed_in_float32(policy):
    outputs = DenseHead(1, **SIGMOID, dtype=policy)(np.full((1, 1), -20.0))
    np.testing.assert_allclose(numpy_of(outputs).item(), 1 / (1 + np.exp(20.0)), 1e-6)


@pytest.mark.full
@pytest.mark.parametrize("policy", MIXED)
def test_stock_keras_rounds_bias_and_activation(policy):
    settings = {"bias_initializer": keras.initializers.Constant(FINE), "dtype": policy}
    outputs = ops.cast(keras.layers.Dense(1, **settings)(np.zeros((1, 2))), "float32")
    assert numpy_of(outputs).item() == 1.0
    outputs = keras.layers.Dense(1, **SIGMOID, dtype=policy)(np.full((1, 1), -20.0))
    exact = 1 / (1 + np.exp(20.0))
    assert abs(numpy_of(ops.cast(outputs, "float32")).item() - exact) > 1e-4 * exact


@full_on("jax")
@POLICY
def test_it_is_compared_with_a_float32_model(policy):
    inputs = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
    head = DenseHead(5, "softmax", dtype=policy)
    outputs = numpy_of(head(inputs))
    rounded = [
        numpy_of(ops.cast(ops.cast(value, MIXED[policy]), "float32")).astype("float64")
        for value in (inputs, head.kernel)
    ]
    logits = rounded[0] @ rounded[1]
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    resolution = {"mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}[policy]
    np.testing.assert_allclose(outputs, expected, rtol=resolution)


@full_on("jax")
def test_it_takes_the_arguments_of_dense():
    arguments = {
        "activation": "relu",
        "use_bias": True,
        "kernel_initializer": keras.initializers.Constant(0.5),
        "bias_initializer": "ones",
        "kernel_regularizer": keras.regularizers.L2(0.25),
        "bias_regularizer": keras.regularizers.L1(0.5),
        "activity_regularizer": keras.regularizers.L2(0.125),
        "kernel_constraint": "non_neg",
        "bias_constraint": "non_neg",
        "name": "head",
        "dtype": "float32",
    }
    inputs = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    ours, stock = DenseHead(2, **arguments), keras.layers.Dense(2, **arguments)
    np.testing.assert_array_equal(numpy_of(ours(inputs)), numpy_of(stock(inputs)))
    np.testing.assert_allclose(
        [numpy_of(loss) for loss in ours.losses],
        [numpy_of(loss) for loss in stock.losses],
        rtol=1e-6,
    )
    assert len(ours.losses) == 3
    assert isinstance(ours, keras.layers.Dense)
    assert ours.get_config() == stock.get_config()
    assert DenseHead(2, trainable=False).get_config()["trainable"] is False
    assert DenseHead(units=3, activation=ops.relu).activation is ops.relu


@full_on("jax")
@pytest.mark.parametrize("policy", ["mixed_float16", full("float32")])
def test_inputs_of_rank_3_without_bias(policy):
    head = DenseHead(2, use_bias=False, dtype=policy)
    inputs = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    outputs = numpy_of(head(inputs))
    assert head.bias is None
    assert [v.name for v in head.variables] == ["kernel"]
    np.testing.assert_allclose(outputs, inputs @ numpy_of(head.kernel), rtol=1e-2, atol=1e-2)
    assert head(keras.Input((3, 4))).shape == (None, 3, 2)


def test_masks_are_passed_on():
    embed = keras.layers.Embedding(5, 4, mask_zero=True, dtype="mixed_float16")
    outputs = DenseHead(2, dtype="mixed_float16")(embed(np.array([[1, 2, 0]])))
    assert numpy_of(outputs._keras_mask).tolist() == [[True, True, False]]


def penalty(cls, dtype):
    """Return the penalty of 200 * 400 squares of 1: 80000, which is inf in float16."""
    settings = {"kernel_initializer": "ones", "activity_regularizer": keras.regularizers.L2(1.0)}
    layer = cls(400, **settings, dtype=dtype)
    layer(np.ones((200, 1)))
    (loss,) = layer.losses
    return loss


def test_the_activity_regularizer_sums_in_float32():
    loss = penalty(DenseHead, "mixed_float16")
    assert dtype_of(loss) == "float32"
    assert numpy_of(loss) == numpy_of(penalty(keras.layers.Dense, "float32")) > 0


@pytest.mark.parametrize("outer", ["mixed_float16", full("mixed_bfloat16")])
def test_an_enclosing_layer_does_not_narrow_the_bias(outer):
    """The autocast of the layer around it must end at the head."""

    @keras.saving.register_keras_serializable("kerasmp_tests")
    class Outer(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            fine = keras.initializers.Constant(1 + 2.0**-20)
            self.head = DenseHead(1, bias_initializer=fine, dtype=self.dtype_policy)

        def call(self, inputs):
            return self.head(inputs)

    outputs = Outer(dtype=outer)(np.zeros((1, 2)))
    assert dtype_of(outputs) == "float32"
    assert numpy_of(outputs).item() == 1 + 2.0**-20


@full_on("jax")
def test_lora_trains_the_added_matrices_alone():
    head = DenseHead(3, dtype="mixed_float16")
    model = keras.Sequential([keras.Input((4,)), head])
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    before = numpy_of(model(x))
    head.enable_lora(2)
    np.testing.assert_array_equal(numpy_of(model(x)), before)  # B starts at zero
    assert [v.name for v in head.trainable_variables] == ["bias", "lora_kernel_a", "lora_kernel_b"]
    assert {v.dtype for v in head.variables} == {"float32"}
    kernel = numpy_of(head._kernel)
    compile_(model, 0.1, 64, "mse")
    model.fit(x, np.ones((8, 3)), epochs=2, verbose=0)
    np.testing.assert_array_equal(numpy_of(head._kernel), kernel)
    assert np.abs(numpy_of(head.lora_kernel_b)).max() > 0
    outputs = numpy_of(model(x))
    assert outputs.dtype == np.float32
    assert np.abs(outputs - before).max() > 0


def test_a_built_head_cannot_be_quantized():
    with pytest.raises(NotImplementedError):
        keras.Sequential([keras.Input((4,)), DenseHead(3)]).layers[0].quantize("int8")


# ------------------------------------------------------- probabilities, and a loss that logs them

CLASSES = 1000


def softmax_gradients(x, kernel, labels):
    """Return d(mean cross-entropy)/d(kernel, bias), in float64."""
    x, kernel = x.astype("float16").astype("float64"), kernel.astype("float64")
    logits = x @ kernel.astype("float16").astype("float64")
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(len(x)), labels] -= 1
    return x.T @ p / len(x), p.mean(0)


def sigmoid_gradients(x, kernel, targets):
    """Return d(mean binary cross-entropy)/d(kernel, bias), in float64."""
    x = x.astype("float16").astype("float64")
    logits = x @ kernel.astype("float16").astype("float64")
    error = (1 / (1 + np.exp(-logits)) - targets) / targets.size
    return x.T @ error, error.sum(0)


def one_step(layer, loss, x, y):
    """Return the gradients that one step of SGD with rate 1 applied, and the optimizer."""
    model = keras.Sequential([keras.Input((x.shape[-1],)), layer])
    compile_(model, 1.0, 2.0**15, loss)
    before = [numpy_of(w) for w in model.trainable_variables]
    model.fit(x, y, batch_size=len(x), verbose=0)
    after = [numpy_of(w) for w in model.trainable_variables]
    return before, [b - a for b, a in zip(before, after, strict=True)], model.optimizer


LOSSES = ["sparse_categorical", "binary"]


def problem(loss):
    """Return inputs, targets, settings of the last layer, and its exact gradients of a kernel."""
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 32)).astype("float32")
    classes = 2 if loss == "binary" else CLASSES
    labels = random.integers(0, classes, 64)
    settings = {"units": classes, "activation": "softmax", "dtype": "mixed_float16"}
    if loss != "binary":
        return x, labels, settings, lambda kernel: softmax_gradients(x, kernel, labels)
    one_hot = np.eye(classes, dtype="float32")[labels]
    settings["activation"] = "sigmoid"
    settings["kernel_initializer"] = keras.initializers.RandomNormal(stddev=0.5, seed=1)
    return x, one_hot, settings, lambda kernel: sigmoid_gradients(x, kernel, one_hot)


@pytest.mark.parametrize("loss", few(LOSSES, LOSSES[:1], where=keras.backend.backend() == "jax"))
def test_cross_entropy_of_probabilities_trains(loss):
    x, y, settings, reference = problem(loss)
    before, gradients, optimizer = one_step(DenseHead(**settings), f"{loss}_crossentropy", x, y)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (1, 0)
    for got, want in zip(gradients, reference(before[0]), strict=True):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 5e-3
