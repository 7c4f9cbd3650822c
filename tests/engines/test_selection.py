"""Which engine is chosen to sample, and the reasons why others are not."""

from __future__ import annotations

import pytest
import torch

from tamingfast.engines import CudaEngine
from tamingfast.engines.selection import choose_engine, log_once
from tamingfast.errors import UserError
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends


class OnAGpu(GPT):
    """Says so, as far as the choice of a backend asks."""

    def parameters(self, recurse: bool = True):
        real = super().parameters(recurse)
        return iter([type("P", (), dict(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32))(), *real])


def test_a_gpu_without_the_engine_falls_back_and_says_why_once(monkeypatch, caplog):
    monkeypatch.setattr(CudaEngine, "refusal", lambda gpt: "built without CUDA (nvcc was not found)")
    gpt = OnAGpu(24, 40, n_layer=1, n_head=2, n_embd=16)
    log_once.cache_clear()
    with caplog.at_level("WARNING", logger="tamingfast.engines.selection"):
        for _ in range(2):
            assert choose_engine("auto", gpt, None) == ("torch", "float32")
    assert [record.message for record in caplog.records] == [
        "Sampling runs in torch instead of the CUDA engine: built without CUDA (nvcc was not found)."
    ]
    with pytest.raises(UserError, match="engine: got 'native', which cannot run here .built without CUDA"):
        choose_engine("native", gpt, None)
    monkeypatch.setattr(CudaEngine, "refusal", lambda gpt: None)
    assert choose_engine("auto", gpt, "float16") == ("native", "float16")
    with pytest.raises(UserError, match="only the native engine has it .it has no int8 weights"):
        choose_engine("auto", gpt, "int8")
    with backends.use("reference"):
        assert choose_engine("auto", gpt, None) == ("torch", "float32")
