"""Tests that need an NVIDIA GPU, run by `make test-gpu`. Without one they are all skipped for the same reason."""

import pytest

from cpcompile.machine.gpu import NO_GPU, gpu_model


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Not a fixture: pytest reports those test by test, and this as the one reason that it is."""
    if gpu_model() is None:
        pytest.skip(f"{NO_GPU}: tests/gpu are run where there is one, by `make test-gpu`")


@pytest.fixture(scope="session")
def capability() -> str:
    """The compute capability, such as sm89; a torch without CUDA fails here and says so."""
    import torch

    return "sm{}{}".format(*torch.cuda.get_device_capability())
