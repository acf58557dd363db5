"""A process with two CPU replicas, the second of which gets one bad shard; prints JSON.

Arguments: "ours" or "stock", and "loop" (hand-written, `strategy.run`), "unscaling" (the same, its
gradients unscaled before they are applied) or "fit".
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from kerasmp.optimizer import LossScaleOptimizer

CLASSES = {"ours": LossScaleOptimizer, "stock": keras.optimizers.LossScaleOptimizer}
X = np.random.default_rng(0).normal(size=(4, 8, 4)).astype("float32")
BAD = X[0].copy()
BAD[6] = 5e18  # a finite loss; rows 0 to 3 go to the first replica, 4 to 7 to the second


def _loop(strategy, model, optimizer, batches, *, by_hand=False):
    def replica_step(x):
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(ops.mean(ops.square(model(x, training=True) - 1)))
        grads = tape.gradient(loss, model.trainable_variables)
        if by_hand:
            grads = optimizer.get_unscaled_gradients(grads)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    @tf.function
    def step(x):
        strategy.run(replica_step, args=(x,))

    for batch in batches:
        shards = tf.split(batch, 2)
        step(
            strategy.experimental_distribute_values_from_function(
                lambda context, shards=shards: shards[context.replica_id_in_sync_group]
            )
        )


def _unscaling(*arguments):
    _loop(*arguments, by_hand=True)


def _fit(_, model, optimizer, batches):
    model.compile(optimizer, "mse", jit_compile=False)
    x = np.concatenate(batches)
    model.fit(x, np.ones((len(x), 1)), batch_size=8, shuffle=False, verbose=0)


def _train(cls, way, batches):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        optimizer = cls(keras.optimizers.Adam(0.1))
        optimizer.build(model.trainable_variables)
    {"loop": _loop, "unscaling": _unscaling, "fit": _fit}[way](strategy, model, optimizer, batches)
    return strategy, model, optimizer


def _weights(model):
    return np.concatenate([value.ravel() for value in model.get_weights()]).tolist()


def main(name, way):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    cls = CLASSES[name]
    _, clean, _ = _train(cls, way, [*X])
    strategy, model, optimizer = _train(cls, way, [X[0], X[1], BAD, X[2], X[3]])
    result = {
        "weights": _weights(model),
        "weights_without_the_bad_batch": _weights(clean),
    }
    if name == "ours":
        variables = [*model.trainable_variables, *optimizer.variables]
        copies = [strategy.experimental_local_results(v.value) for v in variables]
        result |= {
            "scale": optimizer.loss_scale,
            "skipped": optimizer.skipped_steps,
            "applied": optimizer.applied_steps,
            "copies": [
                [np.asarray(c[min(i, len(c) - 1)]).ravel().tolist() for c in copies]
                for i in range(2)
            ],
        }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
