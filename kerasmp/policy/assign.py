"""Which layer follows which policy, and why: one pure function decides."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from kerasmp.backend.keras_graph import policy_of
from kerasmp.errors import PolicyError
from kerasmp.policy.locations import Location, locations
from kerasmp.policy.safe import ATTENTION, is_kerasmp_layer, safe_rule
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kerasmp.policy.policy import Policy

_SUGGESTIONS = 3


class Assignment(NamedTuple):
    """The policy that one layer has, and the one that it will have.

    Args:
        layer: The layer.
        path: Its path.
        policy: The Keras policy that it has now. A user-defined one may have any name.
        after: The name of the Keras policy that it will have.
        reason: The rule that decides this; "the policy" if there is none.
    """

    layer: Any
    path: str
    policy: keras.DTypePolicy
    after: str
    reason: str

    @property
    def before(self) -> str:
        """The name of the Keras policy that the layer has now."""
        return str(self.policy.name)

    @property
    def policy_after(self) -> keras.DTypePolicy:
        """The Keras policy that the layer will have: the present object if the name is the same.

        Raises:
            PolicyError: If the name is another one, and unknown to Keras.
        """
        if self.after == self.before:
            return self.policy
        try:
            return keras.dtype_policies.get(self.after)
        except (TypeError, ValueError) as error:
            raise PolicyError(
                "A user-defined policy cannot be created from its name.",
                received=f'"{self.path}" with {self.before!r}',
                expected=f"{self.after!r}, as {self.reason} says",
                fix="Set that policy in the constructor of the model or of the layer.",
            ) from error


class _Decision(NamedTuple):
    after: str
    reason: str


class _Inherited(NamedTuple):
    """What a layer passes on to the layers inside it."""

    by_user: _Decision | None = None
    by_safe: _Decision | None = None
    kept: bool = False  # inside `WithDtype`
    is_protected: bool = False  # inside kerasmp's attention, which protects its parts


def assign(
    model: Any, policy: Policy, located: Iterable[tuple[Any, Location]] | None = None
) -> list[Assignment]:
    """Decide which policy each layer of a model gets, and change nothing.

    The user's rules come first: an exact path, then patterns and classes, which must agree. A class
    rule also covers the layers inside, up to where another rule applies. Next come layers that keep
    their policy (quantized, not of a floating dtype, in a `kerasmp.layers.WithDtype`), then the
    rule set "safe" if the policy has it and computes in half precision, then the policy itself.

    Args:
        model: A model. Layers that it creates when it is built are found only if it is built.
        policy: The policy.
        located: What `locations` returns for the model, if that is known already.

    Returns:
        One row for the model and for each layer in it. A holder comes before the layers that it
        contains.

    Raises:
        PolicyError: If two of the user's rules disagree on a layer.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.Softmax()])
    >>> [row.after for row in assign(model, Policy("mixed_float16", rules="safe"))[1:]]
    ['mixed_float16', 'float32']
    """
    rows = []
    rules = policy.rules
    inherited: dict[int, _Inherited] = {}
    for layer, location in locations(model) if located is None else located:
        if isinstance(layer, keras.layers.InputLayer):
            continue  # it has the dtype of the data
        above = inherited.get(id(location.holder), _Inherited())
        own, covers_parts = _by_user(layer, location, rules)
        kept = _why_kept(layer, above)
        safe, safe_covers_parts = _by_safe(layer, location, policy, above)
        decision = own or above.by_user or kept or safe or above.by_safe
        after, reason = decision or (policy.name, "the policy")
        rows.append(Assignment(layer, location.path, policy_of(layer), after, reason))
        inherited[id(layer)] = _Inherited(
            by_user=own if covers_parts else above.by_user,
            by_safe=safe if safe_covers_parts else above.by_safe,
            kept=above.kept or getattr(layer, "keeps_its_dtype", False),
            is_protected=above.is_protected
            or (is_kerasmp_layer(layer) and isinstance(layer, ATTENTION)),
        )
    return rows


def check_patterns(rows: Iterable[Assignment], policy: Policy) -> None:
    """Raise an error if a pattern in the rules does not match the path of any layer.

    Args:
        rows: What `assign` returned.
        policy: The policy with its rules.

    Raises:
        PolicyError: In that case. It names the most similar paths.
    """
    paths = [row.path for row in rows]
    for pattern in (key for key in policy.rules if isinstance(key, str)):
        if not any(pattern == path or re.fullmatch(pattern, path) for path in paths):
            containing = [path for path in paths if re.search(pattern, path)]
            similar = difflib.get_close_matches(pattern, paths, n=_SUGGESTIONS, cutoff=0.4)
            near = list(dict.fromkeys([*containing, *similar]))[:_SUGGESTIONS]
            raise PolicyError(
                "The pattern of a rule does not match any layer path in the model.",
                received=repr(pattern),
                expected="a regular expression that matches a layer's whole path"
                + (f", such as {', '.join(map(repr, near))}" if near else ""),
                fix="print(convert(model, dry_run=True)) shows all paths.",
            )


def unmatched_classes(rows: Iterable[Assignment], policy: Policy) -> list[str]:
    """Return the names of the classes in the rules of which the model has no layer.

    Args:
        rows: What `assign` returned.
        policy: The policy with its rules.
    """
    layers = [row.layer for row in rows]
    classes = [key for key in policy.rules if isinstance(key, type)]
    return [cls.__name__ for cls in classes if not any(isinstance(layer, cls) for layer in layers)]


def _by_user(
    layer: Any, location: Location, rules: Mapping[str | type, Policy]
) -> tuple[_Decision | None, bool]:
    """Return what the user's rules decide for a layer, and whether that covers its parts."""
    if location.path in rules:
        return _Decision(rules[location.path].name, f'your rule "{location.path}"'), False
    answers = {}
    covers_parts = False
    for key, answer in rules.items():
        if isinstance(key, str) and re.fullmatch(key, location.path):
            answers[f'your rule "{key}"'] = answer
        elif isinstance(key, type) and isinstance(layer, key):
            answers[f"your rule for the class {key.__name__}"] = answer
            covers_parts = True
    if len({answer.name for answer in answers.values()}) > 1:
        raise PolicyError(
            f'Two rules give different policies for the layer "{location.path}".',
            received=" and ".join(f"{rule}: {str(each)!r}" for rule, each in answers.items()),
            expected="rules that agree on each layer",
            fix="Make one of them narrower, or name the layer's exact path, which comes first.",
        )
    decisions = [_Decision(answer.name, rule) for rule, answer in answers.items()]
    return (decisions[0] if decisions else None), covers_parts


def _why_kept(layer: Any, above: _Inherited) -> _Decision | None:
    """Return the decision that a layer keeps its policy, or None."""
    policy = policy_of(layer)
    name = str(policy.name)  # None once Keras has saved a map without a default
    if above.kept or getattr(layer, "keeps_its_dtype", False):
        return _Decision(name, "kept: WithDtype sets its dtype")
    if policy.quantization_mode is not None:
        return _Decision(name, "kept: it is quantized")
    if not keras.backend.is_float_dtype(layer.compute_dtype):
        return _Decision(name, f"kept: it computes in {layer.compute_dtype}")
    return None


def _by_safe(
    layer: Any, location: Location, policy: Policy, above: _Inherited
) -> tuple[_Decision | None, bool]:
    """Return what the rule set "safe" decides for a layer, and whether that covers its parts."""
    if not (policy.safe and policy.compute_dtype in HALVES):
        return None, False
    location = location._replace(half=policy.compute_dtype)
    rule = safe_rule(layer, location, is_protected=above.is_protected)
    if rule is None:
        return None, False
    hazard = "hazards" if "," in rule.hazard else "hazard"
    reason = f'"safe", {rule.name}: {rule.reason} ({hazard} {rule.hazard})'
    return _Decision("float32", reason), rule.covers_parts
