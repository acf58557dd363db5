"""Fails if Keras moves a private name of its graphs that kerasmp uses, or changes it."""

import keras
import numpy as np
import pytest

import kerasmp as mp
from kerasmp.backend import keras_graph

layers = keras.layers


def model():
    inputs = keras.Input((4,), name="in")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="inner")], name="nested")
    return keras.Model(inputs, 2 * layers.Dense(2, name="last")(inner(inputs)))


def test_calls_are_in_order_with_their_tensors():
    found = keras_graph.calls(model())
    assert [call.operation.name for call in found[:3]] == ["in", "nested", "last"]
    assert found[0].inputs == []
    assert found[1].inputs == found[0].outputs
    assert keras_graph.producer(found[1].outputs[0]).name == "nested"
    assert keras_graph.calls(layers.Dense(2)) == []
    assert keras_graph.calls(keras.Sequential([layers.Dense(2)])) == []


def test_children_are_one_level():
    assert {child.name for child in keras_graph.children(model())} == {"in", "nested", "last"}


def test_masks_are_found():
    inputs = keras.Input((4, 2))
    assert keras_graph.has_mask(layers.Masking()(inputs))
    assert not keras_graph.has_mask(inputs)


@pytest.mark.keras("3.14")
def test_mask_operations_in_a_graph_are_found_with_the_cast_before_them():
    inputs = keras.Input((4, 2))
    masking = layers.Masking(0.1, dtype="mixed_float16")
    masked = masking(inputs)
    outputs = layers.LSTM(2, dtype="mixed_float16")(masked)
    masking(keras.Input((4, 2), dtype="float16"))
    (cast, comparison), (none, other) = keras_graph.mask_operations(masking)
    assert (cast.dtype, none) == ("float16", None)
    assert [type(each).__name__ for each in (comparison, other)] == ["NotEqual"] * 2
    kept = [call.operation for call in keras_graph.calls(keras.Model(inputs, outputs))]
    assert cast in kept  # LSTM is given the mask, and asks no layer for it
    assert comparison in kept
    masking.dtype_policy = "float32"
    keras_graph.update_mask_casts(masking)
    assert (cast.dtype, cast.get_config()["dtype"]) == ("float32", "float32")


def test_a_masking_that_masks_in_another_way_has_no_mask_operations():
    class Own(layers.Masking):
        def compute_mask(self, inputs, _=None):
            return keras.ops.not_equal(inputs[..., 0], self.mask_value)

    for masking in (Own(dtype="mixed_float16"), mp.layers.Masking(dtype="mixed_float16")):
        inputs = keras.Input((4, 2))
        outputs = layers.LSTM(2)(masking(inputs))
        assert keras_graph.mask_operations(masking) == []
        model = keras.Model(inputs, layers.Dense(2)(outputs))
        mp.convert(model, "mixed_bfloat16", dry_run=True)


def test_dtypes_follow_policies_without_side_effects():
    built = model()
    last = built.get_layer("last")
    last.dtype_policy = "mixed_float16"
    assert built.outputs[0].dtype == "float32"
    nodes = [len(layer._inbound_nodes) for layer in built.layers]
    now = keras_graph.symbolic_dtypes(built)
    assert now[id(built.outputs[0])] == "float16"
    assert now[id(last.output)] == "float16"
    assert built.outputs[0].dtype == "float32"
    keras_graph.refresh_symbolic_dtypes(built)
    assert built.outputs[0].dtype == last.output.dtype == "float16"
    assert [len(layer._inbound_nodes) for layer in built.layers] == nodes
    built.get_layer("nested").layers[0].dtype_policy = "mixed_bfloat16"
    keras_graph.refresh_symbolic_dtypes(built)
    assert built.get_layer("nested").outputs[0].dtype == "bfloat16"
    assert built.get_layer("nested").output.dtype == "bfloat16"


def test_a_layer_that_knows_its_output_shape_is_not_called_and_returns_its_compute_dtype():
    """Nor does Keras look into its call, whatever a function in it returns."""
    inputs = keras.Input((4,))
    wide = layers.Dense(4, activation=lambda x: keras.ops.cast(x, "float32"))
    built = keras.Model(inputs, wide(inputs))
    wide.dtype_policy = "mixed_float16"
    asked = []
    wide.compute_output_shape = lambda input_shape: asked.append(1) or (*input_shape[:-1], 4)
    found = keras_graph.symbolic_dtypes(built)[id(built.outputs[0])]
    assert not asked
    assert found == wide(keras.KerasTensor((None, 4), "float16")).dtype == "float16"
    assert asked

    class Particular(layers.Dense):
        def build(self, shape):
            super().build(shape)
            self.input_spec = keras.layers.InputSpec(dtype="float32")

    own = keras.Model(inputs, Particular(4)(inputs))
    own.layers[1].dtype_policy = "mixed_float16"
    with pytest.raises(ValueError, match="expected dtype=float32"):
        keras_graph.symbolic_dtypes(own)


@pytest.mark.parametrize("path", ["a", None])
def test_a_policy_in_a_map_is_read_and_replaced_for_one_layer_only(path):
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    policies["a"] = keras.DTypePolicy("mixed_float16")
    one, other = (layers.Dense(2, name="a", dtype=policies) for _ in range(2))
    if path:
        one.build((None, 2))
        other.build((None, 2))
    assert keras_graph.policy_of(one).name == ("mixed_float16" if path else "float32")
    keras_graph.set_policy(one, keras.DTypePolicy("bfloat16"))
    assert one.compute_dtype == "bfloat16"
    assert keras_graph.policy_of(one).name == "bfloat16"
    assert other.compute_dtype == ("float16" if path else "float32")
    assert dict(policies.items()) == {"a": keras.DTypePolicy("mixed_float16")}


def test_a_graph_takes_a_batch_in_its_own_dtypes_and_order():
    second, first = keras.Input((3,), name="second"), keras.Input((2,), name="first", dtype="int32")
    built = keras.Model([second, first], layers.Concatenate()([second, first]))
    x = {"first": np.ones((4, 2), "float64"), "second": np.zeros((4, 3), "int64")}
    found = keras_graph.input_tensors(built, x)
    dtypes = [keras.backend.standardize_dtype(each.dtype) for each in found]
    assert [tuple(each.shape) for each in found] == [(4, 3), (4, 2)]
    assert dtypes == ["float32", "int32"]


class Own(layers.Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.inner = layers.Dense(2, name="inner", dtype=self.dtype_policy)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, inputs):
        return keras.ops.sqrt(keras.ops.square(self.inner(inputs)))


def test_the_graph_of_a_users_layer_has_its_operations_and_leaves_no_trace():
    layer = Own(dtype="mixed_float16")
    x = layer(np.ones((4, 3), "float32"))
    tensor = keras.ops.cast(np.ones((4, 3)), "float16")
    names = [layers.Dense(1).name, layers.Dense(1).name]
    nodes = len(layer.inner._inbound_nodes), len(layer.inner._outbound_nodes)
    graph, _ = keras_graph.trace_graph(layer, (tensor,), {})
    found = [call.operation.name for call in keras_graph.calls(graph) if call.inputs]
    assert found == ["inner", "square", "sqrt"]
    assert graph.outputs[0].dtype == "float16"
    assert (len(layer.inner._inbound_nodes), len(layer.inner._outbound_nodes)) == nodes
    number = int(names[1].rpartition("_")[2])
    assert layers.Dense(1).name == f"dense_{number + 1}"
    again = keras.ops.convert_to_numpy(layer(np.ones((4, 3), "float32")))
    np.testing.assert_array_equal(again, keras.ops.convert_to_numpy(x))


def test_a_layer_that_does_more_than_operations_has_no_graph():
    class Converts(layers.Layer):
        def call(self, inputs):
            return inputs + keras.ops.convert_to_numpy(inputs).sum()

    class Draws(layers.Layer):
        def __init__(self):
            super().__init__()
            self.seed = keras.random.SeedGenerator(1)

        def call(self, inputs):
            return inputs + keras.random.normal(inputs.shape, seed=self.seed)

    tensor = keras.ops.ones((4, 3))
    for layer in (Converts(), Draws()):
        layer(tensor)
        assert keras_graph.trace_graph(layer, (tensor,), {}) is None
