"""Arguments of the constructor, under Keras 2's and 3's names too, and what it refuses."""

import keras
import numpy as np
import pytest

import kerasmp as mp
from kerasmp.errors import ArgumentTypeError, LossScaleError, LossScaleWarning
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, NoLossScale
from kerasmp.optimizer import LossScaleOptimizer

# Pure Python: nothing here depends on the backend.
pytestmark = pytest.mark.backend("tensorflow")


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        ({}, DynamicLossScale()),
        ({"loss_scale": None}, NoLossScale()),  # loss_scale/test_resolve.py has the others
        ({"dynamic": True}, DynamicLossScale()),
        ({"dynamic": False}, FixedLossScale(2.0**15)),
        ({"dynamic": np.False_}, FixedLossScale(2.0**15)),
        ({"dynamic": False, "initial_scale": 64}, FixedLossScale(64.0)),
        ({"initial_scale": 64}, DynamicLossScale(initial_scale=64.0)),
        ({"dynamic_growth_steps": 7}, DynamicLossScale(growth_interval=7)),
        (
            {"dynamic": True, "initial_scale": 64, "dynamic_growth_steps": 7},
            DynamicLossScale(initial_scale=64.0, growth_interval=7),
        ),
        ({"loss_scale": "dynamic", "initial_scale": 64}, DynamicLossScale(initial_scale=64.0)),
    ],
    ids=str,
)
def test_each_way_to_name_a_schedule(arguments, schedule):
    optimizer = LossScaleOptimizer("sgd", **arguments)
    assert optimizer.schedule == schedule
    assert optimizer.initial_scale == schedule.initial_scale
    assert optimizer.dynamic_growth_steps == getattr(schedule, "growth_interval", None)


@pytest.mark.parametrize("loss_scale", ["fixed", 8.0, None, DynamicLossScale(8.0)], ids=str)
@pytest.mark.parametrize(
    "other", [{"dynamic": True}, {"initial_scale": 8.0}, {"dynamic_growth_steps": 2}], ids=str
)
def test_a_scale_that_is_given_twice_is_refused(loss_scale, other):
    with pytest.raises(LossScaleError, match="given twice") as caught:
        LossScaleOptimizer("sgd", loss_scale=loss_scale, **other)
    assert repr(loss_scale) in caught.value.received
    assert next(iter(other)) in caught.value.received


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("initial_scale", 0.0, "`initial_scale`.*Received: 0.0"),
        ("dynamic_growth_steps", 2.5, "`growth_interval`.*Received: 2.5"),
        # The same proposal as under the kerasmp name.
        ("initial_scale", 2.0**30, r"DynamicLossScale\(.*max_scale=1073741824\.0\)"),
    ],
)
def test_what_the_schedule_refuses_is_refused_under_keras_names(argument, value, told):
    with pytest.raises(LossScaleError, match=told):
        LossScaleOptimizer("sgd", **{argument: value})


def test_a_fixed_scale_with_a_growth_interval_is_refused():
    with pytest.raises(LossScaleError, match="A fixed scale does not grow"):
        LossScaleOptimizer("sgd", dynamic=False, dynamic_growth_steps=5)


@pytest.mark.parametrize("value", ["no", "False", 0, 1.0, DynamicLossScale()], ids=str)
def test_dynamic_is_a_bool(value):
    """As in Keras 2, where it came second and a scale in its place was a TypeError."""
    with pytest.raises(ArgumentTypeError, match=r"`dynamic` has an invalid value.*True or False"):
        LossScaleOptimizer("sgd", dynamic=value)


def test_all_but_the_optimizer_are_keywords():
    # In stock Keras the second positional argument is the initial scale, in Keras 2 `dynamic`.
    with pytest.raises(TypeError):
        LossScaleOptimizer("sgd", 1024)


@pytest.mark.parametrize(
    ("argument", "default", "other"),
    [
        ("weight_decay", None, 0.5),
        ("clipnorm", None, 0.5),
        ("global_clipnorm", None, 0.5),
        ("clipvalue", None, 0.5),
        ("use_ema", False, True),
        ("ema_momentum", 0.99, 0.5),
        ("ema_overwrite_frequency", None, 2),
        ("gradient_accumulation_steps", None, 2),
    ],
)
def test_settings_of_the_inner_optimizer_are_refused_with_a_hint(argument, default, other):
    """Fault 18: a setting on the wrapper must not be lost silently."""
    LossScaleOptimizer("sgd", **{argument: default})  # older files hold the default
    with pytest.raises(LossScaleError, match=f"`{argument}` on the `inner_optimizer`") as caught:
        LossScaleOptimizer("sgd", **{argument: other})
    assert caught.value.received == f"{argument}={other!r}"


def test_loss_scale_factor_is_refused_with_the_right_name():
    LossScaleOptimizer("sgd", loss_scale_factor=None)  # older files hold the default
    with pytest.raises(LossScaleError, match=r"For a fixed scale pass loss_scale=8\.0"):
        LossScaleOptimizer("sgd", loss_scale_factor=8.0)


def test_unknown_arguments_are_all_named():
    with pytest.raises(LossScaleError, match="arguments: `foo`, `bar`"):
        LossScaleOptimizer("sgd", foo=1, bar=2)


@pytest.mark.parametrize("name", [3, True, "a/b", b"sgd"], ids=str)
def test_an_invalid_name_is_a_value_error(name):
    with pytest.raises(LossScaleError, match="`name` cannot be an optimizer's name"):
        LossScaleOptimizer("sgd", name=name)


@pytest.mark.parametrize("inner", [3, None, [], keras.optimizers.SGD, object], ids=str)
def test_an_argument_that_is_not_an_optimizer_is_a_type_error(inner):
    with pytest.raises(ArgumentTypeError, match="is not an optimizer") as caught:
        LossScaleOptimizer(inner)
    assert caught.value.received.startswith(repr(inner))


def test_a_name_is_refused_where_an_instance_is_needed():
    optimizer = LossScaleOptimizer("sgd")
    with pytest.raises(ArgumentTypeError, match=r"Received: 'adam'.*keras.optimizers.get.'adam'"):
        optimizer.inner_optimizer = "adam"
    assert isinstance(optimizer.inner_optimizer, keras.optimizers.SGD)


@pytest.mark.parametrize("name", ["adamm", "", "adam "])
def test_an_unknown_name_is_a_value_error(name):
    with pytest.raises(LossScaleError, match="No Keras optimizer has this name") as caught:
        LossScaleOptimizer(name)
    assert caught.value.received == repr(name)


def test_a_name_that_keras_knows_is_resolved():
    assert isinstance(LossScaleOptimizer("adam").inner_optimizer, keras.optimizers.Adam)


@pytest.mark.parametrize("cls", [keras.optimizers.LossScaleOptimizer, LossScaleOptimizer])
def test_an_optimizer_that_scales_already_is_refused(cls):
    with pytest.raises(LossScaleError, match=r"already scales the loss.*`inner_optimizer`"):
        LossScaleOptimizer(cls(keras.optimizers.SGD(1.0)))


def test_a_scale_of_the_inner_optimizer_is_dropped_with_a_warning():
    inner = keras.optimizers.SGD(loss_scale_factor=100.0)
    with pytest.warns(LossScaleWarning, match=r"pass loss_scale=100\.0 here"):
        LossScaleOptimizer(inner)
    assert inner.loss_scale_factor is None


def test_compile_warns_of_a_dropped_scale_where_it_wraps():
    """Fault 10: stock Keras silently replaces it by a dynamic scale."""
    with mp.policy_scope("mixed_float16"):
        model = mp.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.warns(LossScaleWarning, match=r"pass loss_scale=256\.0 here"):
        model.compile(keras.optimizers.SGD(0.01, loss_scale_factor=256.0), "mse")
    model.compile(LossScaleOptimizer(keras.optimizers.SGD(0.01), loss_scale=256.0), "mse")
    assert model.optimizer.schedule == FixedLossScale(256.0)
