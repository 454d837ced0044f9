"""Draw how a canvas fills in: a few steps of one generation as an SVG, each token in the colour of its step.

python benchmarks/trace_svg.py docs/trace.svg
"""

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dllm_ext import Engine, GenerationConfig
from dllm_ext.watch import Canvas

QUESTION = "Tom has 12 apples. He buys 5 more. Then he loses 3. How many apples does Tom have now?"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("output", type=Path)
    p.add_argument("--model", default="mini-llada")
    p.add_argument("--prompt", default=QUESTION)
    p.add_argument("--gen-length", type=int, default=64)
    p.add_argument("--num-transfer-tokens", type=int, default=3, help="tokens committed at each step")
    p.add_argument("--frames", type=int, default=5)
    args = p.parse_args()

    engine = Engine.from_pretrained(args.model)
    config = GenerationConfig(gen_length=args.gen_length, num_transfer_tokens=args.num_transfer_tokens)
    ids = engine.encode(args.prompt)
    canvas = Canvas(engine, ids, config.gen_length, infill=False)
    frames = []

    def on_step(event):
        canvas.add(event)
        frames.append(canvas.render())

    engine.generate(ids, config, on_step=on_step)
    frames.append(canvas.render(finished=True))

    console = Console(record=True, width=110, file=io.StringIO())  # recorded, not shown
    console.print(Text(args.prompt, style="bold"))
    last = len(frames) - 1
    for i in sorted({round(last * k / (args.frames - 1)) for k in range(args.frames)}):
        console.print()
        console.print(frames[i])
    console.save_svg(str(args.output), title=f"dllm generate --watch  ({args.model})")


if __name__ == "__main__":
    main()
