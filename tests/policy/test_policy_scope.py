"""The global policy: set, read back, restored, and always in step with Keras's."""

import threading

import keras
import pytest

from kerasmp.errors import ArgumentTypeError, PolicyError, PolicyWarning
from kerasmp.policy import Policy, global_policy, policy_scope, set_global_policy

WITH_OUTPUT = Policy("compute=float16,output=float32")
WITH_CLASS = Policy("mixed_float16", rules={keras.layers.Softmax: "float32"})
WITH_PATH = Policy("mixed_float16", rules={"head": "float32"})


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16", "float16", "float32"])
def test_stock_layers_follow_the_global_policy(name):
    set_global_policy(name)
    assert global_policy() == Policy(name)
    assert keras.config.dtype_policy() == keras.DTypePolicy(name)
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    assert layer.compute_dtype == Policy(name).compute_dtype
    assert layer.kernel.dtype == Policy(name).variable_dtype


@pytest.mark.unit
@pytest.mark.parametrize(
    "policy", [keras.DTypePolicy("mixed_bfloat16"), Policy("mixed_bfloat16"), "compute=bfloat16"]
)
def test_everything_that_a_policy_accepts_can_be_global(policy):
    set_global_policy(policy)
    assert keras.config.dtype_policy().name == "mixed_bfloat16"


def test_path_rules_become_global_without_a_warning():
    set_global_policy(WITH_PATH)
    assert global_policy() == WITH_PATH
    assert keras.config.dtype_policy()["head"].name == "float32"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("policy", "what"),
    [(WITH_OUTPUT, "output=float32"), (WITH_CLASS, "the rule for the class Softmax")],
)
@pytest.mark.parametrize("use", [set_global_policy, policy_scope])
def test_a_warning_of_what_stock_models_ignore_names_the_callers_line(policy, what, use):
    with pytest.warns(PolicyWarning, match=f"Stock Keras models will not follow {what}") as caught:
        use(policy)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.filterwarnings("ignore::kerasmp.errors.PolicyWarning")
@pytest.mark.parametrize("policy", [WITH_OUTPUT, WITH_CLASS])
def test_what_keras_cannot_express_is_read_back(policy):
    set_global_policy(policy)
    assert global_policy() == policy
    assert keras.config.dtype_policy() == keras.DTypePolicy("mixed_float16")


@pytest.mark.unit
def test_a_warning_turned_into_an_error_changes_nothing():
    before = keras.config.dtype_policy()
    with pytest.raises(PolicyWarning):  # pytest turns warnings into errors here
        set_global_policy(WITH_OUTPUT)
    with pytest.raises(PolicyWarning):
        policy_scope(WITH_OUTPUT)
    assert keras.config.dtype_policy() is before


@pytest.mark.unit
@pytest.mark.parametrize(
    ("wrong", "error"), [("mixed_flaot16", PolicyError), (None, ArgumentTypeError)]
)
@pytest.mark.parametrize("use", [set_global_policy, policy_scope])
def test_bad_input_changes_nothing(use, wrong, error):
    set_global_policy("bfloat16")
    before = keras.config.dtype_policy()
    with pytest.raises(error):
        use(wrong)
    assert keras.config.dtype_policy() is before


@pytest.mark.unit
def test_changes_through_keras_are_seen():
    set_global_policy(WITH_PATH)
    keras.config.set_dtype_policy("float64")
    assert global_policy() == Policy("float64")
    keras.config.set_dtype_policy("mixed_float16")
    assert global_policy() == Policy("mixed_float16")


def test_a_layer_that_writes_into_the_global_map_is_seen():
    set_global_policy(WITH_PATH)
    head = keras.layers.Dense(2, name="head")
    head.build((None, 3))
    head.dtype_policy = "bfloat16"  # Keras stores this in the map that the layer was given
    assert global_policy() == Policy("mixed_float16", rules={"head": "bfloat16"})
    assert Policy("mixed_float16", rules={"head": "float32"}) == WITH_PATH


def test_a_policy_restored_through_keras_is_a_kerasmp_policy_again():
    set_global_policy(WITH_PATH)
    saved = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    keras.config.set_dtype_policy(saved)
    assert global_policy() == WITH_PATH


@pytest.mark.unit
def test_clear_session_resets_the_global_policy_as_keras_says():
    set_global_policy("mixed_float16")
    keras.backend.clear_session()
    assert global_policy() == Policy(keras.config.floatx())


@pytest.mark.unit
def test_a_keras_policy_that_no_policy_can_be_is_an_error_that_says_so():
    keras.config.set_dtype_policy("int32")
    with pytest.raises(PolicyError, match=r"Unknown policy name\. Received: 'int32'"):
        global_policy()


@pytest.mark.unit
def test_the_global_policy_is_per_thread_as_in_keras():
    set_global_policy("mixed_float16")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(global_policy()))
    thread.start()
    thread.join()
    assert seen == [Policy(keras.config.floatx())]


def test_scopes_nest_and_restore():
    before = keras.config.dtype_policy()
    with policy_scope(WITH_PATH) as outer:
        assert global_policy() == outer == WITH_PATH
        with policy_scope("bfloat16") as inner:
            assert global_policy() == inner == Policy("bfloat16")
        assert global_policy() == WITH_PATH
    assert keras.config.dtype_policy() is before


@pytest.mark.unit
def test_a_scope_restores_after_an_exception():
    set_global_policy("mixed_bfloat16")
    before = keras.config.dtype_policy()
    with pytest.raises(RuntimeError, match="inside"), policy_scope("float16"):
        raise RuntimeError("inside")
    assert keras.config.dtype_policy() is before


def test_a_scope_restores_what_the_block_set():
    set_global_policy("mixed_bfloat16")
    with policy_scope("float16"):
        set_global_policy("float64")
    assert global_policy() == Policy("mixed_bfloat16")


@pytest.mark.unit
def test_a_scope_restores_a_keras_policy_that_no_policy_can_be():
    keras.config.set_dtype_policy("int32")
    with policy_scope("float16"):
        pass
    assert keras.config.dtype_policy().name == "int32"


def test_a_scope_does_nothing_before_it_is_entered():
    before = keras.config.dtype_policy()
    scope = policy_scope("float16")
    assert keras.config.dtype_policy() is before
    with scope:
        assert global_policy() == Policy("float16")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras, TensorFlow, NumPy 2
def test_a_saved_model_keeps_its_dtypes(tmp_path):
    with policy_scope(WITH_PATH):
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1, name="head")]
        )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    dtypes = [(layer.variable_dtype, layer.compute_dtype) for layer in loaded.layers]
    assert dtypes == [("float32", "float16"), ("float32", "float32")]


@pytest.mark.unit
def test_a_scope_can_be_entered_again_and_within_itself():
    before = keras.config.dtype_policy()
    scope = policy_scope("mixed_float16")
    for _ in range(2):
        with scope, policy_scope("float64"), scope as policy:
            assert global_policy() == policy == Policy("mixed_float16")
        assert keras.config.dtype_policy() is before

    @scope
    def compute_dtype(again):
        inside = global_policy().compute_dtype
        return [inside, *(compute_dtype(again=False) if again else [])]

    assert compute_dtype(again=True) == ["float16", "float16"]
    assert keras.config.dtype_policy() is before
    with pytest.raises(PolicyError, match=r"not entered.*Received: .*Expected: .*Use `with"):
        scope.__exit__(None, None, None)
