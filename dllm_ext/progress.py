"""How far reading or writing a model has come."""

import contextlib
import sys
import time

AFTER_SECONDS = 1.0


@contextlib.contextmanager
def progress_bar(title):
    """A callback (bytes done, bytes in all), or None; a bar on stderr if that is a terminal and the work takes long."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title)
    begin = time.monotonic()

    def show(done, total):
        if time.monotonic() - begin > AFTER_SECONDS:
            bar.start()
            bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()
