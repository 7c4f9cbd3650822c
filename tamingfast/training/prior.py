"""The second stage's training: paper section 3.2, on the tokens of a frozen first stage."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.checkpoints.config import instantiate_from_config, plain, trained_side
from tamingfast.checkpoints.weights import fingerprint, load_into
from tamingfast.data.conditions import Kind, label_colors
from tamingfast.data.conditions.scenes import Rule, class_names
from tamingfast.errors import UserError, nearest
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.pyramid import Pyramid
from tamingfast.training import distributed, feed, loop
from tamingfast.training.settings import build_datasets, check_stage, training_settings
from tamingfast.training.vqgan import optimizers_of

# The original's names, so that a run's config also reads well there.
MODEL = "taming.models.cond_transformer.Net2NetTransformer"
MULTISCALE = "tamingfast.models.multiscale.MultiscaleTransformer"
GPT = "taming.modules.transformer.mingpt.GPT"
LABELATOR = "taming.modules.util.Labelator"
COORD_STAGE = "taming.modules.misc.coord.CoordStage"
TOKEN_STAGE = "taming.models.dummy_cond_stage.DummyCondStage"
DUMMY_LOSS = "taming.modules.losses.vqperceptual.DummyLoss"
PERMUTERS = "taming.modules.transformer.permuter"

#: ``prior.ordering`` -> class of the permuter (second source, section 3); None keeps the tokens as they are.
ORDERINGS = {
    "row_major": None,
    "spiral_out": "SpiralOut",
    "spiral_in": "SpiralIn",
    "z_curve": "ZCurve",
    "subsample": "Subsample",
    "alternate": "AlternateParsing",
    "random": "Random",
}
#: Values of ``prior.condition`` that need a first stage of their own; each is also the condition's key in a batch.
IMAGE_CONDITIONS = ("segmentation", "depth", "edges", "lowres", "keypoints")
#: Values whose condition is tokens already -> its key in a batch. They name kinds of data too.
OBJECT_CONDITIONS = {"boxes": "objects_bbox", "centers": "objects_center_points"}
#: Keys of all conditions that have as many tokens as the image.
SPATIAL = ("coord", *IMAGE_CONDITIONS)
CONDITIONS = ("none", "class", "coord", *IMAGE_CONDITIONS, *OBJECT_CONDITIONS)
SAMPLE_TOP_K = 100
#: Data sets that make images of any size.
_ANY_SIZE = ("photos", "folder", "conditions")

#: Weights of a first stage that a prior does without.
_NO_PART = ("loss.", "colorize")


def train(
    config: Mapping[str, Any],
    first_stage: str | os.PathLike | None,
    out: str | os.PathLike,
    resume: bool = False,
    device: str | torch.device | None = None,
    datasets: tuple[Dataset, Dataset | None] | None = None,
    cond_stage: str | os.PathLike | None = None,
) -> Path:
    """Train a prior on the tokens of ``first_stage`` (a run directory or checkpoint) into ``out``; returns it.

    ``cond_stage`` is the first stage of the condition, where that is one of `IMAGE_CONDITIONS`. The model's config is
    completed by `prior_config`, and without a ``data:`` section that of ``cond_stage``, else of ``first_stage``, is
    used. With ``first_stage`` None the config must be complete, as the original's are, with the first stage's
    ``ckpt_path``. ``datasets`` (training, validation) replaces the ``data:`` section; items with ``indices`` (h, w) are
    taken as tokens, others are encoded batch by batch. Raises as `tamingfast.training.vqgan.train`.
    """
    config, out = dict(plain(config)), Path(out)
    settings = training_settings(config)
    check_stage(config, prior=True)
    with distributed.world(device) as among:
        frozen, condition = _first_stage(first_stage), _first_stage(cond_stage)
        data = [getattr(stage, "config", {}).get("data") for stage in (condition, frozen)]
        config["data"] = _completed(config.get("data") or data[0] or data[1] or {}, frozen)
        datasets = datasets or build_datasets(config)
        # What draws with the run has to know what its conditions are.
        config["data"] = dict(config["data"]) | ((getattr(datasets[0], "condition", None) or {}).get("data") or {})
        rule = getattr(getattr(datasets[0], "kind", None), "rule", None)
        if frozen is not None:
            cond_config = None if condition is None else condition.config
            config = prior_config(frozen.config, config, *_token_facts(frozen, datasets[0]), cond_config, rule)
        described = config.get("model") or {}
        lr = loop.learning_rate(settings, described.get("base_learning_rate"), among.size)
        torch.manual_seed(feed.key(settings.seed, "weights"))
        model = instantiate_from_config({key: described[key] for key in ("target", "params") if key in described})
        grid = feed.grid_of(datasets[0], model.first_stage_model)
        _check_condition(model.cond_stage_key, condition, datasets)
        stage = PriorStage(model.to(among.device), lr, grid, settings.seed, getattr(datasets[0], "kind", None))
        loop.prepare(config, out, resume, settings, datasets[0], among, stage)
        if frozen is not None:
            load_into(model.first_stage_model, frozen.state_dict(), first_stage, optional=_NO_PART)
        if condition is not None:
            load_into(model.cond_stage_model, condition.state_dict(), cond_stage, optional=_NO_PART)
        return loop.run(stage, settings, datasets, out, among, resume)


def prior_config(
    first_stage_config: Mapping[str, Any],
    overrides: Mapping[str, Any],
    grid: tuple[int, int],
    classes: int | None = None,
    cond_stage_config: Mapping[str, Any] | None = None,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """The config of a prior on a first stage: ``overrides`` (a preset), completed by what the first stage settles.

    ``grid`` is tokens per side, (height, width); ``classes`` how many labels the data have. ``prior.condition`` is
    "none" (one start token), "class", "coord" (where in the whole picture a crop lies) or one of `IMAGE_CONDITIONS`,
    which ``cond_stage_config``, the config of its own first stage, turns into as many tokens as the image has, or one
    of `OBJECT_CONDITIONS`, of which the data's ``rule`` makes tokens.
    ``prior.ordering`` is a key of `ORDERINGS`; ``prior.scales``, the factors of a `Pyramid` or "all", makes the prior a
    `MultiscaleTransformer`. The vocabulary holds the codes and the condition's tokens, the block size both sequences;
    what ``model.params`` gives already is kept. First stages are embedded without their losses and without a path:
    their weights become part of the prior's.

    Raises UserError for unknown conditions and orderings, for scales that the grid does not have, for classes that the
    data do not have, and for a condition's stage that is missing, of another condition or of other downsampling.
    """
    config = {key: value for key, value in plain(overrides).items() if key != "prior"}
    options = {"condition": "none", "ordering": "row_major", "classes": None, "scales": None}
    options |= plain(overrides).get("prior") or {}
    given = dict((config.get("model") or {}).get("params") or {})
    params: dict[str, Any] = {"first_stage_config": _embedded(first_stage_config)}

    codes, factor, levels = _geometry(first_stage_config)
    if "cond_stage_config" not in given:
        params |= _condition(options, classes, codes, factor, cond_stage_config)
    stage = (params | given)["cond_stage_config"]
    objects = isinstance(stage, Mapping) and stage.get("target") == TOKEN_STAGE and rule is not None
    if levels > 1 and not (objects or _is_single_token(stage)):
        raise UserError(
            f"prior.condition={options['condition']} has a token for each of the image, which tokens of two levels do "
            "not form a grid for; set prior.condition to none or class, or train a first stage of one level"
        )
    if levels > 1 and options["scales"] is not None:
        raise UserError("prior.scales is for tokens of one level; leave it out, or train a first stage of one level")
    condition_tokens = rule.length if objects else 1 if _is_single_token(stage) else math.prod(grid)
    image_tokens, target = math.prod(grid), (config.get("model") or {}).get("target", MODEL)
    permuter = ORDERINGS[_choice(options["ordering"], tuple(ORDERINGS), "prior.ordering")]
    if permuter is not None:
        params["permuter_config"] = {"target": f"{PERMUTERS}.{permuter}", "params": {"H": grid[0], "W": grid[1]}}
    if options["scales"] is not None:
        pyramid = _pyramid(options, stage, grid)
        target, image_tokens = MULTISCALE, pyramid.tokens
        params |= {"scales": list(pyramid.factors), "grid": list(grid)}

    known = rule.tokens if objects else _condition_vocabulary(stage)
    settled = {
        "vocab_size": max(codes, known, given.get("sos_token", 0) + 1),
        "block_size": condition_tokens + image_tokens,
    }
    transformer = dict(given.get("transformer_config") or {})
    transformer = {
        "target": transformer.get("target", GPT),
        "params": settled | dict(transformer.get("params") or {}),
    }
    config["model"] = {
        "base_learning_rate": (config.get("model") or {}).get("base_learning_rate"),
        "target": target,
        "params": params
        | given
        | {"first_stage_config": params["first_stage_config"], "transformer_config": transformer},
    }
    return config


def _pyramid(options: Mapping[str, Any], cond_stage: Any, grid: tuple[int, int]) -> Pyramid:
    """The scales that ``prior.scales`` asks for; UserError where they do not go with the other settings."""
    if options["ordering"] != "row_major":
        raise UserError(
            f"prior.ordering is '{options['ordering']}', but prior.scales unrolls each scale row by row; leave one out"
        )
    if not _is_single_token(cond_stage):
        raise UserError(
            f"prior.scales is for priors without a condition or on classes, but prior.condition is "
            f"'{options['condition']}'; leave one out"
        )
    return Pyramid.of(options["scales"], *grid)


def _condition(
    options: Mapping[str, Any], classes: int | None, codes: int, factor: int, stage: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The part of a prior's ``params`` that ``prior.condition`` settles."""
    name = _choice(options["condition"], CONDITIONS, "prior.condition")
    if stage is not None and name not in IMAGE_CONDITIONS:
        raise UserError(
            f"a condition's first stage is given, but prior.condition is '{name}', which has none; leave it out, or "
            f"set prior.condition to one of {', '.join(IMAGE_CONDITIONS)}"
        )
    if name == "none":
        return {"cond_stage_config": "__is_unconditional__", "cond_stage_key": "image", "unconditional": True}
    if name == "class":
        known = options["classes"] or classes
        if not known:
            raise UserError(
                "prior.condition=class needs labels, but the data have none; set prior.classes or prior.condition=none"
            )
        return {
            "cond_stage_config": {"target": LABELATOR, "params": {"n_classes": known}},
            "cond_stage_key": "class_label",
        }
    if name == "coord":
        # Coordinates reach n_embed itself, so that all codes of the first stage are in use and no more.
        params = {"n_embed": codes - 1, "down_factor": factor}
        return {"cond_stage_config": {"target": COORD_STAGE, "params": params}, "cond_stage_key": "coord"}
    if name in OBJECT_CONDITIONS:
        key = OBJECT_CONDITIONS[name]
        return {"cond_stage_config": {"target": TOKEN_STAGE, "params": {"conditional_key": key}}, "cond_stage_key": key}
    if stage is None:
        raise UserError(
            f"prior.condition={name} needs a first stage for it; train one with `tamingfast train vqgan {name}_vqgan` "
            "and give it with --cond-stage RUN"
        )
    described = _embedded(stage)
    trained_on = described["params"].get("image_key", "image")
    _, of_condition, levels = _geometry(stage)
    if trained_on != name:
        raise UserError(f"the condition's first stage was trained on '{trained_on}', but prior.condition is '{name}'")
    if levels > 1:
        raise UserError("the condition's first stage has tokens of two levels; train one of one level for it")
    if of_condition != factor:
        raise UserError(
            f"a token of the condition covers {of_condition} pixels a side and one of the image {factor}; train both "
            "first stages with as many downsampling blocks"
        )
    return {"cond_stage_config": described, "cond_stage_key": name}


def _completed(data: Mapping[str, Any], first_stage: nn.Module | None) -> dict[str, Any]:
    """The ``data`` section with what it leaves to the first stage: the size of the images, and objects' vocabulary.

    Names of classes that stand in a file are copied, as the run is to be of use without it.
    """
    data = dict(plain(data))
    if first_stage is not None and data.get("name") in _ANY_SIZE and data.get("size") is None:
        side = trained_side(first_stage.config)
        data |= {} if side is None else {"size": side}
    if data.get("name") == "conditions" and data.get("kind") in OBJECT_CONDITIONS:
        if data.get("classes") is not None:
            data["classes"] = list(class_names(data["classes"]))
        if data.get("tokens") is None and first_stage is not None:
            data["tokens"] = first_stage.n_embed
    return data


def _check_condition(key: str, stage: nn.Module | None, datasets: tuple[Dataset, Dataset | None]) -> None:
    """UserError when the data lack the condition, or hold its tokens from another first stage than ``stage``."""
    for dataset in datasets:
        encoded = getattr(dataset, "condition", None) or {}
        if key not in (*SPATIAL, *OBJECT_CONDITIONS.values()) or dataset is None or key in dataset[0]:
            continue
        if encoded.get("key") != key:
            raise UserError(
                f"the prior is conditioned on '{key}', which the data do not hold; train it on data.name=conditions "
                "data.kind=... data.path=DIRECTORY"
            )
        # A token file made by other means may not say what made it.
        if stage is not None and encoded.get("first_stage") not in (None, fingerprint(stage)):
            raise UserError(
                "the conditions in the token file were written by another first stage; encode the data with this one, "
                "given as --cond-stage"
            )


def _choice(value: Any, valid: tuple[str, ...], name: str) -> str:
    if value not in valid:
        hint = nearest(str(value), valid) or f"; valid are {', '.join(valid)}"
        raise UserError(f"{name} is '{value}', which is unknown{hint}")
    return value


def _is_single_token(stage: Any) -> bool:
    return stage == "__is_unconditional__" or (isinstance(stage, Mapping) and stage.get("target") == LABELATOR)


def _condition_vocabulary(stage: Any) -> int:
    params = stage.get("params") or {} if isinstance(stage, Mapping) else {}
    # A coordinate stage rounds to n_embed itself.
    extra = 1 if isinstance(stage, Mapping) and str(stage.get("target")).endswith("CoordStage") else 0
    return params.get("n_classes") or params.get("n_embed", 0) + extra


def _embedded(config: Mapping[str, Any]) -> dict[str, Any]:
    model = plain(config)["model"]
    params = {
        key: value for key, value in model["params"].items() if key not in ("ckpt_path", "ignore_keys", "monitor")
    }
    if "lossconfig" in params:
        params["lossconfig"] = {"target": DUMMY_LOSS}
    return {"target": model["target"], "params": params}


def _geometry(first_stage_config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(number of codes, pixels per token along a side, levels) of a first stage, from its config alone."""
    with torch.device("meta"):
        stage = instantiate_from_config(_embedded(first_stage_config))
    return stage.n_embed, stage.factor, stage.levels


def _first_stage(path: str | os.PathLike | None) -> nn.Module | None:
    """The first stage that the user names, None without a path."""
    if path is None:
        return None
    from tamingfast.checkpoints import load_model

    model = load_model(path, device="cpu")
    if not hasattr(model, "factor"):
        raise UserError(
            f"{path} holds a {type(model).__name__}, which is no first stage; give the run of `train vqgan`"
        )
    return model


def _token_facts(first_stage: nn.Module, dataset: Dataset) -> tuple[tuple[int, int], int | None]:
    """(grid, number of classes) of a dataset under a first stage. UserError when its tokens are another's."""
    codes = first_stage.n_embed
    vocabulary = getattr(dataset, "vocab_size", None)
    if vocabulary is not None and vocabulary != codes:
        raise UserError(
            f"the token file was written with {vocabulary} codes but the first stage has {codes}; encode the data with "
            "this first stage"
        )
    # A token file made by other means may not say what made it.
    source = getattr(dataset, "metadata", {}).get("first_stage")
    if source is not None and source != fingerprint(first_stage):
        raise UserError("the token file was written by another first stage; encode the data with this one")
    classes = getattr(dataset, "classes", None)
    return feed.grid_of(dataset, first_stage), classes if isinstance(classes, int | None) else len(classes)


def tokens_of(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Image tokens (B, n) of a batch in the ordering's sequence, and condition tokens (B, c).

    UserError when the batch lacks what the prior is conditioned on.
    """
    encoded = f"{model.cond_stage_key}_indices"
    if not model.be_unconditional and model.cond_stage_key not in batch and encoded not in batch:
        raise UserError(
            f"the data hold {', '.join(batch)} and no '{model.cond_stage_key}', on which the prior is conditioned; use "
            "data of the kind that it was trained on"
        )
    # In full precision whatever the training's: these are the tokens that sampling and decoding will mean.
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        if "indices" not in batch:
            x, c = model.get_xc(batch)
            return model.encode_to_z(x)[1], model.encode_to_c(c)[1]
        z = model.to_sequence(batch["indices"].long())
        if encoded in batch:
            return z, batch[encoded]
        return z, model.encode_to_c(z if model.be_unconditional else batch[model.cond_stage_key])[1]


class PriorStage:
    """A `Net2NetTransformer` with its AdamW."""

    shown = ("loss", "nll", "perplexity")

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        grid: tuple[int, int],
        seed: int = 0,
        kind: Kind | None = None,
    ):
        self.model, self.grid, self.seed, self.kind = model, grid, seed, kind
        model.learning_rate = learning_rate
        self.optimizers = optimizers_of(model)

    def nats(self, batch: Mapping[str, Any]) -> Tensor:
        """Cross entropy of each image token of the batch, in nats: (B, n) in the model's sequence."""
        z, c = tokens_of(self.model, batch)
        logits = self.model.token_logits(z, c)
        return F.cross_entropy(logits.transpose(1, 2).float(), z, reduction="none")

    def nll(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean cross entropy of the batch's image tokens, nats per token ()."""
        return self.nats(batch).mean()

    def loss(self, batch: Mapping[str, Any], index: int) -> tuple[Tensor, dict[str, Tensor]]:
        value = self.nll(batch)
        return value, {"loss": value}

    def validate(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean negative log-likelihood in nats per token, and its exponential; of each scale too, where there are."""
        total, images = 0.0, 0
        for batch in batches:
            nats = self.nats(batch).double()
            total, images = total + nats.sum(0), images + len(nats)
        nats = total / images
        nll = float(nats.mean())
        values = {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}
        if isinstance(self.model, MultiscaleTransformer):
            pyramid = self.model.pyramid
            each = zip(pyramid.names, pyramid.split(nats), strict=True)
            values |= {f"nll_{name}": float(scale.mean()) for name, scale in each}
        return values

    def images(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Conditions that are images, what the first stage makes of the batch, and samples under its conditions."""
        z, c = tokens_of(self.model, batch)
        height, width = self.grid
        shown = self.model.decode_grid(self.model.to_grid(z, height, width))
        samples = self.model.sample_images(
            c,
            height,
            width,
            window=max(height, width),
            top_k=min(SAMPLE_TOP_K, self.model.transformer.config.vocab_size),
            seed=self.seed,
        )
        return [*self.conditioning(batch), shown, samples]

    def conditioning(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """The batch's conditions as images (B, 3, H, W) in [-1, 1] in a list, which is empty for other conditions."""
        key = self.model.cond_stage_key
        if key in OBJECT_CONDITIONS.values() and self.kind is not None:
            shape = batch[self.model.first_stage_key].shape[1:3]
            drawn = np.stack([self.kind.picture_of_tokens(tokens, shape) for tokens in batch[key].cpu().numpy()])
            return [torch.from_numpy(drawn).permute(0, 3, 1, 2)]
        if key not in SPATIAL:
            return []
        if key in batch:
            c = self.model.get_input(key, batch)
        else:
            c = self.model.decode_condition(batch[f"{key}_indices"].view(-1, *self.grid)).clamp(-1, 1)
        if key == "segmentation":
            colors = torch.from_numpy(label_colors(c.shape[1])).to(c.device)
            return [colors[c.argmax(1)].permute(0, 3, 1, 2)]
        return [(2 * c - 1 if key == "coord" else c).expand(-1, 3, -1, -1)]
