"""Settings of the whole suite."""

import pytest
import torch

# The helpers that hold assertions explain a failure like a test does.
pytest.register_assert_rewrite("laws", "references", "tolerances")

# Problems are tiny: threads only wait for each other, and tests run side by side.
torch.set_num_threads(1)


@pytest.fixture
def tf32():
    """Yield what says whether torch rounds to TF32; set back at the end."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield backends
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed
