"""The demo: one small CNN, trained under each policy on the same images, and what came of it.

Nothing here formats or prints: `run_demo` returns frozen results, `kerasmp.report` shows them.
"""

from kerasmp.demo.environment import Environment, environment
from kerasmp.demo.results import DemoResult, ExponentHistogram, RunResult, ScaleReading
from kerasmp.demo.run import Progress, run_demo
from kerasmp.demo.settings import RECIPES, DemoError, DemoSettings, Recipe

__all__ = [
    "RECIPES",
    "DemoError",
    "DemoResult",
    "DemoSettings",
    "Environment",
    "ExponentHistogram",
    "Progress",
    "Recipe",
    "RunResult",
    "ScaleReading",
    "environment",
    "run_demo",
]
