"""Executes a schedule several waves at a time: tokens of the first are known, those of later ones guessed and checked.

A choice stands if every guessed token that its window held was right, for then it is the choice that one wave after the
other would have made. So the tokens are the same; only the number of passes changes. Each image moves on by itself.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tamingfast.engines.networks import Transformer
from tamingfast.engines.request import Span
from tamingfast.ops.choice import check_chosen
from tamingfast.sampling.context import Context
from tamingfast.sampling.guidance import Guidance
from tamingfast.sampling.lookahead import WIDEST, PassCost, Survival, best_depth
from tamingfast.sampling.schedule import Schedule, Waves
from tamingfast.sampling.waves import NO_GUIDANCE, TOKENS_PER_CALL

#: Most logits that are kept to guess the tokens to their right and below.
KEPT = 1 << 24


class SpanEngine(Protocol):
    """Runs the transformer; a slot holds one window of one image."""

    def feed(self, tokens: Tensor, spans: Sequence[Span], logits: Sequence[int]) -> Tensor:
        """Feeds int64 (T,), the tokens of all spans in turn; logits (R, V) of each span's last tokens, that many."""


class TorchSpans:
    """The transformer in torch, with ``slots`` caches of ``length`` tokens each."""

    def __init__(self, gpt: Transformer, slots: int, length: int) -> None:
        self.gpt = gpt
        self.cache = gpt.new_slots(slots, 1, length)

    def feed(self, tokens: Tensor, spans: Sequence[Span], logits: Sequence[int]) -> Tensor:
        return self.gpt.forward_ragged(tokens[None], self.cache, spans, logits)[0]


def torch_cost(gpt: Transformer, owner: Transformer) -> PassCost:
    """What passes of the transformer in torch cost; measured once for each ``owner``, type and number of threads.

    ``owner`` is the caller's transformer, of which ``gpt`` may be a copy in another type.
    """
    known = _costs.setdefault(owner, {})
    how = (next(gpt.parameters()).device, next(gpt.parameters()).dtype, torch.get_num_threads())
    if how not in known:
        known[how] = PassCost.measured(lambda rows: _time_pass(gpt, rows))
    return known[how]


_costs: weakref.WeakKeyDictionary[Transformer, dict[tuple[Any, ...], PassCost]] = weakref.WeakKeyDictionary()


def _time_pass(gpt: Transformer, rows: int) -> float:
    """Seconds that the transformer takes for a pass over that many tokens."""
    device = next(gpt.parameters()).device
    count = min(rows, gpt.block_size)
    cache = gpt.new_slots(1, 1, count)
    begun = time.perf_counter()
    gpt.forward_ragged(torch.zeros(1, count, dtype=torch.int64, device=device), cache, [Span(0, 0, count)], [count])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) * rows / count


@dataclass
class _Image:
    """How far one image is.

    Attributes:
        index: in the batch.
        done: (entries,), which of them need no more choice.
        first: the first entry that does.
        window: corner of the window whose tokens a slot holds.
        held: how many of its image tokens are right.
        filled: slots that hold the condition, where it is the same in every window.
    """

    index: int
    done: bytearray
    first: int = 0
    window: dict[int, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)


@dataclass
class _Choice:
    """An entry of an image that a pass chooses."""

    image: _Image
    entry: int
    depth: int  # waves after the image's first
    row: int = -1  # of the pass's logits
    null_row: int = -1  # the same, under the null class


class GuessedWaves:
    """Samples every entry of ``waves`` into ``canvas``.

    Args:
        engine: must have a slot ``slot * B + image`` for every slot that ``waves`` names and, with guidance, as many
            again behind them.
        context, canvas, wanted: as in `tamingfast.sampling.waves.sample_waves`.
        best: tokens (n,) and their scores from logits (n, vocab) and noise of the same shape, or None.
        noise: (B, vocab), or None, for each entry of ``waves`` in turn.
        vocab: entries of the vocabulary that may be chosen.
        n_unmasked: leading tokens that attend to one another, so they are fed together.
        after: called with the raster indices of the cells that are sampled in all images.
        lookahead: waves in a pass; None takes what ``cost`` promises to be fastest.
        cost: of the engine's passes; None with a ``lookahead``.
        guidance: of the grid.
    """

    def __init__(
        self,
        engine: SpanEngine,
        schedule: Schedule,
        waves: Waves,
        context: Context,
        canvas: Tensor,
        wanted: Tensor,
        best: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        noise: Iterator[Tensor | None],
        vocab: int,
        n_unmasked: int = 0,
        after: Callable[[Tensor], None] = lambda cells: None,
        lookahead: int | None = None,
        cost: PassCost | None = None,
        guidance: Guidance = NO_GUIDANCE,
    ) -> None:
        self.engine, self.context, self.canvas, self.best, self.after = engine, context, canvas, best, after
        self.n_unmasked, self.lookahead, self.cost, self.guidance = n_unmasked, lookahead, cost, guidance
        self.null_slots = (int(waves.slots.max(initial=-1)) + 1) * len(canvas)  # the first of them
        self.offsets, self.width = schedule.offsets, schedule.width
        self.cells, self.corners, self.steps, self.slots = (
            values.tolist() for values in (waves.cells, waves.corners, waves.steps, waves.slots)
        )
        self.wave_of = np.repeat(np.arange(len(waves)), np.diff(waves.bounds)).tolist()
        pending = wanted.cpu().numpy()[:, waves.cells]
        self.left = pending.sum(0)  # images that still need each entry
        self.images = [_Image(i, bytearray((~row).tobytes())) for i, row in enumerate(pending)]
        self.tokens = canvas.cpu().numpy().copy()  # with guesses, where there are any
        self.guessed = np.zeros(self.tokens.shape, dtype=bool)
        self.wrong = np.zeros(self.tokens.shape, dtype=bool)
        self.survival = Survival()
        self.known = _Known(len(canvas), schedule.width, vocab, canvas.device)
        self.noise, self.drawn = noise, 0
        self.noise_of: dict[int, Tensor | None] = {}
        self.depth = 1  # waves in the last pass
        self.careful = False

    def run(self) -> None:
        """Samples all entries."""
        while images := [image for image in self.images if self._advance(image)]:
            choices = self._choices(images)
            if any(choice.depth for choice in choices):
                self._guess(choices)
            logits = self._feed(choices)
            self.known.keep(
                [c.image.index for c in choices], [self.cells[c.entry] % self.width for c in choices], logits
            )
            self._accept(choices, *self.best(logits, self._noise(choices)))

    def _advance(self, image: _Image) -> bool:
        """Moves the image to its first entry that is not done; whether there is one."""
        while image.first < len(self.cells) and image.done[image.first]:
            image.first += 1
        return image.first < len(self.cells)

    # --- which entries ------------------------------------------------------------------------------

    def _choices(self, images: list[_Image]) -> list[_Choice]:
        most = 1 if self.careful else self.lookahead or self._deepest()
        self.careful = False
        each = [list(self._candidates(image, most)) for image in images]
        if self.lookahead is None and self.cost is not None and most > 1:
            rows, count = [0] * most, [0] * most
            for choices in each:
                self._count(choices, rows, count)
            most = self.depth = best_depth(self.cost, self.survival, rows, count)
        return [choice for choices in each for choice in choices if choice.depth < most]

    def _deepest(self) -> int:
        """The most waves to consider: not many more than there were in the last pass, because each takes time."""
        return 1 if self.cost is None else min(2 * self.depth + 4, WIDEST)

    def _candidates(self, image: _Image, most: int) -> Iterator[_Choice]:
        """Entries of the image's next waves, until one needs the slot of a window that is not finished."""
        first = self.wave_of[image.first]
        windows: dict[int, int] = {}
        for entry in range(image.first, len(self.cells)):
            depth = self.wave_of[entry] - first
            if depth >= most:
                return
            if image.done[entry]:
                continue
            if windows.setdefault(self.slots[entry], self.corners[entry]) != self.corners[entry]:
                return
            yield _Choice(image, entry, depth)

    def _count(self, choices: list[_Choice], rows: list[int], count: list[int]) -> None:
        """Adds the rows and choices of an image at each depth."""
        ends: dict[int, int] = {}
        for choice in choices:
            slot, step = self.slots[choice.entry], self.steps[choice.entry]
            if slot not in ends:
                ends[slot] = self._start(choice.image, choice.entry) - self.context.length
            rows[choice.depth] += self.guidance.copies * (step - ends[slot])
            count[choice.depth] += 1
            ends[slot] = step

    def _start(self, image: _Image, entry: int) -> int:
        """The first position to feed for the entry, the first of its window in a pass."""
        slot, prefix = self.slots[entry], self.context.length
        if image.window.get(slot) == self.corners[entry]:
            start = prefix + image.held[slot]
        else:
            start = prefix if self.context.fixed and slot in image.filled else 0
        start = min(start, prefix + self.steps[entry] - 1)
        return 0 if start < self.n_unmasked else start

    # --- guesses ------------------------------------------------------------------------------------

    def _guess(self, choices: list[_Choice]) -> None:
        """Guesses the tokens that have not been chosen in an earlier pass, from the logits to the left and above."""
        entering = [c for c in choices if not self.guessed[c.image.index, self.cells[c.entry]]]
        if not entering:
            return
        images, columns = self._columns(entering)
        before = [self._before(choice.entry) % self.width for choice in entering]
        logits, known = self.known.near(images, before, columns)
        tokens = [0] * len(entering) if logits is None else self.best(logits, self._noise(entering))[0].tolist()
        for choice, token, sure in zip(entering, tokens, known, strict=True):
            index, cell = choice.image.index, self.cells[choice.entry]
            self.tokens[index, cell] = token if sure else self.tokens[index, self._before(choice.entry)]
            self.guessed[index, cell] = True

    def _columns(self, choices: list[_Choice]) -> tuple[list[int], list[int]]:
        """The image and the grid's column of each choice."""
        return [c.image.index for c in choices], [self.cells[c.entry] % self.width for c in choices]

    def _before(self, entry: int) -> int:
        """The cell before the entry's in its window; the first one's own."""
        return self.corners[entry] + int(self.offsets[max(self.steps[entry] - 1, 0)])

    def _noise(self, choices: list[_Choice]) -> Tensor | None:
        """The noise (n, vocab) of the choices; None where there is none."""
        for entry in range(self.drawn, max(choice.entry for choice in choices) + 1):
            self.noise_of[entry] = next(self.noise)
            self.drawn = entry + 1
        for entry in range(min(self.noise_of), min(image.first for image in self.images)):
            self.noise_of.pop(entry, None)
        own = [(self.noise_of[choice.entry], choice.image.index) for choice in choices]
        rows = [noise[index] for noise, index in own if noise is not None]
        return torch.stack(rows) if rows else None

    # --- a pass -------------------------------------------------------------------------------------

    def _feed(self, choices: list[_Choice]) -> Tensor:
        """Logits (n, vocab) of the choices."""
        windows: dict[tuple[int, int], list[_Choice]] = {}
        for choice in choices:
            windows.setdefault((self.slots[choice.entry], choice.image.index), []).append(choice)
        found: list[Tensor] = []
        spans: list[Span] = []
        tokens: list[Tensor] = []
        asked: list[int] = []
        total = rows = 0
        for (slot, _), inside in windows.items():
            span, fed = self._span(slot, inside)
            if spans and total + len(fed) > TOKENS_PER_CALL:
                found.append(self.engine.feed(torch.cat(tokens), spans, asked))
                spans, tokens, asked, total = [], [], [], 0
            first = self.context.length + self.steps[inside[0].entry] - 1
            for choice in inside:
                choice.row = rows + self.context.length + self.steps[choice.entry] - 1 - first
                choice.null_row = choice.row + span.stop - first
            spans += [replace(span, slot=span.slot + copy * self.null_slots) for copy in range(self.guidance.copies)]
            tokens.append(fed)
            asked += self.guidance.copies * [span.stop - first]
            total, rows = total + len(fed), rows + self.guidance.copies * asked[-1]
        found.append(self.engine.feed(torch.cat(tokens), spans, asked))
        wanted = [choice.row for choice in choices]
        if self.guidance.copies == 2:
            wanted += [choice.null_row for choice in choices]
        logits = torch.cat(found)[_integers(wanted, found[0].device), : self.known.vocab]
        cells = _integers([self.cells[choice.entry] for choice in choices], logits.device)
        return self.guidance.combined(logits, cells)

    def _span(self, slot: int, inside: list[_Choice]) -> tuple[Span, Tensor]:
        """What a window is fed for its choices; the tokens of all its sequences."""
        image, prefix = inside[0].image, self.context.length
        corner, stop = self.corners[inside[0].entry], prefix + self.steps[inside[-1].entry]
        start = self._start(image, inside[0].entry)
        own = self.tokens[image.index, corner + self.offsets[max(start - prefix, 0) : stop - prefix]]
        tokens = torch.from_numpy(own).to(self.canvas.device)
        if start < prefix:
            tokens = torch.cat((self.context.before(corner, start)[image.index], tokens))
        image.window[slot] = corner
        image.filled.add(slot)
        fed = self.guidance.beside(tokens[None], start).flatten()
        return Span(slot * len(self.images) + image.index, start, stop - start), fed

    def _accept(self, choices: list[_Choice], tokens: Tensor, scores: Tensor) -> None:
        """Commits the choices whose windows held only right tokens; the others become guesses."""
        for choice in choices:
            self.wrong[choice.image.index, self.cells[choice.entry]] = True
        stand: list[tuple[int, int, int]] = []  # entry, image, token
        failed: list[float] = []
        seen: dict[int, list[bool]] = {}
        for choice, token, score in zip(choices, tokens.tolist(), scores.tolist(), strict=True):
            index, entry = choice.image.index, choice.entry
            read = self.corners[entry] + self.offsets[: self.steps[entry]]
            right = not self.wrong[index, read].any()
            seen.setdefault(choice.depth, []).append(right)
            bad = not score > -np.inf
            if right and bad:
                failed.append(score)
            elif right:
                stand.append((entry, index, token))
                self.wrong[index, self.cells[entry]] = (
                    not self.guessed[index, self.cells[entry]] or self.tokens[index, self.cells[entry]] != token
                )
            if not bad:
                self.tokens[index, self.cells[entry]] = token
                self.guessed[index, self.cells[entry]] = True
        self._settle(choices)
        self._commit(stand)
        if len(seen) == max(seen) + 1:
            self.survival.observe([float(np.mean(seen[depth])) for depth in sorted(seen)])
        if failed:
            self._fail(failed, guesses=len(seen) > 1)

    def _settle(self, choices: list[_Choice]) -> None:
        """Notes how many tokens of each window are right, and forgets what was wrong."""
        for choice in choices:  # the last of a window decides
            index, entry = choice.image.index, choice.entry
            fed = self.wrong[index, self.corners[entry] + self.offsets[: self.steps[entry]]]
            choice.image.held[self.slots[entry]] = int(fed.argmax()) if fed.any() else len(fed)
        for choice in choices:
            self.wrong[choice.image.index, self.cells[choice.entry]] = False

    def _commit(self, stand: list[tuple[int, int, int]]) -> None:
        if not stand:
            return
        finished = []
        for entry, index, _ in stand:
            self.images[index].done[entry] = True
            self.left[entry] -= 1
            if self.left[entry] == 0:
                finished.append(self.cells[entry])
        device = self.canvas.device
        indices = _integers([index for _, index, _ in stand], device)
        cells = _integers([self.cells[entry] for entry, _, _ in stand], device)
        self.canvas[indices, cells] = _integers([token for _, _, token in stand], device)
        if finished:
            self.after(_integers(finished, device))

    def _fail(self, scores: list[float], guesses: bool) -> None:
        """A row has no token. In torch a guess whose values are NaN spoils rows before it, so all are fed again."""
        if not guesses:
            check_chosen(nan=bool(np.isnan(scores).any()), nothing=True)
        self.careful = True
        for image in self.images:
            image.window.clear()
            image.filled.clear()


class _Known:
    """The latest logits in each column of each image's grid."""

    def __init__(self, batch: int, width: int, vocab: int, device: torch.device) -> None:
        self.vocab = vocab
        self.logits = (
            torch.zeros(batch, width, vocab, dtype=torch.float32, device=device)
            if batch * width * vocab <= KEPT
            else None
        )
        self.known = np.zeros((batch, width), dtype=bool)

    def keep(self, images: list[int], columns: list[int], logits: Tensor) -> None:
        """Remembers logits (n, vocab) of the images and columns."""
        if self.logits is not None:
            self.logits[images, columns] = logits.float()
            self.known[images, columns] = True

    def near(self, images: list[int], left: list[int], above: list[int]) -> tuple[Tensor | None, list[bool]]:
        """The mean (n, vocab) of the logits in two columns, as far as they are known; and whether any is."""
        if self.logits is None:
            return None, [False] * len(images)
        weights = np.stack((self.known[images, left], self.known[images, above]))
        total = weights.sum(0)
        share = torch.from_numpy((weights / np.maximum(total, 1)).astype(np.float32)).to(self.logits.device)
        mean = share[0, :, None] * self.logits[images, left] + share[1, :, None] * self.logits[images, above]
        return mean, (total > 0).tolist()


def _integers(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
