"""The token choice: temperature, top-k, top-p, and Gumbel-max with counter-based noise. Only this module checks them.

A token is `argmax(filtered(logits / temperature) + g)`, which is an exact draw from the softmax of the
filtered logits (the Gumbel-max trick). The noise `g` is a pure function of (seed, image, row, column,
vocabulary entry), so a draw depends neither on the batch size, nor on the order in which cells are
visited, nor on the machine. `csrc/philox.h` has the same definition:

    key     = (low 32 bits of seed, high 32 bits of seed)
    counter = (v // 4, column, row, image)
    x       = word v % 4 of Philox4x32-10(counter, key)            for vocabulary entry v
    u       = ((x >> 8) + 0.5) * 2**-24                            24 bits, never 0 or 1
    g       = -log(-log(u))                                        in float64, then rounded to float32

Source of the generator: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011,
section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from tamingfast.errors import UserError

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_FLOAT32 = torch.finfo(torch.float32)  # logits are divided by the temperature in this type


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2**32).
        key: two words in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The int64 product wraps, but its bits are those of the unsigned one: masks recover both words.
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) & WORD) ^ c1 ^ k0
        c2 = ((product0 >> 32) & WORD) ^ c3 ^ k1
        c1 = product1 & WORD
        c3 = product0 & WORD
        k0 = (k0 + WEYL[0]) & WORD
        k1 = (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def check_seed(seed: int) -> None:
    """Raises UserError unless `seed` fits the 64-bit key."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 1 << 64:
        raise UserError(f"seed: got {seed!r}, expected an integer from 0 to 2**64 - 1")


def gumbel_noise(seed: int, image: Tensor, row: Tensor, column: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise of every vocabulary entry in the given cells, as this module's docstring defines it.

    Args:
        seed: 0 to 2**64 - 1.
        image, row, column: int64 tensors that broadcast together, on one device, values in [0, 2**32).
        vocab: number of vocabulary entries V.

    Returns:
        float32, the broadcast shape + (V,), on the tensors' device.

    Raises:
        UserError: the seed does not fit 64 bits.
    """
    check_seed(seed)
    seed = int(seed)
    block = torch.arange((vocab + 3) // 4, dtype=torch.int64, device=image.device)
    counter = (block, column[..., None], row[..., None], image[..., None])
    words = torch.stack(philox4x32(counter, (seed & WORD, seed >> 32)), dim=-1)
    u = (words.flatten(-2)[..., :vocab] >> 8).double().add_(0.5).mul_(2.0**-24)
    return u.log_().neg_().log_().neg_().float()


def check_filters(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Raises UserError when a sampling option is outside its range.

    The temperature must be a normal float32; a `top_k` given as a float must be a whole number.
    """
    if not _FLOAT32.tiny <= temperature <= _FLOAT32.max:
        span = f"{_FLOAT32.tiny:.2g} to {_FLOAT32.max:.2g}"
        raise UserError(f"temperature: got {temperature}, expected {span}; for 0 use greedy")
    if top_k is not None and (isinstance(top_k, bool) or not 1 <= top_k < float("inf") or top_k != int(top_k)):
        raise UserError(f"top_k: got {top_k}, expected an integer of at least 1, or None to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: got {top_p}, expected a number above 0 and at most 1, or None to keep all tokens")


def check_chosen(nan: bool, nothing: bool) -> None:
    """Raises UserError if a row of logits held NaN (`nan`) or only -inf (`nothing`)."""
    if nan or nothing:
        found = "NaN" if nan else "only -inf"
        raise UserError(f"logits: got {found} in a row, expected numbers to choose a token from; check the weights")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a token is chosen from its logits: the arguments of `choose` and the seed of its noise.

    Attributes:
        temperature, top_k, top_p: as in `choose`; None keeps all entries.
        greedy: take the best entry; noise, temperature and filters have no effect.
        seed: of the noise; see `gumbel_noise`.

    Raises:
        UserError: an option outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_filters(self.temperature, self.top_k, self.top_p)
        check_seed(self.seed)
        # The extension accepts only Python's own number types, not NumPy's.
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "top_k", None if self.top_k is None else int(self.top_k))
        object.__setattr__(self, "top_p", None if self.top_p is None else float(self.top_p))
        object.__setattr__(self, "greedy", bool(self.greedy))
        object.__setattr__(self, "seed", int(self.seed))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits (..., V) divided by the temperature; where the best of a row would not be finite, distances from it.

    Each entry minus the best leaves the softmax as it is. So logits near the largest float do not
    overflow, and an infinite logit is certain.

    Raises:
        UserError: a row has NaN, or only -inf.
    """
    scores = logits / temperature
    if bool(scores.amax(-1).isfinite().all()):  # amax of NaN is NaN
        return scores
    best = logits.amax(-1, keepdim=True)
    check_chosen(nan=bool(best.isnan().any()), nothing=bool((best == -torch.inf).any()))
    # An infinite best entry minus itself would be NaN.
    distance = torch.where(logits == best, torch.zeros_like(logits), logits - best) / temperature
    return torch.where((best / temperature).isfinite(), scores, distance)


def top_k_top_p(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Keeps the `top_k` best entries, then the nucleus of probability `top_p` among them; others become -inf.

    Entries that tie with the k-th best are kept; a `top_k` above V keeps all. The nucleus is the shortest list of
    entries, best first, whose total probability exceeds `top_p`, including the entry that crosses it; among equal
    logits the lower index comes first. Source of the nucleus: Holtzman et al., "The Curious Case of
    Neural Text Degeneration", section 3.1.

    Args:
        logits: floating point (..., V); not modified.

    Returns:
        The shape and dtype of `logits`.

    Raises:
        UserError: an option outside its range; see `check_filters`.
    """
    check_filters(top_k=top_k, top_p=top_p)
    return _filtered(logits, top_k, top_p)


def _filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """`top_k_top_p` with options that have been checked."""
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(int(top_k), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        descending, index = logits.sort(dim=-1, descending=True, stable=True)
        reached = descending.softmax(-1).cumsum(-1) > top_p
        outside = torch.zeros_like(reached)
        outside[..., 1:] = reached[..., :-1]
        logits = logits.masked_fill(outside.scatter(-1, index, outside), -torch.inf)
    return logits


def guided(own: Tensor, null: Tensor, scale: Tensor) -> Tensor:
    """Logits under classifier-free guidance, in float32: ``null + (own - null) * scale``; the shapes broadcast.

    `csrc/cpu/decode.cpp` has the same formula.
    """
    null = null.float()
    return null + (own.float() - null) * scale


def choose(
    logits: Tensor,
    noise: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Chooses one token per row: Gumbel-max with `noise`, the best entry without it; ties go to the lowest index.

    Args:
        logits: floating point (..., V), divided by `temperature` before filtering, as in the original; the order
            matters to `top_p` only. See `scaled` for values near the largest float and infinite ones.
        noise: (..., V) from `gumbel_noise`, or None for the greedy choice, on which the options have no effect.

    Returns:
        int64 (...,).

    Raises:
        UserError: an option outside its range, see `check_filters`; or a row of logits that has NaN, or only -inf.
    """
    check_filters(temperature, top_k, top_p)
    scores = scaled(logits.float(), 1.0 if noise is None else temperature)
    if noise is not None:
        scores = _filtered(scores, top_k, top_p) + noise
    return scores.argmax(-1)


def best(
    logits: Tensor,
    noise: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `choose`, but a row without a token raises nothing: (tokens, each row's largest logit).

    That is NaN for a row with any NaN, and -inf for a row of only -inf; their tokens mean nothing.
    """
    largest = logits.float().amax(-1)
    usable = logits.masked_fill(~(largest > -torch.inf)[..., None], 0.0)
    return choose(usable, noise, temperature=temperature, top_k=top_k, top_p=top_p), largest
