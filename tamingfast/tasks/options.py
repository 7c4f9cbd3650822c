"""Options of the workflows and their defaults, shared with the command line.

Nothing heavy is imported at the top, because `tamingfast --help` reads the defaults.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tamingfast.errors import check_count

if TYPE_CHECKING:
    from tamingfast.tasks.models import Model

#: Number of images that `sample` draws.
COUNT = 16
#: Completions of each image that `complete` draws.
TIMES = 3
#: Strides that `likelihood` tries, in tokens, and the number of images that it processes at a time.
STRIDES, LIKELIHOOD_BATCH = (8,), 4
#: Number of images that `encode` processes at a time.
ENCODING_BATCH = 64
#: The word for the corners and the centre of each image, and these mirrored, as its views.
TEN_CROP = "ten-crop"
#: The two sets that data settings describe.
SPLITS = ("train", "validation")
#: Samples of a prior that `tamingfast.evaluation.evaluate_model` compares with real images.
SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """How tokens are drawn. The defaults are the paper's: temperature 1 and top-k 100.

    Attributes:
        temperature: divides the logits.
        top_k: sample from the k most likely tokens only; None keeps all.
        top_p: sample from the nucleus of this probability only; None keeps all.
        greedy: always take the most likely token.
        seed: of the noise, 0 to 2**64 - 1.
        batch: images at a time; it does not change the images.
        schedule: "paper", "scene", "strided" or "block"; see `tamingfast.sampling.schedule`.
        stride: tokens between windows, for "strided" and "block".
        engine: the implementation that samples: "auto", "native", "torch" or "naive". With the last two torch runs the
            first stage, too.
        dtype: of the weights while drawing: "float32", "bfloat16", "float16" or "int8"; None keeps the model's own.
        lookahead: tokens that are fed together while drawing, most of them guessed and then checked; 1 guesses none,
            None takes what is fastest. It does not change the images.
        drafts: on a CPU, keep an int8 copy of the prior, which guesses tokens where that is faster. It takes a quarter
            of the memory of float32 weights and does not change the images.
        cfg: scale of classifier-free guidance, or text such as "4:cosine", for priors with a null class; None guides
            nothing.

    Raises:
        UserError: a value out of range. Whether the model allows the stride, and the machine the engine and the dtype,
            is checked when drawing begins; so is the lookahead.
    """

    temperature: float = 1.0
    top_k: int | None = 100
    top_p: float | None = None
    greedy: bool = False
    seed: int = 0
    batch: int = 16
    schedule: str = "paper"
    stride: int = 8
    engine: str = "auto"
    dtype: str | None = None
    lookahead: int | None = None
    drafts: bool = False
    cfg: float | str | None = None

    def __post_init__(self) -> None:
        # These import torch, which `tamingfast --help` does without.
        from tamingfast.engines.selection import check_names
        from tamingfast.sampling.settings import check_settings

        check_settings(self.deciding())
        check_names(self.engine)
        check_count("batch", self.batch)

    def deciding(self) -> dict[str, Any]:
        """The options that decide the tokens, by the names of `Canvas.settings`."""
        names = ("temperature", "top_k", "top_p", "greedy", "seed", "schedule", "stride", "dtype", "cfg")
        return {name: getattr(self, name) for name in names}

    def running(self) -> dict[str, Any]:
        """The options of `sample_grid` that do not decide the tokens."""
        return {"engine": self.engine, "lookahead": self.lookahead, "drafts": self.drafts}

    def first_stage(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block ``engine`` holds for first stages, as `tamingfast.engines.first_stage.beside` says."""
        from tamingfast.engines import first_stage

        return first_stage.using(first_stage.beside(self.engine))


def drawing_options(model: Model, **given: Any) -> DrawingOptions:
    """The options ``given`` and, for the others, those that the model's config recommends, else the defaults.

    ``model`` is one, or the path of its run or checkpoint. Raises UserError as `DrawingOptions` does, and for a section
    ``sampling`` of the config that `tamingfast.sampling.settings.recommended` refuses.
    """
    from tamingfast.sampling.settings import recommended
    from tamingfast.tasks.models import config_of, unread

    options = DrawingOptions(**given)  # raises before the model is looked at
    return replace(options, **recommended(config_of(unread(model).outline)) | given)
