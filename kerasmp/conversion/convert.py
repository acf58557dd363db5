"""A built or loaded model into another policy, and back."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.errors import ArgumentTypeError, LossScaleWarning, PolicyError, PolicyWarning
from kerasmp.policy.apply import apply, forget_compiled_steps, put_back
from kerasmp.policy.assign import Assignment, assign
from kerasmp.policy.policy import Policy, PolicyLike, RulesLike
from kerasmp.policy.safe import is_ours

if TYPE_CHECKING:
    from collections.abc import Iterable


class ConversionReport:
    """What `convert` did, or would do, to each layer.

    Args:
        model: The model.
        policy: The policy with its rules.
        rows: One row for the model and for each layer in it.
        changed: The layers that were changed, with the policies that they had; None if nothing was
            to be changed.
        output_dtype: The dtype that a model of ours had for its outputs.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy,
        rows: Iterable[Assignment],
        changed: Iterable[tuple[Any, keras.DTypePolicy]] | None = None,
        output_dtype: str | None = None,
    ) -> None:
        self.model = model
        self.policy = policy
        self.rows = tuple(rows)
        self._changed = None if changed is None else tuple(changed)
        self._output_dtype = output_dtype

    def restore(self) -> None:
        """Give every layer the policy that it had; once, and after a dry run, nothing happens."""
        changed, self._changed = self._changed, None
        if changed is not None:
            put_back(self.model, changed)
            _set_output_dtype(self.model, self._output_dtype)
            forget_compiled_steps(self.model)

    def __str__(self) -> str:
        """Return one line that counts, and one for each layer that does not follow the policy."""
        others = [row for row in self.rows[1:] if row.after != self.policy.name]
        lines = [f"{row.path}: {row.after}, {row.reason}" for row in others]
        follow = len(self.rows) - 1 - len(others)
        count = f"{follow} layers {self.policy.name}, {len(others)} otherwise"
        return "\n".join([f"{self.model.name}: {count}", *lines])


def convert(
    model: Any,
    policy: PolicyLike = "mixed_float16",
    *,
    rules: RulesLike = "safe",
    dry_run: bool = False,
) -> ConversionReport:
    """Let a built or loaded model compute under another policy, in place.

    Weights are kept as they are, to the last bit. Symbolic tensors such as `model.outputs` say the
    new dtypes, and steps that are compiled already are compiled anew. Another model that shares
    layers with this one sees them in the new dtypes, but keeps steps that it has compiled.

    Args:
        model: A Keras model, stock or ours, of any kind, that has been built.
        policy: A policy, or anything that `Policy` accepts, default "mixed_float16".
        rules: Rules as for `Policy`, beside those of `policy`; default "safe". None adds none.
        dry_run: Only say what would be done.

    Returns:
        A report with one row for each layer, and `restore()`.

    Raises:
        PolicyError: If the policy does not exist, two rules disagree, the model is not built, or
            weights would have to change their dtype. Nothing has changed then.
        ArgumentTypeError: If `model` is no Keras model.

    Warns:
        LossScaleWarning: If a stock model that is compiled would train in float16 without scaling.
        PolicyWarning: If the policy has an `output`, which a stock model cannot follow.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    >>> report = convert(model, "mixed_float16")
    >>> [layer.compute_dtype for layer in model.layers]
    ['float16', 'float32']
    >>> report.restore()
    >>> [layer.compute_dtype for layer in model.layers]
    ['float32', 'float32']
    """
    if not isinstance(model, keras.Layer):
        raise ArgumentTypeError(
            "Only a Keras model can be converted.",
            received=f"{model!r}, a {type(model).__name__}",
            expected="a keras.Model",
            fix="Pass the model, and the policy after it.",
        )
    own = Policy(policy)
    checked = Policy(own, rules=[rules, own.rules, "safe" if own.safe else None])
    if not model.built:
        raise PolicyError(
            "The model is not built, and parts that come later would not follow.",
            received=f'the model "{model.name}"',
            expected="a built model",
            fix="Call it on a batch first, or build it under kerasmp.policy_scope(policy).",
        )
    rows = assign(model, checked)
    if dry_run:
        return ConversionReport(model, checked, rows)
    _warn(model, checked, rows)
    changed = apply(model, rows)
    output_before = _set_output_dtype(model, checked.output_dtype)
    forget_compiled_steps(model)
    return ConversionReport(model, checked, rows, changed, output_before)


def _set_output_dtype(model: Any, dtype: str | None) -> str | None:
    """Set the dtype to which a model of ours casts its outputs; return the one before."""
    if not is_ours(model):
        return None
    before: str | None = model._output_dtype  # noqa: SLF001 - ours; its room is above this one
    model._output_dtype = dtype  # noqa: SLF001
    return before


def _warn(model: Any, policy: Policy, rows: list[Assignment]) -> None:
    """Say what will be missing; before anything changes, as a warning may be an error."""
    if is_ours(model):
        return
    if policy.output_dtype is not None:
        warnings.warn(
            f"The model will not follow output={policy.output_dtype}: only kerasmp.Model does. "
            'Under the rule set "safe" stock layers that make outputs compute in float32.',
            PolicyWarning,
            stacklevel=3,
        )
    optimizer = getattr(model, "optimizer", None)
    float16 = any(keras.dtype_policies.get(row.after).compute_dtype == "float16" for row in rows)
    if (
        float16
        and optimizer is not None
        and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    ):
        warnings.warn(
            f'The model "{model.name}" is compiled with an optimizer that does not scale the loss, '
            "which float16 needs. Compile it again, with "
            "kerasmp.LossScaleOptimizer(model.optimizer).",
            LossScaleWarning,
            stacklevel=3,
        )
