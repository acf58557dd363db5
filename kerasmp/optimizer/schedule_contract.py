"""The contract of a loss-scale schedule, which is checked before the first step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from keras import ops

from kerasmp.errors import ArgumentTypeError, LossScaleError, with_type
from kerasmp.loss_scale import LossScale, validation
from kerasmp.optimizer.gradient_statistics import STATISTICS
from kerasmp.optimizer.step_arguments import as_real_tensor


def check_schedule(schedule: Any) -> None:
    """Check that a schedule, which may be user-defined, can scale a loss.

    A user-defined one is tried at its first state, since an error in a step would come too late.

    Raises:
        ArgumentTypeError: If it is not a schedule.
        LossScaleError: If it lacks a setting, or its `init` or `update` does not return a state.
    """
    if not isinstance(schedule, LossScale):
        raise ArgumentTypeError(
            "`schedule` is not a loss-scale schedule.",
            received=with_type(schedule),
            expected="a LossScale",
            fix="For a fixed scale use FixedLossScale(number).",
        )
    if type(schedule).__module__.partition(".")[0] == "kerasmp":
        return
    unknown = [name for name in schedule.measures if name not in STATISTICS]
    if unknown:
        raise _broken(schedule, f"measures = {schedule.measures!r}", f"names among {[*STATISTICS]}")
    for name in ("initial_scale", "min_scale", "max_scale"):
        if not hasattr(schedule, name):
            raise _broken(schedule, f"no attribute `{name}`", f"a number `{name}`")
        validation.scale(name, getattr(schedule, name))
    validation.enclosed(schedule)
    first = schedule.init()
    if not isinstance(first, Mapping) or not {"scale", "step_counter"} <= {*first}:
        raise _broken(schedule, f"{first!r} from init", 'a dict with "scale" and "step_counter"')
    for key, value in first.items():
        kind = numbers.Integral if key == "step_counter" else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise _broken(schedule, f"{key!r}: {value!r} from init", "Python numbers")
    validation.scale("scale", first["scale"])
    for finite in (True, False):
        statistics = dict.fromkeys(schedule.measures, 0.5 if finite else 0.0)
        after = schedule.update(dict(first), finite, **statistics)
        _check_update(schedule, first, after, f"update(init(), finite={finite})")


def _check_update(schedule: LossScale, first: Any, after: Any, call: str) -> None:
    if not isinstance(after, Mapping):
        raise _broken(schedule, f"{after!r} from {call}", "a dict")
    missing = [key for key in first if key not in after]
    if missing:
        raise _broken(schedule, f"no {missing} from {call}", f"the keys {[*first]}")
    scale = as_real_tensor("The scale", after["scale"], f" from {call}")
    try:
        value = ops.convert_to_numpy(scale)
    except Exception:  # noqa: BLE001 - numbers are not known in a trace; each framework has its error
        return
    if value.shape != () or not 0.0 < float(value) < math.inf:
        raise _broken(schedule, f"the scale {after['scale']!r} from {call}", "a number above 0")


def _broken(schedule: LossScale, received: str, expected: str) -> LossScaleError:
    return LossScaleError(
        f"{type(schedule).__name__} does not meet the contract of a loss-scale schedule.",
        received=received,
        expected=expected,
        fix="See kerasmp.LossScale for what a schedule needs.",
    )
