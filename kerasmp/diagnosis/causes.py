"""Says from numbers why a training step goes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kerasmp.diagnosis.result import Underflow, underflow
from kerasmp.errors import first_line
from kerasmp.policy.spec import HALVES
from kerasmp.probe.arrays import nonfinite
from kerasmp.probe.compare import EPSILON, LARGEST
from kerasmp.probe.finding import Finding, Severity
from kerasmp.probe.findings import NO_REMEDY, count
from kerasmp.probe.magnitudes import Magnitudes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kerasmp.probe.tape import TensorSummary
    from kerasmp.probe.values import Trouble

# A step of the optimizer that makes the loss so many times larger diverges.
_DIVERGES = 1000.0
# So many remedies are worth reading at a time.
_ADVICE = 3


def weight_findings(weights: Iterable[tuple[str, str, Any]]) -> Iterator[Finding]:
    """Yield findings for weights that are not finite, or not in half precision.

    Args:
        weights: For each, its path, the compute dtype of its layer, and its value as an array.
    """
    for path, dtype, array in weights:
        lost = nonfinite(array)
        largest = float(np.max(np.abs(array), initial=0.0, where=np.isfinite(array)))
        if lost:
            yield Finding(
                "error",
                path,
                "nonfinite-weights",
                f"{count(lost, array.size)} are inf or NaN, in float32. The batch is not the "
                "cause.",
                "Load weights that were saved before that, and lower the learning rate.",
            )
        elif dtype in HALVES and largest > LARGEST[dtype]:
            yield Finding(
                "error",
                path,
                "weight-range",
                f"Its largest weight is {largest:g}. The largest number in {dtype} is "
                f"{LARGEST[dtype]:g}, so it becomes inf.",
                f"Check where the weights come from, or compute its layer in float32: the rule "
                f'{{"{path.rpartition("/")[0]}": "float32"}}.',
            )


def float32_finding(tensors: Sequence[TensorSummary]) -> Finding | None:
    """Return a finding for the first place with inf or NaN in float32, if gradients have them, too.

    Args:
        tensors: What tensors look like, in the order in which they were computed.
    """
    if not any(x.nonfinite_in_float32 for x in tensors if x.direction == "weights"):
        return None
    first = next(x for x in tensors if x.nonfinite_in_float32)
    what = "returns" if first.direction == "forward" else "has gradients that are"
    return Finding(
        "error",
        first.place,
        "nonfinite-float32",
        f"It {what} inf or NaN in float32, too ({first.nonfinite_in_float32:.2g} of the values), "
        "and is the first to do so. Half precision is not the cause.",
        "Keep it away from where it is not defined: a division by 0, the logarithm or root of 0, "
        "or an exponential of a large number.",
    )


def diverging(before: float, after: float, optimizer: str) -> Finding | None:
    """Return a finding if one step of an optimizer makes the loss many times larger, in float32.

    Args:
        before: The loss of the batch.
        after: Its loss after one step on it.
        optimizer: The name of the optimizer.
    """
    if not np.isfinite(before) or (np.isfinite(after) and after <= _DIVERGES * abs(before)):
        return None
    return Finding(
        "error",
        optimizer,
        "diverging",
        f"One step in float32 takes the loss of this batch from {before:.3g} to {after:.3g}. "
        "Half precision is not the cause.",
        "Lower the learning rate, warm it up, or clip the gradients with global_clipnorm.",
    )


def lost_mask(place: str) -> Finding:
    """Return the finding for a layer that does not hand on the mask that it is given.

    Args:
        place: Its place.
    """
    return Finding(
        "warning",
        place,
        "lost-mask",
        "Its inputs have a mask, and its outputs have none. Half precision is not the cause.",
        "If later layers or the loss need the mask, set supports_masking = True in the layer, or "
        "return a mask from its compute_mask.",
    )


def gradient_finding(
    trouble: Trouble, tensors: Sequence[TensorSummary], scales: Underflow, least: float
) -> Finding:
    """Return the finding for a step that returns wrong gradients.

    Args:
        trouble: What the walk backwards saw.
        tensors: What tensors look like.
        scales: What float16 does to gradients, by the loss scale.
        least: How far the scale may fall by itself.
    """
    numbers, half = trouble.numbers, trouble.half
    remedy = " Or: ".join(trouble.remedies) or NO_REMEDY
    shows = f' It shows in "{trouble.until}".' if trouble.until else ""
    severity: Severity = "error"
    if trouble.kind == "fails":
        rule = "cannot-compute"
        reason = f"Its gradient raises {first_line(numbers)} in {half}. In float32 it runs."
    elif trouble.kind == "underflow":
        severity, rule = "warning", "gradient-underflow"
        reason = (
            f"In {half}, at a loss scale of {scales.loss_scale:g}, {numbers.flushed} of "
            f"{numbers.nonzero} gradients are 0 that are not 0 in float32."
        )
        remedy = _larger_scale(trouble, tensors, scales) or remedy
    else:
        worst, wide = numbers.worst
        reason = f"In {half} it has a gradient of {worst:g}, in float32 {wide:g}"
        if trouble.kind == "error":
            severity, rule = "warning", "gradient-inaccurate"
            explained = EPSILON[half]
            reason += f": an error of {numbers.error:.2g}, where rounding explains {explained:.2g}."
        else:
            rule = "gradient-not-finite"
            lost = numbers.saturated + numbers.nonfinite
            reason += f", at a loss scale of {scales.loss_scale:g} ({count(lost, numbers.size)})."
        limit = scales.largest_scale
        if trouble.kind == "overflow" and limit is not None:
            falls = max(least, 1.0) <= limit < scales.loss_scale
            severity = "hint" if falls else "error"
            remedy = (
                "They overflow even without a scale: take means where the loss takes sums, or "
                "scale the targets."
                if limit < 1
                else f"Use a loss scale of {limit:g} at most."
                + (" A dynamic scale comes down to it by itself." if falls else "")
            )
    return Finding(severity, trouble.place, rule, reason + shows, remedy)


def _larger_scale(
    trouble: Trouble, tensors: Sequence[TensorSummary], scales: Underflow
) -> str | None:
    """Return the remedy of a larger scale for gradients that vanish, or None."""
    places = {trouble.place, trouble.until}
    here = [x.magnitudes for x in tensors if x.place in places and x.direction != "forward"]
    wanted = underflow(sum(here, Magnitudes()), scales.loss_scale).scale
    if wanted is None or scales.largest_scale is None or wanted > scales.largest_scale:
        return None
    return (
        f"Use a loss scale of {wanted:g} at least; up to {scales.largest_scale:g}, none overflows."
    )


def advice(findings: Sequence[Finding], scales: Underflow) -> tuple[str, ...]:
    """Return what to do, the most important first.

    Args:
        findings: What is wrong, the worst first.
        scales: What float16 does to gradients, by the loss scale.
    """
    serious = [each for each in findings if each.severity != "hint"]
    blameless = {
        "nonfinite-data",
        "nonfinite-weights",
        "nonfinite-float32",
        "diverging",
        "lost-mask",
    }
    found = []
    if serious and all(each.rule in blameless for each in serious):
        found.append("float32 has this problem, too: half precision is not the cause.")
    found += [f"{each.place}: {each.remedy}" for each in serious[:_ADVICE]]
    if scales.scale is not None and scales.largest_scale is not None:
        if scales.scale > scales.largest_scale:
            found.append(
                f"No loss scale holds all gradients: {scales.scale:g} is needed so that fewer than "
                f"1 in 1000 vanish, and above {scales.largest_scale:g} some overflow. bfloat16 has "
                "the range of float32."
            )
        elif not scales.scale <= scales.loss_scale <= scales.largest_scale:
            found.append(
                f"Loss scales from {scales.scale:g} to {scales.largest_scale:g} hold the gradients "
                f"of this batch; it is {scales.loss_scale:g}."
            )
    return tuple(found)
