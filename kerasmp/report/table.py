"""Results as Rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerasmp.report.text import COLUMNS, cells

if TYPE_CHECKING:
    from rich.table import Table

    from kerasmp.demo import DemoResult, Environment
    from kerasmp.diagnosis import LintReport

_CAPTION = (
    "accuracy and loss: on the test images, at the end. time a step: wall time through fit, "
    "without compilation. skipped: steps. memory: the layers' outputs for one batch, computed from "
    "shapes and dtypes, not measured; weights are float32 in all."
)


def demo_table(result: DemoResult) -> Table:
    """Return the table at the end of a demo: one row for each policy.

    Args:
        result: What `run_demo` returned.

    Returns:
        A table to print with a Rich console.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        # Narrow enough for 80 columns.
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        title=f"{result.dataset}: {result.train_images:,} + {result.test_images:,} images, "
        f"{result.settings.epochs} epochs, Keras on {result.environment.backend}",
        caption=_CAPTION,
        caption_justify="left",
    )
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if place else "left", no_wrap=not place)
    for run in result.runs:
        table.add_row(*cells(run))
    return table


def environment_table(environment: Environment) -> Table:
    """Return versions, devices and the recommended policy as a table of two columns.

    Args:
        environment: What `kerasmp.demo.environment` returned.

    Returns:
        A table to print with a Rich console.
    """
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in environment.versions.items():
        table.add_row(name, version)
    table.add_row("Keras backend", environment.backend)
    table.add_row("devices", ", ".join(environment.devices))
    table.add_row(
        "processor", f"{environment.processor}, {environment.cores} cores for this process"
    )
    table.add_row("system", environment.system)
    table.add_row("recommended policy", environment.recommended)
    table.add_row("because", environment.reason)
    return table


def lint_table(report: LintReport) -> Table:
    """Return what lint found as a table: one row for each finding.

    Args:
        report: What `kerasmp.lint` returned.

    Returns:
        A table to print with a Rich console.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in ("", "place", "rule", "what is wrong, and what to do"):
        table.add_column(column, overflow="fold")
    for each in report:
        words = (each.severity, each.place, each.rule, f"{each.reason} {each.remedy}")
        table.add_row(*map(Text, words))
    return table
