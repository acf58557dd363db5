"""Fails if Keras's attention no longer has the private names that kerasmp overrides or reads."""

import inspect

import keras
import numpy as np
import pytest
from helpers.marks import marks_on

from kerasmp import backend

pytestmark = marks_on("jax")

MULTI = keras.layers.MultiHeadAttention(2, 4)
GROUP = keras.layers.GroupQueryAttention(4, 4, 2)
QUERY, VALUE = np.ones((1, 3, 8), "float32"), np.ones((1, 5, 8), "float32")


def recording(layer, *names):
    """Return a layer of a subclass whose methods record their arguments and what they return."""
    calls = {name: [] for name in names}

    def recorder(name):
        method = getattr(type(layer), name)

        def recorded(*args, **kwargs):
            bound = inspect.signature(method).bind(*args, **kwargs)
            outputs = method(*args, **kwargs)
            calls[name].append(({**bound.arguments}, outputs))
            return outputs

        return recorded

    cls = type("Profile", (type(layer),), {name: recorder(name) for name in names})
    return cls.from_config(layer.get_config()), calls


@pytest.mark.parametrize("layer", [MULTI, GROUP], ids=["multi", "group"])
def test_call_computes_a_mask_and_passes_it_on_unchanged(layer):
    layer, calls = recording(layer, "_compute_attention_mask", "_compute_attention")
    layer(QUERY, VALUE, use_causal_mask=True, training=True)
    ((mask_arguments, mask),) = calls["_compute_attention_mask"]
    ((arguments, outputs),) = calls["_compute_attention"]
    assert mask_arguments["use_causal_mask"] is True
    assert set(mask_arguments) - {"self"} <= {
        *("query", "value", "query_mask", "value_mask", "key_mask", "attention_mask"),
        "use_causal_mask",
    }
    assert tuple(mask_arguments["query"].shape) == QUERY.shape
    assert arguments["attention_mask"] is mask
    assert arguments["training"] is True
    assert (
        tuple(arguments["query"].shape) == (1, 3, layer.query_dense.kernel.shape[1], 4)
        if (layer is MULTI)
        else (1, 3, 4, 4)
    )
    assert arguments["query"].shape[2] == arguments["key"].shape[2]  # already repeated
    assert len(outputs) == 2


@pytest.mark.parametrize("layer", [MULTI, GROUP], ids=["multi", "group"])
def test_the_attributes_that_kerasmp_reads_exist(layer):
    layer(QUERY, VALUE)
    assert layer.dropout == 0
    assert layer._flash_attention is None
    assert hasattr(layer, "key_dim" if layer is MULTI else "head_dim")
    dropping = type(layer).from_config({**layer.get_config(), "dropout": 0.5})
    dropping(QUERY, VALUE)
    assert isinstance(dropping._dropout_layer.seed_generator, keras.random.SeedGenerator)
    if layer is MULTI:
        assert layer.attention_axes == (1,)
        assert layer._dot_product_equation
        assert layer._combine_equation
    else:
        layer(QUERY, VALUE, return_attention_scores=True)
        assert layer._return_attention_scores is True
        assert type(layer).__name__ == "GroupedQueryAttention"  # saved weights go by it


@pytest.mark.keras("3.15")
def test_the_attribute_for_a_window_exists():
    settings = {"sliding_window": 2}
    assert keras.layers.MultiHeadAttention(2, 4, **settings)._sliding_window == 2
    assert keras.layers.GroupQueryAttention(4, 4, 2, **settings).sliding_window == 2


@pytest.mark.parametrize("cls", [keras.layers.Attention, keras.layers.AdditiveAttention])
def test_attention_computes_scores_and_applies_them(cls):
    layer, calls = recording(cls(dropout=0.5), "_calculate_scores", "_apply_scores")
    mask = np.ones((1, 5), bool)
    layer([QUERY, VALUE], mask=[None, mask], training=True)
    ((arguments, scores),) = calls["_calculate_scores"]
    assert {name: tuple(x.shape) for name, x in arguments.items() if name != "self"} == {
        "query": QUERY.shape,
        "key": VALUE.shape,
    }
    ((arguments, (outputs, weights)),) = calls["_apply_scores"]
    assert arguments["scores"] is scores
    assert tuple(arguments["scores_mask"].shape) == mask.shape
    assert arguments["training"] is True
    assert (tuple(outputs.shape), tuple(weights.shape)) == (QUERY.shape, (1, 3, 5))
    assert isinstance(layer.seed_generator, keras.random.SeedGenerator)


def test_keras_knows_that_a_cpu_has_no_flash_attention():
    x = keras.ops.ones((1, 4, 2, 8), dtype="float16")
    for causal in (False, True):
        assert backend.current().has_flash_attention(x, x, x, is_causal=causal) is False
