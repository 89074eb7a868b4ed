"""The quality-control picture: right way round, right proportions, whole or absent."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from _support.arrays import assert_arrays_close
from _support.tolerances import TOL
from ulae_rt.errors import OutputError, ShapeError
from ulae_rt.imaging import qc

Array = NDArray[Any]


def head(shape: tuple[int, int, int] = (40, 48, 36)) -> dict[str, Array]:
    """An ellipsoid with a bright ball in its left anterior superior part, on a RAS grid."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), axis=-1)
    brain = (grid**2).sum(axis=-1) < 0.8
    ball = ((grid - [-0.4, 0.4, 0.4]) ** 2).sum(axis=-1) < 0.05
    fixed = (brain * 0.5 + ball * 0.5).astype(np.float32)
    disp = np.stack([2 * np.sin(3 * grid[..., 1]), grid[..., 0], 0 * grid[..., 0]], axis=-1)
    return {
        "fixed": fixed,
        "before": np.roll(fixed, 2, axis=0),
        "after": fixed * 0.9,
        "disp": disp.astype(np.float32),
        "jacobian": np.ones(shape, np.float32),
    }


def turned(volumes: dict[str, Array], axes: str) -> tuple[dict[str, Array], Array]:
    """The same volumes stored in another orientation, and that grid's affine."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    shape = volumes["fixed"].shape
    affine = np.eye(4) @ nib.orientations.inv_ornt_aff(turn, shape)
    moved = {k: nib.orientations.apply_orientation(v, turn) for k, v in volumes.items()}
    return moved, affine


def picture(path: Path) -> Array:
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def draw(path: Path, volumes: dict[str, Array], affine: Array | None = None) -> Array:
    affine = np.eye(4) if affine is None else affine
    qc.qc_figure(path, **volumes, affine=affine, caption="numbers")
    return picture(path)


@pytest.mark.parametrize("axes", ["LAS", "LIA", "PSR", "SRP"])
def test_picture_does_not_depend_on_how_the_grid_is_stored(tmp_path: Path, axes: str) -> None:
    volumes = head()
    expected = draw(tmp_path / "ras.png", volumes)
    actual = draw(tmp_path / "other.png", *turned(volumes, axes))
    np.testing.assert_array_equal(actual, expected)


def test_left_anterior_superior_is_drawn_left_anterior_superior() -> None:
    volumes, affine = turned(head(), "LIA")
    views = qc._Views(*volumes.values(), affine)
    views.centre = [11, 33, 25]  # through the ball
    for plane in qc.PLANES:
        rows, columns = np.nonzero(views.cut(views.fixed, plane) > 0.9)
        height, width = views.cut(views.fixed, plane).shape
        assert (rows.mean() > height / 2) == (plane.letters[3] in "SA")
        assert (columns.mean() < width / 2) == (plane.letters[0] == "L")


def test_displacement_is_drawn_along_the_axes_of_an_oblique_grid() -> None:
    angle = np.deg2rad(20)
    rotation = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * [1.0, 2.0, 3.0]
    volumes = head((16, 16, 16))
    volumes["disp"] = np.broadcast_to(4 * rotation[:, 1], (16, 16, 16, 3)).astype(np.float32)
    views = qc._Views(*volumes.values(), affine)
    np.testing.assert_allclose(views.spacing, [1, 2, 3])
    move, length = qc._in_plane(views, qc.PLANES[2])
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("move", move - [0.0, 4.0], 0, few)
    assert_arrays_close("length", length, 4, few)


def test_world_position_of_the_slices() -> None:
    volumes, affine = turned(head(), "LPI")
    affine[:3, 3] += [5, 6, 7]
    views = qc._Views(*volumes.values(), affine)
    assert [views.world(axis) for axis in range(3)] == [19 + 5, 23 + 6, 17 + 7]


def test_proportions_follow_the_spacing(tmp_path: Path) -> None:
    thick = {name: volume[:, :, ::3] for name, volume in head().items()}
    tall = draw(tmp_path / "a.png", thick, np.diag([1, 1, 3, 1.0]))
    flat = draw(tmp_path / "b.png", thick)
    assert tall.shape[0] > 1.3 * flat.shape[0]


def test_folded_voxels_are_marked(tmp_path: Path) -> None:
    volumes = head()

    def yellow(image: Array) -> int:
        return int((np.abs(image - [1.0, 0.902, 0.0]) < 0.02).all(axis=-1).sum())

    assert yellow(draw(tmp_path / "a.png", volumes)) < 20  # the end of the viridis scale
    volumes["jacobian"][18:22, 20:26, 15:20] = -0.1
    assert yellow(draw(tmp_path / "b.png", volumes)) > 500


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 2)])
def test_degenerate_volumes_still_make_a_picture(tmp_path: Path, shape: Any) -> None:
    zeros, nans = np.zeros(shape), np.full(shape, np.nan)
    path = tmp_path / "qc.png"
    volumes = {"fixed": zeros, "before": nans, "after": zeros, "jacobian": nans}
    draw(path, volumes | {"disp": np.full((*shape, 3), np.nan)})
    draw(
        path,
        {name: np.full(shape, 7, np.int16) for name in volumes} | {"disp": np.ones((*shape, 3))},
    )


def test_arrays_of_another_grid_are_refused(tmp_path: Path) -> None:
    volumes = head()
    with pytest.raises(ShapeError, match=r"after has shape \(39, 48, 36\), expected"):
        draw(tmp_path / "qc.png", volumes | {"after": volumes["after"][1:]})
    with pytest.raises(ShapeError, match=r"disp has shape \(40, 48, 36, 2\), expected"):
        draw(tmp_path / "qc.png", volumes | {"disp": volumes["disp"][..., :2]})
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        draw(tmp_path / "absent" / "qc.png", head())
    (tmp_path / "qc.png").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        draw(tmp_path / "qc.png", head())
    assert [path.name for path in tmp_path.iterdir()] == ["qc.png"]


def test_neither_matplotlib_at_import_nor_pyplot_ever(tmp_path: Path) -> None:
    program = f"""
import sys
import numpy as np
from ulae_rt.imaging.qc import qc_figure
assert "matplotlib" not in sys.modules
volume = np.ones((8, 8, 8))
qc_figure({str(tmp_path / "qc.png")!r}, fixed=volume, before=volume, after=volume,
          disp=np.zeros((8, 8, 8, 3)), jacobian=volume, affine=np.eye(4), caption="")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=120)
