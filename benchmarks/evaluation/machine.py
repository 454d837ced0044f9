"""What a result says of the machine it was measured on."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The CPU's name as Linux has it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
