"""Results to text, plots, HTML and JSON; the only room that formats."""

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
