"""The kernels in a model of somebody else: its attention, group norms and quantiser are exchanged, its weights stay.

    python examples/kernels_in_your_model.py             # compares both on this machine
    python examples/kernels_in_your_model.py --device cuda

The classes of the first part stand for a model that knows nothing of this package. `exchange` replaces what it finds
there by modules with the same parameters under the same names, so that checkpoints of either open in the other.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tamingfast import ops

# --- somebody's model, in plain torch -----------------------------------------------------------------------------


class Quantiser(nn.Module):
    """The nearest code of each vector, by the matrix of all distances."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, width))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = z.movedim(1, -1)
        indices = torch.cdist(rows.reshape(-1, z.shape[1]), self.codebook).argmin(1)
        codes = self.codebook[indices].view(rows.shape).movedim(-1, 1)
        loss = (codes.detach() - z).square().mean() + (codes - z.detach()).square().mean()
        return z + (codes - z).detach(), indices, loss


class Attention(nn.Module):
    """Causal attention, by the matrix of all scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).movedim(1, 2).flatten(2))


class Theirs(nn.Module):
    """Images (B, 3, H, W) to tokens, and a score for the order of these."""

    def __init__(self, width: int = 64, codes: int = 512) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4), nn.GroupNorm(32, width, eps=1e-6), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(32, width, eps=1e-6), nn.SiLU(),
        )  # fmt: skip
        self.quantiser = Quantiser(codes, width)
        self.attention = Attention(width, heads=4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, loss = self.quantiser(self.encoder(x))
        return self.attention(codes.flatten(2).mT), indices, loss


# --- the same modules on the kernels --------------------------------------------------------------------------------


class FusedQuantiser(Quantiser):
    """No matrix of distances: memory for the vectors and the codes alone, and the nearest code without rounding."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, to_codes, to_latents, _ = ops.quantize(z, self.codebook)
        return codes, indices, to_codes + to_latents


class FusedAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.causal_attention(q, k, v)


class FusedNorm(nn.GroupNorm):
    """Group normalisation together with the SiLU behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


def exchange(model: nn.Module) -> nn.Module:
    """A copy of a model in which the kernels do the work of the modules that they can replace."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is Quantiser:
            module.__class__ = FusedQuantiser  # the parameters are the same, and so are their names
        elif type(module) is Attention:
            module.__class__ = FusedAttention
        elif isinstance(module, nn.Sequential):
            for number, (norm, behind) in enumerate(zip(module, list(module)[1:], strict=False)):
                if type(norm) is nn.GroupNorm and isinstance(behind, nn.SiLU):
                    norm.__class__ = FusedNorm
                    module[number + 1] = nn.Identity()
    return model


# --- comparison -----------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens, and the gradient of each parameter."""
    model.zero_grad()
    scores, indices, loss = model(x)
    (scores.square().mean() + loss).backward()
    return indices, {name: parameter.grad for name, parameter in model.named_parameters()}


def seconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """The shortest of some runs."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=128, help="side of the images")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    theirs = Theirs().to(options.device)
    ours = exchange(theirs)
    ours.load_state_dict(theirs.state_dict())  # the names are the same
    x = torch.rand(4, 3, options.size, options.size, device=options.device) * 2 - 1
    (tokens, expected), (found, got) = gradients(theirs, x), gradients(ours, x)
    print(f"tokens that are the same: {(tokens == found).float().mean():.2%}")
    apart = max(float((got[name] - grad).norm() / grad.norm()) for name, grad in expected.items())
    print(f"gradients differ by at most: {apart:.1e} of their norm")
    times = [seconds(lambda m=m: gradients(m, x), options.device, options.rounds) for m in (theirs, ours)]
    print(f"forward and backward: {times[0] * 1e3:.1f} ms in plain torch, {times[1] * 1e3:.1f} ms on the kernels")


if __name__ == "__main__":
    main()
