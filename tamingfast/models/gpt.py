"""The second stage: a GPT2 over token sequences (paper section 3.2), with a static key/value cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.engines.request import Span
from tamingfast.errors import UserError
from tamingfast.models.base import at_least
from tamingfast.ops.reference import attention_mask


class GPTConfig:
    """The numbers of a GPT: ``vocab_size block_size n_layer n_head n_embd n_unmasked`` and three dropout rates."""

    embd_pdrop = 0.1
    resid_pdrop = 0.1
    attn_pdrop = 0.1

    def __init__(self, vocab_size: int, block_size: int, **kwargs: Any):
        self.vocab_size = vocab_size
        self.block_size = block_size
        for key, value in kwargs.items():
            setattr(self, key, value)


#: One layer's keys and values, each (B, n_head, length, head_dim).
LayerCache = tuple[Tensor, Tensor]


class CausalSelfAttention(nn.Module):
    """Multi-head attention, causal but for the first ``n_unmasked`` positions, which see one another."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"got n_embd={config.n_embd}, which n_head={config.n_head} does not divide")
        self.n_head = config.n_head
        self.n_unmasked = getattr(config, "n_unmasked", 0)
        self.block_size = config.block_size
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.attn_drop = nn.Dropout(config.attn_pdrop)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    @property
    def mask(self) -> Tensor:
        """The original's buffer: 1 where a position sees another, (1, 1, block_size, block_size)."""
        return attention_mask(self.block_size, self.n_unmasked, self.proj.weight.device).float()[None, None]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self._split(p(x)) for p in (self.query, self.key, self.value))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def _join(self, y: Tensor) -> Tensor:
        return self.resid_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, n_embd) -> the same shape."""
        dropout = self.attn_drop.p if self.training else 0.0
        return self._join(ops.causal_attention(*self._heads(x), n_unmasked=self.n_unmasked, dropout_p=dropout))

    def forward_cached(self, x: Tensor, cache: LayerCache, start: int) -> Tensor:
        """The same for the positions ``start`` onwards, whose keys and values are written to ``cache``."""
        q, k, v = self._heads(x)
        keys, values = cache
        stop = start + x.shape[1]
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        if start == 0:
            return self._join(ops.causal_attention(q, k, v, n_unmasked=self.n_unmasked))
        mask = None
        if x.shape[1] > 1:
            rows = torch.arange(start, stop, device=x.device)
            mask = torch.arange(stop, device=x.device) <= rows[:, None]
        return self._join(F.scaled_dot_product_attention(q, keys[:, :, :stop], values[:, :, :stop], attn_mask=mask))

    def forward_ragged(self, x: Tensor, cache: LayerCache, spans: Sequence[Span], last_only: bool) -> Tensor:
        """The same for the tokens of several spans, one after the other in x (B, T, n_embd); cache (slots, B, ...).

        With ``last_only`` the result holds the last token of each span alone, (B, number of spans, n_embd).
        """
        ends = _ends(spans)
        k, v = self._split(self.key(x)), self._split(self.value(x))
        q = self._split(self.query(x[:, [end - 1 for end in ends]] if last_only else x))
        outputs = []
        for i, (span, end) in enumerate(zip(spans, ends, strict=True)):
            begin = end - span.count
            keys, values = cache[0][span.slot], cache[1][span.slot]
            keys[:, :, span.start : span.stop] = k[:, :, begin:end]
            values[:, :, span.start : span.stop] = v[:, :, begin:end]
            seen = keys[:, :, : span.stop], values[:, :, : span.stop]
            if last_only or span.count == 1:
                asking = q[:, :, i : i + 1] if last_only else q[:, :, begin:end]
                outputs.append(F.scaled_dot_product_attention(asking, *seen))
            elif span.start == 0:
                own = (part[:, :, begin:end] for part in (q, k, v))
                outputs.append(ops.causal_attention(*own, n_unmasked=self.n_unmasked))
            else:
                rows = torch.arange(span.start, span.stop, device=x.device)
                mask = torch.arange(span.stop, device=x.device) <= rows[:, None]
                outputs.append(F.scaled_dot_product_attention(q[:, :, begin:end], *seen, attn_mask=mask))
        return self._join(torch.cat(outputs, dim=2))


class Block(nn.Module):
    """Attention and a four times wider MLP with exact GELU, each behind a LayerNorm and added to its input."""

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

    def forward_ragged(self, x: Tensor, cache: LayerCache, spans: Sequence[Span], last_only: bool) -> Tensor:
        kept = x[:, [end - 1 for end in _ends(spans)]] if last_only else x
        x = kept + self.attn.forward_ragged(self.ln1(x), cache, spans, last_only)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """GPT2 with learned absolute positions, no weight tying and no bias in the head.

    The original stores each block's attention mask; state dicts written here carry it too, and ``n_unmasked`` of a
    loaded state dict is read off its masks.
    """

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
    ):
        super().__init__()
        at_least(1, vocab_size=vocab_size, block_size=block_size, n_head=n_head, n_embd=n_embd)
        at_least(0, n_layer=n_layer)
        self.config = GPTConfig(
            vocab_size, block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_unmasked=n_unmasked,
            embd_pdrop=embd_pdrop, resid_pdrop=resid_pdrop, attn_pdrop=attn_pdrop,
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
        """The longest sequence that the model takes."""
        return self.block_size

    def forward(self, idx: Tensor, embeddings: Tensor | None = None, targets: Tensor | None = None):
        """Tokens int64 (B, T) -> ``(logits (B, T, vocab_size), cross entropy or None)``.

        ``embeddings`` (B, E, n_embd) come before the tokens; ``targets`` int64 (B, T) asks for the loss, in nats.
        Raises ValueError when the sequence is longer than ``block_size``.
        """
        x = self.tok_emb(idx)
        if embeddings is not None:
            x = torch.cat((embeddings, x), dim=1)
        self._check_length(x.shape[1])
        x = self.drop(x + self.pos_emb[:, : x.shape[1]])
        logits = self.head(self.ln_f(self.blocks(x)))
        loss = None if targets is None else F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        return logits, loss

    def new_cache(self, batch: int, length: int | None = None) -> list[LayerCache]:
        """Empty keys and values for ``length`` positions (default ``block_size``): (B, n_head, length, D) each."""
        length = self.block_size if length is None else length
        self._check_length(length)
        shape = (batch, self.config.n_head, length, self.config.n_embd // self.config.n_head)
        return [(self.pos_emb.new_empty(shape), self.pos_emb.new_empty(shape)) for _ in self.blocks]

    def forward_cached(self, idx: Tensor, cache: list[LayerCache], start: int) -> Tensor:
        """Logits (B, t, vocab_size) of tokens (B, t) at positions ``start`` onwards, given what ``cache`` holds before.

        Positions that see later ones (``n_unmasked``) must come in one call with all that they see; ValueError else.
        """
        stop = start + idx.shape[1]
        if stop > cache[0][0].shape[2]:
            raise ValueError(f"got positions up to {stop - 1}, but the cache holds {cache[0][0].shape[2]}")
        if 0 < start < self.config.n_unmasked:
            raise ValueError(
                f"got start={start} inside the unmasked prefix of {self.config.n_unmasked} positions; "
                "span it whole from 0"
            )
        return self._run_cached(self.tok_emb(idx), cache, start)

    def _run_cached(self, embedded: Tensor, cache: list[LayerCache], start: int) -> Tensor:
        x = embedded + self.pos_emb[:, start : start + embedded.shape[1]]
        for block, layer in zip(self.blocks, cache, strict=True):
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
    ):
        """The original's cached step: ``(logits (B, t, vocab), loss or None, present)``.

        ``present`` holds the new keys and values, (n_layer, 2, B, n_head, t, D); ``past`` is the list of all earlier
        ones, of ``past_length`` positions together. Copies the whole past on each call; `forward_cached` does not.
        """
        x = self.tok_emb(idx)
        if embeddings is not None:
            x = torch.cat((embeddings, x), dim=1)
        start = 0 if past is None else sum(part.shape[-2] for part in past)
        if past is not None and start != past_length:
            raise ValueError(f"got past_length={past_length}, but past holds {start} positions")
        cache = self.new_cache(len(x), start + x.shape[1])
        for layer, (keys, values) in enumerate(cache):
            if past is not None:
                keys[:, :, :start], values[:, :, :start] = torch.cat([part[layer] for part in past], dim=-2)
        logits = self._run_cached(x, cache, start)
        loss = None if targets is None else F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        present = torch.stack([torch.stack((keys[:, :, start:], values[:, :, start:])) for keys, values in cache])
        return logits, loss, present

    def new_slots(self, slots: int, batch: int, length: int) -> list[LayerCache]:
        """Empty caches for `forward_ragged`: keys and values (slots, B, n_head, length, D) of each layer."""
        self._check_length(length)
        shape = (slots, batch, self.config.n_head, length, self.config.n_embd // self.config.n_head)
        return [(self.pos_emb.new_empty(shape), self.pos_emb.new_empty(shape)) for _ in self.blocks]

    def forward_ragged(self, idx: Tensor, cache: list[LayerCache], spans: Sequence[Span]) -> Tensor:
        """Logits (B, number of spans, vocab_size) of the last token of each span.

        ``idx`` (B, T) holds the tokens of all spans, one after the other; each span has a slot of ``cache`` of its own
        and is as long as its positions say. What `forward_cached` says of the cache holds for each slot.
        """
        place = torch.cat([torch.arange(span.start, span.stop, device=idx.device) for span in spans])
        x = self.tok_emb(idx) + self.pos_emb[0, place]
        last = len(self.blocks) - 1
        for i, (block, layer) in enumerate(zip(self.blocks, cache, strict=True)):
            x = block.forward_ragged(x, layer, spans, last_only=i == last)
        return self.head(self.ln_f(x))

    def _check_length(self, length: int) -> None:
        if length > self.block_size:
            raise ValueError(
                f"got a sequence of {length} tokens; this model takes at most block_size={self.block_size}"
            )


def _ends(spans: Sequence[Span]) -> list[int]:
    return list(itertools.accumulate(span.count for span in spans))


def _add_masks(gpt: GPT, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    mask = attention_mask(gpt.block_size, gpt.config.n_unmasked, gpt.pos_emb.device).float()[None, None]
    for i in range(len(gpt.blocks)):
        state[f"{prefix}blocks.{i}.attn.mask"] = mask


def _read_masks(gpt: GPT, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
    found = None
    for i, block in enumerate(gpt.blocks):
        mask = state.pop(f"{prefix}blocks.{i}.attn.mask", None)
        if mask is None or mask.is_meta:
            continue
        found = _unmasked_prefix(mask[0, 0], f"{prefix}blocks.{i}.attn.mask")
        block.attn.n_unmasked = found
    if found is not None:
        gpt.config.n_unmasked = found


def _unmasked_prefix(mask: Tensor, name: str) -> int:
    n = int(mask[0].sum())
    n = 0 if n == 1 else n  # one unmasked position is plain causal attention
    if not torch.equal(mask.float(), attention_mask(len(mask), n, mask.device).float()):
        raise UserError(f"'{name}' is neither causal nor causal after an unmasked prefix, which is all this GPT can do")
    return n


# --- the original's sampling functions ------------------------------------------------------------------------------


def top_k_logits(logits: Tensor, k: int) -> Tensor:
    """Logits with all but the k largest of the last axis (and ties) at -inf."""
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], -torch.inf)


def top_k_top_p_filtering(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """`tamingfast.ops.choice.top_k_top_p` under the original's name; 0 and 1.0 keep everything."""
    from tamingfast.ops.choice import top_k_top_p  # the filters' one home lies above the models

    return top_k_top_p(logits, top_k=top_k or None, top_p=top_p if top_p < 1.0 else None)


def pick(logits: Tensor, sample: bool) -> Tensor:
    """One token for each row of logits (..., vocab): drawn by torch's generator, or the likeliest; int64 (...)."""
    if not sample:
        return logits.topk(1, dim=-1).indices[..., 0]
    flat = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1)
    return flat.view(logits.shape[:-1])


@torch.no_grad()
def sample(
    model: GPT, x: Tensor, steps: int, temperature: float = 1.0, sample: bool = False, top_k: int | None = None
) -> Tensor:
    """Continue tokens x (B, k) by ``steps``, the whole sequence (cut to the block size) through the model each time."""
    model.eval()
    for _ in range(steps):
        logits = model(x[:, -model.get_block_size() :])[0][:, -1] / temperature
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
    callback: Callable[[int], Any] | None = None,
) -> Tensor:
    """Tokens (B, steps) that follow the condition x (B, c), with a key/value cache.

    As in the original ``top_p`` counts only together with ``top_k``.
    """
    cache, done, sequence = model.new_cache(len(x), x.shape[1] + steps), 0, x
    for n in range(steps):
        if callback is not None:
            callback(n)
        logits = model.forward_cached(sequence[:, done:], cache, done)[:, -1] / temperature
        done = sequence.shape[1]
        if top_k is not None:
            logits = top_k_top_p_filtering(logits, top_k, 1.0 if top_p is None else top_p)
        sequence = torch.cat((sequence, pick(logits, sample_logits)[:, None]), dim=1)
    return sequence[:, x.shape[1] :]
