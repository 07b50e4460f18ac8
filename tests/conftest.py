"""Settings of the whole suite."""

import pytest
import torch

# The helpers that hold assertions explain a failure like a test does.
pytest.register_assert_rewrite("laws", "references", "tolerances")

# Problems are tiny: threads only wait for each other, and tests run side by side.
torch.set_num_threads(1)
