"""Contracts of each public function: Keras's argument names, and one node in a model."""

import keras
import numpy as np
import pytest
from helpers.float16 import numpy_of
from helpers.marks import few, full, full_on
from helpers.op_arguments import NAMES, arguments_of
from keras import ops

import kerasmp

WIDER = {"float16": "float32", "float32": "float16"}


# One for each module of functions.
QUICK = {"average_pool", "dot_product_attention", "gelu", "mean_squared_error", "norm", "softmax"}


@full_on("jax")
@pytest.mark.parametrize("built_in", ["float16", full("float32")])
@pytest.mark.parametrize("name", few(NAMES, QUICK))
def test_each_function_is_one_node_whose_copy_from_config_follows_the_input_dtype(name, built_in):
    function = getattr(kerasmp.ops, name)
    symbols = [
        keras.KerasTensor(x.shape, x.dtype) if ops.is_tensor(x) else x
        for x in arguments_of(name, built_in)
    ]
    symbol = function(*symbols)
    said = function(*arguments_of(name, built_in))
    assert symbol.shape == tuple(said.shape)
    assert symbol.dtype == keras.backend.standardize_dtype(said.dtype)
    node = symbol._keras_history.operation
    # One node for everything: its inputs are the arguments.
    assert all(any(x is y for y in keras.tree.flatten(node.input)) for x in tensors(symbols))
    node = type(node).from_config(node.get_config())
    given = arguments_of(name, WIDER[built_in])
    found, wanted = node(*given), function(*given)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(numpy_of(found), numpy_of(wanted))


def tensors(arguments):
    return [x for x in arguments if isinstance(x, keras.KerasTensor)]


def saved_and_loaded(model, tmp_path, **loading):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras", **loading)


def in_a_model(function):
    """Return a float16 model for inputs of 300, whose squares overflow float16."""
    inputs = keras.Input((4,), dtype="float16")
    return keras.Model(inputs, function(inputs))


LARGE = np.full((1, 4), 300, "float16")


def squares(x):
    return ops.sqrt(ops.sum(ops.square(x), axis=-1))


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_a_registered_function_is_saved_and_still_computes_in_float32(outside, tmp_path):
    def length(x):
        return squares(x)

    register, widen = keras.saving.register_keras_serializable("test"), kerasmp.ops.in_float32
    function = register(widen(length)) if outside else widen(register(length))
    model = in_a_model(function)
    loaded = saved_and_loaded(model, tmp_path)
    again = saved_and_loaded(keras.models.clone_model(loaded), tmp_path)
    for each in (model, loaded, again):
        assert numpy_of(each(LARGE)).tolist() == [600]
        assert keras.backend.standardize_dtype(each(LARGE).dtype) == "float16"


def test_an_unregistered_function_is_found_in_custom_objects(tmp_path):
    model = in_a_model(kerasmp.ops.in_float32(squares))
    loaded = saved_and_loaded(model, tmp_path, custom_objects={"squares": squares})
    assert numpy_of(loaded(LARGE)).tolist() == [600]


def test_a_lambda_is_saved_as_keras_saves_lambdas(tmp_path):
    model = in_a_model(kerasmp.ops.in_float32(lambda x: (x * x) ** 0.5))
    with pytest.warns(UserWarning, match="lambda"):
        loaded = saved_and_loaded(model, tmp_path, safe_mode=False)
    np.testing.assert_array_equal(numpy_of(loaded(LARGE)), LARGE)
    with pytest.raises(ValueError, match="lambda"):
        keras.models.load_model(tmp_path / "model.keras")
