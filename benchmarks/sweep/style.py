"""What the figure and the page share: a colour per cache, a marker per decoder, short labels."""

from .numbers import Line

INK = "#30343b"
COLOURS = {"none": "#6b7280", "prefix": "#2563eb", "dual": "#0f8f7e", "dllm": "#d97706", "d2": "#b5179e"}
MARKERS = {  # matplotlib's marker, and the page's shape
    "tokens per step": ("s", "square"),
    "threshold": ("o", "circle"),
    "factor": ("^", "triangle"),
    "EB-sampler": ("D", "diamond"),
    "KLASS": ("P", "cross"),
}


def short(line: Line) -> str:
    """The setting's name with spaces instead of the slashes, for labels."""
    cache, block, decoder = line.name.split("/")
    return f"{cache}, {'one block' if block == 'G' else f'blocks of {block}'}, {decoder}"
