"""One picture that shows whether a registration is good: three planes, before and after."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import OutputError, ShapeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

# Panels share one scale in pixels a millimetre, so that sizes compare across rows and columns.
PANEL = 290  # pixels of the longest in-plane extent
GAP, SIDE, TOP, BOTTOM = 14, 34, 44, 84
DPI = 100
# Embedded in a page beside others, a picture has to be small and its letters still legible.
JPEG_SCALE, JPEG_QUALITY = 0.72, 78

BACKGROUND, PANEL_GROUND, TEXT, QUIET = "#101216", "#000000", "#e8eaed", "#9aa0a6"
FOLD = "#ffe600"
FIXED_TINT, MOVING_TINT = (0.80, 0.96, 1.0), (1.0, 0.86, 0.66)
TILE_MM = 26.0
GRID_MM = 6.0
JACOBIAN_SPAN = (0.0, 2.0)  # the same in every picture, so that pictures compare
JACOBIAN_COLOURS = "RdBu_r"


@dataclass(frozen=True)
class Plane:
    """A slice of a RAS volume: the axis it is cut across, and its horizontal and vertical axes."""

    name: str
    across: int
    horizontal: int
    vertical: int
    letters: tuple[str, str, str, str]  # left, right, bottom, top


PLANES = (
    Plane("sagittal", 0, 1, 2, ("P", "A", "I", "S")),
    Plane("coronal", 1, 0, 2, ("L", "R", "I", "S")),
    Plane("axial", 2, 0, 1, ("L", "R", "P", "A")),
)

TITLES = (
    "fixed",
    "moving, affine only",
    "moved",
    "checkerboard before",
    "checkerboard after",
    "deformed grid",
    "Jacobian determinant",
)


class Registered(TypedDict):
    """What the picture shows; everything lies on the fixed image's grid.

    Attributes:
        fixed: (X, Y, Z), the fixed image.
        before: (X, Y, Z), the moving image carried by the affine transform alone.
        after: (X, Y, Z), the moving image carried by the whole transform.
        disp: (X, Y, Z, 3), RAS millimetres, the network's part of the displacement, pull-back.
        jacobian: (X, Y, Z), determinant of the whole transform; 0 and below is folded.
        affine: (4, 4), voxel to RAS millimetres of the fixed grid.
    """

    fixed: Array
    before: Array
    after: Array
    disp: Array
    jacobian: Array
    affine: Array


def qc_figure(
    path: str | os.PathLike[str], *, caption: str, **registered: Unpack[Registered]
) -> None:
    """Write the picture of one registration as a PNG file.

    Rows: sagittal, coronal and axial through the centre of the brain, left shown on the left.
    Columns: fixed, moving through the affine only, moved, checkerboards before and after, the
    deformed grid and the Jacobian determinant with folded voxels marked. Any orientation and
    spacing.

    Args:
        path: where the PNG goes; appears complete or not at all.
        caption: one line with the numbers of this registration.
        **registered: see `Registered`.

    Raises:
        ShapeError: if an array does not lie on the fixed grid.
        OutputError: if the file cannot be written.
    """
    figure = _figure(caption, registered)
    with _whole_file(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor=BACKGROUND)


def qc_jpeg(*, caption: str, **registered: Unpack[Registered]) -> bytes:
    """The picture of `qc_figure` at `JPEG_SCALE` of its size, as a JPEG file to embed.

    Args:
        caption: as for `qc_figure`.
        **registered: see `Registered`.

    Raises:
        ShapeError: if an array does not lie on the fixed grid.
    """
    figure = _figure(caption, registered)
    file = io.BytesIO()
    figure.savefig(
        file,
        format="jpeg",
        dpi=JPEG_SCALE * DPI,
        facecolor=BACKGROUND,
        pil_kwargs={"quality": JPEG_QUALITY, "optimize": True},
    )
    return file.getvalue()


def _figure(caption: str, registered: Registered) -> "Figure":
    fixed, disp = registered["fixed"], registered["disp"]
    volumes = {
        "before": registered["before"],
        "after": registered["after"],
        "jacobian": registered["jacobian"],
    }
    for name, volume in volumes.items():
        if volume.shape != fixed.shape or fixed.ndim != 3:
            raise ShapeError(f"{name} has shape {volume.shape}, expected {fixed.shape} as fixed")
    if disp.shape != (*fixed.shape, 3):
        raise ShapeError(f"disp has shape {disp.shape}, expected {(*fixed.shape, 3)}")
    return _draw(_Views(**registered), caption)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}", "check space and permissions"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


class _Views:
    """The volumes turned to RAS and windowed, and the slices of them that are drawn."""

    def __init__(
        self,
        fixed: Array,
        before: Array,
        after: Array,
        disp: Array,
        jacobian: Array,
        affine: Array,
    ) -> None:
        turn = nib.orientations.io_orientation(affine)
        fixed, before, after, disp, jacobian = (
            nib.orientations.apply_orientation(volume, turn)
            for volume in (fixed, before, after, disp, jacobian)
        )
        self.affine = affine @ nib.orientations.inv_ornt_aff(turn, _unturned(fixed.shape, turn))
        self.spacing = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        # World millimetres to millimetres along the grid's own axes: the same unless oblique.
        self.along_axes = np.diag(self.spacing) @ np.linalg.inv(self.affine[:3, :3])
        self.disp, self.jacobian = disp, jacobian
        self.brain = _foreground(fixed)
        self.box, self.centre = _box(self.brain, self.spacing)
        self.fixed, self.fixed_window = fixed, _window(fixed)
        self.before, self.after, self.moving_window = before, after, _window(before)

    def cut(self, volume: Array, plane: Plane) -> Array:
        """The plane's slice within the box, (vertical, horizontal[, 3])."""
        index: list[Any] = [slice(*edges) for edges in self.box]
        index[plane.across] = self.centre[plane.across]
        sliced = volume[tuple(index)]
        return np.swapaxes(sliced, 0, 1)  # remaining axes come in (horizontal, vertical) order

    def grey(self, volume: Array, window: tuple[float, float], plane: Plane) -> Array:
        low, high = window
        sliced = np.nan_to_num(self.cut(volume, plane).astype(np.float32))
        return np.asarray(np.clip((sliced - low) / (high - low), 0.0, 1.0))

    def size_mm(self, axis: int) -> float:
        first, last = self.box[axis]
        return float((last - first) * self.spacing[axis])

    def world(self, axis: int) -> float:
        """Where the slice lies along ``axis``, RAS millimetres at the middle of the brain."""
        return float((self.affine @ [*self.centre, 1.0])[axis])


def _unturned(shape: tuple[int, ...], turn: Array) -> tuple[int, ...]:
    """The shape before ``turn``: `inv_ornt_aff` asks for that of the original array."""
    return tuple(shape[int(axis)] for axis in turn[:, 0])


def _window(volume: Array) -> tuple[float, float]:
    step = tuple(slice(None, None, max(1, size // 96)) for size in volume.shape)
    sample = volume[step]
    inside = sample[np.isfinite(sample) & (sample > 0)]
    high = float(np.percentile(inside, 99.5)) if inside.size else 1.0
    return 0.0, high if high > 0 else 1.0


def _foreground(volume: Array) -> NDArray[np.bool_]:
    return np.asarray(volume > 0.08 * _window(volume)[1])


def _box(
    mask: NDArray[np.bool_], spacing: Array, margin_mm: float = 9.0
) -> tuple[list[tuple[int, int]], list[int]]:
    """The extent of the brain with a margin, and its middle, both in voxels."""
    box, centre = [], []
    for axis, size in enumerate(mask.shape):
        other = tuple(i for i in range(3) if i != axis)
        filled = np.flatnonzero(mask.any(axis=other))
        first, last = (int(filled[0]), int(filled[-1])) if filled.size else (0, size - 1)
        margin = round(margin_mm / float(spacing[axis]))
        box.append((max(0, first - margin), min(size, last + margin + 1)))
        centre.append((first + last) // 2)
    return box, centre


def _draw(views: _Views, caption: str) -> "Figure":
    # Imported here, and without pyplot: no window system, no state shared with the caller's plots.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = [views.size_mm(axis) for axis in range(3)]
    scale = PANEL / max(sizes)
    widths = [sizes[plane.horizontal] * scale for plane in PLANES]
    heights = [sizes[plane.vertical] * scale for plane in PLANES]
    column = max(*widths, 120.0)
    total_width = 2 * SIDE + len(TITLES) * column + (len(TITLES) - 1) * GAP
    total_height = TOP + sum(heights) + (len(PLANES) - 1) * GAP + BOTTOM

    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    longest = _longest(views)
    top = total_height - TOP
    for row, plane in enumerate(PLANES):
        top -= heights[row]
        for number in range(len(TITLES)):
            left = SIDE + number * (column + GAP)
            centred = left + (column - widths[row]) / 2
            axes = figure.add_axes(
                (
                    centred / total_width,
                    top / total_height,
                    widths[row] / total_width,
                    heights[row] / total_height,
                )
            )
            _frame(axes, views, plane)
            _panel(number, axes, views, plane, longest)
            if number == 0:
                _letters(axes, plane)
                figure.text(
                    (SIDE - 12) / total_width,
                    (top + heights[row] / 2) / total_height,
                    f"{plane.name}, {'xyz'[plane.across]} = {views.world(plane.across):.0f} mm",
                    color=QUIET,
                    fontsize=10,
                    rotation=90,
                    ha="center",
                    va="center",
                )
            if row == 0:
                figure.text(
                    (left + column / 2) / total_width,
                    1 - (TOP - 16) / total_height,
                    TITLES[number],
                    color=TEXT,
                    fontsize=11,
                    ha="center",
                    va="center",
                )
        top -= GAP

    def place(number: int) -> tuple[float, float, float, float]:
        left = SIDE + number * (column + GAP) + 0.1 * column
        return (
            left / total_width,
            (BOTTOM - 26) / total_height,
            0.8 * column / total_width,
            9 / total_height,
        )

    _scale_bar(figure, place(5), _length_colours(), (0.0, longest), "displacement, mm")
    _scale_bar(figure, place(6), JACOBIAN_COLOURS, JACOBIAN_SPAN, "above 1: moving is compressed")
    _key(figure, (SIDE + 3 * (column + GAP)) / total_width, (BOTTOM - 24) / total_height)
    figure.text(SIDE / total_width, 18 / total_height, caption, color=TEXT, fontsize=11)
    figure.text(
        SIDE / total_width,
        (BOTTOM - 24) / total_height,
        "L is the subject's left, shown on the left (neurological)",
        color=QUIET,
        fontsize=9,
    )
    return figure


def _frame(axes: "Axes", views: _Views, plane: Plane) -> None:
    axes.set_facecolor(PANEL_GROUND)
    axes.set_xlim(0.0, views.size_mm(plane.horizontal))
    axes.set_ylim(0.0, views.size_mm(plane.vertical))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _panel(number: int, axes: "Axes", views: _Views, plane: Plane, longest: float) -> None:
    fixed = views.grey(views.fixed, views.fixed_window, plane)
    before = views.grey(views.before, views.moving_window, plane)
    after = views.grey(views.after, views.moving_window, plane)
    if number < 3:
        _show(axes, (fixed, before, after)[number], views, plane)
    elif number < 5:
        _show(axes, _checkerboard(fixed, (before, after)[number - 3], views, plane), views, plane)
    elif number == 5:
        _show(axes, 0.4 * before, views, plane)
        _grid(axes, views, plane, longest)
    else:
        _jacobian(axes, views, plane)


def _show(axes: "Axes", image: Array, views: _Views, plane: Plane, **options: Any) -> None:
    extent = (0.0, views.size_mm(plane.horizontal), 0.0, views.size_mm(plane.vertical))
    defaults = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0, "interpolation": "bilinear"}
    axes.imshow(
        image,
        extent=extent,
        origin="lower",
        aspect="auto",  # the panel already has the extent's proportions
        **{**defaults, **options},
    )


def _checkerboard(fixed: Array, moving: Array, views: _Views, plane: Plane) -> Array:
    """Tiles of the one and of the other, each with its tint, (vertical, horizontal, 3)."""
    rows = _tiles(fixed.shape[0], views.spacing[plane.vertical])
    columns = _tiles(fixed.shape[1], views.spacing[plane.horizontal])
    odd = ((rows[:, None] + columns[None, :]) % 2).astype(bool)[..., None]
    return np.where(odd, moving[..., None] * MOVING_TINT, fixed[..., None] * FIXED_TINT)


def _tiles(size: int, spacing: float) -> NDArray[np.int64]:
    middle = (size - 1) / 2
    tiles = np.floor((np.arange(size) - middle) * spacing / TILE_MM + 0.5)
    return np.asarray(tiles, dtype=np.int64)


def _in_plane(views: _Views, plane: Plane) -> tuple[Array, Array]:
    """In-plane displacement (vertical, horizontal, 2) and its length in space, millimetres."""
    disp = np.nan_to_num(views.cut(views.disp, plane).astype(np.float64))
    along = disp @ views.along_axes.T
    return along[..., [plane.horizontal, plane.vertical]], np.linalg.norm(disp, axis=-1)


def _longest(views: _Views) -> float:
    """The top of the displacement scale: the largest one drawn, in whole millimetres."""
    drawn = [_in_plane(views, plane)[1][views.cut(views.brain, plane)] for plane in PLANES]
    values = np.concatenate(drawn)
    return max(1.0, float(np.ceil(values.max()))) if values.size else 1.0


def _grid(axes: "Axes", views: _Views, plane: Plane, longest: float) -> None:
    """Lines of the fixed grid where the displacement takes them: p + u(p)."""
    from matplotlib.collections import LineCollection

    move, length = _in_plane(views, plane)
    rows, columns = length.shape
    x = (np.arange(columns) + 0.5) * views.spacing[plane.horizontal]
    y = (np.arange(rows) + 0.5) * views.spacing[plane.vertical]
    points = np.stack(np.meshgrid(x, y), axis=-1) + move
    every_row = max(1, round(GRID_MM / views.spacing[plane.vertical]))
    every_column = max(1, round(GRID_MM / views.spacing[plane.horizontal]))
    segments, values = [], []
    for lines, lengths in (
        (points[every_row // 2 :: every_row], length[every_row // 2 :: every_row]),
        (
            points[:, every_column // 2 :: every_column].swapaxes(0, 1),
            length[:, every_column // 2 :: every_column].T,
        ),
    ):
        segments.append(np.stack([lines[:, :-1], lines[:, 1:]], axis=2).reshape(-1, 2, 2))
        values.append(((lengths[:, :-1] + lengths[:, 1:]) / 2).ravel())
    drawn = LineCollection(list(np.concatenate(segments)), cmap=_length_colours(), linewidths=1.0)
    drawn.set_array(np.concatenate(values))
    drawn.set_clim(0.0, longest)
    axes.add_collection(drawn, autolim=False)


def _jacobian(axes: "Axes", views: _Views, plane: Plane) -> None:
    values = views.cut(views.jacobian, plane).astype(np.float64)
    inside = views.cut(views.brain, plane)
    masked = np.ma.masked_where(~inside | ~np.isfinite(values), values)
    low, high = JACOBIAN_SPAN
    _show(
        axes,
        masked,
        views,
        plane,
        cmap=JACOBIAN_COLOURS,
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
    rows, columns = np.nonzero(inside & (values <= 0))
    axes.plot(
        (columns + 0.5) * views.spacing[plane.horizontal],
        (rows + 0.5) * views.spacing[plane.vertical],
        linestyle="none",
        marker="s",
        markersize=2.2,
        markeredgewidth=0,
        color=FOLD,
    )
    axes.text(
        0.98,
        0.02,
        f"{rows.size} folded" if rows.size else "none folded",
        color=FOLD if rows.size else QUIET,
        fontsize=9,
        ha="right",
        va="bottom",
        path_effects=_outline(),
        transform=axes.transAxes,
    )


def _outline() -> list[Any]:
    """Keeps letters readable on white matter."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground=PANEL_GROUND)]


def _length_colours() -> Any:
    """Viridis without its dark end, which is lost on a dark ground."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0.3, 1.0, 256)))


def _letters(axes: "Axes", plane: Plane) -> None:
    left, right, bottom, top = plane.letters
    places = ((0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.02, bottom), (0.5, 0.98, top))
    for x, y, letter in places:
        axes.text(
            x,
            y,
            letter,
            color=TEXT,
            fontsize=10,
            fontweight="bold",
            path_effects=_outline(),
            ha={0.02: "left", 0.98: "right"}.get(x, "center"),
            va={0.02: "bottom", 0.98: "top"}.get(y, "center"),
            transform=axes.transAxes,
        )


def _scale_bar(
    figure: "Figure",
    place: tuple[float, float, float, float],
    cmap: Any,
    span: tuple[float, float],
    label: str,
) -> None:
    axes = figure.add_axes(place)
    axes.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=cmap, extent=(*span, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([span[0], sum(span) / 2, span[1]])
    axes.tick_params(colors=TEXT, labelsize=9, length=2, pad=2)
    axes.set_xlabel(label, color=QUIET, fontsize=9, labelpad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _key(figure: "Figure", x: float, y: float) -> None:
    """Which tint of the checkerboard is which image."""
    width = figure.get_figwidth() * DPI
    for offset, tint, name in ((0, FIXED_TINT, "fixed"), (90, MOVING_TINT, "moving or moved")):
        figure.text(x + offset / width, y, "■", color=tint, fontsize=11)
        figure.text(x + (offset + 16) / width, y, name, color=QUIET, fontsize=9)
