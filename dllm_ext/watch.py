"""The canvas of a generation, shown live in a terminal: every token in the colour of the step that committed it."""

import colorsys
import time

from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.text import Text

from .config import GenerationConfig
from .engine import Engine, Result

STEPS_PER_CYCLE = 24  # colours come round again after this many steps
SECONDS_PER_STEP = 0.04  # a step stays visible for at least this long, however small the model
MASK = "░"
END = "∎"

_GIVEN = Style(dim=True)
_MASKED = Style(dim=True)


def color_of(step: int) -> str:
    """The colour of a step, "#rrggbb": blue, then green, yellow and red, and blue again after STEPS_PER_CYCLE steps."""
    hue = (0.6 - step / STEPS_PER_CYCLE) % 1.0
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, 0.62, 0.85))


class Canvas:
    """What is known of one sequence while it is generated. Feed it every StepEvent; `render()` shows it."""

    def __init__(self, engine: Engine, prompt_ids: list[int], gen_length: int, infill: bool):
        """prompt_ids: as given to generate(). With infill the prompt is shown too, dimmed, and its masks fill in."""
        mask = engine.spec.mask_id
        self._engine = engine
        self._prompt_length = len(prompt_ids)
        self._begin = 0 if infill else len(prompt_ids)
        self._tokens = list(prompt_ids) + [None] * gen_length
        if infill:
            self._tokens = [None if t == mask else t for t in prompt_ids] + [None] * gen_length
        self._masked = sum(t is None for t in self._tokens)
        self._step_of = {}  # position -> step that committed it
        self._status = "step 0"

    def add(self, event) -> None:
        """Take in one StepEvent of this sequence."""
        for position, token in zip(event.positions, event.token_ids, strict=True):
            self._tokens[position] = token
            self._step_of[position] = event.step
        self._status = (
            f"step {event.step + 1}, block {event.block + 1}: {event.rows} rows computed, "
            f"{len(event.positions)} tokens committed, {len(self._step_of)} of {self._masked} in all"
        )

    def render(self, finished: bool = False) -> Text:
        """The canvas as styled text. finished: the text has ended, so nothing after its first stop id is shown."""
        end = len(self._tokens)
        if finished:
            end = next((p + 1 for p in range(self._prompt_length, end) if self._is_stop(p)), end)
        text = Text()
        run = []  # positions in a row that hold a token: a character may span several of them
        for position in range(self._begin, end):
            if self._tokens[position] is not None:
                run.append(position)
                continue
            self._append_run(text, run)
            run = []
            text.append(MASK, _MASKED)
        self._append_run(text, run)
        text.append(f"\n{self._status}", Style(dim=True, italic=True))
        return text

    def _append_run(self, text, positions):
        pieces = self._engine.tokenizer.pieces([self._tokens[p] for p in positions])
        for position, piece in zip(positions, pieces, strict=True):
            step = self._step_of.get(position)
            style = _GIVEN if step is None else Style(color=color_of(step))
            text.append(END if step is not None and self._is_stop(position) else piece, style)

    def _is_stop(self, position):
        return self._tokens[position] in self._engine.spec.stop_ids


def watch(
    engine: Engine,
    prompt_ids: list[int],
    config: GenerationConfig,
    infill: bool = False,
    console: Console | None = None,
) -> Result:
    """generate() for one prompt, its canvas shown live on `console` (default: stdout); the final one stays."""
    canvas = Canvas(engine, prompt_ids, config.gen_length, infill)
    with Live(canvas.render(), console=console or Console(), auto_refresh=False) as live:

        def on_step(event):
            canvas.add(event)
            live.update(canvas.render(), refresh=True)
            time.sleep(SECONDS_PER_STEP)

        result = engine.generate(prompt_ids, config, infill=infill, on_step=on_step)
        live.update(canvas.render(finished=True), refresh=True)
    return result
