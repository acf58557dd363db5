"""Errors of computations in half precision against float64, and the smallest possible ones."""

import math
from functools import cache

import ml_dtypes
import numpy as np
from helpers import gradients
from helpers.gradients import WAYS as MODES
from helpers.gradients import numpy as numpy_of

__all__ = ["MODES", "assert_near_best", "draw", "error", "errors", "numpy_of", "rounded", "step"]

HALVES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LARGEST = {name: float(ml_dtypes.finfo(dtype).max) for name, dtype in HALVES.items()}
# For float16 the smallest normal number. Those of bfloat16 are as small as float32's; where a
# formula gives 0, rounding in float32 leaves values below this.
SMALLEST = {"float16": 2.0**-14, "bfloat16": 2.0**-20}


def rounded(values, dtype="float16"):
    """Return float64 values, rounded to a half precision."""
    with np.errstate(over="ignore"):
        return np.asarray(values, "float64").astype(HALVES[dtype]).astype("float64")


def draw(seed, shape, scale=1.0):
    """Return normally distributed numbers, rounded to float16."""
    return rounded(np.random.default_rng(seed).normal(size=shape) * scale)


@cache  # a function with many drawn inputs is compiled once for each shape
def _compiled(mode, function):
    return gradients.compile_(function, [], mode)


def step(mode, function, inputs, upstream, variables=(), *, dtype="float16"):
    """Return the outputs of `function(*inputs)` and gradients, all as float64 arrays.

    Args:
        mode: One of MODES.
        function: Takes tensors and returns one.
        inputs: Arrays, cast to `dtype`.
        upstream: The gradient of the outputs, cast to their dtype.
        variables: Keras variables whose gradients follow those of the inputs.
        dtype: The dtype of the inputs.
    """
    run = gradients.compile_(function, variables, mode) if variables else _compiled(mode, function)
    (outputs,), found = run([np.asarray(x, dtype) for x in inputs], [upstream])
    return outputs, found


def error(found, wanted, *, subnormal=False, dtype="float16"):
    """Return ||found - wanted|| / ||wanted||; None if there is nothing to compare.

    Wanted values beyond the range of `dtype` are left out, and unless `subnormal` is true, so are
    values below `SMALLEST` in both arrays. A tensor whose wanted values are all below it cannot be
    compared: its true value may be 0, as for the bias of the keys of attention.
    """
    assert found.shape == wanted.shape
    assert not np.any(np.isnan(wanted))
    fits = np.abs(wanted) <= LARGEST[dtype]
    if not np.all(np.isfinite(found[fits])):
        return math.inf
    if not subnormal:
        tiny = (np.abs(wanted) < SMALLEST[dtype]) & (wanted != 0)
        if np.all(tiny | (wanted == 0)) and np.any(tiny):
            return None
        fits &= ~(tiny & (np.abs(found) < SMALLEST[dtype]))
    found, wanted = found[fits], wanted[fits]
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))


def errors(found, wanted):
    """Return the error of `found`, and that of `wanted` rounded to float16."""
    return error(found, wanted), error(rounded(wanted), wanted)


def assert_near_best(found, wanted, slack=0.0):
    """Fail unless the error of `found` is within four times the best that float16 allows.

    `slack` is an absolute error that float32 has as well.
    """
    of_ours, best = errors(found, wanted)
    if best is None:  # only zeros and subnormal numbers: the zeros must be exact
        assert of_ours is None, "not finite"
        assert not np.any(found[wanted == 0])
        return
    allowed = 4 * best + slack / (np.linalg.norm(wanted) or 1)
    assert of_ours <= allowed, f"error {of_ours:.3g}, best {best:.3g}"
