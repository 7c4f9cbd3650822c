"""The page of a model on the Hub, made from its config and from the figures of `tamingfast.evaluation`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from torch import nn

from tamingfast import figures, report
from tamingfast.checkpoints.config import at, trained_side

CARD = "README.md"
_TAGS = ("tamingfast", "taming-transformers", "vqgan")


def model_card(model: nn.Module, config: Mapping[str, Any], title: str, found: Mapping[str, Any] | None = None) -> str:
    """Markdown with the Hub's metadata: what the model is, how it is used, and what was measured.

    ``config`` is the model's; ``found`` a result of `tamingfast.evaluation.evaluate_model`, None for no figures.
    """
    is_prior = hasattr(model, "transformer")
    about: dict[str, Any] = {
        "library_name": "tamingfast",
        "tags": [*_TAGS, "image-generation" if is_prior else "image-tokenizer"],
    }
    if is_prior:
        about["pipeline_tag"] = "unconditional-image-generation"
    if found:
        about["model-index"] = [_index(title, found)]
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        _described(model, config),
        "## Use",
        _use(title, is_prior),
    ]
    if found:
        parts += ["## Figures", _provenance(found), figures.table(found)]
    return "\n\n".join(parts) + "\n"


def _described(model: Any, config: Mapping[str, Any]) -> str:
    stage, transformer = getattr(model, "first_stage_model", model), getattr(model, "transformer", None)
    name = str(at(config, "model", "target")).rpartition(".")[2]
    side, millions = trained_side(config), sum(weight.numel() for weight in model.parameters()) / 1e6
    lines = [
        f"`{name}`, {millions:.3g}M parameters" + (f", trained on images of {side}x{side} pixels." if side else ".")
    ]
    codes, factor = getattr(stage, "n_embed", None), getattr(stage, "factor", None)
    if codes and factor:
        lines.append(f"Its tokens have {codes:,} values; one stands for {factor}x{factor} pixels.")
    if transformer is not None:
        geometry = {key: getattr(transformer.config, key) for key in ("n_layer", "n_head", "n_embd")}
        lines.append(f"The transformer over them has {report.geometry(geometry)}.")
    if classes := at(config, "classes"):
        lines.append(
            f"It draws {len(classes)} classes: {', '.join(map(str, classes[:10]))}{', ...' * (len(classes) > 10)}."
        )
    return " ".join(lines)


def _use(title: str, is_prior: bool) -> str:
    name = title if "/" in title else f"path/to/{title}"
    command = f"sample {name} --out samples.png" if is_prior else f"reconstruct {name} photo.png --out again.png"
    work = (
        'tasks.sample(model, 4).save("samples.png")'
        if is_prior
        else 'images = tasks.reconstruct(model, ["photo.png"]).reconstructed'
    )
    return (
        f'```python\nfrom tamingfast import load_model, tasks\n\nmodel = load_model("{name}")\n{work}\n```\n\n'
        f"```bash\npip install tamingfast\ntamingfast {command}\n```"
    )


def _provenance(found: Mapping[str, Any]) -> str:
    machine = found.get("machine")
    measured = f" Measured on {report.on(machine)}." if isinstance(machine, Mapping) else ""
    return f"Measured by `tamingfast evaluate` on {found['data']}.{measured}" if "data" in found else measured.strip()


def _index(title: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as the Hub's ``model-index``."""
    metrics = [{"type": key, "name": name, "value": value} for key, name, value in _metrics(found)]
    task = {"type": "unconditional-image-generation", "name": "image tokens"}
    data = {"type": "images", "name": str(found.get("data", "images"))}
    return {"name": title, "results": [{"task": task, "dataset": data, "metrics": metrics}]}


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(key, name, value) of every finite number among the measures."""
    sections = {name: found[name] for name in ("reconstruction", "likelihood") if name in found}
    sections |= {f"distance of {name}": row for name, row in (found.get("distances") or {}).items()}
    for section, row in sections.items():
        for key, value in row.items():
            if isinstance(value, float) and math.isfinite(value):
                yield key, f"{section}: {key}", round(value, 6)
