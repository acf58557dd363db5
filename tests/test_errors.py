"""Errors say what was received, what was expected and how to fix it."""

import inspect

import pytest

import kerasmp as mp
from kerasmp import errors

pytestmark = pytest.mark.unit

ERRORS = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.KerasMPError)
]
WARNINGS = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Warning)
]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "Bad."),
        ({"received": "0"}, "Bad. Received: 0."),
        ({"expected": "1"}, "Bad. Expected: 1."),
        ({"fix": "Mend it."}, "Bad. Mend it."),
        (
            {"received": "0", "expected": "1", "fix": "Mend it."},
            "Bad. Received: 0. Expected: 1. Mend it.",
        ),
    ],
)
@pytest.mark.parametrize("cls", ERRORS)
def test_the_message_has_the_parts_that_were_given(cls, parts, message):
    error = cls("Bad.", **parts)
    assert str(error) == message
    assert (error.received, error.expected, error.fix) == tuple(
        parts.get(name, "") for name in ("received", "expected", "fix")
    )


@pytest.mark.parametrize("cls", [cls for cls in ERRORS if cls is not errors.KerasMPError])
def test_every_error_is_also_the_builtin_that_a_user_would_catch(cls):
    assert any(base.__module__ == "builtins" for base in cls.__mro__[1:-3])


def test_code_that_needs_a_framework_says_so_where_there_is_none():
    with pytest.raises(errors.BackendError, match=r"not support this Keras backend.*'numpy'.*jax"):
        mp.LossScaleOptimizer("adam")


@pytest.mark.parametrize("cls", WARNINGS)
def test_every_warning_can_be_filtered_as_one_family(cls):
    assert issubclass(cls, errors.KerasMPWarning)
    assert issubclass(cls, UserWarning)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("mixed_flaot16", 'Did you mean "mixed_float16"?'), ("zzz", ""), ("", "")],
)
def test_did_you_mean_proposes_one_near_word_or_nothing(word, hint):
    assert errors.did_you_mean(word, iter(["mixed_float16", "float32"])) == hint
