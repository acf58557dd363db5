"""Exceptions to a policy: layers that follow another one, chosen by path pattern or by class."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import keras

from kerasmp.errors import ArgumentTypeError, PolicyError, did_you_mean
from kerasmp.policy.spec import Spec

SAFE = "safe"
"""The name of the built-in rule set, which is defined in `kerasmp.policy.safe`."""

Key: TypeAlias = str | type
ReadPolicy: TypeAlias = Callable[[Any], tuple[Spec, object]]

_EXPECTED = (
    f'a dict from layer path patterns or layer classes to policies, "{SAFE}", or a list of both'
)
_EXPECTED_PATTERN = "a pattern for re.fullmatch on the layer's path"
_EXPECTED_CLASS = "a layer of keras.layers, or a registered class"


class Rules(NamedTuple):
    """Rules, checked.

    Args:
        safe: Whether the built-in rule set applies where no exception does.
        exceptions: Pairs of a pattern or class and its dtypes, patterns first.
    """

    safe: bool = False
    exceptions: tuple[tuple[Key, Spec], ...] = ()

    def __bool__(self) -> bool:
        return self.safe or bool(self.exceptions)


def normalise(rules: object, read_policy: ReadPolicy) -> Rules:
    """Check rules and sort them, so that equal rules compare equal.

    Args:
        rules: None, a mapping, the name of the built-in rule set, a list or tuple of these, or
            rules that are normalised already.
        read_policy: Returns the dtypes and the rules of a value of the mapping.

    Raises:
        ArgumentTypeError: If `rules` is none of these, or a key is neither text nor a layer class.
        PolicyError: If the rule set is unknown, a pattern is not a regular expression, the policy
            of a rule has `output` or rules, or two mappings disagree on a key.

    Example:
    >>> normalise(["safe", {"head/.*": "float32"}], lambda name: (Spec(name, name, name), None))
    Rules(safe=True, exceptions=(('head/.*', Spec(name='float32', ...)),))
    """
    safe = False
    exceptions: dict[Key, Spec] = {}
    for part in _flatten(rules):
        if isinstance(part, str):
            _check_name(part)
            safe = True
        elif isinstance(part, Mapping):
            for key, policy in part.items():
                spec = _read_rule(key, policy, read_policy)
                if exceptions.setdefault(key, spec) != spec:
                    raise PolicyError(
                        "Two rules give different policies for the same key.",
                        received=f"{key!r}: {str(exceptions[key])!r} and {key!r}: {str(spec)!r}",
                        expected="one policy for each key",
                        fix="Remove one of them.",
                    )
        elif part is not None:
            raise ArgumentTypeError(
                "rules is not a mapping.",
                received=repr(part),
                expected=_EXPECTED,
                fix='For example rules={"head/.*": "float32"}.',
            )
    return Rules(safe, tuple(sorted(exceptions.items(), key=_sort_key)))


def to_config(rules: Rules) -> list[dict[str, str]]:
    """Return rules as plain data.

    Args:
        rules: Normalised rules.

    Returns:
        One dict for each rule: "path" or "layer", and "policy"; for the built-in set, "set".

    Raises:
        PolicyError: If a class is neither one of Keras's layers nor registered with Keras, so that
            the rules could not be read back.
    """
    config = [{"set": SAFE}] if rules.safe else []
    for key, spec in rules.exceptions:
        match = {"path": key} if isinstance(key, str) else {"layer": _class_name(key)}
        config.append({**match, "policy": str(spec)})
    return config


def from_config(config: Iterable[Mapping[str, str]]) -> list[str | dict[Key, str]]:
    """Return the rules that `to_config` described.

    Args:
        config: One mapping for each rule.

    Returns:
        Rules as a user would pass them.

    Raises:
        PolicyError: If `config` is not such a list, or a layer class is not known in this process.
    """
    kinds = ({"set"}, {"path", "policy"}, {"layer", "policy"})
    if not isinstance(config, list | tuple) or not all(
        isinstance(rule, Mapping)
        and {*rule} in kinds
        and all(isinstance(value, str) for value in rule.values())
        for rule in config
    ):
        raise PolicyError(
            "The configuration of a policy has invalid rules.",
            received=repr(config),
            expected='a list of dicts with "set", or with "path" or "layer" and "policy", of text',
            fix="Policy.get_config() returns valid ones.",
        )
    return [_from_entry(rule) for rule in config]


def _from_entry(rule: Mapping[str, str]) -> str | dict[Key, str]:
    if "set" in rule:
        return rule["set"]
    key: Key = rule["path"] if "path" in rule else _find_class(rule["layer"])
    return {key: rule["policy"]}


def _flatten(rules: object) -> Iterator[object]:
    if isinstance(rules, Rules):
        yield from [SAFE] if rules.safe else []
        yield {key: str(spec) for key, spec in rules.exceptions}
    elif isinstance(rules, list | tuple):
        for each in rules:
            yield from _flatten(each)
    else:
        yield rules


def _check_name(name: str) -> None:
    if name != SAFE:
        raise PolicyError(
            "Unknown rule set.",
            received=repr(name),
            expected=_EXPECTED,
            fix=did_you_mean(name, [SAFE]) or f'rules="{SAFE}" is the only one.',
        )


def _read_rule(key: object, policy: object, read_policy: ReadPolicy) -> Spec:
    _check_key(key)
    spec, rules = read_policy(policy)
    if spec.output is not None or rules:
        raise PolicyError(
            "The policy of a rule cannot have an output or rules of its own.",
            received=f"{key!r}: {policy!r}",
            expected="variable and compute dtypes only",
            fix="Give output and rules to the policy of the whole model.",
        )
    return spec


def _check_key(key: object) -> None:
    if isinstance(key, type) and issubclass(key, keras.Layer):
        return
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
            expected=_EXPECTED_PATTERN,
            fix='".*" matches every layer.',
        )
    try:
        re.compile(key)
    except re.error as error:
        raise PolicyError(
            "The layer path pattern of a rule is not a regular expression.",
            received=repr(key),
            expected=_EXPECTED_PATTERN,
            fix=f"Python says: {error}.",
        ) from error


def _sort_key(rule: tuple[Key, Spec]) -> tuple[bool, str]:
    key, _ = rule
    if isinstance(key, str):
        return False, key
    return True, f"{key.__module__}.{key.__qualname__}"


def _class_name(cls: type) -> str:
    name = str(keras.saving.get_registered_name(cls))
    if _lookup(name) is not cls:
        raise PolicyError(
            "A layer class in the rules cannot be found by its name.",
            received=repr(cls),
            expected=_EXPECTED_CLASS,
            fix="Put @keras.saving.register_keras_serializable() above the class.",
        )
    return name


def _find_class(name: str) -> type:
    found = _lookup(name)
    if not isinstance(found, type):
        raise PolicyError(
            "A layer class in the rules is not known in this process.",
            received=repr(name),
            expected=_EXPECTED_CLASS,
            fix="Import the module that registers the class before loading.",
        )
    return found


def _lookup(name: str) -> Any:
    # Never import a module that a file names: that would run untrusted code.
    return keras.saving.get_registered_object(name) or getattr(keras.layers, name, None)
