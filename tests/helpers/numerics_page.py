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
TEXT = """# How accurate float16 is

<!-- Made by benchmarks/numerics.py from numerics.json. Change those, not this page. -->

Under "mixed_float16" stock Keras layers compute in float16 also where float16 cannot do it. This
page has every place that we know of, measured: the stock layer, ours, and the best there is.

- An error is `||found - wanted|| / ||wanted||`, against the stock layer in float64 with the same
  weights and inputs, all of which are numbers that float16 has.
- **Best** is the error of the float64 result rounded to float16. Where a layer multiplies by
  weights in float16, it is that of the same layer with the framework's own float16 products and
  all else in float32; in a separable convolution, what comes between its two products is float16
  and all else float32; in an attention of one key alone (4, to itself), that of the stock layer
  in float32. A best below {least} is luck, and counts as that.
- **Ours** is a layer of `kerasmp.layers`, or the stock layer as the rules "safe" run it.
- **inf** means that a value is inf or NaN; **-** that the layer does not run.
- Of several outputs or gradients, a row shows the one that stock Keras gets most wrong. **Worst**
  is our largest error of all of them, as a multiple of the best. A test holds it to {allowed}.
- The last layers have no number: stock Keras's are right, and ours are held to the same.
- Values beyond float16's range are left out. So are those below its normal numbers (2^-14), both
  as found and as wanted, save where they are the point (18).

Measured on a CPU with Keras {keras}: {versions}.

{table}

On {ordinary} further inputs of the same shapes without a hazard, drawn from normal distributions
with standard deviations from {smallest} to {largest}, our worst is {worst} times the best.

To measure again, for each backend that you have:

```bash
KERAS_BACKEND=tensorflow python benchmarks/numerics.py
```
"""


def page(data):
    """Return the text of docs/numerics.md."""
    rows = [row for backend in sorted(data) for row in data[backend]["rows"]]
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
    first = next(iter(data.values()))
    return TEXT.format(
        least=f"{first['least']:.1e}",
        allowed=first["allowed"],
        keras=" and ".join(sorted({entry["keras"] for entry in data.values()})),
        versions=", ".join(data[backend]["framework"] for backend in sorted(data)),
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
