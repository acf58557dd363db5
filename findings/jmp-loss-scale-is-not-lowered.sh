#!/usr/bin/env bash
# jmp 0.0.4 with JAX 0.10.2: a compiled function that takes a jmp.DynamicLossScale runs, but
# `jax.jit(function).lower(scale).compile()`, which is needed to read costs and memory, raises a
# TypeError ("... returned a value of type ... ArgInfo, which is not a valid JAX type"). JAX rebuilds
# the pytree with descriptions instead of arrays, and the class reads the dtypes of its arguments. It
# works to pass `loss_scale` and `counter` and to build the object inside the function.
#
# Prints the results, and fails if they have changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 jmp==0.0.4
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jmp
from jax import numpy as jnp

scale, loss = jmp.DynamicLossScale(jnp.float32(2.0**15)), jnp.float32(3.0)
scaled = jax.jit(lambda scale, loss: scale.scale(loss))
assert float(scaled(scale, loss)) == 3 * 2**15
print("called: 3.0 times the scale is", float(scaled(scale, loss)))
try:
    scaled.lower(scale, loss).compile()
except TypeError as error:
    message = str(error)
    print("lowered: TypeError:", message.splitlines()[0])
    assert "ArgInfo" in message
else:
    raise SystemExit("JAX can lower it now.")
inside = jax.jit(lambda value, counter, loss: jmp.DynamicLossScale(value, counter).scale(loss))
compiled = inside.lower(scale.loss_scale, scale.counter, loss).compile()
assert float(compiled(scale.loss_scale, scale.counter, loss)) == 3 * 2**15
print("lowered with the values of the scale: runs")
PYTHON
