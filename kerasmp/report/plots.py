"""Results as SVG drawings that sit in a page and follow its colours."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Self

from kerasmp.demo.results import FLOAT16_NORMAL, FLOAT16_OVERFLOW, FLOAT16_SMALLEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kerasmp.demo import DemoResult, ExponentHistogram

# Legible on white and on black, and told apart by the colour-blind (Okabe and Ito's order); line
# styles say the same once more.
_COLOURS = ("#808080", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
_STYLES = ("-", "--", "-", "-.", ":")
# Stands for the page's text colour until the drawing is done: matplotlib knows no "currentColor".
_INK = "#010203"
_FAINT = 0.25
_SETTINGS: Any = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "kerasmp",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def loss_curves(result: DemoResult) -> str:
    """Return the training and test losses of all runs over the epochs, as SVG."""
    with _Drawing("loss", "Loss over the epochs, one line for each policy", columns=2) as drawing:
        for axes, title, values in zip(
            drawing.axes,
            ("training", "test"),
            ([run.loss for run in result.runs], [run.test_loss for run in result.runs]),
            strict=True,
        ):
            for colour, style, run, losses in _with_styles(result, values):
                axes.plot(
                    range(1, len(losses) + 1), losses, style, color=colour, label=run.recipe.name,
                    marker="." if len(losses) == 1 else None, alpha=0.9,
                )  # fmt: skip
            axes.set_title(f"{title} loss")
            axes.set_xlabel("epoch")
            axes.set_yscale("log")
            axes.xaxis.get_major_locator().set_params(integer=True)
        drawing.axes[0].legend(fontsize=9)
    return drawing.svg


def scale_curves(result: DemoResult) -> str:
    """Return the loss scale over the steps, skips marked, as SVG; empty if none was scaled."""
    if not any(run.scales for run in result.runs):
        return ""
    with _Drawing("scale", "Loss scale over the steps, with skipped steps marked") as drawing:
        (axes,) = drawing.axes
        for colour, style, run, readings in _with_styles(
            result, [run.scales for run in result.runs]
        ):
            if not readings:
                continue
            steps = [reading.step for reading in readings]
            scales = [reading.scale for reading in readings]
            axes.step(steps, scales, style, where="pre", color=colour, label=run.recipe.name)
            _mark_skips(axes, readings, colour)
        axes.set_xlabel("step")
        axes.set_ylabel("loss scale")
        axes.set_yscale("log", base=2)
        axes.margins(y=0.15)
        axes.legend(fontsize=9)
    return drawing.svg


def _mark_skips(axes: Any, readings: Any, colour: str) -> None:
    skips = [reading for reading in readings if reading.skipped]
    if not skips:
        return
    axes.scatter(
        [reading.step for reading in skips], [reading.scale for reading in skips],
        marker="x", color=colour, zorder=3, label="skipped since the reading before",
    )  # fmt: skip
    for reading in skips:
        axes.annotate(
            str(reading.skipped), (reading.step, reading.scale),
            textcoords="offset points", xytext=(5, 5), fontsize=9, color=_INK,
        )  # fmt: skip


def exponent_histograms(result: DemoResult) -> str:
    """Return the exponents of the gradients against float16's range, as SVG."""
    names = sorted({histogram.name for histogram in result.histograms})
    with _Drawing(
        "exponents", "Histogram of gradient exponents against float16's range", columns=len(names)
    ) as drawing:
        for axes, name in zip(drawing.axes, names, strict=True):
            chosen = [histogram for histogram in result.histograms if histogram.name == name]
            _exponents(axes, chosen)
            axes.set_title(f"gradients with respect to {name}")
        drawing.axes[0].set_ylabel("share of the values")
        drawing.axes[0].legend(fontsize=9, loc="upper left")
    return drawing.svg


def _exponents(axes: Any, histograms: list[ExponentHistogram]) -> None:
    low, high = FLOAT16_SMALLEST - 8, FLOAT16_OVERFLOW + 2
    for histogram, colour in zip(histograms, (_COLOURS[0], _COLOURS[1]), strict=False):
        total = sum(histogram.counts) or 1
        edges = [histogram.first + place for place in range(len(histogram.counts) + 1)]
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
        axes.axvline(start, color=_INK, lw=0.6, alpha=_FAINT) if start != low else None
        axes.annotate(
            name, ((start + end) / 2, -0.10), xycoords=("data", "axes fraction"),
            ha="center", va="top", fontsize=8, color=_INK, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(low, high)
    axes.margins(y=0.25)
    axes.set_xlabel("exponent e: values from 2^e to 2^(e+1)", labelpad=18)


def _with_styles(result: DemoResult, values: Any) -> Iterator[tuple[str, str, Any, Any]]:
    return zip(_COLOURS, _STYLES, result.runs, values, strict=False)


class _Drawing:
    """A figure that becomes one SVG element, with names of its own, when the block ends."""

    def __init__(self, name: str, label: str, columns: int = 1) -> None:
        self._name = name
        self._label = label
        self._columns = columns
        self.svg = ""

    def __enter__(self) -> Self:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._settings = mpl.rc_context(_SETTINGS)
        self._settings.__enter__()
        # A bare Figure: pyplot would look for a display and keep the figure for good.
        self._figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        axes = self._figure.subplots(1, self._columns, squeeze=False)
        self.axes = list(axes[0])
        for one in self.axes:
            one.grid(color=_INK, alpha=_FAINT / 2, lw=0.6)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                stream = io.StringIO()
                self._figure.savefig(
                    stream, format="svg", transparent=True,
                    metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
                )  # fmt: skip
                self.svg = _inline(stream.getvalue(), self._name, self._label)
        finally:
            self._settings.__exit__(None, None, None)


def _inline(svg: str, name: str, label: str) -> str:
    """Return matplotlib's file as an element of a page."""
    svg = svg[svg.index("<svg") :]
    # The size comes from the page; several drawings must not share ids.
    head, rest = svg.split(">", 1)
    head = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    svg = f'{head} role="img" aria-label="{label}">{rest}'
    for before in ('id="', "url(#", 'href="#'):
        svg = svg.replace(before, f"{before}{name}-")
    return svg.replace(_INK, "currentColor")
