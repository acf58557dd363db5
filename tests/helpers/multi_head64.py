"""Multi-head attention as a whole in NumPy, with or without float16 projections."""

import numpy as np
from helpers import float16
from helpers.attention64 import attention


def weights_of(layer):
    """Return the kernels of the projections by name; biases are zero here."""
    named = {v.path.split("/")[-2]: np.array(v, "float64") for v in layer.trainable_variables}
    assert set(named) == {"query", "key", "value", "attention_output"}
    return named


def multi_head(query, value, kernels, upstream, *, rounded, mask=None):
    """Return outputs and the gradients of query, value and the kernels of the projections.

    Args:
        query: Shape (batch, time, features).
        value: Shape (batch, time, features); the keys too.
        kernels: What `weights_of` returns.
        upstream: The gradient of the outputs.
        rounded: Whether products with kernels come out in float16, as everything between layers
            does: the best that a float16 layer can do. Else nothing is rounded.
        mask: Broadcasts to (batch, heads, queries, keys).
    """
    low = float16.rounded if rounded else np.asarray
    kernels = {name: float16.rounded(kernel) for name, kernel in kernels.items()}
    q, k, v = (
        low(np.einsum("btm,mnh->btnh", x, kernels[name]))
        for x, name in ((query, "query"), (value, "key"), (value, "value"))
    )
    groups = q.shape[2] // k.shape[2]
    repeated = [np.repeat(x, groups, axis=2) for x in (k, v)]
    dtype = "float32" if rounded else "float64"
    arrays = [x.astype(dtype) for x in (q, *repeated)]
    scale = q.shape[-1] ** -0.5
    combine = kernels["attention_output"]
    to_context = low(np.einsum("btm,nhm->btnh", upstream, combine))
    context, _, (to_q, *to_repeated) = attention(
        *arrays, to_context.astype(dtype), scale=scale, mask=mask
    )
    context, to_q = low(context), low(to_q)
    to_k, to_v = (low(x).reshape(*k.shape[:3], groups, -1).sum(3) for x in to_repeated)
    to_query = low(np.einsum("btnh,mnh->btm", to_q, kernels["query"]))
    to_value = sum(
        low(np.einsum("btnh,mnh->btm", g, kernels[name]))
        for g, name in ((to_k, "key"), (to_v, "value"))
    )
    gradients = {
        "inputs": [to_query, low(to_value)],
        "query": low(np.einsum("btm,btnh->mnh", query, to_q)),
        "key": low(np.einsum("btm,btnh->mnh", value, to_k)),
        "value": low(np.einsum("btm,btnh->mnh", value, to_v)),
        "attention_output": low(np.einsum("btnh,btm->nhm", context, upstream)),
    }
    return low(np.einsum("btnh,nhm->btm", context, combine)), gradients
