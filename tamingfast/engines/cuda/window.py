"""The step of fixed shape over several rows of each sequence: guessed tokens are fed behind the last known one.

Every row chooses its token with the noise of its own place. As long as a choice equals the guess that was fed, the next
row's choice is the sequential one; see docs/lookahead.md. All of it happens on the device, so a graph of it is captured
and replayed as that of `Step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tamingfast.engines.cuda.cache import Cache
from tamingfast.engines.cuda.device import Device, lasting_tensors
from tamingfast.engines.cuda.step import Step, check_errors
from tamingfast.engines.cuda.weights import Geometry, Weights
from tamingfast.engines.networks import LayerCache
from tamingfast.engines.request import DecodeRequest


class Window(Step):
    """The step for ``width`` rows of each of ``batch`` sequences; row i of a sequence is i places after its known one.

    Rows after the last place repeat it. `sequence` is scratch memory of the token choice, one line for each row.

    Attributes:
        tokens: int64 (batch, capacity + 1); known up to ``known``, guessed after it.
        known: int64 (batch, 1), the position of each sequence's last known token. A sequence is done once this is the
            position of its last token to decode.
    """

    def __init__(
        self, geometry: Geometry, weights: Weights, cache: Cache, device: Device, batch: int, width: int
    ) -> None:
        super().__init__(geometry, weights, cache, device, batch * width)
        place = device.place
        with lasting_tensors():
            self.ahead = torch.arange(width, dtype=torch.int64, device=place)
            self.tokens = torch.zeros(batch, self.length, dtype=torch.int64, device=place)
            self.guessed = torch.zeros(batch, self.length, dtype=torch.bool, device=place)
            self.known = torch.zeros(batch, 1, dtype=torch.int64, device=place)
            self.last = torch.zeros(1, dtype=torch.int64, device=place)  # the last position to feed
            self.failed = torch.zeros(batch, width, dtype=torch.int32, device=place)  # errors of known tokens

    def begin(self, request: DecodeRequest) -> None:
        """Copies a request to the device; all tokens before its first step are known."""
        super().begin(request)
        first, count = request.steps[0] - 1, len(self.ahead)
        wanted, given = self.wanted[::count], self.sequence[::count]
        self.tokens.copy_(torch.where(wanted, given[:, first : first + 1], given))  # nothing better is known yet
        self.guessed.copy_(~wanted)
        self.known.fill_(first)
        self.last.fill_(request.steps[-1] - 1)
        self.failed.zero_()

    def reached(self) -> list[int]:
        """Waits, and returns ``known``; ValueError if a token could not be chosen."""
        check_errors(self.failed.flatten())
        return self.known.flatten().tolist()

    def collect_known(self, sequences: Tensor) -> None:
        """Writes the tokens up to ``known`` into ``sequences``, of each what it has room for."""
        count = min(sequences.shape[1], self.length)
        known = torch.arange(count, dtype=torch.int64, device=self.known.device) <= self.known
        sequences[:, :count] = torch.where(known, self.tokens[:, :count], sequences[:, :count])

    def _queue(self) -> None:
        places = self._places()
        fed = self.tokens.gather(1, places).flatten()
        self.at.copy_(places.flatten())
        self.x.copy_(self.weights.tok_emb[fed] + self.weights.pos_emb[places.flatten()])
        logits = self._logits()
        self._accept(places, self._chosen(logits, places))
        self._guess(logits)

    def _places(self) -> Tensor:
        """The position of each row, int64 (batch, width)."""
        return torch.minimum(self.known + self.ahead, self.last)

    def _attend(self, held: LayerCache) -> None:
        self.cache.append(held, self.qkv, self.slot, self.at)  # rows read the keys of those before them
        self.cache.attend(held, self.qkv, self.joined, self.slot, self.at, self.at, self.split, append=False)

    def _chosen(self, logits: Tensor, places: Tensor) -> Tensor:
        """The tokens (batch, width) after ``places`` by each row of logits; known ones as they are."""
        following = places + 1
        self.sequence.scatter_(1, following.view(-1, 1), self.tokens.gather(1, following).view(-1, 1))
        self.at.copy_(places.flatten())
        self.errors.zero_()
        self._choose(logits)
        return self.sequence.gather(1, following.view(-1, 1)).view_as(places)

    def _accept(self, places: Tensor, chosen: Tensor) -> None:
        """Moves on behind the choices whose rows were fed only right tokens; the others are guesses from now on."""
        following = places + 1
        right = (chosen == self.tokens.gather(1, following))[:, :-1].long().cumprod(1).sum(1, keepdim=True)
        count = torch.minimum(right, self.last - self.known) + 1  # none, once a sequence is done
        self.failed |= self.errors.view_as(places).masked_fill(self.ahead >= count, 0)
        self.tokens.scatter_(1, following, chosen)
        self.guessed.scatter_(1, following, torch.ones_like(following, dtype=torch.bool))
        self.known += count

    def _guess(self, logits: Tensor) -> None:
        """Guesses tokens that enter the window: by the logits of its last row, with the noise of their own place."""
        places = self._places()
        following = places + 1
        last = logits.view(*places.shape, -1)[:, -1:].expand(-1, places.shape[1], -1).reshape(logits.shape)
        guess = self._chosen(last.contiguous(), places)
        before = self.tokens.gather(1, following)
        self.tokens.scatter_(1, following, torch.where(self.guessed.gather(1, following), before, guess))
