"""With many gradients TensorFlow checks sums of squares first: what it decides must stay exact."""

import keras
import numpy as np
import pytest

import kerasmp as mp
from helpers.stepping import WAYS, numpy, tensors, variables_of

NUMBER = 20


def weights():
    return variables_of(*np.ones((NUMBER, 3)))


def gradients(changes):
    values = np.ones((NUMBER, 3), "float32")
    for place, value in changes.items():
        values[place, 1] = value
    return tensors(*values)


@pytest.mark.parametrize("step", WAYS, ids=lambda w: w.__name__)
class TestManyGradients:
    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    @pytest.mark.parametrize("place", [0, 11, NUMBER - 1])
    def test_one_bad_value_is_found_and_skipped(self, step, bad, place):
        variables = weights()
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=1.0)
        step(optimizer, gradients({place: bad}), variables)
        assert np.all(np.stack(numpy(variables)) == 1.0)
        assert list(optimizer.nonfinite_counts) == [int(i == place) for i in range(NUMBER)]

    def test_huge_finite_values_whose_squares_overflow_are_applied(self, step):
        variables = weights()
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=1.0)
        step(optimizer, gradients({3: 3e38, 7: -2e30}), variables)
        assert optimizer.applied_steps == 1
        assert numpy(variables)[3][1] == np.float32(1.0) - np.float32(3e38) / 2
        assert numpy(variables)[5][1] == 0.5

    def test_a_bad_value_beside_huge_ones_is_told_apart(self, step):
        variables = weights()
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=1.0)
        step(optimizer, gradients({3: 3e38, 7: np.nan}), variables)
        assert list(optimizer.nonfinite_counts) == [int(i == 7) for i in range(NUMBER)]
