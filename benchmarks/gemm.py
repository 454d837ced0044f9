"""linear() against PyTorch, plain and with prepacked weights, by rows; also the machine's own limits.

    python benchmarks/gemm.py                                          two-minute table
    python benchmarks/gemm.py --dtypes bfloat16 --rows 1 32 --isa avx2
    python benchmarks/gemm.py --threads 1 --cpu-time                   on a machine that is busy with something else

Every layer has several copies of its weights, more than the last-level cache holds, visited in turn, as in a model. The
contenders take turns too, so that a change of clock or load hits all of them. Printed: the median, the spread from the
first to the ninth decile as a percentage of it, and the fraction of the machine's limit that binds at that row count:
multiply-adds of the best large torch GEMM, or bytes of the best read. Medians are of wall time unless --cpu-time.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F

from dllm_ext import _C

ops = _C.ops
SHAPES = [(2048, 2048), (2048, 6144), (2048, 32000)]  # k, n
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 320)
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtypes", nargs="+", default=list(TORCH), choices=list(TORCH))
    p.add_argument("--rows", nargs="+", type=int, default=ROWS)
    p.add_argument("--shapes", nargs="+", default=[f"{k}x{n}" for k, n in SHAPES], help="KxN")
    p.add_argument("--isa", default="auto")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seconds", type=float, default=0.6, help="per contender and line")
    p.add_argument("--cpu-time", action="store_true", help="CPU time of the calling thread (needs --threads 1)")
    p.add_argument("--cache-bytes", type=float, default=128e6, help="weights of a layer's copies together")
    args = p.parse_args()
    if args.cpu_time and args.threads != 1:
        p.error("--cpu-time needs --threads 1")
    return args


def measure(contenders, seconds, clock):
    """Times of each contender, called in turn: {name: array of seconds}."""
    times = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in contenders.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: np.array(t) for name, t in times.items()}


def array(t):
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def prepacked(weight, rows):
    """The weight as PyTorch's compiler would freeze it, and the call that uses it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def limits(dtype, clock):
    """GFLOP/s of the best large torch GEMM, and GB/s of the best read."""
    x, w = torch.randn(512, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    gemm = prepacked(w, 512)
    data = torch.zeros(2**25, dtype=torch.int64)
    t = measure({"gemm": lambda: gemm(x), "read": lambda: data.sum()}, 1.0, clock)
    return 2e-9 * 512 * 2048 * 2048 / t["gemm"].min(), 1e-9 * data.nbytes / t["read"].min()


class Layer:
    """Copies of one [n, k] weight for every contender."""

    def __init__(self, k, n, dtype, cache_bytes):
        self.k, self.n, self.dtype = k, n, dtype
        self.bytes = n * k * (4 if dtype == "float32" else 2)
        self.plain = [torch.randn(n, k).to(TORCH[dtype]) for _ in range(max(2, int(-(-cache_bytes // self.bytes))))]
        self.ours = [ops.PackedLinear([array(w)], dtype) for w in self.plain]
        self.turn = 0

    def next(self, copies):
        self.turn += 1
        return copies[self.turn % len(copies)]

    def contenders(self, rows):
        x = torch.randn(rows, self.k).to(TORCH[self.dtype])
        mine = np.empty((rows, ops.activation_stride(self.k, self.dtype)), array(x).dtype)[:, : self.k]
        mine[:] = array(x)
        out = np.empty((rows, self.n), mine.dtype)
        frozen = [prepacked(w, rows) for w in self.plain]
        return {
            "dllm": lambda: ops.linear(self.next(self.ours), mine, out),
            "torch": lambda: F.linear(x, self.next(self.plain)),
            "prepacked": lambda: self.next(frozen)(x),
        }


def main():
    args = arguments()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    ops.set_isa(args.isa)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    print(f"{ops.current_isa()}, {args.threads} threads, {'CPU' if args.cpu_time else 'wall'} time")
    for dtype in args.dtypes:
        flops, read = limits(TORCH[dtype], clock)
        print(f"\n{dtype}: limits {flops:.0f} GFLOP/s (torch, 512 rows), {read:.1f} GB/s (read)")
        for shape in args.shapes:
            k, n = map(int, shape.split("x"))
            layer = Layer(k, n, dtype, args.cache_bytes)
            heading = "dllm: GFLOP/s  spread   GB/s  of limit | torch    prepacked | faster than each"
            print(f"  {k} x {n}".ljust(20) + heading)
            for rows in args.rows:
                t = measure(layer.contenders(rows), args.seconds, clock)
                work = 2e-9 * rows * k * n
                median = {name: float(np.median(v)) for name, v in t.items()}
                low, high = np.quantile(t["dllm"], [0.1, 0.9])
                roof = max(work / flops, 1e-9 * layer.bytes / read)
                print(
                    f"  {rows:4d} rows             {work / median['dllm']:9.1f}   {(high - low) / median['dllm']:5.0%}"
                    f"  {1e-9 * layer.bytes / median['dllm']:5.1f}     {roof / median['dllm']:4.0%}  |"
                    f" {work / median['torch']:6.1f}   {work / median['prepacked']:6.1f}    |"
                    f" {median['torch'] / median['dllm']:5.2f}x {median['prepacked'] / median['dllm']:5.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
