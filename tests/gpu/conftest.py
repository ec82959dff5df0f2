"""What needs an NVIDIA GPU: `make test-gpu`. Without one everything here is skipped, for one reason."""

import pytest

from cpcompile.measure import NO_GPU, gpu_model


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if gpu_model() is None:
        pytest.skip(f"{NO_GPU}: tests/gpu are run where there is one, by `make test-gpu`")


@pytest.fixture(scope="session")
def capability(gpu: None) -> str:
    """Such as sm89. A torch without CUDA fails here, and says so."""
    import torch

    return "sm{}{}".format(*torch.cuda.get_device_capability())
