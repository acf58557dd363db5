"""docs/numerics.md, made from what benchmarks/numerics.py has measured. Needs no framework."""

import math

from helpers import measurements

DATA = measurements.DOCS / "numerics.json"
WAYS = {
    "graph": "TensorFlow, graph",
    "xla": "TensorFlow, XLA",
    "jit": "JAX",
    "eager": "torch",
}
HAZARD = "hazard"  # the inputs of a row; others are named by their standard deviation
HEAD = (
    "| # | Layer, and what goes wrong | Ours | Run by "
    "| Output: stock | ours | best | Gradients: stock | ours | best | Worst |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
TEXT = """# How accurate half precision is

<!-- Made by benchmarks/numerics.py from numerics.json. Change those, not this page. -->

Under "mixed_float16" and "mixed_bfloat16" stock Keras layers compute in half precision also where
it cannot do it. This page has every place that we know of, measured in both: the stock layer, ours,
and the best there is. Of all that is measured, our largest error is

{largest}

and a test holds all of them to {allowed} times the best.

- An error is `||found - wanted|| / ||wanted||`, against the stock layer in float64 with the same
  weights and inputs, all of which are numbers that the half precision has.
- **Best** is the error of the float64 result rounded to the half precision. Where a layer
  multiplies by weights in it, it is that of the same layer with the framework's own half-precision
  products and all else in float32; in a separable convolution, what comes between its two products
  is half precision and all else float32; in an attention of one key alone (4, to itself), that of
  the stock layer in float32. A best below
  {least} is luck, and counts as that.
- **Ours** is a layer of `kerasmp.layers`, or the stock layer as the rules "safe" run it.
- **inf** means that a value is inf or NaN; **-** that the layer does not run.
- Of several outputs or gradients, a row shows the one that stock Keras gets most wrong. **Worst**
  is our largest error of all of them, as a multiple of the best.
- The last layers have no number: stock Keras's are right, and ours are held to the same.
- bfloat16 has the range of float32, and its roundings are eight times those of float16. So stock
  Keras is right in it where only the range of float16 is too small, and ours is held to the same.
  Of attention the inputs differ: on those that are a hazard in float16, products in bfloat16 leave
  no right digit.
- Values beyond the range are left out. So are those below float16's normal numbers (2^-14), both as
  found and as wanted, save where they are the point (18); in bfloat16 those below 2^-20, which is
  what the roundings of float32 make of 0.

Measured on a CPU with Keras {keras}: {versions}. TensorFlow runs
with oneDNN, as it comes; the tests hold ours to the same without it.

{parts}

## Measure again

For each backend that you have, in both or in one of them:

```bash
KERAS_BACKEND=tensorflow python benchmarks/numerics.py
KERAS_BACKEND=tensorflow python benchmarks/numerics.py --dtype bfloat16
```
"""
PART = """## {half}

{table}

On {ordinary} further inputs of the same shapes without a hazard, drawn from normal distributions
with standard deviations from {smallest} to {largest}, our worst is {worst} times the best."""
HALVES = ("float16", "bfloat16")


def run(backend, half):
    """Return the name of what is measured in one half precision on one backend."""
    return f"{backend}, {half}"


def measured_in(data, half):
    """Return the entries of one half precision, those of the backends."""
    return [entry for name, entry in sorted(data.items()) if name.endswith(run("", half))]


def page(data):
    """Return the text of docs/numerics.md."""
    entries = {half: found for half in HALVES if (found := measured_in(data, half))}
    least = (f"{found[0]['least']:.1e} in {half}" for half, found in entries.items())
    return TEXT.format(
        largest="\n".join(_largest(half, found) for half, found in entries.items()),
        least=" and ".join(least),
        allowed=" and ".join(sorted({str(entry["allowed"]) for entry in data.values()})),
        keras=" and ".join(sorted({entry["keras"] for entry in data.values()})),
        versions=", ".join(sorted({entry["framework"] for entry in data.values()})),
        parts="\n\n".join(_part(half, found) for half, found in entries.items()),
    )


def _largest(half, entries):
    row = max((row for entry in entries for row in entry["rows"]), key=ratio)
    found = f"{ratio(row):.1f} times the best in {half}"
    return f"- **{found}**: {row['name']}, {row['tensor']}, by {WAYS[row['way']]}"


def _part(half, entries):
    rows = [row for entry in entries for row in entry["rows"]]
    hazards = [row for row in rows if row["inputs"] == HAZARD]
    ordinary = [row for row in rows if row["inputs"] != HAZARD]
    groups = {}
    for row in hazards:
        groups.setdefault((row["number"], row["name"]), {}).setdefault(row["way"], []).append(row)
    lines = [
        _line(number, name, way, groups[number, name][way])
        for number, name in sorted(groups, key=lambda key: key[0] or math.inf)
        for way in WAYS
        if way in groups[number, name]
    ]
    spreads = sorted({float(row["inputs"]) for row in ordinary})
    return PART.format(
        half=half,
        table="\n".join([HEAD, *lines]),
        ordinary=len({(row["name"], row["inputs"]) for row in ordinary}),
        smallest=f"{spreads[0]:g}" if spreads else "-",
        largest=f"{spreads[-1]:g}" if spreads else "-",
        worst=f"{max(map(ratio, ordinary), default=0):.1f}",
    )


def ratio(row, contestant="ours"):
    """Return an error as a multiple of the best."""
    found = row[contestant]
    return math.inf if found in {None, "inf"} else found / row["best"]


def _line(number, name, way, rows):
    cells = []
    for part in ("output", "gradient"):
        of_part = [row for row in rows if row["part"] == part]
        if not of_part:
            cells += ["", "", ""]
            continue
        worst = max(of_part, key=lambda row: ratio(row, "stock"))
        cells += [_number(worst[key]) for key in ("stock", "ours", "best")]
    most = max(map(ratio, rows))
    start = f"| {number or '-'} | {name} | {rows[0]['answer']} | {WAYS[way]}"
    return f"{start} | {' | '.join(cells)} | {most:.1f} |"


def _number(value):
    if value is None:
        return "-"
    return value if value == "inf" else f"{value:.1e}"
