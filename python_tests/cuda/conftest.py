"""One body for every kernel test: the emulated device, and with a GPU the real one (pytest -m gpu)."""

import cuda_support
import pytest


@pytest.fixture(scope="session", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request):
    """The kernels of ops/cuda on a device: see csrc/bindings/cuda/cuda_ops.cpp."""
    return cuda_support.device(request.param)
