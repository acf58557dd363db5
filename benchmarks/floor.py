"""Measures the minimum time of a step, to explain the targets that are missed.

`graph` (TensorFlow): the transformer without its embedding. Only the gradients; one
`ResourceApplyAdam` for each, the cheapest possible update, as soon as its gradient is ready; and
the same when all gradients are ready, because a check must wait for all of them.

`xla` (TensorFlow) and `jax`: the transformer. A plain step that also checks all gradients once and
returns the result; and on JAX a step that branches on it. `xla` leaves out the embedding, too.

`sparse` (TensorFlow): the bare loop of sparse.py. The smallest step that scales, checks, branches
and counts, written out; and the same with a growing scale.

    KERAS_BACKEND=tensorflow python benchmarks/floor.py graph xla sparse --rounds 60
    KERAS_BACKEND=jax python benchmarks/floor.py jax --rounds 60
"""

import argparse
import functools

import interleaved
import keras
import numpy as np
from overhead import adam, transformer
from update import OPTIMIZERS

WORDS, BATCH, STEPS = 2000, 4, 3


def data():
    """Return a batch of words and classes."""
    rng = np.random.default_rng(0)
    return rng.integers(0, WORDS, (BATCH, 32)), rng.integers(0, 10, BATCH)


def loss_of(y, logits):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, logits)


# ------------------------------------------------------------------- the transformer, TensorFlow


def stepping(update, *, jit=False):
    """Return a function that runs a round of steps.

    Args:
        update: Takes the variables. Returns a function that applies their gradients, and a function
            that scales the loss.
        jit: Whether XLA compiles the step.
    """
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model = transformer(words=WORDS)
    variables = [v for v in model.trainable_variables if v.shape[0] != WORDS]
    apply, scale = update(variables)
    x, y = (tf.constant(each, "int32") for each in data())

    @tf.function(jit_compile=jit)
    def step():
        with tf.GradientTape() as tape:
            loss = scale(loss_of(y, model(x, training=True)))
        grads = tape.gradient(loss, [v.value for v in variables])
        done = [each for each in apply(grads) if each is not None]
        with tf.control_dependencies(done):
            return tf.identity(loss), [each for each in done if jit and tf.is_tensor(each)]

    def run():
        for _ in range(STEPS):
            step()[0].numpy()

    return run


def by_optimizer(wrap, check=None):
    """Return an update by an optimizer, optionally with a check of the gradients."""

    def update(variables):
        optimizer = wrap(adam())
        optimizer.build(variables)

        def apply(grads):
            checks = [check(gradient) for gradient in grads] if check else []
            optimizer.apply(grads, variables)
            return checks

        return apply, getattr(optimizer, "scale_loss", lambda loss: loss)

    return update


def nothing(_):
    """Return an update that only computes the gradients."""
    return (lambda grads: grads), (lambda loss: loss)


def by_kernels(*, wait):
    """Return an update with one kernel for each gradient, which may wait for all of them."""
    import tensorflow as tf

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


def graph():
    return {label: stepping(by_optimizer(wrap)) for label, wrap in OPTIMIZERS.items()} | {
        "gradients alone": stepping(nothing),
        "a kernel for each, when ready": stepping(by_kernels(wait=False)),
        "a kernel for each, when all are": stepping(by_kernels(wait=True)),
    }


def xla():
    import tensorflow as tf

    zero = tf.Variable(0.0)  # known at run time only

    def by_maximum(gradient):
        return tf.math.is_finite(tf.reduce_max(tf.abs(gradient)))

    def by_product(gradient):  # 0 times inf or NaN is NaN
        rows = tf.reshape(gradient, (-1, gradient.shape[-1]))
        return tf.reduce_all(tf.equal(tf.matmul(rows, tf.fill((rows.shape[1], 1), zero)), 0))

    def written_out(*, wait):
        """Return Adam written out. With `wait`, it updates only if all gradients are finite."""

        def update(variables):
            moments = [[tf.Variable(tf.zeros(v.shape)) for _ in range(2)] for v in variables]

            def apply(grads):
                finite = tf.reduce_all([by_product(g) for g in grads]) if wait else None
                for each, (m, v), g in zip(variables, moments, grads, strict=True):
                    new_m, new_v = m + (g - m) * 0.1, v + (g * g - v) * 0.001
                    new = each.value - 1e-4 * new_m / (tf.sqrt(new_v) + 1e-7)
                    for variable, value in ((m, new_m), (v, new_v), (each.value, new)):
                        variable.assign(tf.where(finite, value, variable) if wait else value)
                return []

            return apply, lambda loss: loss

        return update

    plain = OPTIMIZERS["plain"]
    named = {label: by_optimizer(wrap) for label, wrap in OPTIMIZERS.items()} | {
        "plain and check (maximum)": by_optimizer(plain, by_maximum),
        "plain and check (product)": by_optimizer(plain, by_product),
        "written out": written_out(wait=False),
        "written out, selected by check": written_out(wait=True),
    }
    return {label: stepping(update, jit=True) for label, update in named.items()}


# -------------------------------------------------------------------------- the transformer, JAX


def jax_stepping(optimizer, update):
    """Return a function that runs a round of compiled steps, whose state is donated.

    Args:
        optimizer: The optimizer.
        update: Takes the optimizer, its values, the gradients and the weights. Returns new weights,
            new values, and another output of the step.
    """
    import jax

    keras.utils.set_random_seed(0)
    model = transformer(words=WORDS)
    optimizer.build(model.trainable_variables)
    x, y = (keras.ops.convert_to_tensor(each, "int32") for each in data())

    def loss_with(weights, others, values):
        logits, others = model.stateless_call(weights, others, x, training=True)
        loss = loss_of(y, logits)
        with keras.StatelessScope(state_mapping=zip(optimizer.variables, values, strict=True)):
            return optimizer.scale_loss(loss), others

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        weights, others, values = state
        found, grads = jax.value_and_grad(loss_with, has_aux=True)(weights, others, values)
        weights, values, other = update(optimizer, values, grads, weights)
        return found[0], other, (weights, found[1], values)

    held = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    state = [jax.tree.map(lambda v: v.value.copy(), [list(each) for each in held])]

    def run():
        for _ in range(STEPS):
            loss, _, state[0] = step(state[0])
            loss.block_until_ready()

    return run


def jax():
    import jax
    from jax import numpy as jnp

    def finite(grads):
        return jnp.isfinite(jnp.stack([jnp.max(jnp.abs(g)) for g in grads])).all()

    def applied(optimizer, values, grads, weights):
        return *optimizer.stateless_apply(values, grads, weights), ()

    def checking(optimizer, values, grads, weights):
        return *optimizer.stateless_apply(values, grads, weights), finite(grads)

    def branching(optimizer, values, grads, weights):
        new = jax.lax.cond(
            finite(grads),
            lambda: optimizer.stateless_apply(values, grads, weights),
            lambda: (weights, values),
        )
        return *new, ()

    return {label: jax_stepping(wrap(adam()), applied) for label, wrap in OPTIMIZERS.items()} | {
        "plain and check": jax_stepping(adam(), checking),
        "plain in a branch by a check": jax_stepping(adam(), branching),
    }


# ------------------------------------------------------------------------- the sparse bare loop


class WrittenOut:
    """Scaled SGD for one variable with a sparse gradient, and nothing else."""

    def __init__(self, *, grows):
        import tensorflow as tf

        self.tf = tf
        self.rate, self.scale = tf.Variable(0.1), tf.Variable(2.0**15)
        self.iterations, self.applied, self.good = (tf.Variable(0) for _ in range(3))
        self.grows = grows

    def build(self, variables):
        """Do nothing: everything exists."""

    def scale_loss(self, loss):
        """Return the loss multiplied by the scale."""
        return loss * self.scale

    def apply(self, grads, variables):
        """Update the rows if all are finite, else halve the scale."""
        tf, scale = self.tf, self.scale.read_value()

        def update():
            tf.raw_ops.ResourceScatterAdd(
                resource=variables[0].value.handle,
                indices=grads[0].indices,
                updates=grads[0].values * (-self.rate / scale),
            )
            self.iterations.assign_add(1)
            self.applied.assign_add(1)
            if self.grows:
                due = self.good >= 1999
                self.scale.assign(tf.where(due, tf.minimum(scale * 2, 2.0**40), scale))
                self.good.assign(tf.where(due, 0, self.good + 1))

        def halve():
            self.scale.assign(scale / 2)

        tf.cond(tf.math.is_finite(tf.nn.l2_loss(grads[0].values)), update, halve)


def sparse():
    from sparse import looping

    named = {label: wrap(keras.optimizers.SGD(0.1)) for label, wrap in OPTIMIZERS.items()} | {
        "written out, fixed scale": WrittenOut(grows=False),
        "written out, growing scale": WrittenOut(grows=True),
    }
    return {label: looping(optimizer) for label, optimizer in named.items()}


FLOORS = {"graph": graph, "xla": xla, "sparse": sparse, "jax": jax}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("floors", nargs="+", choices=FLOORS)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    for name in arguments.floors:
        interleaved.report(name, interleaved.measure(FLOORS[name](), arguments.rounds))
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
