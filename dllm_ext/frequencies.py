"""TokenFrequencies: how often each token of a vocabulary occurs in a corpus, for the PC-Sampler (arXiv 2508.13021)."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy

from .checks import check_float, check_int
from .errors import ConfigError, InputError

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True, eq=False, repr=False)
class TokenFrequencies:
    """Share of every token of a vocabulary in a corpus. Immutable; equal where all shares are.

    Make one from shares, TokenFrequencies(values), or with from_counts, from_corpus or load. ConfigError for a value
    that is not a number in [0, 1].

    Attributes:
        values: One number in [0, 1] per token id: a read-only float64 array.
        total: Tokens of the corpus; None where only the shares were given.
    """

    values: numpy.ndarray
    total: int | None = field(default=None, init=False)

    def __post_init__(self):
        try:
            values = numpy.asarray(self.values)
        except (ValueError, TypeError, RuntimeError) as e:  # ragged; a tensor that numpy cannot read
            raise ConfigError(f"the values of TokenFrequencies are not allowed: {e}") from None
        if values.dtype.kind not in "iuf" or values.ndim != 1 or values.size == 0:
            raise ConfigError(
                f"the values of TokenFrequencies are not allowed: they must be a list of numbers, one for each token, "
                f"not {values.dtype} of shape {values.shape}"
            )
        values = values.astype(numpy.float64) + 0.0  # a copy, without negative zeros: equal is equal in every bit
        wrong = numpy.flatnonzero(~((values >= 0) & (values <= 1)))
        if wrong.size:
            raise ConfigError(
                f"the frequency of token {wrong[0]} = {values[wrong[0]]} is not allowed: it must be in [0, 1]"
            )
        object.__setattr__(self, "values", values)
        values.setflags(write=False)

    @classmethod
    def from_counts(cls, counts: Mapping[int, int], total: int, vocab_size: int) -> "TokenFrequencies":
        """counts / total; a token without a count gets 1 / total (github.com/NEUIR/PC-Sampler, src/generate.py).

        counts: token id -> how often it occurs. total: tokens of the corpus, at least 1. vocab_size: the model's
        (`engine.spec.vocab_size`).

        Raises ConfigError for ids outside the vocabulary and counts outside [0, total].
        """
        total, vocab_size = check_int("total", total), check_int("vocab_size", vocab_size)
        for name, value in (("total", total), ("vocab_size", vocab_size)):
            if value < 1:
                raise ConfigError(f"{name} = {value} is not allowed: it must be at least 1")
        if not isinstance(counts, Mapping):
            raise ConfigError(f"counts is not allowed: it must map ids to counts, not be a {type(counts).__name__}")
        values = numpy.full(vocab_size, 1 / total)
        for token, count in counts.items():
            if not 0 <= check_int("the id in counts", token) < vocab_size:
                allowed = f"between 0 and {vocab_size - 1}, below vocab_size"
                raise ConfigError(f"the id {token} in counts is not allowed: it must be {allowed}")
            if not 0 <= check_float(f"counts[{token}]", count) <= total:
                raise ConfigError(f"counts[{token}] = {count} is not allowed: it must be between 0 and total = {total}")
            values[token] = count / total
        frequencies = cls(values)
        object.__setattr__(frequencies, "total", total)
        return frequencies

    @classmethod
    def from_corpus(
        cls, path_or_paths: str | os.PathLike | Iterable[str | os.PathLike], engine: "Engine"
    ) -> "TokenFrequencies":
        """Count the tokens of one or several text files (UTF-8), each line encoded by itself with its line break.

        Raises InputError for a file that cannot be read, and where there is no token at all.
        """
        paths = path_or_paths if isinstance(path_or_paths, Iterable) else [path_or_paths]
        paths = [path_or_paths] if isinstance(path_or_paths, str) else list(paths)
        for path in paths:
            if not isinstance(path, str | os.PathLike):
                raise InputError(f"the corpus {path!r} is not allowed: it must be a path or several paths")
        counts = Counter()
        for path in paths:
            try:
                with open(path, encoding="utf-8") as lines:
                    for line in lines:
                        counts.update(engine.encode(line, chat=False))
            except (OSError, UnicodeDecodeError) as e:
                raise InputError(f"the corpus {os.fspath(path)!r} cannot be read: {e}") from None
        if not counts:
            raise InputError(f"the corpus {[os.fspath(p) for p in paths]} is not allowed: it must hold a token")
        return cls.from_counts(counts, counts.total(), engine.spec.vocab_size)

    @classmethod
    def load(cls, path: str | os.PathLike, vocab_size: int) -> "TokenFrequencies":
        """Read a file in the format of github.com/NEUIR/PC-Sampler: what `save` writes.

        The file is JSON, {"num_token": total, "p_baseline_dict": {"id": count, ...}}. ConfigError where it cannot be
        read or does not fit the vocabulary.
        """
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
            total, counts = data["num_token"], {int(token): n for token, n in data["p_baseline_dict"].items()}
        except (OSError, ValueError) as e:  # also what is not JSON, not UTF-8, or has ids that are no integers
            raise ConfigError(f"the token frequencies {os.fspath(path)!r} cannot be read: {e}") from None
        except (KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(
                f"the token frequencies {os.fspath(path)!r} cannot be read: they must be a JSON object with num_token "
                "and p_baseline_dict, which maps ids to counts"
            ) from None
        try:
            return cls.from_counts(counts, total, vocab_size)
        except ConfigError as e:
            raise ConfigError(f"the token frequencies {os.fspath(path)!r} do not fit: {e}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON file that `load` and github.com/NEUIR/PC-Sampler read.

        A count of 1 is left out, since it is what a token without a count has. Where `total` is not known, num_token
        is 1 and the counts are the shares themselves.
        """
        if self.total is None:
            total, counts = 1, self.values
        else:
            total, counts = self.total, numpy.rint(self.values * self.total).astype(numpy.int64)
        listed = {str(token): counts[token].item() for token in numpy.flatnonzero(counts != 1)}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"num_token": total, "p_baseline_dict": listed}, file)

    def __eq__(self, other):
        if not isinstance(other, TokenFrequencies):
            return NotImplemented
        return numpy.array_equal(self.values, other.values)

    def __hash__(self):
        return hash(self.values.tobytes())

    def __repr__(self):
        return f"TokenFrequencies({len(self.values)} tokens)"

    def __setstate__(self, state):  # a copied or unpickled array can be written to
        self.__dict__.update(state)
        self.values.setflags(write=False)
