"""The training loop: Adam on ordered pairs, checkpoints it can go on from exactly."""

import csv
import errno
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ulae_rt import __version__
from ulae_rt.conventions import FULL_SHAPE, FULL_SPACING_MM
from ulae_rt.errors import CheckpointError, ConfigError, OutputError, TrainingError, UlaeError
from ulae_rt.files import locked_run
from ulae_rt.imaging.preprocess import NORMALISATION
from ulae_rt.losses import Loss
from ulae_rt.manifest import sha256
from ulae_rt.model import Metadata, UlaeNet, load_model, save_checkpoint
from ulae_rt.model.checkpoint import METADATA_KEY, MODEL_KEY, PRECISIONS, read_torch
from ulae_rt.training.config import OptimiserConfig, TrainConfig
from ulae_rt.training.data import (
    Batch,
    PairDataset,
    check_prepared,
    find_scans,
    load_batches,
    worker_count,
)
from ulae_rt.training.processes import Processes
from ulae_rt.training.step import Outcome, Step
from ulae_rt.training.validation import Validation, first_pairs, validate

STATE_FILE = "state.pt"
WEIGHTS_FILE = "last.safetensors"
LOG_FILE = "log.csv"
_LOG_COLUMNS = (
    "step", "loss", "similarity", "smoothness", "folding", "labels", "lr", "seconds",
    "val_dice", "val_baseline", "val_folding_percent",
)  # fmt: skip
_LOG_EVERY = 10
# Steps between two looks at the clock, where the run has minutes: processes wait for each other.
_LOOK_EVERY = 5


def learning_rate(config: OptimiserConfig, step: int) -> float:
    """Linear warm-up, then constant or a half cosine to ``lr_final``; step counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_final is None:
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * progress)) / 2


class StoppedElsewhere(Exception):
    """The run has ended in all its processes, and the first one says why."""


_RESUME = "add --resume to go on with it, or give another output.folder"


class Trainer:
    """One run of a configuration, on one device or on one of several that torchrun has started.

    Args:
        config: what to train, on what, how.
        resume: go on from the folder's checkpoint in place of starting anew.

    Raises:
        BackendUnavailable: for a GPU that is not there.
        ConfigError: when the scans are not there, or the run does not fit the machine.
        CheckpointError: when there is nothing to resume, it is damaged or of another configuration.
        TrainingError: when a new run would overwrite an earlier one.
    """

    def __init__(self, config: TrainConfig, *, resume: bool) -> None:
        self.config = config
        self.folder = config.output.folder
        self.scans = find_scans(config.data.train)
        check_prepared(self.scans)
        validation_scans = find_scans(config.data.val) if config.data.val else []
        if validation_scans:
            check_prepared(validation_scans)
        self.val_pairs = first_pairs(validation_scans, config.data.val_pairs)
        self.processes = Processes(config.run.device)
        torch.manual_seed(config.optimiser.seed)
        self.start_sha256: str | None = None
        model = UlaeNet(**config.model.model_dump()) if resume else self._first_model()
        self.model = model.to(self.processes.device)
        self.model.feature_dtype = PRECISIONS[config.optimiser.precision]
        self.model.metadata = self._metadata()
        self.take_step = Step(self.model, config, self.processes)
        self.step = 0
        self._state_before = self._state_stamp()
        if resume:
            self._resume()
        elif (self.folder / STATE_FILE).exists():
            raise TrainingError(f"{self.folder} holds an earlier run", _RESUME)

    def run(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Train to the last step; returns the last losses and validation.

        Only the first process of several reports, validates and writes.

        Raises:
            TrainingError: when a loss or a gradient is NaN or Inf; the state before that step is
                kept.
            OutputError: another run is writing to the folder, or it cannot be written to.
            StoppedElsewhere: the same, in every process but the first, which says why.
        """
        with ExitStack() as held:
            self._hold_folder(held)
            return self._run(report)

    def _hold_folder(self, held: ExitStack) -> None:
        """Keep other runs out of the folder, and see that none has written to it meanwhile."""
        problem: UlaeError | None = None
        if self.processes.first:
            try:
                held.enter_context(locked_run(self.folder))
                if self._state_stamp() != self._state_before:
                    raise TrainingError(
                        f"another run has written to {self.folder} since this one was started",
                        _RESUME,
                    )
            except UlaeError as error:
                problem = error
        if self.processes.collect([str(problem)] if problem else []):
            self.processes.leave()
            raise problem or StoppedElsewhere

    def _state_stamp(self) -> tuple[int, int, int] | None:
        """Which file the folder's state is; None where there is none."""
        try:
            status = (self.folder / STATE_FILE).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _run(self, report: Callable[[str], None]) -> dict[str, Any]:
        settings, output = self.config.optimiser, self.config.output
        first, minutes = self.processes.first, self.config.run.minutes
        steps = self._steps()
        if first:
            report(self._announcement())
        bar = tqdm(
            total=settings.steps,
            initial=self.step,
            unit="step",
            disable=None if first else True,
            smoothing=0.05,
        )
        result: dict[str, Any] = {"step": self.step}
        with _Log(self.folder, self.step) if first else nullcontext() as log, bar:
            self.model.train()
            unconfirmed: Outcome | None = None
            logged, since = self.step, time.perf_counter()
            ends = math.inf if minutes is None else time.monotonic() + 60 * minutes
            for batches in steps:
                rate = learning_rate(settings, self.step)
                outcome = self.take_step(self.step, batches, rate)
                # This step is on its way before the host waits for the one before it.
                if unconfirmed:
                    self._confirm(unconfirmed)
                unconfirmed = outcome
                self.step += 1
                bar.update()
                last = self.step == settings.steps
                over = minutes is not None and not last and self._time_is_over(ends)
                validates = bool(self.val_pairs) and (
                    last or self.step % output.validate_every == 0
                )
                saves = last or over or self.step % output.checkpoint_every == 0
                if not (validates or saves or self.step % _LOG_EVERY == 0):
                    continue
                losses = self._confirm(outcome)
                unconfirmed = None
                if log is None:
                    if over:
                        break
                    continue
                seconds = (time.perf_counter() - since) / (self.step - logged)
                validation = None
                if validates:
                    validation = validate(
                        self.model, self.val_pairs, self.config.data.pool, self.processes.device
                    )
                    report(
                        f"step {self.step}: Dice {validation.dice:.4f} "
                        f"(no displacement {validation.baseline:.4f}), "
                        f"{validation.folding_percent:.2f} % of the brain folded"
                    )
                if validates or last or over or self.step % _LOG_EVERY == 0:
                    result = self._row(losses, validation, rate, seconds)
                    log.write(result)
                    bar.set_postfix(loss=f"{result['loss']:.4f}")
                if saves:
                    self.save()
                if over:
                    report(f"stopped at step {self.step}, after {minutes:g} min; --resume goes on")
                    break
                logged, since = self.step, time.perf_counter()
        self.processes.leave()
        return {**result, "weights": str(self.folder / WEIGHTS_FILE)}

    def _time_is_over(self, ends: float) -> bool:
        """By the first process's clock, so that all processes stop at one step."""
        if self.step % _LOOK_EVERY:
            return False
        is_over = self.processes.first and time.monotonic() >= ends
        return bool(self.processes.collect(["over"] if is_over else []))

    def _first_model(self) -> UlaeNet:
        """The network as the first step finds it.

        Raises:
            CheckpointError: for weights to begin with that cannot be read.
            ConfigError: when they are of another network.
        """
        settings, start = self.config.model.model_dump(), self.config.optimiser.start
        if start is None:
            return UlaeNet(**settings)
        model = load_model(start).train()
        for name, value in settings.items():
            found = getattr(model.metadata, name)
            if found != value:
                raise ConfigError(
                    f"{start}: its {name} is {found}, and model.{name} is {value}",
                    "give them the same, or other weights as optimiser.start",
                )
        self.start_sha256 = sha256(start.read_bytes())
        return model

    def _announcement(self) -> str:
        size = self.processes.size
        return (
            f"{len(self.scans)} scans, {len(self.scans) * (len(self.scans) - 1)} ordered pairs, "
            f"step {self.step} to {self.config.optimiser.steps} on "
            f"{self.processes.device}{f' and {size - 1} more' if size > 1 else ''}"
        )

    def _steps(self) -> Iterator[list[Batch]]:
        """This process's micro-batches of every step that is left."""
        config, processes = self.config, self.processes
        batch = config.optimiser.batch
        share = batch // processes.size
        length = config.optimiser.steps * batch
        dataset = PairDataset(
            self.scans,
            config.optimiser.seed,
            config.data.pool,
            config.augment,
            labelled=config.loss.labels > 0,
        )
        start = processes.rank * share
        batches = load_batches(
            dataset,
            (
                step + position
                for step in range(self.step * batch, length, batch)
                for position in range(start, start + share)
            ),
            config.run.micro_batch,
            worker_count(config.data.workers, processes.device, processes.size),
            processes.device,
        )
        while own := list(islice(batches, share // config.run.micro_batch)):
            yield own

    def _confirm(self, outcome: Outcome) -> Loss:
        """The losses of a step, or the end of the run when it was not applied."""
        losses = outcome.losses()
        if losses is not None:
            return losses
        # All processes see the same sums, so that all of them get here.
        reasons = self.processes.collect(self.take_step.not_finite(outcome.batches))
        names = self.processes.collect([name for b in outcome.batches for name in b.names])
        self.step = outcome.step
        if self.processes.first:
            self.save()
        self.processes.leave()
        if not self.processes.first:
            raise StoppedElsewhere
        what = "; ".join(reasons) or f"the gradient of {', '.join(names)} is not finite"
        raise TrainingError(
            f"step {self.step}: {what}",
            "mend these scans and add --resume, which goes on before this step; or lower "
            "optimiser.lr, in another output.folder with optimiser.start = "
            f"{self.folder / STATE_FILE}",
        )

    def _row(
        self, loss: Loss, validation: Validation | None, rate: float, seconds: float
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": self.step,
            "loss": float(loss.total),
            "similarity": float(loss.similarity),
            "smoothness": float(loss.smoothness),
            "folding": float(loss.folding),
            "labels": float(loss.labels),
            "lr": rate,
            "seconds": seconds,
        }
        if validation:
            row |= {
                "val_dice": validation.dice,
                "val_baseline": validation.baseline,
                "val_folding_percent": validation.folding_percent,
            }
        return row

    def save(self) -> None:
        """Write the state to resume from and the weights to use, each whole or not at all."""
        part = self.folder / f".{STATE_FILE}.part"
        try:
            torch.save(
                {
                    "config": self.config.model_dump_json(),
                    "step": self.step,
                    METADATA_KEY: self._metadata().to_json(),
                    MODEL_KEY: self.model.state_dict(),
                    "optimiser": self.take_step.optimiser.state_dict(),
                    "random": torch.get_rng_state(),
                },
                part,
            )
            part.replace(self.folder / STATE_FILE)
        except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
            if isinstance(error, OSError) or "write" in str(error):
                raise _not_written(self.folder / STATE_FILE, error) from None
            raise
        finally:
            part.unlink(missing_ok=True)
        save_checkpoint(self.folder / WEIGHTS_FILE, self.model, self._metadata())

    def _resume(self) -> None:
        path = self.folder / STATE_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: nothing to resume", "start without --resume")
        state = read_torch(path)
        try:
            self._check_same_run(state["config"], path)
            self.model.load_state_dict(state[MODEL_KEY])
            # Its settings are the configuration's and the device's, not the file's.
            optimiser = self.take_step.optimiser
            moments = state["optimiser"]["state"]
            optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
            torch.set_rng_state(state["random"])
            self.step = int(state["step"])
        except UlaeError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path}: is no state of a training run: {reason}",
                "give the output.folder of a run; weights alone go into optimiser.start",
            ) from None
        if self.step >= self.config.optimiser.steps:
            raise CheckpointError(
                f"{path}: has done {self.step} steps, and optimiser.steps is "
                f"{self.config.optimiser.steps}: nothing is left to do",
                "set more steps: --set optimiser.steps=N",
            )
        self.start_sha256 = Metadata.from_json(state[METADATA_KEY], str(path)).recipe.get("start")

    def _check_same_run(self, text: str, path: Path) -> None:
        before, now = TrainConfig.model_validate_json(text), self.config
        # Where files are, how often they are written and what runs how may change between the
        # two; what is learned may not. More steps are allowed: that is what going on means.
        for section in ("model", "loss", "augment"):
            if getattr(before, section) != getattr(now, section):
                raise CheckpointError(
                    f"{path}: its [{section}] differs from this configuration's",
                    "resume with the configuration it was started with, or start anew",
                )
        settings = now.optimiser
        allowed = {"steps": settings.steps, "start": settings.start}
        if before.optimiser.model_copy(update=allowed) != settings:
            raise CheckpointError(
                f"{path}: its [optimiser] differs from this configuration's",
                "only optimiser.steps may change on --resume",
            )

    def _metadata(self) -> Metadata:
        pool = self.config.data.pool
        depth, height, width = (size // pool for size in FULL_SHAPE)
        return Metadata(
            **self.config.model.model_dump(),
            shape=(depth, height, width),
            spacing_mm=FULL_SPACING_MM * pool,
            normalisation=NORMALISATION,
            training_data=self.config.data.description,
            licence=self.config.data.licence,
            recipe={
                "loss": self.config.loss.model_dump(),
                "augment": self.config.augment.model_dump(),
                "optimiser": self.config.optimiser.model_dump(exclude={"start"}),
                "start": self.start_sha256,
                "scans": len(self.scans),
                "step": getattr(self, "step", 0),
            },
            versions={"ulae_rt": __version__, "torch": torch.__version__},
        )


def _not_written(path: Path, error: Exception) -> OutputError:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path} cannot be written: the disk is full", "free some of it")
    reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
    return OutputError(f"{path} cannot be written: {reason}", "check space and permissions")


class _Log:
    """CSV and TensorBoard; rows after the step a run goes on from are dropped first."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / LOG_FILE
        rows = []
        if step and self.path.is_file():
            try:
                with self.path.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file, strict=True)
                    rows = [row for row in reader if int(row["step"]) <= step]
                if any(row.keys() - set(_LOG_COLUMNS) or None in row.values() for row in rows):
                    raise ValueError("other columns")
            except (OSError, ValueError, TypeError, LookupError, csv.Error) as error:
                raise CheckpointError(
                    f"{self.path}: is no log of this run: {error}",
                    "move it away: a new one begins at this step",
                ) from None
        try:
            self.file = self.path.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise _not_written(self.path, error) from None
        self.writer = csv.DictWriter(self.file, _LOG_COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.board.close()

    def write(self, row: dict[str, Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()
        for key, value in row.items():
            if key != "step":
                self.board.add_scalar(key, value, row["step"])
