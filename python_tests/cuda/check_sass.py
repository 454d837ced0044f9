#!/usr/bin/env python3
"""Compiles the CUDA kernels for every architecture and looks at what came out. Needs nvcc, no GPU: nothing runs.

    python python_tests/cuda/check_sass.py            # check against docs/cuda_kernels.md
    python python_tests/cuda/check_sass.py --write    # make that table anew

Fails where
- a kernel does not compile, spills registers, has a stack frame or touches local memory;
- a kernel has over 8 registers more than the table says (ptxas versions differ by a few), or more static shared memory
  or barriers, or is not in the table, or asks for more shared memory than a block may have;
- an instruction is missing that a kernel is written for (tensor cores, asynchronous copies, accesses of 16 bytes), or
  tensor cores appear where arithmetic is to be fp32;
- anything is called but the compiler's own helpers (divisions, roots, warps whose lanes have parted).

The last two, and local memory, are read from SASS by nvdisasm (pip install nvidia-cuda-nvdisasm); without it they are
skipped, and the script says so. That instructions are there does not say that they are fast.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TABLE = ROOT / "docs" / "cuda_kernels.md"
MORE_REGISTERS = 8  # that a kernel may have than the table says

# The slowest first, so that the last job to end is a short one.
SLOWEST = ["attention.cu", "quant_linear.cu"]
# These decide tokens, and must round as the CPU does: no multiply-add that the source does not spell out.
NO_FMAD = {"csrc/cache/cuda", "csrc/decode/cuda"}

# Which architectures one front-end pass serves: its PTX was found to be the same for these, and the kernels never ask
# for __CUDA_ARCH__ (checked below). It takes half of the time of a compilation.
PASSES = {80: (80, 86, 89), 90: (90,), 100: (100, 120)}
SAME_CODE = {86: 89}  # but for how a conversion is spelt: not disassembled, which takes a quarter of the time


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one, from cuda_occupancy.h and the CUDA programming guide. Each has 64 Ki registers in four parts."""

    warps: int
    blocks: int
    shared_kib: int  # a block may have 1 KiB less


ARCHITECTURES = {
    80: Multiprocessor(64, 32, 164),
    86: Multiprocessor(48, 16, 100),
    89: Multiprocessor(48, 24, 100),
    90: Multiprocessor(64, 32, 228),
    100: Multiprocessor(64, 32, 228),
    120: Multiprocessor(48, 24, 100),
}


@dataclass
class Kernel:
    """One instantiation, on all architectures."""

    file: str
    name: str
    args: tuple[str, ...]  # template arguments
    threads: int = 0  # at most, of a block
    registers: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)  # static
    barriers: dict[int, int] = field(default_factory=dict)
    opcodes: dict[int, Counter] = field(default_factory=dict)  # empty without nvdisasm

    @property
    def title(self) -> str:
        return self.name + (f"<{', '.join(self.args)}>" if self.args else "")

    @property
    def type(self) -> str | None:
        return self.args[0] if self.args and self.args[0] in ("fp32", "bf16", "fp16") else None

    @property
    def dynamic_shared(self) -> int:
        return DYNAMIC_SHARED.get(self.name, lambda *_: 0)(*self.args)

    def resident(self, arch: int) -> int:
        """Blocks that fit a multiprocessor at a time, after NVIDIA's cuda_occupancy.h."""
        m, warps = ARCHITECTURES[arch], -(-self.threads // 32)
        registers = round_up(self.registers[arch] * 32, 256)
        shared = round_up(self.shared[arch] + self.dynamic_shared + 1024, 128)  # 1 KiB is the driver's
        by_registers = 16384 // registers * 4 // warps
        return min(m.blocks, m.warps // warps, by_registers, m.shared_kib * 1024 // shared)


def round_up(x: int, to: int) -> int:
    return -(-x // to) * to


# --- What the host asks for ------------------------------------------------------------------------------------------
def quant_shared(_, weights, rows, tiles):
    rows, tiles = int(rows), int(tiles)
    stage = rows * 512 + 8 * tiles * (1024 if weights == "I8" else 544)
    return max(min(4, 99 * 1024 // stage) * stage, 4 * rows * (32 * tiles + 4) * 4)


# The largest dynamic shared memory of a launch, from template arguments: what the launches in the .cu files compute.
DYNAMIC_SHARED: dict[str, Callable[..., int]] = {
    "attention_tile": lambda _, dim, warps, __: (4 * 64 + int(warps) * 16) * int(dim) * 2,
    "head_mean_tile": lambda _, dim, height: 2 * (64 + int(height)) * int(dim) * 2,
    "quant_linear_kernel": quant_shared,
    "row_stats_tile_kernel": lambda: 1024 * 2 * 8 * 4,
    "choose_rows_kernel": lambda: 32768 // 8,  # a bit for each row: of eight sequences of 4096
    "plan_kernel": lambda cache: 8192 * 8 if cache == "D2" else 0,
}

# --- What SASS must have ---------------------------------------------------------------------------------------------
HMMA = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32"}
ASYNC_COPY = "LDGSTS.E.BYPASS.128"
TENSOR_CORES = {"attention_tile", "head_mean_tile", "quant_linear_kernel"}


def row_kernel(loads: Iterable[str], stores: Iterable[str]) -> Callable[[Kernel], list[str]]:
    """Of rows of elements of fp32 or T ("T"), four to an access where the last template argument says so."""

    def needs(k: Kernel) -> list[str]:
        if k.args[-1] != "4":
            return []
        width = {"fp32": "128", "T": "128" if k.type == "fp32" else "64"}
        return [f"LD.{width[x]}" for x in loads] + [f"ST.{width[x]}" for x in stores]

    return needs


# Opcodes by kernel. An instruction serves if it has the parts of one of the alternatives between bars; LD and ST stand
# for global and generic accesses (generic: the pointer itself came from memory).
NEEDS: dict[str, Callable[[Kernel], list[str]]] = {
    # Scores read their fragments in pieces of 16 bytes, not by ldmatrix (attention.cu); V needs its transposing form.
    "attention_tile": lambda k: [HMMA[k.type], "LDSM.16.MT88.4", "LDS.128", ASYNC_COPY, "MUFU.EX2", "STG.E.128"],
    "attention_combine": lambda k: ["LDG.E.128", "LDG.E.64", "MUFU.EX2", "STG.E.64"],
    "attention_f32": lambda k: ["LD.128", "MUFU.EX2"],
    "head_mean_tile": lambda k: [HMMA[k.type], "LDS.128", ASYNC_COPY, "MUFU.EX2"],
    "head_mean_f32": lambda k: ["LD.128", "MUFU.EX2"],
    "quant_linear_kernel": lambda k: [HMMA[k.type], "LDS.128", ASYNC_COPY],
    "quant_linear_f32_kernel": lambda k: ["LDG.E.128.CONSTANT"],
    "embedding_kernel": row_kernel(["T"], ["fp32"]),
    "rms_norm_kernel": row_kernel(["fp32"], ["T"]),
    "rope_kv_write_kernel": row_kernel(["fp32"], ["T"]),
    "silu_mul_kernel": row_kernel(["fp32"], ["T"]),
    "store_and_add_kernel": row_kernel(["fp32"], ["T", "fp32"]),
    "add_kept_kernel": row_kernel(["fp32", "T"], ["fp32"]),
    "verify_values_kernel": row_kernel(["fp32", "T"], ["T"]),
    "rollout_kernel": lambda k: ["LDG.E.128", "STS.128"] if k.args == ("4",) else [],
    "row_stats_tile_kernel": lambda k: ["LDG.E.128"],
}
SPACES = {"LD": ("LD", "LDG"), "ST": ("ST", "STG")}

# What may be called: the compiler's divisions, remainders and roots; its code for shuffles, votes and barriers of a
# warp whose lanes have parted (a branch around it is taken otherwise); and code that it moved out of line in a kernel.
HELPER = re.compile(r"\$__cuda_sm\d+x?_((?:div|rem|dsqrt|sqrt|rcp|drsqrt|shflsync|votesync|warpsync)\w*)$")


def serves(opcode: str, need: str) -> bool:
    base, *parts = opcode.split(".")
    wanted, *wanted_parts = need.split(".")
    return base in SPACES.get(wanted, (wanted,)) and set(wanted_parts) <= set(parts)


# --- Compiling -------------------------------------------------------------------------------------------------------
def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def find_nvdisasm() -> str | None:
    if found := shutil.which("nvdisasm"):
        return found
    package = find_spec("nvidia")
    folders = package.submodule_search_locations if package else []
    return next((str(p) for f in folders or [] for p in sorted(Path(f).glob("*/bin/nvdisasm"))), None)


def kernel_files() -> list[Path]:
    files = [p for folder in ("ops", "cache", "decode") for p in (CSRC / folder / "cuda").glob("*.cu")]
    return sorted(files, key=lambda p: (SLOWEST.index(p.name) if p.name in SLOWEST else 9, p.name))


def enumerators() -> dict[str, str]:
    """Template arguments as the demangler writes them, such as (dllm::CacheKind)1, and their names."""
    names = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
    for header, enum in (("ops/quantize.h", "WeightFormat"), ("decode/config.h", "CacheKind")):
        members = re.search(rf"enum class {enum} {{([^}}]*)}}", (CSRC / header).read_text())[1]
        for i, member in enumerate(members.split(",")):
            names[f"{enum}){i}"] = member.strip()
    return names


@dataclass
class Compiled:
    """What one front-end pass of one file gave."""

    log: str = ""  # of ptxas
    threads: dict[str, int] = field(default_factory=dict)
    sass: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def compile_pass(nvcc: str, nvdisasm: str | None, file: Path, virtual: int, folder: Path) -> Compiled:
    name, result = file.relative_to(ROOT), Compiled()
    ptx = folder / f"{file.stem}.{virtual}.ptx"
    flags = ["-O3", *(["--fmad=false"] if str(name.parent) in NO_FMAD else [])]

    def run(*command) -> str | None:
        done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout + done.stderr
        lines = [x for x in (done.stdout + done.stderr).splitlines() if not x.startswith("ptxas info")]
        result.problems.append(f"{name} for {command[2]}: " + "\n    ".join(lines[-20:]))
        return None

    if run(nvcc, "-ptx", f"-arch=compute_{virtual}", "-std=c++20", *flags, f"-I{CSRC}", name, "-o", ptx) is None:
        return result
    # .maxntid is the kernel's __launch_bounds__, which is also how many threads the host starts, at most.
    for kernel, threads in re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx.read_text(), re.DOTALL):
        result.threads[kernel] = int(threads)
    for arch in PASSES[virtual]:
        cubin = folder / f"{file.stem}.{arch}.cubin"
        log = run(nvcc, "-cubin", f"-arch=sm_{arch}", *flags, "-Xptxas", "-v", ptx, "-o", cubin)
        result.log += log or ""
        if log is not None and nvdisasm and arch not in SAME_CODE:
            result.sass[arch] = run(nvdisasm, "-c", cubin) or ""
    return result


ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)\w*'.*?"
    r"(?P<frame>(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads)"
    r".*?Used (?P<registers>\d+) registers, used (?P<barriers>\d+) barriers"
    r"(?:, \d+ bytes cumulative stack size)?(?:, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*)", re.MULTILINE)


@dataclass
class Report:
    kernels: list[Kernel]
    helpers: dict[str, set[str]]  # by file: what is called
    problems: dict[str, list[str]]  # by check: "compile", "table", "opcodes", "calls"

    def all_problems(self) -> list[str]:
        return list(itertools.chain.from_iterable(self.problems.values()))


def demangle(names: Iterable[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name and template arguments, short."""
    names = sorted(names)
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = enumerators()
    result = {}
    for mangled, full in zip(names, text.splitlines(), strict=True):
        # [void ]namespaces::name[<arguments>](parameters)
        match = re.match(r"(?:void )?(?:[\w ]+::|\(anonymous namespace\)::)*(\w+)(?:<(.*)>)?\([^<>]*\)$", full)
        if not match:
            raise ValueError(f"what kernel is {full}?")
        args = [a.strip() for a in match[2].split(",")] if match[2] else []
        result[mangled] = match[1], tuple(short.get(a.split("::")[-1].lstrip("("), a) for a in args)
    return result


def examine(nvcc: str, nvdisasm: str | None) -> Report:
    """Compiles everything, two jobs at a time."""
    problems: dict[str, list[str]] = {check: [] for check in ("compile", "table", "opcodes", "calls")}
    for source in sorted(CSRC.glob("**/cuda/*.cu")) + sorted(CSRC.glob("**/cuda/*.h")):
        if "__CUDA_ARCH__" in source.read_text():
            problems["compile"].append(f"{source.relative_to(ROOT)} asks for __CUDA_ARCH__: PASSES must be split up")
    jobs = [(file, virtual) for file in kernel_files() for virtual in PASSES]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda job: compile_pass(nvcc, nvdisasm, *job, Path(folder)), jobs))

    kernels: dict[tuple, Kernel] = {}
    helpers: dict[str, set[str]] = defaultdict(set)
    for (file, _), compiled in zip(jobs, done, strict=True):
        problems["compile"] += compiled.problems
        short = demangle(compiled.threads)
        named = {
            mangled: kernels.setdefault((file.name, *name), Kernel(file.name, *name)) for mangled, name in short.items()
        }
        for m in ENTRY.finditer(compiled.log):
            kernel, arch = named[m["name"]], int(m["arch"])
            kernel.threads = compiled.threads[m["name"]]
            kernel.registers[arch] = int(m["registers"])
            kernel.shared[arch] = int(m["shared"] or 0)
            kernel.barriers[arch] = int(m["barriers"])
            if any(int(m[what]) for what in ("stack", "stores", "loads")):
                problems["compile"].append(f"{kernel.title}, sm_{arch}: {m['frame']}")
        for arch, text in compiled.sass.items():
            for section in text.split("\t.section\t.text.")[1:]:
                kernel = named[re.match(r"\w+", section)[0]]
                found = INSTRUCTION.findall(section)
                kernel.opcodes[arch] = Counter(opcode for opcode, _ in found)
                for opcode, operands in found:
                    target = re.search(r"`\((.*?)\)", operands)
                    if not opcode.startswith("CALL") or (target and target[1].startswith(".L_x_")):
                        continue
                    if target and (helper := HELPER.search(target[1])):
                        helpers[file.name].add(helper[1])
                    elif (problem := f"{kernel.title}, sm_{arch}: {opcode}{operands}") not in problems["calls"]:
                        problems["calls"].append(problem)
    result = sorted(kernels.values(), key=lambda k: (k.file, k.name, k.args))
    if nvdisasm:
        problems["opcodes"] = [p for k in result for p in check_opcodes(k)]
    for k in result:
        for arch in k.shared:
            asked, most = k.shared[arch] + k.dynamic_shared, (ARCHITECTURES[arch].shared_kib - 1) * 1024
            if asked > most:
                problems["table"].append(f"{k.title}, sm_{arch}: {asked} bytes of shared memory, a block has {most}")
    return Report(result, helpers, problems)


def check_opcodes(k: Kernel) -> list[str]:
    problems = []
    for arch in k.registers:
        if arch in SAME_CODE:
            continue
        opcodes = k.opcodes.get(arch, Counter())  # none: its section was not found, and all that it needs is missing
        where = f"{k.title}, sm_{arch}: "
        problems += [
            f"{where}no {need}"
            for need in (NEEDS[k.name](k) if k.name in NEEDS else [])
            if not any(serves(opcode, need) for opcode in opcodes)
        ]
        tensor = [o for o in opcodes if "MMA" in o.split(".")[0]]
        if k.name not in TENSOR_CORES:
            problems += [f"{where}{o}, in a kernel without tensor cores" for o in tensor]
        elif k.type == "fp16":
            problems += [f"{where}{o} on fp16" for o in tensor if "BF16" in o]
        if not opcodes:
            problems.append(f"{where}no instructions were found")
        problems += [f"{where}local memory ({o})" for o in opcodes if o.split(".")[0] in ("LDL", "STL")]
    return problems


# --- The table -------------------------------------------------------------------------------------------------------
HEADER = """# Registers, shared memory and resident blocks of the CUDA kernels

Compiled by {version}; **nothing here has run on a GPU**. Written by `python_tests/cuda/check_sass.py --write`, \
checked by `python_tests/test_cuda_sass.py`: a kernel may have up to {more} registers more than here, since ptxas \
versions differ; spills, stack frames and local memory are mistakes. Columns with several numbers are for {archs}; one \
number holds for all. "Dynamic" is the most shared memory in bytes that the host asks for beside the static one; \
"blocks" is how many fit a multiprocessor at a time, which follows from threads, registers and shared memory.
"""


def per_arch(values: dict[int, int]) -> str:
    numbers = [values[a] for a in ARCHITECTURES if a in values]
    return str(numbers[0]) if len(set(numbers)) == 1 else " ".join(map(str, numbers))


def write_table(report: Report, nvcc: str) -> str:
    version = re.search(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    archs = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
    text = HEADER.format(version=f"nvcc {version[1]}", more=MORE_REGISTERS, archs=archs)
    for file, kernels in itertools.groupby(report.kernels, lambda k: k.file):
        calls = ", ".join(f"`{h}`" for h in sorted(report.helpers.get(file, []))) or "nothing"
        text += f"\n## {file}\n\nCalls: {calls}.\n\n"
        text += "| kernel | threads | registers | barriers | static | dynamic | blocks |\n"
        text += "| --- | --: | --: | --: | --: | --: | --: |\n"
        for k in kernels:
            cells = [f"`{k.title}`", str(k.threads), per_arch(k.registers), per_arch(k.barriers), per_arch(k.shared)]
            cells += [str(k.dynamic_shared), per_arch({a: k.resident(a) for a in k.registers})]
            text += f"| {' | '.join(cells)} |\n"
    return text


def read_table(text: str) -> dict[tuple[str, str], list[dict[int, int]]]:
    """(file, kernel): registers, barriers and static shared memory by architecture."""
    table, file = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            file = line[3:]
        elif line.startswith("| `"):
            title, _, *numbers = (cell.strip() for cell in line.strip("|").split(" | "))
            rows = [[int(x) for x in cell.split()] for cell in numbers[:3]]
            rows = [row * len(ARCHITECTURES) if len(row) == 1 else row for row in rows]
            table[file, title.strip("`")] = [dict(zip(ARCHITECTURES, row, strict=True)) for row in rows]
    return table


def compare(report: Report, table: dict) -> list[str]:
    problems = []
    gone = table.keys() - {(k.file, k.title) for k in report.kernels}
    problems += [f"{file}: {title} is in the table but no kernel" for file, title in sorted(gone)]
    for k in report.kernels:
        if (k.file, k.title) not in table:
            problems.append(f"{k.file}: {k.title} is not in the table")
            continue
        registers, barriers, shared = table[k.file, k.title]
        for arch in k.registers:
            for what, now, most in (
                ("registers", k.registers[arch], registers[arch] + MORE_REGISTERS),
                ("barriers", k.barriers[arch], barriers[arch]),
                ("bytes of static shared memory", k.shared[arch], shared[arch]),
            ):
                if now > most:
                    problems.append(f"{k.title}, sm_{arch}: {now} {what}, the table allows {most}")
    if problems:
        problems.append("if that is meant: python python_tests/cuda/check_sass.py --write")
    return problems


def check(nvcc: str, nvdisasm: str | None) -> Report:
    report = examine(nvcc, nvdisasm)
    report.problems["table"] += compare(report, read_table(TABLE.read_text()))
    return report


NO_NVDISASM = "nvdisasm was not found (pip install nvidia-cuda-nvdisasm): SASS is not looked at"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/cuda_kernels.md instead of comparing with it")
    write = parser.parse_args().write
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if not nvcc:
        print("nvcc was not found: nothing is checked")
        return 0
    if not nvdisasm:
        print(NO_NVDISASM)
        if write:
            return 1  # what is called would be missing
    report = examine(nvcc, nvdisasm) if write else check(nvcc, nvdisasm)
    for problem in report.all_problems():
        print(problem)
    if write and all(k.registers.keys() == ARCHITECTURES.keys() for k in report.kernels):  # all did compile
        TABLE.write_text(write_table(report, nvcc))
    for file, helpers in sorted(report.helpers.items()):
        print(f"{file} calls {', '.join(sorted(helpers))}")
    print(f"{len(report.kernels)} kernels, {len(ARCHITECTURES)} architectures, {len(report.all_problems())} problems")
    return 1 if report.all_problems() else 0


if __name__ == "__main__":
    sys.exit(main())
