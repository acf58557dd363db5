"""Layers and variables whose dtype is not what the policy means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasmp.backend import current
from kerasmp.backend.keras_graph import calls, children, graph_of, outermost_graphs
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.diagnosis.finding import Finding
from kerasmp.policy import Policy
from kerasmp.policy.assign import assign
from kerasmp.policy.locations import locations
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

if TYPE_CHECKING:
    from collections.abc import Iterator

# Up to here every whole number has a value of its own.
EXACT = {"float16": 2**11, "bfloat16": 2**8}
# Safe rules whose layers go on training, with a lower loss scale or less accuracy in the tails.
_BEARABLE = ("activation", "probabilities")
# Those of which other findings say more.
_TOLD_APART = ("head", "mask-value", "dropout")
# Those that are as bad in bfloat16: errors, sums of many small terms, few random numbers.
_IN_BFLOAT16 = ("kernel", "spectrum", "interpolation", "recurrent", "embedding", "noise")


def findings(model: Any, dtypes: dict[int, str]) -> list[Finding]:
    """Return the layers and variables with a dtype that will hurt.

    Args:
        model: A Keras model.
        dtypes: Of its symbolic tensors.
    """
    return [
        *_unsafe_layers(model),
        *_unsafe_activations(model),
        *_mask_values(model, dtypes),
        *_dropout_rates(model),
        *_masters(model),
        *_vanishing_epsilons(model),
        *_float_ids(model, dtypes),
        *_ignoring(model),
        *_going_their_own_way(model, dtypes),
    ]


def is_custom(layer: Any) -> bool:
    """Return whether a layer is of a user's own class, and no model."""
    stock = type(layer).__module__.partition(".")[0] == "keras"
    return not (stock or is_kerasmp_layer(layer) or isinstance(layer, keras.Model))


def _unsafe_layers(model: Any) -> Iterator[Finding]:
    for half in HALVES:
        for row in assign(model, Policy(f"mixed_{half}", rules="safe")):
            rule, colon, reason = row.reason.removeprefix('"safe", ').partition(": ")
            if row.layer.compute_dtype != half or row.after != "float32" or not colon:
                continue
            if rule in _TOLD_APART or (half == "bfloat16" and rule not in _IN_BFLOAT16):
                continue
            yield Finding(
                "hint" if rule in _BEARABLE else "warning",
                row.path,
                "unsafe-layer",
                f"In {half}, {reason}.",
                'Convert the model with kerasmp.convert, use rules="safe", or the layer of '
                "kerasmp.layers.",
            )


def _unsafe_activations(model: Any) -> Iterator[Finding]:
    for layer in flatten_layers(model):
        name = activation_name(layer)
        if (
            isinstance(layer, WITH_ACTIVATION)
            and layer.compute_dtype == "float16"
            and name in UNSAFE_ACTIVATIONS
            and name not in PROBABILITIES  # of which the rule "probabilities" tells
        ):
            yield Finding(
                "hint",
                layer.path or layer.name,
                "unsafe-activation",
                f'In float16, the gradient of "{name}" overflows, or is computed from the rounded '
                "output.",
                f"Give it activation=kerasmp.ops.{name}.",
            )


def _mask_values(model: Any, dtypes: dict[int, str]) -> Iterator[Finding]:
    """Yield stock Masking that looks for a value which the inputs have lost where they come in."""
    given: dict[int, set[str]] = {}
    for call in _all_calls(model):
        come = {dtypes.get(id(each), each.dtype) for each in call.inputs}
        given.setdefault(id(call.operation), set()).update(come)
    rounded: dict[int, set[str]] = {id(None): set()}  # to what those that hold a layer round
    for layer, location in locations(model):
        to = rounded[id(location.holder)]
        if layer.autocast and graph_of(layer) is None:  # a model with a graph casts no inputs
            to = to | {str(layer.compute_dtype)}
        rounded[id(layer)] = to
        if not isinstance(layer, keras.layers.Masking) or is_kerasmp_layer(layer):
            continue
        halves = sorted(to | given.get(id(layer), set()))
        half = next((h for h in halves if loses_mask_value(layer.mask_value, h)), None)
        if half is not None:
            yield Finding(
                "error",
                location.path,
                "mask-value",
                f"Its mask value {layer.mask_value} is another number in {half}, in which its "
                "inputs come: no step is masked.",
                "Use kerasmp.layers.Masking, or convert with safe_layers=True.",
            )


def _dropout_rates(model: Any) -> Iterator[Finding]:
    for layer, location in locations(model):
        half = str(layer.compute_dtype)
        looked_after = is_kerasmp_layer(location.holder) and isinstance(location.holder, ATTENTION)
        if half not in HALVES or is_kerasmp_layer(layer) or looked_after:
            continue
        for rate in _rates(layer):
            if drops_wrong_share(rate, half):
                yield Finding(
                    "warning",
                    location.path,
                    "dropout-rate",
                    f"In {half} it drops {100 * dropped_share(rate, half):.3g} % and not "
                    f"{100 * rate:.3g} %: there are few random numbers.",
                    "Use the layer of kerasmp.layers, convert with safe_layers=True, or give it "
                    'dtype="float32".',
                )


def _rates(layer: Any) -> list[float]:
    """Return the rates at which a layer itself drops numbers of its compute dtype."""
    if isinstance(layer, keras.layers.Dropout):
        return [layer.rate]
    if isinstance(layer, keras.layers.Attention):
        return [layer.dropout]
    # A cell: attention holds a Dropout, and LSTM and the like ask their cell.
    return [layer.dropout, layer.recurrent_dropout] if "recurrent_dropout" in vars(layer) else []


def _masters(model: Any) -> Iterator[Finding]:
    named: dict[tuple[str, str], list[str]] = {}
    for variable in model.trainable_variables:
        if variable.dtype in HALVES:
            owner, _, name = variable.path.rpartition("/")
            named.setdefault((owner, variable.dtype), []).append(name)
    for (owner, dtype), names in named.items():
        yield Finding(
            "error",
            owner,
            "half-master",
            f"Weights are stored in {dtype} ({', '.join(names)}): updates below its rounding are "
            "lost.",
            'Leave out the dtype of add_weight, and use a "mixed_" policy.',
        )


def _vanishing_epsilons(model: Any) -> Iterator[Finding]:
    for layer in flatten_layers(model):
        if not is_custom(layer) or layer.compute_dtype != "float16":
            continue
        for name, value in vars(layer).items():
            if "eps" in name.lower() and isinstance(value, float) and vanishes(value):
                yield Finding(
                    "warning",
                    layer.path or layer.name,
                    "vanishing-epsilon",
                    f"`{name}` = {value:g} is 0 in float16, and protects from nothing.",
                    "Take 1e-6 or more, or compute this part in float32.",
                )


def vanishes(value: float) -> bool:
    """Return whether a number that is not 0 becomes 0 in float16.

    Example:

    >>> vanishes(1e-8), vanishes(1e-7), vanishes(0.0)
    (True, False, False)
    """
    return value != 0 and float(np.float16(value)) == 0


def _float_ids(model: Any, dtypes: dict[int, str]) -> Iterator[Finding]:
    through: dict[int, set[str]] = {}  # what hands ids on, before a model inside has cast them, too
    for layer, location in locations(model):
        for taker in location.feeds:
            through.setdefault(id(taker), set()).add(str(layer.compute_dtype))
    for call in _all_calls(model):
        layer = call.operation
        if not isinstance(layer, keras.layers.Embedding):
            continue
        # It takes ids as they come: only what is before it, or an input of its own, rounds them.
        come = dtypes.get(id(call.inputs[0]), call.inputs[0].dtype)
        ways = {come} | through.get(id(layer), set())
        rounding = (each for each in sorted(ways) if layer.input_dim > EXACT.get(each, np.inf) + 1)
        half = next(rounding, None)
        if half is not None:
            yield Finding(
                "error",
                layer.path or layer.name,
                "float-ids",
                f"Its ids come as {half}: above {EXACT[half]} they have become others.",
                'Feed whole numbers, through keras.Input(..., dtype="int32").',
            )


def _ignoring(model: Any) -> Iterator[Finding]:
    with_weights = [layer for layer in flatten_layers(model)[1:] if layer.weights]
    if not with_weights or any(layer.compute_dtype in HALVES for layer in with_weights):
        return
    of_policy = keras.config.dtype_policy().compute_dtype  # which may be one of the user's own
    compute = next((c for c in (model.compute_dtype, of_policy) if c in HALVES), None)
    if compute is None or not _would_follow(model, with_weights, compute):
        return
    if model.compute_dtype in HALVES:
        yield Finding(
            "warning",
            model.name,
            "ignores-policy",
            f"The model says {model.compute_dtype}, and none of its layers computes in it.",
            "Setting a model's own dtype_policy relabels it: use kerasmp.convert(model, policy).",
        )
    else:
        yield Finding(
            "warning",
            model.name,
            "ignores-policy",
            f"The global policy computes in {of_policy}, and no layer does: they were "
            "made, loaded or cloned with a dtype of their own.",
            "Use kerasmp.convert(model, policy).",
        )


def _would_follow(model: Any, layers: list[Any], compute: str) -> bool:
    """Return whether `convert` would let one of these layers compute in half precision.

    It may let none, where all that has weights is a head.
    """
    policy, wanted = Policy(f"mixed_{compute}", rules="safe"), {id(layer) for layer in layers}
    rows = assign(model, policy)
    return any(id(row.layer) in wanted and row.after == policy.name for row in rows)


def _going_their_own_way(model: Any, dtypes: dict[int, str]) -> Iterator[Finding]:
    for call in _all_calls(model):
        layer = call.operation
        if not isinstance(layer, keras.Layer) or not is_custom(layer):
            continue
        if not current().AUTOCASTS_NESTED_LAYERS and children(layer):
            continue  # traced there, variables do not follow the policy, and all looks like float32
        wide = {dtypes[id(t)] for t in call.outputs if id(t) in dtypes} & {"float32", "float64"}
        if layer.compute_dtype in HALVES and wide:
            yield Finding(
                "warning",
                layer.path or layer.name,
                "ignores-policy",
                f"Its policy computes in {layer.compute_dtype}, and its output is "
                f"{' and '.join(sorted(wide))}.",
                'Cast to self.compute_dtype at the end, or say dtype="float32".',
            )


def _all_calls(model: Any) -> list[Any]:
    """Return the calls of all graphs in a model, which may have none itself."""
    return [call for graph in outermost_graphs(model) for call in _calls_within(graph)]


def _calls_within(graph: Any) -> list[Any]:
    found = calls(graph)
    return found + [
        inner
        for call in found
        if graph_of(call.operation) is not None
        for inner in _calls_within(call.operation)
    ]
