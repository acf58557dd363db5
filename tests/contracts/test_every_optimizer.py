"""What holds for every optimizer of Keras; they are looked up, so a new one is held to it too."""

import keras
import numpy as np
import pytest
from helpers.marks import by_name
from helpers.stepping import (
    BACKEND,
    EXACT_WAYS,
    WAYS,
    assert_same_bits,
    built,
    each_of,
    numpy,
    tensors,
    variables_of,
)
from helpers.twins import SCALE, START, Twins, gradients

from kerasmp.optimizer import LossScaleOptimizer

OTHERS = {
    keras.optimizers.Optimizer,  # the base
    keras.optimizers.LossScaleOptimizer,  # scales already
    getattr(keras.optimizers, "MultiOptimizer", None),  # holds others: tests/optimizer
}
EVERY = {
    name: member
    for name, member in vars(keras.optimizers).items()
    if isinstance(member, type)
    and issubclass(member, keras.optimizers.Optimizer)
    and member not in OTHERS
}
COMPANY = {
    "alone": {},
    "with company": {
        "weight_decay": 0.01,
        "global_clipnorm": 2.0,
        "use_ema": True,
        "ema_overwrite_frequency": 3,
        "gradient_accumulation_steps": 2,
    },
}
# Plain Muon fails on matrices in TensorFlow's Keras 3.12: it asks a tf.Variable for its `path`.
SINCE = {"Muon": pytest.mark.keras("3.13.0")}


def every_optimizer(*quick):
    """Parametrize `cls`; the full set has those that are not named here."""
    assert EVERY.keys() >= set(quick)
    marks = {name: [SINCE[name]] if name in SINCE else [] for name in EVERY}
    for name in EVERY.keys() - set(quick):
        marks[name].append(pytest.mark.full)
    params = [pytest.param(cls, marks=marks[name], id=name) for name, cls in EVERY.items()]
    return pytest.mark.parametrize("cls", params)


alone_or_not = pytest.mark.parametrize("company", by_name(COMPANY, ["with company"]))


def test_the_search_finds_the_optimizers_of_keras_3_12():
    known = "Adadelta Adafactor Adagrad Adam AdamW Adamax Ftrl Lamb Lion Muon Nadam RMSprop SGD"
    assert EVERY.keys() >= set(known.split())


# With one or two slots, with a matrix function as update, with slots that do not start as
# zeros, and with updates by sign.
@every_optimizer(
    *(["Adam", "Muon"] if BACKEND == "jax" else ["SGD", "Adam", "Muon", "Ftrl", "Lion"])
)
@alone_or_not
@each_of(EXACT_WAYS)
def test_equals_the_plain_one_bit_for_bit_and_a_skipped_step_changes_nothing(cls, company, step):
    twins = Twins(lambda _: cls(0.1, **company), step)
    twins.bad(np.inf)
    for seed in range(5):  # odd: a window stays open, and equal steps of Lion do not cancel
        twins.good(seed)
        twins.bad(np.nan)
    twins.check()
    moved = zip(numpy(twins.ours), START, strict=True)
    assert all(np.any(now != np.asarray(start, "float32")) for now, start in moved)
    assert (twins.wrapped.applied_steps, twins.wrapped.skipped_steps) == (5, 6)


@every_optimizer("SGD" if BACKEND == "jax" else "Adam")
@pytest.mark.parametrize("company", by_name(COMPANY, ["alone"]))
@each_of([way for way in WAYS if way not in EXACT_WAYS] or WAYS)
@pytest.mark.backend("tensorflow", "jax")
def test_in_the_other_ways_a_skipped_step_changes_nothing_either(cls, company, step):
    twins = Twins(lambda _: cls(0.1, **company), step)
    twins.bad(np.inf)
    twins.good(0)
    twins.bad(-np.inf)
    assert (twins.wrapped.applied_steps, twins.wrapped.skipped_steps) == (1, 2)
    # XLA may round differently (see EXACT_WAYS): a few units in the last place of values up to 5.
    theirs = numpy([*twins.theirs, *twins.plain.variables])
    for ours, plain in zip(twins.state(), theirs, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=2e-6, atol=2e-6)


@every_optimizer(*(["SGD"] if BACKEND == "jax" else ["SGD", "Muon"]))
@alone_or_not
def test_a_new_one_from_config_and_state_continues_bit_for_bit(cls, company):
    step = EXACT_WAYS[-1]
    twins = Twins(lambda _: cls(0.1, **company), step)
    twins.good(0)
    twins.bad()
    again = keras.optimizers.deserialize(keras.optimizers.serialize(twins.wrapped))
    assert type(again) is LossScaleOptimizer
    assert type(again.inner_optimizer) is type(twins.inner)
    assert again.get_config() == twins.wrapped.get_config()
    variables = variables_of(*START)
    for variable, value in zip(variables, numpy(twins.ours), strict=True):
        variable.assign(value)
    built(again, variables)
    again.set_weights(numpy(twins.wrapped.variables))
    assert (again.applied_steps, again.skipped_steps) == (1, 1)
    step(again, tensors(*gradients(1, SCALE)), variables)
    twins.good(1)
    assert_same_bits(numpy(variables), numpy(twins.ours))
    assert_same_bits(numpy(again.variables), numpy(twins.wrapped.variables))
