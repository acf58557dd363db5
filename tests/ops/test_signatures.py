"""Each public function has the arguments of Keras's, and errors say why input is refused."""

import inspect

import keras
import numpy as np
import pytest
from helpers.op_arguments import NAMES, arguments_of
from keras import ops

import kerasmp
from kerasmp.errors import ArgumentError

pytestmark = pytest.mark.unit


def of_keras(name):
    """Return the function of Keras that a kerasmp function corresponds to."""
    activations = hasattr(keras.activations, name) and name not in {"softmax", "log_softmax"}
    first = keras.activations if activations else ops
    return next(
        getattr(package, name) for package in (first, ops, keras.losses) if hasattr(package, name)
    )


@pytest.mark.parametrize("name", NAMES)
def test_arguments_have_the_names_and_positions_of_those_of_keras(name):
    def named(function):
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]

    function = getattr(kerasmp.ops, name)
    wanted, found = named(of_keras(name)), named(function)
    assert found[: len(wanted)] == wanted[: len(found)]
    if name == "dot_product_attention":  # needs a framework
        return
    given = arguments_of(name)
    by_name = function(**dict(zip(wanted, given, strict=False)))
    np.testing.assert_array_equal(by_name, function(*given))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 4)] * 3, "four dimensions"),
        ([(1, 3, 4, 8), (1, 3, 3, 8), (1, 3, 3, 8)], "cannot be divided"),
        ([(1, 3, 4, 8), (1, 3, 2, 8), (1, 3, 1, 8)], "cannot be divided"),
    ],
)
def test_shapes_that_do_not_fit_are_errors_that_show_them(shapes, message):
    with pytest.raises(ArgumentError, match=message) as raised:
        kerasmp.ops.dot_product_attention(*(np.ones(shape, "float16") for shape in shapes))
    assert str(shapes[0]) in str(raised.value)


def test_the_order_of_a_norm_is_at_least_1():
    with pytest.raises(ValueError, match="order"):
        kerasmp.ops.normalize(ops.ones((2,)), order=0)


def test_plain_lists_and_arrays_are_accepted():
    assert float(kerasmp.ops.sum([1.0, 2.0])) == 3.0
    assert float(kerasmp.ops.mean(np.full(4096, 100.0, "float16"))) == 100.0


@pytest.mark.parametrize("mask", [[True, True, False], [1, 1, 0], [1.0, 0.75, 0.25]])
def test_a_mask_may_be_numbers(mask):
    x = np.array([0.0, 0.0, 9.0], "float16")
    assert np.asarray(kerasmp.ops.softmax(x, mask=mask)).tolist() == [0.5, 0.5, 0.0]
