#!/usr/bin/env python3
"""Proves that the checks can fail: puts known mistakes into kernels and expects the cases to notice.

    python csrc/cuda_emulator/seeded_bugs.py [FILTER] [--build-dir DIR] [--jobs N]

csrc/cuda_emulator/bugs/NAME.json lists mistakes of NAME.cu, in csrc/ops/cuda, cache/cuda or decode/cuda:
    [{"name": ..., "find": text that is once in the file, "replace": ..., "caught_by": CHECK}]
CHECK is "order" (outputs differ between schedules), "numbers" (an expectation of a case), "sanitizer" (ASan, UBSan),
"race" (races, uninitialised memory) or "accesses" (a budget of sectors or banks). The clean kernels must pass first.
Objects are kept in the build folder; each mistake costs one compilation. Exit status 1 if a mistake is missed.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATOR = CSRC / "cuda_emulator"
SOURCES = [
    "fiber",
    "machine",
    "memory",
    "stream",
    "case",
    "races",
    "places",
    "access_counts",
    "cases/main",
    "cases/host",
]
SOURCES = [EMULATOR / f"{name}.cpp" for name in SOURCES] + [
    f
    for f in sorted(CSRC.glob("ops/cuda/*.cpp"))
    if f.name != "dense_linear.cpp"  # the one that needs cuBLAS
]

COMMON = ["-std=c++20", "-ffp-contract=off", f"-I{CSRC}"]
SANITIZERS = "-fsanitize=address,undefined"


@dataclasses.dataclass(frozen=True)
class Build:
    """Flags of the emulator and of host code; those that kernels and cases have beside them; those of the link."""

    flags: tuple[str, ...]
    watched: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


BUILDS = {
    "plain": Build(("-O2",)),
    "sanitize": Build(("-O1", "-g1", SANITIZERS, "-fno-sanitize-recover=all"), link=(SANITIZERS,)),
    # Vectorised loops would hide the accesses that the source makes.
    "race": Build(
        ("-O2", "-g1", "-fno-tree-vectorize", "-Wno-tsan", "-DDLLM_EMU_RACES"), watched=("-fsanitize=thread",)
    ),
}
# The build that a check needs, and how its failures begin.
CHECKS = {
    "order": ("plain", ("order:", "error:")),
    "numbers": ("plain", ("numbers:", "error:", "fault:")),
    "sanitizer": ("sanitize", ("SUMMARY: AddressSanitizer", "runtime error:", " error:")),
    "race": ("race", ("race:", "error:")),
    "accesses": ("race", ("accesses:",)),
}


@dataclasses.dataclass(frozen=True)
class Bug:
    family: str
    name: str
    find: str
    replace: str
    caught_by: str


class Failure(Exception):
    pass


def run(command, timeout=None):
    env = dict(os.environ, ASAN_OPTIONS="detect_leaks=0")
    try:
        p = subprocess.run(
            command, cwd=ROOT, env=env, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {timeout} s"
    return p.returncode, p.stdout


def kernel_source(family):
    for folder in ("ops", "cache", "decode"):
        source = CSRC / folder / "cuda" / f"{family}.cu"
        if source.exists():
            return source
    raise Failure(f"there is no {family}.cu")


class Builder:
    def __init__(self, folder, compiler):
        self.folder, self.compiler = folder, compiler
        headers = [*CSRC.glob("cuda_emulator/*.h"), *CSRC.glob("*/cuda/*.h"), *CSRC.glob("ops/*.h")]
        headers += [*CSRC.glob("runtime/*.h"), *CSRC.glob("decode/*.h")]
        self.newest_header = max(h.stat().st_mtime for h in headers)

    def compile(self, kind, source, out, watched):
        b = BUILDS[kind]
        newest = max(self.newest_header, source.stat().st_mtime)
        if out.exists() and out.stat().st_mtime > newest:
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        flags = [*COMMON, *b.flags, *(b.watched if watched else ())]
        status, text = run([self.compiler, *flags, *language, "-c", str(source), "-o", str(out)])
        if status:
            raise Failure(f"{source.name} does not compile:\n{text}")
        return out

    def common(self, kind, source):
        return self.compile(kind, source, self.folder / kind / f"{source.stem}.o", False)

    def cases(self, kind, family):
        return self.compile(kind, EMULATOR / f"cases/{family}.cpp", self.folder / kind / f"{family}.cases.o", True)

    def kernels(self, kind, family, source=None):
        source = source or kernel_source(family)
        if source.is_relative_to(CSRC):
            return self.compile(kind, source, self.folder / kind / f"{family}.kernels.o", True)
        return self.compile(kind, source, source.with_suffix(".o"), True)

    def program(self, kind, family, kernels, out):
        # The emulator first: of templates that both use, the linker keeps the first copy, here the unwatched one.
        objects = [self.folder / kind / f"{source.stem}.o" for source in SOURCES]
        objects += [kernels, self.folder / kind / f"{family}.cases.o"]
        status, text = run([self.compiler, *BUILDS[kind].link, *map(str, objects), "-o", str(out), "-ldl"])
        if status:
            raise Failure(f"{out.name} does not link:\n{text}")
        return out


def read_bugs(pattern):
    bugs = []
    for path in sorted((EMULATOR / "bugs").glob("*.json")):
        bugs += [Bug(path.stem, **entry) for entry in json.loads(path.read_text())]
    for b in bugs:
        if b.caught_by not in CHECKS:
            raise Failure(f"{b.family}/{b.name}: caught_by = {b.caught_by!r} is none of {', '.join(CHECKS)}")
    return [b for b in bugs if pattern in f"{b.family}/{b.name}"]


def check_clean(builder, kind, family):
    program = builder.program(kind, family, builder.kernels(kind, family), builder.folder / kind / f"{family}.clean")
    status, text = run([str(program), family + "/"], timeout=600)
    if status:
        raise Failure(f"{family}, {kind} build: the clean kernels fail:\n{text}")


def try_bug(builder, bug):
    """(caught, the first line that says so)"""
    kind, words = CHECKS[bug.caught_by]
    original = kernel_source(bug.family)
    text = original.read_text()
    if text.count(bug.find) != 1:
        return False, f"the text to replace is {text.count(bug.find)} times in {bug.family}.cu"
    folder = builder.folder / "bugs" / bug.family / bug.name.replace(" ", "_").replace("/", "_")
    source = folder / original.relative_to(ROOT)  # reports name what follows csrc/
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text.replace(bug.find, bug.replace))
    try:
        kernels = builder.kernels(kind, bug.family, source)
        program = builder.program(kind, bug.family, kernels, folder / "cases")
    except Failure as e:
        return False, str(e)
    status, output = run([str(program), bug.family + "/"], timeout=300)
    if status == 0:
        return False, "every case passes"
    lines = output.splitlines()
    for line in lines:
        if any(word in line for word in words):
            frames = [x.split("csrc/")[-1] for x in lines if x.lstrip().startswith("#") and f"/{bug.family}.cu:" in x]
            at = f" ({frames[0]})" if frames and bug.caught_by == "sanitizer" else ""
            return True, line.replace("FAILED ", "") + at
    other = [line for line in lines if "FAILED" in line] or lines[-1:] or [f"exit status {status}"]
    return False, "noticed by another check: " + other[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("filter", nargs="?", default="", help="part of FAMILY/NAME")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "seeded_bugs")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--compiler", default=os.environ.get("CXX", "g++"))
    args = parser.parse_args()

    bugs = read_bugs(args.filter)
    needed = sorted({(CHECKS[b.caught_by][0], b.family) for b in bugs})
    builder = Builder(args.build_dir.resolve(), args.compiler)
    with ThreadPoolExecutor(args.jobs) as pool:
        kinds = sorted({kind for kind, _ in needed})
        list(pool.map(lambda task: builder.common(*task), [(k, s) for k in kinds for s in SOURCES]))
        list(pool.map(lambda task: builder.cases(*task), needed))
        list(pool.map(lambda task: check_clean(builder, *task), needed))
        results = list(pool.map(lambda bug: try_bug(builder, bug), bugs))

    missed = 0
    for bug, (caught, line) in zip(bugs, results, strict=True):
        missed += not caught
        verdict = bug.caught_by if caught else "MISSED"
        print(f"{bug.family:14} {bug.name:36} {verdict:10} {line}")
    print(f"{len(bugs) - missed} caught, {missed} missed")
    return 1 if missed or not bugs else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as e:
        sys.exit(str(e))
