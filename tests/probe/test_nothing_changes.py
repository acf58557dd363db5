"""The probe leaves a model, and everything else that Keras keeps, as it was."""

import random

import keras
import numpy as np
import pytest
from keras import ops

import kerasmp as mp

layers = keras.layers

# JAX warns about the constant of UnitNormalization, which is 0 in float16.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")

EAGER = keras.backend.backend() != "jax"  # JAX compiles each operation of an eager step
X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")


class Counts(layers.Layer):
    """Counts its calls in a variable, and remembers the last output."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="int32")
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, inputs):
        self.calls.assign_add(1)
        self.last = inputs * ops.cast(self.scale, inputs.dtype)
        self.add_loss(ops.sum(self.last))
        return self.last


class Noisy(layers.Layer):
    """Draws from Keras's global generator, which takes its seed from Python's if it is new."""

    def __init__(self):
        super().__init__()
        # JAX traces a step without global state.
        self.seed = None if EAGER else keras.random.SeedGenerator(4)

    def call(self, inputs):
        noise = keras.random.normal(ops.shape(inputs), seed=self.seed)
        return inputs + ops.cast(noise, inputs.dtype)


def parts():
    return [
        layers.Dense(8, activity_regularizer="l2"),
        layers.BatchNormalization(),
        Counts(),
        Noisy(),
        layers.Dropout(0.5),
        layers.Reshape((2, 4)),
        layers.LSTM(2, stateful=True),
        layers.Rescaling(1e4),
        layers.UnitNormalization(),  # so that something is found
        layers.Dense(1, dtype="float32"),
    ]


class Subclass(mp.Model):
    def __init__(self):
        super().__init__()
        self.parts = parts()

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


def trained(kind):
    """Return a model after a step, in which each state differs from its initial value."""
    keras.utils.set_random_seed(2)
    with mp.policy_scope("mixed_float16"):
        if kind == "subclass":
            model = Subclass()
        else:
            model = mp.Sequential([keras.Input(batch_shape=(4, 8)), *parts()])
    model(X)
    model.compile("sgd", "mse", metrics=["mae"], run_eagerly=EAGER)
    model.train_on_batch(X, X[:, :1])
    model.predict_on_batch(X)
    model(X)
    return model


def read(variables):
    return [np.array(ops.convert_to_numpy(each)) for each in variables]


def state_of(model):
    """Return everything about a model that must stay, in a form that can be compared."""
    everything = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    inside = list(model._flatten_layers())
    states = [v for layer in inside for v in getattr(layer, "states", None) or []]
    return {
        "values": [each.tolist() for each in read([*everything, *states])],
        "objects": [id(v) for v in everything],
        "losses": [each.tolist() for each in read(model.losses)],
        "policies": [layer.dtype_policy for layer in inside],
        "functions": [
            id(getattr(model, f"{name}_function")) for name in ("train", "test", "predict")
        ],
        "classes": [type(layer) for layer in inside],
        "attributes": [
            # TensorFlow adds some of its own when it likes.
            {key for key in vars(layer) if not key.startswith("_self_")}
            for layer in inside
        ],
        "calls": [
            {key: id(value) for key, value in vars(layer).items() if key == "last"}
            for layer in inside
        ],
        "nodes": [(len(x._inbound_nodes), len(x._outbound_nodes)) for x in inside],
        "training": model.trainable,
    }


def diagnose(model, x):
    return mp.diagnose(model, x, x[:, :1]).findings


LOOKS = pytest.mark.parametrize("look", [mp.lint, diagnose])


@LOOKS
@pytest.mark.parametrize("kind", ["sequential", "subclass"])
def test_a_model_is_as_before(kind, look):
    model = trained(kind)
    before = state_of(model)
    assert any(each.rule == "inaccurate" for each in look(model, X))
    after = state_of(model)
    assert [name for name in before if before[name] != after[name]] == []
    model.train_on_batch(X, X[:, :1])


@LOOKS
@pytest.mark.parametrize("kind", ["sequential", "subclass"])
def test_random_numbers_afterwards_are_those_without_the_probe(kind, look):
    drawn = []
    for with_probe in (False, True):
        model = trained(kind)
        keras.utils.set_random_seed(3)
        if with_probe:
            look(model, X)
        numbers = [random.random(), np.random.random()]  # noqa: NPY002 - the global states
        drawn.append(numbers + read([keras.random.normal((3,)), model(X, training=True)]))
        keras.backend.clear_session(free_memory=False)
    for one, other in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_a_seed_too_a_generator_comes_only_when_it_is_used():
    model = trained("sequential")
    keras.backend.clear_session(free_memory=False)
    state = random.getstate()
    mp.lint(model, X)
    assert random.getstate() == state


def test_layers_that_are_made_afterwards_have_the_same_names():
    model = trained("subclass")
    mp.lint(model, X)
    made = [layers.Dense(1).name, layers.Lambda(abs).name, keras.Input((2,)).name]
    keras.backend.clear_session(free_memory=False)
    trained("subclass")
    assert made == [layers.Dense(1).name, layers.Lambda(abs).name, keras.Input((2,)).name]


class Raises(layers.Layer):
    def call(self, inputs):
        self.calls.assign_add(1)
        if self.armed:
            message = "not on this batch"
            raise RuntimeError(message)
        return inputs

    def build(self, _):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.armed = False

    def compute_output_shape(self, shape):
        return shape


def test_a_layer_that_raises_in_float32_too_is_a_finding_and_nothing_changes():
    with mp.policy_scope("mixed_float16"):
        model = mp.Sequential([keras.Input((8,)), Raises(name="raises"), layers.Dense(1)])
    model.compile("sgd", "mse")
    model.train_on_batch(X, X[:, :1])
    model.get_layer("raises").armed = True
    call, before = keras.Layer.__call__, state_of(model)
    [found] = [each for each in mp.lint(model, X) if each.rule == "cannot-compute"]
    assert found.severity == "error"
    assert found.place.endswith("raises")
    assert "RuntimeError: not on this batch" in found.reason
    assert state_of(model) == before
    assert keras.Layer.__call__ is call
