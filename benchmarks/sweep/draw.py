"""Figure, page and tables of a folder's raw data."""

from pathlib import Path

from . import figure, numbers, page, table


def all_of(folder: Path, clock: str = "wall") -> list[Path]:
    """Write pareto.png, pareto.html and table.md beside the raw data."""
    data = numbers.load(folder)
    lines = numbers.lines(data, clock)
    files = [folder / name for name in ("pareto.png", "pareto.html", "table.md")]
    figure.draw(lines, data, files[0])
    page.draw(lines, data, files[1])
    files[2].write_text(table.document(lines))
    return files
