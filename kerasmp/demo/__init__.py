"""The demo: trains one small CNN under each policy on the same images.

It formats and prints nothing. `run_demo` returns frozen results, and `kerasmp.report` shows them.
"""

from kerasmp.demo.environment import Environment, environment
from kerasmp.demo.results import DemoResult, ExponentHistogram, RunResult, ScaleReading
from kerasmp.demo.run import run_demo
from kerasmp.demo.settings import RECIPES, DemoError, DemoSettings, Recipe
from kerasmp.demo.watch import Progress

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
