"""Fails if Keras's TensorFlow optimizers no longer sum over replicas where kerasmp expects it."""

import keras
import numpy as np
import pytest
from keras import ops

from kerasmp import backend

pytestmark = pytest.mark.backend("tensorflow")


def test_an_optimizer_sums_its_gradients_with_this_method_and_uses_the_result():
    optimizer, weight = keras.optimizers.SGD(1.0, clipvalue=2.0), keras.Variable([0.0, 0.0])
    seen = []

    def ten_times_what_comes(grads_and_vars):
        seen.append([ops.convert_to_numpy(g).tolist() for g, _ in grads_and_vars])
        return [(10 * g, v) for g, v in grads_and_vars]

    object.__setattr__(optimizer, backend.current().ALL_REDUCE_METHOD, ten_times_what_comes)
    optimizer.apply([ops.array([1.0, 3.0])], [weight])
    assert seen == [[[1.0, 2.0]]]  # once, and after clipping: what is local to a replica
    np.testing.assert_array_equal(ops.convert_to_numpy(weight), [-10.0, -20.0])
