"""Measures the seconds from the call of `sample_images` to pixels; as a program, prints them as a table.

    python benchmarks/helpers/pixels.py                    # minutes
    python benchmarks/helpers/pixels.py --into README.md   # the same, and the table takes the place of the last one
    python benchmarks/helpers/pixels.py --quick            # one image, without the original's code path

A prior of GPT2-small's size and the f = 16 first stage draw images of 256x256 pixels, with random weights: tokens that
can be guessed would come faster. The ways are:

- the original's code path: a full forward pass for every token, and the decoder, all in torch. The passes are timed at
  `PREFIXES` and integrated over all tokens;
- what one would build of libraries today: Hugging Face's GPT2 with its cache, if `transformers` is installed, and the
  decoder in torch. Its loop is timed whole;
- before: the CPU engine without lookahead, and the decoder in torch;
- now: `sample_images` with its defaults, by the type of the weights.

Models are loaded and weights packed before, by a first call. The rest of the time takes turns; the best counts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decoding import HuggingFace, sample
from torch import Tensor

from tamingfast.engines import GPTEngine
from tamingfast.files import atomic_write
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ops import backends
from tamingfast.sampling import sample_grid

SIDE = 16  # tokens
BATCHES = (1, 8)
PREFIXES = (1, 32, 64, 96, 128, 160, 192, 224, 256)
ORIGINAL = "the original's code path"
LIBRARIES = "Hugging Face's GPT2 and its cache, decoder in torch"
#: Around the table in a page.
MARK = "<!-- seconds to pixels -->"


@dataclass(frozen=True)
class Seconds:
    """Of one call for a whole batch."""

    tokens: float
    picture: float

    @property
    def total(self) -> float:
        return self.tokens + self.picture


def model(side: int = SIDE, **smaller: Any) -> Net2NetTransformer:
    """An unconditional prior; ``smaller`` are other settings of its networks."""
    torch.manual_seed(0)
    geometry = dict(
        ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256, z_channels=256,
        in_channels=3, out_ch=3, double_z=False,
    ) | smaller.get("ddconfig", {})  # fmt: skip
    gpt = dict(vocab_size=1024, block_size=side * side, n_layer=12, n_head=16, n_embd=768) | smaller.get("gpt", {})
    stage = dict(
        ddconfig=geometry, lossconfig={"target": "torch.nn.Identity"}, n_embed=1024, embed_dim=geometry["z_channels"]
    )
    return Net2NetTransformer(
        {"target": "tamingfast.models.gpt.GPT", "params": gpt},
        {"target": "tamingfast.models.vqgan.VQModel", "params": stage},
        "__is_unconditional__",
    ).eval()  # fmt: skip


def measure(prior: Net2NetTransformer, side: int, batches: tuple[int, ...], rounds: int, original: bool) -> dict:
    """{(way, batch): `Seconds` of the batch}."""
    best: dict[tuple[str, int], Seconds] = {}
    ways = [(when, dtype) for dtype in GPTEngine.DTYPES for when in ("before", "now")]
    for batch in batches:
        cond = torch.zeros(batch, 1, dtype=torch.int64)
        for number in range(rounds + (batch == batches[0])):
            for when, dtype in ways:
                spent = _drawn(prior, cond, side, when, dtype, seed=number)
                name = f"{when}, {dtype}", batch
                if number or batch != batches[0]:  # the first call packs
                    best[name] = min(best.get(name, spent), spent, key=lambda seconds: seconds.total)
        if original:
            best[ORIGINAL, batch] = _original(prior, cond, side)
            if HuggingFace.installed():
                best[LIBRARIES, batch] = _libraries(prior, batch, side)
    return best


def _drawn(prior: Net2NetTransformer, cond: Tensor, side: int, when: str, dtype: str, seed: int) -> Seconds:
    options = dict(top_k=100, seed=seed, dtype=dtype)
    stage = prior.first_stage_model
    if when == "before":
        begun = time.perf_counter()
        tokens = sample_grid(prior, cond, side, side, engine="native", lookahead=1, **options)
        drawn = time.perf_counter()
        stage.decode_grid(tokens, engine="torch")
        return Seconds(drawn - begun, time.perf_counter() - drawn)
    decode, pictures = stage.decode_grid, []

    def timed(*arguments: Any, **named: Any) -> Tensor:
        begun = time.perf_counter()
        pixels = decode(*arguments, **named)
        pictures.append(time.perf_counter() - begun)
        return pixels

    stage.decode_grid = timed
    try:
        begun = time.perf_counter()
        images = prior.sample_images(cond, side, side, **options)
        total = time.perf_counter() - begun
    finally:
        del stage.decode_grid
    assert images.isfinite().all() and len(pictures) == 1
    return Seconds(total - pictures[0], pictures[0])


@torch.no_grad()
def _original(prior: Net2NetTransformer, cond: Tensor, side: int) -> Seconds:
    prefixes = sorted({min(prefix, side * side) for prefix in PREFIXES})
    tokens = torch.zeros(len(cond), side * side, dtype=torch.int64)
    spent = []
    for prefix in prefixes:
        begun = time.perf_counter()
        prior.transformer(torch.cat((cond, tokens), 1)[:, :prefix])
        spent.append(time.perf_counter() - begun)
    passes = torch.trapezoid(torch.tensor(spent), torch.tensor(prefixes, dtype=torch.float32)).item() + spent[0]
    begun = time.perf_counter()
    prior.first_stage_model.decode_grid(tokens.view(-1, side, side), engine="torch")
    return Seconds(passes, time.perf_counter() - begun)


@torch.no_grad()
def _libraries(prior: Net2NetTransformer, batch: int, side: int) -> Seconds:
    rival = HuggingFace(prior.transformer, batch)
    sample(rival, batch, 2)
    rival.jump(0, batch)
    begun = time.perf_counter()
    tokens = sample(rival, batch, side * side)
    drawn = time.perf_counter()
    prior.first_stage_model.decode_grid(tokens.view(-1, side, side), engine="torch")
    return Seconds(drawn - begun, time.perf_counter() - drawn)


def table(found: dict[tuple[str, int], Seconds]) -> str:
    """The rows as a Markdown table, per call: tokens + picture = total."""
    batches = sorted({batch for _, batch in found})
    titles = ["1 image, s" if batch == 1 else f"{batch} images, s" for batch in batches]
    lines = [f"| 256x256, tokens + picture | {' | '.join(titles)} |", "|---" * (1 + len(batches)) + "|"]
    names = dict.fromkeys(name for name, _ in found)
    for name in sorted(names, key=lambda name: (name != ORIGINAL, name != LIBRARIES, name.startswith("now"))):
        cells = []
        for batch in batches:
            spent = found[name, batch]
            cells.append(f"{spent.tokens:.2f} + {spent.picture:.2f} = **{spent.total:.2f}**")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """Where the table was measured."""
    facts, (module, _) = backends.machine(), backends.native()
    isa = module.build_info()["isas"][-1] if backends.isa() == "auto" else backends.isa()
    return f"{facts['threads']} threads of {facts['cpu']}, {isa}, torch {facts['torch']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one image, without the original's code path")
    parser.add_argument("--into", type=Path, help=f"a page whose part between two lines '{MARK}' becomes the table")
    arguments = parser.parse_args()
    page = None if arguments.into is None else arguments.into.read_text("utf-8").split(MARK)
    if page is not None and len(page) != 3:
        parser.error(f"{arguments.into}: got {len(page) - 1} lines '{MARK}', expected 2")
    quick = arguments.quick
    found = measure(model(), SIDE, BATCHES[:1] if quick else BATCHES, 1 if quick else 2, not quick)
    shown = f"{table(found)}\n\nMeasured on {machine()}."
    print(shown)
    if page is not None:
        with atomic_write(arguments.into) as temporary:
            temporary.write_text(MARK.join([page[0], f"\n\n{shown}\n\n", page[2]]), "utf-8")


if __name__ == "__main__":
    main()
