"""The work of layers is counted, once, and nothing in Keras stays replaced."""

import sys
import types
from concurrent import futures

import keras
import keras.src.backend as keras_backend
import numpy as np
import pytest

from kerasmp.backend import current
from kerasmp.backend.flops import COUNTS
from kerasmp.backend.profiler import profile

layers, ops = keras.layers, keras.ops


def held():
    """Return everything in Keras's modules, and what else profiling replaces."""
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "keras"]
    found = {(id(m), name): id(value) for m in modules for name, value in vars(m).items()}
    found |= {(id(m), name): id(getattr(m, name)) for m, name in current().MATMUL_FUNCTIONS}
    return found | {"call": keras.Layer.__call__, "read": keras_backend.AutocastScope.maybe_cast}


def test_every_product_is_found_in_this_keras():
    modules = (keras_backend.numpy, keras_backend.nn, keras_backend)
    for name in COUNTS:
        assert any(hasattr(module, name) for module in modules), name
    assert callable(keras_backend.cast)
    assert callable(keras_backend.convert_to_tensor)


def test_everything_is_restored_after_an_error():
    before = held()
    layer = Calling(lambda x: len(x.shape) // 0)
    with pytest.raises(ZeroDivisionError), profile():  # noqa: PT012 - what it does meanwhile counts
        changed = held()
        assert sum(changed[key] != value for key, value in before.items()) > 2 * len(COUNTS)
        layer(ops.ones((1, 2)))
    assert held() == before


class Calling(layers.Layer):
    """A layer that calls a function."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def seen_of(function, *shape, dtype="float32"):
    layer = Calling(function, dtype=dtype)
    with profile() as seen:
        layer(ops.ones(shape))
    return [numbers.get(id(layer)) for numbers in (seen.multiply_adds, seen.cast_bytes)]


PRODUCTS = {
    "matmul": (lambda x: ops.matmul(x, ops.ones((5, 2, 4))), 5 * 3 * 2 * 4, (5, 3, 2)),
    "matmul of parts": (lambda x: ops.matmul(x, x[0]), 2 * 3 * 3 * 3, (2, 3, 3)),
    "dot": (lambda x: ops.dot(x, ops.ones((4, 5))), 3 * 4 * 5, (3, 4)),
    "inner": (lambda x: ops.inner(x, x), 3 * 3 * 4, (3, 4)),
    "vdot": (lambda x: ops.vdot(x, x), 7, (7,)),
    "tensordot": (lambda x: ops.tensordot(x, ops.ones((3, 4, 6)), 2), 2 * 3 * 4 * 6, (2, 3, 4)),
    "einsum": (
        lambda x: ops.einsum("abc,dcb->ad", x, ops.ones((5, 4, 3))),
        2 * 3 * 4 * 5,
        (2, 3, 4),
    ),
    "einsum with dots": (
        lambda x: ops.einsum("...ab,bc->...ac", x, ops.ones((4, 5))),
        2 * 6 * 3 * 4 * 5,
        (2, 6, 3, 4),
    ),
    "einsum of one": (lambda x: ops.einsum("ab->ba", x), 0, (3, 4)),
}


@pytest.mark.parametrize(("function", "count", "shape"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_counted(function, count, shape):
    assert seen_of(function, *shape)[0] == {"float32": count}


def test_products_of_the_framework_itself_are_counted():
    for module, name in current().MATMUL_FUNCTIONS:
        function = {
            "einsum": lambda f: lambda x: f("ab,cb->ac", x, x),
            "tensordot": lambda f: lambda x: f(x, x, 2),
            "vdot": lambda f: lambda x: f(x[0], x[0]),
            "inner": lambda f: lambda x: f(x, x),
        }.get(name, lambda f: lambda x: f(x, ops.transpose(x)))
        count = {"tensordot": 12, "vdot": 4}.get(name, 3 * 3 * 4)
        # Looked up when it is called, as a user's layer does.
        found = seen_of(lambda x, m=module, n=name, g=function: g(getattr(m, n))(x), 3, 4)
        assert found[0] == {"float32": count}, name


def test_casts_count_what_they_write_and_only_between_float_dtypes():
    assert seen_of(lambda x: ops.cast(x, "float16"), 3, 4) == [None, 24]
    assert seen_of(lambda x: ops.cast(x, "float32"), 3, 4) == [None, None]
    assert seen_of(lambda x: ops.cast(x, "int32"), 3, 4) == [None, None]
    assert seen_of(lambda x: ops.cast(ops.cast(x, "bfloat16"), "float32"), 3, 4) == [None, 24 + 48]
    assert seen_of(lambda x: ops.convert_to_tensor(x, dtype="float16"), 3, 4) == [None, 24]
    # The layer's own input, in float16 from there on.
    assert seen_of(lambda x: x, 3, 4, dtype="mixed_float16") == [None, 24]


@pytest.mark.parametrize("autocast", [True, False])
def test_a_variable_is_cast_each_time_that_it_is_read(autocast):
    class Reader(layers.Layer):
        def build(self, _):
            self.kernel = self.add_weight(shape=(5,), autocast=autocast)

        def call(self, x):
            return x + ops.cast(self.kernel, "float16") + ops.cast(self.kernel, "float16")

    layer = Reader(dtype="mixed_float16")
    layer.build((1, 5))
    x = ops.ones((1, 5), "float16")
    with profile() as seen:
        layer(x)
    assert seen.cast_bytes[id(layer)] == 2 * 5 * 2


def test_outputs_are_counted_once():
    inner = layers.Dense(3, name="inner")
    model = keras.Sequential(
        [keras.Input((4,)), inner, layers.Dropout(0.5), layers.Reshape((3, 1))]
    )
    with profile() as seen:
        model(np.ones((2, 4), "float32"))
    handed_on = [seen.output_bytes[id(layer)] for layer in (model, model.layers[1])]
    assert handed_on == [0, 0]
    assert seen.output_bytes[id(inner)] == seen.output_bytes[id(model.layers[2])] == 2 * 3 * 4


def in_a_thread(work):
    with futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_threads_that_profile_at_once_see_their_own_calls_and_restore_keras():
    before = held()
    layer = layers.Dense(3)
    layer.build((None, 4))

    def rows(number):
        layer(ops.ones((number, 4)))
        return seen_of(lambda x: ops.matmul(x, ops.ones((4, 5))), number, 4)[0]

    with profile() as seen:
        assert in_a_thread(lambda: rows(2)) == {"float32": 2 * 4 * 5}
        # The other one has ended, and this one goes on.
        layer(ops.ones((1, 4)))
    assert seen.multiply_adds == {id(layer): {"float32": 4 * 3}}
    assert held() == before


def test_a_keras_module_that_is_imported_meanwhile_is_restored():
    module = types.ModuleType("keras.late")
    sys.modules["keras.late"] = module
    try:
        with profile():
            module.cast = keras_backend.cast
        assert module.cast is keras_backend.cast
    finally:
        del sys.modules["keras.late"]


@pytest.mark.backend("tensorflow")
def test_a_tf_function_is_profiled_and_stays_compiled_in_other_threads():
    import tensorflow as tf

    eager = []

    @tf.function
    def multiplied(x):
        eager.append(tf.executing_eagerly())
        return tf.matmul(x, x)

    layer = Calling(multiplied)
    with profile() as seen:
        layer(ops.ones((3, 3)))
        in_a_thread(lambda: layer(ops.ones((3, 3))))
    assert seen.multiply_adds[id(layer)] == {"float32": 3 * 3 * 3}
    assert eager == [True, False]


def test_calls_outside_of_layers_are_not_counted():
    with profile() as seen:
        ops.cast(ops.matmul(ops.ones((2, 3)), ops.ones((3, 4))), "float16")
    assert not any((seen.multiply_adds, seen.cast_bytes, seen.output_bytes))
