"""Losses of float16 tensors against NumPy in float64."""

import keras
import numpy as np
import pytest
from helpers.float16 import MODES, assert_near_best, draw, numpy_of, rounded, step
from helpers.marks import few, full, full_on, in_each_way
from helpers.references import log_softmax, normalize, normalize_gradient, sigmoid, softmax
from keras import ops

import kerasmp

JAX = keras.backend.backend() == "jax"
LABELS = np.array([0, 3, 2, 1, 4, 0])
ONE_HOT = np.eye(5)[LABELS]


def near_float32(outputs, reference):
    """Assert a float32 loss with a float32 error, whatever the inputs are."""
    np.testing.assert_allclose(outputs, reference, rtol=2e-5, atol=1e-6)


@in_each_way
@pytest.mark.parametrize("scale", [full(1.0), 100.0, 20000.0])
@pytest.mark.parametrize("target", ["one-hot", "integer"])
def test_cross_entropy_from_logits(target, scale, mode):
    logits, dy = draw(0, (6, 5), scale), draw(1, (6,), 100.0)

    def loss(x):
        if target == "one-hot":
            return kerasmp.ops.categorical_crossentropy(ONE_HOT.astype(int), x, from_logits=True)
        return kerasmp.ops.sparse_categorical_crossentropy(LABELS, x, from_logits=True)

    outputs, (gradient,) = step(mode, loss, [logits], dy)
    near_float32(outputs, -log_softmax(logits)[np.arange(6), LABELS])
    assert_near_best(gradient, dy[:, None] * (softmax(logits) - ONE_HOT))


@full_on("jax")
@in_each_way
@pytest.mark.parametrize("target", ["one-hot", "integer"])
def test_cross_entropy_from_probabilities(target, mode):
    p = rounded(softmax(draw(0, (6, 5), 3.0)))
    dy = draw(1, (6,))

    def loss(x):
        if target == "one-hot":
            return kerasmp.ops.categorical_crossentropy(ONE_HOT, x)
        return kerasmp.ops.sparse_categorical_crossentropy(LABELS, x)

    outputs, (gradient,) = step(mode, loss, [p], dy)
    total = p.sum(-1)
    near_float32(outputs, np.log(total / p[np.arange(6), LABELS]))
    assert_near_best(gradient, dy[:, None] * (1 / total[:, None] - ONE_HOT / p))


SURE, TRUE = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])


@in_each_way
def test_probabilities_of_0_and_1_give_finite_losses(mode):
    p, y = SURE, TRUE
    outputs, (gradient,) = step(mode, lambda x: kerasmp.ops.binary_crossentropy(y, x), [p], y)
    np.testing.assert_allclose(outputs, [0, 0, 16.118, 15.942], atol=2e-3)
    assert np.all(np.isfinite(gradient))


@pytest.mark.full
@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize("mode", MODES)
def test_probabilities_of_0_and_1_give_losses_that_are_not_finite_in_stock_keras(mode):
    stock, _ = step(
        mode, lambda x: ops.binary_crossentropy(ops.cast(TRUE, x.dtype), x), [SURE], TRUE
    )
    assert not np.all(np.isfinite(stock))


@in_each_way
@pytest.mark.parametrize("from_logits", [True, False])
def test_binary_cross_entropy(from_logits, mode):
    x = draw(0, (40,), 100.0) if from_logits else rounded(sigmoid(draw(0, (40,), 2.0)))
    y, dy = np.arange(40) % 2, draw(1, (40,))

    def loss(x):
        return kerasmp.ops.binary_crossentropy(y, x, from_logits=from_logits)

    outputs, (gradient,) = step(mode, loss, [x], dy)
    if from_logits:
        near_float32(outputs, np.logaddexp(0, np.where(y == 1, -x, x)))
        assert_near_best(gradient, dy * np.where(y == 1, -sigmoid(-x), sigmoid(x)))
    else:
        near_float32(outputs, -np.log(np.where(y == 1, x, 1 - x)))
        assert_near_best(gradient, dy / np.where(y == 1, -x, 1 - x))


@in_each_way
@pytest.mark.parametrize("scale", [1e-3, full(1.0), 15000.0])
def test_cosine_similarity(scale, mode):
    a, b = draw(0, (6, 50), scale), draw(1, (6, 50), scale)
    b[2] = 0
    dy = np.full(6, 100.0)
    outputs, gradients = step(mode, kerasmp.ops.cosine_similarity, [a, b], dy)
    near_float32(outputs, -(normalize(a) * normalize(b)).sum(-1))
    assert_near_best(gradients[0], normalize_gradient(a, -dy[:, None] * normalize(b)))
    assert_near_best(gradients[1], normalize_gradient(b, -dy[:, None] * normalize(a)))


def others(rows, spread):
    """Return targets, predictions and loss for each name.

    Args:
        rows: Their shape.
        spread: The standard deviation of logits, for probabilities.
    """
    p, q = (softmax(draw(seed, rows, spread)) for seed in (0, 1))
    large, huge = draw(2, rows, 500.0), draw(3, rows, 10000.0)
    signs = np.sign(draw(4, rows))
    counts = np.floor(np.abs(huge))
    return {
        "mean_squared_error": (huge, large, lambda y, p: ((y - p) ** 2).mean(-1)),
        "mean_absolute_percentage_error": (
            signs,
            huge,
            lambda y, p: 100 * np.abs((y - p) / y).mean(-1),
        ),
        "squared_hinge": (signs, large, lambda y, p: (np.maximum(1 - y * p, 0) ** 2).mean(-1)),
        "poisson": (counts, np.abs(large), lambda y, p: (p - y * np.log(p + 1e-7)).mean(-1)),
        "kl_divergence": (
            p,
            q,
            lambda y, p: (
                np.clip(y, 1e-7, 1) * np.log(np.clip(y, 1e-7, 1) / np.clip(p, 1e-7, 1))
            ).sum(-1),
        ),
        "binary_focal_crossentropy": (
            (signs + 1) / 2,
            p,
            lambda y, p: (
                -(np.where(y == 1, (1 - p) ** 2 * np.log(p), p**2 * np.log(1 - p))).mean(-1)
            ),
        ),
        "categorical_focal_crossentropy": (
            np.eye(*rows),
            p,
            lambda y, p: -(0.25 * y * (1 - p) ** 2 * np.log(p)).sum(-1),
        ),
    }


# In float16 stock Keras is further off than float32 would be.
OTHERS = others((4, 6), 4.0)
# A mean over long rows gives each number such a small gradient that float16 rounds it.
LONG = others((2, 512), 1.0)


def other(name):
    """Return targets, predictions and the exact loss."""
    y, p, loss = OTHERS[name]
    y, p = rounded(y), rounded(p)
    if name == "categorical_focal_crossentropy":
        p = p / p.sum(-1, keepdims=True)  # as Keras does
    return y, p, loss(y, p)


@full_on("jax")
@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_are_those_of_float64(name):
    y, p, reference = other(name)
    tensors = [ops.cast(x.astype("float32"), "float16") for x in (y, p)]
    ours = getattr(kerasmp.ops, name)(*tensors)
    assert keras.backend.standardize_dtype(ours.dtype) == "float32"
    np.testing.assert_allclose(numpy_of(ours), reference, rtol=5e-4)
    near_float32(numpy_of(getattr(kerasmp.ops, name)(tensors[0], p.astype("float32"))), reference)


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_of_stock_keras_differ_from_float64(name):
    y, p, reference = other(name)
    tensors = [ops.cast(x.astype("float32"), "float16") for x in (y, p)]
    stock = numpy_of(getattr(keras.losses, name)(*tensors))
    assert not np.allclose(stock, reference, rtol=5e-4)


@in_each_way
@pytest.mark.parametrize("cases", [full(OTHERS), LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", few(OTHERS, {"kl_divergence", "mean_squared_error"}, where=JAX))
def test_gradients_of_other_losses_are_within_four_times_the_best(name, cases, mode):
    y, p, loss = cases[name]
    y, p = rounded(y), rounded(p)
    if name == "categorical_focal_crossentropy":

        def loss(y, p, of=loss):
            return of(y, p / p.sum(-1, keepdims=True))

    dy = draw(1, loss(y, p).shape, 10 / p.size)
    target = y.astype("float32")
    _, (gradient,) = step(mode, lambda x: getattr(kerasmp.ops, name)(target, x), [p], dy)
    wanted = np.zeros_like(p)
    for column in range(p.shape[-1]):
        shift = np.zeros_like(p)
        shift[:, column] = 1e-6 * abs(p[:, column]) + 1e-9
        difference = loss(y, p + shift) - loss(y, p - shift)
        wanted[:, column] = difference * dy / (2 * shift[:, column])
    assert_near_best(gradient, wanted)


@full_on("jax")
def test_losses_of_float32_are_those_of_keras():
    p = ops.convert_to_tensor(softmax(draw(0, (6, 5))).astype("float32"))
    hot = ops.cast(ONE_HOT, "float32")
    ours, stock = (package.categorical_crossentropy(hot, p) for package in (kerasmp.ops, ops))
    np.testing.assert_array_equal(numpy_of(ours), numpy_of(stock))
    ours, stock = (
        package.sparse_categorical_crossentropy(LABELS, p) for package in (kerasmp.ops, ops)
    )
    np.testing.assert_array_equal(numpy_of(ours), numpy_of(stock))
