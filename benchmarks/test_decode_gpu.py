"""Decoding of GPT2 priors on a GPU: ours against the loops in common use, and the paper's pixels against latents.

Every sampler draws whole sequences with top-k 100 from bfloat16 weights; seconds are wall time, the device's work
included, because the cost of launching is part of the comparison. Beside ours: the loop of the original's cached
sampler (eager, keys and values grown with `torch.cat`), our torch engine (eager, a static cache), Hugging Face's GPT2
with its static cache if `transformers` is installed, and a static-cache step compiled by `torch.compile` into a CUDA
graph.

The compiled step takes a minute to compile for each shape, so rivals are timed at four cases. `test_profile` says where
the device's time goes in a step: which kernels run for how long, and for how long none does.

The floor of a run is the larger of bytes / copy bandwidth and operations / matrix rate, both measured in this run:
every weight read once per step, every visible key and value read once; two operations per weight and image.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import gpu
import pytest
import torch
import torch.nn.functional as F
from decoding import TOP_K, GrowingCache, StaticCache, request, sample
from measuring import seconds
from torch import Tensor, nn

from tamingfast.engines import CudaEngine, Span, refusal
from tamingfast.models.gpt import GPT
from tamingfast.ops.choice import choose, gumbel_noise
from tamingfast.sampling import sample_grid

pytestmark = pytest.mark.gpu
LAYERS = {"GPT2-small": (12, 768), "GPT2-medium": (24, 1024)}
ROUNDS, CHECKED = 3, 12  # whole runs that are timed, and positions whose logits are compared
TOLERANCE = 0.05  # of logits in bfloat16, relative to the norm of those in float32


@functools.cache
def prior(name: str, tokens: int, vocab: int = 1024) -> GPT:
    """Random weights, which take as long as trained ones; in float32."""
    layers, width = LAYERS[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        return GPT(vocab, tokens, n_layer=layers, n_head=16, n_embd=width).eval()


class CompiledCache(nn.Module):
    """A step of fixed shape over a static cache, token choice included, compiled with CUDA graphs."""

    def __init__(self, gpt: GPT, batch: int, **compilation) -> None:
        super().__init__()
        self.gpt = gpt
        self.cache = [tuple(half.zero_() for half in layer) for layer in gpt.new_cache(batch)]
        for half in (half for layer in self.cache for half in layer):
            # Otherwise the step mutates what the compiler takes for an input, and is not put into a graph.
            torch._dynamo.mark_static_address(half)
        self.places = torch.arange(gpt.block_size, device=gpt.pos_emb.device)
        self.compiled = torch.compile(self.step, fullgraph=True, **(compilation or {"mode": "reduce-overhead"}))

    def logits(self, tokens: Tensor, position: Tensor) -> Tensor:
        gpt = self.gpt
        x = gpt.tok_emb(tokens) + gpt.pos_emb[:, position]
        mask = (self.places <= position)[None, None, None]
        for block, (keys, values) in zip(gpt.blocks, self.cache, strict=True):
            q, k, v = block.attn._heads(block.ln1(x))
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            seen = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + block.attn.proj(seen.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln2(x))
        return gpt.head(gpt.ln_f(x))[:, -1]

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The next tokens (B, 1): a draw by exponential variables, for which the device needs nothing from the host."""
        logits = self.logits(tokens, position)
        kth = logits.topk(TOP_K, dim=-1).values[:, -1:]
        probabilities = logits.masked_fill(logits < kth, -torch.inf).softmax(-1)
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)

    def run(self, batch: int, steps: int) -> Tensor:
        tokens = torch.zeros(batch, steps + 1, dtype=torch.int64, device=self.places.device)
        position = torch.zeros(1, dtype=torch.int64, device=self.places.device)
        token = tokens[:, :1].clone()
        for i in range(steps):
            token = self.compiled(token, position).clone()
            tokens[:, i + 1 : i + 2] = token
            position += 1
        return tokens[:, 1:]


class HuggingFace:
    """GPT2LMHeadModel with these weights and its static cache."""

    def __init__(self, gpt: GPT, batch: int) -> None:
        import transformers

        config = gpt.config
        self.config = transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=gpt.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, activation_function="gelu", tie_word_embeddings=False,
        )  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(self.config).eval().to(gpt.pos_emb.device, gpt.pos_emb.dtype)
        self._load(gpt)
        self.new_cache = lambda: transformers.StaticCache(config=self.config, max_cache_len=gpt.block_size)
        self.past = self.new_cache()

    def _load(self, gpt: GPT) -> None:
        own = self.model.transformer
        own.wte.weight.copy_(gpt.tok_emb.weight)
        own.wpe.weight.copy_(gpt.pos_emb[0])
        self.model.lm_head.weight.copy_(gpt.head.weight)
        for theirs, ours in zip([*own.h, own], [*gpt.blocks, gpt], strict=True):
            if ours is gpt:
                pairs = [(theirs.ln_f, gpt.ln_f)]
            else:
                pairs = [(theirs.ln_1, ours.ln1), (theirs.ln_2, ours.ln2)]
                attn, mlp = ours.attn, ours.mlp
                for conv, linears in (
                    (theirs.attn.c_attn, (attn.query, attn.key, attn.value)), (theirs.attn.c_proj, (attn.proj,)),
                    (theirs.mlp.c_fc, (mlp[0],)), (theirs.mlp.c_proj, (mlp[2],)),
                ):  # fmt: skip
                    conv.weight.copy_(torch.cat([linear.weight for linear in linears]).t())
                    conv.bias.copy_(torch.cat([linear.bias for linear in linears]))
            for norm, source in pairs:
                norm.weight.copy_(source.weight)
                norm.bias.copy_(source.bias)

    def logits(self, tokens: Tensor, position: int) -> Tensor:
        if position == 0:
            self.past = self.new_cache()
        place = torch.tensor([position], device=tokens.device)
        return self.model(tokens, past_key_values=self.past, use_cache=True, cache_position=place).logits[:, -1]


def rivals(gpt: GPT, batch: int, **compilation) -> dict[str, Callable[[], object]]:
    """By name: what makes something with `logits(tokens, position)`."""
    return {
        "original": lambda: GrowingCache(gpt, batch), "static cache": lambda: StaticCache(gpt, batch),
        "hugging face": lambda: HuggingFace(gpt, batch),
        "compiled": lambda: CompiledCache(gpt, batch, **compilation),
    }  # fmt: skip


def run_of(rival, gpt: GPT, batch: int, tokens: int) -> Callable[[], Tensor]:
    """A whole run of a rival from an empty cache."""
    if isinstance(rival, CompiledCache):
        return lambda: rival.run(batch, tokens)
    device = gpt.pos_emb.device

    def run() -> Tensor:
        if isinstance(rival, GrowingCache):
            rival.past = [None] * len(rival.past)
        return sample(rival, batch, tokens, device=device)

    return run


class Truth:
    """Sequences that ours draws, and the model's logits of their tokens in float32.

    Our tokens are what our logits and noise imply, and every sampler's logits are near the truth.
    """

    def __init__(self, gpt: GPT, made: CudaEngine, batch: int) -> None:
        device = gpt.pos_emb.device
        self.sequences = torch.zeros(batch, CHECKED + 1, dtype=torch.int64, device=device)
        for _ in range(2):  # eagerly, then from the graph
            made.decode(request(self.sequences, range(1, CHECKED + 1)))
        self.logits = gpt.float()(self.sequences[:, :-1])[0]
        spans = [Span(b, 0, CHECKED) for b in range(batch)]
        logits = made.feed(self.sequences[:, :-1].flatten(), spans, "all").view(batch, CHECKED, -1)
        near(logits, self.logits, "ours")
        noise = gumbel_noise(
            1, torch.arange(batch, device=device)[:, None], torch.tensor(0, device=device),
            torch.arange(1, CHECKED + 1, device=device), gpt.config.vocab_size,
        )  # fmt: skip
        # Sums of bfloat16 in another order may tip a near-tie.
        assert (choose(logits, noise, top_k=TOP_K) == self.sequences[:, 1:]).float().mean() > 0.9

    def check(self, rival, name: str) -> None:
        for i in range(CHECKED):
            place = torch.tensor([i], device=self.sequences.device) if isinstance(rival, CompiledCache) else i
            near(rival.logits(self.sequences[:, i : i + 1], place), self.logits[:, i], name)


def near(logits: Tensor, expected: Tensor, name: str) -> None:
    assert (logits.float() - expected).norm() <= TOLERANCE * expected.norm(), name


def work(gpt: GPT, made: CudaEngine, batch: int, tokens: int) -> tuple[float, float]:
    """(operations, bytes) of a run of `tokens` steps."""
    config = gpt.config
    parameters = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    pairs = 2 * config.n_embd * config.n_layer * batch * tokens * (tokens + 1) / 2  # keys and values
    return 2 * (parameters * batch * tokens + pairs), made.info()["weight_bytes"] * tokens + 2 * pairs


def timed(run: Callable[[], object], device: str) -> float:
    """Milliseconds of a whole run, the median of `ROUNDS`, after one that warms up."""
    run()
    return 1e3 * statistics.median(seconds(run, device) for _ in range(ROUNDS))


def models(name: str, tokens: int) -> tuple[GPT, GPT, CudaEngine]:
    """The prior in float32, in bfloat16, and our engine."""
    single = prior(name, tokens)
    half = GPT(1024, tokens, n_layer=LAYERS[name][0], n_head=16, n_embd=LAYERS[name][1]).to("cuda", torch.bfloat16)
    half.load_state_dict(single.state_dict())
    return single, half.eval(), CudaEngine(single, "bfloat16")


def ours(made: CudaEngine, batch: int, tokens: int) -> float:
    """Milliseconds of a whole run."""
    sequences = torch.zeros(batch, tokens + 1, dtype=torch.int64, device=made.device)
    return timed(lambda: made.decode(request(sequences, range(1, tokens + 1))), made.device.type)


def rival_milliseconds(make: Callable[[], object], name: str, truth: Truth, gpt: GPT, tokens: int) -> float:
    """Milliseconds of a whole run, after it is checked."""
    rival, batch = make(), len(truth.sequences)
    truth.check(rival, name)
    return timed(run_of(rival, gpt, batch, tokens), gpt.pos_emb.device.type)


@torch.no_grad()
def compare(name: str, tokens: int, batch: int, with_rivals: bool, **compilation) -> dict[str, float]:
    """Milliseconds of each sampler, recorded after each."""
    single, half, made = models(name, tokens)
    made.reserve(batch, tokens)
    truth = Truth(single, made, batch)
    candidates = rivals(half, batch, **compilation) if with_rivals else {}
    flop, size = work(single, made, batch, tokens)
    # The aim is 1.3 times the compiled loop at batch 64, and a share of the limit at batch 1.
    times = gpu.compare(
        "decode", f"{name}, {tokens} tokens, batch {batch}", functools.partial(ours, made, batch, tokens),
        {
            key: functools.partial(rival_milliseconds, make, key, truth, half, tokens)
            for key, make in candidates.items()
        },
        flop=flop, size=size, target=1.3 if (name, batch) == ("GPT2-medium", 64) else None,
    )  # fmt: skip
    torch.compiler.reset()
    print(f"\n  {name}, batch {batch}: {batch * tokens / times['ours'] * 1e3:.0f} tokens/s", times)
    return times


@pytest.mark.quick(name="GPT2-small", tokens=256, batch=8)
@pytest.mark.parametrize("batch", [1, 8, 64, 4, 2, 16, 256])
@pytest.mark.parametrize("tokens", [256])
@pytest.mark.parametrize("name", reversed(LAYERS))
def test_ours(name, tokens, batch):
    compare(name, tokens, batch, with_rivals=False)


@pytest.mark.parametrize(("name", "batch"), [(name, batch) for batch in (1, 64) for name in reversed(LAYERS)])
def test_rivals(name, batch):
    compare(name, 256, batch, with_rivals=True)


@pytest.mark.parametrize("batch", [1, 8, 64])
@torch.no_grad()
def test_profile(batch):
    """Per token of GPT2-medium: the device's milliseconds by kernel, and those in which no kernel runs."""
    tokens = 256
    made = CudaEngine(prior("GPT2-medium", tokens), "bfloat16")
    made.reserve(batch, tokens)
    sequences = torch.zeros(batch, tokens + 1, dtype=torch.int64, device="cuda")
    made.decode(request(sequences, range(1, tokens + 1)))
    busy, idle, names = device_time(lambda: made.decode(request(sequences, range(129, 145))))
    lines = [f"  {name[:90]}: {count / 16:.1f} a step, {spent / count:.2f} us each" for name, (count, spent) in names]
    print(f"\n  batch {batch}: {busy / 16:.1f} us a step, {idle / 16:.1f} us without a kernel\n" + "\n".join(lines))


def device_time(run: Callable[[], object]) -> tuple[float, float, list[tuple[str, tuple[int, float]]]]:
    """Microseconds in which kernels run and in which none does, and for each name their number and sum."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    events = sorted(kernels, key=lambda event: event.time_range.start)
    names: dict[str, tuple[int, float]] = {}
    busy = idle = 0.0
    end = None
    for event in events:
        begin, stop = event.time_range.start, event.time_range.end
        idle += max(0.0, begin - end) if end is not None else 0.0
        busy += stop - max(begin, end or begin) if end is None or stop > end else 0.0
        end = max(stop, end or stop)
        count, spent = names.get(event.name, (0, 0.0))
        names[event.name] = count + 1, spent + stop - begin
    return busy, idle, sorted(names.items(), key=lambda item: -item[1][1])


GRIDS = {"pixels": (32, 512), "latents": (16, 1024)}  # side in tokens, entries of the vocabulary
PROTOCOLS = {"the paper's": "naive", "cached": "torch", "ours": "native"}


def transformer(name: str, layers: tuple[int, int], device: str) -> nn.Module:
    """The prior over pixels or latents of `reproduce --preset paper`, with random weights."""
    side, vocab = GRIDS[name]
    torch.manual_seed(0)
    return GPT(vocab, side * side, n_layer=layers[0], n_head=16, n_embd=layers[1]).to(device).eval()


def seconds_per_image(gpt: nn.Module, side: int, engine: str, batch: int, dtype: str) -> float:
    """Seconds per image of whole grids, after a short one that warms up."""
    device = next(gpt.parameters()).device

    def run(height: int, width: int) -> None:
        cond = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        sample_grid(gpt, cond, height, width, window=side, top_k=TOP_K, engine=engine, dtype=dtype)

    run(2, side)
    return seconds(lambda: run(side, side), device.type) / batch


@pytest.mark.parametrize("batch", [16, 256])
def test_pixels_against_latents(batch):
    """The paper's experiment on the transformers alone: what an image costs, and how much faster latents are."""
    assert refusal(prior("GPT2-medium", 256)) is None
    found = {}
    for protocol, engine in PROTOCOLS.items():
        times = {
            name: seconds_per_image(transformer(name, LAYERS["GPT2-medium"], "cuda"), side, engine, batch, "bfloat16")
            for name, (side, _) in GRIDS.items()
        }
        found[protocol] = times
        print(
            f"\n  {protocol}, batch {batch}: {times['pixels'] / times['latents']:.2f} times faster from latents", times
        )
    for name in GRIDS:
        milliseconds = {key: 1e3 * times[name] for key, times in found.items()}
        gpu.record(f"sample {name}", f"GPT2-medium, an image, batch {batch}", milliseconds, list(PROTOCOLS)[:2])
