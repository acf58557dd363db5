"""A saved converted model computes the same in another process."""

import pytest
from helpers import converted
from helpers.marks import few, marks_on

import kerasmp as mp

pytestmark = marks_on("jax")

# Policies that are neither all float16 nor those that Keras would load.
EXCEPTIONS = {
    "attention": "softmax (Softmax): float32",
    "recurrent": "dense (Dense): float32",
    "nested": "unit_normalization (UnitNormalization): float32",
    "subclassed": "query (EinsumDense): float32",
}


# Keras builds all parts of a subclass in `build`: the hardest case for restoring policies.
@pytest.mark.parametrize("kind", few(converted.KINDS, ["subclassed"]))
def test_another_process_loads_the_same_model(kind, tmp_path, another_process):
    model = converted.KINDS[kind]()
    model.compile("adam", "mse")
    mp.convert(model)
    path = tmp_path / "model.keras"
    facts = converted.save(model, path)
    assert "mixed_float16" in facts["policies"]
    assert EXCEPTIONS[kind] in facts["policies"]
    assert facts["optimizer"] == "LossScaleOptimizer"
    for policy in ("float32", "mixed_float16"):
        loaded = another_process("helpers.converted:load_facts", path=str(path), policy=policy)
        assert loaded == facts, policy
