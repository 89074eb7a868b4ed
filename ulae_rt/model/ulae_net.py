"""ULAE-net: uncoupled encoder, accumulative decoder, both published variants."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ulae_rt.conventions import SIZE_MULTIPLE
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import compose, resize_displacement, warp, warp_compose
from ulae_rt.model.blocks import (
    ConvBlock,
    FixedLevel,
    MovingBlock,
    as_features,
    conv3d,
)
from ulae_rt.model.metadata import Metadata

VARIANTS = ("paper", "release")
STEPS = 3
# A displacement of step i is predicted at 1 / _STEP_FACTORS[i] of the full resolution.
_STEP_FACTORS = (4, 2, 1)
_HEAD_STD = 1e-5


class Prediction(NamedTuple):
    """What registration needs: W = warp(M, Phi) and Phi."""

    moved: Tensor
    disp: Tensor


class RegistrationOutput(NamedTuple):
    """Everything a training step or an analysis may look at.

    Attributes:
        moved: W = warp(M, Phi), (B, 1, D, H, W).
        disp: Phi, (B, 3, D, H, W), voxels of the full grid.
        steps: phi_1, phi_2, phi_3 at full resolution; one entry without accumulation.
        accumulated: phi_1, Phi_2, Phi.
        progressive: M_1, M_2, M_3, each the warp of the one before.
    """

    moved: Tensor
    disp: Tensor
    steps: list[Tensor]
    accumulated: list[Tensor]
    progressive: list[Tensor]


class UncoupledEncoder(nn.Module):
    """A path for the fixed image, an ASPP path for the moving one, and their fusion at each level.

    Source: ULAE-net section 2.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        c, c2 = channels, 2 * channels
        widths = ((1, c), (c, c2), (c2, c2), (c2, c2))
        for level, (before, after) in enumerate(widths, start=1):
            self.add_module(f"fec{level}", ConvBlock(before, after, stride=2))
            self.add_module(f"mec{level}", MovingBlock(before, after, dilation=5 - level))
            self.add_module(f"fusion{level}", ConvBlock(2 * after, after))

    def fixed_levels(self, fixed: Tensor) -> list[FixedLevel]:
        """The fixed path's four levels, the same in every step."""
        levels = []
        x = fixed
        for level in range(1, 5):
            x = self.get_submodule(f"fec{level}")(x)
            levels.append(cast(MovingBlock, self.get_submodule(f"mec{level}")).fixed_level(x))
        return levels

    def forward(
        self, moving: Tensor, fixed: Tensor, fixed_levels: list[FixedLevel], finest: int
    ) -> dict[int, Tensor]:
        """Fused features of levels ``finest`` to 4 (a coarse step never reads the finer ones)."""
        fused = {}
        x = moving
        for level, fixed_level in enumerate(fixed_levels, start=1):
            x = self.get_submodule(f"mec{level}")(x, fixed_level)
            if level >= finest:
                both = torch.cat((x, fixed_level.features), dim=1)
                fused[level] = self.get_submodule(f"fusion{level}")(both)
        return fused


class CoupledEncoder(nn.Module):
    """The ablation's plain U-Net encoder: both images concatenated from the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c, c2 = channels, 2 * channels
        for level, (before, after) in enumerate(((2, c), (c, c2), (c2, c2), (c2, c2)), start=1):
            self.add_module(f"ec{level}", ConvBlock(before, after, stride=2))

    def fixed_levels(self, fixed: Tensor) -> list[FixedLevel]:
        """Nothing is shared between steps here."""
        return []

    def forward(
        self, moving: Tensor, fixed: Tensor, fixed_levels: list[FixedLevel], finest: int
    ) -> dict[int, Tensor]:
        """Features of levels ``finest`` to 4."""
        x = torch.cat((moving, fixed), dim=1)
        features = {}
        for level in range(1, 5):
            x = self.get_submodule(f"ec{level}")(x)
            features[level] = x
        return {level: x for level, x in features.items() if level >= finest}


class Decoder(nn.Module):
    """The blocks dc0 to dc6 that one step, or all of them, decode with.

    Args:
        channels: base width C.
        finest_step: the last step (1 to 3) that uses these blocks; dc2 exists from 2, dc3 from 3.
    """

    def __init__(self, channels: int, finest_step: int) -> None:
        super().__init__()
        c, c2 = channels, 2 * channels
        self.dc0 = ConvBlock(c2, c2)
        self.dc1 = ConvBlock(2 * c2, c2)
        if finest_step >= 2:
            self.dc2 = ConvBlock(2 * c2, c2)
        if finest_step >= 3:
            self.dc3 = ConvBlock(c2 + c, c2)
        self.dc4 = ConvBlock(c2, c2)
        self.dc5 = ConvBlock(c2, c)
        self.dc6 = ConvBlock(c + 2, c)

    def forward(self, fused: dict[int, Tensor], pair: Tensor, step: int) -> Tensor:
        """Features of step ``step`` (1 to 3) at the resolution of ``pair`` (B, 2, ...)."""
        x = self.dc0(fused[4])
        for level in range(1, step + 1):
            block = self.get_submodule(f"dc{level}")
            x = block(x, fused[4 - level])
        x = self.dc5(self.dc4(x))
        return self.dc6(x, pair)  # type: ignore[no-any-return]


class UlaeNet(nn.Module):
    """ULAE-net.

    Args:
        variant: ``paper`` (one decoder for all steps: 789,561 parameters at 16 channels) or
            ``release`` (a decoder a step: 1,109,241).
        channels: base width C.
        accumulate: False leaves only the finest step, once (the ablation's single pass).
        uncoupled: False puts a plain U-Net encoder in place of the two paths (ablation).

    Attributes:
        feature_dtype: type of everything between the images and the displacements, which stay in
            the type of the inputs as do the warps and the coarse heads. None: that type too.
        checkpointing: while gradients are recorded, keep only what goes in and out of each step and
            compute the rest again in the backward pass: the same gradients, less memory, more time.
        metadata: what the weights are for and where they come from.

    Source: ULAE-net sections 2.1 to 2.3; the released code's ULAE/ULAE.py at ac89ce5.
    """

    def __init__(
        self,
        variant: str = "paper",
        channels: int = 16,
        accumulate: bool = True,
        uncoupled: bool = True,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise UsageError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        if channels < 1:
            raise UsageError(f"channels is {channels}, expected a positive number")
        self.variant = variant
        self.channels = channels
        self.accumulate = accumulate
        self.uncoupled = uncoupled
        self.feature_dtype: torch.dtype | None = None
        self.checkpointing = False
        self.metadata = Metadata(variant, channels, accumulate, uncoupled)

        self.encoder = UncoupledEncoder(channels) if uncoupled else CoupledEncoder(channels)
        self.used_steps = tuple(range(1, STEPS + 1)) if accumulate else (STEPS,)
        owners = self.used_steps if variant == "release" else (STEPS,)
        self.decoders = nn.ModuleDict({str(s): Decoder(channels, s) for s in owners})
        self.heads = nn.ModuleDict(
            {str(s): nn.Conv3d(channels, 3, 3, padding=1) for s in self.used_steps}
        )
        for head in self.heads.values():
            weight = cast(nn.Conv3d, head).weight
            if weight.is_meta:  # has no numbers; torch would load its compiler to draw them
                continue
            nn.init.normal_(weight, 0.0, _HEAD_STD)
            nn.init.zeros_(cast(Tensor, cast(nn.Conv3d, head).bias))
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, moving: Tensor, fixed: Tensor) -> RegistrationOutput:
        """Register with every intermediate result, for training and analysis.

        Args:
            moving: (B, 1, D, H, W), intensities in [0, 1].
            fixed: the same shape.

        Returns:
            See :class:`RegistrationOutput`; everything at the inputs' size.

        Raises:
            ShapeError: for another rank or channel count, or shapes that differ.
        """
        crop, moving, fixed = self._padded(moving, fixed)
        steps, accumulated, progressive = self._accumulate(moving, fixed, full_steps=True)
        progressive.append(warp(progressive[-1] if progressive else moving, steps[-1]))
        moved = warp(moving, accumulated[-1])
        return RegistrationOutput(
            moved=crop(moved),
            disp=crop(accumulated[-1]),
            steps=[crop(x) for x in steps],
            accumulated=[crop(x) for x in accumulated],
            progressive=[crop(x) for x in progressive],
        )

    def predict(self, moving: Tensor, fixed: Tensor) -> Prediction:
        """Register: the same arithmetic as :meth:`forward`, and only its first two results."""
        crop, moving, fixed = self._padded(moving, fixed)
        disp = self._accumulate(moving, fixed, full_steps=False)[1][-1]
        return Prediction(crop(warp(moving, disp)), crop(disp))

    def displacement(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Register: the displacement of :meth:`predict`, and no moved image."""
        crop, moving, fixed = self._padded(moving, fixed)
        return crop(self._accumulate(moving, fixed, full_steps=False)[1][-1])

    def _accumulate(
        self, moving: Tensor, fixed: Tensor, *, full_steps: bool
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Eq. 2: the steps, what they accumulate to, and the images all but the last step made.

        Without ``full_steps`` a step may be left at its own resolution: what it is composed with
        then brings it to the full grid on the fly.
        """
        dtype = self.feature_dtype or moving.dtype
        pooled = {STEPS: as_features(fixed, dtype)}
        small = fixed
        for step in reversed(self.used_steps[:-1]):
            small = F.avg_pool3d(small, 2)
            pooled[step] = as_features(small, dtype)
        shared = _Shared(pooled, self.encoder.fixed_levels(pooled[STEPS]))
        steps: list[Tensor] = []
        accumulated: list[Tensor] = []
        progressive: list[Tensor] = []
        image = moving
        for index, step in enumerate(self.used_steps):
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing here is random; reading a generator's state would break a CUDA graph.
                phi = checkpoint(
                    self._step, step, image, shared, use_reentrant=False, preserve_rng_state=False
                )
            else:
                phi = self._step(step, image, shared)
            factor = _STEP_FACTORS[step - 1]
            if full_steps or not accumulated:  # the first is also what the second is composed with
                phi, factor = resize_displacement(phi, factor), 1
            last = index == len(self.used_steps) - 1
            if not accumulated:
                total = phi
                image = image if last else warp(image, phi)
            elif last:
                total = compose(accumulated[-1], phi)
            else:
                image, total = warp_compose(image, accumulated[-1], phi, factor)
            steps.append(phi)
            accumulated.append(total)
            if not last:
                progressive.append(image)
        return steps, accumulated, progressive

    def _step(self, step: int, moving: Tensor, shared: "_Shared") -> Tensor:
        """One displacement at its step's resolution, in the type of the inputs."""
        fixed = shared.pooled[STEPS]
        image = as_features(moving, fixed.dtype)
        fused = self.encoder(image, fixed, shared.levels, finest=4 - step)
        small = moving
        for _ in range(STEPS - step):
            small = F.avg_pool3d(small, 2)
        small = image if step == STEPS else as_features(small, fixed.dtype)
        pair = as_features(torch.cat((small, shared.pooled[step]), dim=1), fixed.dtype)
        decoder = self.decoders[str(step) if self.variant == "release" else str(STEPS)]
        features = decoder(fused, pair, step)
        # A coarse displacement is multiplied and moves many voxels, so half precision would show;
        # the finest adds a voxel or two, and its rounding is lost in that of its features.
        if step != STEPS:
            features = features.to(moving.dtype)
        head = cast(nn.Conv3d, self.heads[str(step)])
        disp = conv3d(features, head.weight, head.bias, padding=1)
        # Three channels gain nothing from channels_last, and resizing them takes twice as long.
        return disp.to(dtype=moving.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    def _padded(moving: Tensor, fixed: Tensor) -> tuple["_Crop", Tensor, Tensor]:
        for name, image in (("moving", moving), ("fixed", fixed)):
            if not isinstance(image, Tensor) or not image.is_floating_point():
                given = image.dtype if isinstance(image, Tensor) else type(image).__name__
                raise DtypeError(
                    f"{name} is {given}, expected a tensor of a floating type",
                    "give torch.from_numpy(array).float(); for scans, use ulae_rt.Registrar",
                )
        if moving.ndim != 5 or moving.shape[1] != 1:
            raise ShapeError(
                f"moving has shape {tuple(moving.shape)}, expected (B, 1, D, H, W)",
                "one grey-value channel; add the batch and channel axes",
            )
        if moving.shape != fixed.shape:
            raise ShapeError(
                f"fixed has shape {tuple(fixed.shape)}, expected {tuple(moving.shape)} as moving",
                "resample both to one grid first",
            )
        crop = _Crop(tuple(moving.shape[2:]))
        return crop, crop.pad(moving), crop.pad(fixed)


class _Shared(NamedTuple):
    """What the steps have in common.

    Attributes:
        pooled: step to the fixed image as features, at the resolution of the step.
        levels: of the encoder's fixed path.
    """

    pooled: dict[int, Tensor]
    levels: list[FixedLevel]


class _Crop:
    """Zero padding of a volume to the network's size multiple, and its undoing."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        excess = [-size % SIZE_MULTIPLE for size in sizes]
        self.before = [e // 2 for e in excess]
        self.after = [e - e // 2 for e in excess]

    def pad(self, x: Tensor) -> Tensor:
        amounts = [a for pair in zip(self.before, self.after, strict=True) for a in pair]
        # F.pad lists the last axis first.
        pairs = [amounts[i : i + 2] for i in (4, 2, 0)]
        return F.pad(x, [a for pair in pairs for a in pair]) if any(amounts) else x

    def __call__(self, x: Tensor) -> Tensor:
        for axis, (start, size) in enumerate(zip(self.before, self.sizes, strict=True), start=2):
            if x.shape[axis] != size:
                x = x.narrow(axis, start, size)
        return x
