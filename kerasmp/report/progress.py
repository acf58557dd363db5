"""Shows the progress of a demo: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from kerasmp.report.text import number

if TYPE_CHECKING:
    from rich.console import Console

    from kerasmp.demo import Progress


class ProgressDisplay:
    """A context manager that shows progress. Pass it to `run_demo` as `progress`.

    On a terminal, each policy gets a bar with the steps and the loss. Elsewhere, for example in a
    log file, it gets one line when it starts and one when it ends.

    Args:
        console: The Rich console to write to.

    Example:

        with ProgressDisplay(Console()) as display:
            result = run_demo(progress=display)
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Start the bars if the console is a terminal."""
        if self._console.is_terminal:
            from rich import progress

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
                progress.TextColumn("loss {task.fields[loss]}"),
                progress.TimeElapsedColumn(),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bars, and leave them on the screen."""
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: Progress) -> None:
        """Show an event."""
        name, loss = f"{event.run}/{event.runs} {event.recipe}", number(event.loss, ".4f")
        new = event.recipe not in self._tasks
        if self._bars is None:
            self._tasks[event.recipe] = None
            if event.finished:
                self._print(f"{name}: {event.steps} steps done, loss {loss}")
            elif new:
                self._print(f"{name}: training for {event.steps} steps")
            return
        if new:
            self._tasks[event.recipe] = self._bars.add_task(name, total=event.steps, loss=loss)
        task = self._tasks[event.recipe]
        self._bars.update(task, completed=event.step, loss=loss)
        if event.finished:
            self._bars.stop_task(task)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False)
