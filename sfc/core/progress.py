"""What long work says while it runs: lines and progress bars on standard error."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sfc.core.ranks import is_leader

console = Console(stderr=True, highlight=False, quiet=not is_leader())


_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
# Control, format (which turn the direction of the text), surrogate, private and unassigned characters; separators.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def say(line: str) -> None:
    """One line to standard error; its brackets are text, not markup, and nothing in it moves the cursor."""
    console.print(printable(line), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """The text with line breaks, control and other invisible characters replaced by visible signs."""
    return "".join(_SIGNS.get(character) or _shown(character) for character in text)


def _shown(character: str) -> str:
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    return character.encode("unicode_escape").decode("ascii")


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(
            f"{speed:,.0f} {self.unit}/s" if speed and speed >= 10 else f"{speed:.1f} {self.unit}/s" if speed else ""
        )


@contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left; the block gets a function to call with the steps done since the last call."""
    with Progress(*_columns(unit), console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.update(task, advance=steps)


Show = Callable[[Sequence[str], Sequence[Sequence[str]]], None]
"""Shows a table: its column titles, and the cells of its rows."""


@contextmanager
def progress_beside_table(description: str, total: int, unit: str) -> Iterator[tuple[Callable[[int], None], Show]]:
    """A bar as `progress_bar`, and a table under it that the second function replaces."""
    bar = Progress(*_columns(unit), console=console)
    task = bar.add_task(description, total=total)
    try:
        with Live(bar, console=console, refresh_per_second=4) as live:

            def show(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
                table = Table(*titles)
                for row in rows:
                    table.add_row(*row)
                live.update(Group(bar, table))

            yield lambda steps: bar.update(task, advance=steps), show
    finally:
        if not console.is_terminal:
            console.line()  # rich ends what it writes into a file in the middle of a line


def _columns(unit: str) -> tuple[ProgressColumn, ...]:
    percentage = TextColumn("{task.percentage:>3.0f}%")
    return TextColumn("{task.description}"), BarColumn(), percentage, _Rate(unit), TimeRemainingColumn()
