"""The page: one HTML file with its data, no network and no library. What it does is in page.html."""

import json
from dataclasses import asdict
from html import escape
from pathlib import Path

from .numbers import Data, Line
from .style import COLOURS, MARKERS

TEMPLATE = Path(__file__).with_name("page.html")


def draw(lines: list[Line], data: Data, file: Path) -> None:
    """Write the page."""
    plan = data.plan
    content = {
        "lines": [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(x).items()} for x in lines],
        "clock": lines[0].clock,
        "colours": COLOURS,
        "shapes": {decoder: shape for decoder, (_, shape) in MARKERS.items()},
    }
    weights = f", {plan.quantization}" if plan.quantization else ""
    title = f"{plan.model} on {plan.task}: accuracy against speed"
    engine = data.machine["commit"] or data.machine["version"]
    about = (
        f"{lines[0].problems:,} problems, {len(lines)} settings, {plan.dtype}{weights}, {plan.gen_length} tokens, "
        f"{data.machine['device']}, threads: {plan.threads}, engine {engine}. "
        f"One prompt at a time; ± and bars are one standard error."
    )
    page = TEMPLATE.read_text()
    # "<" may not stand in a script as it is: "</script>" would end it.
    data_text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    for mark, text in (("TITLE", escape(title)), ("ABOUT", escape(about)), ("COMMAND", escape(data.command))):
        page = page.replace(f"@{mark}@", text)
    file.write_text(page.replace("@DATA@", data_text))
