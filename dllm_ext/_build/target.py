"""What dllm_ext is built against: the torch and the Python of the environment it is installed into.

With build isolation, pip runs a build with the target environment's interpreter but hides its site-packages, so torch
is looked for twice: among what this process can import, then among what the same interpreter can import without pip's
isolation. Torch is never imported here: its headers, libraries and version.py are enough.

    python dllm_ext/_build/target.py     prints the answers as CMake code, for CMakeLists.txt
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 6)
MIN_CMAKE = (3, 24)

_FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"


class BuildError(SystemExit):
    """Ends the build with a message instead of a traceback."""

    def __init__(self, message: str):
        super().__init__(f"\ndllm_ext: {message}\n")


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0a0+cpu" is (2, 13)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


@dataclass(frozen=True)
class Torch:
    path: Path
    version: str  # with its local part: 2.13.0+cpu
    cuda: str | None

    @property
    def public_version(self) -> str:
        return self.version.split("+")[0]

    @property
    def lib(self) -> Path:
        return self.path / "lib"

    @property
    def cxx11_abi(self) -> int:
        """Which std::string torch was compiled with, read off one of its exported functions."""
        return int(b"_ZN3c106detail14torchCheckFailEPKcS2_jRKSs" not in (self.lib / "libc10.so").read_bytes())

    @property
    def libgomp(self) -> Path | None:
        """The OpenMP runtime that torch brings along, under whatever name."""
        return next(iter(sorted(self.lib.glob("libgomp*.so*"))), None)


def _torch_origin() -> str:
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return spec.origin
    # The two variables by which pip hides the target's site-packages and user site.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    out = subprocess.run([sys.executable, "-c", _FIND_TORCH], env=env, cwd=os.sep, capture_output=True, text=True)
    return out.stdout.strip()


def find_torch() -> Torch | None:
    origin = _torch_origin()
    if not origin:
        return None
    path = Path(origin).resolve().parent
    version = runpy.run_path(str(path / "version.py"))
    torch = Torch(path, str(version["__version__"]), version.get("cuda"))
    if version_tuple(torch.version) < MIN_TORCH:
        raise BuildError(
            f"torch {torch.version} is installed, and {'.'.join(map(str, MIN_TORCH))} or newer is needed.\n"
            "Upgrade it (pip install --upgrade torch), then install dllm_ext again."
        )
    return torch


def require_torch() -> Torch:
    torch = find_torch()
    if torch is None:
        raise BuildError(
            f"no torch in this environment ({sys.prefix}).\n"
            "Install torch first, or leave out --no-build-isolation: pip then fetches it for the build."
        )
    if not (torch.path / "include" / "ATen" / "Parallel.h").is_file():
        raise BuildError(f"the torch in {torch.path} comes without its C++ headers. Install torch's own wheel.")
    return torch


def python_include() -> Path:
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise BuildError(
            f"Python's headers are missing: there is no {include}/Python.h.\n"
            f"Install them (Debian, Ubuntu: apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev; "
            "Fedora: dnf install python3-devel), then try again."
        )
    return include


def require_compiler() -> None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise BuildError(
            f"no C++ compiler found (looked for {', '.join(names)}).\n"
            "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or name one in CXX."
        )


def find_tool(name: str, minimum: tuple[int, ...] = ()) -> str | None:
    """cmake or ninja that runs and is new enough: the target environment's, else one on PATH.

    In this order so that it is the same one with and without build isolation, in an activated environment and outside:
    when another version of ninja comes to a build folder, it compiles everything again.
    """
    candidates = [
        os.path.join(sysconfig.get_path("platlib"), name, "data", "bin", name),
        os.path.join(sysconfig.get_path("scripts"), name),
        shutil.which(name),
    ]
    for exe in candidates:
        if not exe or not os.access(exe, os.X_OK):
            continue
        # A script of a Python package finds its package hidden under build isolation: only running it tells.
        out = subprocess.run([exe, "--version"], capture_output=True, text=True)
        words = out.stdout.split("\n")[0].split()
        if out.returncode == 0 and words and version_tuple(words[-1]) >= minimum:
            return exe
    return None


def build_requirements() -> list[str]:
    """What a build lacks and pip can fetch. What it cannot fetch is said here, before torch is under way."""
    require_compiler()
    python_include()
    needed = []
    if find_torch() is None:
        needed.append(f"torch>={'.'.join(map(str, MIN_TORCH))}")
    if find_tool("cmake", MIN_CMAKE) is None:
        needed.append(f"cmake>={'.'.join(map(str, MIN_CMAKE))}")
    if find_tool("ninja") is None:
        needed.append("ninja")
    return needed


def as_cmake() -> str:
    torch = require_torch()
    values = {
        "TORCH_DIR": torch.path.as_posix(),
        "TORCH_VERSION": torch.version,
        "TORCH_CXX11_ABI": torch.cxx11_abi,
        "TORCH_CUDA": torch.cuda or "",
        "TORCH_LIBGOMP": torch.libgomp.as_posix() if torch.libgomp else "",
        "SITE_TORCH_LIB": (Path(sysconfig.get_path("purelib")) / "torch" / "lib").as_posix(),
        "PYTHON_INCLUDE": python_include().as_posix(),
        "PYTHON_TAG": sys.implementation.cache_tag,
        "PYTHON_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }
    return "".join(f"set({key} [==[{value}]==])\n" for key, value in values.items())


if __name__ == "__main__":
    print(as_cmake(), end="")
