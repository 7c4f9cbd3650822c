"""What the benchmarks of decoding share: the original's loop, its rivals, our torch engine, and a request for ours."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.engines import DecodeRequest
from tamingfast.models.gpt import GPT
from tamingfast.ops.choice import Choice

TOP_K = 100


class GrowingCache:
    """The baseline: keys and values are concatenated with those of the past at every layer and step."""

    def __init__(self, gpt: GPT, batch: int) -> None:
        self.gpt = gpt
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * len(gpt.blocks)

    def jump(self, length: int, batch: int) -> None:
        """Fills the cache with zeros for `length` tokens, which take as long as real ones."""
        config = self.gpt.config
        shape = (batch, config.n_head, length, config.n_embd // config.n_head)
        self.past = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.past]

    def logits(self, tokens: Tensor, position: int) -> Tensor:
        x = self.gpt.tok_emb(tokens) + self.gpt.pos_emb[:, position : position + 1]
        for i, block in enumerate(self.gpt.blocks):
            x = x + self._attend(block.attn, block.ln1(x), i)
            x = x + block.mlp(block.ln2(x))
        return self.gpt.head(self.gpt.ln_f(x))[:, -1]

    def _attend(self, attn: nn.Module, x: Tensor, i: int) -> Tensor:
        batch, _, width = x.shape
        heads = attn.n_head
        q, k, v = (f(x).view(batch, 1, heads, -1).transpose(1, 2) for f in (attn.query, attn.key, attn.value))
        if self.past[i] is not None:
            k, v = torch.cat((self.past[i][0], k), 2), torch.cat((self.past[i][1], v), 2)
        self.past[i] = k, v
        weights = F.softmax(q @ k.transpose(2, 3) * (k.shape[-1] ** -0.5), dim=-1)
        return attn.proj((weights @ v).transpose(1, 2).reshape(batch, 1, width))


class StaticCache:
    """Our torch engine."""

    def __init__(self, gpt: GPT, batch: int) -> None:
        self.gpt = gpt
        self.cache = [tuple(half.zero_() for half in layer) for layer in gpt.new_cache(batch)]

    def jump(self, length: int, batch: int) -> None:
        pass

    def logits(self, tokens: Tensor, position: int) -> Tensor:
        return self.gpt.forward_cached(tokens, self.cache, position)[:, -1]


class HuggingFace:
    """GPT2LMHeadModel of the same shape with its dynamic cache."""

    @staticmethod
    def installed() -> bool:
        return find_spec("transformers") is not None

    def __init__(self, gpt: GPT, batch: int) -> None:
        import transformers

        self.config = transformers.GPT2Config(
            vocab_size=gpt.config.vocab_size, n_positions=gpt.block_size, n_embd=gpt.config.n_embd,
            n_layer=gpt.config.n_layer, n_head=gpt.config.n_head, activation_function="gelu",
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(self.config).eval()
        self.past = transformers.DynamicCache()

    def jump(self, length: int, batch: int) -> None:
        self.past = type(self.past)()
        shape = (batch, self.config.n_head, length, self.config.n_embd // self.config.n_head)
        for i in range(self.config.n_layer):
            self.past.update(torch.zeros(shape), torch.zeros(shape), i)

    def logits(self, tokens: Tensor, position: int) -> Tensor:
        out = self.model(tokens, past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        return out.logits[:, -1]


def sample(model, batch: int, steps: int, first: int = 0, device: str = "cpu") -> Tensor:
    """The loop of a sampler in torch: (batch, steps) tokens after `first` ones."""
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    tokens = []
    for position in range(first, first + steps):
        logits = model.logits(token, position)
        kth = logits.topk(TOP_K, dim=-1).values[:, -1:]
        probabilities = logits.masked_fill(logits < kth, -torch.inf).softmax(-1)
        token = torch.multinomial(probabilities, 1)
        tokens.append(token)
    return torch.cat(tokens, 1)


def request(sequences: Tensor, steps: Iterable[int], fed: int = 0) -> DecodeRequest:
    """All sequences, in the first slots, one token after the other."""
    return DecodeRequest(
        slots=range(len(sequences)), sequences=sequences, steps=steps, fed=fed, choice=Choice(top_k=TOP_K, seed=1),
        lookahead=1,
    )  # fmt: skip
