"""Step a wrapped and a plain optimizer on equal variables side by side."""

import numpy as np
from helpers.stepping import assert_same_bits, built, numpy, tensors, variables_of
from keras import ops

from kerasmp.optimizer import LossScaleOptimizer

# A matrix, a vector, a tensor and a scalar: some optimizers treat them differently.
START = ([[1.0, -2.0, 0.5], [3.0, 4.0, -0.25]], [0.5, -0.5], [[[1.5], [-1.0]]], 0.75)
SCALE = 2.0**12  # a power of two, so that scaling is exact


def gradients(seed, scale=1.0, values=START):
    """Return random gradients times `scale`, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    return [np.asarray(scale * rng.standard_normal(np.shape(v)), "float32") for v in values]


class Twins:
    """A wrapped and a plain optimizer; the wrapped one also gets bad steps, which change nothing.

    Args:
        make: Returns a plain optimizer for the given variables.
        step: One of `helpers.stepping.EXACT_WAYS`.
        prepare: Called with the variables of each before anything else.
        missing: Indices of variables without a gradient.
    """

    def __init__(self, make, step, prepare=None, missing=()):
        self.step, self.missing, self.scale = step, missing, SCALE
        self.ours, self.theirs = variables_of(*START), variables_of(*START)
        if prepare:
            prepare(self.ours)
            prepare(self.theirs)
        self.wrapped = LossScaleOptimizer(make(self.ours), loss_scale=SCALE, fused=False)
        self.plain = make(self.theirs)

    @property
    def inner(self):
        """The optimizer inside the wrapped one."""
        return self.wrapped.inner_optimizer

    def good(self, seed):
        """Give both the same finite gradients; the wrapped one gets them scaled."""
        direct = [getattr(v, "overwrite_with_gradient", False) for v in self.ours]
        ours = [g if d else self.scale * g for g, d in zip(gradients(seed), direct, strict=True)]
        self.step(self.wrapped, self._some(ours), self.ours)
        self.step(self.plain, self._some(gradients(seed)), self.theirs)

    def bad(self, value=np.nan):
        """Give the wrapped one a bad value; nothing that the plain one has too may change."""
        built(self.wrapped, self.ours)
        grads = gradients(99, SCALE)
        position = next(i for i in range(len(grads)) if i not in self.missing)
        grads[position].flat[-1] = value
        before, iterations = self.state(), self.iterations(self.wrapped)
        self.step(self.wrapped, self._some(grads), self.ours)
        assert_same_bits(self.state(), before)
        assert self.iterations(self.wrapped) == iterations
        assert self.wrapped.last_step_skipped

    def state(self):
        """Return the weights and the inner optimizer's variables: slots, averages, counters."""
        return numpy([*self.ours, *self.inner.variables])

    @staticmethod
    def iterations(optimizer):
        """Return `iterations`, which is a tensor while gradients are accumulated."""
        return int(ops.convert_to_tensor(optimizer.iterations))

    def check(self):
        """Assert that both have equal state, without tolerance."""
        assert_same_bits(self.state(), numpy([*self.theirs, *self.plain.variables]))
        assert self.iterations(self.wrapped) == self.iterations(self.plain)

    def _some(self, grads):
        return tensors(*(None if i in self.missing else g for i, g in enumerate(grads)))
