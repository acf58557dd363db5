#!/usr/bin/env bash
# JAX 0.10.2 on a CPU: if arrays of one shape are multiplied by the same scalar and then summed, XLA
# broadcasts the scalar to an array of that shape in memory, once per shape, and reads it again for
# each array. For 16 arrays of 1,024 x 1,024, it holds 4.2 MB and moves twice the bytes. If each array
# has its own scalar, made to depend on the previous sum, it holds almost nothing and reads the arrays
# once. So norms of gradients that are divided by a loss scale need twice the memory traffic.
#
# Prints the results, and fails if they have changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
from jax import numpy as jnp


def shared(arrays, scalar):
    return [jnp.sum(jnp.square(x * scalar)) for x in arrays]


def own(arrays, scalar):
    found = [scalar]
    for x in arrays:
        mine, found[-1] = jax.lax.optimization_barrier((scalar, found[-1]))
        found.append(jnp.sum(jnp.square(x * mine)))
    return found[1:]


arrays = [jnp.ones((1024, 1024))] * 16
given = 16 * 4 * 1024**2
for function, moved, held in ((shared, 2, 4 * 1024**2), (own, 1, 0)):
    compiled = jax.jit(function).lower(arrays, jnp.float32(0.5)).compile()
    times = compiled.cost_analysis()["bytes accessed"] / given
    scratch = compiled.memory_analysis().temp_size_in_bytes
    print(f"{function.__name__}: {times:.2f} times the arrays moved, {scratch:,} bytes held")
    assert round(times) == moved
    assert abs(scratch - held) < 10_000
PYTHON
