"""A state that does not fit gives a clear message and changes nothing; scales are clipped."""

import functools

import keras
import numpy as np
import pytest
from helpers.marks import by_name, few, marks_on
from helpers.stepping import (
    Stock,
    assert_same_bits,
    eager,
    numpy,
    tensors,
    variables_of,
)

from kerasmp.errors import LossScaleError, LossScaleWarning
from kerasmp.loss_scale import DynamicLossScale
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("jax", "oldest")

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X[:, :1]


def stepped(optimizer, *shapes):
    """Return the optimizer after a good step and a bad one, so that no value is 0."""
    variables = variables_of(*(np.ones(shape) for shape in shapes or [(2,), (3,)]))
    optimizer.build(variables)
    eager(optimizer, tensors(*(np.full(v.shape, 64.0) for v in variables)), variables)
    eager(optimizer, tensors(*(np.full(v.shape, np.inf) for v in variables)), variables)
    return optimizer


def ours(inner="adam", **kwargs):
    return LossScaleOptimizer(inner, **kwargs)


def saved(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


@functools.cache
def usual():
    """Return one optimizer for many tests, which do not change it."""
    return stepped(ours())


def with_(**changed):
    return lambda: {**saved(usual()), **changed}


STATES = {
    "another number of variables": lambda: saved(stepped(ours(), (2,))),
    "other shapes": lambda: saved(stepped(ours(), (2,), (4,))),
    "another inner optimizer": lambda: saved(stepped(ours("sgd"))),
    "stock Keras's with another inner": lambda: saved(_built(Stock(keras.optimizers.SGD(0.1)))),
    "a plain one of another kind": lambda: saved(_built(keras.optimizers.SGD(0.1))),
    "a plain one for other shapes": lambda: saved(_built(keras.optimizers.Adam(), (3,), (2,))),
    "a scale that is no scalar": with_(dynamic_scale=np.ones(3, "float32")),
    "a counter that is no integer": with_(step_counter=np.float32(1.5)),
    "nothing": dict,
    "an optimizer that was never built": lambda: saved(ours()),
}


def _built(optimizer, *shapes):
    optimizer.build(variables_of(*(np.ones(shape) for shape in shapes or [(2,), (3,)])))
    return optimizer


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_saved_state_that_does_not_fit_warns_and_changes_nothing(state):
    optimizer, store = usual(), state()
    before = optimizer.get_weights()
    with pytest.warns(LossScaleWarning, match="does not fit .* nothing has changed"):
        optimizer.load_own_variables(store)
    assert_same_bits(optimizer.get_weights(), before)


def _changed(position, value):
    weights = usual().get_weights()
    weights[position] = value
    return weights


LISTS = {
    "empty": list,
    "one too few": lambda: usual().get_weights()[:-1],
    "another number of variables": lambda: stepped(ours(), (2,)).get_weights(),
    "other shapes": lambda: stepped(ours(), (2,), (4,)).get_weights(),
    "a wrong shape at the very end": lambda: _changed(-1, np.zeros(7, "float32")),
    "a counter that is no integer": lambda: _changed(2, np.float32(1.5)),
    "stock Keras's for other shapes": lambda: numpy(
        _built(Stock(keras.optimizers.Adam()), (3,), (2,)).variables
    ),
}


@pytest.mark.parametrize("weights", LISTS.values(), ids=LISTS)
def test_a_list_that_does_not_fit_is_an_error_and_changes_nothing(weights):
    optimizer, values = usual(), weights()
    before = optimizer.get_weights()
    with pytest.raises(LossScaleError, match="`weights` does not fit"):
        optimizer.set_weights(values)
    assert_same_bits(optimizer.get_weights(), before)


@pytest.mark.full
def test_stock_keras_keeps_what_it_set_before_the_value_that_does_not_fit():
    optimizer = _built(Stock(keras.optimizers.Adam()))
    weights = [np.float32(7.0) if v.shape == () else v for v in numpy(optimizer.variables)]
    weights[3] = np.zeros(3, "float32")
    with pytest.raises(ValueError, match="not compatible"):
        optimizer.set_weights(weights)
    assert int(keras.ops.convert_to_numpy(optimizer.step_counter.value)) == 7


def test_a_scale_from_a_list_is_clipped_to_the_bounds():
    optimizer = stepped(ours(loss_scale=DynamicLossScale(2.0**9, min_scale=2.0)))
    weights = optimizer.get_weights()
    outside = {np.inf: 2.0**24, 2.0**30: 2.0**24, 1e-30: 2.0, 0.0: 2.0, -4.0: 2.0, np.nan: 2.0**9}
    for scale, inside in outside.items():
        weights[3] = np.float32(scale)
        optimizer.set_weights(weights)
        assert optimizer.loss_scale == inside


def test_a_scale_from_a_file_is_clipped_to_the_bounds():
    optimizer = stepped(ours())
    for scale, inside in {np.inf: 2.0**24, 1e-30: FLOOR, 0.0: FLOOR, np.nan: 2.0**15}.items():
        optimizer.load_own_variables({**saved(optimizer), "dynamic_scale": np.float32(scale)})
        assert optimizer.loss_scale == inside


FLOOR = DynamicLossScale().min_scale
RUINED = [(0.0, FLOOR), (np.inf, 2.0**24), (np.nan, 2.0**15)]


@pytest.mark.parametrize(("scale", "inside"), few(RUINED, RUINED[:1]))
def test_an_infinite_scale_of_stock_keras_is_clipped_to_the_bounds(scale, inside, tmp_path):
    """Faults 3 and 4: the saved scale of stock Keras is 0 or infinity and never recovers."""
    model = _model(Stock(keras.optimizers.Adam()))
    model.optimizer.dynamic_scale.assign(scale)
    model.save_weights(tmp_path / "ruined.weights.h5")
    model = _model(ours())
    model.load_weights(tmp_path / "ruined.weights.h5")
    assert model.optimizer.loss_scale == inside


def _model(optimizer, *, frozen=False):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(2, trainable=not frozen), keras.layers.Dense(1)]
    )
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


OTHERS = {
    "another number of variables": lambda: _model(ours(), frozen=True),
    "another inner": lambda: _model(ours(keras.optimizers.SGD(0.1, momentum=0.9))),
    "stock with another inner": lambda: _model(Stock(keras.optimizers.SGD(0.1))),
    "plain": lambda: _model(keras.optimizers.SGD(0.1)),
}


@pytest.mark.parametrize("other", by_name(OTHERS, ["another inner", "plain"]))
def test_a_file_that_does_not_fit_leaves_the_whole_optimizer_alone(other, tmp_path):
    """Also the inner optimizer, which Keras loads later."""
    path = tmp_path / "other.weights.h5"
    other().save_weights(path)
    model = _model(ours())
    model.fit(X, Y, batch_size=8, verbose=0)
    before = model.optimizer.get_weights()
    with pytest.warns(LossScaleWarning, match="does not fit") as caught:
        model.load_weights(path)
    assert not [w for w in caught if "Skipping variable loading" in str(w.message)]
    assert_same_bits(model.optimizer.get_weights(), before)
    model.save_weights(path)  # the next file has the inner optimizer nevertheless
    twin = _model(ours())
    twin.load_weights(path)
    assert_same_bits(twin.optimizer.get_weights(), before)
