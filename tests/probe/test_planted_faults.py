"""A fault that half precision causes is found at its place, and nowhere else."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import kerasmp as mp

layers = keras.layers
# All models take this shape, because JAX compiles each operation again for another one.
X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
# What a reason says: the value in half precision and that in float32, or other two numbers.
NUMBERS = {
    "not-finite": r"returns (\S+), in float32 (\S+) \(",
    "inaccurate": r"returns (\S+), in float32 ([^\s:]+):",
    "underflow": r", (\d+) of (\d+) values are 0",
    "other-choice": r": (\d+) of (\d+) ",
    "other-mask": r"in (\d+) of (\d+) steps",
    "merged-values": r"^Of (\d+) distinct .* leaves (\d+):",
    "input-range": r"^Values up to (\S+) .* Above ([^\s:]+) ",
    "cannot-compute": r"()()raises TypeError: only float32",
}


class Own(layers.Layer):
    """A layer of the user."""

    is_traced = True  # whether its operations can be nodes of a graph

    def compute_output_shape(self, shape):
        return shape


class Square(Own):
    """Overflows."""

    def call(self, inputs):
        return ops.sqrt(ops.square(inputs * 2000))


class Flush(Own):
    """Squares to less than float16's smallest number."""

    def call(self, inputs):
        return ops.sqrt(ops.square(inputs * 1e-5)) * 1e4


class Total(Own):
    """Loses the terms that are small beside their sum."""

    def call(self, inputs):
        total = 256 + 0 * inputs
        for _ in range(40):
            total += 0.5
        return inputs + (total - 256)


class Sine(Own):
    """Makes the rounding of large numbers large."""

    def call(self, inputs):
        return ops.sin(5000 * inputs)


class Router(Own):
    """Chooses between numbers that half precision cannot tell apart."""

    def call(self, inputs):
        experts = 1e-4 * ops.cumsum(ops.ones_like(inputs), -1)
        scores = 1 + 1e-6 * inputs + experts
        chosen = ops.argmax(scores, -1)
        return inputs * ops.expand_dims(1.0 + ops.cast(chosen, inputs.dtype), -1)


class Refuses(Own):
    """Fails in half precision only."""

    is_traced = False

    def call(self, inputs):
        if keras.backend.standardize_dtype(inputs.dtype) != "float32":
            message = "only float32"
            raise TypeError(message)
        return inputs


def norm():
    return [layers.Rescaling(2000.0), layers.UnitNormalization(name="fault")]


def one(cls):
    return lambda: [cls(name="fault")]


def is_off(half, wide):
    return abs(half - wide) > 0.1 * abs(wide)


# The layers, the dtype, the operation at fault or None for the layer, the rule, and whether the
# reason's two numbers are right.
FAULTS = {
    "overflow": (one(Square), "float16", "square", "not-finite", lambda a, b: a > 65504 < b < 1e8),
    "overflow in a stock layer": (norm, "float16", None, "inaccurate", lambda a, b: a == 0 < b < 1),
    "flushed to zero": (one(Flush), "float16", "square", "underflow", lambda a, b: a == b == 32),
    "small terms": (
        one(Total),
        "bfloat16",
        "subtract",
        "inaccurate",
        lambda a, b: (a, b) == (0, 20),
    ),
    "sensitive": (one(Sine), "bfloat16", "sin", "inaccurate", is_off),
    "router": (one(Router), "bfloat16", "argmax", "other-choice", lambda a, b: a == b == 4),
    "refuses": (one(Refuses), "float16", None, "cannot-compute", lambda *_: True),
}


def through(parts, x):
    for part in parts:
        x = part(x)
    return x


def functional(parts):
    """Return a model with the operations of user-defined layers as nodes of its graph."""
    inputs = keras.Input((8,))
    x = 0.5 + ops.sigmoid(layers.Dense(8)(inputs))
    x = through([part.call if getattr(part, "is_traced", False) else part for part in parts], x)
    return keras.Model(inputs, layers.Dense(8)(ops.sigmoid(x)))


def sequential(parts):
    between = layers.Activation("sigmoid")
    return keras.Sequential([keras.Input((8,)), layers.Dense(8), between, *parts, layers.Dense(8)])


def nested(parts):
    inputs = keras.Input((8,))
    return keras.Model(inputs, layers.Dense(8)(sequential(parts)(layers.Dense(8)(inputs))))


class Subclass(keras.Model):
    def __init__(self, parts):
        super().__init__()
        self.first, self.parts, self.last = layers.Dense(8), parts, layers.Dense(8)

    def call(self, inputs):
        return self.last(through(self.parts, 0.5 + ops.sigmoid(self.first(inputs))))


def subclassed(parts):
    return Subclass(parts)  # lint builds it


KINDS = pytest.mark.parametrize("kind", [functional, sequential, nested, subclassed])


def only(model, x=X):
    """Return the only finding of the probe's rules that is not a hint, and its two numbers."""
    report = mp.lint(model, x)
    [found] = [each for each in report.errors + report.warnings if each.rule in NUMBERS]
    numbers = re.search(NUMBERS[found.rule], found.reason)
    assert numbers, found.reason
    return found, tuple(float(each or 0) for each in numbers.groups())


def place_of(model, layer):
    """Return the path by which a rule finds a layer."""
    if not model.built:  # as the layer refuses its dtype
        return layer.path or layer.name
    [row] = [row for row in mp.convert(model, dry_run=True).rows if row.layer is layer]
    return row.path


@KINDS
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_where_it_is(name, kind):
    parts, half, operation, rule, are_right = FAULTS[name]
    with mp.policy_scope(f"mixed_{half}"):
        made = parts()
        model = kind(made)
    found, numbers = only(model)
    assert found.rule == rule
    is_node = kind is functional and operation is not None
    path = [] if is_node else [place_of(model, made[-1])]
    assert found.place == "/".join([*path, *([operation] if operation else [])])
    assert are_right(*numbers), found.reason


DATA = {
    "input-range": (2, 7e4),
    "merged-values": (slice(None), 20190 + np.arange(4)),  # months
}


@KINDS
@pytest.mark.parametrize("rule", DATA)
def test_a_fault_of_the_data_is_found_at_the_input(rule, kind):
    rows, values = DATA[rule]
    x = X.copy()
    x[rows, 3] = values
    with mp.policy_scope("mixed_float16"):
        model = kind([])
    found, numbers = only(model, x)
    assert found.rule == rule
    assert found.place == "input " + (model.inputs[0].name if kind is not subclassed else "0")
    assert numbers == {"input-range": (7e4, 65504), "merged-values": (4, 1)}[rule]


class Position(Own):
    """Encodes numbers, which it must not be given in half precision."""

    def call(self, inputs):
        return ops.sin(inputs)


def test_timesteps_that_a_layer_rounds_are_found_where_it_matters():
    steps = 5000 + np.arange(32.0).reshape(4, 8)  # in each column float16 keeps them apart
    with mp.policy_scope("mixed_float16"):
        position = Position()
        model = keras.Sequential([keras.Input((8,)), position, layers.Dense(8)])
    found, numbers = only(model, steps)
    assert (found.rule, found.place) == ("inaccurate", f"{place_of(model, position)}/sin")
    assert is_off(*numbers)


def test_merged_data_are_found_once_though_later_steps_show_it():
    times = 20190 + np.arange(32.0).reshape(4, 8)[:, ::-1].T.reshape(4, 8)
    with mp.policy_scope("mixed_float16"):
        model = keras.Sequential([keras.Input((8,)), Position(), layers.Dense(8)])
    found, _ = only(model, times)
    assert found.rule == "merged-values"


@pytest.mark.parametrize("kind", [functional, sequential, nested, subclassed])
def test_another_mask_is_found_at_the_layer_that_makes_it(kind):
    x = X.copy()
    # TensorFlow compares rounded values with 0.1, the others with 0.1 as float16 rounds it.
    x[:, 5:] = 0.1 if keras.backend.backend() == "tensorflow" else 0.09999
    with mp.policy_scope("mixed_float16"):
        masking = layers.Masking(0.1)
        parts = [layers.Reshape((8, 1), dtype="float32"), masking, layers.LSTM(2)]
        if kind is functional:
            inputs = keras.Input((8,))
            model = keras.Model(inputs, through(parts, inputs))
        elif kind is sequential:
            model = keras.Sequential([keras.Input((8,)), *parts])
        elif kind is nested:
            inputs = keras.Input((8,))
            inner = keras.Sequential([keras.Input((8,)), *parts])
            model = keras.Model(inputs, layers.Dense(2)(inner(inputs)))
        else:
            model = Through(parts)
    found, numbers = only(model, x)
    assert (found.rule, found.place) == ("other-mask", place_of(model, masking))
    assert numbers == (12, 32)


class Through(keras.Model):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, inputs):
        return through(self.parts, inputs)


@pytest.mark.backend("jax")  # which sums windows in bfloat16
def test_a_pooling_that_loses_small_terms_is_found():
    x = np.random.default_rng(0).uniform(size=(1, 32, 32, 1)).astype("float32")
    pooling = layers.AveragePooling2D(32, dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input(x.shape[1:]), pooling])
    found, (half, wide) = only(model, x)
    assert (found.rule, found.place) == ("inaccurate", place_of(model, pooling))
    assert half < 0.9 * wide
    assert wide == pytest.approx(x.mean(), rel=1e-4)
