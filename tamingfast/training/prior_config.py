"""The config of a prior, completed from its first stages and its data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from tamingfast.checkpoints.config import instantiate_from_config, plain
from tamingfast.data import ANY_SIZE
from tamingfast.data.conditions import IMAGE_KEYS, TOKEN_KEYS
from tamingfast.data.conditions.scenes import Rule, class_names
from tamingfast.errors import UserError, nearest
from tamingfast.models.base import FirstStage
from tamingfast.models.prior import UNCONDITIONAL
from tamingfast.models.pyramid import Pyramid

# The original's names, so that its programs can read a run's config too.
MODEL = "taming.models.cond_transformer.Net2NetTransformer"
MULTISCALE = "tamingfast.models.multiscale.MultiscaleTransformer"
GPT = "taming.modules.transformer.mingpt.GPT"
LABELATOR = "taming.modules.util.Labelator"
COORD_STAGE = "taming.modules.misc.coord.CoordStage"
TOKEN_STAGE = "taming.models.dummy_cond_stage.DummyCondStage"
DUMMY_LOSS = "taming.modules.losses.vqperceptual.DummyLoss"
PERMUTERS = "taming.modules.transformer.permuter"

#: ``prior.ordering`` -> class of the permuter; None keeps the tokens in raster order.
ORDERINGS = {
    "row_major": None,
    "spiral_out": "SpiralOut",
    "spiral_in": "SpiralIn",
    "z_curve": "ZCurve",
    "subsample": "Subsample",
    "alternate": "AlternateParsing",
    "random": "Random",
}
#: Values of ``prior.condition``.
CONDITIONS = ("none", "class", "coord", *IMAGE_KEYS, *TOKEN_KEYS)
#: Parameters of how a first stage was trained or loaded, left out of a prior's config.
_NOT_EMBEDDED = ("ckpt_path", "ignore_keys", "monitor")


class _Geometry(NamedTuple):
    """``codes`` token values, each token for ``factor`` x ``factor`` pixels, in ``levels`` grids."""

    codes: int
    factor: int
    levels: int


def prior_config(
    first_stage_config: Mapping[str, Any],
    overrides: Mapping[str, Any],
    grid: tuple[int, int],
    classes: int | None = None,
    cond_stage_config: Mapping[str, Any] | None = None,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """The config of a prior on a first stage: ``overrides`` (a preset), completed by what the first stage determines.

    ``grid`` is the image's size in tokens, (rows, columns); ``classes`` the number of labels in the data.
    ``prior.condition`` is "none" (one start token), "class", "coord" (where in the whole picture a crop lies), one of
    `IMAGE_KEYS` or one of `TOKEN_KEYS`. The first stage of a condition in `IMAGE_KEYS` has the config
    ``cond_stage_config`` and gives one token for each token of the image; ``rule`` turns the objects of `TOKEN_KEYS`
    into tokens. ``prior.ordering`` is a key of `ORDERINGS`; ``prior.scales``, the factors of a `Pyramid` or
    "all", makes the prior a `MultiscaleTransformer`. ``prior.class_dropout`` gives a class-conditional prior a null
    class. The vocabulary is large enough for the codes and for the
    condition's tokens, the block size for both sequences together; values in ``model.params`` are kept. First stages
    are embedded without their losses and without a path, because their weights become part of the prior's.

    Raises UserError for unknown conditions and orderings, for scales that the grid does not have, for missing classes,
    and for a ``cond_stage_config`` that is missing, belongs to another condition or downsamples by another factor.
    """
    config = {key: value for key, value in plain(overrides).items() if key != "prior"}
    options = {"condition": "none", "ordering": "row_major", "classes": None, "scales": None, "class_dropout": 0.0}
    options |= plain(overrides).get("prior") or {}
    model = dict(config.get("model") or {})
    given = dict(model.get("params") or {})
    settled: dict[str, Any] = {"first_stage_config": _embedded(first_stage_config)}

    stage = _geometry(first_stage_config)
    if "cond_stage_config" not in given:
        settled |= _condition(options, classes, stage, cond_stage_config)
    cond_stage = (settled | given)["cond_stage_config"]
    described = cond_stage if isinstance(cond_stage, Mapping) else {}
    rule = rule if described.get("target") == TOKEN_STAGE else None
    single = cond_stage == UNCONDITIONAL or described.get("target") == LABELATOR
    _check_levels(options, stage, spatial=not single and rule is None)

    settled |= _ordering(options, grid)
    target, image_tokens = model.get("target", MODEL), math.prod(grid)
    if options["scales"] is not None:
        pyramid = _pyramid(options, single, grid)
        target, image_tokens = MULTISCALE, pyramid.tokens
        settled |= {"scales": list(pyramid.factors), "grid": list(grid)}
    if rule is not None:
        condition_values, condition_tokens = rule.tokens, rule.length
    else:
        condition_values, condition_tokens = _vocabulary(described), 1 if single else math.prod(grid)
    transformer = _transformer(given, max(stage.codes, condition_values), condition_tokens + image_tokens)
    params = settled | given
    params |= {"first_stage_config": settled["first_stage_config"], "transformer_config": transformer}
    config["model"] = {"base_learning_rate": model.get("base_learning_rate"), "target": target, "params": params}
    return config


def completed_data(data: Mapping[str, Any], side: int | None = None, codes: int | None = None) -> dict[str, Any]:
    """The ``data`` section, completed by the first stage: the size of the images, and the vocabulary of objects.

    ``side`` is that of the squares the first stage was trained on, in pixels; ``codes`` is its number of codes. Class
    names are copied from their file, so that the run does not need it.
    """
    data = dict(plain(data))
    if side is not None and data.get("name") in ANY_SIZE and data.get("size") is None:
        data["size"] = side
    if data.get("name") in ("conditions", "shards") and data.get("kind") in TOKEN_KEYS:
        if data.get("classes") is not None:
            data["classes"] = list(class_names(data["classes"]))
        if codes is not None and data.get("tokens") is None:
            data["tokens"] = codes
    return data


def _condition(
    options: Mapping[str, Any], classes: int | None, first_stage: _Geometry, stage: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The part of a prior's ``params`` that ``prior.condition`` determines."""
    name = _choice(options["condition"], CONDITIONS, "prior.condition")
    if options["class_dropout"] and name != "class":
        raise UserError(
            f"prior.class_dropout: got {options['class_dropout']} for prior.condition={name}, expected 0; it needs "
            "prior.condition=class"
        )
    if stage is not None and name not in IMAGE_KEYS:
        raise UserError(
            f"--cond-stage: got one for prior.condition={name}, expected none; leave it out, or set prior.condition to "
            f"one of {', '.join(IMAGE_KEYS)}"
        )
    if name == "none":
        return {"cond_stage_config": UNCONDITIONAL, "cond_stage_key": "image", "unconditional": True}
    if name == "class":
        known = options["classes"] or classes
        if not known:
            raise UserError(
                "prior.condition: got class for data without labels, expected labels; set prior.classes or "
                "prior.condition=none"
            )
        dropout = options["class_dropout"]
        params = {"n_classes": known} | ({"null_class": True} if dropout else {})
        described = {"target": LABELATOR, "params": params}
        settled = {"cond_stage_config": described, "cond_stage_key": "class_label"}
        return settled | ({"class_dropout": dropout} if dropout else {})
    if name == "coord":
        # The largest coordinate token is n_embed itself, so the tokens are exactly the codes of the first stage.
        params = {"n_embed": first_stage.codes - 1, "down_factor": first_stage.factor}
        return {"cond_stage_config": {"target": COORD_STAGE, "params": params}, "cond_stage_key": "coord"}
    if name in TOKEN_KEYS:
        key = TOKEN_KEYS[name]
        return {"cond_stage_config": {"target": TOKEN_STAGE, "params": {"conditional_key": key}}, "cond_stage_key": key}
    return {"cond_stage_config": _condition_stage(name, first_stage, stage), "cond_stage_key": name}


def _condition_stage(name: str, first_stage: _Geometry, stage: Mapping[str, Any] | None) -> dict[str, Any]:
    """The embedded config of the first stage of an image condition; UserError when it does not fit."""
    if stage is None:
        raise UserError(
            f"--cond-stage: got none, expected a first stage for prior.condition={name}; train one with `tamingfast "
            f"train vqgan {name}_vqgan`"
        )
    described, own = _embedded(stage), _geometry(stage)
    trained_on = described["params"].get("image_key", "image")
    if trained_on != name:
        raise UserError(
            f"--cond-stage: got a first stage of '{trained_on}', expected one of '{name}', as in prior.condition"
        )
    if own.levels > 1:
        raise UserError("--cond-stage: got a first stage of two levels of tokens, expected a single level")
    if own.factor != first_stage.factor:
        raise UserError(
            f"--cond-stage: got tokens of {own.factor} pixels a side, expected {first_stage.factor} as in the image's "
            "first stage; train both with the same number of downsampling blocks"
        )
    return described


def _check_levels(options: Mapping[str, Any], stage: _Geometry, spatial: bool) -> None:
    """Raise UserError for settings that a first stage of two levels does not support."""
    if stage.levels > 1 and spatial:
        raise UserError(
            f"prior.condition: got {options['condition']} on a first stage of two levels of tokens, expected none or "
            "class; set one of them, or train a first stage of one level"
        )
    if stage.levels > 1 and options["scales"] is not None:
        raise UserError(
            "prior.scales: got scales on a first stage of two levels of tokens, expected one level; leave them out, or "
            "train a first stage of one level"
        )


def _ordering(options: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, Any]:
    permuter = ORDERINGS[_choice(options["ordering"], tuple(ORDERINGS), "prior.ordering")]
    if permuter is None:
        return {}
    return {"permuter_config": {"target": f"{PERMUTERS}.{permuter}", "params": {"H": grid[0], "W": grid[1]}}}


def _pyramid(options: Mapping[str, Any], single: bool, grid: tuple[int, int]) -> Pyramid:
    """The scales that ``prior.scales`` asks for; UserError if the other settings do not allow any."""
    if options["ordering"] != "row_major":
        raise UserError(
            f"prior.ordering: got {options['ordering']} with prior.scales, expected row_major, the order within each "
            "scale; leave one of them out"
        )
    if not single:
        raise UserError(
            f"prior.condition: got {options['condition']} with prior.scales, expected none or class; leave one of them "
            "out"
        )
    return Pyramid.of(options["scales"], *grid)


def _transformer(given: Mapping[str, Any], vocab_size: int, block_size: int) -> dict[str, Any]:
    """``transformer_config``, whose vocabulary and block size are as computed unless they are given."""
    transformer = dict(given.get("transformer_config") or {})
    settled = {"vocab_size": max(vocab_size, given.get("sos_token", 0) + 1), "block_size": block_size}
    params = settled | dict(transformer.get("params") or {})
    return {"target": transformer.get("target", GPT), "params": params}


def _vocabulary(cond_stage: Mapping[str, Any]) -> int:
    """Number of token values of a condition stage; 0 if its params do not say."""
    params = cond_stage.get("params") or {}
    # The largest token of a coordinate stage is n_embed itself.
    extra = 1 if str(cond_stage.get("target")).endswith("CoordStage") else 0
    if "n_classes" in params:
        return params["n_classes"] + bool(params.get("null_class"))
    return params.get("n_embed", 0) + extra


def _choice(value: Any, valid: tuple[str, ...], name: str) -> str:
    if value not in valid:
        raise UserError(f"{name}: got {value!r}, expected one of {', '.join(valid)}{nearest(str(value), valid)}")
    return value


def _embedded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A first stage's config as part of a prior's."""
    model = plain(config)["model"]
    params = {key: value for key, value in model["params"].items() if key not in _NOT_EMBEDDED}
    if "lossconfig" in params:
        params["lossconfig"] = {"target": DUMMY_LOSS}
    return {"target": model["target"], "params": params}


def _geometry(first_stage_config: Mapping[str, Any]) -> _Geometry:
    """A first stage's geometry from its config alone: the network is built without memory for its weights."""
    with torch.device("meta"):
        stage: FirstStage = instantiate_from_config(_embedded(first_stage_config))
    return _Geometry(stage.n_embed, stage.factor, stage.levels)
