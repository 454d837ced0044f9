"""Runs CMake and Ninja for setuptools. Project metadata is in pyproject.toml; what is built is in CMakeLists.txt.

Environment: CXX (compiler), CUDACXX or CUDA_HOME (nvcc), TORCH_CUDA_ARCH_LIST (csrc/cuda.cmake), MAX_JOBS (parallel
compilations), DLLM_CMAKE_ARGS (more arguments for cmake; -DDLLM_WITH_CUDA=OFF builds for CPUs alone).
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "dllm_ext" / "_build"))
import target  # noqa: E402

DEPENDENCIES = [
    "huggingface_hub",
    "numpy",
    "rich",
    "safetensors",
    "transformers>=4.46",
    "typer>=0.15",
]


def torch_requirement() -> str:
    """The extension calls libtorch's C++ symbols, which torch keeps only within one release."""
    torch = target.find_torch()
    return f"torch=={torch.public_version}" if torch else "torch>=" + ".".join(map(str, target.MIN_TORCH))


def run(command: list) -> None:
    print("+", shlex.join(map(str, command)), flush=True)
    if subprocess.run(command).returncode != 0:
        raise target.BuildError(f"{Path(command[0]).name} failed: its messages are above.")


class CMakeBuild(build_ext):
    def run(self):
        torch = target.require_torch()
        target.python_include()
        target.require_compiler()
        cmake, ninja = target.find_tool("cmake", target.MIN_CMAKE), target.find_tool("ninja")
        if not cmake or not ninja:
            raise target.BuildError("cmake 3.24 or newer and ninja are needed: pip install cmake ninja")

        # One folder for each Python and torch, kept between builds: only what changed is compiled again.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.version}"
        build.mkdir(parents=True, exist_ok=True)
        with open(build / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}", *shlex.split(os.environ.get("DLLM_CMAKE_ARGS", ""))]
            run(configure)
            jobs = os.environ.get("MAX_JOBS")
            goals = ["package", "tools"] if self.in_place() else ["package"]
            run([ninja, "-C", build, *(["-j", jobs] if jobs else []), *goals])
            self.install(build / "package")
        # A second name for the folder built last, to type: ninja -C build/current
        current = ROOT / "build" / "current"
        current.unlink(missing_ok=True)
        current.symlink_to(build.name)

    def in_place(self) -> bool:
        """For `pip install -e`: the package stays here, and the native tools are wanted too (build/current/bin)."""
        return self.inplace or self.editable_mode

    def install(self, built: Path) -> None:
        package = ROOT / "dllm_ext" if self.in_place() else Path(self.build_lib) / "dllm_ext"
        package.mkdir(parents=True, exist_ok=True)
        for source in built.iterdir():
            destination = package / source.name
            destination.unlink(missing_ok=True)
            if self.in_place():  # a link, so that `ninja` alone updates an editable install
                destination.symlink_to(os.path.relpath(source, package))
            else:
                shutil.copy2(source, destination)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    install_requires=sorted([*DEPENDENCIES, torch_requirement()]),
    ext_modules=[Extension("dllm_ext._C", sources=[])],  # makes the wheel platform-specific; CMake knows the sources
    cmdclass={"build_ext": CMakeBuild},
    options={"build": {"build_base": "build/wheel"}},
)
