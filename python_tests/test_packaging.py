"""The build finds the right torch, asks pip for no second one, and records the truth; one OpenMP runtime is loaded."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_ext import _build_info

BUILD = Path(__file__).parents[1] / "dllm_ext" / "_build"


@pytest.fixture
def target(monkeypatch):
    if not BUILD.is_dir():
        pytest.skip("needs the source tree")
    monkeypatch.syspath_prepend(str(BUILD))
    import target

    return target


def run_python(*args: str) -> str:
    out = subprocess.run([sys.executable, *args], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.mark.parametrize(
    "version, numbers",
    [("2.13.0+cpu", (2, 13, 0)), ("2.6", (2, 6)), ("2.14.0a0+git1", (2, 14)), ("3.25.1", (3, 25, 1)), ("", ())],
)
def test_version_tuple(target, version, numbers):
    assert target.version_tuple(version) == numbers


def test_torch_is_read_without_importing_it(target):
    found = target.find_torch()
    assert found.version == torch.__version__
    assert found.path == Path(torch.__file__).resolve().parent
    assert found.cxx11_abi == int(torch._C._GLIBCXX_USE_CXX11_ABI)
    assert found.cuda == torch.version.cuda


def test_torch_is_found_where_site_packages_are_hidden(target):
    """-S is to this process what pip's build isolation is: the interpreter of the environment, without its packages."""
    code = f"import sys; sys.path.append({str(BUILD)!r}); import target; print(target.find_torch().version)"
    assert run_python("-S", "-c", code).strip() == torch.__version__


def test_torch_is_asked_for_only_where_there_is_none(target, monkeypatch):
    assert not any(r.startswith("torch") for r in target.build_requirements())
    monkeypatch.setattr(target, "_torch_origin", lambda: "")
    assert "torch>=2.6" in target.build_requirements()
    with pytest.raises(SystemExit, match="no torch in this environment"):
        target.require_torch()


def test_old_torch_is_refused(target, monkeypatch, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.5.1+cu124'\ncuda = '12.4'\n")
    monkeypatch.setattr(target, "_torch_origin", lambda: str(tmp_path / "__init__.py"))
    with pytest.raises(SystemExit, match=r"torch 2\.5\.1\+cu124 is installed, and 2\.6 or newer is needed"):
        target.find_torch()


def test_missing_compiler_and_headers_are_named(target, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found.*no-such-compiler"):
        target.require_compiler()
    monkeypatch.setattr(target.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="Python's headers are missing"):
        target.python_include()


def test_build_record_and_pin():
    assert _build_info.TORCH_VERSION.split("+")[0] == torch.__version__.split("+")[0]
    assert int(torch._C._GLIBCXX_USE_CXX11_ABI) == _build_info.CXX11_ABI
    assert sys.implementation.cache_tag == _build_info.PYTHON
    assert "portable" in _build_info.ISAS
    assert _build_info.CUDA or _build_info.CUDA_REASON
    assert f"torch=={torch.__version__.split('+')[0]}" in importlib.metadata.requires("dllm_ext")
    assert importlib.metadata.version("dllm_ext") == _build_info.VERSION


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps")
def test_one_openmp_runtime():
    """A second OpenMP runtime would have threads of its own, which torch.set_num_threads does not govern."""
    maps = run_python("-c", "import torch, dllm_ext._C; print(open('/proc/self/maps').read())")
    runtimes = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[-\w.]*\.so\S*", maps))
    assert len(runtimes) == 1, runtimes
