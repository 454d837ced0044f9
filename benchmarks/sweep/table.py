"""The table, in markdown."""

from .numbers import Line

HEAD = (
    "| setting | accuracy | against no cache, k=1 | tokens/s | tokens per CPU second | NFE | tokens per forward "
    "| rows per token | p50, p95 (ms) | on the frontier in | by CPU seconds | beaten by one setting in |"
)


def markdown(lines: list[Line]) -> str:
    """All lines as they come: those on the frontier in bold, published defaults with whose they are."""
    rows = [HEAD, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for line in lines:
        name = f"`{line.name}`"
        name = f"**{name}**" if line.frontier else name
        cells = (
            f"{name} {line.published}" if line.published else name,
            f"{100 * line.accuracy:.1f} ± {100 * line.accuracy_error:.1f} %",
            f"{100 * line.difference:+.1f} ± {100 * line.difference_error:.1f}",
            f"{line.tokens_per_second:.0f} ± {line.tokens_per_second_error:.0f}",
            f"{line.cpu_tokens_per_second:.0f} ± {line.cpu_tokens_per_second_error:.0f}",
            f"{line.nfe:.2f}",
            f"{line.tokens_per_forward:.2f}",
            f"{line.rows_per_token:.1f}",
            f"{1e3 * line.p50:.1f}, {1e3 * line.p95:.1f}",
            f"{line.frontier_share:.0%}",
            f"{line.cpu_frontier_share:.0%}",
            f"{line.beaten_share:.0%}" + (f" (`{line.beaten_by}`)" if line.beaten_share >= 0.5 else ""),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def document(lines: list[Line]) -> str:
    """Both tables."""
    second = "CPU second" if lines[0].clock == "cpu" else "second"
    return (
        f"Fastest first. Bold: on the frontier of accuracy and tokens per {second}; so is the last column.\n\n"
        f"The frontier and the defaults of papers and programs:\n\n{short(lines)}\nAll settings:\n\n{markdown(lines)}"
    )


def short(lines: list[Line]) -> str:
    """The frontier and the published defaults alone."""
    return markdown([line for line in lines if line.frontier or line.published])
