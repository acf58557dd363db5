"""The command `kerasmp`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from kerasmp.errors import ArgumentError, KerasMPError, MissingDependencyError

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(
        str(
            MissingDependencyError(
                "The command needs a package that is not installed.",
                received=f"{error.name} missing",
                fix='Install it with: pip install "kerasmp[demo]"',
            )
        )
    )

app = typer.Typer(
    help="Mixed-precision training for Keras 3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command. If kerasmp raises an error, print one line instead of a traceback.

    The exit code is 0 on success, 1 if something is missing or cannot be written, and 2 for invalid
    arguments.
    """
    try:
        app()
    except KerasMPError as error:
        from rich.console import Console

        Console(stderr=True).print("Error:", str(error), style="red", markup=False, highlight=False)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def _empty(option: str, value: str, expected: str) -> ArgumentError:
    return ArgumentError(
        f"`--{option}` has an invalid value.",
        received=repr(value),
        expected=expected,
        fix=f"Omit --{option} to use its default.",
    )


def _print_version(requested: bool) -> None:  # noqa: FBT001 - Typer calls it
    if requested:
        from kerasmp import __version__

        typer.echo(f"kerasmp {__version__}")
        raise typer.Exit


@app.callback()
def kerasmp(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Mixed-precision training for Keras 3."""


@app.command()
def env() -> None:
    """Show versions, devices and the recommended policy."""
    from rich.console import Console

    from kerasmp.demo import environment
    from kerasmp.report import environment_table

    Console().print(environment_table(environment()))


@app.command()
def demo(  # noqa: PLR0913 - one argument for each option
    *,
    dataset: Annotated[
        str,
        typer.Option(
            help="A tfds data set that is prepared on disk: name, name/config or name:1.2.3."
        ),
    ] = "kerasmp_digits",
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Folder of prepared data sets. [default: as in tfds]"),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 12,
    policies: Annotated[
        str, typer.Option(help="Names of policies, separated by commas. [default: all]")
    ] = "",
    output: Annotated[
        str, typer.Option(metavar="PATH", help="Folder for the report.")
    ] = "kerasmp-demo",
    seed: Annotated[int, typer.Option(help="Sets the weights and the order of the images.")] = 0,
    limit: Annotated[
        int | None, typer.Option(help="Use at most this many training and this many test images.")
    ] = None,
) -> None:
    """Train a small CNN under each policy and report the results.

    Without --dataset, it trains on the handwritten digits that ship with scikit-learn. It never
    downloads anything.
    """
    from rich.console import Console

    from kerasmp.demo import DemoSettings, run_demo
    from kerasmp.report import ProgressDisplay, check_folder, demo_table, write_demo

    for option, value in {"dataset": dataset, "data-dir": data_dir, "output": output}.items():
        if value is not None and not value.strip():
            raise _empty(option, value, "a name" if option == "dataset" else "a folder")
    names = tuple(name.strip() for name in policies.split(",") if name.strip())
    if policies and not names:
        raise _empty("policies", policies, "names, separated by commas")
    settings = DemoSettings(
        dataset=dataset,
        data_dir=None if data_dir is None else Path(data_dir),
        epochs=epochs,
        policies=names,
        seed=seed,
        limit=limit,
    )
    folder = check_folder(Path(output))
    console = Console()
    with ProgressDisplay(console) as display:
        result = run_demo(settings, progress=display)
    console.print(demo_table(result))
    report, results = write_demo(result, folder)
    console.print(
        f"Report: {report}\nResults: {results}", markup=False, highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
