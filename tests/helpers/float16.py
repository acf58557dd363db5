"""How far a computation in half precision is from float64, and how near it could be."""

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
# In float16, of its normal numbers. Those of bfloat16 are as small as float32's, but where the
# result is 0 by the formula, the roundings of float32, in which the best is computed, leave these.
SMALLEST = {"float16": 2.0**-14, "bfloat16": 2.0**-20}


def rounded(values, dtype="float16"):
    """Return the float64 values nearest to `values` that a half precision holds."""
    with np.errstate(over="ignore"):
        return np.asarray(values, "float64").astype(HALVES[dtype]).astype("float64")


def draw(seed, shape, scale=1.0):
    """Return normal numbers that float16 holds."""
    return rounded(np.random.default_rng(seed).normal(size=shape) * scale)


@cache  # one function drawn many inputs for is compiled once for each shape
def _compiled(mode, function):
    return gradients.compile_(function, [], mode)


def step(mode, function, inputs, upstream, variables=(), *, dtype="float16"):
    """Return the outputs of `function(*inputs)` and gradients, all as float64 arrays.

    Args:
        mode: One of MODES.
        function: Takes tensors and returns one.
        inputs: Arrays, cast to `dtype`.
        upstream: The gradient of the outputs, cast to their dtype.
        variables: Keras variables that get gradients too, after those of the inputs.
        dtype: Of the inputs.
    """
    run = gradients.compile_(function, variables, mode) if variables else _compiled(mode, function)
    (outputs,), found = run([np.asarray(x, dtype) for x in inputs], [upstream])
    return outputs, found


def error(found, wanted, *, subnormal=False, dtype="float16"):
    """Return ||found - wanted|| / ||wanted||; None if there is nothing to compare.

    Left out is what is wanted beyond the range of `dtype` and, unless `subnormal` counts, what is
    below `SMALLEST` both as found and as wanted. A tensor that is wanted below it everywhere says
    nothing: its true value may be 0, as for the bias of an attention's keys.
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
    """Return the error of `found`, and that of what is wanted, rounded to float16."""
    return error(found, wanted), error(rounded(wanted), wanted)


def assert_near_best(found, wanted, slack=0.0):
    """Fail unless the error of `found` is within four times the best that float16 allows.

    `slack` is an absolute error that float32 has too.
    """
    of_ours, best = errors(found, wanted)
    if best is None:  # nothing but zeros and subnormal numbers, of which the zeros have to be zeros
        assert of_ours is None, "not finite"
        assert not np.any(found[wanted == 0])
        return
    allowed = 4 * best + slack / (np.linalg.norm(wanted) or 1)
    assert of_ours <= allowed, f"error {of_ours:.3g}, best {best:.3g}"
