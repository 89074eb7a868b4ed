"""The training loop: Adam on ordered pairs, checkpoints it can go on from exactly."""

import csv
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ulae_rt import __version__
from ulae_rt.conventions import FULL_SHAPE, FULL_SPACING_MM
from ulae_rt.errors import CheckpointError, TrainingError
from ulae_rt.imaging.grid import NORMALISATION
from ulae_rt.losses import Loss, registration_loss
from ulae_rt.model import Metadata, UlaeNet, save_checkpoint
from ulae_rt.model.checkpoint import METADATA_KEY, MODEL_KEY, PRECISIONS, read_torch
from ulae_rt.training.config import OptimiserConfig, TrainConfig
from ulae_rt.training.data import Pair, PairDataset, find_scans
from ulae_rt.training.validation import Validation, first_pairs, validate

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
WEIGHTS_FILE = "last.safetensors"
LOG_FILE = "log.csv"
_LOG_COLUMNS = (
    "step", "loss", "similarity", "smoothness", "folding", "lr", "seconds",
    "val_dice", "val_baseline", "val_folding_percent",
)  # fmt: skip
_LOG_EVERY = 10


def learning_rate(config: OptimiserConfig, step: int) -> float:
    """Linear warm-up, then constant or a half cosine to ``lr_final``; step counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_final is None:
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * progress)) / 2


class Trainer:
    """One run of a configuration on one device.

    Args:
        config: what to train, on what, how.
        resume: go on from the folder's checkpoint in place of starting anew.

    Raises:
        ConfigError: when the scans are not there.
        CheckpointError: when there is nothing to resume, it is damaged or of another configuration.
        TrainingError: when a new run would overwrite an earlier one.
    """

    def __init__(self, config: TrainConfig, *, resume: bool) -> None:
        self.config = config
        self.folder = config.output.folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.scans = find_scans(config.data.train)
        self.val_pairs = (
            first_pairs(find_scans(config.data.val), config.data.val_pairs)
            if config.data.val
            else []
        )
        torch.manual_seed(config.optimiser.seed)
        self.model = UlaeNet(**config.model.model_dump()).to(self.device)
        self.model.feature_dtype = PRECISIONS[config.optimiser.precision]
        self.model.metadata = self._metadata()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config.optimiser.lr)
        self.step = 0
        if resume:
            self._resume()
        elif (self.folder / STATE_FILE).exists():
            raise TrainingError(
                f"{self.folder} holds an earlier run", "add --resume, or give another output.folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Train to the last step; returns the last losses and validation.

        Raises:
            TrainingError: when a loss is NaN or Inf; the checkpoint before it is kept.
        """
        settings = self.config.optimiser
        dataset = PairDataset(
            self.scans, settings.steps, settings.seed, self.config.data.pool, self.config.augment
        )
        loader = DataLoader(
            dataset,
            batch_size=1,
            sampler=range(self.step, settings.steps),
            num_workers=self.config.data.workers,
        )
        report(
            f"{len(self.scans)} scans, {len(dataset.pairs)} ordered pairs, "
            f"step {self.step} to {settings.steps} on {self.device}"
        )
        bar = tqdm(
            total=settings.steps, initial=self.step, unit="step", disable=None, smoothing=0.05
        )
        result: dict[str, Any] = {"step": self.step}
        with _Log(self.folder, self.step) as log, bar:
            self.model.train()
            for pair in loader:
                started = time.perf_counter()
                loss = self._train_step(pair)
                seconds = time.perf_counter() - started
                self.step += 1
                bar.update()
                last = self.step == settings.steps
                validation = None
                if self.val_pairs and (last or self.step % self.config.output.validate_every == 0):
                    validation = validate(
                        self.model, self.val_pairs, self.config.data.pool, self.device
                    )
                if validation or last or self.step % _LOG_EVERY == 0:
                    result = self._row(loss, validation, seconds)
                    log.write(result)
                    bar.set_postfix(loss=f"{result['loss']:.4f}")
                if validation:
                    report(
                        f"step {self.step}: Dice {validation.dice:.4f} "
                        f"(no displacement {validation.baseline:.4f}), "
                        f"{validation.folding_percent:.2f} % of the brain folded"
                    )
                if last or self.step % self.config.output.checkpoint_every == 0:
                    self.save()
        return {**result, "weights": str(self.folder / WEIGHTS_FILE)}

    def _train_step(self, pair: Pair) -> Loss:
        settings = self.config.loss
        rate = learning_rate(self.config.optimiser, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        moving, fixed = pair.moving.to(self.device), pair.fixed.to(self.device)
        out = self.model(moving, fixed)
        loss = registration_loss(
            out.progressive[-1] if settings.progressive else out.moved,
            fixed,
            out.disp,
            windows=settings.windows,
            gamma=settings.gamma,
            smoothness=settings.smoothness,
            folding=settings.folding,
        )
        if not torch.isfinite(loss.total):
            self.save()
            raise TrainingError(
                f"step {self.step}: the loss of {pair.name[0]} is {float(loss.total.detach())}",
                f"look at these scans, or lower optimiser.lr; the state before this step is in "
                f"{self.folder / STATE_FILE}",
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.total.backward()
        self.optimiser.step()
        return Loss(*(part.detach() for part in loss))

    def _row(self, loss: Loss, validation: Validation | None, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": self.step,
            "loss": float(loss.total),
            "similarity": float(loss.similarity),
            "smoothness": float(loss.smoothness),
            "folding": float(loss.folding),
            "lr": self.optimiser.param_groups[0]["lr"],
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
                    "optimiser": self.optimiser.state_dict(),
                    "random": torch.get_rng_state(),
                },
                part,
            )
            part.replace(self.folder / STATE_FILE)
        finally:
            part.unlink(missing_ok=True)
        save_checkpoint(self.folder / WEIGHTS_FILE, self.model, self._metadata())

    def _resume(self) -> None:
        path = self.folder / STATE_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: nothing to resume", "start without --resume")
        state = read_torch(path)
        self._check_same_run(state["config"], path)
        self.model.load_state_dict(state[MODEL_KEY])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        self.step = state["step"]

    def _check_same_run(self, text: str, path: Path) -> None:
        before, now = TrainConfig.model_validate_json(text), self.config
        # Where files are and how often they are written may change between the two; what is
        # learned may not. More steps are allowed: that is what going on means.
        for section in ("model", "loss", "augment"):
            if getattr(before, section) != getattr(now, section):
                raise CheckpointError(
                    f"{path}: its [{section}] differs from this configuration's",
                    "resume with the configuration it was started with, or start anew",
                )
        if before.optimiser.model_copy(update={"steps": now.optimiser.steps}) != now.optimiser:
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
                "optimiser": self.config.optimiser.model_dump(),
                "scans": len(self.scans),
                "step": getattr(self, "step", 0),
            },
            versions={"ulae_rt": __version__, "torch": torch.__version__},
        )


class _Log:
    """CSV and TensorBoard; rows after the step a run goes on from are dropped first."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / LOG_FILE
        rows = []
        if step and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self.file = self.path.open("w", newline="", encoding="utf-8")
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
