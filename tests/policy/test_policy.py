"""Policy: what it accepts and refuses, its text, and its copies."""

import contextlib
import copy
import dataclasses
import pickle
import re

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kerasmp.errors import ArgumentTypeError, PolicyError
from kerasmp.policy import Policy, recommend_policy
from kerasmp.policy.spec import DTYPES, NAMES

QUANTISED = (
    "int8_from_float32",
    "int8_from_mixed_bfloat16",
    "int4_from_float32",
    "float8_from_mixed_bfloat16",
    "gptq/4/128_from_float32",
)
PARTS = re.compile(r"(variable|compute|output)=\w+(,\w+=\w+)?", re.ASCII)
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [("float32", "float16"), ("float32", "bfloat16")]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "variable", "compute"),
    [
        ("mixed_float16", "float32", "float16"),
        ("mixed_bfloat16", "float32", "bfloat16"),
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("int8_from_mixed_bfloat16", "float32", "bfloat16"),
        (" float32 ", "float32", "float32"),
    ],
)
def test_a_keras_name_means_what_it_means_in_keras(text, variable, compute):
    policy = Policy(text)
    theirs = keras.dtype_policies.get(text.strip())
    assert (policy.variable_dtype, policy.compute_dtype) == (variable, compute)
    assert (theirs.variable_dtype, theirs.compute_dtype) == (variable, compute)
    assert policy.output_dtype is None
    assert policy.name == theirs.name == str(policy)
    assert policy.to_keras() == theirs


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "name", "output"),
    [
        ("variable=float32,compute=float16,output=float32", "mixed_float16", "float32"),
        (" output = float32 , compute=float16,variable=float32 ", "mixed_float16", "float32"),
        ("compute=bfloat16", "mixed_bfloat16", None),
        ("compute=float64", "float64", None),
        ("compute=float32", "float32", None),
        ("variable=float16", "float16", None),
        ("variable=float64", "float64", None),
        ("output=float16", "float32", "float16"),
    ],
)
def test_parts_in_any_order_with_documented_defaults(text, name, output):
    policy = Policy(text)
    assert (policy.name, policy.output_dtype) == (name, output)


@pytest.mark.unit
@given(pair=st.sampled_from(PAIRS), output=st.sampled_from([None, *DTYPES]), data=st.data())
def test_str_is_the_inverse_of_reading(pair, output, data):
    parts = [f"variable={pair[0]}", f"compute={pair[1]}"] + [f"output={output}"] * bool(output)
    blanks = st.text(" \t", max_size=2)
    text = ",".join(
        data.draw(blanks) + part.replace("=", f"{data.draw(blanks)}=") + data.draw(blanks)
        for part in data.draw(st.permutations(parts))
    )
    policy = Policy(text)
    assert (policy.variable_dtype, policy.compute_dtype, policy.output_dtype) == (*pair, output)
    assert Policy(str(policy)) == policy
    assert hash(Policy(str(policy))) == hash(policy)


@pytest.mark.unit
@given(text=st.text(max_size=40) | st.from_regex(PARTS))
def test_any_text_is_read_and_written_back_or_refused(text):
    with contextlib.suppress(PolicyError):
        policy = Policy(text)
        assert Policy(str(policy)) == policy


@pytest.mark.unit
@given(text=st.text(max_size=40).filter(lambda text: text.strip() not in (*NAMES, "auto")))
def test_a_refusal_says_what_was_received_and_expected(text):
    with pytest.raises(PolicyError, match=r"Received: [\s\S]+ Expected: "):
        Policy(text)


@pytest.mark.unit
@pytest.mark.parametrize("text", [*NAMES, *QUANTISED, "compute=float16,output=float32"])
def test_every_policy_survives_str_pickle_copy_and_config(text):
    policy = Policy(text)
    assert Policy(str(policy)) == policy
    assert Policy(policy) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert copy.deepcopy(policy) == policy
    assert Policy.from_config(policy.get_config()) == policy
    assert repr(policy) == f"Policy('{policy}')"


@pytest.mark.parametrize("rules", [None, {"head": "float32", keras.layers.Softmax: "float32"}])
def test_keras_serialises_a_policy(rules):
    for text in ("mixed_float16", QUANTISED[0], "compute=float16,output=float32"):
        policy = Policy(text, rules=rules)
        stored = keras.saving.serialize_keras_object(policy)
        assert stored["registered_name"] == "kerasmp>Policy"
        assert keras.saving.deserialize_keras_object(stored) == policy


@pytest.mark.unit
def test_a_policy_is_a_value_and_frozen():
    assert Policy("mixed_float16") == Policy("compute=float16")
    assert Policy("mixed_float16") != Policy("compute=float16,output=float32")
    assert Policy("mixed_float16") != "mixed_float16"
    assert len({Policy("float32"), Policy("float32"), Policy("float16")}) == 2
    policy = Policy("float32")
    with pytest.raises(AttributeError):
        policy.name = "float16"
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy._spec = None


@pytest.mark.unit
def test_auto_is_what_the_recommendation_says():
    assert Policy("auto") == Policy(" auto ") == recommend_policy().policy


@pytest.mark.unit
def test_a_keras_policy_is_accepted():
    assert Policy(keras.DTypePolicy("mixed_float16")) == Policy("mixed_float16")
    assert Policy(keras.dtype_policies.get("int8_from_float32")) == Policy("int8_from_float32")


@pytest.mark.unit
def test_a_keras_map_gives_default_and_rules():
    theirs = keras.dtype_policies.DTypePolicyMap(
        keras.DTypePolicy("mixed_float16"), {"head/.*": keras.DTypePolicy("float32")}
    )
    policy = Policy(theirs)
    assert policy == Policy("mixed_float16", rules={"head/.*": "float32"})
    assert Policy(theirs, rules={}) == Policy("mixed_float16")
    assert Policy(policy.to_keras()) == policy


class TellsMore(keras.DTypePolicy):
    """A Keras policy whose name does not describe it completely."""


class OfAnyName(keras.DTypePolicy):
    """A Keras policy with a name that Keras does not know."""

    def __init__(self):
        super().__init__("mixed_float16")
        self._name = "int8 or so"


@pytest.mark.unit
@pytest.mark.parametrize(
    "make",
    [
        lambda: TellsMore("float32"),
        OfAnyName,
        lambda: keras.dtype_policies.QuantizedFloat8DTypePolicy(
            "float8", "float32", amax_history_length=3
        ),
    ],
)
def test_a_keras_policy_that_its_name_does_not_describe_is_refused(make):
    with pytest.raises(
        PolicyError, match=r"name of this Keras policy does not describe it.*dtype argument"
    ):
        Policy(make())


def test_a_keras_policy_that_lost_its_name_is_refused():
    member = keras.DTypePolicy("float32")
    # Keras takes the names of the members of a map without a default.
    keras.dtype_policies.DTypePolicyMap(None, {"head": member}).get_config()
    with pytest.raises(PolicyError, match="does not describe it completely"):
        Policy(member)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixed_flaot16", r"Unknown policy name\. Received: 'mixed_flaot16'\. Expected: one of "),
        ("mixed_flaot16", r"mixed_bfloat16, float16.*auto.*Did you mean \"mixed_float16\"\?"),
        ("Float32", r'Did you mean "float32"\?'),
        ("atuo", r'Did you mean "auto"\?'),
        ("int32", r"Unknown policy name\. Received: 'int32'"),
        ("int8", r"a quantized name such as int8_from_float32"),
        ("", r"Unknown policy name\. Received: ''"),
        ("compute=flaot16", r"Unknown dtype in a policy\. Received: 'compute=flaot16'\."),
        ("compute=flaot16", r"one of float16, bfloat16, float32, float64\. Did you mean \"float16"),
        ("compute=mixed_float16", r"Received: 'compute=mixed_float16'"),
        ("output=", r"Unknown dtype in a policy\. Received: 'output='"),
        ("varible=float32", r"Unknown part.*variable=DTYPE or compute=DTYPE.*\"variable\"\?"),
        ("float16,float32", r"Unknown part of a policy\. Received: 'float16' in 'float16,float32'"),
        ("compute=float16,", r"Unknown part of a policy\. Received: '' in"),
        ("compute=float16,compute=float16", r"compute is given twice.*at most one compute=DTYPE"),
        ("int8_from_mixed_float16", r"Keras does not accept.*Keras says: Quantization mode='int8'"),
        ("int9_from_float32", r"does not accept this quantized policy name.*'int9_from_float32'"),
        ("int8_from_int32", r"needs a floating point policy after _from_.*mixed_float16"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(text, message):
    with pytest.raises(PolicyError, match=message) as caught:
        Policy(text)
    assert isinstance(caught.value, ValueError)


EXPRESSIBLE = {(variable, compute) for variable, compute in PAIRS}


@pytest.mark.unit
@pytest.mark.parametrize("variable", DTYPES)
@pytest.mark.parametrize("compute", DTYPES)
def test_exactly_the_pairs_that_keras_can_express_are_accepted(variable, compute):
    text = f"variable={variable},compute={compute}"
    if (variable, compute) in EXPRESSIBLE:
        theirs = Policy(text).to_keras()
        assert (theirs.variable_dtype, theirs.compute_dtype) == (variable, compute)
        return
    message = (
        r"Keras cannot express this combination.*Received: "
        + text
        + rf"\. Expected: the same dtype twice.*\"{compute}\" uses {compute} for both"
    )
    with pytest.raises(PolicyError, match=message):
        Policy(text)


@pytest.mark.unit
@pytest.mark.parametrize("wrong", [None, 16, {"spec": "float32"}, float])
def test_other_types_are_refused(wrong):
    with pytest.raises(ArgumentTypeError, match=r"Received: .* of type .*a policy name or spec"):
        Policy(wrong)


@pytest.mark.unit
def test_a_keras_policy_has_nothing_that_keras_cannot_express():
    assert Policy("mixed_float16").beyond_keras == ()
    policy = Policy("compute=float16,output=float32", rules={keras.layers.Softmax: "float32"})
    assert policy.beyond_keras == ("output=float32", "the rule for the class Softmax")
