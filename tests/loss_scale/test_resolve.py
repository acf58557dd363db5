"""The values that `loss_scale=` accepts."""

import numpy as np
import pytest

from kerasmp.errors import ArgumentTypeError, LossScaleError
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, NoLossScale, resolve

pytestmark = pytest.mark.unit

OWN = DynamicLossScale(initial_scale=8.0)


@pytest.mark.parametrize(
    ("spec", "schedule"),
    [
        ("dynamic", DynamicLossScale()),
        ("fixed", FixedLossScale(2.0**15)),
        (None, NoLossScale()),
        (1024, FixedLossScale(1024.0)),
        (0.5, FixedLossScale(0.5)),
        (np.float16(8), FixedLossScale(8.0)),
        (OWN, OWN),
    ],
    ids=repr,
)
def test_each_value_gives_its_schedule(spec, schedule):
    assert resolve(spec) == schedule


@pytest.mark.parametrize("spec", ["dynamik", "Dynamic", "", "1024", 0, -1, np.inf, np.nan, True])
def test_refuses_values_by_value(spec):
    with pytest.raises(LossScaleError) as caught:
        resolve(spec)
    assert caught.value.received == repr(spec)
    assert caught.value.expected


def test_proposes_the_nearest_name():
    with pytest.raises(LossScaleError, match=r'Did you mean "dynamic"\?'):
        resolve("dynamik")


@pytest.mark.parametrize("spec", [[1024], {"scale": 2}, b"dynamic", DynamicLossScale], ids=repr)
def test_refuses_types_by_type(spec):
    with pytest.raises(ArgumentTypeError, match=r"has the wrong type.*Received: .*of type"):
        resolve(spec)
