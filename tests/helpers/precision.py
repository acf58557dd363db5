"""Errors of layers in half precision against float64, and the smallest possible ones.

An error is ||found - wanted|| / ||wanted||. The best is the error of the float64 result rounded to
the half precision; for a layer that multiplies matrices in half precision, it is that of the same
layer with the backend's half-precision products and everything else in float32.
"""

import dataclasses
import functools
import math

import keras
import ml_dtypes
import numpy as np
from helpers import gradients
from helpers.float16 import HALVES, error, rounded

# A smaller best is chance: a zero, a power of two, a single number. Four times it is one rounding.
LEAST = {name: float(ml_dtypes.finfo(dtype).eps) / 8 for name, dtype in HALVES.items()}
LEAST_WIDE = 2.0**-21  # for float32 results of a few operations
ALLOWED = 4  # times the best


@dataclasses.dataclass(frozen=True)
class Row:
    """The errors of one tensor: infinite if a value is not finite; None if the layer cannot run."""

    tensor: str
    stock: float | None
    ours: float | None
    best: float

    def good(self, contestant):
        found = getattr(self, contestant)
        return found is not None and found <= ALLOWED * self.best


class Measured:
    """The layers of a hazard with equal weights, each compiled once for one way of running."""

    def __init__(self, hazard, way, half="float16"):
        self.hazard, self.way, self.half = hazard, way, half
        self.arrays = hazard.hazardous_inputs(half)
        with gradients.float64():
            keras.utils.set_random_seed(0)
            layer = hazard.make("reference", half)
            wide = self._compiled(layer, hazard.reference_call or hazard.call, "float64")
            self._weights = [_weight(v, half) for v in _floats(layer)]
            self._wide = functools.partial(self._anew, layer, wide)
        # Without the name of the layer, which ends in a number.
        self._names = [v.path.partition("/")[2] for v in layer.trainable_variables]

    def _compiled(self, layer, call, dtype):
        """Build a layer and return the function of inputs and upstream gradients."""
        function = functools.partial(call, layer)
        dtypes = [dtype if x.dtype.kind == "f" else x.dtype.name for x in self.arrays]
        # Symbolic, since some layers of stock Keras do not run in float16 on JAX.
        symbols = [
            keras.Input(batch_shape=x.shape, dtype=d)
            for x, d in zip(self.arrays, dtypes, strict=True)
        ]
        # Losses that a call adds have no symbolic value: each is one number.
        self._shapes = [y.shape for y in keras.tree.flatten(function(*symbols))] or [()]
        way = "quick" if dtype == "float64" else self.way
        return gradients.compile_(function, layer.trainable_variables, way)

    @functools.cache  # noqa: B019 - the cache lives as long as this object
    def _runs(self, contestant):
        layer = self.hazard.make(contestant, self.half)
        run = self._compiled(layer, self.hazard.call, self.half)
        return functools.partial(self._anew, layer, run)

    def _anew(self, layer, run, *arguments):
        """Run with the initial weights, which an earlier run may have changed."""
        for variable, value in zip(_floats(layer), self._weights, strict=True):
            variable.assign(value)
        return run(*arguments)

    def rows(self, arrays=None, contestants=("stock", "ours")):
        """Return the errors of the outputs, then those of the gradients."""
        arrays = self.arrays if arrays is None else arrays
        outputs, wanted, upstream = self._wanted(arrays)
        names = [f"output {i + 1}" for i in range(len(outputs))]
        names += [f"d input {i + 1}" for i, x in enumerate(arrays) if x.dtype.kind == "f"]
        names += [f"d {name}" for name in self._names]
        found = {
            contestant: self._errors(contestant, arrays, upstream, [*outputs, *wanted])
            for contestant in (*contestants, "best")
        }
        least = LEAST_WIDE if self.hazard.wide else LEAST[self.half]
        nothing = [None] * len(names)
        columns = (found.get(c, nothing) for c in ("stock", "ours", "best"))
        rows = [
            # If the best overflows too, there is nothing to compare; if all wanted values are too
            # small, every finite result is good.
            Row(name, stock, ours, max(best or 0.0, least))
            if best != math.inf and not (best is None and ours != math.inf)
            else None
            for name, stock, ours, best in zip(names, *columns, strict=True)
        ]
        forward, backward = rows[: len(outputs)], rows[len(outputs) :]
        return [r for r in forward if r], [r for r in backward if r]

    def _wanted(self, arrays):
        random = np.random.default_rng(1)
        drawn = [random.normal(size=s) * self.hazard.upstream for s in self._shapes]
        upstream = [rounded(u, self.half) for u in drawn]
        with gradients.float64():
            outputs, wanted = self._wide(arrays, upstream)
        return outputs, wanted, upstream

    def _errors(self, contestant, arrays, upstream, wanted):
        if contestant == "best" and self.hazard.wide:
            return [LEAST_WIDE] * len(wanted)
        if contestant == "best" and not self.hazard.products:
            return [self._error(rounded(w, self.half), w) for w in wanted]
        narrow = HALVES[self.half]
        arrays = [x.astype(narrow) if x.dtype.kind == "f" else x for x in arrays]
        try:
            outputs, found = self._runs(contestant)(arrays, upstream)
        except Exception:
            if contestant != "stock":
                raise
            return [None] * len(wanted)
        return [self._error(f, w) for f, w in zip([*outputs, *found], wanted, strict=True)]

    def _error(self, found, wanted):
        return error(found, wanted, subnormal=self.hazard.subnormal, dtype=self.half)


def _floats(layer):
    return [v for v in layer.variables if keras.backend.is_float_dtype(v.dtype)]


def _weight(variable, half):
    value = gradients.numpy(variable)
    return rounded(value, half) if variable.trainable else value
