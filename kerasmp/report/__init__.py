"""Formats results as text, tables, plots, HTML and JSON. No other package formats results."""

from kerasmp.report.files import check_folder, write_demo
from kerasmp.report.html import demo_html
from kerasmp.report.progress import ProgressDisplay
from kerasmp.report.table import demo_table, environment_table, lint_table

__all__ = [
    "ProgressDisplay",
    "check_folder",
    "demo_html",
    "demo_table",
    "environment_table",
    "lint_table",
    "write_demo",
]
