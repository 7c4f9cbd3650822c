"""Writes tiny checkpoints of every family as its authors publish them; see `families` for what is in them."""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import families
import torch
import yaml
from families import DIFFUSERS, LLAMAGEN, MAGVIT, MASKGIT, Reference, Style
from safetensors.torch import save_file
from torch import Tensor


class Published(NamedTuple):
    """A checkpoint of a family: what `load_model` is given, and what its network computes."""

    path: Path
    config: Path | None
    reference: Reference
    interface: bool = False


PLAIN = Style()
Writer = Callable[[Path], Published]


def yaml_file(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def shuffled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same shapes, with which nothing is right."""
    return {name: torch.randn(value.shape) for name, value in state.items()}


def latent_diffusion(
    folder: Path,
    kind: str = "VQModel",
    ema: bool = False,
    inside: bool = False,
    style: Style = PLAIN,
    config: bool = True,
) -> Published:
    reference = Reference(style, 1)
    params = {"embed_dim": style.embed, "n_embed": style.codes, "monitor": "x", "ddconfig": families.ddconfig(style)}
    params |= {"lossconfig": {"target": "torch.nn.Identity"}, **({"use_ema": True} if ema else {})}
    model = {"target": f"ldm.models.autoencoder.{kind}", "params": params}
    state = dict(reference.state)
    if ema:
        state |= families.averages(state, torch.zeros_like)
    if inside:
        state = {f"first_stage_model.{name}": value for name, value in state.items()}
        state |= {"betas": torch.ones(3), "model.diffusion_model.out.0.weight": torch.ones(4)}
        state |= {"model_ema.diffusion_modelout0weight": torch.ones(4), "cond_stage_model.embedding": torch.ones(2)}
        unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {"image_size": 8}}
        params = {"unet_config": unet, "first_stage_config": model, "cond_stage_config": "__is_unconditional__"}
        params["first_stage_config"]["params"]["ckpt_path"] = "/not/to/be/read.ckpt"
        model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    torch.save({"state_dict": state, "epoch": 1, "callbacks": {}}, folder / "model.ckpt")
    if config:
        yaml_file(folder / "config.yaml", {"model": model})
    return Published(folder / "model.ckpt", None, reference, kind == "VQModelInterface")


def llamagen_file(folder: Path) -> Published:
    reference = Reference(LLAMAGEN, 2)
    used = {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": reference.state | used}, folder / "vq_ds16_c2i.pt")
    return Published(folder / "vq_ds16_c2i.pt", None, reference)


def llamagen_training(folder: Path, **arguments: Any) -> Published:
    reference = Reference(replace(LLAMAGEN, rule="l2") if arguments else LLAMAGEN, 3)
    args = argparse.Namespace(vq_model="VQ-16", **arguments)
    averages = {f"_orig_mod.{name}": value for name, value in reference.state.items()}  # of a compiled model
    content = {"model": shuffled(reference.state), "ema": averages, "optimizer": {}, "steps": 7, "args": args}
    torch.save(content, folder / "0007.pt")
    return Published(folder / "0007.pt", None, reference)


def llamagen_folder(folder: Path) -> Published:
    reference = Reference(LLAMAGEN, 4)
    save_file(reference.state, folder / "model.safetensors")
    config = {"codebook_size": 20, "codebook_embed_dim": 4, "codebook_l2_norm": True, "z_channels": 6}
    config |= {"encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 3]}
    (folder / "config.json").write_text(json.dumps(config))
    return Published(folder, None, reference)


def janus(folder: Path, sharded: bool = False) -> Published:
    reference = Reference(LLAMAGEN, 5)
    state = {f"gen_vision_model.{name}": value for name, value in reference.state.items()}
    rest = {"language_model.lm_head.weight": torch.ones(4, 4), "gen_embed.weight": torch.ones(20, 4)}
    config = {"model_type": "multi_modality", "gen_vision_config": {"cls": "VQ-16", "params": {"n_embed": 8}}}
    (folder / "config.json").write_text(json.dumps(config))
    if not sharded:
        torch.save(state | rest, folder / "pytorch_model.bin")
        return Published(folder, None, reference)
    names = list(state)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    places = {}
    for number, part in enumerate(parts):
        file = f"model-{number}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    places |= dict.fromkeys(rest, "model-9.safetensors")  # a part that is not needed, and missing
    index = {"metadata": {"total_size": 9}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Published(folder, None, reference)


def seed_voken(folder: Path, style: Style, target: str, ema: bool, config: bool = True) -> Published:
    reference = Reference(style, 6)
    state = dict(reference.state)
    if ema:  # the averages count, and are what the reference has
        state = shuffled(state) | families.averages(state, lambda value: value)
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.2.0"}, folder / "weights.ckpt")
    settings = {"n_embed": 2**style.embed if style.rule == "sign" else style.codes, "embed_dim": style.embed}
    settings |= {"ddconfig": families.ddconfig(style), "use_ema": ema, "learning_rate": 1e-4, "l2_normalize": False}
    settings["lossconfig"] = {"target": "src.IBQ.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {}}
    described = {"seed_everything": True, "model": {"class_path": f"src.{target}", "init_args": settings}}
    path = yaml_file(folder / "published.yaml", described) if config else None
    return Published(folder / "weights.ckpt", path, reference)


def diffusers(folder: Path, style: Style = DIFFUSERS, **settings: Any) -> Published:
    reference = Reference(style, 7)
    plain, levels = ("DownEncoderBlock2D", "UpDecoderBlock2D"), range(len(style.widths))
    down, up = ([f"{'Attn' * (i in style.attends)}{name}" for i in levels] for name in plain)
    config = {
        "_class_name": "VQModel", "_diffusers_version": "0.30.0", "block_out_channels": list(style.widths),
        "down_block_types": down, "up_block_types": up[::-1], "latent_channels": style.z,
        "norm_num_groups": style.groups,
        "layers_per_block": style.blocks, "num_vq_embeddings": style.codes, "vq_embed_dim": style.embed,
        "mid_block_add_attention": len(style.middle) == 3, **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(reference.state, folder / "diffusion_pytorch_model.safetensors")
    return Published(folder, None, reference, interface=True)


def amused(folder: Path) -> Published:
    middle = DIFFUSERS.middle[::2]
    style = replace(DIFFUSERS, middle=middle, attends=(), range01=True, widths=(16, 24, 16))
    (folder / "vqvae").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "AmusedPipeline", "vqvae": []}))
    return diffusers(folder / "vqvae", style, lookup_from_codebook=True)._replace(path=folder)


def diffusers_of_2022(folder: Path) -> Published:
    old = replace(DIFFUSERS, attention=("group_norm", "query", "key", "value", "proj_attn"), groups=16, widths=(16, 32))
    made = diffusers(folder, old)
    config = json.loads((folder / "config.json").read_text())
    del config["mid_block_add_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(made.reference.state, folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return made


def maskgit(folder: Path) -> Published:
    reference = Reference(MASKGIT, 8)
    torch.save(reference.state, folder / "maskgit-vqgan-imagenet-f16-256.bin")
    return Published(folder / "maskgit-vqgan-imagenet-f16-256.bin", None, reference)


# --- flax ------------------------------------------------------------------------------------------------------------


def packed(value: Any) -> bytes:
    """The msgpack of nested maps of arrays, as flax writes it."""
    if isinstance(value, dict):
        return struct.pack(">BI", 0xDF, len(value)) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, list):
        return struct.pack(">BH", 0xDC, len(value)) + b"".join(map(packed, value))
    if isinstance(value, str):
        return struct.pack(">BB", 0xD9, len(value.encode())) + value.encode()
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return struct.pack(">BI", 0xCE, value)
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    inside = packed([list(value.shape), "float32", value.contiguous().numpy().tobytes()])
    return struct.pack(">BIb", 0xC9, len(inside), 1) + inside


def chunked(value: Tensor) -> dict[str, Any]:
    """A large array as flax stores it, in parts."""
    half = value.numel() // 2
    chunks = {"0": value.flatten()[:half], "1": value.flatten()[half:]}
    shape = {str(i): n for i, n in enumerate(value.shape)}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """Names joined with dots as nested maps."""
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *path, leaf = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return tree


def vqgan_jax(folder: Path, style: Style = PLAIN, config: bool = True) -> Published:
    reference = Reference(style, 9)
    arrays: dict[str, Any] = {}
    for name, value in reference.state.items():
        if name.startswith("quantize"):
            name = "quantize.embedding.embedding"
        elif name.endswith(".weight"):
            name = name.removesuffix("weight") + ("kernel" if value.ndim == 4 else "scale")
        value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value
        for part in ("down", "up"):
            for i in range(4):
                name = name.replace(f".{part}.{i}.", f".{part}_{i}.")
        for part in ("block", "attn"):
            for i in range(4):
                name = name.replace(f".{part}.{i}.", f".{part}_{i}.")
        arrays[name] = chunked(value) if name.endswith(".embedding") else value
    tree = nested(arrays)
    (folder / "flax_model.msgpack").write_bytes(packed(tree))
    if config:
        flat = {**families.ddconfig(style), "n_embed": style.codes, "embed_dim": style.embed, "num_resolutions": 2}
        flat |= {"transformers_version": "4.8.2", "give_pre_end": False}
        (folder / "config.json").write_text(json.dumps(flat))
    return Published(folder, None, reference)


_NOATTN = Style(
    middle=("mid.block_1", "mid.block_2"), attends=(), tanh=True, extra={"attn_type": "none", "tanh_out": True}
)
_MOVQ = replace(DIFFUSERS, groups=32, widths=(32, 64), spatial=True, z=4)
_MEAN = Style(downsampling="mean", upsampling="alone", extra={"resamp_with_conv": False})

#: Family -> its files by what is special about them.
FAMILIES: dict[str, dict[str, Writer]] = {
    "latent-diffusion VQ": {
        "plain": latent_diffusion,
        "interface": lambda folder: latent_diffusion(folder, "VQModelInterface"),
        "without attention": lambda folder: latent_diffusion(folder, style=_NOATTN),
        "averages": lambda folder: latent_diffusion(folder, ema=True),
        "inside a diffusion model": lambda folder: latent_diffusion(folder, "VQModelInterface", inside=True),
        "inside, no config": lambda folder: latent_diffusion(folder, "VQModelInterface", inside=True, config=False),
    },
    "LlamaGen VQ": {
        "file": llamagen_file,
        "training": llamagen_training,
        "training without norms": lambda folder: llamagen_training(folder, codebook_l2_norm=False),
        "folder": llamagen_folder,
    },
    "Janus": {"one file": janus, "in parts": lambda folder: janus(folder, sharded=True)},
    "IBQ": {
        "raw": lambda folder: seed_voken(folder, Style(rule="dot"), "IBQ.models.ibqgan.IBQ", ema=False),
        "averages": lambda folder: seed_voken(folder, Style(rule="dot"), "IBQ.models.ibqgan.IBQ", ema=True),
        "its VQModel": lambda folder: seed_voken(folder, Style(), "IBQ.models.ibqgan.VQModel", ema=False),
    },
    "Open-MAGVIT2": {
        "raw": lambda folder: seed_voken(folder, MAGVIT, "Open_MAGVIT2.models.lfqgan.VQModel", ema=False),
        "averages": lambda folder: seed_voken(folder, MAGVIT, "Open_MAGVIT2.models.lfqgan.VQModel", ema=True),
        "no config": lambda folder: seed_voken(folder, MAGVIT, "", ema=False, config=False),
    },
    "diffusers VQModel": {
        "folder": diffusers,
        "aMUSEd": amused,
        "of 2022": diffusers_of_2022,
        "MoVQ": lambda folder: diffusers(folder, _MOVQ, norm_type="spatial"),
    },
    "MaskGIT-VQGAN": {"file": maskgit},
    "vqgan-jax": {
        "folder": vqgan_jax,
        "without convolutions": lambda folder: vqgan_jax(folder, _MEAN),
        "no config": lambda folder: vqgan_jax(folder, config=False),
    },
}
