"""How a picture was made: the recipe that a PNG holds in a text chunk, and what it takes to repeat the picture."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from tamingfast import __version__
from tamingfast.checkpoints import hub
from tamingfast.checkpoints.fingerprint import fingerprint, identity
from tamingfast.data.png import LONGEST
from tamingfast.data.rgb import opened
from tamingfast.engines.lending import Snapshot
from tamingfast.errors import UserError, brief, first_line
from tamingfast.files import check_path, digest
from tamingfast.models.condition_stages import Labelator
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.sampling.canvas import Canvas
from tamingfast.tasks.models import Unread
from tamingfast.tasks.options import DrawingOptions

logger = logging.getLogger(__name__)

#: Name of the text chunk, and what its JSON begins with.
KEY, FORMAT = "tamingfast", "tamingfast recipe 1"
#: Where a model is looked for by its recorded name, which is no path.
_PLACES = ("", "runs")
_LONGEST_NAME = 255
_MOST = 1 << 20  # images; a picture that asks for more is not worth an attempt
_OPTIONS = frozenset(option.name for option in fields(DrawingOptions)) - {"lookahead", "drafts"}


#: The name and the SHA-256 of an input.
Input: TypeAlias = dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides a drawn picture. It names files and models, but says of no file where it lies.

    Attributes:
        task: "sample", "edit", "outpaint" or "complete".
        version: of this package.
        model: name of the prior's run or file, or of its repository; None for a model that was not read from a path.
        weights: fingerprints of the parts of the model: "prior", "first_stage", and "cond_stage" if that has weights.
        first, count: the numbers of the images that were drawn together, which key their noise.
        image: the number of the only image that the picture shows; None if it shows all of them.
        size: (height, width) in pixels; None where it follows from the inputs.
        classes: the classes that the images, from the first on, cycle through; None for priors without classes.
        options: how the tokens were drawn. Batch and engine are among them because pixels, unlike tokens, are rounded
            differently under others.
        inputs: for each argument that was a file, a picture or an array, its ``sha256`` and the file's ``name``, None
            without a file.
        arguments: what else the task was given, by its arguments' names.
    """

    task: str
    version: str = __version__
    model: str | None
    weights: dict[str, str]
    first: int = 0
    count: int
    image: int | None = None
    size: tuple[int, int] | None
    classes: list[int] | None
    options: DrawingOptions
    inputs: dict[str, Input] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The recipe as it is written, in values of JSON."""
        options = {name: value for name, value in asdict(self.options).items() if name in _OPTIONS}
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"format": FORMAT} | own | {"size": self.size and list(self.size), "options": options}

    @property
    def together(self) -> range:
        """The numbers of the images to draw for this picture: all or, as pixels depend on the batch, one's batch."""
        end = self.first + self.count
        if self.image is None:
            return range(self.first, end)
        start = self.image - (self.image - self.first) % self.options.batch
        return range(start, min(start + self.options.batch, end))

    def classes_from(self, number: int) -> list[int] | None:
        """The classes that the images from this number on cycle through."""
        if self.classes is None:
            return None
        turned = (number - self.first) % len(self.classes)
        return self.classes[turned:] + self.classes[:turned]


def texts_of(recipe: Recipe | None, place: int | None = None) -> dict[str, str]:
    """The text for a PNG of all images, or of the one at this place among them; none without a recipe."""
    if recipe is None:
        return {}
    alone = place is not None and recipe.image is None
    text = json.dumps((replace(recipe, image=recipe.first + (place or 0)) if alone else recipe).facts())
    # Readers leave out longer texts, and refuse more images.
    return {KEY: text} if len(text) < LONGEST and recipe.count <= _MOST else {}


#: A recipe, or the path of a picture that has one.
RecipeSource: TypeAlias = Recipe | str | os.PathLike[str]


def recipe_of(path: RecipeSource) -> Recipe:
    """The recipe in a PNG file; a recipe is returned as it is.

    Raises UserError if the file cannot be read as a PNG, or has no recipe or a damaged one.
    """
    if isinstance(path, Recipe):
        return path
    check_path("path", path)
    expected = "a PNG that tamingfast drew"
    with opened(path, expected, ("PNG",)) as image:
        text = image.info.get(KEY)
    if not isinstance(text, str):
        raise UserError(f"{path}: got a picture without a recipe, expected {expected} without --no-metadata")
    try:
        return _parsed(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: got a damaged recipe ({first_line(error)}), expected one that tamingfast wrote; give another "
            "picture"
        ) from error


def _parsed(text: str) -> Recipe:
    """The recipe of a text; ValueError or RecursionError unless `texts_of` could have written it."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        what = brief(found.get("format")) if isinstance(found, dict) else "no object"
        raise UserError(f"format: got {what}, expected {FORMAT!r}")
    for name, fits in _FITTING.items():
        if not fits(found.get(name)):
            raise UserError(f"{name}: got {brief(found.get(name))}, expected another value")
    values = {name: found[name] for name in _FITTING}
    options = DrawingOptions(**values.pop("options"))
    size = values.pop("size")
    recipe = Recipe(**values, options=options, size=None if size is None else (size[0], size[1]))
    if recipe.image is not None and not recipe.first <= recipe.image < recipe.first + recipe.count:
        raise UserError(f"image: got {recipe.image}, expected one of the images drawn together")
    return recipe


def _number(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 32


def _name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME


def _names(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_name(name) and fits(each) for name, each in value.items())


def _scalar(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float) or _name(value)


def _either(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


#: What each entry of a recipe in a file must be; the values of options are checked where they have their meaning.
_FITTING: dict[str, Callable[[Any], bool]] = {
    "task": lambda value: value in ("sample", "edit", "outpaint", "complete"),
    "version": _name,
    "model": _either(_name),
    "weights": lambda value: _names(value, _name) and value.keys() >= {"prior", "first_stage"},
    "first": _number,
    "count": lambda value: _number(value, 1) and value <= _MOST,
    "image": _either(_number),
    "size": _either(
        lambda value: isinstance(value, list) and len(value) == 2 and all(_number(side, 1) for side in value)
    ),
    "classes": _either(lambda value: isinstance(value, list) and bool(value) and all(map(_number, value))),
    "options": lambda value: _names(value, _scalar) and value.keys() <= _OPTIONS,
    "inputs": lambda value: _names(value, lambda each: _names(each, _either(_name)) and {*each} == {"name", "sha256"}),
    "arguments": lambda value: _names(value, _scalar) and _number(value.get("scales", 0)),
}


def made(
    task: str,
    source: Unread,
    model: Net2NetTransformer,
    inputs: dict[str, Input],
    *,
    count: int,
    size: tuple[int, int] | None,
    classes: list[int] | None,
    options: DrawingOptions,
    first: int = 0,
    prior: str = "",
    **arguments: Any,
) -> Recipe:
    """The recipe of images that ``model``, read from ``source``, has drawn; what is not said here is as in `Recipe`.

    ``classes`` has one class for each image; ``prior`` is the fingerprint of the transformer, if it is known.
    """
    return Recipe(
        task=task, model=_name_of(source), weights=_weights_of(model, prior), first=first, count=count, size=size,
        classes=None if classes is None else _cycle(classes), options=options, inputs=inputs,
        arguments={name: value for name, value in arguments.items() if value is not None},
    )  # fmt: skip


def _name_of(source: Unread) -> str | None:
    """The name of what a model was read from: the last part of a path, or all of a repository's name."""
    text = str(source)
    if not text:
        return None
    return (text if hub.names_repository(text) else Path(text).resolve().name)[-_LONGEST_NAME:]


def _weights_of(model: Net2NetTransformer, prior: str = "") -> dict[str, str]:
    """The fingerprints of the parts that decide a picture; ``prior`` is that of the transformer, if it is known."""
    found = {"prior": prior or identity(model), "first_stage": _fingerprint(model.first_stage_model)}
    condition = getattr(model, "cond_stage_model", None)
    if isinstance(condition, nn.Module) and condition.state_dict():
        found["cond_stage"] = _fingerprint(condition)
    return found


def _fingerprint(part: nn.Module) -> str:
    """`fingerprint`, which takes a second for a large first stage, again only after the weights have changed."""
    state = Snapshot(list(part.state_dict().values()))
    known = _fingerprints.get(part)
    if known is None or known[0] != state:
        known = _fingerprints[part] = state, fingerprint(part)
    return known[1]


_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[Snapshot, str]] = weakref.WeakKeyDictionary()


def _cycle(classes: list[int]) -> list[int]:
    """The shortest beginning that, repeated, gives all."""
    return next(classes[:n] for n in range(1, len(classes) + 1) if classes[n:] == classes[:-n])


def classes_in(model: Net2NetTransformer, cond: Tensor) -> list[int] | None:
    """The class of each image from its condition tokens (B, c); None for priors without classes."""
    stage = model.cond_stage_model
    return (cond[:, 0] - stage.first).tolist() if isinstance(stage, Labelator) else None


def inputs_of(**given: Any) -> dict[str, Input]:
    """`Recipe.inputs` of the arguments that are not None; a list or tuple counts as one input."""
    return {name: _input(value) for name, value in given.items() if value is not None}


def _input(value: Any) -> Input:
    if not isinstance(value, list | tuple):
        name = Path(value).name[-_LONGEST_NAME:] if isinstance(value, str | os.PathLike) else None
        return {"name": name, "sha256": _sha256(value)}
    several = [_input(each) for each in value]
    if len(several) == 1:
        return several[0]
    together = hashlib.sha256("".join(str(each["sha256"]) for each in several).encode()).hexdigest()
    return {"name": f"{len(several)} pictures", "sha256": together}


def _sha256(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return digest(value)
    value = value.tokens if isinstance(value, Canvas) else value
    array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype == object:  # the objects of a scene, say
        return hashlib.sha256(repr(value).encode()).hexdigest()
    head = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def repeatable(source: RecipeSource, given: Mapping[str, Any]) -> Recipe:
    """The recipe of a picture of `sample`, whose inputs, all that a recipe lacks, are among the arguments ``given``.

    Raises UserError for a picture of another task, and for an input that is not given.
    """
    recipe, name = recipe_of(source), _called(source)
    if recipe.task != "sample":
        raise UserError(
            f"{name}: got a picture of `tamingfast {recipe.task}`, which began with pictures that it does not hold, "
            f"expected one of `tamingfast sample`; run {recipe.task} again with the options that `tamingfast inspect` "
            "shows"
        )
    have = inputs_of(**given)
    for argument, known in recipe.inputs.items():
        alike = {"condition", "condition_of"} if argument in ("condition", "condition_of") else {argument}
        if not alike & have.keys():
            file = f" ({known['name']})" if known["name"] else ""
            raise UserError(f"{argument}: got none, expected that of {name}{file}, which does not hold it; give it too")
        if argument in have and have[argument]["sha256"] != known["sha256"]:
            logger.warning("%s: drawn with another %s than the one given now", name, argument)
    if recipe.version != __version__:
        logger.warning("%s: drawn by tamingfast %s, and this is %s", name, recipe.version, __version__)
    return recipe


def check_same_model(source: RecipeSource, model: Net2NetTransformer) -> None:
    """Raise UserError unless ``model`` has the weights of the recipe."""
    recipe = recipe_of(source)
    own = _weights_of(model)
    for part, known in recipe.weights.items():
        if own.get(part) != known:
            raise UserError(
                f"model: got one of {part} {own.get(part, 'none')[:12]}, expected {known[:12]}, "
                f"{recipe.model or 'the model'}'s, which drew {_called(source)}; name that model"
            )


def say_changed(
    source: RecipeSource,
    count: int | None,
    size: tuple[int, int] | None,
    classes: list[int] | None,
    options: DrawingOptions | None,
) -> None:
    """Log which of the values given now, None standing for those left out, are not those of the recipe."""
    recipe = recipe_of(source)
    before: dict[str, Any] = {"count": recipe.count, "size": recipe.size, "classes": recipe.classes}
    now = {name: value for name, value in (("count", count), ("size", size), ("classes", classes)) if value is not None}
    if options is not None:
        before |= asdict(recipe.options)
        now |= {name: getattr(options, name) for name in sorted(_OPTIONS)}
    for name, value in now.items():
        if value != before[name]:
            logger.warning("%s: drawn with %s %s, now with %s", _called(source), name, before[name], value)


def model_named(source: RecipeSource) -> Path:
    """The run or file here that has the name of the recipe's model: in the working directory, or in runs/.

    Raises UserError if there is none. Nothing is fetched, as a picture may come from anyone.
    """
    recipe = recipe_of(source)
    name = recipe.model or ""
    plain = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
    for place in _PLACES if plain else ():
        if (found := Path(place, name)).exists():
            return found
    raise UserError(
        f"model: got none, expected {brief(name) if name else 'the one'}, which drew {_called(source)}; give its "
        "path or repository"
    )


def _called(source: RecipeSource) -> str:
    return "the recipe's picture" if isinstance(source, Recipe) else str(source)
