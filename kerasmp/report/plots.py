"""Draws results as SVG elements that follow the colours of their page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from kerasmp.demo.results import FLOAT16_NORMAL, FLOAT16_OVERFLOW, FLOAT16_SMALLEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kerasmp.demo import DemoResult, ExponentHistogram, ScaleReading

# Legible on white and on black, and distinct for the colour-blind (Okabe and Ito). Each colour also
# has its own line style.
_COLOURS = ("#808080", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
_STYLES = ("-", "--", "-", "-.", ":")
# A placeholder for "currentColor", the text colour of the page, which matplotlib does not know.
_TEXT_COLOUR = "#010203"
_FAINT = 0.25  # opacity
_SETTINGS: Any = {
    "axes.edgecolor": _TEXT_COLOUR,
    "axes.labelcolor": _TEXT_COLOUR,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": _TEXT_COLOUR,
    "svg.fonttype": "none",
    "svg.hashsalt": "kerasmp",
    "text.color": _TEXT_COLOUR,
    "xtick.color": _TEXT_COLOUR,
    "ytick.color": _TEXT_COLOUR,
}


def loss_curves(result: DemoResult) -> str:
    """Return an SVG plot of the training and test losses of all runs over the epochs."""
    label = "Loss over the epochs, one line for each policy"
    return _svg("loss", label, 2, lambda axes: _draw_losses(axes, result))


def scale_curves(result: DemoResult) -> str:
    """Return an SVG plot of the loss scales over the steps, or "" if no loss was scaled."""
    if not any(run.scales for run in result.runs):
        return ""
    label = "Loss scale over the steps, with skipped steps marked"
    return _svg("scale", label, 1, lambda axes: _draw_scales(axes[0], result))


def exponent_histograms(result: DemoResult) -> str:
    """Return an SVG plot of the exponents of the gradients and float16's range."""
    label = "Histogram of gradient exponents against float16's range"
    return _svg("exponents", label, 2, lambda axes: _draw_exponents(axes, result))


def _svg(name: str, label: str, columns: int, draw: Callable[[Sequence[Any]], None]) -> str:
    """Return a plot as an SVG element.

    Args:
        name: A prefix for all ids, which must be unique in a page.
        label: A description for screen readers.
        columns: The number of axes.
        draw: A function that draws on the axes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        # pyplot would look for a display and never release the figure.
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        for each in axes:
            each.grid(color=_TEXT_COLOUR, alpha=_FAINT / 2, lw=0.6)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    return _inline(stream.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    """Return an SVG file of matplotlib as an element of a page."""
    svg = svg[svg.index("<svg") :]
    # The page sets the size.
    head, rest = svg.split(">", 1)
    head = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    svg = f'{head} role="img" aria-label="{label}">{rest}'
    for before in ('id="', "url(#", 'href="#'):
        svg = svg.replace(before, f"{before}{name}-")
    return svg.replace(_TEXT_COLOUR, "currentColor")


def _draw_losses(axes: Sequence[Any], result: DemoResult) -> None:
    losses = {
        "training": [run.loss for run in result.runs],
        "test": [run.test_loss for run in result.runs],
    }
    for each, (title, values) in zip(axes, losses.items(), strict=True):
        for colour, style, run, loss in _with_styles(result, values):
            each.plot(
                range(1, len(loss) + 1), loss, style, color=colour, label=run.recipe.name,
                marker="." if len(loss) == 1 else None, alpha=0.9,
            )  # fmt: skip
        each.set_title(f"{title} loss")
        each.set_xlabel("epoch")
        each.set_yscale("log")
        each.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=9)


def _draw_scales(axes: Any, result: DemoResult) -> None:
    for colour, style, run, readings in _with_styles(result, [run.scales for run in result.runs]):
        if readings:
            steps = [reading.step for reading in readings]
            scales = [reading.scale for reading in readings]
            axes.step(steps, scales, style, where="pre", color=colour, label=run.recipe.name)
            _mark_skips(axes, [reading for reading in readings if reading.skipped], colour)
    axes.set_xlabel("step")
    axes.set_ylabel("loss scale")
    axes.set_yscale("log", base=2)
    axes.margins(y=0.15)
    axes.legend(fontsize=9)


def _mark_skips(axes: Any, skips: Sequence[ScaleReading], colour: str) -> None:
    if not skips:
        return
    axes.scatter(
        [reading.step for reading in skips], [reading.scale for reading in skips],
        marker="x", color=colour, zorder=3, label="steps skipped since the previous reading",
    )  # fmt: skip
    for reading in skips:
        axes.annotate(
            str(reading.skipped), (reading.step, reading.scale),
            textcoords="offset points", xytext=(5, 5), fontsize=9, color=_TEXT_COLOUR,
        )  # fmt: skip


def _draw_exponents(axes: Sequence[Any], result: DemoResult) -> None:
    for each, name in zip(axes, ("activations", "weights"), strict=True):
        _draw_histograms(each, [found for found in result.histograms if found.name == name])
        each.set_title(f"gradients with respect to {name}")
    axes[0].set_ylabel("share of the values")
    axes[0].legend(fontsize=9, loc="upper left")


def _draw_histograms(axes: Any, histograms: list[ExponentHistogram]) -> None:
    low, high = FLOAT16_SMALLEST - 8, FLOAT16_OVERFLOW + 2
    for histogram, colour in zip(histograms, _COLOURS, strict=False):
        total = sum(histogram.counts) or 1
        edges = range(histogram.first, histogram.first + len(histogram.counts) + 1)
        axes.stairs(
            [count / total for count in histogram.counts], edges, fill=True, alpha=0.55,
            color=colour, label=f"{histogram.moment} of training",
        )  # fmt: skip
        used = [edge for edge, count in zip(edges, histogram.counts, strict=False) if count]
        low, high = min([low, *used]), max([high, *used])
    for start, end, colour, name in (
        (low, FLOAT16_SMALLEST - 1, _COLOURS[2], "rounds to 0"),
        (FLOAT16_SMALLEST - 1, FLOAT16_NORMAL, "#e69f00", "subnormal"),
        (FLOAT16_NORMAL, FLOAT16_OVERFLOW, _COLOURS[3], "float16's normal range"),
        (FLOAT16_OVERFLOW, high, _COLOURS[2], "inf"),
    ):
        axes.axvspan(start, end, ymin=0, ymax=0.03, color=colour, lw=0)
        if start != low:
            axes.axvline(start, color=_TEXT_COLOUR, lw=0.6, alpha=_FAINT)
        axes.annotate(
            name, ((start + end) / 2, -0.10), xycoords=("data", "axes fraction"),
            ha="center", va="top", fontsize=8, color=_TEXT_COLOUR, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(low, high)
    axes.margins(y=0.25)
    axes.set_xlabel("exponent e: values from 2^e to 2^(e+1)", labelpad=18)


def _with_styles(result: DemoResult, values: Any) -> Iterator[tuple[str, str, Any, Any]]:
    return zip(_COLOURS, _STYLES, result.runs, values, strict=False)
