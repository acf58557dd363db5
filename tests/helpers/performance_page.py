"""docs/performance.md, made from what benchmarks/performance.py measures. Needs no framework."""

from helpers import measurements

DATA = measurements.DOCS / "performance.json"
WAYS = {"graph": "TensorFlow, graph", "xla": "TensorFlow, XLA", "jax": "JAX", "torch": "torch"}
AGAIN, OURS = "again", "kerasmp"
NAMES = {
    "adam": "Adam",
    "clipped": "Adam, global_clipnorm",
    "momentum": "SGD, momentum",
    "mlp": "MLP",
    "cnn": "CNN",
    "transformer": "transformer",
    "fit": "`fit`",
    "bare loop": "bare loop",
    "monitor": "MLP, OverflowMonitor",
}
# What we hold ourselves to on a CPU, by group and name, then by way: of CPU time.
TARGETS = {
    ("update", "adam"): {"graph": 0.6, "xla": 1.15, "torch": 1.2},
    ("update", "momentum"): {"graph": 0.8},
    ("update", "clipped"): {"graph": 0.6},
    ("step", "transformer"): {"graph": 0.95, "xla": 1.02, "jax": 1.02, "torch": 1.0},
    ("step", "mlp"): dict.fromkeys(WAYS, 1.05),
    ("step", "cnn"): dict.fromkeys(WAYS, 1.0),
    ("model", "mlp"): dict.fromkeys(WAYS, 1.02),
    ("model", "transformer"): dict.fromkeys(WAYS, 1.01),
    ("model", "monitor"): {"graph": 1.01, "xla": 1.01, "torch": 1.01, "jax": 1.02},
    ("sparse", "fit"): {"graph": 1.05},
    ("sparse", "bare loop"): {"graph": 1.05},
}
GROUPS = {
    "update": "The update alone: 66 variables with 25 million values, the same gradients.",
    "step": (
        "Whole steps in `fit`, float32, against the same optimizer without a wrapper: an MLP of 82"
        " variables and a transformer of 20 million parameters with Adam, a CNN of 150 variables"
        " with SGD and momentum."
    ),
    "model": (
        "`kerasmp.Model` against `keras.Model`, and `fit` with OverflowMonitor against `fit`"
        " without it, all with our optimizer."
    ),
    "sparse": (
        "A sparse gradient: 128 rows a step of an embedding of 1,000,000 x 64, SGD, against the"
        " same without a wrapper."
    ),
}
HEAD = (
    "| | Run by | Beside | The same again | Stock Keras | kerasmp | Peers | Target |\n"
    "|---|---|---|---|---|---|---|---|"
)
TEXT = """# What mixed precision costs

<!-- Made by benchmarks/performance.py from performance.json. Change those, not this page. -->

What loss scaling adds to a step, or takes from it, and what our models and the monitor add. What is
compared takes turns in random order in one process. A figure is the median over the rounds of the
ratio to what stands under **Beside**, taken in the same round: of wall time and, behind the slash,
of CPU time, which moves less. **The same again** is that contestant once more, so it is what chance
does. In parentheses stands the interval that holds the median of CPU time with 95 %; a target is
met if the interval reaches it, and undecided where the same again is not 1 within its own.

Peers, of which torch's row of Adam takes the first as its measure: GradScaler is
`torch.optim.Adam(fused=True)` with `torch.amp.GradScaler`, "no scaling" the same without it; optax
is `optax.adam` without scaling, "optax, jmp" the same with `jmp.DynamicLossScale`, "optax, flax"
with `flax.training.dynamic_scale.DynamicScale`. "plain" is the Keras optimizer without a wrapper.

{hardware}

{tables}

## Counts

Operations of TensorFlow's graph; megabytes that XLA moves in an update, and holds beside its
arguments: these do not move from run to run. In a fresh process of TensorFlow, the most that it
holds during updates beyond what it held before. The variables take 101 MB, the largest 8.4.

{counts}

On JAX the floor is one more pass over the gradients, since all have to be checked before anything
is changed: 1,009 + 101 MB with Adam. Clipping by a norm makes that pass in any case; what XLA
counts beyond it is a branch for scales below 1, and for norms that are not finite.

To measure again, for each backend that you have:

```bash
KERAS_BACKEND=tensorflow python benchmarks/performance.py
```
"""


def page(data):
    """Return the text of docs/performance.md."""
    rows = [
        (run, row)
        for group in GROUPS
        for name in NAMES
        for run in sorted(data)
        for row in data[run]["rows"]
        if (row["group"], row["name"]) == (group, name)
    ]
    tables = []
    for group, text in GROUPS.items():
        lines = [_line(run, row) for run, row in rows if row["group"] == group]
        title = text.split(":")[0].split(",")[0].rstrip(".")
        body = "\n".join([HEAD, *lines]) if lines else "Not measured yet."
        tables.append(f"## {title}\n\n{text}\n\n{body}")
    hardware = [
        f"- {run}: {entry['hardware']}; "
        + ", ".join(sorted({version for row in entry["rows"] for version in row["versions"]}))
        + "."
        for run, entry in sorted(data.items())
    ]
    if not any(_gpu(run) for run in data):
        hardware.append("- On a GPU: not measured. `python benchmarks/gpu.py` measures it on one.")
    return TEXT.format(
        hardware="\n".join(hardware), tables="\n\n".join(tables), counts=_counts(data)
    )


def judged(row):
    """Return the target of a row and "met", "missed" or "undecided"; None where there is none."""
    target = TARGETS.get((row["group"], row["name"]), {}).get(row["way"])
    if target is None:
        return None
    least, _, most = row["compared"][AGAIN]["cpu"]
    if not least <= 1 <= most:
        return target, "undecided"
    return target, "met" if ours(row)["cpu"][0] <= target else "missed"


def _gpu(run):
    """Return the name of the GPU, with a comma before it, or nothing."""
    return "".join(run.partition(",")[1:])


def ours(row):
    """Return the ratios of what is ours in a row: the last that is no peer."""
    found = row["compared"]
    return next(found[key] for key in (OURS, "kerasmp.Model", "monitor") if key in found)


def _line(run, row):
    found = row["compared"]
    base = next(iter(found))
    peers = [
        f"{key} {_ratio(value)}"
        for key, value in found.items()
        if value is not ours(row) and key not in {base, AGAIN, "stock"}
    ]
    cells = [
        NAMES[row["name"]],
        WAYS[row["way"]] + _gpu(run),
        base,
        _interval(found[AGAIN]),
        _ratio(found["stock"]) if "stock" in found else "",
        f"**{_ratio(ours(row))}** ({_interval(ours(row))})",
        "; ".join(peers),
        "" if _gpu(run) or judged(row) is None else ", ".join(map(str, judged(row))),
    ]
    return "| " + " | ".join(cells) + " |"


def _ratio(found):
    return f"{found['wall'][1]:.2f} / {found['cpu'][1]:.2f}"


def _interval(found):
    return f"{found['cpu'][0]:.2f} to {found['cpu'][2]:.2f}"


def _counts(data):
    lines = [
        "| | Run by | Of | Plain | Stock Keras | kerasmp | Peers |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in sorted(data):
        for row in data[run]["rows"]:
            kinds = {kind for found in row["counts"].values() for kind in found}
            for kind in sorted(kinds):
                found = {key: value[kind] for key, value in row["counts"].items() if kind in value}
                peers = [
                    f"{key} {value:,}"
                    for key, value in found.items()
                    if key not in {"plain", AGAIN, "stock", OURS}
                ]
                of = "MB held, fresh process" if row["group"] == "memory" else kind
                cells = [NAMES[row["name"]], WAYS[row["way"]] + _gpu(run), of]
                cells += [f"{found[key]:,}" for key in ("plain", "stock", OURS)]
                lines.append("| " + " | ".join([*cells, "; ".join(peers)]) + " |")
    return "\n".join(lines)
