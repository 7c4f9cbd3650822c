"""Quantisers of today for `tamingfast.models.vqgan.VQModel`, chosen by its ``quantizer_config``.

What using a model needs of each is a table of codes under the original's key ``quantize.embedding.weight``. That table
is what `Quantizer.fold` leaves of it in exported weights, and what each of the classes opens again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.models.quantize import Quantised, Quantizer, VectorQuantizer, as_grid
from tamingfast.models.shared import averaged, sum_over_processes, take_from_first_process
from tamingfast.ops.reference import Quantized

#: How the gradient of a code reaches the latent that it replaces.
GRADIENTS = ("straight_through", "rotation")
_EPS = 1e-12
_MOST_BITS = 62  # of a token, an int64


def rotated(z: Tensor, codes: Tensor) -> Tensor:
    """``codes``, with the gradient of the rotation trick for ``z``, both (B, D, *) (Fifty et al. 2024, section 4).

    A code q is taken as |q|/|z| R z, where R, which rotates z onto q, and the factor are constants: the gradient at the
    code is turned with it onto the latent, instead of copied. R = 1 - 2 r r^T + 2 q^ z^T, for the unit vectors q^ and
    z^ and r = (q^ + z^) / |q^ + z^|.
    """
    codes, fixed = codes.detach(), z.detach()
    unit_z, unit_q = (F.normalize(value, dim=1, eps=_EPS) for value in (fixed, codes))
    r = F.normalize(unit_z + unit_q, dim=1, eps=_EPS)
    scale = codes.norm(dim=1, keepdim=True) / fixed.norm(dim=1, keepdim=True).clamp(min=_EPS)
    turned = z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * unit_q * (unit_z * z).sum(1, keepdim=True)
    turned = scale * turned
    return codes + (turned - turned.detach())  # exactly the code


class TableQuantizer(VectorQuantizer):
    """A `VectorQuantizer` with another gradient, or whose unused codes start again.

    ``gradient`` is one of `GRADIENTS`. With ``restart_below`` t, a code whose share of the latents, averaged over
    passes in training mode with ``restart_decay``, falls below t / n_embed, t times what it has if all are equally
    frequent, becomes a random latent of the current pass, as in Jukebox (Dhariwal et al. 2020, section 3.1).
    """

    usual_rule: ClassVar[str] = "nearest"
    usage: Tensor

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        beta: float = 0.25,
        legacy: bool = True,
        sane_index_shape: bool = False,
        gradient: str = GRADIENTS[0],
        restart_below: float | None = None,
        restart_decay: float = 0.99,
    ):
        super().__init__(
            n_embed, embed_dim, beta, legacy=legacy, sane_index_shape=sane_index_shape, rule=self.usual_rule
        )
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: got {gradient!r}, expected {' or '.join(GRADIENTS)}")
        if restart_below is not None and not 0 < restart_below < 1:
            raise ValueError(f"restart_below: got {restart_below}, expected a number between 0 and 1, or None")
        if not 0 <= restart_decay < 1:
            raise ValueError(f"restart_decay: got {restart_decay}, expected a number from 0 to below 1")
        self.gradient, self.restart_below, self.restart_decay = gradient, restart_below, restart_decay
        if restart_below is not None:
            self.register_buffer("usage", torch.full((n_embed,), 1 / n_embed))
            self.register_load_state_dict_pre_hook(_uniform_usage)

    def replaced(self, z: Tensor) -> Quantized:
        """As `VectorQuantizer.replaced`."""
        latents = self.compared(z)
        counting = self.restart_below is not None and self.training
        if counting:
            self._restart(latents.detach())
        z_q, indices, to_codes, to_latents, counts = ops.quantize(latents, self.codes())
        if self.gradient == "rotation":
            z_q = rotated(latents, z_q)
        if counting:
            self._count(counts)
        return z_q, indices, to_codes, to_latents, counts

    @torch.no_grad()
    def _count(self, counts: Tensor) -> None:
        counts = counts.to(self.usage.dtype)
        sum_over_processes(counts)
        self.usage.lerp_(counts / counts.sum().clamp(min=1), 1 - self.restart_decay)

    @torch.no_grad()
    def _restart(self, latents: Tensor) -> None:
        assert self.restart_below is not None
        # Compared without waiting for the device; rows that are not replaced keep their bits.
        unused = self.usage < self.restart_below / self.n_e
        rows = latents.movedim(1, -1).reshape(-1, self.e_dim)
        drawn = rows[torch.randint(len(rows), (self.n_e,), device=rows.device)].to(self.embedding.weight.dtype)
        take_from_first_process(drawn)
        self.embedding.weight.copy_(torch.where(unused[:, None], drawn, self.embedding.weight))
        self.usage.copy_(torch.where(unused, 1 / self.n_e, self.usage))

    def fold(self, state: dict[str, Tensor], prefix: str) -> None:
        """As `Quantizer.fold`."""
        state.pop(f"{prefix}usage", None)


def _uniform_usage(quantizer: TableQuantizer, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Load hook: exported weights do not say how often codes were used."""
    if f"{prefix}embedding.weight" in state:
        state.setdefault(f"{prefix}usage", torch.full_like(quantizer.usage, 1 / quantizer.n_e))


class CosineQuantizer(TableQuantizer):
    """The rule "unit" (`RULES`): codes and latents of length 1, so the nearest code is at the smallest angle.

    The l2-normalised codes of ViT-VQGAN (Yu et al. 2021, section 3.2), which are low-dimensional: ``embed_dim`` is 32
    there, and ``quant_conv`` and ``post_quant_conv`` are the projections. A plain codebook of the codes divided by
    their lengths gives the same tokens, because |z - c|^2 = |z|^2 + 1 - 2 z.c has its minimum at the same code for any
    length of z.
    """

    usual_rule = "unit"

    def fold(self, state: dict[str, Tensor], prefix: str) -> None:
        """As `Quantizer.fold`: the entries divided by their lengths."""
        super().fold(state, prefix)
        key = f"{prefix}embedding.weight"
        state[key] = F.normalize(state[key], dim=1, eps=_EPS)


class _Table(nn.Module):
    """A codebook that is not trained, under the key of an embedding's weight."""

    weight: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)


class SimVQ(TableQuantizer):
    """A codebook that is one learned affine map of fixed random vectors (SimVQ: Zhu et al. 2024).

    Every step moves the map and so all codes, also those that no latent chose; a plain codebook moves the chosen ones.
    """

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        beta: float = 0.25,
        legacy: bool = True,
        sane_index_shape: bool = False,
        gradient: str = GRADIENTS[0],
    ):
        super().__init__(n_embed, embed_dim, beta, legacy, sane_index_shape, gradient)
        self.embedding: Any = _Table(torch.randn(n_embed, embed_dim) * embed_dim**-0.5)
        self.projection = nn.Linear(embed_dim, embed_dim)
        self.register_load_state_dict_pre_hook(_identity)

    def codes(self) -> Tensor:
        """As `VectorQuantizer.codes`: the map of the fixed vectors."""
        return self.projection(self.embedding.weight)

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """As `VectorQuantizer.start`: the latents are the fixed vectors, and the map begins as the identity."""
        super().start(latents)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def fold(self, state: dict[str, Tensor], prefix: str) -> None:
        """As `Quantizer.fold`: the codes."""
        weight, bias = (state.pop(f"{prefix}projection.{name}") for name in ("weight", "bias"))
        state[f"{prefix}embedding.weight"] = F.linear(state[f"{prefix}embedding.weight"], weight, bias)


def _identity(quantizer: SimVQ, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Load hook: of exported weights, the table holds the codes themselves."""
    if f"{prefix}embedding.weight" in state and f"{prefix}projection.weight" not in state:
        weight = state[f"{prefix}embedding.weight"]
        state[f"{prefix}projection.weight"] = torch.eye(quantizer.e_dim, dtype=weight.dtype)
        state[f"{prefix}projection.bias"] = torch.zeros(quantizer.e_dim, dtype=weight.dtype)


class _ImplicitQuantizer(Quantizer):
    """Codes that follow from a rule, and are found without a search; ``n_embed`` is their number."""

    def __init__(self, n_embed: int, sane_index_shape: bool):
        super().__init__()
        self.re_embed, self.sane_index_shape = n_embed, sane_index_shape

    def _shaped(self, indices: Tensor) -> Tensor:
        """Indices (B, *) as they are asked for."""
        return indices if self.sane_index_shape else indices.flatten()


class FSQ(_ImplicitQuantizer):
    """Finite scalar quantisation (Mentzer et al. 2023): each channel is bounded and rounded to one of its ``levels``.

    The codes are all combinations of the levels, evenly spaced in [-1, 1], the first channel's changing fastest;
    ``n_embed`` must be the product of the levels and ``embed_dim`` their number. There is no codebook loss. The table
    is enough to decode; to encode takes the bounding too, which no plain codebook does, so exported weights keep this
    class in their config.
    """

    folds_to_plain = False

    def __init__(self, n_embed: int, embed_dim: int, levels: Sequence[int], sane_index_shape: bool = False):
        levels = [int(level) for level in levels]
        if min(levels, default=0) < 2 or math.prod(levels) != n_embed or len(levels) != embed_dim:
            raise ValueError(
                f"levels: got {levels}, expected embed_dim={embed_dim} numbers of at least 2 whose product is "
                f"n_embed={n_embed}"
            )
        places = torch.arange(n_embed)
        columns = [places // math.prod(levels[:i]) % level - level // 2 for i, level in enumerate(levels)]
        halves = torch.tensor([level // 2 for level in levels])
        super().__init__(n_embed, sane_index_shape)
        self.embedding = _Table(torch.stack(columns, 1) / halves)
        self.levels = levels

    def codes(self) -> Tensor:
        """The table of codes (n_embed, embed_dim)."""
        return self.embedding.weight

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """As `Quantizer.get_codebook_entry`."""
        return as_grid(F.embedding(indices, self.codes()), shape)

    def bounded(self, z: Tensor) -> Tensor:
        """z (B, D, *) in float32, channel d in the interval of its levels, which lie at whole numbers around 0.

        The paper's bound (listing 1): with an even number of levels, there is one more below 0 than above.
        """
        shape = (-1, *[1] * (z.ndim - 2))
        levels = torch.tensor(self.levels, dtype=torch.float32, device=z.device).view(shape)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset

    def forward(self, z: Tensor) -> Quantised:
        """z (B, D, h, w) -> ``(z_q like z, 0, (None, None, indices int64))``, straight-through."""
        bounded = self.bounded(z)
        whole = bounded.detach().round().long()
        indices = torch.zeros_like(whole[:, 0])
        for i, level in enumerate(self.levels):
            indices = indices + (whole[:, i] + level // 2) * math.prod(self.levels[:i])
        halves = torch.tensor([level // 2 for level in self.levels], device=z.device)
        scaled = bounded / halves.view(-1, *[1] * (z.ndim - 2))
        codes = F.embedding(indices, self.codes()).movedim(-1, 1)
        return codes + (scaled - scaled.detach()), scaled.new_zeros(()), (None, None, self._shaped(indices))


class LFQ(_ImplicitQuantizer):
    """Lookup-free quantisation (MAGVIT-v2: Yu et al. 2023, section 3.1): the signs of the latents' channels.

    The codes are the 2^embed_dim vectors of -1 and 1; a token's bits say which channels are positive, the first one
    highest, or with ``lowest_first`` lowest, as in Open-MAGVIT2 (Luo et al. 2024). With ``table`` the weights hold the
    codes as a codebook. The loss is ``beta`` |z - sg[z_q]|^2 plus ``entropy_weight`` times the entropy of a latent's
    soft assignment to the codes, small if it decides, less that of the average assignment, large if all codes are used.
    Assignments are softmax(-|z - c|^2 / ``temperature``). Memory for the average is O(latents x n_embed).
    """

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        beta: float = 0.25,
        entropy_weight: float = 0.1,
        temperature: float = 0.01,
        sane_index_shape: bool = False,
        lowest_first: bool = False,
        table: bool = True,
    ):
        if not 1 <= embed_dim <= _MOST_BITS:
            raise ValueError(f"embed_dim: got {embed_dim}, expected 1 to {_MOST_BITS} bits per token")
        if n_embed != 2**embed_dim:
            raise ValueError(f"n_embed: got {n_embed}, expected 2^embed_dim for embed_dim={embed_dim}")
        if temperature <= 0:
            raise ValueError(f"temperature: got {temperature}, expected a number above 0")
        super().__init__(n_embed, sane_index_shape)
        self.beta, self.entropy_weight, self.temperature = beta, entropy_weight, temperature
        self.embed_dim, self.lowest_first = embed_dim, lowest_first
        if table:
            self.embedding = _Table(self.codes())

    def codes(self, device: torch.device | None = None) -> Tensor:
        """All codes (n_embed, embed_dim), float32."""
        return self.get_codebook_entry(torch.arange(self.re_embed, device=device), None)

    def _bits(self, device: torch.device) -> Tensor:
        """The place in a token of the bit of each channel (embed_dim,)."""
        places = torch.arange(self.embed_dim, device=device)
        return places if self.lowest_first else places.flip(0)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """As `Quantizer.get_codebook_entry`, in float32."""
        bits = indices[..., None] >> self._bits(indices.device) & 1
        return as_grid(2 * bits.float() - 1, shape)

    def forward(self, z: Tensor) -> Quantised:
        """z (B, D, h, w) -> ``(z_q like z, loss, (None, None, indices int64))``, straight-through."""
        positive = z.detach() > 0
        indices = (positive.movedim(1, -1) * (1 << self._bits(z.device))).sum(-1)
        codes = 2 * positive.to(z.dtype) - 1
        loss = self.beta * F.mse_loss(z.float(), codes.float())
        if self.entropy_weight and (self.training or torch.is_grad_enabled()):
            loss = loss + self.entropy_weight * self.entropy(z.float())
        return codes + (z - z.detach()), loss, (None, None, self._shaped(indices))

    def entropy(self, z: Tensor) -> Tensor:
        """Mean entropy of the soft assignments of z (B, D, *), less the entropy of their mean, in nats ().

        The mean is over the latents of all processes.
        """
        rows = z.movedim(1, -1).reshape(-1, z.shape[1])
        # |z - c|^2 differs between codes by -2 z.c alone.
        logs = F.log_softmax(2 / self.temperature * rows @ self.codes(z.device).t(), dim=1)
        shares = logs.exp()
        mean = averaged(shares.mean(0))
        return -(shares * logs).sum(1).mean() + torch.special.xlogy(mean, mean.clamp(min=1e-30)).sum()
