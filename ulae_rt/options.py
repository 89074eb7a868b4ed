"""The flags that say which network registers, the same for every command that runs one."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ulae_rt.conventions import AFFINE_MODES, AffineMode
from ulae_rt.engines.folder import PRECISIONS
from ulae_rt.engines.folder import SUFFIXES as ENGINE_SUFFIXES
from ulae_rt.errors import EngineMismatch, UsageError
from ulae_rt.registration.network import BACKENDS

if TYPE_CHECKING:
    from ulae_rt.registration import Registrar


@dataclass(frozen=True)
class NetworkOptions:
    """What a `Registrar` is opened with; can be sent to another process.

    Attributes:
        source: weights, or an engine's folder or file; None: the weights that are shipped.
        device, backend, precision, affine, refine: see `Registrar`.
    """

    source: Path | None = None
    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    affine: AffineMode = "affine"
    refine: int = 0

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags."""
        network = parser.add_argument_group("network")
        source = network.add_mutually_exclusive_group()
        source.add_argument("--weights", type=Path, metavar="FILE", help="instead of those shipped")
        source.add_argument(
            "--engine",
            type=Path,
            metavar="DIR",
            help="exported engine: a folder, or one file of it",
        )
        network.add_argument(
            "--affine", choices=AFFINE_MODES, default="affine",
            help="alignment before it: none trusts the headers, com moves the centre (%(default)s)",
        )  # fmt: skip
        network.add_argument(
            "--refine", type=int, default=0, metavar="N",
            help="then improve each pair's displacement by itself, in N iterations (10: on two "
            "cores some 5 seconds more, more accurate, almost no folds) (%(default)s)",
        )  # fmt: skip
        network.add_argument("--backend", choices=BACKENDS, default="auto", help="(%(default)s)")
        network.add_argument(
            "--device", default="auto", metavar="auto|cpu|cuda[:N]", help="(%(default)s)"
        )
        network.add_argument(
            "--precision", choices=PRECISIONS, default="auto",
            help="auto: fp32 of weights, of an engine's folder the fastest (%(default)s)",
        )  # fmt: skip

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """Read the flags, and refuse at once what cannot be.

        Raises:
            UsageError: a device that does not exist.
            EngineMismatch: an engine that is none.
        """
        name, _, index = arguments.device.partition(":")
        if name not in ("auto", "cpu", "cuda") or (
            index and (name != "cuda" or not index.isdigit())
        ):
            raise UsageError(
                f"--device is {arguments.device!r}, expected auto, cpu or cuda[:N]",
                "give --device cpu, or leave it out to take the GPU where there is one",
            )
        if arguments.refine < 0:
            raise UsageError(
                f"--refine is {arguments.refine}, expected 0 or more iterations",
                "give --refine 10, or leave it out",
            )
        engine = arguments.engine
        # Here, because what load_network is given may be weights as well.
        if (
            engine is not None
            and not engine.is_dir()
            and engine.suffix.lower() not in ENGINE_SUFFIXES
        ):
            raise EngineMismatch(
                f"{engine} is no engine: expected a folder, or a file {', '.join(ENGINE_SUFFIXES)}",
                "make one with 'ulae-rt export' and give its folder; weights go to --weights",
            )
        return cls(
            engine or arguments.weights,
            arguments.device,
            arguments.backend,
            arguments.precision,
            arguments.affine,
            arguments.refine,
        )

    @property
    def on_gpu(self) -> bool:
        """Whether it uses a GPU where there is one."""
        return self.device != "cpu"

    def open(self) -> "Registrar":
        """Open the network.

        Raises:
            BackendUnavailable: torch is not installed.
        """
        from ulae_rt.registration import Registrar  # loads torch

        return Registrar(
            self.source,
            device=self.device,
            backend=self.backend,
            precision=self.precision,
            affine=self.affine,
            refine=self.refine,
        )
