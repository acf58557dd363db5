"""`fit` over two JAX processes: if one of them overflows, both skip the step.

Run alone, the script starts both processes on this machine. To use your own machines, set the three
variables that `start_both` sets on each machine, and run the script there.

Backend: jax
"""

import os
import socket
import subprocess
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")  # needed on CPUs
BATCHES, ROWS = 60, 64  # rows per step in each process


def start_both():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{any_port.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={
                **os.environ,
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"{address},{address}",
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
                "KERAS_DISTRIBUTION_PROCESS_ID": str(rank),
            },
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    sys.exit(max(codes, key=abs))


def work():
    import keras

    keras.distribution.initialize()  # before any other use of JAX

    import numpy as np

    import kerasmp as mp

    # Each process passes its own rows, which together form the batch.
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    rank = int(os.environ["KERAS_DISTRIBUTION_PROCESS_ID"])
    keras.utils.set_random_seed(0)  # the same weights in both processes
    with mp.policy_scope("mixed_float16"):
        model = mp.Sequential(
            [keras.Input((8,)), keras.layers.Dense(32, activation="tanh"), mp.layers.DenseHead(1)]
        )
    model.compile(mp.LossScaleOptimizer(keras.optimizers.Adam(1e-2)), loss="mse")

    x = np.random.default_rng(rank).normal(size=(BATCHES * ROWS, 8)).astype("float32")
    monitor = mp.OverflowMonitor()
    losses = model.fit(x, x[:, :1], ROWS, epochs=3, verbose=0, callbacks=[monitor]).history["loss"]
    print(f"process {rank}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2

    # The batch of one process overflows. Both skip the step, and the weights do not change.
    before = model.get_weights()
    x = np.full((ROWS, 8), np.inf if rank == 1 else 1.0, "float32")
    model.fit(x, np.ones((ROWS, 1)), ROWS, verbose=0)
    print(f"process {rank}: {model.optimizer.skipped_steps} skipped, {model.optimizer.skip_causes}")
    assert model.optimizer.skipped_steps == 1
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


if __name__ == "__main__":
    work() if "KERAS_DISTRIBUTION_PROCESS_ID" in os.environ else start_both()
