"""What can only go wrong on a GPU. Without one these tests are skipped; SFC_TEST_DEVICE=cpu runs them on the CPU, which
says that the tests work, and nothing of CUDA.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """What is compared with the CPU."""
    name = os.environ.get("SFC_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return name
