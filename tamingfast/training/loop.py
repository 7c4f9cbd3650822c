"""The training loop that both stages share.

Everything random in a step is keyed by (seed, step, number of the batch in the step), and the order of the images by
(seed, epoch). So the state of a run is its weights, its optimizers and its step number, and a resumed run repeats an
unbroken one bit for bit. On a GPU the order of sums depends on which tilings were measured to be fastest; the state
records them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamingfast.checkpoints import run_directory
from tamingfast.data.base import EpochDataset
from tamingfast.errors import Stopped
from tamingfast.images import save_rows
from tamingfast.kernels import choices
from tamingfast.progress import bar
from tamingfast.ranks import World
from tamingfast.training.acceleration import compiling
from tamingfast.training.averages import Averages
from tamingfast.training.events import Events
from tamingfast.training.feed import epoch_steps, step_batches, validation_batches
from tamingfast.training.forecast import Forecast
from tamingfast.training.health import Monitor
from tamingfast.training.interrupts import Interrupts
from tamingfast.training.parallel import Averaged, Parallel
from tamingfast.training.plots import plot
from tamingfast.training.seeds import seed_for
from tamingfast.training.settings import Training
from tamingfast.training.stage import Stage
from tamingfast.training.step import rate_factor, step

#: Images in each row of the pictures that a run writes.
IMAGES_SHOWN = 8
#: Without ``validate_every``, the least number of steps between validations at the ends of epochs.
BETWEEN_VALIDATIONS = 100
#: Seconds between the drawings of the curves, which follow a checkpoint.
BETWEEN_PLOTS = 60


def run(
    stage: Stage,
    settings: Training,
    datasets: tuple[EpochDataset, EpochDataset | None],
    out: Path,
    among: World,
    progress: Mapping[str, Any] | None = None,
    averages: Averages | None = None,
    parallel: Parallel | None = None,
) -> Path:
    """Train until the steps or seconds are used up, from ``progress``, which `begin` yields; returns ``out``.

    With ``averages``, which `begin` has restored, it validates, draws and exports. ``parallel`` says how processes hold
    the model; by default each holds the whole.
    A finished run is left as it is. Raises `Stopped` after writing a checkpoint when the process is asked to stop,
    UserError when training diverges or the run directory cannot be written.
    """
    return _Run(stage, settings, datasets, out, among, progress, averages, parallel or Averaged(among)).train()


class _Run:
    """One run. ``step`` counts the optimizer steps taken, ``saved`` is the step of the files on disk, None if none."""

    def __init__(
        self,
        stage: Stage,
        settings: Training,
        datasets: tuple[EpochDataset, EpochDataset | None],
        out: Path,
        among: World,
        progress: Mapping[str, Any] | None,
        averages: Averages | None,
        parallel: Parallel,
    ):
        self.averages, self.parallel = averages, parallel
        if averages is not None and progress is None:
            averages.restart()  # the codebook may have been set since
        self.stage, self.settings, self.out, self.among = stage, settings, out, among
        self.training, self.validation = datasets
        self.per_epoch = epoch_steps(self.training, settings, among.size)
        self.last = settings.last_step(self.per_epoch)
        self.validate_every = settings.validate_every or -(-BETWEEN_VALIDATIONS // self.per_epoch) * self.per_epoch
        rate = stage.optimizers[0].param_groups[0]["lr"]
        self.monitor = Monitor(rate, settings.precision, 1 if among.device.type == "cpu" else settings.log_every)
        self.step, self.seconds, self.kept = 0, 0.0, 0
        #: Processes with which the run began, for which its settings are meant.
        self.processes = among.size if progress is None else progress["processes"]
        if progress is not None:
            self.step, self.seconds, self.kept = progress["step"], progress["seconds"], progress["metrics_bytes"]
        self.saved = run_directory.exported(out) if self.step else None
        self.resumed = progress is not None
        self.metrics: run_directory.Metrics | None = None
        self.events: Events | None = None
        self.plotted = time.monotonic()
        self.forecast = Forecast(among.device.type)
        self.rates = [group["lr"] for group in self.groups()]

    def train(self) -> Path:
        # A run that had finished may have validated and drawn after its last checkpoint.
        self.had_finished = self.spent() and self.resumed
        with contextlib.ExitStack() as stack:
            interrupts = stack.enter_context(Interrupts(quiet=self.among.rank > 0))
            if self.among.rank == 0:
                self.metrics = run_directory.Metrics(self.out, self.kept, self.step if self.had_finished else None)
                stack.callback(self.metrics.close)
                if self.settings.tensorboard and not self.had_finished:
                    self.events = Events(self.out, self.step)
                    stack.callback(self.events.close)
            self.bar = stack.enter_context(
                bar("step", self.last, initial=self.step, desc=self.out.name, disable=self.among.rank > 0)
            )
            feed = step_batches(self.training, self.settings, self.among, self.step)
            batches = stack.enter_context(contextlib.closing(feed))
            while not self.spent():
                self.advance(batches)
                if self.among.any(interrupts.received is not None)[0]:
                    self.save()
                    raise Stopped(
                        f"stopped after step {self.step} ({interrupts.received}); --resume continues from there"
                    )
            self.finish()
        return self.out

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all optimizers."""
        return [group for optimizer in self.stage.optimizers for group in optimizer.param_groups]

    def spent(self) -> bool:
        """Whether the steps or, on any process, the seconds are used up."""
        time_is_up = self.settings.seconds is not None and self.seconds >= self.settings.seconds
        steps_are_done = self.last is not None and self.step >= self.last
        return steps_are_done or self.among.any(time_is_up)[0]

    def advance(self, batches: Iterator[tuple[int, list[dict[str, Any]]]]) -> None:
        """One step, and whatever is due after it."""
        began = time.perf_counter()
        epoch, mine = next(batches)
        reading = time.perf_counter() - began
        self.stage.model.train()
        self.stage.model.global_step = self.step
        self.set_rates()
        values = self.move(mine)
        if self.averages is not None:
            self.averages.update(self.step)
        whole = time.perf_counter() - began
        self.seconds += whole
        self.step += 1
        self.bar.update()
        self.tell(reading, whole)
        if any(map(self.due, (self.settings.log_every, self.validate_every, self.settings.image_every))):
            self.monitor.read()
        if self.due(self.settings.log_every):
            self.record(epoch, "train", self.among.mean(values))
        if self.due(self.validate_every):
            self.validate(epoch)
        if self.due(self.settings.image_every):
            self.draw()
        if self.due(self.settings.checkpoint_every):
            self.save()

    def tell(self, reading: float, whole: float) -> None:
        """Say after the first steps how long the rest will take."""
        steps = None if self.last is None else self.last - self.step
        seconds = None if self.settings.seconds is None else max(0.0, self.settings.seconds - self.seconds)
        said = self.forecast.after(reading, whole, steps, seconds)
        if said is not None and self.among.rank == 0:
            self.bar.write(f"{self.out.name}: {said}", file=sys.stderr)

    def set_rates(self) -> None:
        factor = rate_factor(self.settings, self.step)
        for group, rate in zip(self.groups(), self.rates, strict=True):
            group["lr"] = rate * factor

    def move(self, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One step of the optimizers; raises UserError with the likely cause when a value is not finite."""
        try:
            with compiling():
                return step(
                    self.stage.optimizers,
                    self.stage.loss,
                    batches,
                    device=self.among.device.type,
                    precision=self.settings.precision,
                    grad_clip=self.settings.grad_clip,
                    averaging=self.parallel.averaging,
                    begin=self.seed,
                    check=lambda loss, norm, values: self.monitor.check(self.step, loss, norm, values, batches),
                )
        except ValueError as error:
            self.monitor.explain(self.step, error, batches)
            raise

    def seed(self, number: int) -> None:
        """Let the random numbers of a batch depend on its number in the step, whichever process it is given to."""
        torch.manual_seed(seed_for(self.settings.seed, self.step, number * self.among.size + self.among.rank))

    def due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def finish(self) -> None:
        """Save, then validate and draw unless the last step did: those can be repeated, the training cannot."""
        self.monitor.read()
        validated = self.metrics is not None and self.metrics.ended
        drawn = self.had_finished and self.picture().exists()
        # Of which the first process alone knows.
        first = self.among.rank == 0
        unsaved, unvalidated, undrawn = self.among.any(
            first and self.step != self.saved, first and not validated, first and not drawn
        )
        if unsaved:
            self.save()
        if not self.due(self.validate_every) and unvalidated:
            self.validate((self.step - 1) // self.per_epoch)
        if self.settings.image_every is not None and not self.due(self.settings.image_every) and undrawn:
            self.draw()
        if not self.had_finished or not (self.out / run_directory.PLOT).exists():
            self.plot()

    def plot(self) -> None:
        """Draw the curves of what was recorded."""
        if self.metrics is not None:
            plot(self.out, self.stage.shown)
            self.plotted = time.monotonic()

    def record(self, epoch: int, split: str, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, epoch, split, values)
            if self.events is not None:
                self.events.write(self.step, split, values)
            self.bar.set_postfix(
                {name: f"{values[name]:.4g}" for name in self.stage.shown if name in values}, refresh=False
            )

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[bool]:
        """Evaluation mode without gradients, in the precision of the training and as after its last step.

        With averages of the weights, it is these that are evaluated. True on the first process, which alone evaluates;
        the others wait for it in the next step.
        """
        device, low = self.among.device.type, self.settings.precision == "bfloat16"
        with (
            torch.no_grad(), self.parallel.whole(self.averages) as here,
            torch.autocast(device, torch.bfloat16, enabled=low),
        ):  # fmt: skip
            self.stage.model.eval()
            self.stage.model.global_step = max(self.step - 1, 0)
            yield here

    def validate(self, epoch: int) -> None:
        """Validate and record the values."""
        if self.validation is None or not len(self.validation):
            return
        with self.evaluating() as here:
            if not here:
                return
            torch.manual_seed(seed_for(self.settings.seed, "validate"))
            values = self.stage.validate(validation_batches(self.validation, self.settings, self.among))
        self.record(epoch, "validation", values)
        for hint in self.monitor.hints(values):
            self.bar.write(f"warning: {hint}", file=sys.stderr)

    def draw(self) -> None:
        """Write a picture of some validation images, always the same; of training images without a validation set."""
        with self.evaluating() as here:
            if not here:
                return
            shown = self.validation if self.validation is not None and len(self.validation) else self.training
            first = next(iter(validation_batches(shown, self.settings, self.among)))
            rows = self.stage.images({name: value[:IMAGES_SHOWN] for name, value in first.items()})
        if self.metrics is not None:
            self.metrics.check_place()
        save_rows(self.picture(), rows)

    def picture(self) -> Path:
        return self.out / run_directory.IMAGES / f"{self.step:08d}.png"

    def save(self) -> None:
        """Write a checkpoint, on the first process; the others give it the parts that it lacks."""
        self.monitor.read()
        averages = None if self.averages is None else self.averages.values
        state = self.parallel.gathered(run_directory.state_of(self.stage.model, self.stage.optimizers, averages))
        launches = self.among.each(choices.made())
        if self.metrics is None:
            return
        progress = {
            "step": self.step,
            "epoch": self.step // self.per_epoch,
            "batch": self.step % self.per_epoch,
            "seconds": self.seconds,
            "images": len(self.training),
            "processes": self.processes,
            "metrics_bytes": self.metrics.size(),
            "launches": launches,
        }
        run_directory.save(self.out, self.stage.model, self.stage.optimizers, progress, state)
        self.saved = self.step
        if time.monotonic() - self.plotted > BETWEEN_PLOTS:
            self.plot()
