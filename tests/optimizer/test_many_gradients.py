"""With many gradients TensorFlow first checks sums of squares: the decision must stay exact."""

import keras
import numpy as np
from helpers.stepping import WAYS, each_of, eager, graph, numpy, tensors, variables_of

import kerasmp as mp

NUMBER = 20


def weights():
    return variables_of(*np.ones((NUMBER, 3)))


def gradients(changes):
    values = np.ones((NUMBER, 3), "float32")
    for place, value in changes.items():
        values[place, 1] = value
    return tensors(*values)


@each_of(WAYS, [way for way in (eager, graph) if way in WAYS])
def test_a_bad_value_is_found_among_many_gradients_and_huge_values_are_not(step):
    """All with one optimizer, so that a step is traced once."""
    variables, counts = weights(), np.zeros(NUMBER)
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=1.0)
    for bad in (np.inf, -np.inf, np.nan):
        for place in (0, 11, NUMBER - 1):
            step(optimizer, gradients({place: bad}), variables)
            counts[place] += 1
            assert np.all(np.stack(numpy(variables)) == 1.0)
            assert list(optimizer.nonfinite_counts) == list(counts)
    # One bad value beside a finite one whose square overflows.
    step(optimizer, gradients({3: 3e38, 7: np.nan}), variables)
    counts[7] += 1
    assert list(optimizer.nonfinite_counts) == list(counts)
    assert [optimizer.nan_counts[i] for i in (0, 3, 7, 11, NUMBER - 1)] == [1, 0, 1, 1, 1]
    assert optimizer.applied_steps == 0
    # The finite one alone is not bad.
    step(optimizer, gradients({3: 3e38, 7: -2e30}), variables)
    assert optimizer.applied_steps == 1
    assert numpy(variables)[3][1] == np.float32(1.0) - np.float32(3e38) / 2
    assert numpy(variables)[5][1] == 0.5


def test_which_gradient_is_bad_is_found_among_small_and_large_ones():
    """JAX checks small gradients together."""
    shapes = [(3,), (130, 130), (), (0,), (64, 2), (16385,), (1,)]
    variables = variables_of(*(np.ones(shape) for shape in shapes))
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=1.0)
    for place in [i for i, shape in enumerate(shapes) if 0 not in shape]:
        values = [np.ones(shape, "float32") for shape in shapes]
        values[place][(-1,) * len(shapes[place])] = np.nan
        before = optimizer.nonfinite_counts if optimizer.built else np.zeros(len(shapes), int)
        optimizer.apply(tensors(*values), variables)
        assert np.flatnonzero(optimizer.nonfinite_counts - before).tolist() == [place]
    assert optimizer.applied_steps == 0
    assert all(np.all(value == 1.0) for value in numpy(variables))
