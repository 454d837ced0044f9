"""The settings of the sweep. A setting's name is its definition: CACHE/BLOCK/DECODER.

    prefix/32/t=0.9                prefix cache, blocks of 32, Fast-dLLM's threshold 0.9
    dllm:kp=50,kr=7/32/k=1         dLLM-Cache with its own parameters, one token per step
    d2:inflate_w=0/G/k=1           d2Cache in one block of the whole generation
    none/32/kl=0.01,t=0.9          KLASS

CACHE is none, prefix, dual, dllm or d2, with :NAME=VALUE,... for its parameters. BLOCK is a number, or G for the length
of the generation. DECODER is NAME=VALUE,...: k (num_transfer_tokens), t (threshold), f (factor), eb (gamma), kl
(kl_threshold), or any other field of GenerationConfig. So --settings takes any setting, in the grid or not.

Nothing here needs the engine, so that raw data can be drawn where it is not installed.
"""

CACHES = ("none", "prefix", "dual", "dllm", "d2")
SHORT = {"k": "num_transfer_tokens", "t": "threshold", "f": "factor", "eb": "gamma", "kl": "kl_threshold"}
DECODERS = {  # by the first of these that a setting has; the order matters for KLASS, which has a threshold as well
    "kl_threshold": "KLASS",
    "gamma": "EB-sampler",
    "factor": "factor",
    "threshold": "threshold",
    "num_transfer_tokens": "tokens per step",
}
BASELINE = "none/32/k=1"

# What a paper, its released program or this engine does unless told otherwise, on a task like GSM8K.
PUBLISHED = {
    "none/G/k=1,stop_at_eos=false": "LLaDA, plain loop",
    "none/32/k=1": "LLaDA, semi-autoregressive",
    "prefix/32/t=0.9": "Fast-dLLM, prefix cache; this engine's default",
    "dual/32/t=0.9": "Fast-dLLM, dual cache",
    "prefix/32/f=1.0": "Fast-dLLM, factor",
    "dllm:kp=50,kr=7/32/k=1": "dLLM-Cache, LLaDA-Instruct",
    "dllm:kp=25,kr=5/G/k=1": "dLLM-Cache, LLaDA-Base",
    "d2:inflate_w=0/G/k=1": "d2Cache",
    "d2:inflate_w=4/32/k=1": "d2Cache, semi-autoregressive",
    "none/32/eb=0.001": "EB-sampler",
    "none/32/kl=0.01,t=0.9": "KLASS",
}

GRID = [
    # one token per step: exact but for the cache. The slowest settings, so few of them without a cache
    "none/G/k=1,stop_at_eos=false",
    "none/32/k=1",
    "prefix/32/k=1",
    "dual/32/k=1",
    "dual/8/k=1",
    "dllm:kp=50,kr=2/32/k=1",
    "dllm:kp=50,kr=7/32/k=1",
    "dllm:kp=25,kr=5/G/k=1",
    "dllm:kp=50,kr=7,rou=0/32/k=1",
    "d2:inflate_w=0/G/k=1",
    "d2:inflate_w=4/32/k=1",
    "d2:current_k=16,inflate_w=0/G/k=1",
    "d2:inflate_w=0/G/k=1,sigma=0",
    # a fixed number of tokens per step
    "prefix/32/k=2",
    "dual/32/k=2",
    "dllm:kp=50,kr=2/32/k=2",
    "d2:inflate_w=0/G/k=2",
    "prefix/32/k=4",
    "dual/32/k=4",
    "dual/32/k=4,sigma=10.0",
    "dual/G/k=4,sigma=10.0",
    "d2:inflate_w=0/G/k=4",
    "d2:inflate_w=0/G/k=8",
    # Fast-dLLM's threshold, by cache
    "none/32/t=0.9",
    *(f"prefix/32/t={t}" for t in (0.5, 0.7, 0.8, 0.9, 0.95)),
    *(f"dual/32/t={t}" for t in (0.5, 0.7, 0.8, 0.9, 0.95)),
    *(f"d2:inflate_w=4/32/t={t}" for t in (0.7, 0.9, 0.95)),
    *(f"d2:inflate_w=0/G/t={t}" for t in (0.5, 0.7, 0.8, 0.9, 0.95)),
    "dual/32/t=0.99",
    "d2:inflate_w=0/G/t=0.99",
    "d2:current_k=16,inflate_w=0/G/t=0.9",
    "d2:current_k=64,inflate_w=0/G/t=0.9",
    "dllm:kp=50,kr=1/32/t=0.9",
    "dllm:kp=50,kr=2/32/t=0.9",
    "dllm:kp=50,kr=2,rou=0.5/32/t=0.9",
    # and by block
    *(f"{cache}/{block}/t=0.9" for cache in ("prefix", "dual") for block in (8, 16, 64)),
    "dual/16/t=0.7",
    "dual/64/t=0.95",
    # Fast-dLLM's factor
    "prefix/32/f=1.0",
    "dual/32/f=1.0",
    "dual/32/f=0.5",
    "dual/32/f=2.0",
    "dual/64/f=0.5",
    "d2:inflate_w=0/G/f=1.0",
    "d2:inflate_w=0/G/f=0.5",
    "d2:inflate_w=0/G/f=2.0",
    # EB-sampler
    "none/32/eb=0.001",
    "dual/32/eb=0.001",
    "dual/32/eb=0.1",
    "dual/64/eb=0.5",
    "d2:inflate_w=0/G/eb=0.1",
    # KLASS
    "none/32/kl=0.01,t=0.9",
    "dual/32/kl=0.01,t=0.9",
    "prefix/32/kl=0.01,t=0.7",
]


def split(name: str) -> tuple[str, dict, str, dict]:
    """A name's cache, the cache's parameters, its block and its decoder's fields. ValueError where it has none."""
    parts = name.split("/")
    if len(parts) != 3:
        raise ValueError("it is not CACHE/BLOCK/DECODER")
    cache, _, listed = parts[0].partition(":")
    if cache not in CACHES:
        raise ValueError(f"there is no cache {cache!r} (only {', '.join(CACHES)})")
    if parts[1] != "G" and not parts[1].isdecimal():
        raise ValueError(f"the block {parts[1]!r} is no number, nor G")
    return cache, _pairs(listed), parts[1], {SHORT.get(key, key): value for key, value in _pairs(parts[2]).items()}


def kind(fields: dict) -> str:
    """What decides how many tokens a step commits: one of DECODERS' values."""
    label = next((label for field, label in DECODERS.items() if field in fields), None)
    if label is None:
        raise ValueError(f"no decoder: one of {', '.join(SHORT)} is needed")
    return label


def _pairs(text: str) -> dict:
    return {key: _value(value) for key, _, value in (pair.partition("=") for pair in text.split(",") if pair)}


def _value(text: str):
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
