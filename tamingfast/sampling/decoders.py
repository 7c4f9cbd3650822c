"""Backends of the sampler: the torch ones tell the logits of a window's next token, the native one decodes runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from tamingfast.engines.cpu import GPTEngine
from tamingfast.engines.cuda import CudaEngine


@dataclass(frozen=True)
class Task:
    """Tokens to decode one after the other inside one window.

    Attributes:
        sequence: int64 (B, c + n), conditioning first; the decoded tokens are written into it.
        steps: (S,), rising positions in the sequence.
        wanted: bool (B, S); where False, the token that is there stays.
        rows, columns: (S,), where the tokens stand in the grid.
        before: how many positions were decoded in earlier tasks.
    """

    sequence: Tensor
    steps: list[int]
    wanted: Tensor
    rows: list[int]
    columns: list[int]
    before: int


class Decoder(Protocol):
    """What the sampler asks of a backend."""

    def enter(self, sequence: Tensor) -> None:
        """Moves to a window of tokens `sequence`: int64 (B, c + n), conditioning first.

        The sampler writes the tokens that it decodes into it.
        """

    def logits(self, length: int) -> Tensor:
        """Logits (B, V) of token `length` of the sequence, given those before it.

        Those are known by then; `length` rises within a window.
        """


class NaiveDecoder:
    """The paper's protocol: a full forward pass for every token, nothing kept.

    Args:
        gpt: the transformer.
        whole_window: pass the whole window each time, as the original's sliding-window scripts do, instead of
            the tokens before the wanted one, as its `sample` does. Both are the same function as long as
            attention is causal over image tokens.
    """

    def __init__(self, gpt: nn.Module, whole_window: bool) -> None:
        self.gpt = gpt
        self.whole_window = whole_window

    def enter(self, sequence: Tensor) -> None:
        self.sequence = sequence

    def logits(self, length: int) -> Tensor:
        fed = self.sequence[:, :-1] if self.whole_window else self.sequence[:, :length]
        return self.gpt(fed)[0][:, length - 1]


class CachedDecoder:
    """A static key/value cache that is extended while the window stays and refilled when it moves.

    Position embeddings are learned per place in the sequence, so a moved window makes the keys of its image
    tokens stale; those of a conditioning prefix that is the same in every window stay valid.

    Args:
        gpt: the transformer; its `n_unmasked` must not reach beyond the conditioning tokens.
        batch: B.
        length: the longest sequence that is fed.
        shared: leading tokens that are the same in every window.
    """

    def __init__(self, gpt: nn.Module, batch: int, length: int, shared: int) -> None:
        self.gpt = gpt
        self.shared = shared
        self.cache = gpt.new_cache(batch, length)
        self.fed = 0

    def enter(self, sequence: Tensor) -> None:
        self.sequence = sequence
        self.fed = min(self.fed, self.shared)

    def logits(self, length: int) -> Tensor:
        start = min(self.fed, length - 1)  # a kept prefix may hold all that is needed except the logits
        if start < self.gpt.config.n_unmasked:  # bidirectional tokens see each other, so they go in together
            start = 0
        logits = self.gpt.forward_cached(self.sequence[:, start:length], self.cache, start)
        self.fed = length
        return logits[:, -1]


class NativeDecoder:
    """The extension's engine: whole runs of tokens, chosen there too; keys and values are kept as `CachedDecoder` does.

    Args:
        engine: with a slot for each image of the batch, all empty.
        batch: B.
        shared: leading tokens that are the same in every window.
        options: of the choice, for `GPTEngine.decode`.
    """

    def __init__(self, engine: GPTEngine | CudaEngine, batch: int, shared: int, options: dict[str, Any]) -> None:
        self.engine = engine
        self.slots = range(batch)
        self.shared = shared
        self.options = options

    def decode(self, task: Task, report: Callable[[int], None] | None, every: int) -> None:
        """Does the task; calls `report` with the positions decoded in all tasks, whenever `every` divides it."""
        fed = min([self.shared, *(self.engine.length(slot) for slot in self.slots)])
        self.engine.decode(
            self.slots, task.sequence, task.steps, wanted=task.wanted, rows=task.rows, columns=task.columns, fed=fed,
            progress=report, every=every, **self.options,
        )  # fmt: skip
