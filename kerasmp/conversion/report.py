"""What a conversion did, layer by layer, and the way back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from kerasmp.backend.keras_graph import policy_of
from kerasmp.conversion.order import refuse_out_of_order
from kerasmp.conversion.table import table
from kerasmp.errors import PolicyError
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kerasmp.conversion.order import Conversion
    from kerasmp.policy import Policy
    from kerasmp.policy.layer_policies import LayerPolicies


class ConvertedLayer(NamedTuple):
    """What `convert` did, or would do, to one layer.

    Args:
        layer: The layer.
        path: Keras's path of the layer; where Keras gives it none, the holder's and its name.
        class_name: The name of its class, as it is now.
        before: The name of the Keras policy that it followed.
        after: The name of the Keras policy that it follows.
        reason: The rule that says so; "the policy" where there is none.
        replaced: The name of the stock class that it had, if it became a layer of ours.
        cost: What it does in one call on the sample; None without a sample, and where the sample
            did not reach it.
    """

    layer: Any
    path: str
    class_name: str
    before: str
    after: str
    reason: str
    replaced: str | None = None
    cost: Any = None


class ConversionReport:
    """What `convert` did, or would do; `str()` is a table with one line for each layer.

    While it is kept, so is all that `restore` needs; after a conversion of variables that is a copy
    of their old values.

    Args:
        model: The model.
        policy: The policy with its rules; None where policies of single layers were given.
        rows: One row for the model and for each layer in it, holders before what they hold.
        layer_policies: The policies of all layers, as text that can be applied again.
        notes: What else there is to say, a sentence each.
        undo: What puts everything back.
        conversion: What tells it from other conversions; None after a dry run.
    """

    def __init__(  # noqa: PLR0913 - one for each attribute
        self,
        *,
        model: Any,
        policy: Policy | None,
        rows: Iterable[ConvertedLayer],
        layer_policies: LayerPolicies,
        notes: Iterable[str] = (),
        undo: contextlib.ExitStack | None = None,
        conversion: Conversion | None = None,
    ) -> None:
        self.model = model
        self.policy = policy
        self.rows = tuple(rows)
        self.layer_policies = layer_policies
        self.notes = tuple(notes)
        self._undo = undo or contextlib.ExitStack()
        self._conversion = conversion

    @property
    def multiply_adds(self) -> Mapping[str, int] | None:
        """Multiply-adds of one call on the sample, by the dtype of what is multiplied.

        None without a sample, and where a layer multiplies in a way that could not be seen.
        """
        costs = [row.cost for row in self.rows if row.cost is not None]
        if not costs or not all(cost.known for cost in costs):
            return None
        total: dict[str, int] = {}
        for cost in costs:
            for dtype, count in cost.multiply_adds.items():
                total[dtype] = total.get(dtype, 0) + count
        return total

    @property
    def half_share(self) -> float | None:
        """The share of the multiply-adds that is done in float16 or bfloat16, 0 to 1.

        None where `multiply_adds` is, and where there are none.
        """
        counts = self.multiply_adds
        total = sum(counts.values()) if counts else 0
        if not counts or not total:
            return None
        return sum(counts.get(half, 0) for half in HALVES) / total

    @property
    def activation_bytes(self) -> int | None:
        """Bytes of the outputs of all layers for the sample; None without one."""
        return self._sum("activation_bytes")

    @property
    def cast_bytes(self) -> int | None:
        """Bytes that casts between float dtypes write in one call; None without a sample."""
        return self._sum("cast_bytes")

    def restore(self) -> None:
        """Put everything back: policies, classes, variables' dtypes, optimizer; once.

        Weights keep what training has made of them since. Of several conversions of a layer the
        last one is to be undone first, also where its report was dropped. After a dry run nothing
        happens.

        Raises:
            PolicyError: If it was called before, if a later conversion comes first, or if a layer
                was quantised since. Nothing has changed then.
        """
        if self._conversion is not None:
            refuse_out_of_order(self._conversion, [row.layer for row in self.rows])
            self._refuse_quantised()
        self._undo.pop_all().close()

    def _refuse_quantised(self) -> None:
        for row in self.rows:
            policy = policy_of(row.layer)
            if policy.quantization_mode is not None and policy.name != row.after:
                raise PolicyError(
                    "A layer was quantised since the conversion, and has no such weights any more.",
                    received=f'"{row.path}" under "{policy.name}"',
                    expected=f'"{row.after}"',
                    fix="Load the model anew, or restore before model.quantize(...).",
                )

    def __str__(self) -> str:
        return table(self)

    def _sum(self, name: str) -> int | None:
        costs = [row.cost for row in self.rows if row.cost is not None]
        return sum(getattr(cost, name) for cost in costs) if costs else None
