"""Arguments for each function of `kerasmp.ops`."""

import keras

import kerasmp

NAMES = sorted(set(kerasmp.ops.__all__) - {"in_float32"})
_TWICE = {"cosine_similarity", "kl_divergence", "poisson", "squared_hinge"}


def arguments_of(name, dtype="float16"):
    """Return the positional arguments of a function."""
    random = keras.random.SeedGenerator(0)

    def drawn(*shape):
        return keras.ops.cast(keras.random.uniform(shape, 0.1, 0.9, seed=random), dtype)

    if name == "sparse_categorical_crossentropy":
        return [keras.ops.convert_to_tensor([1, 2, 0, 1]), drawn(4, 8)]
    if name == "dot_product_attention":
        return [drawn(1, 4, 2, 8) for _ in range(3)]
    if name == "average_pool":
        return [drawn(1, 8, 8, 2), 2]
    is_loss = name in _TWICE or name.endswith(("entropy", "_error"))
    return [drawn(4, 8) for _ in range(2 if is_loss else 1)]
