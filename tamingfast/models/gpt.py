"""The second stage: a GPT2 over token sequences (paper section 3.2), with a static key/value cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.engines.networks import GPT2, Kind, LayerCache, TransformerConfig
from tamingfast.engines.request import Span
from tamingfast.errors import UserError
from tamingfast.models.base import at_least, described, in_turn
from tamingfast.ops import reference
from tamingfast.ops.choice import check_filters, scaled, top_k_top_p

EPSILON = 1e-5  # of `RMSNorm`


class GPTConfig:
    """The sizes and dropout rates of a GPT; other keyword arguments become attributes too, as in the original."""

    n_layer: int
    n_head: int
    n_embd: int
    n_unmasked: int = 0
    embd_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    kind: Kind = GPT2

    def __init__(self, vocab_size: int, block_size: int, **kwargs: Any):
        self.vocab_size = vocab_size
        self.block_size = block_size
        for key, value in kwargs.items():
            setattr(self, key, value)


class RMSNorm(nn.Module):
    """``x / sqrt(mean of squares + 1e-5) * weight`` over the last axis, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape and dtype."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).type_as(x) * self.weight


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention, bidirectional among the first ``n_unmasked`` positions.

    With ``config.kind.qk_norm`` the queries and keys of each head are normed (Dehghani et al., "Scaling Vision
    Transformers to 22 Billion Parameters", 2023, section 2; here by RMSNorm).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd: got {config.n_embd}, expected a multiple of n_head={config.n_head}")
        self.n_head = config.n_head
        self.n_unmasked = config.n_unmasked
        self.block_size = config.block_size
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.attn_drop = nn.Dropout(config.attn_pdrop)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.query_norm, self.key_norm = (
            RMSNorm(config.n_embd // config.n_head) if config.kind.qk_norm else nn.Identity() for _ in range(2)
        )

    @property
    def mask(self) -> Tensor:
        """The original's buffer, 1 where a row attends to a column: float32 (1, 1, block_size, block_size)."""
        return _mask_buffer(self.block_size, self.n_unmasked, self.proj.weight.device)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._queries(x), self._keys(x), self._split(self.value(x))

    def _queries(self, x: Tensor) -> Tensor:
        return self.query_norm(self._split(self.query(x)))

    def _keys(self, x: Tensor) -> Tensor:
        return self.key_norm(self._split(self.key(x)))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def _join(self, y: Tensor) -> Tensor:
        return self.resid_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, n_embd) -> (B, T, n_embd)."""
        dropout = self.attn_drop.p if self.training else 0.0
        return self._join(ops.causal_attention(*self._heads(x), n_unmasked=self.n_unmasked, dropout_p=dropout))

    def forward_cached(self, x: Tensor, cache: LayerCache, start: int) -> Tensor:
        """As `forward`, for positions from ``start`` on; writes their keys and values to ``cache``."""
        q, k, v = self._heads(x)
        keys, values = cache
        stop = start + x.shape[1]
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        if start == 0:
            return self._join(ops.causal_attention(q, k, v, n_unmasked=self.n_unmasked))
        mask = None
        if x.shape[1] > 1:
            mask = _seen(start, stop, x.device)
        return self._join(F.scaled_dot_product_attention(q, keys[:, :, :stop], values[:, :, :stop], attn_mask=mask))

    def forward_ragged(self, x: Tensor, cache: LayerCache, spans: Sequence[Span], asked: Sequence[int]) -> Tensor:
        """As `forward`, for the concatenated spans x (B, T, n_embd); ``cache`` holds (slots, B, n_head, length, D).

        Only the outputs of the last ``asked`` tokens of each span are computed: (B, their sum, n_embd).
        """
        k, v = self._keys(x), self._split(self.value(x))
        q = self._queries(last_of(x, spans, asked))
        return self._join(attend_ragged(q, k, v, cache, spans, asked, self.n_unmasked))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP of width 4 * n_embd with exact GELU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.resid_pdrop),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))

    def forward_cached(self, x: Tensor, cache: LayerCache, start: int) -> Tensor:
        x = x + self.attn.forward_cached(self.ln1(x), cache, start)
        return x + self.mlp(self.ln2(x))

    def forward_ragged(self, x: Tensor, cache: LayerCache, spans: Sequence[Span], asked: Sequence[int]) -> Tensor:
        x = last_of(x, spans, asked) + self.attn.forward_ragged(self.ln1(x), cache, spans, asked)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """GPT2 with learned absolute positions, no weight tying and no bias in the head; ``qk_norm`` is no part of GPT2.

    As in the original, state dicts contain the attention mask of each block; loading one sets
    ``n_unmasked`` from its masks.
    """

    config: TransformerConfig
    checkpointing = False

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int = 12,
        n_head: int = 8,
        n_embd: int = 256,
        embd_pdrop: float = 0.0,
        resid_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        n_unmasked: int = 0,
        qk_norm: bool = False,
    ):
        super().__init__()
        at_least(1, vocab_size=vocab_size, block_size=block_size, n_head=n_head, n_embd=n_embd)
        at_least(0, n_layer=n_layer)
        self.config = GPTConfig(
            vocab_size, block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_unmasked=n_unmasked,
            embd_pdrop=embd_pdrop, resid_pdrop=resid_pdrop, attn_pdrop=attn_pdrop, kind=Kind(qk_norm=bool(qk_norm)),
        )  # fmt: skip
        self.block_size = block_size
        self.tok_emb = nn.Embedding(vocab_size, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_embd))
        self.drop = nn.Dropout(embd_pdrop)
        self.blocks = nn.Sequential(*(Block(self.config) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(self._init_weights)
        self.register_state_dict_post_hook(_add_masks)
        self.register_load_state_dict_pre_hook(_read_masks)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def get_block_size(self) -> int:
        """The greatest length of a sequence, in tokens."""
        return self.block_size

    def forward(
        self, idx: Tensor, embeddings: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens int64 (B, T) -> ``(logits (B, T, vocab_size), cross entropy or None)``.

        ``embeddings`` (B, E, n_embd) are put before the tokens; the logits then are (B, E + T, vocab_size). The cross
        entropy is in nats, against ``targets`` int64, one for each position. Raises ValueError if the sequence is
        longer than ``block_size``.
        """
        if not isinstance(idx, Tensor) or idx.dtype not in (torch.int64, torch.int32) or idx.ndim != 2:
            raise ValueError(f"idx: got {described(idx)}, expected an int64 tensor (B, T) of tokens")
        x = self._embed(idx, embeddings)
        self._check_length(x.shape[1])
        x = self.drop(x + self.pos_emb[:, : x.shape[1]])
        logits = self.head(self.ln_f(in_turn(self.blocks, x, self.checkpointing)))
        return logits, _cross_entropy(logits, targets)

    def new_cache(self, batch: int, length: int | None = None) -> list[LayerCache]:
        """Uninitialised keys and values of each layer, (B, n_head, length, D); default ``length``: ``block_size``."""
        length = self.block_size if length is None else length
        return self._empty_cache((batch,), length)

    def forward_cached(self, idx: Tensor, cache: list[LayerCache], start: int) -> Tensor:
        """Logits (B, t, vocab_size) of tokens (B, t) at positions from ``start`` on, given the ``cache`` before them.

        The unmasked prefix must come in one call, from position 0. Raises ValueError for any other start within the
        prefix, and for positions beyond the cache.
        """
        stop, capacity = start + idx.shape[1], cache[0][0].shape[2]
        if stop > capacity:
            raise ValueError(f"idx: got positions up to {stop - 1}, expected at most {capacity - 1}, the cache's last")
        if 0 < start < self.config.n_unmasked:
            raise ValueError(
                f"start: got {start}, expected 0 or at least {self.config.n_unmasked}; feed the unmasked prefix in one "
                "call"
            )
        return self._run_cached(self.tok_emb(idx), cache, start)

    def _run_cached(self, embedded: Tensor, cache: list[LayerCache], start: int) -> Tensor:
        x = embedded + self.pos_emb[:, start : start + embedded.shape[1]]
        for block, layer in zip(self._blocks, cache, strict=True):
            x = block.forward_cached(x, layer, start)
        return self.head(self.ln_f(x))

    @torch.no_grad()
    def forward_with_past(
        self,
        idx: Tensor,
        embeddings: Tensor | None = None,
        targets: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
        past_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The original's cached step: ``(logits (B, t, vocab_size), loss or None, present)``.

        ``present`` holds the new keys and values, (n_layer, 2, B, n_head, t, D); ``past`` is the list of all earlier
        ones, ``past_length`` positions in total (ValueError otherwise). Unlike `forward_cached`, this copies the whole
        past on each call.
        """
        x = self._embed(idx, embeddings)
        start = 0 if past is None else sum(part.shape[-2] for part in past)
        if past is not None and start != past_length:
            raise ValueError(f"past_length: got {past_length}, expected {start}, the positions of past")
        cache = self.new_cache(len(x), start + x.shape[1])
        for layer, (keys, values) in enumerate(cache):
            if past is not None:
                keys[:, :, :start], values[:, :, :start] = torch.cat([part[layer] for part in past], dim=-2)
        logits = self._run_cached(x, cache, start)
        present = torch.stack([torch.stack((keys[:, :, start:], values[:, :, start:])) for keys, values in cache])
        return logits, _cross_entropy(logits, targets), present

    def new_slots(self, slots: int, batch: int, length: int) -> list[LayerCache]:
        """Uninitialised caches for `forward_ragged`: keys and values (slots, B, n_head, length, D) of each layer."""
        return self._empty_cache((slots, batch), length)

    def _empty_cache(self, leading: tuple[int, ...], length: int) -> list[LayerCache]:
        self._check_length(length)
        shape = (*leading, self.config.n_head, length, self.config.n_embd // self.config.n_head)
        return [(self.pos_emb.new_empty(shape), self.pos_emb.new_empty(shape)) for _ in self.blocks]

    def forward_ragged(
        self, idx: Tensor, cache: list[LayerCache], spans: Sequence[Span], asked: Sequence[int] | None = None
    ) -> Tensor:
        """Logits (B, sum of ``asked``, vocab_size) of the last ``asked`` tokens of each span; default: of the last one.

        ``idx`` (B, T) holds the tokens of all spans, concatenated; no two spans may use the same slot. Each slot of
        ``cache`` works like the cache of `forward_cached`.
        """
        whole = [span.count for span in spans]
        asked = [1] * len(spans) if asked is None else asked
        positions = torch.cat(
            [torch.arange(span.start, span.stop, dtype=torch.int64, device=idx.device) for span in spans]
        )
        x = self.tok_emb(idx) + self.pos_emb[0, positions]
        last = len(self.blocks) - 1
        for i, (block, layer) in enumerate(zip(self._blocks, cache, strict=True)):
            x = block.forward_ragged(x, layer, spans, asked if i == last else whole)
        return self.head(self.ln_f(x))

    @property
    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _embed(self, idx: Tensor, embeddings: Tensor | None) -> Tensor:
        x = self.tok_emb(idx)
        return x if embeddings is None else torch.cat((embeddings, x), dim=1)

    def _check_length(self, length: int) -> None:
        if length > self.block_size:
            raise ValueError(f"length: got {length} tokens, expected at most block_size={self.block_size}")


def _cross_entropy(logits: Tensor, targets: Tensor | None) -> Tensor | None:
    if targets is None:
        return None
    if (
        not isinstance(targets, Tensor)
        or targets.dtype != torch.int64
        or targets.shape.numel() != logits[..., 0].numel()
    ):
        raise ValueError(f"targets: got {described(targets)}, expected an int64 tensor {tuple(logits.shape[:2])}")
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _mask_buffer(size: int, n_unmasked: int, device: torch.device) -> Tensor:
    """The attention mask as the original stores it: float32 (1, 1, size, size)."""
    return reference.attention_mask(size, n_unmasked, device).float().view(1, 1, size, size)


def _seen(start: int, stop: int, device: torch.device, n_unmasked: int = 0) -> Tensor:
    """Which positions each query sees: bool (stop - start, stop)."""
    positions = torch.arange(stop, dtype=torch.int64, device=device)
    return positions <= positions[start:, None].clamp(min=n_unmasked - 1)


def _ends(spans: Sequence[Span]) -> list[int]:
    return list(itertools.accumulate(span.count for span in spans))


def attend_ragged(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, spans: Sequence[Span], asked: Sequence[int], n_unmasked: int = 0
) -> Tensor:
    """Attention of the last ``asked`` tokens of each span, of which q (B, H, their sum, D) holds the queries.

    k and v (B, H, T, D) are those of all tokens and are written to ``cache``, keys and values (slots, B, H, length, D).
    """
    outputs = []
    for span, end, count, last in zip(spans, _ends(spans), asked, itertools.accumulate(asked), strict=True):
        begin = end - span.count
        keys, values = cache[0][span.slot], cache[1][span.slot]
        keys[:, :, span.start : span.stop] = k[:, :, begin:end]
        values[:, :, span.start : span.stop] = v[:, :, begin:end]
        asking, seen = q[:, :, last - count : last], (keys[:, :, : span.stop], values[:, :, : span.stop])
        if count == 1:
            outputs.append(F.scaled_dot_product_attention(asking, *seen))
        elif span.start == 0 and count == span.count:
            own_k, own_v = k[:, :, begin:end], v[:, :, begin:end]
            outputs.append(ops.causal_attention(asking, own_k, own_v, n_unmasked=n_unmasked))
        elif count > 0:
            mask = _seen(span.stop - count, span.stop, q.device, n_unmasked)
            outputs.append(F.scaled_dot_product_attention(asking, *seen, attn_mask=mask))
    return torch.cat(outputs, dim=2)


def last_of(x: Tensor, spans: Sequence[Span], counts: Sequence[int]) -> Tensor:
    """The last tokens of each span, that many, of the concatenated spans x (B, T, C)."""
    if all(span.count == count for span, count in zip(spans, counts, strict=True)):
        return x
    ends = zip(_ends(spans), counts, strict=True)
    return x[:, [row for end, count in ends for row in range(end - count, end)]]


def _add_masks(gpt: GPT, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    mask = _mask_buffer(gpt.block_size, gpt.config.n_unmasked, gpt.pos_emb.device)
    for i in range(len(gpt.blocks)):
        state[f"{prefix}blocks.{i}.attn.mask"] = mask


def _read_masks(gpt: GPT, state: dict[str, Tensor], prefix: str, *args: object) -> None:
    found = None
    for i, block in enumerate(gpt._blocks):
        mask = state.pop(f"{prefix}blocks.{i}.attn.mask", None)
        if mask is None or mask.is_meta:
            continue
        if mask.ndim != 4 or mask.shape[2] != mask.shape[3] or not mask.numel():
            raise UserError(f"{prefix}blocks.{i}.attn.mask: got shape {tuple(mask.shape)}, expected (1, 1, n, n)")
        found = _unmasked_prefix(mask[0, 0], f"{prefix}blocks.{i}.attn.mask")
        block.attn.n_unmasked = found
    if found is not None:
        gpt.config.n_unmasked = found


def _unmasked_prefix(mask: Tensor, name: str) -> int:
    n = int(mask[0].sum())
    n = 0 if n == 1 else n  # one unmasked position is plain causal attention
    if not torch.equal(mask.float(), _mask_buffer(len(mask), n, mask.device)[0, 0]):
        raise UserError(f"{name}: got a mask of another pattern, expected a causal one, with or without a prefix")
    return n


# --- the original's sampling functions ------------------------------------------------------------------------------


def top_k_logits(logits: Tensor, k: int) -> Tensor:
    """Set logits below the k-th largest of the last axis to -inf; those equal to it are kept, and all if k is large."""
    kth = logits.topk(min(int(k), logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def top_k_top_p_filtering(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """`tamingfast.ops.choice.top_k_top_p` under the original's name; ``top_k`` 0 and ``top_p`` 1.0 keep all tokens."""
    return top_k_top_p(logits, top_k=top_k or None, top_p=top_p if top_p < 1.0 else None)


def pick(logits: Tensor, sample: bool) -> Tensor:
    """Logits (..., vocab) -> tokens int64 (...): drawn with torch's generator if ``sample``, else the most likely."""
    if not sample:
        return logits.topk(1, dim=-1).indices[..., 0]
    flat = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1)
    return flat.view(logits.shape[:-1])


def fed_positions(model: GPT, given: int, steps: int) -> int:
    """How many positions are fed to draw ``steps`` tokens after ``given`` ones: all but the last, which is no input.

    Raises UserError if the model has fewer.
    """
    if steps < 1:
        return 0
    if given + steps - 1 > model.block_size:
        raise UserError(
            f"steps: got {steps} after {given} tokens, expected at most {max(0, model.block_size + 1 - given)} with "
            f"block_size={model.block_size}"
        )
    return given + steps - 1


@torch.no_grad()
def sample(
    model: GPT, x: Tensor, steps: int, temperature: float = 1.0, sample: bool = False, top_k: int | None = None
) -> Tensor:
    """Continue tokens x (B, k) by ``steps`` tokens, without a cache: int64 (B, k + steps).

    Each step runs the model on the last ``block_size`` tokens. Raises UserError for an option outside its range, and
    for logits with NaN.
    """
    check_filters(temperature, top_k)
    model.eval()
    for _ in range(steps):
        logits = scaled(model(x[:, -model.get_block_size() :])[0][:, -1], temperature)
        logits = logits if top_k is None else top_k_logits(logits, top_k)
        x = torch.cat((x, pick(logits, sample)[:, None]), dim=1)
    return x


@torch.no_grad()
def sample_with_past(
    x: Tensor,
    model: GPT,
    steps: int,
    temperature: float = 1.0,
    sample_logits: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample the tokens after the condition x (B, c), with a key/value cache: int64 (B, steps).

    As in the original, ``top_p`` is ignored without ``top_k``, and both keep all tokens at 0 and 1.0. Raises UserError
    for an option outside its range, for logits with NaN, and for more tokens than the model's block size and one.
    """
    check_filters(temperature, top_k or None, top_p)
    cache, done, sequence = model.new_cache(len(x), fed_positions(model, x.shape[1], steps)), 0, x
    for n in range(steps):
        if callback is not None:
            callback(n)
        logits = scaled(model.forward_cached(sequence[:, done:], cache, done)[:, -1], temperature)
        done = sequence.shape[1]
        if top_k is not None:
            logits = top_k_top_p_filtering(logits, top_k, 1.0 if top_p is None else top_p)
        sequence = torch.cat((sequence, pick(logits, sample_logits)[:, None]), dim=1)
    return sequence[:, x.shape[1] :]
