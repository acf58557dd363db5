"""Exceptions to a policy: which layers, by path pattern or by class, follow another one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import keras

from kerasmp.errors import ArgumentTypeError, PolicyError, did_you_mean

if TYPE_CHECKING:
    from kerasmp.policy.policy import Policy

SAFE = "safe"
"""The name of the built-in rule set, which `kerasmp.policy.safe` holds."""

Key: TypeAlias = str | type

_EXPECTED = (
    f'a dict from layer path patterns or layer classes to policies, "{SAFE}", or a list of both'
)


class Rules(NamedTuple):
    """Rules, checked.

    Args:
        safe: Whether the built-in rule set applies where no exception does.
        exceptions: Pairs of a pattern or class and its policy, patterns first.
    """

    safe: bool = False
    exceptions: tuple[tuple[Key, Policy], ...] = ()

    def __bool__(self) -> bool:
        return self.safe or bool(self.exceptions)


def normalise(rules: object, make_policy: Callable[[Any], Policy]) -> Rules:
    """Check rules and bring them into one order, so that equal rules compare equal.

    Args:
        rules: What the user gave: None, a mapping, the name of the built-in rule set, a list or
            tuple of these, or rules that are normalised already.
        make_policy: Turns a value of the mapping into a policy (the class `Policy`, which this
            module cannot import because that one imports this).

    Raises:
        ArgumentTypeError: If `rules` is none of these, or a key is neither text nor a layer class.
        PolicyError: If the rule set is unknown, a pattern is no regular expression, a rule's policy
            has an output or rules of its own, or two mappings disagree on a key.

    Example:
    >>> from kerasmp.policy import Policy
    >>> normalise(["safe", {"head/.*": "float32"}], Policy)
    Rules(safe=True, exceptions=(('head/.*', Policy('float32')),))
    """
    safe = False
    exceptions: dict[Key, Policy] = {}
    for given in _flat(rules):
        if isinstance(given, str):
            _check_name(given)
            safe = True
        elif given is not None:
            for key, policy in _read(given, make_policy).items():
                if exceptions.setdefault(key, policy) != policy:
                    raise _disagreement(key, exceptions[key], policy)
    return Rules(safe, tuple(sorted(exceptions.items(), key=_order)))


def patterns(rules: Rules) -> dict[str, Policy]:
    """Return the rules that Keras can express: those with a layer path pattern."""
    return {key: policy for key, policy in rules.exceptions if isinstance(key, str)}


def classes(rules: Rules) -> dict[type, Policy]:
    """Return the rules that Keras cannot express: those with a layer class."""
    return {key: policy for key, policy in rules.exceptions if isinstance(key, type)}


def to_config(rules: Rules) -> list[dict[str, str]]:
    """Write rules as plain data.

    Args:
        rules: Normalised rules.

    Returns:
        One dict for each rule: "path" or "layer", and "policy"; for the built-in set, "set".

    Raises:
        PolicyError: If a class is neither one of Keras's layers nor registered with Keras: the
            file could not be read back.
    """
    return [
        *([{"set": SAFE}] if rules.safe else []),
        *(
            {"path": key, "policy": str(policy)}
            if isinstance(key, str)
            else {"layer": _class_name(key), "policy": str(policy)}
            for key, policy in rules.exceptions
        ),
    ]


def from_config(config: Iterable[Mapping[str, str]]) -> list[str | dict[Key, str]]:
    """Read what `to_config` wrote.

    Args:
        config: One mapping for each rule.

    Returns:
        Rules as a user would give them.

    Raises:
        PolicyError: If it is no such list, or a layer class is not known in this process.
    """
    kinds = ({"set"}, {"path", "policy"}, {"layer", "policy"})
    if not isinstance(config, list | tuple) or not all(
        isinstance(rule, Mapping)
        and {*rule} in kinds
        and all(isinstance(value, str) for value in rule.values())
        for rule in config
    ):
        raise PolicyError(
            "These are no rules of a policy's configuration.",
            received=repr(config),
            expected='a list of dicts with "set", or with "path" or "layer" and "policy", of text',
            fix="Policy.get_config() returns such.",
        )
    return [
        rule["set"]
        if "set" in rule
        else {
            rule["path"] if "path" in rule else _find_class(rule["layer"]): rule["policy"],
        }
        for rule in config
    ]


def shown(rules: Rules) -> str:
    """Return rules as text that makes them again."""
    exceptions = dict(rules.exceptions)
    if not rules.safe:
        return repr(exceptions)
    return repr([SAFE, exceptions]) if exceptions else repr(SAFE)


def _flat(rules: object) -> Iterator[object]:
    if isinstance(rules, Rules):
        yield from [SAFE] if rules.safe else []
        yield dict(rules.exceptions)
    elif isinstance(rules, list | tuple):
        for each in rules:
            yield from _flat(each)
    else:
        yield rules


def _read(rules: object, make_policy: Callable[[Any], Policy]) -> dict[Key, Policy]:
    if not isinstance(rules, Mapping):
        raise ArgumentTypeError(
            "rules is not a mapping.",
            received=repr(rules),
            expected=_EXPECTED,
            fix='For example rules={"head/.*": "float32"}.',
        )
    return {_key(key): _value(key, make_policy(value)) for key, value in rules.items()}


def _check_name(name: str) -> None:
    if name != SAFE:
        raise PolicyError(
            "Unknown rule set.",
            received=repr(name),
            expected=_EXPECTED,
            fix=did_you_mean(name, [SAFE]) or f'rules="{SAFE}" is the only one.',
        )


def _disagreement(key: Key, one: Policy, other: Policy) -> PolicyError:
    return PolicyError(
        "Two rules give different policies for the same key.",
        received=f"{key!r}: {str(one)!r} and {key!r}: {str(other)!r}",
        expected="one policy for each key",
        fix="Leave one of them out.",
    )


def _key(key: object) -> Key:
    if isinstance(key, type) and issubclass(key, keras.Layer):
        return key
    if not isinstance(key, str):
        raise ArgumentTypeError(
            "The key of a rule is neither a layer path pattern nor a layer class.",
            received=repr(key),
            expected=_EXPECTED,
            fix='For example "head/.*" or keras.layers.Softmax.',
        )
    if not key.strip():
        raise PolicyError(
            "The layer path pattern of a rule is empty, and would match no layer.",
            received=repr(key),
            expected="a pattern for re.fullmatch on the layer's path",
            fix='".*" matches every layer.',
        )
    try:
        re.compile(key)
    except re.error as error:
        raise PolicyError(
            "The layer path pattern of a rule is not a regular expression.",
            received=repr(key),
            expected="a pattern for re.fullmatch on the layer's path",
            fix=f"Python says: {error}.",
        ) from error
    return key


def _value(key: object, policy: Policy) -> Policy:
    if policy.output_dtype is not None or policy.rules:
        raise PolicyError(
            "The policy of a rule cannot have an output or rules of its own.",
            received=f"{key!r}: {policy!r}",
            expected="variable and compute dtypes only",
            fix="Give output and rules to the policy of the whole model.",
        )
    return policy


def _order(rule: tuple[Key, Policy]) -> tuple[bool, str]:
    key, _ = rule
    if isinstance(key, str):
        return False, key
    return True, f"{key.__module__}.{key.__qualname__}"


def _class_name(cls: type) -> str:
    name = str(keras.saving.get_registered_name(cls))
    if _lookup(name) is not cls:
        raise PolicyError(
            "A layer class in the rules cannot be found again by its name.",
            received=repr(cls),
            expected="a layer of keras.layers, or a registered class",
            fix="Put @keras.saving.register_keras_serializable() above the class.",
        )
    return name


def _find_class(name: str) -> type:
    found = _lookup(name)
    if not isinstance(found, type):
        raise PolicyError(
            "A layer class in the rules is not known in this process.",
            received=repr(name),
            expected="a layer of keras.layers, or a registered class",
            fix="Import the module that registers the class before loading.",
        )
    return found


def _lookup(name: str) -> Any:
    # Never by importing a module that a file names: that would run a stranger's code.
    return keras.saving.get_registered_object(name) or getattr(keras.layers, name, None)
