"""The programs that compare.py runs, and what each one has to offer.

A program is a module of this package with a class `Peer`, loaded in a process of its own (worker.py):

    Peer(folder, precision, threads, **options)     loads the model; the driver times it
    caches: tuple[str, ...]                         policies that generate() takes; ("none",): it has no cache
    partial_rows: bool                              forward() can compute some rows; False: it is asked for all only
    forward(rows, keys, repeats) -> list[float]     seconds of forwards of the last `rows` of `keys` positions, the
                                                    logits of all these rows included (this engine: their statistics)
    generate(prompt, gen_length, block_length, per_step, cache) -> dict
                                                    token_ids and nfe; greedy, low confidence, `per_step` tokens a step

If Program.converts, the module also has prepare(folder, precision, scratch, **options), which writes what Peer reads.
"""

from dataclasses import dataclass, field

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
CACHES = ("none", "prefix", "dual", "dllm", "d2")


@dataclass(frozen=True)
class Program:
    """One line of the tables. `precision` is its class: it is compared with the engine's variant of the same class."""

    name: str
    module: str
    precision: str
    options: dict = field(default_factory=dict, hash=False)
    path_option: str | None = None
    """The command line option that says where its source is; without it the program is listed as not given."""

    converts: bool = False
    """It reads weights in a form of its own, made before anything is timed."""

    copies: int = 1
    """Of its weights, in memory at once while it loads."""

    @property
    def is_engine(self) -> bool:
        return self.module == "engine"


def _programs():
    for precision, short in zip(PRECISIONS, ("fp32", "bf16", "int8", "int4"), strict=True):
        yield Program(f"dllm_ext {short}", "engine", precision)
    for precision, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        yield Program(f"torch {short}", "pytorch", precision, copies=2)
        yield Program(f"torch prepacked {short}", "pytorch", precision, {"prepack": True}, copies=2)
    yield Program("transformers bf16", "transformers_llama", "bfloat16")
    for precision, kind in (("bfloat16", "BF16"), ("int8", "Q8_0"), ("int4", "Q4_0")):
        for name, architecture in ((f"llama.cpp {kind}", "llama"), (f"llama.cpp llada {kind}", "llada")):
            options = {"kind": kind, "architecture": architecture}
            yield Program(name, "llama_cpp", precision, options, converts=True)
    yield Program("Fast-dLLM bf16", "fast_dllm", "bfloat16", path_option="fast_dllm")
    yield Program("d2Cache bf16", "d2cache", "bfloat16", path_option="d2cache")
    yield Program("dLLM-Cache bf16", "dllm_cache", "bfloat16", path_option="dllm_cache")


PROGRAMS = {p.name: p for p in _programs()}
