"""The training loop that both stages share.

Everything random in a step is keyed by (seed, step, rank), and the order of the images by (seed, epoch). So the state
of a run is its weights, its optimizers and its step number, and a continued run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import load_yaml, plain
from tamingfast.data import loader
from tamingfast.errors import UserError, first_line, lacks_memory
from tamingfast.files import atomic_write
from tamingfast.training.distributed import World
from tamingfast.training.feed import epoch_steps, images_per_step, key, step_batches, to_device, validation_batches
from tamingfast.training.health import Monitor, gradient_norm
from tamingfast.training.settings import FREE_TO_CHANGE, Training

Loss = tuple[Tensor, dict[str, Tensor]] | None
IMAGES_SHOWN = 8


class Stopped(UserError):
    """The run was asked to stop, and left a state to continue from."""


class Stage(Protocol):
    """What the loop trains: a model with its optimizers, in the order in which they step."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    shown: tuple[str, ...]  # values for the progress bar

    def loss(self, batch: Any, index: int) -> Loss:
        """The loss () that optimizer ``index`` minimizes and values to record; None when it rests in this step."""

    def validate(self, batches: Sequence[Any]) -> dict[str, float]:
        """Values over the validation batches; called in eval mode without gradients."""

    def images(self, batch: Any) -> list[Tensor]:
        """Rows of images (B, C, H, W) in [-1, 1] worth looking at; called like `validate`."""


def step(
    optimizers: Sequence[torch.optim.Optimizer],
    loss: Callable[[Any, int], Loss],
    batches: Sequence[Any],
    *,
    device: str = "cpu",
    precision: str = "float32",
    grad_clip: float | None = None,
    reduce: Callable[[Sequence[Tensor]], None] = lambda parameters: None,
    check: Callable[[float, float, dict[str, Tensor]], None] = lambda loss, norm, values: None,
) -> dict[str, Tensor]:
    """Move every optimizer once, in the order of the original under Lightning.

    For each of the ``batches`` (whose gradients are averaged) and each optimizer in turn: a forward pass with the
    weights as they are by then, its loss, a backward pass into its own parameters only (those of the other
    optimizers do not require gradients meanwhile), and after the last batch its step. So the discriminator learns from
    reconstructions of the autoencoder that has just moved. ``check(loss, gradient norm, values)`` runs before each
    optimizer moves. Returns the values of `loss`, averaged over the batches.
    """
    values: list[dict[str, Tensor]] = [{} for _ in optimizers]
    totals = [0.0] * len(optimizers)
    for number, batch in enumerate(batches):
        for index, optimizer in enumerate(optimizers):
            with _only(optimizers, optimizer):
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                    result = loss(batch, index)
                if result is None:
                    continue
                value, seen = result[0] / len(batches), result[1]
                value.backward()
            totals[index] = totals[index] + value.detach()
            for name, item in seen.items():
                values[index][name] = values[index].get(name, 0.0) + item.detach() / len(batches)
            if number + 1 == len(batches):
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                reduce(parameters)
                check(float(totals[index]), float(gradient_norm(parameters)), values[index])
                if grad_clip is not None:
                    nn.utils.clip_grad_norm_(parameters, grad_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return {name: item for seen in values for name, item in seen.items()}


@contextlib.contextmanager
def _only(optimizers: Sequence[torch.optim.Optimizer], chosen: torch.optim.Optimizer) -> Iterator[None]:
    others = [p for o in optimizers if o is not chosen for group in o.param_groups for p in group["params"]]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def learning_rate(settings: Training, base: float | None, size: int) -> float:
    """``training.learning_rate``, or the original's rule: accumulate * devices * batch size * base learning rate."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    if not isinstance(base, (int, float)) or base <= 0:
        raise UserError(
            "the config gives no model.base_learning_rate; set it (the paper's is 4.5e-6) or training.learning_rate"
        )
    return images_per_step(settings, size) * base


def rate_factor(settings: Training, step: int) -> float:
    """What the learning rate is multiplied by at ``step`` (from 0): warm-up times cosine decay, 1 without either."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.decay_steps is None:
        return warm
    return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / settings.decay_steps)))


class _Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one acts as it always does."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        self.__exit__()

    def __exit__(self, *exception: Any) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


def prepare(
    config: dict[str, Any], out: Path, resume: bool, settings: Training, dataset: Dataset, among: World, stage: Stage
) -> None:
    """Write ``config.yaml`` into a new run directory, or see that the one to resume began with the same config.

    Raises UserError when ``out`` already holds a run and ``resume`` is not given, when there is nothing to resume, when
    a setting differs that would change the run, when ``dataset`` is too small for a step, and when ``stage`` cannot
    take what it holds.
    """
    epoch_steps(dataset, settings, among.size)  # fails for too few images
    config["training"] = asdict(settings)
    if resume:
        _same_run(plain(load_yaml(run_directory.config_file(out))), config, out)
    elif run_directory.exists(out):
        raise UserError(f"{out} already holds a training run; continue it with --resume, or give another directory")
    _try(stage, dataset, among)
    among.any(False)  # nobody writes before everybody has looked
    if among.rank == 0:
        from omegaconf import OmegaConf

        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / run_directory.CONFIG) as temporary:
            OmegaConf.save(OmegaConf.create(config), temporary)


def _try(stage: Stage, dataset: Dataset, among: World) -> None:
    """UserError when the stage's networks, which stand but may not fit each other, cannot take an image."""
    batch = next(iter(loader(dataset, 1, seed=0, epoch=0, shuffle=False)))
    stage.model.eval()
    devices = [among.device] if among.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            stage.validate([to_device(batch, among.device)])
    except UserError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise UserError(
            f"the model of the config cannot take the training images ({first_line(error)}); correct model.params or "
            "the data settings"
        ) from error
    finally:
        stage.model.train()


def _same_run(began: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    for section in ("model", "data", "training"):
        before, after = _flat(began.get(section), section), _flat(now.get(section), section)
        for name in sorted(before.keys() | after.keys()):
            free = section == "training" and name.split(".")[1] in FREE_TO_CHANGE
            if not free and before.get(name) != after.get(name):
                raise UserError(
                    f"{name} is {after.get(name)!r} but the run in {out} began with {before.get(name)!r}; resume with "
                    "the same setting, or start a new run in another directory"
                )


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for part in value for k, v in _flat(value[part], f"{name}.{part}").items()}
    return {name: value}


def run(
    stage: Stage, settings: Training, datasets: tuple[Dataset, Dataset | None], out: Path, among: World, resume: bool
) -> Path:
    """Train until the budget is spent, from the state in ``out`` when ``resume``; returns ``out``.

    Raises `Stopped` after writing a checkpoint when the process is asked to stop, UserError when training goes wrong.
    """
    return _Run(stage, settings, datasets, out, among).train(resume)


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


class _Run:
    def __init__(self, stage: Stage, settings: Training, datasets: tuple, out: Path, among: World):
        self.stage, self.settings, self.out, self.among = stage, settings, out, among
        self.training, self.validation = datasets
        self.per_epoch = epoch_steps(self.training, settings, among.size)
        self.monitor = Monitor(stage.optimizers[0].param_groups[0]["lr"], settings.precision)
        self.step, self.saved, self.seconds = 0, 0, 0.0  # saved: the step of the state on disk
        self.metrics: run_directory.Metrics | None = None
        self.rates = [group["lr"] for group in _groups(stage.optimizers)]

    def train(self, resume: bool) -> Path:
        from tamingfast.progress import bar

        kept = self.restore() if resume and run_directory.exists(self.out) else 0
        with contextlib.ExitStack() as stack:
            interrupts = stack.enter_context(_Interrupts())
            if self.among.rank == 0:
                self.metrics = run_directory.Metrics(self.out, kept)
                stack.callback(self.metrics.close)
            self.bar = stack.enter_context(
                bar("step", self.settings.steps, initial=self.step, desc=self.out.name, disable=self.among.rank > 0)
            )
            batches = step_batches(self.training, self.settings, self.among, self.step)
            while not self.spent():
                self.advance(batches)
                if self.among.any(interrupts.received is not None)[0]:
                    self.save()
                    raise Stopped(
                        f"stopped after step {self.step} ({interrupts.received}); --resume continues from there"
                    )
            self.finish()
        return self.out

    def spent(self) -> bool:
        time_is_up = self.settings.seconds is not None and self.seconds >= self.settings.seconds
        steps_are_done = self.settings.steps is not None and self.step >= self.settings.steps
        return steps_are_done or self.among.any(time_is_up)[0]

    def advance(self, batches: Iterator[tuple[int, list[Any]]]) -> None:
        """One step, and whatever is due after it."""
        began = time.perf_counter()
        epoch, mine = next(batches)
        self.stage.model.train()
        self.stage.model.global_step = self.step
        torch.manual_seed(key(self.settings.seed, self.step, self.among.rank))
        self.set_rates()
        values = self.move(mine)
        self.seconds += time.perf_counter() - began
        self.step += 1
        self.bar.update()
        if self.step % self.settings.log_every == 0:
            self.record(epoch, "train", self.among.mean(values))
        if self.due(self.validate_every):
            self.validate(epoch)
        if self.due(self.settings.image_every):
            self.draw()
        if self.due(self.settings.checkpoint_every):
            self.save()

    def set_rates(self) -> None:
        factor = rate_factor(self.settings, self.step)
        for group, rate in zip(_groups(self.stage.optimizers), self.rates, strict=True):
            group["lr"] = rate * factor

    def move(self, batches: list[Any]) -> dict[str, Tensor]:
        try:
            return step(
                self.stage.optimizers,
                self.stage.loss,
                batches,
                device=self.among.device.type,
                precision=self.settings.precision,
                grad_clip=self.settings.grad_clip,
                reduce=self.among.average_gradients,
                check=lambda loss, norm, values: self.monitor.check(self.step, loss, norm, values, batches),
            )
        except ValueError as error:
            self.monitor.explain(self.step, error, batches)
            raise

    @property
    def validate_every(self) -> int:
        return self.settings.validate_every or self.per_epoch

    def due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def finish(self) -> None:
        """Save first: what follows can be repeated, the training cannot."""
        if self.step != self.saved:
            self.save()
        if not self.due(self.validate_every):
            self.validate((self.step - 1) // self.per_epoch)
        if self.settings.image_every is not None and not self.due(self.settings.image_every):
            self.draw()

    def record(self, epoch: int, split: str, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, epoch, split, values)
            self.bar.set_postfix(
                {name: f"{values[name]:.4g}" for name in self.stage.shown if name in values}, refresh=False
            )

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Eval mode without gradients, in the training's precision."""
        self.stage.model.eval()
        device, low = self.among.device.type, self.settings.precision == "bfloat16"
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=low):
            yield

    def validate(self, epoch: int) -> None:
        """On the first process; the others meet it again at the next step."""
        if self.among.rank or self.validation is None or not len(self.validation):
            return
        torch.manual_seed(key(self.settings.seed, "validate"))
        with self.looking():
            values = self.stage.validate(validation_batches(self.validation, self.settings, self.among.device))
        self.record(epoch, "validation", values)
        for hint in self.monitor.hints(values):
            self.bar.write(f"warning: {hint}", file=sys.stderr)

    def draw(self) -> None:
        from tamingfast.images import save_rows

        shown = self.validation if self.validation is not None and len(self.validation) else self.training
        if self.among.rank:
            return
        first = next(iter(validation_batches(shown, self.settings, self.among.device)))
        with self.looking():
            rows = self.stage.images({name: value[:IMAGES_SHOWN] for name, value in first.items()})
        save_rows(self.out / run_directory.IMAGES / f"{self.step:08d}.png", rows)

    def save(self) -> None:
        if self.metrics is None:
            return
        progress = {
            "step": self.step,
            "epoch": self.step // self.per_epoch,
            "batch": self.step % self.per_epoch,
            "seconds": self.seconds,
            "images": len(self.training),
            "processes": self.among.size,
            "metrics_bytes": self.metrics.size(),
        }
        run_directory.save(self.out, self.stage.model, self.stage.optimizers, progress)
        self.saved = self.step

    def restore(self) -> int:
        """Take up the state in ``out``; returns how much of the metrics belongs to it."""
        progress = run_directory.restore(self.out, self.stage.model, self.stage.optimizers)
        for name, now, what in (
            ("images", len(self.training), "training images"),
            ("processes", self.among.size, "processes"),
        ):
            if progress[name] != now:
                raise UserError(
                    f"there are {now} {what} but the run in {self.out} began with {progress[name]}; resume with as "
                    "many, or start a new run in another directory"
                )
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.saved = self.step
        return progress["metrics_bytes"]
