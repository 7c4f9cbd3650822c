"""What runs here, and who says so."""

from __future__ import annotations

import pytest
import torch

from tamingfast import backends
from tamingfast.errors import UserError


def test_devices_by_name():
    assert backends.pick_device("cpu") == torch.device("cpu")
    assert backends.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("warp", "cuda:77"):
        with pytest.raises(UserError, match=wrong):
            backends.pick_device(wrong)


def test_facts_for_reports():
    facts = backends.machine()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu"]
    text = backends.describe()
    assert all(name in text for name in backends.KERNELS)
