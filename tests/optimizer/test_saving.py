"""Nothing about scaling is lost on the way to a file and back."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import kerasmp as mp

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = X[:, :1] * 2 - 1
COUNTERS = ("loss_scale", "applied_steps", "skipped_steps", "consecutive_skips")
SCHEDULE = mp.DynamicLossScale(
    initial_scale=2.0**23,
    growth_factor=4.0,
    backoff_factor=0.25,
    growth_interval=3,
    hysteresis=2,
    min_scale=2.0,
)


def network():
    keras.utils.set_random_seed(0)
    return mp.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="tanh", dtype="mixed_float16"),
            mp.layers.DenseHead(1),
        ]
    )


def trained(loss_scale=SCHEDULE, epochs=1):
    model = network()
    model.compile(mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=loss_scale), "mse")
    x = X.copy()
    x[-1] = np.inf  # so that the last step is skipped, and every counter differs from 0
    model.fit(x, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model


def state(optimizer):
    # Numbered: another model's layers have other names, and the same order.
    return [(v.name, ops.convert_to_numpy(v.value)) for v in optimizer._variables] + [
        ("inner", ops.convert_to_numpy(v.value)) for v in optimizer.inner_optimizer.variables
    ]


def assert_same_state(left, right):
    left, right = state(left), state(right)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, value), (_, other) in zip(left, right, strict=True):
        np.testing.assert_array_equal(value, other, err_msg=name)


def test_a_keras_file_brings_everything_back(tmp_path):
    model = trained()
    optimizer = model.optimizer
    fresh = mp.LossScaleOptimizer("adam", loss_scale=SCHEDULE)
    assert all(getattr(optimizer, name) != getattr(fresh, name) for name in COUNTERS)
    assert optimizer.nonfinite_counts.any()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert isinstance(loaded, mp.LossScaleOptimizer)
    assert loaded.schedule == SCHEDULE
    assert_same_state(loaded, optimizer)


def test_a_new_process_brings_everything_back(tmp_path):
    model = trained()
    model.save(tmp_path / "model.keras")
    code = (
        "import sys, keras, kerasmp\n"
        "optimizer = keras.models.load_model(sys.argv[1]).optimizer\n"
        f"print([float(getattr(optimizer, name)) for name in {COUNTERS}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.keras")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    wanted = [float(getattr(model.optimizer, name)) for name in COUNTERS]
    assert done.stdout.strip().splitlines()[-1] == str(wanted)


def test_weights_files_hold_the_optimizer_by_name():
    store = {}
    optimizer = trained().optimizer
    optimizer.save_own_variables(store)
    assert {"dynamic_scale", "step_counter", "skipped_steps"} <= store.keys()
    other = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=SCHEDULE)
    other.build(optimizer.target_variables)
    other.load_own_variables(store)
    assert [getattr(other, name) for name in COUNTERS] == [
        getattr(optimizer, name) for name in COUNTERS
    ]


def test_a_counter_that_a_file_does_not_know_starts_anew():
    optimizer = trained().optimizer
    store = {}
    optimizer.save_own_variables(store)
    del store["loss"], store["gradients"]
    other = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=SCHEDULE)
    other.build(optimizer.target_variables)
    other.load_own_variables(store)
    assert (other.loss_scale, other.skipped_steps) == (
        optimizer.loss_scale,
        optimizer.skipped_steps,
    )
    assert sum(optimizer.skip_causes.values()) > 0
    assert other.skip_causes["loss"] == other.skip_causes["gradients"] == 0


def test_state_of_stock_keras_loads():
    variables = [keras.Variable(np.ones(3, "float32"))]
    stock = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    stock.build(variables)
    stock.step_counter.assign(7)
    stock.dynamic_scale.assign(512.0)
    store = {}
    stock.save_own_variables(store)
    ours = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    ours.build(variables)
    ours.load_own_variables(store)
    assert ours.loss_scale == 512.0
    assert int(ops.convert_to_numpy(ours.step_counter.value)) == 7


@pytest.mark.parametrize(
    ("scale", "inside"), [(np.inf, 2.0**24), (1e-30, 1.0), (0.0, 1.0), (np.nan, 2.0**15)]
)
def test_a_scale_from_a_file_is_brought_inside_the_bounds(scale, inside):
    variables = [keras.Variable(np.ones(3, "float32"))]
    store = {}
    optimizer = mp.LossScaleOptimizer("sgd")
    optimizer.build(variables)
    optimizer.save_own_variables(store)
    store["dynamic_scale"] = np.float32(scale)
    optimizer.load_own_variables(store)
    assert optimizer.loss_scale == inside


def test_two_epochs_and_two_more_equal_four_bit_for_bit(tmp_path):
    def losses(model, epochs, first=0):
        return model.fit(
            X, Y, batch_size=8, initial_epoch=first, epochs=epochs, shuffle=False, verbose=0
        ).history["loss"]

    def compiled():
        model = network()
        model.compile(mp.LossScaleOptimizer("adam", loss_scale=SCHEDULE), "mse")
        return model

    four = losses(compiled(), 4)
    half = compiled()
    two = losses(half, 2)
    half.save(tmp_path / "half.keras")
    resumed = keras.models.load_model(tmp_path / "half.keras")
    assert two + losses(resumed, 4, first=2) == four


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


def test_set_weights_covers_the_inner_optimizer_too():
    model = trained()
    other = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=SCHEDULE)
    other.build(model.trainable_variables)
    other.set_weights([ops.convert_to_numpy(v.value) for v in model.optimizer.variables])
    assert [ops.convert_to_numpy(v.value).tolist() for v in other.variables] == [
        ops.convert_to_numpy(v.value).tolist() for v in model.optimizer.variables
    ]
    with pytest.raises(mp.errors.LossScaleError, match="`weights`"):
        other.set_weights([])
