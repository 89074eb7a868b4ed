"""The device a training process works on, and the other processes that torchrun started."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ulae_rt.errors import BackendUnavailable, ConfigError, TrainingError

# The first process validates while the others wait for it in the next step's sum. It is torchrun
# that stops them when a process dies, not this.
_PATIENCE = timedelta(hours=2)


class Processes:
    """The processes of one run: those torchrun started, or this one alone.

    Args:
        device: ``run.device`` of the configuration.

    Attributes:
        device: of this process.
        rank, size: which process this is, of how many.

    Raises:
        BackendUnavailable: for a GPU that is not there.
        ConfigError: for one GPU by number and several processes.
        TrainingError: when the others cannot be reached.
    """

    def __init__(self, device: str) -> None:
        launched = dist.is_available() and dist.is_torchelastic_launched()
        self.device = _device(device, dist.get_node_local_rank() if launched else 0)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.rank, self.size = 0, 1
        if not launched:
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        self._together(lambda: dist.init_process_group(backend, timeout=_PATIENCE))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1 and ":" in device:
            raise ConfigError(
                f"run.device is {device!r}, and torchrun started {self.size} processes",
                "set run.device to 'cuda': each takes the GPU of its local rank",
            )

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files, validates and reports."""
        return self.rank == 0

    def add_up(self, x: Tensor) -> None:
        """Sum over the processes, in place."""
        if self.size > 1:
            self._together(lambda: dist.all_reduce(x))

    def collect(self, names: list[str]) -> list[str]:
        """The lists of all processes as one, in the order of their ranks."""
        if self.size == 1:
            return names
        lists: list[list[str]] = [[] for _ in range(self.size)]
        self._together(lambda: dist.all_gather_object(lists, names))
        return [name for each in lists for name in each]

    def leave(self) -> None:
        """End the group, where every process gets to; one that fails just ends itself."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def _together(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} lost the others ({str(error).splitlines()[0]})",
                "the process that stopped first says why",
            ) from error


def _device(setting: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        setting = "cuda" if count else "cpu"
    device = torch.device(setting)
    if device.type == "cpu":
        return device
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise BackendUnavailable(
            f"run.device is {setting!r} and needs GPU {index}, torch sees {count} GPU(s)",
            "set run.device to 'cpu', start fewer processes, or see `ulae-rt doctor`",
        )
    return torch.device("cuda", index)
