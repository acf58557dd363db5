"""Finds layers and variables whose dtype harms training or differs from the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend import current
from kerasmp.backend.keras_graph import calls, children, graph_of
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.policy import Policy
from kerasmp.policy.assign import assign
from kerasmp.policy.locations import locations, paths
from kerasmp.policy.safe import (
    ATTENTION,
    PROBABILITIES,
    UNSAFE_ACTIVATIONS,
    WITH_ACTIVATION,
    activation_name,
    dropped_share,
    drops_wrong_share,
    is_kerasmp_layer,
    loses_mask_value,
)
from kerasmp.policy.spec import HALVES
from kerasmp.probe.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

# Safe rules for the layers that attention contains. Together they are one finding.
_PARTS_OF_ATTENTION = ("scores", "softmax")
# Each dtype represents all integers up to this one.
LARGEST_EXACT_INTEGER = {"float16": 2**11, "bfloat16": 2**8}
# Safe rules whose layers still train, with a lower loss scale or less accuracy in the tails.
_HINTS = ("activation", "probabilities")
# Safe rules that have more specific findings.
_OTHER_FINDINGS = {
    "float16": ("head", "mask-value", "dropout"),
    "bfloat16": ("mask-value", "dropout"),
}
# Safe rules whose hazards bfloat16 shares: errors, sums of many small terms, few random numbers and
# rounded data. Elsewhere it is only less accurate, since it has the range of float32.
_ALSO_IN_BFLOAT16 = (
    "kernel",
    "spectrum",
    "interpolation",
    "resampling",
    "recurrent",
    "embedding",
    "noise",
    "masked-pooling",
    "data",
)


def findings(model: Any, dtypes: dict[int, str]) -> list[Finding]:
    """Return the layers and variables whose dtype harms training or differs from the policy.

    Args:
        model: A Keras model.
        dtypes: The dtype of each symbolic tensor, by the tensor's id.
    """
    return [
        *_unsafe_layers(model),
        *_unsafe_activations(model),
        *_mask_values(model, dtypes),
        *_dropout_rates(model),
        *_half_precision_weights(model),
        *_vanishing_epsilons(model),
        *_float_ids(model, dtypes),
        *_unused_policy(model),
        *_wider_outputs(model, dtypes),
    ]


def is_custom(layer: Any) -> bool:
    """Return whether the class of a layer is user-defined. Models do not count."""
    stock = type(layer).__module__.partition(".")[0] == "keras"
    return not (stock or is_kerasmp_layer(layer) or isinstance(layer, keras.Model))


def _unsafe_layers(model: Any) -> Iterator[Finding]:
    located = locations(model)
    location_of = {id(layer): location for layer, location in located}
    for half in HALVES:
        reported = set()
        for row in assign(model, Policy(f"mixed_{half}", rules="safe"), located):
            rule, colon, reason = row.reason.removeprefix('"safe", ').partition(": ")
            if row.layer.compute_dtype != half or row.after != "float32" or not colon:
                continue
            if rule in _OTHER_FINDINGS[half]:
                continue
            place, kind = row.path, rule
            holder = location_of[id(row.layer)].holder
            if isinstance(holder, ATTENTION) and rule in _PARTS_OF_ATTENTION:
                place, kind = location_of[id(holder)].path, "scores"
            if (place, kind) in reported:
                continue
            reported.add((place, kind))
            only_less_accurate = half == "bfloat16" and rule not in _ALSO_IN_BFLOAT16
            if only_less_accurate:  # the words of the rules are about float16
                hazards = reason[reason.rindex("(") :]
                reason = f'its results are less accurate, see the rule "{kind}" {hazards}'
            yield Finding(
                "hint" if only_less_accurate or rule in _HINTS else "warning",
                place,
                "unsafe-layer",
                f"In {half}, {reason}.",
                'Convert the model with kerasmp.convert, build it with rules="safe", or use the '
                "layer from kerasmp.layers.",
            )


def _unsafe_activations(model: Any) -> Iterator[Finding]:
    for layer, path in paths(model):
        name = activation_name(layer)
        if (
            isinstance(layer, WITH_ACTIVATION)
            and layer.compute_dtype == "float16"
            and name in UNSAFE_ACTIVATIONS
            and name not in PROBABILITIES  # the rule "probabilities" finds these
        ):
            yield Finding(
                "hint",
                path,
                "unsafe-activation",
                f'In float16, the gradient of "{name}" overflows or is computed from rounded '
                "outputs.",
                f"Use activation=kerasmp.ops.{name}.",
            )


def _mask_values(model: Any, dtypes: dict[int, str]) -> Iterator[Finding]:
    """Yield each stock Masking whose inputs were rounded, so that none equals the mask value."""
    received: dict[int, set[str]] = {}  # the input dtypes of each operation
    for call in _all_calls(model):
        input_dtypes = {dtypes.get(id(each), each.dtype) for each in call.inputs}
        received.setdefault(id(call.operation), set()).update(input_dtypes)
    casts: dict[int, set[str]] = {id(None): set()}  # the dtypes to which a layer's holders cast
    for layer, location in locations(model):
        cast_to = casts[id(location.holder)]
        if layer.autocast and graph_of(layer) is None:  # a model with a graph casts no inputs
            cast_to = cast_to | {str(layer.compute_dtype)}
        casts[id(layer)] = cast_to
        if not isinstance(layer, keras.layers.Masking) or is_kerasmp_layer(layer):
            continue
        halves = sorted(cast_to | received.get(id(layer), set()))
        half = next((h for h in halves if loses_mask_value(layer.mask_value, h)), None)
        if half is not None:
            yield Finding(
                "error",
                location.path,
                "mask-value",
                f"No step is masked: {half} inputs cannot hold the mask value {layer.mask_value}.",
                "Use kerasmp.layers.Masking, or convert the model with safe_layers=True.",
            )


def _dropout_rates(model: Any) -> Iterator[Finding]:
    for layer, location in locations(model):
        half = str(layer.compute_dtype)
        in_safe_attention = is_kerasmp_layer(location.holder) and isinstance(
            location.holder, ATTENTION
        )
        if half not in HALVES or is_kerasmp_layer(layer) or in_safe_attention:
            continue
        for rate in _rates(layer):
            if drops_wrong_share(rate, half):
                yield Finding(
                    "warning",
                    location.path,
                    "dropout-rate",
                    f"In {half} it drops {100 * dropped_share(rate, half):.3g} % instead of "
                    f"{100 * rate:.3g} %, because there are few distinct random numbers.",
                    "Use the layer from kerasmp.layers, convert the model with safe_layers=True, "
                    'or create the layer with dtype="float32".',
                )


def _rates(layer: Any) -> list[float]:
    """Return the dropout rates that a layer applies itself, in its compute dtype."""
    if isinstance(layer, keras.layers.Dropout):
        return [layer.rate]
    if isinstance(layer, keras.layers.Attention):
        return [layer.dropout]
    # Only recurrent cells: attention contains a Dropout layer, and LSTM and GRU use their cell.
    return [layer.dropout, layer.recurrent_dropout] if "recurrent_dropout" in vars(layer) else []


def _half_precision_weights(model: Any) -> Iterator[Finding]:
    weights: dict[tuple[str, str], list[str]] = {}
    for variable in model.trainable_variables:
        if variable.dtype in HALVES:
            owner, _, name = variable.path.rpartition("/")
            weights.setdefault((owner, variable.dtype), []).append(name)
    for (owner, dtype), names in weights.items():
        yield Finding(
            "error",
            owner,
            "half-master",
            f"Weights are stored in {dtype} ({', '.join(names)}), where small updates are rounded "
            "away.",
            'Call add_weight without a dtype, and use a "mixed_" policy.',
        )


def _vanishing_epsilons(model: Any) -> Iterator[Finding]:
    for layer, path in paths(model):
        if not is_custom(layer) or layer.compute_dtype != "float16":
            continue
        # A layer inside that has the same one computes with it.
        passed_on = {getattr(part, "epsilon", None) for part in children(layer)}
        for name, value in vars(layer).items():
            is_epsilon = "eps" in name.lower() and isinstance(value, float)
            if is_epsilon and vanishes(value) and value not in passed_on:
                yield Finding(
                    "warning",
                    path,
                    "vanishing-epsilon",
                    f"`{name}` = {value:g} is 0 in float16 and has no effect.",
                    "Use 1e-6 or more, or compute this part in float32.",
                )


def vanishes(value: float) -> bool:
    """Return whether a nonzero number becomes 0 in float16.

    Example:

    >>> vanishes(1e-8), vanishes(1e-7), vanishes(0.0)
    (True, False, False)
    """
    return value != 0 and float(np.float16(value)) == 0


def _float_ids(model: Any, dtypes: dict[int, str]) -> Iterator[Finding]:
    # The compute dtypes of the layers that pass ids on. A nested model may cast them afterwards.
    passed_on: dict[int, set[str]] = {}
    located = locations(model)
    path_of = {id(layer): location.path for layer, location in located}
    for layer, location in located:
        for consumer in location.feeds:
            passed_on.setdefault(id(consumer), set()).add(str(layer.compute_dtype))
    for call in _all_calls(model):
        layer = call.operation
        if not isinstance(layer, keras.layers.Embedding):
            continue
        # Embedding does not cast its ids: only an input or a layer before it can round them.
        input_dtype = dtypes.get(id(call.inputs[0]), call.inputs[0].dtype)
        halves = sorted({input_dtype} | passed_on.get(id(layer), set()))
        largest_id = layer.input_dim - 1
        half = next((h for h in halves if largest_id > LARGEST_EXACT_INTEGER.get(h, np.inf)), None)
        if half is not None:
            yield Finding(
                "error",
                path_of[id(layer)],
                "float-ids",
                f"Its ids are rounded to {half}, so ids above {LARGEST_EXACT_INTEGER[half]} become "
                "other ids.",
                'Pass integers, through keras.Input(..., dtype="int32").',
            )


def _unused_policy(model: Any) -> Iterator[Finding]:
    with_weights = [layer for layer in flatten_layers(model)[1:] if layer.weights]
    if not with_weights or any(layer.compute_dtype in HALVES for layer in with_weights):
        return
    global_dtype = keras.config.dtype_policy().compute_dtype
    compute = next((c for c in (model.compute_dtype, global_dtype) if c in HALVES), None)
    if compute is None or not _would_convert(model, with_weights, compute):
        return
    if model.compute_dtype in HALVES:
        yield Finding(
            "warning",
            model.name,
            "ignores-policy",
            f"The model's policy computes in {model.compute_dtype}, but none of its layers does.",
            "Setting a model's `dtype_policy` does not change its layers. Use "
            "kerasmp.convert(model, policy).",
        )
    else:
        yield Finding(
            "warning",
            model.name,
            "ignores-policy",
            f"The global policy computes in {global_dtype}, but no layer does. They were created, "
            "loaded or cloned with another dtype.",
            "Use kerasmp.convert(model, policy).",
        )


def _would_convert(model: Any, layers: list[Any], compute: str) -> bool:
    """Return whether `convert` would make any of these layers compute in half precision.

    It makes none if the only layers with weights are heads.
    """
    policy, wanted = Policy(f"mixed_{compute}", rules="safe"), {id(layer) for layer in layers}
    rows = assign(model, policy)
    return any(id(row.layer) in wanted and row.after == policy.name for row in rows)


def _wider_outputs(model: Any, dtypes: dict[int, str]) -> Iterator[Finding]:
    path_of = {id(layer): path for layer, path in paths(model)}
    for call in _all_calls(model):
        layer = call.operation
        if not isinstance(layer, keras.Layer) or not is_custom(layer):
            continue
        if not current().AUTOCASTS_NESTED_LAYERS and children(layer):
            continue  # there, traced variables ignore the policy, and outputs look like float32
        if any(part.compute_dtype not in HALVES for part in flatten_layers(layer)):
            continue  # a layer inside was kept in float32
        wide = {dtypes[id(t)] for t in call.outputs if id(t) in dtypes} & {"float32", "float64"}
        if layer.compute_dtype in HALVES and wide:
            yield Finding(
                "warning",
                path_of[id(layer)],
                "ignores-policy",
                f"Its policy computes in {layer.compute_dtype}, but its output is "
                f"{' and '.join(sorted(wide))}.",
                'Cast the output to self.compute_dtype, or create the layer with dtype="float32".',
            )


def _all_calls(model: Any) -> list[Any]:
    """Return the calls in all graphs of a model, nested ones included."""
    return [call for part in flatten_layers(model) for call in calls(part)]
