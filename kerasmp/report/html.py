"""Formats results as one HTML page that needs no other file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kerasmp.report import plots
from kerasmp.report.text import COLUMNS, cells, number, scale, seconds

if TYPE_CHECKING:
    from kerasmp.demo import DemoResult


def demo_html(result: DemoResult) -> str:
    """Return a page with the settings, the table and the plots. It loads no other files.

    Args:
        result: The result of `run_demo`.
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("kerasmp.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("demo.html.j2").render(
        result=result,
        columns=COLUMNS,
        rows=[cells(run) for run in result.runs],
        facts=_facts(result),
        shares=_shares(result),
        warnings=[(run.recipe.name, text) for run in result.runs for text in run.warnings],
        loss_svg=plots.loss_curves(result),
        scale_svg=plots.scale_curves(result),
        exponents_svg=plots.exponent_histograms(result),
    )


def _facts(result: DemoResult) -> list[tuple[str, str]]:
    environment = result.environment
    height, width, channels = result.image_shape
    settings = result.settings
    data = (
        f"{result.dataset}: {result.train_images:,} training and {result.test_images:,} test "
        f"images of {height} by {width} by {channels}, {result.classes} classes"
    )
    training = (
        f"{settings.epochs} epochs of {result.runs[0].steps // settings.epochs} steps, "
        f"{settings.batch_size} images a step, Adam with learning rate {result.learning_rate:g}, "
        f"seed {settings.seed}"
    )
    hardware = (
        f"{environment.processor}, {environment.cores} cores for this process, "
        f"{', '.join(environment.devices)}, {environment.system}"
    )
    return [
        ("data", data),
        ("network", f"a CNN with {result.parameters:,} weights"),
        ("training", training),
        ("took", f"{seconds(result.seconds)} in all"),
        ("versions", ", ".join(f"{name} {text}" for name, text in environment.versions.items())),
        ("hardware", hardware),
        ("recommended policy", f"{environment.recommended}. {environment.reason}"),
    ]


def _shares(result: DemoResult) -> list[tuple[str, ...]]:
    """Return table rows: what float16 would make of the gradients at each run's final scale."""
    scales = sorted({1.0, *(run.final_scale for run in result.runs if run.final_scale)})
    rows = []
    for histogram in result.histograms:
        if histogram.moment == "end":
            for value in scales:
                shares = dataclasses.astuple(histogram.fate(value))
                scaled = "1 (not scaled)" if value == 1.0 else scale(value)
                rows.append((histogram.name, scaled, *(number(share, ".2%") for share in shares)))
    return rows
