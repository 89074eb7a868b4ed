"""One optimiser step on one device, launched without waiting for it."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ulae_rt.convolutions import exact_convolutions
from ulae_rt.errors import BackendUnavailable, ConfigError, TrainingError
from ulae_rt.losses import Labels, Loss, registration_loss
from ulae_rt.model import UlaeNet
from ulae_rt.model.ulae_net import Prediction, RegistrationOutput
from ulae_rt.training.config import TrainConfig
from ulae_rt.training.data import Batch
from ulae_rt.training.processes import Processes

logger = logging.getLogger(__name__)

_PARTS = len(Loss._fields)
_WARM_UPS = 3


class Outcome:
    """The losses of a step, on their way to the host.

    Args:
        step: which; counts from 0.
        batches: what it learned from.
        values: the mean losses and 1 if it was not applied, on the device.
    """

    def __init__(self, step: int, batches: list[Batch], values: Tensor) -> None:
        self.step = step
        self.batches = batches
        self._ready: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._values = values

    def losses(self) -> Loss | None:
        """Means over all pairs of the step; None when it was not applied. Waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        *parts, refused = self._values.unbind()
        return None if refused else Loss(*parts)


class Step:
    """Forward, loss, backward and update, for a whole optimiser step.

    Gradients and losses are one flat tensor, of which each parameter's ``grad`` is a view. So a
    step's share of every process is summed by one all-reduce, a CUDA graph finds the gradients
    where it left them, and one look tells whether all are finite. DistributedDataParallel would
    sum while the backward still runs; for a network of 4 MB that saves nothing, and it would have
    to be told about micro-batches and captured graphs.

    Nothing waits for the device. A step whose losses or gradients are not all finite is not
    applied, on the device: the optimiser then leaves parameters, moments and count as they are
    (what torch's gradient scaler uses), and does so ever after. The host may look later and still
    finds the state before that step.

    Args:
        model: on the processes' device; its ``checkpointing`` is set here.
        config: what to train and how to run it.
        processes: who else takes part.

    Raises:
        ConfigError: for a batch that cannot be shared out, or a CUDA graph without CUDA.

    The first call may raise BackendUnavailable, where torch.compile does not work, and any call
    TrainingError, when memory does not suffice or another process is gone.
    """

    def __init__(self, model: UlaeNet, config: TrainConfig, processes: Processes) -> None:
        self.model = model
        self.config = config
        self.processes = processes
        self.device = processes.device
        batch, micro = config.optimiser.batch, config.run.micro_batch
        if batch % (processes.size * micro):
            raise ConfigError(
                f"optimiser.batch is {batch}, expected a multiple of {processes.size * micro}: "
                f"{processes.size} process(es) with run.micro_batch = {micro}",
                "change run.micro_batch or the number of processes",
            )
        if config.run.cuda_graph and self.device.type != "cuda":
            raise ConfigError(
                f"run.cuda_graph needs a CUDA device, and the run is on {self.device}",
                "set run.cuda_graph = false",
            )
        self.share = micro / batch
        model.checkpointing = config.run.activation_checkpointing == "on"
        self._network = self._entry()
        if config.run.compile:
            self._network = torch.compile(self._network, dynamic=False)
        self._graph: _Graph | None = None

        # All processes are seeded alike and apply the same sums: none has to send its weights.
        parameters = list(model.parameters())
        sizes = [p.numel() for p in parameters]
        self._sums = torch.zeros(sum(sizes) + _PARTS, device=self.device)
        *views, self._losses = self._sums.split([*sizes, _PARTS])
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view.as_strided(parameter.shape, parameter.stride())
        self._refused = torch.zeros((), device=self.device)
        self.optimiser = torch.optim.Adam(parameters, lr=config.optimiser.lr, fused=True)
        self.optimiser.found_inf = self._refused  # type: ignore[attr-defined]

    def __call__(self, step: int, batches: list[Batch], rate: float) -> Outcome:
        """Launch step ``step`` on this process's micro-batches, with the learning rate ``rate``."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with exact_convolutions():
            self._add_gradients(batches)
        self.processes.add_up(self._sums)
        finite = self._sums.isfinite().all()
        torch.maximum(self._refused, finite.logical_not().float(), out=self._refused)
        self.optimiser.step()
        return Outcome(step, batches, torch.cat((self._losses, self._refused[None])))

    @torch.no_grad()
    def not_finite(self, batches: list[Batch]) -> list[str]:
        """What is NaN or Inf about these pairs with the present weights, pair by pair."""
        found = []
        for batch in batches:
            moving, fixed = batch.augmented(self.device)
            labels = batch.augmented_labels(self.device)
            for i, name in enumerate(batch.names):
                own = slice(i, i + 1)
                maps = labels and Labels(labels.moving[own], labels.fixed[own], labels.number)
                with exact_convolutions():
                    total = float(self._loss(self._entry(), moving[own], fixed[own], maps).total)
                if not math.isfinite(total):
                    found.append(f"the loss of {name} is {total}")
        return found

    def _add_gradients(self, batches: list[Batch]) -> None:
        """This process's part of the mean gradient and losses, into the flat tensor."""
        while True:
            try:
                self._sums.zero_()
                for batch in batches:
                    labels = batch.augmented_labels(self.device)
                    self._add_micro_batch(*batch.augmented(self.device), labels)
                return
            except torch.OutOfMemoryError as error:
                if self.model.checkpointing or self.config.run.activation_checkpointing == "off":
                    raise TrainingError(
                        f"{self.device} has too little memory for {self.config.run.micro_batch} "
                        f"pair(s) at once with activation checkpointing "
                        f"{'on' if self.model.checkpointing else 'off'}",
                        "lower run.micro_batch where it is above 1, or set "
                        "run.activation_checkpointing = 'on', optimiser.precision = 'bf16' or "
                        "data.pool = 2",
                    ) from error
            except RuntimeError as error:
                if self.config.run.compile and isinstance(
                    error, torch._dynamo.exc.BackendCompilerFailed
                ):
                    raise BackendUnavailable(
                        f"torch.compile failed: {str(error.inner_exception).splitlines()[0]}",
                        "set run.compile = false, or install what it needs: on a CPU a C++ "
                        "compiler, on a GPU triton",
                    ) from error
                raise
            # Out here the failed attempt's tensors are gone: its traceback held them.
            logger.warning("%s ran out of memory: activation checkpointing is on now", self.device)
            self.model.checkpointing = True
            self._graph = None
            torch.cuda.empty_cache()

    def _add_micro_batch(self, moving: Tensor, fixed: Tensor, labels: Labels | None) -> None:
        if not self.config.run.cuda_graph:
            self._differentiate(moving, fixed, labels)
            return
        if self._graph is None:
            before = self._sums.clone()
            self._graph = _Graph(self._differentiate, moving, fixed, labels)
            self._sums.copy_(before)
        self._graph(moving, fixed, labels)

    def _differentiate(self, moving: Tensor, fixed: Tensor, labels: Labels | None) -> None:
        loss = self._loss(self._network, moving, fixed, labels)
        (loss.total * self.share).backward()
        self._losses.add_(torch.stack(loss).detach(), alpha=self.share)

    def _entry(self) -> Callable[..., Prediction | RegistrationOutput]:
        """The network's cheaper one, where the loss can do without M_3."""
        return self.model.forward if self.config.loss.progressive else self.model.predict

    def _loss(
        self,
        network: Callable[..., Prediction | RegistrationOutput],
        moving: Tensor,
        fixed: Tensor,
        labels: Labels | None,
    ) -> Loss:
        settings = self.config.loss
        out = network(moving, fixed)
        return registration_loss(
            out.progressive[-1] if isinstance(out, RegistrationOutput) else out.moved,
            fixed,
            out.disp,
            windows=settings.windows,
            gamma=settings.gamma,
            smoothness=settings.smoothness,
            folding=settings.folding,
            labels=labels,
            label_weight=settings.labels,
        )


class _Graph:
    """A function of images and labels, recorded once as a CUDA graph and then replayed.

    Args:
        function: leaves its results in tensors that stay where they are; is called a few times.
        moving, fixed, labels: what every later call's arguments look like.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Labels | None], None],
        moving: Tensor,
        fixed: Tensor,
        labels: Labels | None,
    ) -> None:
        self.moving, self.fixed = moving.clone(), fixed.clone()
        self.labels = labels and Labels(labels.moving.clone(), labels.fixed.clone(), labels.number)
        # What happens once (choosing algorithms, compiling, reserving workspaces) must be over
        # when the recording starts, and be done on a stream that is not the default one.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                function(self.moving, self.fixed, self.labels)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, the one that pins batches and NCCL's, go on calling CUDA meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            function(self.moving, self.fixed, self.labels)

    def __call__(self, moving: Tensor, fixed: Tensor, labels: Labels | None) -> None:
        """Replay with these arguments."""
        self.moving.copy_(moving)
        self.fixed.copy_(fixed)
        if self.labels and labels:
            self.labels.moving.copy_(labels.moving)
            self.labels.fixed.copy_(labels.fixed)
        self.graph.replay()
