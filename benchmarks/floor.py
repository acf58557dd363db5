"""What the least step could be on TensorFlow's graph: the transformer's, by what takes part in it.

All weights but those of the embedding, whose gradient is sparse. Beside the optimizers stand the
gradients alone; one `ResourceApplyAdam` for each of them, the cheapest update there is, run as soon
as its gradient is there; and the same when all are there, as a check of all has to wait for them.

    KERAS_BACKEND=tensorflow python benchmarks/floor.py --rounds 60
"""

import argparse

import interleaved
import keras
import numpy as np
import tensorflow as tf
from overhead import adam, transformer
from update import OPTIMIZERS

WORDS, BATCH, STEPS = 2000, 4, 3


def stepping(update):
    """Return a function that takes a round of steps, each of which gives `update` the gradients.

    Args:
        update: Takes the variables, and returns a function of their gradients and how a loss is
            scaled.
    """
    keras.utils.set_random_seed(0)
    model = transformer(words=WORDS)
    variables = [v for v in model.trainable_variables if v.shape[0] != WORDS]
    apply, scale = update(variables)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.integers(0, WORDS, (BATCH, 32)), "int32")
    y = tf.constant(rng.integers(0, 10, BATCH), "int32")
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = scale(loss_of(y, model(x, training=True)))
        grads = tape.gradient(loss, [v.value for v in variables])
        with tf.control_dependencies([done for done in apply(grads) if done is not None]):
            return tf.identity(loss)

    def run():
        for _ in range(STEPS):
            step().numpy()

    return run


def by_optimizer(wrap):
    """Return an update by an optimizer of Keras's or ours."""

    def update(variables):
        optimizer = wrap(adam())
        optimizer.build(variables)
        return lambda grads: [optimizer.apply(grads, variables)], optimizer.scale_loss

    return update


def nothing(_):
    """Return no update: the gradients are all there is."""
    return (lambda grads: grads), (lambda loss: loss)


def by_kernels(*, wait):
    """Return an update by one kernel for each gradient, which may wait for all of them."""

    def update(variables):
        moments = [[tf.Variable(tf.zeros(v.shape)) for _ in range(2)] for v in variables]

        def apply(grads):
            with tf.control_dependencies(grads if wait else []):
                return [
                    tf.raw_ops.ResourceApplyAdam(
                        var=variable.value.handle,
                        m=m.handle,
                        v=v.handle,
                        beta1_power=0.0,
                        beta2_power=0.0,
                        lr=1e-4,
                        beta1=0.9,
                        beta2=0.999,
                        epsilon=1e-7,
                        grad=gradient,
                    )
                    for variable, (m, v), gradient in zip(variables, moments, grads, strict=True)
                ]

        return apply, lambda loss: loss

    return update


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    compared = {label: stepping(by_optimizer(wrap)) for label, wrap in OPTIMIZERS.items()}
    compared |= {
        "gradients alone": stepping(nothing),
        "a kernel for each, at once": stepping(by_kernels(wait=False)),
        "a kernel for each, after all": stepping(by_kernels(wait=True)),
    }
    interleaved.report("transformer but for its embedding", interleaved.measure(compared, rounds))


if __name__ == "__main__":
    main()
