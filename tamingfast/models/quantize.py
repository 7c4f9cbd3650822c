"""Vector quantisers: nearest codebook entry, its EMA variant and Gumbel-softmax (paper section 3.1, eq. 2 to 4)."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.errors import UserError, first_line
from tamingfast.files import check_regular
from tamingfast.models.base import Info, at_least
from tamingfast.models.shared import sum_over_processes
from tamingfast.ops import reference
from tamingfast.ops.reference import Quantized

#: Quantised latents (B, D, h, w), the codebook loss, and `tamingfast.models.base.Info`.
Quantised: TypeAlias = tuple[Tensor, Tensor, Info]


class Quantizer(nn.Module):
    """A codebook, optionally restricted to the entries that a file lists.

    Attributes:
        re_embed: number of token values.
        used: the codebook indices that the tokens stand for, int64 (re_embed,); only with a ``remap`` file.
        folds_to_plain: whether what `fold` leaves works as the codebook of a `VectorQuantizer`.
    """

    folds_to_plain: bool = True

    re_embed: int
    used: Tensor
    remap: str | os.PathLike | None = None

    def _init_remap(self, n: int, remap: str | os.PathLike | None, unknown_index: str | int) -> None:
        self.re_embed, self._entries, self._unknown = n, n, unknown_index
        if remap is not None:
            self._restrict(_entries_of(remap, n), remap)
        self.register_load_state_dict_pre_hook(_adopt_used)

    def _restrict(self, used: Tensor, remap: str | os.PathLike) -> None:
        """Use only these of the codebook's entries, int64 (n,), which come from ``remap``."""
        self.remap = remap
        self.register_buffer("used", used)
        self.re_embed = len(used)
        self.unknown_index = self._unknown
        if self.unknown_index == "extra":
            self.unknown_index = self.re_embed
            self.re_embed += 1

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """Entries of ``indices`` int64 (N,): (B, D, h, w) if ``shape`` is (B, h, w, D), (N, D) if it is None."""
        raise NotImplementedError

    def fold(self, state: dict[str, Tensor], prefix: str) -> None:
        """Leave of this quantiser's entries in ``state``, under ``prefix``, what using the model needs: a codebook."""

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Codebook indices -> positions in ``used``.

        ``unknown_index`` says what an unlisted index becomes: "random" (drawn with torch's generator), "extra" (one
        more token value, shared by all of them) or a fixed index.
        """
        order = torch.argsort(self.used)
        used = self.used[order].to(inds)
        nearest = torch.searchsorted(used, inds).clamp_(max=len(used) - 1)
        new = order.to(inds)[nearest]
        unknown = used[nearest] != inds
        if self.unknown_index == "random":
            new[unknown] = torch.randint(0, self.re_embed, (int(unknown.sum()),), device=new.device)
        else:
            new[unknown] = int(self.unknown_index)
        return new

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Positions in ``used`` -> codebook indices; the extra position stands for entry 0 of ``used``."""
        used = self.used.to(inds)
        return used[torch.where(inds < len(used), inds, torch.zeros_like(inds))]


def _entries_of(remap: str | os.PathLike, n: int) -> Tensor:
    """The entries of a codebook of ``n`` that a file lists, int64 (used,). UserError for a file of anything else."""
    check_regular(remap, "a .npy file of codebook entries")
    try:
        # Mapped, a file is no larger than it is, whatever it says, and holds no objects.
        used = np.load(remap, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"remap: got '{remap}', which is no file, expected a .npy file of codebook entries") from None
    except Exception as error:  # the parser raises errors of many types for other content
        raise UserError(
            f"remap: got '{remap}', which holds no numbers ({first_line(error)[:60]}), expected a .npy file of "
            "codebook entries"
        ) from error
    if not (isinstance(used, np.ndarray) and used.ndim == 1 and len(used) and used.dtype.kind in "iuf"):
        raise UserError(f"remap: got '{remap}' of other values, expected a .npy file of a list of codebook entries")
    if not ((used >= 0) & (used < n) & (used == used.astype(np.int64))).all():
        raise UserError(f"remap: got entries in '{remap}' that the codebook lacks, expected numbers from 0 to {n - 1}")
    return torch.from_numpy(used.astype(np.int64))


def _adopt_used(quantizer: Quantizer, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Load hook: the used entries are part of the weights, so the file that they once came from is not needed."""
    used = state.get(f"{prefix}used")
    if used is None:
        return
    if (
        used.ndim != 1
        or used.is_floating_point()
        or not len(used)
        or not 0 <= used.min() <= used.max() < quantizer._entries
    ):
        raise UserError(
            f"{prefix}used: got other values, expected a list of codebook entries, 0 to {quantizer._entries - 1}"
        )
    if quantizer.remap is None:
        device = next(quantizer.parameters()).device
        quantizer._restrict(torch.empty_like(used, device=device), f"{prefix}used")


#: How a `VectorQuantizer` chooses an entry: the smallest distance; the largest cosine, giving the entry at length 1
#: ("unit": ViT-VQGAN, Yu et al. 2022, section 3.2) or as it is stored ("cosine"); the largest dot product (IBQ: Shi et
#: al. 2024).
RULES = ("nearest", "unit", "cosine", "dot")


class VectorQuantizer(Quantizer):
    """Replace each latent vector by one of ``n_e`` codebook entries of width ``e_dim``: the nearest, or by ``rule``.

    The original's ``VectorQuantizer2``. Loss: ``|sg[z_q] - z|^2 + |z_q - sg[z]|^2`` with a factor ``beta`` on one
    term: on the first (commitment) in the paper, on the second with ``legacy=True``, as in the training of all
    published checkpoints. Indices have the shape (B*h*w,), or (B, h, w) with ``sane_index_shape``.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
        rule: str = "nearest",
    ):
        super().__init__()
        at_least(1, n_embed=n_e, embed_dim=e_dim)
        if rule not in RULES:
            raise UserError(f"codes: got {rule!r}, expected one of {', '.join(RULES)}")
        self.n_e, self.e_dim, self.beta, self.legacy, self.rule = n_e, e_dim, beta, legacy, rule
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self._init_remap(n_e, remap, unknown_index)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> Quantised:
        """z (B, e_dim, h, w) -> ``(z_q like z, loss, (None, None, indices int64))``.

        The gradient of ``z_q`` passes straight through to ``z``. ``temp``, ``rescale_logits`` and ``return_logits``
        are those of `GumbelQuantize`, for a common signature; anything but their defaults raises ValueError.
        """
        for name, value, default in (
            ("temp", 1.0 if temp is None else temp, 1.0), ("rescale_logits", rescale_logits, False),
            ("return_logits", return_logits, False),
        ):  # fmt: skip
            if value != default:
                raise ValueError(f"{name}: got {value}, expected the default; use GumbelQuantize")
        z_q, indices, to_codes, to_latents, _ = self.replaced(z)
        loss = to_codes + self.beta * to_latents if self.legacy else self.beta * to_codes + to_latents
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(z.shape[0], -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[0], *z.shape[2:])
        return z_q, loss, (None, None, indices)

    def codes(self) -> Tensor:
        """The codebook (n_e, e_dim)."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=1) if self.rule == "unit" else weight

    def compared(self, z: Tensor) -> Tensor:
        """What of the latents z (B, e_dim, *) is compared with the codes."""
        return F.normalize(z, dim=1) if self.rule == "unit" else z

    def replaced(self, z: Tensor) -> Quantized:
        """The latents z (B, e_dim, *) replaced by codes, as `tamingfast.ops.quantize` gives them."""
        codes = self.codes()
        if self.rule in ("nearest", "unit"):
            return ops.quantize(self.compared(z), codes)
        latents = z.detach().movedim(1, -1).reshape(-1, self.e_dim)
        indices = ops.nearest_code(*_as_nearest(latents, codes.detach(), self.rule))
        return reference.quantize(z, codes, indices)

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """Set the codes to latents (n_e, e_dim)."""
        self.embedding.weight.copy_(latents)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """As `Quantizer.get_codebook_entry`."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        return as_grid(F.embedding(indices, self.codes()), shape)


def _as_nearest(z: Tensor, codebook: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Vectors and entries whose nearest entries have the largest cosine or dot product with ``z`` (N, D).

    |z - e|^2 = |z|^2 + |e|^2 - 2 z e: where all entries have one length, the nearest has the largest dot product. One
    more coordinate, 0 in z, makes their lengths equal.
    """
    if rule == "cosine":
        return F.normalize(z, dim=1), F.normalize(codebook, dim=1)
    squares = codebook.double().square().sum(1, keepdim=True)
    last = (squares.max() - squares).clamp(min=0).sqrt().to(codebook.dtype)
    return F.pad(z, (0, 1)), torch.cat((codebook, last), 1)


class OneHotVectorQuantizer(VectorQuantizer):
    """The original's first ``VectorQuantizer``: the same codes and loss, with perplexity and one-hot codes."""

    def __init__(self, n_e: int, e_dim: int, beta: float):
        super().__init__(n_e, e_dim, beta)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> Quantised:
        """As `VectorQuantizer`, but ``(z_q, loss, (perplexity (), one-hot (B*h*w, n_e), indices (B*h*w, 1)))``."""
        z_q, loss, (_, _, indices) = super().forward(z, temp, rescale_logits, return_logits)
        encodings = F.one_hot(indices, self.n_e).to(z.dtype)
        return z_q, loss, (_perplexity(encodings), encodings, indices[:, None])


def _perplexity(encodings: Tensor) -> Tensor:
    usage = encodings.mean(0)
    return torch.exp(-torch.sum(usage * torch.log(usage + 1e-10)))


def as_grid(z_q: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
    """Rows (N, D) -> (B, D, h, w) if ``shape`` is (B, h, w, D); unchanged if it is None."""
    return z_q if shape is None else z_q.view(shape).permute(0, 3, 1, 2).contiguous()


class EmbeddingEMA(nn.Module):
    """A codebook of moving averages of the latents assigned to its entries (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5):
        super().__init__()
        self.decay, self.eps, self.update = decay, eps, True
        weight = torch.randn(num_tokens, codebook_dim)
        # Parameters rather than buffers, as in the original's checkpoints and optimizers.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(num_tokens), requires_grad=False)
        self.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, embed_id: Tensor) -> Tensor:
        return F.embedding(embed_id, self.weight)

    @torch.no_grad()
    def move(self, z: Tensor, indices: Tensor) -> None:
        """Update the averages and the codebook with latents z (N, D), assigned to entries ``indices`` (N,).

        The latents are those of all processes that train together, which so keep one codebook.
        """
        counts = torch.bincount(indices, minlength=len(self.weight)).to(self.cluster_size.dtype)
        sums = torch.zeros_like(self.embed_avg).index_add_(0, indices, z.to(self.embed_avg.dtype))
        sum_over_processes(counts, sums)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + len(self.weight) * self.eps) * total
        self.weight.copy_(self.embed_avg / smoothed[:, None])


class EMAVectorQuantizer(Quantizer):
    """A `VectorQuantizer` whose codebook follows moving averages instead of gradients."""

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        remap: str | os.PathLike | None = None,
        unknown_index: str | int = "random",
    ):
        super().__init__()
        self.codebook_dim, self.num_tokens, self.beta = embedding_dim, n_embed, beta
        self.embedding = EmbeddingEMA(n_embed, embedding_dim, decay, eps)
        self._init_remap(n_embed, remap, unknown_index)

    def forward(self, z: Tensor) -> Quantised:
        """z (B, D, h, w) -> ``(z_q like z, loss, (perplexity, one-hot (B*h*w, n), indices (B*h*w,)))``."""
        z = z.permute(0, 2, 3, 1)
        flat = z.reshape(-1, self.codebook_dim)
        indices = ops.nearest_code(flat.detach(), self.embedding.weight)
        z_q = self.embedding(indices).view(z.shape)
        encodings = F.one_hot(indices, self.num_tokens).to(z.dtype)
        if self.training and self.embedding.update:
            self.embedding.move(flat.detach(), indices)
        loss = self.beta * F.mse_loss(z_q.detach(), z)
        z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        return z_q, loss, (_perplexity(encodings), encodings, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """As `Quantizer.get_codebook_entry`; the original's class lacks it, so its priors could not decode."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        return as_grid(self.embedding(indices), shape)


class GumbelQuantize(Quantizer):
    """Codes chosen by straight-through Gumbel-softmax (Jang et al. 2016) from the logits of a 1x1 convolution."""

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | os.PathLike | None = None,
        unknown_index: str | int = "random",
    ):
        super().__init__()
        self.embedding_dim, self.n_embed = embedding_dim, n_embed
        self.straight_through, self.temperature, self.kl_weight = straight_through, temp_init, kl_weight
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)
        self.use_vqinterface = use_vqinterface
        self._init_remap(n_embed, remap, unknown_index)

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> tuple[Any, ...]:
        """z (B, num_hiddens, h, w) -> ``(z_q (B, D, h, w), kl loss, (None, None, indices (B, h, w)))``.

        Draws Gumbel noise from torch's generator, in evaluation mode too, as the original does. With
        ``return_logits`` the logits are a fourth value; without the VQ interface the third is the indices alone.
        """
        hard = self.straight_through if self.training else True
        logits = self.proj(z)
        full = logits
        if self.remap is not None:
            logits = logits[:, self.used]
        soft = F.gumbel_softmax(logits, tau=self.temperature if temp is None else temp, dim=1, hard=hard)
        if self.remap is not None:
            soft = torch.zeros_like(full).index_copy(1, self.used.long(), soft)
        z_q = torch.einsum("bnhw,nd->bdhw", soft, self.embed.weight)
        q = F.softmax(logits, dim=1)
        loss = self.kl_weight * torch.sum(q * torch.log(q * self.n_embed + 1e-10), dim=1).mean()
        indices = soft.argmax(dim=1)
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.use_vqinterface:
            return z_q, loss, indices
        result = (z_q, loss, (None, None, indices))
        return (*result, logits) if return_logits else result

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """As `Quantizer.get_codebook_entry`, but the D of ``shape`` is ignored: the codebook's width counts."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        grid = None if shape is None else (*shape[:3], self.embedding_dim)
        return as_grid(self.embed(indices), grid)
