"""Fused updates on TensorFlow: one kernel per variable, with the results of Keras's optimizers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from kerasmp.backend.protocol import Backend
from kerasmp.backend.tensorflow_gradients import compiled_by_xla
from kerasmp.backend.tensors import chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kerasmp.backend.tensors import Weight


class FusedUpdates(Backend):
    """The methods of `Backend` for fused updates.

    Without a condition (`applied=None`) they use TensorFlow's kernels. With one, as under XLA, they
    use plain operations that XLA fuses.
    """

    HAS_FUSED_UPDATES = True

    def fits_fused_kernels(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[bool]:  # noqa: ARG002 - all variables fit
        """Return whether each gradient is a dense tensor, and not wider than float32."""
        return [isinstance(g, tf.Tensor) and g.dtype != tf.float64 for g in grads]

    def can_split_update(self) -> bool:
        """Return whether a step may mix fused kernels and Keras's own update."""
        return not compiled_by_xla()  # there, fused updates run outside of a branch

    def adam(  # noqa: PLR0913, PLR0917 - the settings of Adam
        self,
        weights: Sequence[Weight],
        divisor: Any,
        alpha: Any,
        betas: tuple[float, float],
        epsilon: float,
        applied: Any,
    ) -> None:
        """Update variables and moments as `keras.optimizers.Adam` does."""
        if applied is None:
            done: list[Any] = []
            for chunk in _chunks(weights):
                decayed = _decay(chunk, done)
                # Without this, a graph might hold the quotients of all variables at once.
                with tf.control_dependencies([*done, *decayed]):
                    gradients = [self.divide(w.gradient, divisor) for w in chunk]
                done = [
                    _adam(w, gradient, alpha, betas, epsilon)
                    for w, gradient in zip(chunk, gradients, strict=True)
                ]
            return
        for weight in weights:
            variable, m, v = (each.value for each in (weight.variable, *weight.moments))
            gradient = self.divide(weight.gradient, divisor)
            new_m = _assign_if(applied, m, m + (gradient - m) * (1 - betas[0]))
            new_v = _assign_if(applied, v, v + (tf.square(gradient) - v) * (1 - betas[1]))
            step = new_m * alpha / (tf.sqrt(new_v) + epsilon)
            _assign_if(applied, variable, _decayed(variable, weight.decay) - step)

    def sgd(
        self,
        weights: Sequence[Weight],
        rate: Any,
        momentum: float,
        applied: Any,
        *,
        nesterov: bool,
    ) -> None:
        """Update variables as `keras.optimizers.SGD` does."""
        if applied is None:
            done: list[Any] = []
            for chunk in _chunks(weights):
                _decay(chunk, done)
                done = [_sgd(w, rate, momentum, nesterov=nesterov) for w in chunk]
            return
        for weight in weights:
            variable, gradient = weight.variable.value, tf.cast(weight.gradient, "float32")
            step = gradient * -rate
            if weight.moments:
                moment = weight.moments[0].value
                new_moment = _assign_if(applied, moment, moment * momentum + step)
                step = new_moment * momentum + step if nesterov else new_moment
            _assign_if(applied, variable, _decayed(variable, weight.decay) + step)


def _adam(
    weight: Weight, gradient: Any, alpha: Any, betas: tuple[float, float], epsilon: float
) -> Any:
    variable, m, v = (each.value for each in (weight.variable, *weight.moments))
    return tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=m.handle,
        v=v.handle,
        beta1_power=0.0,  # `alpha` includes the bias correction
        beta2_power=0.0,
        lr=alpha,
        beta1=betas[0],
        beta2=betas[1],
        epsilon=epsilon,
        grad=gradient,
    )


def _sgd(weight: Weight, rate: Any, momentum: float, *, nesterov: bool) -> Any:
    variable, gradient = weight.variable.value, tf.cast(weight.gradient, "float32")
    if not weight.moments:
        return tf.raw_ops.ResourceApplyGradientDescent(
            var=variable.handle, alpha=rate, delta=gradient
        )
    return tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=weight.moments[0].value.handle,
        lr=rate,
        grad=gradient,
        momentum=momentum,
        use_nesterov=nesterov,
    )


def _chunks(weights: Sequence[Weight]) -> Iterator[list[Any]]:
    sizes = [math.prod(weight.variable.shape) for weight in weights]
    return chunks(weights, sizes, max(sizes))


def _decay(weights: Sequence[Weight], done: Sequence[Any]) -> list[Any]:
    """Apply weight decay after the operations in `done`; return what a graph has to wait for."""
    decayed = []
    for weight in weights:
        if weight.decay is not None:
            variable = weight.variable.value
            with tf.control_dependencies(done):
                less = variable * weight.decay
            decayed.append(variable.assign_sub(less, read_value=False))
    return [each for each in decayed if each is not None]


def _decayed(variable: Any, decay: Any) -> Any:
    return variable if decay is None else variable - variable * decay


def _assign_if(applied: Any, variable: Any, value: Any) -> Any:
    value = tf.where(applied, value, variable)
    variable.assign(value, read_value=False)
    return value
