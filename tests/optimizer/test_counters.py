"""The counters of the wrapped optimizer, without an optimizer."""

import numpy as np
import pytest
from keras import ops

from kerasmp.optimizer.counters import NAN, count_nonfinite, split_nonfinite


@pytest.mark.unit
def test_counts_of_gradients_stop_at_their_largest_value():
    numbers = np.array([0, NAN - 1, NAN + 1, 2**31 - 1], "int32")
    after = ops.convert_to_numpy(count_nonfinite(numbers, np.int32([1, 1, 1, 1]), np.int32(1)))
    assert [each.tolist() for each in split_nonfinite(after)] == [
        [1, NAN - 1, 2, NAN - 1],
        [1, 1, 2, 2**15 - 1],
    ]
