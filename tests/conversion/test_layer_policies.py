"""The policies of all layers as text: parsed, refused, and applied to another build."""

import keras
import numpy as np
import pytest
from helpers import converted
from helpers.flattened import flatten_layers

import kerasmp as mp

pytestmark = pytest.mark.unit


# Keras imports TensorFlow to make a Bidirectional: test_safe_layers.py has that kind.
@pytest.mark.parametrize("kind", ["attention", "nested", "subclassed"])
def test_policies_as_text_apply_to_another_build_of_the_model(kind):
    model = converted.KINDS[kind]()
    report = mp.convert(model)
    text = f"# kept with the project\n\n{report.layer_policies}\n"
    policies = mp.LayerPolicies.parse(text)
    assert policies == mp.LayerPolicies.of(model)
    assert str(policies) == str(report.layer_policies)
    other = converted.KINDS[kind]()
    mp.convert(other, policies)
    assert [layer.compute_dtype for layer in flatten_layers(other)] == [
        layer.compute_dtype for layer in flatten_layers(model)
    ]
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(
        *(keras.ops.convert_to_numpy(each(converted.X)) for each in (model, other))
    )
    again = mp.convert(other, report.layer_policies)
    assert all(row.before == row.after for row in again.rows)


def policies(*lines):
    return mp.LayerPolicies.parse("\n".join(lines))


BUILT = ["net (Sequential): float32", "  first (Dense): mixed_float16", "  last (Dense): float32"]


def two():
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((4,)), dense(2, name="first_7"), dense(2, name="last")])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (BUILT[:2], r'a model with "sequential.*/last" \(Dense\). Expected: no further layer'),
        ([*BUILT, "  more (Dense): float32"], r"no further layer. Expected: more \(Dense\)"),
        ([BUILT[0], "  first (Conv2D): float32", BUILT[2]], r'first_7" \(Dense\).*Conv2D'),
        ([BUILT[0], BUILT[2], BUILT[1]], r'first_7" \(Dense\). Expected: last'),
        ([*BUILT[:2], "    last (Dense): float32"], r'last" \(Dense\). Expected: last'),
    ],
)
def test_policies_of_other_layers_are_refused(lines, message):
    model = two()
    with pytest.raises(mp.errors.PolicyError, match=message):
        mp.convert(model, policies(*lines))
    assert type(model) is keras.Sequential
    assert {layer.compute_dtype for layer in flatten_layers(model)} == {"float32"}


def test_policies_of_the_same_layers_are_applied():
    model = two()
    mp.convert(model, policies(*BUILT))
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "float32"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no layer policies"),
        ("net: float32", "Line 1 is not a layer with its policy"),
        ("net (Sequential): mixed_flaot16", "does not know the policy in line 1.*mixed_flaot16"),
    ],
)
def test_text_without_policies_is_refused(text, message):
    with pytest.raises(mp.errors.PolicyError, match=message):
        mp.LayerPolicies.parse(text)
    with pytest.raises(mp.errors.ArgumentTypeError, match="of type NoneType"):
        mp.LayerPolicies.parse(None)
