"""`calibrate` predicts what float16 does to gradients at each loss scale."""

import keras
import numpy as np
import pytest
from helpers.marks import full_on

import kerasmp as mp
from kerasmp.diagnosis.calibrate import calibration
from kerasmp.probe.magnitudes import magnitudes

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 2)).astype("float32")


def model(optimizer="sgd"):
    keras.utils.set_random_seed(0)
    with mp.policy_scope("mixed_float16"):
        hidden = keras.layers.Dense(16, activation="tanh")
        made = mp.Sequential([keras.Input((8,)), hidden, mp.layers.DenseHead(2)])
    made.compile(optimizer, "mse")
    return made


@pytest.mark.unit
def test_a_range_that_float16_holds():
    found = calibration(magnitudes(2.0 ** np.arange(-20, 1)), 1)
    assert found.scale == 2.0**12  # the largest, 1, may become 8, and then 32768
    assert not found.bfloat16
    at = {each.scale: each for each in found.predictions}
    assert (at[2.0**12].overflow, at[2.0**12].underflow) == (0, 0)
    assert at[2.0**16].overflow == 1 / 21  # 1 becomes 65536


@pytest.mark.unit
def test_a_range_that_needs_bfloat16():
    found = calibration(magnitudes(2.0 ** np.arange(-34, 11)), 1)
    assert found.bfloat16
    assert "float16 needs a scale of 512" in found.reason


@full_on("jax")
def test_the_predictions_hold():
    found = mp.calibrate(model(), (1e-3 * X, 1e-3 * Y), verbose=False)
    scales = {each.scale: each for each in found.predictions}
    for scale in (min(scales), found.scale):
        seen = mp.diagnose(model(), 1e-3 * X, 1e-3 * Y, loss_scale=scale).underflow
        assert seen.share == pytest.approx(scales[scale].underflow, abs=2e-3)
    trained = model(mp.LossScaleOptimizer("sgd", loss_scale=mp.FixedLossScale(found.scale)))
    logs = trained.fit(1e-3 * X, 1e-3 * Y, verbose=0, callbacks=[mp.OverflowMonitor()]).history
    assert logs["skipped_steps"] == [0]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[:8] / (index + 1), Y[:8]


@pytest.mark.parametrize("data", [[(X, Y)] * 6, Batches()])
def test_the_first_batches_are_looked_at(data, capsys):
    assert mp.calibrate(model(), data, batches=2).batches == 2
    assert "2/2" in capsys.readouterr().out


@pytest.mark.parametrize("data", [iter([(X, Y)]), 3, []])
def test_data_that_cannot_be_looked_at_are_an_error(data):
    with pytest.raises(mp.errors.ArgumentError, match=r"neither a batch nor|has no batch"):
        mp.calibrate(model(), data)
