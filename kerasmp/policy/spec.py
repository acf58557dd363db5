"""The text of a policy: parse it, check that Keras can express it, and write it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import keras

from kerasmp.errors import PolicyError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

AUTO = "auto"
DTYPES = ("float16", "bfloat16", "float32", "float64")
HALVES = ("float16", "bfloat16")
MIXED = {f"mixed_{half}": half for half in HALVES}
NAMES = (*MIXED, *DTYPES)
PARTS = ("variable", "compute", "output")

_EXPECTED = (
    f"one of {', '.join((*NAMES, AUTO))}, a quantized name such as int8_from_float32, "
    'or "variable=float32,compute=float16,output=float32"'
)


class Spec(NamedTuple):
    """The dtypes of a policy, checked.

    Args:
        name: The name that Keras gives to this pair of variable and compute dtype.
        variable: The variable dtype.
        compute: The compute dtype.
        output: The dtype of the model's final outputs; None leaves them as they are.
    """

    name: str
    variable: str
    compute: str
    output: str | None = None

    def __str__(self) -> str:
        if self.output is None:
            return self.name
        return f"variable={self.variable},compute={self.compute},output={self.output}"


def parse(text: str) -> Spec:
    """Parse the text of a policy, except "auto", which needs a device.

    Args:
        text: A Keras policy name, or parts such as "compute=float16,output=float32".

    Returns:
        The dtypes that the text stands for.

    Raises:
        PolicyError: If a name is unknown, a part is unknown, empty or given twice, or Keras cannot
            express the combination.

    Example:
    >>> parse("compute=float16")
    Spec(name='mixed_float16', variable='float32', compute='float16', output=None)
    """
    text = text.strip()
    if "=" in text or "," in text:
        return _from_parts(_split(text))
    if "_from_" in text:
        return _quantized(text)
    if text in MIXED:
        return Spec(text, "float32", MIXED[text])
    if text in DTYPES:
        return Spec(text, text, text)
    raise _unknown("policy name", repr(text), _EXPECTED, text, (*NAMES, AUTO))


def from_keras(policy: keras.DTypePolicy) -> Spec:
    """Return the dtypes of a Keras policy that is not a map.

    Args:
        policy: The Keras policy.

    Returns:
        Its dtypes.

    Raises:
        PolicyError: If the name of the policy does not describe it completely: a subclass, an
            `amax_history_length` that is not the default, or a name that Keras has erased.
    """
    name = policy.name
    try:
        is_complete = isinstance(name, str) and keras.dtype_policies.get(name) == policy
    except (TypeError, ValueError):  # a user-defined policy may have any name
        is_complete = False
    if not is_complete:
        raise PolicyError(
            "The name of this Keras policy does not describe it completely.",
            received=f"{name!r}, a {type(policy).__name__}",
            expected=_EXPECTED,
            fix="Pass the policy to the layers themselves, as their dtype argument.",
        )
    return parse(name)


def _split(text: str) -> dict[str, str]:
    parts: dict[str, str] = {}
    for item in text.split(","):
        key, equals, dtype = (word.strip() for word in item.partition("="))
        if not equals or key not in PARTS:
            expected = " or ".join(f"{part}=DTYPE" for part in PARTS)
            received = f"{item.strip()!r} in {text!r}"
            raise _unknown("part of a policy", received, expected, key, PARTS)
        if key in parts:
            raise PolicyError(
                f"{key} is given twice.",
                received=repr(text),
                expected=f"at most one {key}=DTYPE",
                fix="Remove one of them.",
            )
        if dtype not in DTYPES:
            expected = f"one of {', '.join(DTYPES)}"
            raise _unknown("dtype in a policy", repr(item.strip()), expected, dtype, DTYPES)
        parts[key] = dtype
    return parts


def _unknown(
    what: str, received: str, expected: str, word: str, known: Sequence[str]
) -> PolicyError:
    return PolicyError(
        f"Unknown {what}.",
        received=received,
        expected=expected,
        fix=did_you_mean(word, known) or 'The usual choice is "mixed_float16".',
    )


def _from_parts(parts: dict[str, str]) -> Spec:
    variable, compute, output = map(parts.get, PARTS)
    if variable is None:
        # Half precision variables lose small updates, so they are never the default.
        variable = "float64" if compute == "float64" else "float32"
    compute = compute or variable
    if variable == compute:
        return Spec(compute, variable, compute, output)
    if variable == "float32" and compute in HALVES:
        return Spec(f"mixed_{compute}", variable, compute, output)
    raise PolicyError(
        "Keras cannot express this combination of variable and compute dtypes.",
        received=f"variable={variable},compute={compute}",
        expected="the same dtype twice, or variable=float32 with compute=float16 or bfloat16",
        fix=f'"{compute}" uses {compute} for both.',
    )


def _quantized(text: str) -> Spec:
    try:
        policy = keras.dtype_policies.get(text)
    except (TypeError, ValueError) as error:
        raise PolicyError(
            "Keras does not accept this quantized policy name.",
            received=repr(text),
            expected="a name such as int8_from_float32 or float8_from_mixed_bfloat16",
            fix=f"Keras says: {error}",
        ) from error
    if policy.compute_dtype not in DTYPES:
        raise PolicyError(
            "A quantized policy needs a floating point policy after _from_.",
            received=repr(text),
            expected=f"one of {', '.join(NAMES)} after _from_",
            fix="Use the policy that the layers had before quantization.",
        )
    return Spec(policy.name, policy.variable_dtype, policy.compute_dtype)
