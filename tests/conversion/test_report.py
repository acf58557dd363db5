"""Numbers and text of a report, from made-up rows."""

from types import SimpleNamespace

import keras
import pytest

import kerasmp as mp
from kerasmp.conversion import ConversionReport, ConvertedLayer

pytestmark = pytest.mark.unit


def cost(counts, activations=0, casts=0, *, known=True):
    return SimpleNamespace(
        multiply_adds=counts, activation_bytes=activations, cast_bytes=casts, known=known
    )


def report(*costs, notes=()):
    names = ["net", "one", "two", "three"]
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)], name="net")
    rows = [
        ConvertedLayer(
            layer=model,
            path=name,
            class_name="Dense",
            before="float32",
            after="mixed_float16" if name in {"net", "one"} else "float32",
            reason=f"because of {name}",
            replaced={"one": "Dense", "two": "Other"}.get(name),
            cost=each,
        )
        for name, each in zip(names, costs, strict=False)
    ]
    policies = mp.LayerPolicies.of(model)
    return ConversionReport(
        model=model, policy=None, rows=rows, layer_policies=policies, notes=notes
    )


def lines(text):
    return {line.split()[0]: line.split() for line in text.splitlines() if line}


def test_figures_are_sums_and_shares():
    found = report(
        cost({}, 8, 2),
        cost({"float16": 1_000_000, "float32": 10_000}, 1536, 1),
        cost({"bfloat16": 200_000, "float32": 1_600_000}, 0, 7),
    )
    assert found.multiply_adds == {"float16": 1_000_000, "bfloat16": 200_000, "float32": 1_610_000}
    assert found.half_share == 1_200_000 / 2_810_000
    assert (found.activation_bytes, found.cast_bytes) == (1544, 10)
    text = str(found)
    assert text.startswith("net: 1 float32, 1 mixed_float16; 1 changed\n")
    assert "42.7% of 2.81 M multiply-adds in half precision, 1.51 KiB of activations" in text
    assert "10 B written by casts" in text
    rows = lines(text)
    assert rows["one"][1:5] == ["Dense", "(kerasmp)", "float32", "mixed_float16"]
    assert " ".join(rows["one"][5:]) == "1.01 M 99% 1.50 KiB 1 B because of one"
    assert rows["two"][1:5] == ["Dense", "(kerasmp,", "was", "Other)"]
    assert " ".join(rows["net"][4:]) == "0 - 8 B 2 B because of net"


def test_one_unknown_layer_makes_the_products_unknown_and_not_the_bytes():
    found = report(cost({"float16": 5}, 4, 1), cost({}, 4, 1, known=False), None)
    assert found.multiply_adds is None
    assert found.half_share is None
    assert (found.activation_bytes, found.cast_bytes) == (8, 2)
    rows = lines(str(found))
    assert rows["one"].count("unknown") == 2
    assert rows["two"].count("unknown") == 4


def test_without_a_sample_there_are_no_figures():
    found = report(None, None, notes=["a first note", "a second one"])
    assert (found.multiply_adds, found.half_share) == (None, None)
    assert (found.activation_bytes, found.cast_bytes) == (None, None)
    text = str(found)
    assert "multiply-adds and bytes unknown: give convert a sample" in text
    assert lines(text)["layer"] == ["layer", "class", "before", "after", "why"]
    assert text.endswith("\n\n- a first note\n- a second one")


def test_a_model_without_products_has_no_share():
    found = report(cost({}, 4, 0))
    assert found.multiply_adds == {}
    assert found.half_share is None
