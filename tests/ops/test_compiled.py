"""torch.compile traces the functions without a graph break, as far as it does Keras's."""

import keras
import pytest
from helpers.marks import few
from helpers.op_arguments import NAMES, arguments_of

import kerasmp

pytestmark = [
    pytest.mark.backend("torch"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning"
    ),  # of functions that the compiler cannot trace
]
# Keras's functions have graph breaks too.
IN_PARTS = {
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "dot_product_attention",
    "squared_hinge",
}


# One for each module of functions.
QUICK = {"dot_product_attention", "gelu", "mean_squared_error", "norm", "softmax"}


@pytest.mark.parametrize("name", few(NAMES, QUICK))
def test_compiled_functions_give_the_eager_results(name):
    import torch

    torch._dynamo.reset()
    function, given = getattr(kerasmp.ops, name), arguments_of(name)
    whole = name not in IN_PARTS
    compiled = torch.compile(function, backend="aot_eager", fullgraph=whole)
    assert torch.equal(compiled(*given), function(*given))


def test_float32_functions_compile_without_a_graph_break():
    import torch

    torch._dynamo.reset()
    function = kerasmp.ops.in_float32(lambda x: keras.ops.sum(keras.ops.square(x)))
    x = torch.full((100,), 30.0, dtype=torch.float16)
    compiled = torch.compile(lambda x: function(x) / 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x) / 2)
