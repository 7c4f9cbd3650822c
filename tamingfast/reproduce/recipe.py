"""What the parts of today's training recipe change: one first stage for each, trained at equal budget.

All start with the same seed, see the same batches in the same order and make as many steps. A row is written to
``rows/NAME.json`` as soon as it is measured, so what is finished when a study stops is kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tamingfast import evaluation, images, tasks
from tamingfast.checkpoints.config import plain
from tamingfast.data.base import EpochDataset
from tamingfast.errors import UserError, nearest
from tamingfast.evaluation.batches import images_of
from tamingfast.evaluation.distances import compare
from tamingfast.evaluation.features import Extractor, extract, load_features
from tamingfast.evaluation.generated import reconstructions
from tamingfast.evaluation.statistics import Features
from tamingfast.files import write_json
from tamingfast.models.lpips import LPIPS
from tamingfast.reproduce import recipe_report
from tamingfast.reproduce.study import Study, images_at, magnification, spread

#: Channels of cosine codes, at most those of the codebook that they replace.
_LOW_DIMENSION = 8
#: The row that the others are compared with.
BASE = "base"


def run(study: Study) -> Path:
    """Train and measure each of the rows; returns the path of ``out/report.md``, written again after every row."""
    known = variants(study.settings["vqgan"])
    names = _names(study.settings["recipe"]["rows"], known)
    datasets = study.datasets()
    measures = _Measures(study, datasets[1])
    rows: dict[str, Any] = {}
    for name in names:
        config = _merged(study.settings["vqgan"], known[name])
        rows[name] = _kept(study, name, config) or _row(study, name, config, datasets, measures)
        page = _write(study, names, rows, datasets)
    return page


def variants(base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each row what it changes in the ``vqgan`` section ``base``."""
    params = base["model"]["params"]
    codes, width, start = params["n_embed"], params["embed_dim"], params["lossconfig"]["params"]["disc_start"]
    bits = codes.bit_length() - 1
    if codes != 2**bits:
        raise UserError(f"vqgan.model.params.n_embed: got {codes}, expected a power of two, as LFQ needs one")
    levels = [8] * (bits // 3) + [2 ** (bits % 3)] * (bits % 3 > 0)
    no_table = {"training": {"codebook_from_data": False}}  # to start with data
    low = min(width, _LOW_DIMENSION)
    averages = {"training": {"ema_decay": 0.999}}
    no_attention = {"model": {"params": {"ddconfig": {"attn_type": "none", "attn_resolutions": []}}}}
    together = _merged(
        _quantizer("CosineQuantizer", low, gradient="rotation", restart_below=0.05),
        _loss(lecam_weight=0.001, disc_loss="non_saturating", disc_warmup=start // 2),
        no_attention,
        averages,
    )
    return {
        BASE: {},
        "seed": {"training": {"seed": 1}},
        "uniform": {"training": {"codebook_from_data": False}},
        "ema": averages,
        "rotation": _quantizer("TableQuantizer", width, gradient="rotation"),
        "restart": _quantizer("TableQuantizer", width, restart_below=0.05),
        "cosine": _quantizer("CosineQuantizer", low),
        "simvq": _quantizer("SimVQ", width),
        "fsq": _merged(_quantizer("FSQ", len(levels), levels=levels), no_table),
        "lfq": _merged(_quantizer("LFQ", bits), no_table),
        "lecam": _loss(lecam_weight=0.001),
        "non_saturating": _loss(disc_loss="non_saturating"),
        "warm_start": _loss(disc_warmup=start // 2),
        "classifier": _loss(classifier_weight=0.02),
        "no_attention": no_attention,
        "checkpointing": {"training": {"gradient_checkpointing": True}},
        "compile": {"training": {"compile": True}},
        "together": together,
        "without_rotation": _merged(
            together, _quantizer("CosineQuantizer", low, gradient="straight_through", restart_below=0.05)
        ),
    }


def _quantizer(kind: str, width: int, **params: Any) -> dict[str, Any]:
    described = {"target": f"tamingfast.models.codebooks.{kind}", "params": params}
    return {"model": {"params": {"embed_dim": width, "quantizer_config": described}}}


def _loss(**params: Any) -> dict[str, Any]:
    return {"model": {"params": {"lossconfig": {"params": params}}}}


def _merged(*sections: Mapping[str, Any]) -> dict[str, Any]:
    return plain(OmegaConf.merge(*(OmegaConf.create(dict(section)) for section in sections)))


def _names(asked: Any, known: Mapping[str, Any]) -> list[str]:
    for name in asked or ():
        if name not in known:
            raise UserError(
                f"recipe.rows: got '{name}', expected some of {', '.join(known)}{nearest(str(name), known)}"
            )
    return [BASE, *(name for name in (known if asked is None else asked) if name != BASE)]


def _file(study: Study, name: str) -> Path:
    return study.out / "rows" / f"{name}.json"


def _asked(study: Study, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a row depends on."""
    return {"vqgan": config, **{key: study.settings[key] for key in ("data", "evaluation")}}


def _kept(study: Study, name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of an earlier call with the same settings."""
    path = _file(study, name)
    if not (study.resume and path.exists()):
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: got a damaged file, expected a row; remove it to measure again") from error
    if row.get("asked") != json.loads(json.dumps(_asked(study, config))):
        raise UserError(
            f"{path}: got a row with other settings, expected those of this study; give another --out, or remove it "
            "and its run"
        )
    return row


class _Measures:
    """The networks that measure, and the features of the real images, loaded when the first row needs them."""

    def __init__(self, study: Study, validation: EpochDataset):
        self.chosen, self.device, self.validation = study.settings["evaluation"], study.device, validation

    @cached_property
    def perceptual(self) -> LPIPS | None:
        source = self.chosen["perceptual"]  # "lpips" downloads the weights
        return LPIPS(None if source == "lpips" else source) if source else None

    @cached_property
    def network(self) -> Extractor | None:
        name = self.chosen["features"]
        return load_features(name, device=self.device) if name else None

    @cached_property
    def real(self) -> Features:
        assert self.network is not None
        return extract(self.network, self.images())

    def images(self) -> Any:
        """Batches of the validation images that are measured, always the same."""
        return images_of(self.validation, self.chosen["batch"], self.chosen["images"], 0)


def _row(
    study: Study,
    name: str,
    config: dict[str, Any],
    datasets: tuple[EpochDataset, EpochDataset],
    measures: _Measures,
) -> dict[str, Any]:
    study.train_first_stage(name, datasets, {**config, "data": study.settings["data"]})
    began = time.perf_counter()
    model, chosen = study.first_stage(name), study.settings["evaluation"]
    found = evaluation.reconstruction(
        model, datasets[1], batch_size=chosen["batch"], limit=chosen["images"], perceptual=measures.perceptual
    )
    distance = None
    if measures.network is not None:
        distance = compare(extract(measures.network, reconstructions(model, measures.images())), measures.real)
    seconds, steps = study.seconds([name]), study.steps(name)
    row = {
        "name": name,
        "steps": steps,
        "codes": model.n_embed,
        "reconstruction": found,
        "distance": distance,
        "seconds_per_step": seconds / steps,
        "seconds": seconds + time.perf_counter() - began,
        "asked": _asked(study, config),
    }
    write_json(_file(study, name), row)
    return row


def _write(
    study: Study, names: list[str], rows: Mapping[str, Any], datasets: tuple[EpochDataset, EpochDataset]
) -> Path:
    validation = datasets[1]
    shown = images_at(validation, spread(len(validation), study.settings["evaluation"]["shown"]))
    sheet = {"image": shown} | {
        name: tasks.reconstructed(model, shown.to(model.device)).cpu()
        for name in rows
        for model in [study.first_stage(name)]
    }
    images.save_rows(
        study.out / "reconstructions.png", list(sheet.values()), list(sheet), magnification(shown.shape[-1])
    )
    results = study.facts(datasets[0]) | {
        "rows": list(rows.values()),
        "missing": [name for name in names if name not in rows],
        "pictures": {"reconstructions.png": f"Validation images, and their reconstructions with {', '.join(rows)}"},
        "seconds": sum(row["seconds"] for row in rows.values()),
    }
    return recipe_report.write(results, study.out)
