"""From names of settings to what generate() is called with."""

import fnmatch
from dataclasses import dataclass

from dllm_ext import D2Cache, DLLMCache, GenerationConfig
from dllm_ext.errors import ConfigError

from . import grid


class SettingError(ValueError):
    """A setting that does not exist; the message lists what does."""


@dataclass(frozen=True)
class Setting:
    """One way to decode: its name, and the fields of generate()."""

    name: str
    fields: dict


def parse(name: str, gen_length: int) -> Setting:
    """The setting that a name stands for. SettingError where it is none."""
    kinds = {"dllm": DLLMCache, "d2": D2Cache}
    try:
        cache, parameters, block, decoder = grid.split(name)
        grid.kind(decoder)
        if parameters and cache not in kinds:
            raise ValueError(f"the cache {cache!r} has no parameters")
        length = gen_length if block == "G" else min(int(block), gen_length)
        fields = {"gen_length": gen_length, "block_length": length, **decoder}
        fields["cache"] = kinds[cache](**parameters) if cache in kinds else cache
        GenerationConfig(**fields)
    except (ValueError, TypeError, ConfigError) as e:
        listed = "\n  ".join(grid.GRID)
        raise SettingError(
            f"setting {name!r}: {e}. Settings are CACHE/BLOCK/DECODER, patterns of these names, or 'published':"
            f"\n  {listed}"
        ) from None
    return Setting(name, fields)


def chosen(wanted: list[str] | None, gen_length: int) -> list[Setting]:
    """The settings that --settings asks for: names, patterns such as 'dual/*', "published"; None is the grid.

    The baseline is always among them, since every other is compared with it.
    """
    names = [grid.BASELINE]
    for item in wanted if wanted is not None else grid.GRID:
        if item == "published":
            names += [name for name in grid.GRID if name in grid.PUBLISHED]
        else:
            names += fnmatch.filter(grid.GRID, item) or [item]
    return [parse(name, gen_length) for name in dict.fromkeys(names)]
