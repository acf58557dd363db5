"""Formats results as Rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerasmp.report.text import COLUMNS, cells

if TYPE_CHECKING:
    from rich.table import Table

    from kerasmp.demo import DemoResult, Environment
    from kerasmp.diagnosis import LintReport

_CAPTION = (
    "accuracy and loss: on the test images, after the last epoch. time per step: wall time in fit, "
    "without compilation. skipped: number of skipped steps. memory: the layer outputs for one "
    "batch, computed from shapes and dtypes, not measured. All weights are float32."
)


def demo_table(result: DemoResult) -> Table:
    """Return the results of a demo as a table with a row for each policy.

    Args:
        result: The result of `run_demo`.

    Returns:
        A table to print with a Rich console.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        # Must fit 80 columns.
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        title=f"{result.dataset}: {result.train_images:,} + {result.test_images:,} images, "
        f"{result.settings.epochs} epochs, Keras on {result.environment.backend}",
        caption=_CAPTION,
        caption_justify="left",
    )
    first, *others = COLUMNS
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right")
    for run in result.runs:
        table.add_row(*cells(run))
    return table


def environment_table(environment: Environment) -> Table:
    """Return versions, devices and the recommended policy as a table with two columns.

    Args:
        environment: The result of `kerasmp.demo.environment`.

    Returns:
        A table to print with a Rich console.
    """
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        **environment.versions,
        "Keras backend": environment.backend,
        "devices": ", ".join(environment.devices),
        "processor": f"{environment.processor}, {environment.cores} cores for this process",
        "system": environment.system,
        "recommended policy": environment.recommended,
        "because": environment.reason,
    }
    for row in rows.items():
        table.add_row(*row)
    return table


def lint_table(report: LintReport) -> Table:
    """Return the findings of `lint` as a table with a row for each finding.

    Args:
        report: The result of `kerasmp.lint`.

    Returns:
        A table to print with a Rich console.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in ("severity", "place", "rule", "problem and remedy"):
        table.add_column(column, overflow="fold")
    for each in report:
        row = (each.severity, each.place, each.rule, f"{each.reason} {each.remedy}")
        table.add_row(*map(Text, row))
    return table
