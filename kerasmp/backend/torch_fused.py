"""Fused updates on torch: kernels for many tensors, with the results of Keras's optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kerasmp.backend.keras_internals import values_of
from kerasmp.backend.protocol import Backend
from kerasmp.backend.tensors import chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kerasmp.backend.tensors import Weight

# This many values stay in a CPU's cache from one kernel of an update to the next.
_IN_CACHE = 2**18

# torch's SGD kernel computes 1 minus the rate in float64: a smaller rate would lose digits.
_LEAST_RATE = 2.0**-28


class FusedUpdates(Backend):
    """The methods of `Backend` for fused updates."""

    HAS_FUSED_UPDATES = True

    def fits_fused_kernels(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[bool]:
        """Return whether each gradient is dense, not wider than float32, its variable contiguous.

        The kernels walk through memory and ignore strides, and an orthogonal initializer creates
        variables that are not contiguous. torch.compile, which fuses by itself, cannot trace them.
        """
        if torch.compiler.is_compiling():
            return [False] * len(grads)
        strided, wide = torch.strided, torch.float64
        return [
            type(g) is torch.Tensor
            and g.layout is strided
            and g.dtype is not wide
            and v.is_contiguous()
            for g, v in zip(grads, values_of(variables), strict=True)
        ]

    @torch.no_grad()
    def adam(  # noqa: PLR0913, PLR0917 - the settings of Adam
        self,
        weights: Sequence[Weight],
        divisor: Any,
        alpha: Any,
        betas: tuple[float, float],
        epsilon: float,
        applied: Any,  # noqa: ARG002 - eager code branches before
    ) -> None:
        """Update variables and moments as `keras.optimizers.Adam` does."""
        # torch's bias correction places epsilon differently. At a step number as high as this it
        # corrects nothing, and `alpha` includes Keras's correction.
        never = torch.full((), 1e8, device=alpha.device)
        for variables, gradients, ms, vs in _chunks(weights):
            torch._fused_adam_(
                variables,
                torch._foreach_div(gradients, divisor),  # noqa: SLF001 - Keras uses these as well
                ms,
                vs,
                [],
                [never] * len(variables),
                lr=alpha,
                beta1=betas[0],
                beta2=betas[1],
                weight_decay=0.0,
                eps=epsilon,
                amsgrad=False,
                maximize=False,
            )

    @torch.no_grad()
    def sgd(
        self,
        weights: Sequence[Weight],
        rate: Any,
        momentum: float,
        applied: Any,  # noqa: ARG002
        *,
        nesterov: bool,
    ) -> None:
        """Update variables as `keras.optimizers.SGD` does."""
        # Reading the rate is free on a CPU and saves a pass. A GPU would have to wait for it.
        number = None if nesterov or not rate.is_cpu else -float(rate)
        alpha = 1 if number is None else number
        for variables, gradients, *moments in _chunks(weights, scratch=number is None):
            if moments and number is not None and number <= -_LEAST_RATE:
                # m * momentum - g * rate, added to the variable: hence these odd arguments.
                torch._fused_sgd_(
                    variables,
                    gradients,
                    moments[0],
                    momentum=momentum,
                    dampening=1.0 - number,
                    lr=-1.0,
                    weight_decay=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=False,
                )
                continue
            steps = gradients if number is not None else torch._foreach_mul(gradients, -rate)  # noqa: SLF001
            for ms in moments:
                torch._foreach_mul_(ms, momentum)
                torch._foreach_add_(ms, steps, alpha=alpha)
                if nesterov:
                    torch._foreach_add_(steps, ms, alpha=momentum)
            if nesterov or not moments:
                torch._foreach_add_(variables, steps, alpha=alpha)
            else:
                torch._foreach_add_(variables, moments[0])
            del steps  # frees the memory before the next chunk needs it


def _chunks(weights: Sequence[Weight], *, scratch: bool = True) -> Iterator[Sequence[list[Any]]]:
    """Yield the tensors of all weights in chunks.

    Args:
        weights: The weights.
        scratch: Whether the update allocates tensors of the size of a chunk.

    Yields:
        Lists of variables, gradients and each moment. Weight decay is applied already.
    """
    for weight in weights:
        if weight.decay is not None:
            weight.variable.value.mul_(1 - weight.decay)
    moments = [values_of(each) for each in zip(*[w.moments for w in weights], strict=True)]
    variables, gradients = values_of([w.variable for w in weights]), [w.gradient for w in weights]
    ready = {g.dtype for g in gradients} == {torch.float32} and all(
        map(torch.Tensor.is_contiguous, gradients)
    )
    sizes = [v.numel() for v in variables]
    if ready and not scratch and sum(sizes) <= _IN_CACHE:
        yield [variables, gradients, *moments]
        return
    rows = list(zip(variables, gradients, *moments, strict=True))
    if variables[0].is_cpu and max(sizes) > _IN_CACHE:
        rows = [piece for row in rows for piece in _pieces(row)]
        sizes = [row[0].numel() for row in rows]
    for chunk in chunks(rows, sizes, _IN_CACHE if ready and not scratch else max(sizes)):
        variables, gradients, *moments = (list(column) for column in zip(*chunk, strict=True))
        if not ready:
            gradients = [g.to(torch.float32).contiguous() for g in gradients]
        yield [variables, gradients, *moments]


def _pieces(row: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Split the tensors of a large weight, unless its gradient is not contiguous."""
    if row[1].numel() <= _IN_CACHE or not row[1].is_contiguous():
        yield row
        return
    yield from zip(*(tensor.view(-1).split(_IN_CACHE) for tensor in row), strict=True)
