"""A weights file stores the scaling state by name, and the config holds the settings."""

import functools

import keras
import numpy as np
import pytest
from helpers.stepping import assert_same_bits, eager, numpy, tensors, variables_of

import kerasmp as mp

COUNTERS = ("loss_scale", "applied_steps", "skipped_steps", "consecutive_skips")
SCHEDULE = mp.DynamicLossScale(
    initial_scale=2.0**23,
    growth_factor=4.0,
    backoff_factor=0.25,
    growth_interval=3,
    hysteresis=2,
    min_scale=2.0,
)


def optimizer_for(variables):
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=SCHEDULE)
    optimizer.build(variables)
    return optimizer


@functools.cache
def saved():
    """Return an optimizer whose counters all differ from 0, and its saved state."""
    optimizer, store = optimizer_for(variables := variables_of([1.0, 2.0])), {}
    for gradient in (1.0, np.inf, np.inf, 1.0, np.nan):
        eager(optimizer, tensors([gradient, 1.0]), variables)
    fresh = mp.LossScaleOptimizer("adam", loss_scale=SCHEDULE)
    assert all(getattr(optimizer, name) != getattr(fresh, name) for name in COUNTERS)
    optimizer.save_own_variables(store)
    return optimizer, store


def test_weights_files_store_the_state_by_name():
    optimizer, store = saved()
    assert {"dynamic_scale", "step_counter", "skipped_steps", "hysteresis_left"} <= store.keys()
    other = optimizer_for(variables_of([1.0, 2.0]))
    other.load_own_variables(store)
    for name in COUNTERS:
        assert getattr(other, name) == getattr(optimizer, name)
    assert_same_bits(numpy(other.own_variables), numpy(optimizer.own_variables))


def test_a_counter_that_a_file_lacks_starts_anew():
    optimizer, store = saved()
    store = {name: value for name, value in store.items() if name not in {"loss", "unknown"}}
    other = optimizer_for(variables_of([1.0, 2.0]))
    other.load_own_variables(store)
    assert other.loss_scale == optimizer.loss_scale
    assert other.skipped_steps == optimizer.skipped_steps == optimizer.skip_causes["unknown"] == 3
    assert other.skip_causes["loss"] == other.skip_causes["unknown"] == 0


@pytest.mark.parametrize("spec", ["dynamic", "fixed", 128.0, None, SCHEDULE], ids=str)
def test_the_config_is_complete_and_from_config_leaves_it_alone(spec):
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=spec, name="mine")
    config = optimizer.get_config()
    before = repr(config)
    again = mp.LossScaleOptimizer.from_config(config)
    assert repr(config) == before
    assert again.schedule == optimizer.schedule
    assert again.name == "mine"
    assert again.get_config() == config
