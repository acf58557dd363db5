"""A converted model's file brings back what each layer does, in another process."""

import pytest
from helpers import converted

import kerasmp as mp


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    facts = {}
    for kind, build in converted.KINDS.items():
        model = build()
        model.compile("adam", "mse")
        mp.convert(model)
        facts[kind] = converted.save(model, folder / f"{kind}.keras")
    return folder, facts


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_another_process_loads_the_same(saved, policy, another_process):
    folder, facts = saved
    loaded = another_process("helpers.converted:load", folder=str(folder), policy=policy)
    for kind, wanted in facts.items():
        assert loaded[kind] == wanted, kind


def test_what_is_saved_is_neither_all_float16_nor_what_keras_would_load(saved):
    _, facts = saved
    assert all("mixed_float16" in each["policies"] for each in facts.values())
    assert "softmax (Softmax): float32" in facts["attention"]["policies"]
    assert "query (EinsumDense): float32" in facts["subclassed"]["policies"]
    assert all(each["optimizer"] == "LossScaleOptimizer" for each in facts.values())
