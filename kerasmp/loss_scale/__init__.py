"""Loss-scale schedules: frozen settings, with `init` and `update` as pure functions."""

import numbers
from typing import Any

from kerasmp.errors import ArgumentTypeError, LossScaleError, did_you_mean, with_type
from kerasmp.loss_scale import validation
from kerasmp.loss_scale.base import LossScale
from kerasmp.loss_scale.dynamic import DynamicLossScale
from kerasmp.loss_scale.fixed import FixedLossScale, NoLossScale
from kerasmp.loss_scale.log_max import LogMaxLossScale
from kerasmp.loss_scale.underflow import UnderflowLossScale

__all__ = [
    "DynamicLossScale",
    "FixedLossScale",
    "LogMaxLossScale",
    "LossScale",
    "NoLossScale",
    "UnderflowLossScale",
    "resolve",
]


def resolve(spec: Any) -> LossScale:
    """Return the schedule that `spec` stands for.

    Args:
        spec: A `LossScale`, which is returned as it is; "dynamic" or "fixed"; a positive number
            for a fixed scale; or None for `NoLossScale()`.

    Raises:
        LossScaleError: If `spec` is an unknown name, or a number that cannot be a scale.
        ArgumentTypeError: If `spec` has another type.

    Example:

    >>> resolve(1024)
    FixedLossScale(scale=1024.0)
    """
    by_name: dict[str, type[LossScale]] = {"dynamic": DynamicLossScale, "fixed": FixedLossScale}
    if isinstance(spec, LossScale):
        return spec
    if spec is None:
        return NoLossScale()
    if isinstance(spec, numbers.Real):
        return FixedLossScale(validation.scale("loss_scale", spec))
    expected = '"dynamic", "fixed", a positive number, a LossScale or None'
    if not isinstance(spec, str):
        raise ArgumentTypeError(
            "`loss_scale` has the wrong type.",
            received=with_type(spec),
            expected=expected,
            fix="To choose settings, pass kerasmp.DynamicLossScale(...).",
        )
    if spec not in by_name:
        raise LossScaleError(
            "No loss-scale schedule has this name.",
            received=repr(spec),
            expected=expected,
            fix=did_you_mean(spec, by_name) or 'The usual choice is "dynamic".',
        )
    return by_name[spec]()
