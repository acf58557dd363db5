"""Errors about mixed dtypes name the layer and a remedy."""

import keras
import numpy as np
import pytest
from keras import ops

import kerasmp as mp

X = np.ones((8, 4), "float32")
TARGETS = X[:, :1]


class Unfit(keras.layers.Layer):
    """Multiplies by a float32 tensor that Keras does not cast, with the framework's operator."""

    def __init__(self, **settings):
        super().__init__(name="unfit", **settings)
        self.dense = keras.layers.Dense(4)
        self.table = ops.convert_to_tensor(np.ones((4, 1), "float32"))

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return _matmul(self.dense(x), self.table)


def _matmul(one, other):
    if keras.backend.backend() == "torch":
        import torch

        return torch.matmul(one, other)
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.dot(one, other)
    import tensorflow as tf

    return tf.matmul(one, other)


def network(module, dtype):
    class Own(module.Model):
        def __init__(self):
            super().__init__()
            self.part = Unfit(dtype=dtype)

        def call(self, x):
            return self.part(x)

    with mp.policy_scope(dtype):
        model = Own()
        model.part.dense.dtype_policy = dtype
    return model


def notes(error):
    return " ".join(getattr(error.value, "__notes__", ()))


NAMED = r"Unfit 'unfit', which computes in float16 and keeps its variables in float32"


@pytest.mark.backend("tensorflow", "torch")
@pytest.mark.parametrize("module", [mp, keras], ids=["ours", "stock"])
def test_a_hint_names_the_layer_and_the_remedy(module):
    model = network(module, "mixed_float16")
    with pytest.raises(Exception, match="Exception encountered when calling") as error:
        model(X)
    hint = notes(error)
    assert (NAMED in hint) is (module is mp)
    assert ("keras.ops.cast(value, self.compute_dtype)" in hint) is (module is mp)
    assert (f"{__file__}, line " in hint) is (module is mp)


@pytest.mark.backend("tensorflow")
def test_errors_of_fit_and_of_a_graph_have_the_hint():
    import tensorflow as tf

    model = network(mp, "mixed_float16")
    model.compile("sgd", "mse")
    with pytest.raises(Exception, match="Exception encountered when calling") as error:
        model.fit(X, TARGETS, verbose=0, probe=False)
    assert notes(error).count(NAMED) == 1
    with pytest.raises(Exception, match="Exception encountered when calling") as error:
        tf.function(model, autograph=False)(X)
    assert notes(error).count(NAMED) == 1


class Mixing(mp.Model):
    """A user-defined model that calls a function of the framework on two dtypes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(ops.cast(x, "float16"), ops.cast(x, "float32"))


MEET = "operands of different float dtypes meet in Mixing"


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("name", ["add", "concat", "stack", "matmul", "where"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_messages_of_tensorflow_are_recognised(name, graph):
    import tensorflow as tf

    functions = {
        "add": lambda one, other: one + other,
        "concat": lambda one, other: tf.concat([one, other], 0),
        "stack": lambda one, other: tf.stack([one, other]),
        "matmul": lambda one, other: tf.matmul(one, other, transpose_b=True),
        "where": lambda one, other: tf.where(tf.ones_like(one, "bool"), one, other),
    }
    model = Mixing(functions[name])
    call = tf.function(model, autograph=False) if graph else model
    with pytest.raises((TypeError, ValueError, tf.errors.InvalidArgumentError)) as error:
        call(X)
    assert MEET in notes(error)


@pytest.mark.backend("jax")
def test_messages_of_jax_are_recognised():
    import jax

    with pytest.raises(TypeError) as error:
        Mixing(jax.lax.add)(X)
    assert MEET in notes(error)


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("float16"), RuntimeError("Half")])
def test_other_errors_are_left_alone(error):
    class Fails(mp.Model):
        def call(self, _):
            raise error

    with pytest.raises(type(error)) as caught:
        Fails()(X)
    assert not notes(caught)


def test_a_float32_model_has_no_such_error():
    assert network(mp, "float32")(X).shape == (8, 1)


class Sized(Unfit):
    """Has `compute_output_shape`: a symbolic call would raise before `fit`."""

    def compute_output_shape(self, shape):
        return (*shape[:-1], 1)


def connected(dtype):
    inputs = keras.Input((4,))
    with mp.policy_scope(dtype):
        outputs = Sized(dtype=dtype)(inputs)
    model = mp.Model(inputs, keras.layers.Dense(1, dtype="float32")(outputs))
    assert isinstance(model, mp.model.FunctionalModel)
    return model


def converted():
    model = connected("float32")
    mp.convert(model)
    return model


FUNCTIONAL = {"made in float16": lambda: connected("mixed_float16"), "converted": converted}
every_functional = pytest.mark.parametrize("build", FUNCTIONAL.values(), ids=FUNCTIONAL)


@pytest.mark.backend("tensorflow", "torch")
def test_errors_of_fit_of_a_functional_model_have_the_hint():
    model = connected("mixed_float16")
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=64.0), "mse")
    with pytest.raises(Exception, match="Exception encountered when calling") as error:
        model.fit(X, TARGETS, verbose=0, probe=False)
    hint = notes(error)
    assert NAMED.replace("Unfit", "Sized") in hint
    assert "keras.ops.cast(value, self.compute_dtype)" in hint


class AddsLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(ops.sum(x))
        return _matmul(x, ops.ones((1, 1), "float32"))


@pytest.mark.backend("jax")
@every_functional
def test_jax_mixes_dtypes_and_trains(build):
    model = build()
    outputs = AddsLoss(dtype="mixed_float16")(model.layers[1].output)
    model = mp.Model(model.inputs[0], keras.layers.Dense(1, dtype="float32")(outputs))
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=64.0), "mse")
    before = [np.asarray(value) for value in model.get_weights()]
    assert np.isfinite(model.fit(X, TARGETS, verbose=0, probe=False).history["loss"][0])
    assert model.optimizer.applied_steps == 1
    assert all((new != old).any() for new, old in zip(model.get_weights(), before, strict=True))
    model(X)
    [loss] = model.losses
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"  # of a sum in float16


# The function of a module named like a framework, in which the dtypes meet.
SOURCE = """def step(one, other):
    return one @ other
"""


@pytest.mark.backend("tensorflow", "torch")
def test_modules_named_like_a_framework_count_as_user_code():
    space = {"__name__": "keras_of_theirs"}
    exec(compile(SOURCE, "theirs.py", "exec"), space)
    with pytest.raises(Exception, match=r"float|Float|Half") as error:
        Mixing(space["step"])(ops.ones((1, 1)))
    assert "theirs.py, line 2" in notes(error)
