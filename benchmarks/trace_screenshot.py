"""Write the page of one generation and photograph it in the middle: docs/trace.png.

python benchmarks/trace_screenshot.py docs/trace.png        # needs a Chromium in PATH
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from dllm_ext import Engine, GenerationConfig
from dllm_ext.trace import write_trace

QUESTION = "Tom has 12 apples. He buys 5 more. Then he loses 3. How many apples does Tom have now?"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("output", type=Path)
    p.add_argument("--model", default="mini-llada")
    p.add_argument("--cache", default="d2")
    p.add_argument("--step", type=int, default=14)
    p.add_argument("--browser", default="chromium")
    p.add_argument("--size", default="1240,1080")
    p.add_argument("--repeat", type=int, default=10, help="generations; the fastest is shown")
    args = p.parse_args()

    engine = Engine.from_pretrained(args.model)
    config = GenerationConfig(gen_length=64, num_transfer_tokens=1, cache=args.cache)
    ids = engine.encode(QUESTION)
    with tempfile.TemporaryDirectory() as folder:
        pages = [Path(folder) / f"{i}.html" for i in range(args.repeat)]
        seconds = [write_trace(p, engine, ids, config, model=args.model).stats.seconds_total for p in pages]
        page = pages[seconds.index(min(seconds))]
        command = [args.browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={args.size}"]
        command += [f"--screenshot={args.output.resolve()}", f"{page.as_uri()}#{args.step}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
