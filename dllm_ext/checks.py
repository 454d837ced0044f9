"""Types of settings: each check gives the value as the plain type, or raises a ConfigError that names it."""

import dataclasses
import functools
import numbers
import operator
import types
import typing

import numpy

from .errors import ConfigError


def wrong_type(name, value, allowed):
    """The ConfigError for a value of the wrong type."""
    return ConfigError(f"{name} = {value!r} is not allowed: it must be {allowed}, not {type(value).__name__}")


def check_int(name, value):
    """`value` as an int, from any integer type but bool; ConfigError unless it fits the native field."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise wrong_type(name, value, "an integer") from None
    low, high = (0, 2**64 - 1) if name == "seed" else (-(2**63), 2**63 - 1)
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value} is not allowed: it must be between {low} and {high}")
    return value


def check_ints(name, value):
    """`value` as a tuple of ints, from a tuple, a list or a range."""
    if not isinstance(value, tuple | list | range):
        raise wrong_type(name, value, "a tuple of integers")
    return tuple(check_int(f"{name}[{i}]", v) for i, v in enumerate(value))


def check_float(name, value):
    """`value` as a float, from any real number but bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} = {value!r} is not allowed: it is too large") from None


def check_bool(name, value):
    """`value` as a bool, from Python's or numpy's; ConfigError for anything else."""
    if isinstance(value, bool | numpy.bool_):
        return bool(value)
    raise wrong_type(name, value, "True or False")


def check_str(name, value):
    """`value`, if it is a str."""
    if not isinstance(value, str):
        raise wrong_type(name, value, "a name")
    return value


CHECKS = {int: check_int, float: check_float, bool: check_bool, str: check_str, tuple[int, ...]: check_ints}


@functools.cache
def kinds_of(cls) -> dict:
    """Field name -> (type, whether None is allowed) of a dataclass; the type is a union where there are several."""
    hints = typing.get_type_hints(cls)
    return {f.name: _kind(hints[f.name]) for f in dataclasses.fields(cls)}


def _kind(hint):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    given = [o for o in options if o is not types.NoneType]
    return given[0] if len(given) == 1 else hint, types.NoneType in options


def check_fields(settings, prefix="", checks=CHECKS):
    """Check the types of all fields of a frozen dataclass, and make their values plain.

    prefix: stands before a field's name in messages. checks: type -> function of a name and a value.
    """
    for name, (kind, optional) in kinds_of(type(settings)).items():
        value = getattr(settings, name)
        if not (value is None and optional):
            object.__setattr__(settings, name, checks[kind](prefix + name, value))


def checked_init(cls):
    """Let the constructor of a dataclass raise a ConfigError, which lists the fields, where Python has a TypeError."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args, **fields):
        names = [f.name for f in dataclasses.fields(cls)]
        if args:
            raise ConfigError(
                f"{cls.__name__} takes keyword arguments only, not {args[0]!r} (fields: {', '.join(names)})"
            )
        unknown = [name for name in fields if name not in names]
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is not a field of {cls.__name__} (fields: {', '.join(names)})")
        init(self, **fields)

    cls.__init__ = __init__
    return cls
