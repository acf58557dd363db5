"""torch.compile takes the functions whole, as far as it takes Keras's own."""

import keras
import pytest

import kerasmp

pytestmark = [
    pytest.mark.backend("torch"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of what the compiler cannot look into
]
# Keras's own are broken up too.
IN_PARTS = {
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "dot_product_attention",
    "squared_hinge",
}
LOSSES = {"cosine_similarity", "kl_divergence", "poisson", "squared_hinge"}


def arguments_of(name):
    """Return float16 tensors that a function takes."""
    random = keras.random.SeedGenerator(0)

    def drawn(*shape):
        return keras.ops.cast(keras.random.uniform(shape, 0.1, 0.9, seed=random), "float16")

    if name == "sparse_categorical_crossentropy":
        return [keras.ops.convert_to_tensor([1, 2, 0, 1]), drawn(4, 8)]
    if name == "dot_product_attention":
        return [drawn(1, 4, 2, 8) for _ in range(3)]
    if name == "average_pool":
        return [drawn(1, 8, 8, 2), 2]
    is_loss = name in LOSSES or name.endswith(("entropy", "_error"))
    return [drawn(4, 8) for _ in range(2 if is_loss else 1)]


@pytest.mark.parametrize("name", sorted(set(kerasmp.ops.__all__) - {"in_float32"}))
def test_what_is_compiled_gives_the_same(name):
    import torch

    torch._dynamo.reset()
    function, given = getattr(kerasmp.ops, name), arguments_of(name)
    whole = name not in IN_PARTS
    compiled = torch.compile(function, backend="aot_eager", fullgraph=whole)
    assert torch.equal(compiled(*given), function(*given))


def test_any_function_in_float32_is_taken_whole():
    import torch

    torch._dynamo.reset()
    function = kerasmp.ops.in_float32(lambda x: keras.ops.sum(keras.ops.square(x)))
    x = torch.full((100,), 30.0, dtype=torch.float16)
    compiled = torch.compile(lambda x: function(x) / 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x) / 2)
