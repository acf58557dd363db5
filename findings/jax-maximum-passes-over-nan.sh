#!/usr/bin/env bash
# JAX 0.10.2 on a CPU: `jnp.max` and `jnp.min` of 4,096 float32 numbers, one of which is NaN, ignore
# the NaN, compiled or not. For up to 2,048 numbers, the result is NaN, as in NumPy for any size. So
# `isfinite(max(abs(x)))` can be True for an array with NaN. A sum of zero times each number is NaN
# for any size.
#
# Prints the results, and fails if they have changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import numpy as np
from jax import numpy as jnp

for size in (2048, 4096, 2**20):
    x = np.ones(size, "float32")
    x[3] = np.nan
    found = [
        float(f(x)) for f in (np.max, jnp.max, jax.jit(jnp.max), jnp.min, lambda x: jnp.sum(x * 0))
    ]
    print(size, "numbers: NumPy's max, jnp.max, compiled, jnp.min, sum of x * 0:", found)
    expected = np.nan if size == 2048 else 1.0
    np.testing.assert_equal(found, [np.nan, expected, expected, expected, np.nan])
PYTHON
