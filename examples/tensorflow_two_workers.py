"""Two TensorFlow workers train one model: if one of them overflows, both skip the step.

Run alone, the script starts both workers on this machine. To use your own machines, set TF_CONFIG
on each and run the script there. In Keras 3, `fit` does not work under MultiWorkerMirroredStrategy
with any optimizer, so this is a custom training loop.

Backend: tensorflow
"""

import json
import os
import socket
import subprocess
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
STEPS, ROWS = 60, 64  # rows per step in each worker


def start_both():
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second)]
    configs = [
        {"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}} for i in range(2)
    ]
    processes = [
        subprocess.Popen([sys.executable, __file__], env={**os.environ, "TF_CONFIG": json.dumps(c)})
        for c in configs
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    sys.exit(max(codes, key=abs))


def work():
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before any other use of TensorFlow

    import keras
    import numpy as np

    import kerasmp as mp

    rank = strategy.cluster_resolver.task_id
    keras.utils.set_random_seed(0)  # the same weights in both workers
    with strategy.scope(), mp.policy_scope("mixed_float16"):
        model = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(32, activation="tanh"), mp.layers.DenseHead(1)]
        )
        optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-2))
        optimizer.build(model.trainable_variables)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(y - model(x, training=True)))
            # `apply` sums the gradients of the workers, so each contributes its share of the mean.
            scaled_loss = optimizer.scale_loss(loss / strategy.num_replicas_in_sync)
        gradients = tape.gradient(scaled_loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def train_step(x, y):
        losses = strategy.run(replica_step, args=(x, y))
        return strategy.reduce(tf.distribute.ReduceOp.MEAN, losses, axis=None)

    rng = np.random.default_rng(rank)  # different rows for each worker
    losses = []
    for _ in range(STEPS):
        x = rng.normal(size=(ROWS, 8)).astype("float32")
        losses.append(float(train_step(tf.constant(x), tf.constant(x[:, :1]))))
    print(f"worker {rank}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2

    # The batch of one worker overflows. Both skip the step, and the weights do not change.
    before = model.get_weights()
    x = np.full((ROWS, 8), np.inf if rank == 1 else 1.0, "float32")
    train_step(tf.constant(x), tf.ones((ROWS, 1)))
    print(f"worker {rank}: {optimizer.skipped_steps} skipped, {optimizer.skip_causes}")
    assert optimizer.skipped_steps == 1
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


if __name__ == "__main__":
    work() if "TF_CONFIG" in os.environ else start_both()
