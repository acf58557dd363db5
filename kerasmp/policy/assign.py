"""Which layer follows which policy, and why: one pure function decides."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from kerasmp.backend.keras_graph import policy_of
from kerasmp.errors import PolicyError
from kerasmp.policy.locations import Location, locations
from kerasmp.policy.safe import ATTENTION, is_kerasmp_layer, safe_rule
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kerasmp.policy.policy import Policy

_WITHOUT_RULE = "the policy"


class Assignment(NamedTuple):
    """What one layer is to do.

    Args:
        layer: The layer.
        path: Its path.
        policy: The Keras policy that it follows now. One of the user's own may have any name.
        after: The name of the Keras policy that it is to follow.
        reason: The rule that says so; "the policy" where there is none.
    """

    layer: Any
    path: str
    policy: keras.DTypePolicy
    after: str
    reason: str

    @property
    def before(self) -> str:
        """The name of the Keras policy that it follows now."""
        return str(self.policy.name)

    @property
    def policy_after(self) -> keras.DTypePolicy:
        """The Keras policy that it is to follow: the very one of now, if it has that name.

        Raises:
            PolicyError: If it has not, and Keras can make none of the name.
        """
        if self.after == self.before:
            return self.policy
        try:
            return keras.dtype_policies.get(self.after)
        except (TypeError, ValueError) as error:
            raise PolicyError(
                "A policy of the user's own cannot be made of its name.",
                received=f'"{self.path}" with {self.before!r}',
                expected=f"{self.after!r}, as {self.reason} says",
                fix="Let the constructor of the model, or of the layer, set that policy.",
            ) from error


class _Claim(NamedTuple):
    after: str
    reason: str


class _Inherited(NamedTuple):
    """What the layers inside of a layer get from it."""

    by_user: _Claim | None = None
    by_safe: _Claim | None = None
    kept: bool = False
    looked_after: bool = False  # by attention of ours


def assign(
    model: Any, policy: Policy, found: Iterable[tuple[Any, Location]] | None = None
) -> list[Assignment]:
    """Decide which policy each layer of a model is to follow. Nothing is changed.

    The user's rules come first: an exact path, then patterns and classes, which must agree. A class
    rule also covers the layers inside, up to where another rule claims one. Then come layers that
    keep what they have (quantised, not of a floating dtype, `kerasmp.layers.WithDtype`), then the
    rule set "safe" where the policy has it and computes in half precision, then the policy itself.

    Args:
        model: A model. What is not built yet has no parts that could be found.
        policy: The policy.
        found: What `locations` yields of it, where that is known.

    Returns:
        One row for the model and for each layer in it, holders before what they hold.

    Raises:
        PolicyError: If two of the user's rules claim one layer with different answers.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.Softmax()])
    >>> [row.after for row in assign(model, Policy("mixed_float16", rules="safe"))[1:]]
    ['mixed_float16', 'float32']
    """
    rows = []
    inherited: dict[int, _Inherited] = {}
    for layer, location in locations(model) if found is None else found:
        if isinstance(layer, keras.layers.InputLayer):
            continue  # its dtype is the data's
        above = inherited.get(id(location.holder), _Inherited())
        present = policy_of(layer)
        claim, passed_on = _decide(layer, location, policy, above, str(present.name))
        inherited[id(layer)] = passed_on
        rows.append(Assignment(layer, location.path, present, *claim))
    return rows


def _decide(
    layer: Any, location: Location, policy: Policy, above: _Inherited, before: str
) -> tuple[_Claim, _Inherited]:
    own, covers_inside = _by_user(layer, location, policy)
    by_user = own if own is not None and covers_inside else above.by_user
    why_kept = _why_kept(layer, above)
    looked_after = above.looked_after or (is_kerasmp_layer(layer) and isinstance(layer, ATTENTION))
    safe, by_safe = None, above.by_safe
    if policy.safe and policy.compute_dtype in HALVES:
        location = location._replace(half=policy.compute_dtype)
        rule = safe_rule(layer, location, looked_after=above.looked_after)
        if rule is not None:
            hazard = "hazards" if "," in rule.hazard else "hazard"
            safe = _Claim("float32", f'"safe", {rule.name}: {rule.reason} ({hazard} {rule.hazard})')
            by_safe = safe if rule.inside else by_safe
    claim = (
        own
        or above.by_user
        or (_Claim(before, why_kept) if why_kept else None)
        or safe
        or above.by_safe
        or _Claim(policy.name, _WITHOUT_RULE)
    )
    kept = bool(why_kept) and (above.kept or getattr(layer, "keeps_its_dtype", False))
    return claim, _Inherited(by_user, by_safe, kept, looked_after)


def _by_user(layer: Any, location: Location, policy: Policy) -> tuple[_Claim | None, bool]:
    """Return what the user's rules say of a layer, and whether that holds for what is inside."""
    if location.path in policy.rules:
        return _Claim(policy.rules[location.path].name, f'your rule "{location.path}"'), False
    claims = {}
    for key, answer in policy.rules.items():
        if isinstance(key, str) and re.fullmatch(key, location.path):
            claims[f'your rule "{key}"'] = answer
        elif isinstance(key, type) and isinstance(layer, key):
            claims[f"your rule for the class {key.__name__}"] = answer
    if not claims:
        return None, False
    if len({answer.name for answer in claims.values()}) > 1:
        raise PolicyError(
            f'Two rules claim the layer "{location.path}" with different answers.',
            received=" and ".join(f"{name}: {str(p)!r}" for name, p in claims.items()),
            expected="rules that agree on each layer",
            fix="Make one of them narrower, or name the layer's exact path, which comes first.",
        )
    name, answer = next(iter(claims.items()))
    return _Claim(answer.name, name), any("the class" in each for each in claims)


def _why_kept(layer: Any, above: _Inherited) -> str:
    if above.kept or getattr(layer, "keeps_its_dtype", False):
        return "kept: WithDtype says it"
    if policy_of(layer).quantization_mode is not None:
        return "kept: it is quantised"
    if not keras.backend.is_float_dtype(layer.compute_dtype):
        return f"kept: it computes in {layer.compute_dtype}"
    return ""
