"""Decoding one window's tokens one after the other: in torch with or without a cache, or in a native engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from tamingfast.engines import DecodeRequest, Engine
from tamingfast.engines.networks import Transformer
from tamingfast.engines.request import Second
from tamingfast.ops.choice import Choice
from tamingfast.sampling.guidance import Guidance


class Decoder(Protocol):
    """Gives the logits of one token after the other of a window."""

    def enter(self, sequence: Tensor) -> None:
        """Move to a window, whose tokens are ``sequence``: int64 (B, c + n), the condition first.

        The caller writes the tokens that it chooses into ``sequence``.
        """

    def logits(self, length: int) -> Tensor:
        """Logits (B, V) of token ``length`` of the sequence, given all tokens before it.

        Those are known by then; ``length`` increases within a window.
        """


class NaiveDecoder:
    """The paper's protocol: a full forward pass for every token, no cache.

    Args:
        gpt: the transformer.
        whole_window: pass the whole window each time, as the original's sliding-window scripts do, instead of only the
            tokens before the wanted one, as its `sample` does. The two are the same function where attention is causal
            over image tokens.
    """

    def __init__(self, gpt: Transformer, whole_window: bool) -> None:
        self.gpt = gpt
        self.whole_window = whole_window

    def enter(self, sequence: Tensor) -> None:
        self.sequence = sequence

    def logits(self, length: int) -> Tensor:
        fed = self.sequence[:, :-1] if self.whole_window else self.sequence[:, :length]
        return self.gpt(fed)[0][:, length - 1]


class CachedDecoder:
    """A static key/value cache that grows while the window stays and is refilled when it moves.

    Position embeddings belong to places in the sequence, so a moved window makes the keys of its image tokens stale;
    those of a condition that is the same in every window stay valid.

    Args:
        gpt: the transformer; its ``n_unmasked`` must not exceed the number of conditioning tokens.
        batch: B.
        length: the longest sequence that is fed.
        shared: leading tokens that are the same in every window.
    """

    def __init__(self, gpt: Transformer, batch: int, length: int, shared: int) -> None:
        self.gpt = gpt
        self.shared = shared
        self.cache = gpt.new_cache(batch, length)
        self.fed = 0

    def enter(self, sequence: Tensor) -> None:
        self.sequence = sequence
        self.fed = min(self.fed, self.shared)

    def logits(self, length: int) -> Tensor:
        start = min(self.fed, length - 1)  # the cache may cover the whole input, but the logits were not kept
        if start < self.gpt.config.n_unmasked:  # bidirectional tokens see one another, so they go in together
            start = 0
        logits = self.gpt.forward_cached(self.sequence[:, start:length], self.cache, start)
        self.fed = length
        return logits[:, -1]


class NativeDecoder:
    """A native engine, which decodes and chooses whole runs of tokens; it uses its cache as `CachedDecoder` does.

    Args:
        engine: with an empty slot for each image of the batch.
        images: the images' numbers, for the noise.
        shared: leading tokens that are the same in every window.
        choices: only the first ``choices`` entries of the vocabulary may be chosen.
        choice: how a token is chosen.
        lookahead: as in `DecodeRequest`.
        guidance: of the grid; with it the engine has a second slot for each image, behind the others.
    """

    def __init__(
        self,
        engine: Engine,
        images: range,
        shared: int,
        choices: int,
        choice: Choice,
        lookahead: int | None,
        guidance: Guidance,
    ) -> None:
        self.guidance = guidance
        self.engine, self.images, self.shared = engine, images, shared
        self.choices, self.choice, self.lookahead = choices, choice, lookahead

    def decode(
        self,
        sequence: Tensor,
        steps: list[int],
        wanted: Tensor,
        rows: list[int],
        columns: list[int],
        progress: Callable[[int], None] | None,
        every: int,
        width: int,
    ) -> None:
        """Write the tokens at positions ``steps`` of ``sequence`` (B, c + n); see `DecodeRequest`.

        ``progress(done)`` is called whenever ``every`` divides the number of steps done; ``width`` is the grid's.
        """
        count = len(self.images)
        second = None
        if self.guidance.scales is not None:
            cells = [row * width + column for row, column in zip(rows, columns, strict=True)]
            scales = self.guidance.scales[cells].tolist()
            second = Second(range(count, 2 * count), self.guidance.null, self.guidance.prefix, scales)
        held = map(self.engine.length, range(count * self.guidance.copies))
        request = DecodeRequest(
            slots=range(count), sequences=sequence, steps=steps, wanted=wanted, rows=rows, columns=columns,
            images=self.images, fed=min([self.shared, *held]), choices=self.choices, choice=self.choice,
            lookahead=self.lookahead, second=second,
        )  # fmt: skip
        self.engine.decode(request, progress=progress, every=every)
