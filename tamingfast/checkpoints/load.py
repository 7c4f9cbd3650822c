"""Models from files: original checkpoints and our own run directories in, safetensors out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tamingfast.checkpoints import compat
from tamingfast.checkpoints.config import get_obj_from_str, instantiate_from_config, load_yaml, plain
from tamingfast.checkpoints.weights import load_into, read_state_dict
from tamingfast.errors import UserError
from tamingfast.files import atomic_write
from tamingfast.ops.backends import pick_device

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "weights.safetensors"

# Where the original saves, and where its published models lie.
_CHECKPOINT_FOLDERS = ("checkpoints", "ckpts")
# Parts that a checkpoint for use, rather than for further training, may lack.
_OPTIONAL = ("loss.",)


def load_model(
    checkpoint: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """An eval-mode model from a checkpoint of the original or of ours.

    ``checkpoint`` is a Lightning ``.ckpt``, a ``.safetensors`` file, or a run directory of either project. ``config``
    is a YAML path or a mapping; by default it is looked for where both projects put it: beside the file, in the run's
    ``configs/``, or in the safetensors metadata. A first stage without any config is inferred from its weights.
    ``device`` defaults to the CPU, ``dtype`` ("float32", "bfloat16", "float16" or the torch dtype) to float32.

    A config builds networks of this package and nothing else, so neither file runs code; a mapping given by the caller
    may also name other `torch.nn.Module` classes. Raises UserError, in one sentence, when a file is missing, damaged,
    unsafe, not finite or of another architecture.
    """
    dtype, device = _dtype(dtype), pick_device("cpu" if device is None else device)
    path = weights_path(Path(checkpoint))
    state = read_state_dict(path)
    settings = _config_for(path, config, state)
    model = _build(settings)
    _adopt_buffers(model, state)
    load_into(model, state, path, optional=_OPTIONAL)
    model.config = settings
    return model.to(device=device, dtype=dtype).eval()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if found not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise UserError(f"got dtype '{dtype}'; expected float32, bfloat16 or float16")
    return found


def save_weights(path: str | os.PathLike, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] = {}) -> None:
    """Write tensors as safetensors, atomically.

    Attention masks are left out: the config's ``n_unmasked`` says the same.
    """
    from safetensors.torch import save_file

    tensors = {key: value.contiguous() for key, value in state_dict.items() if not key.endswith(".attn.mask")}
    # Tensors that share memory (a condition stage that is the first stage) are written once each.
    seen: dict[int, str] = {}
    for key, value in tensors.items():
        if value.data_ptr() in seen and value.numel():
            tensors[key] = value.clone()
        seen.setdefault(value.data_ptr(), key)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata))


def convert(checkpoint: str | os.PathLike, out: str | os.PathLike, config: Any = None) -> Path:
    """Turn any checkpoint that `load_model` opens into one ``.safetensors`` file with its config inside.

    Optimizer states and the loss networks stay behind. Returns the path written.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"got '{out.name}' as output; expected a name that ends in .safetensors")
    model = load_model(checkpoint, config)
    state = {key: value for key, value in model.state_dict().items() if ".loss." not in f".{key}"}
    save_weights(out, state, {"config": json.dumps(without_checkpoints(model.config))})
    return out


def without_checkpoints(config: Any) -> Any:
    """A config whose stages load nothing themselves: weights of a whole model come from its own file."""
    config = plain(config)
    if isinstance(config, Mapping):
        return {key: without_checkpoints(value) for key, value in config.items() if key != "ckpt_path"}
    return [without_checkpoints(value) for value in config] if isinstance(config, list | tuple) else config


def _build(settings: Mapping[str, Any]) -> nn.Module:
    return instantiate_from_config(settings["model"])


def weights_path(path: Path) -> Path:
    """The file of weights that a run directory of either project means, UserError without one; other paths as given."""
    if not path.is_dir():
        return path
    candidates = [path / WEIGHTS_FILE, *(path / folder / "last.ckpt" for folder in _CHECKPOINT_FOLDERS)]
    candidates += [
        file for folder in _CHECKPOINT_FOLDERS for file in sorted((path / folder).glob("*.ckpt"), reverse=True)
    ]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise UserError(f"{path} is no run directory; expected {WEIGHTS_FILE} or checkpoints/last.ckpt in it")


def _config_for(path: Path, config: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    by_hand = isinstance(config, Mapping)
    if config is None:
        config = embedded_config(path) or neighbouring_config(path)
    elif isinstance(config, str | os.PathLike):
        config = load_yaml(config)
    if config is None:
        config = {"model": infer_config(state, path)}
        logger.warning("no config found for %s; its architecture is inferred from the weights", path)
    config = without_checkpoints(config)
    model = config.get("model")
    if not isinstance(model, Mapping) or "target" not in model:
        raise UserError(
            f"the config for {path} has no 'model' section with a 'target'; give the one it was trained with"
        )
    _check_targets(model, by_hand)
    return config


def _check_targets(config: Any, by_hand: bool) -> None:
    """UserError for a ``target`` that is not a network or schedule: a config from a file must not run functions."""
    if isinstance(config, list | tuple):
        for value in config:
            _check_targets(value, by_hand)
    if not isinstance(config, Mapping):
        return
    target = config.get("target")
    if isinstance(target, str):
        ours = target.rpartition(".")[0] in compat.NAMES or target.startswith("tamingfast.models.")
        found = get_obj_from_str(target) if ours or by_hand else None
        if not (isinstance(found, type) and (issubclass(found, nn.Module) or found.__name__.endswith("Scheduler"))):
            raise UserError(
                f"the config names '{target}', which is no network of this package and is not run; remove it, or pass "
                "the config as a mapping if it is a torch module that you trust"
            )
    for value in config.values():
        _check_targets(value, by_hand)


def embedded_config(path: Path) -> Any:
    """The config that `convert` has put into a safetensors file, None without; UserError where it is not JSON."""
    text = metadata_of(path).get("config")
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"the config inside {path} is not JSON ({error}); give the config with config=") from error


def metadata_of(path: Path) -> dict[str, str]:
    """The strings that a safetensors file carries; none in other files."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        return stream.metadata() or {}


def neighbouring_config(path: Path) -> Any:
    """The config that lies where either project puts that of the weights at ``path``, None without."""
    from omegaconf import OmegaConf

    run = path.parent.parent if path.parent.name in _CHECKPOINT_FOLDERS else path.parent
    # The original writes one config per start of a run; later ones override earlier ones.
    projects = sorted((run / "configs").glob("*project.yaml"))
    if projects:
        return OmegaConf.merge(*map(load_yaml, projects))
    for candidate in (path.with_suffix(".yaml"), path.parent / CONFIG_FILE, run / "configs" / "model.yaml"):
        if candidate.exists():
            return load_yaml(candidate)
    return None


def _adopt_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    # The original registers these only once a model has drawn segmentation maps.
    for prefix, module in (("", model), ("cond_stage_model.", getattr(model, "cond_stage_model", None))):
        value = state.get(f"{prefix}colorize")
        if value is not None and module is not None and not hasattr(module, "colorize"):
            module.register_buffer("colorize", torch.empty_like(value))


def infer_config(state: Mapping[str, Tensor], source: str | os.PathLike = "the checkpoint") -> dict[str, Any]:
    """The ``{target, params}`` config of a VQGAN first stage, read off the shapes of its weights.

    Attention resolutions are named for a square input whose latent side is 16, which gives the same network.
    Raises UserError for a transformer, whose number of heads leaves no trace in its weights, and for unknown keys.
    """
    if any(key.startswith("transformer.") for key in state):
        raise UserError(f"{source} is a transformer, whose number of heads its weights do not show; give its config")
    if "encoder_top.conv_in.weight" in state:
        raise UserError(f"{source} is a first stage of two levels; give its config")
    if "encoder.conv_in.weight" not in state or "decoder.conv_out.weight" not in state:
        raise UserError(f"{source} is no VQGAN: it lacks 'encoder.conv_in.weight'; give its config")
    conv_in, last = state["encoder.conv_in.weight"], state["encoder.conv_out.weight"]
    ch = conv_in.shape[0]
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    blocks = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block."))
    resolution = 16 * 2 ** (levels - 1)
    attention = [resolution // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state]
    z_channels = state["post_quant_conv.weight"].shape[0]
    gumbel = "quantize.embed.weight" in state
    codebook = state["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    params: dict[str, Any] = {
        "embed_dim": codebook.shape[1],
        "n_embed": codebook.shape[0],
        "ddconfig": {
            "double_z": last.shape[0] == 2 * z_channels, "z_channels": z_channels, "resolution": resolution,
            "in_channels": conv_in.shape[1], "out_ch": state["decoder.conv_out.weight"].shape[0], "ch": ch,
            "ch_mult": [width // ch for width in widths], "num_res_blocks": blocks, "attn_resolutions": attention,
            "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
    }  # fmt: skip
    kind = "GumbelVQ" if gumbel else "EMAVQ" if "quantize.embedding.cluster_size" in state else "VQModel"
    if gumbel:
        params["temperature_scheduler_config"] = {
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {"warm_up_steps": 0, "max_decay_steps": 1, "lr_start": 1.0, "lr_max": 1.0, "lr_min": 1.0},
        }
    elif "colorize" in state:
        kind, params["n_labels"] = "VQSegmentationModel", state["colorize"].shape[1]
    return {"target": f"taming.models.vqgan.{kind}", "params": params}
