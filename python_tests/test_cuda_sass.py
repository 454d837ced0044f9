"""What nvcc makes of the CUDA kernels (cuda/check_sass.py). Needs nvcc, no GPU: nothing runs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
import check_sass

NVCC, NVDISASM = check_sass.find_nvcc(), check_sass.find_nvdisasm()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc was not found")]
needs_sass = pytest.mark.skipif(NVDISASM is None, reason=check_sass.NO_NVDISASM)


@pytest.fixture(scope="module")
def report():
    return check_sass.check(NVCC, NVDISASM)


def test_kernels_compile_without_spills_or_stack_frames(report):
    assert not report.problems["compile"]


def test_registers_and_shared_memory_are_within_the_table(report):
    assert not report.problems["table"]


@needs_sass
def test_sass_has_the_instructions_that_kernels_are_written_for(report):
    assert not report.problems["opcodes"]


@needs_sass
def test_nothing_is_called_but_the_compilers_helpers(report):
    assert not report.problems["calls"]
