"""Transforms one after the other, as antsApplyTransforms takes them, made one displacement."""

import logging
import math
import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.grid import LPS, LPS_SIGNS, SAME_GRID_MM, Displacement, Grid, grid_of
from ulae_rt.imaging.itk import from_sitk, to_sitk
from ulae_rt.imaging.nifti import SUFFIXES, Volume, check_file
from ulae_rt.imaging.transform import resample_displacement
from ulae_rt.imaging.warpfile import NPZ, WarpFormat, read_warp, stated_format

logger = logging.getLogger(__name__)

WARP_SUFFIXES = (*SUFFIXES, NPZ)
# What ITK keeps transforms in; ANTs writes affines as .mat and composites as .h5.
ITK_SUFFIXES = (".mat", ".txt", ".tfm", ".xfm", ".h5", ".hdf5")
TEXT_SUFFIXES = (".txt", ".tfm")
HDF5_SUFFIXES = (".h5", ".hdf5")
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# The name of a data set that each transform of an HDF5 file has.
HDF5_TYPE = b"TransformType"
COMPOSITE = "CompositeTransform_"
# Of ITK's own .xfm files. Those of MINC and FreeSurfer are in RAS, which ITK does not turn.
XFM_BY_ITK = "%ITK-XFM"
# A field that ends with less than this ends smoothly.
SMOOTH_END_MM = 0.5
# A matrix that shrinks one direction so much more than another is singular, and one that changes
# volumes by more than this, either way, is no registration.
SINGULAR = 1e-6
VOLUME_CHANGE = 1e6
INVERTED = re.compile(r"\s*\[\s*(?P<path>.+?)\s*,\s*(?P<inverted>[01])\s*\]\s*", re.DOTALL)
# Brackets, commas and numbers, and no file.
NAMELESS = re.compile(r"\s*(?:\[\s*(?:[,;][^\[\]]*)?\]\s*)?")
# What looks like it and is not: a.mat[1], [a.mat], [a.mat,yes], [a.mat 1].
MISSPELT = re.compile(
    r"(?P<path>[^\[\]]+?)\s*\[\s*(?P<inverted>[^\[\]]*?)\s*\]\s*"
    r"|\s*\[\s*(?P<inside>[^\[\]]+?)\s*\]\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Field:
    """A displacement with the grid it lies on.

    Attributes:
        disp: (X, Y, Z, 3) float32, RAS mm.
        grid: of ``disp``.
        name: what to call it in a message.
    """

    disp: Displacement
    grid: Grid
    name: str


Step = Field | sitk.Transform


def transform_path(text: str) -> tuple[Path, bool]:
    """The file that ``FILE``, ``[FILE,0]`` or ``[FILE,1]`` names, and whether it is inverted.

    Raises:
        UsageError: brackets that mean something else or name no file, and no file of that name.
    """
    if NAMELESS.fullmatch(text) and not (text and Path(text).exists()):
        raise UsageError(
            f"{text!r} names no file, expected FILE, [FILE,0] or [FILE,1]",
            "write the transform's file in front of the comma, or alone",
        )
    if match := INVERTED.fullmatch(text):
        return Path(match["path"]), match["inverted"] == "1"
    if (match := MISSPELT.fullmatch(text)) and not Path(text).exists():
        path = match["path"] or re.split(r"\s*[,;]\s*|\s+(?=\S*$)", match["inside"])[0]
        raise UsageError(
            f"{text!r} is no transform, expected FILE, [FILE,0] or [FILE,1]",
            f"write '[{path},1]' for the inverse of {path}, or {path}",
        )
    return Path(text), False


def read_transform(text: str, reference: Volume, fmt: WarpFormat | None = None) -> list[Step]:
    """Read one transform, as points go through its parts.

    Args:
        text: a warp (NIfTI, or Learn2Reg's .npz), or an ITK transform file (`ITK_SUFFIXES`), which
            may be composite; ``[FILE,1]`` inverts a linear one.
        reference: the image whose grid the result will lie on; warps in voxels must be of it.
        fmt: of a warp that does not say it; not looked at for others. See `read_warp`.

    Raises:
        ImageError, GeometryError: a file that is no such transform; see `read_warp`.
        UsageError: another kind of file, or the inverse of what is not linear.
    """
    path, inverted = transform_path(text)
    name = path.name.lower()
    if name.endswith(WARP_SUFFIXES):
        if inverted:
            raise _not_linear(path)
        warp = read_warp(path, None if stated_format(path) else fmt, reference)
        return [Field(warp.disp, grid_of(warp.grid), str(path))]
    if not name.endswith(ITK_SUFFIXES):
        raise UsageError(
            f"{path} is no kind of transform that is known, expected one of "
            f"{', '.join((*WARP_SUFFIXES, *ITK_SUFFIXES))}",
            "convert it first, e.g. with mri_warp_convert, c3d_affine_tool or wb_command",
        )
    transform = _read_itk(path)
    if not inverted:
        return _flat(transform, str(path))
    if not transform.IsLinear():
        raise _not_linear(path)
    # Through the matrix: SimpleITK inverts not every linear type.
    return [_linear(transform, str(path), inverted=True).GetInverse()]


def needs_format(text: str) -> bool:
    """Whether a transform is a warp that does not say its format itself.

    Raises:
        ImageError: a warp that cannot be read.
        UsageError: see `transform_path`.
    """
    path = transform_path(text)[0]
    return path.name.lower().endswith(WARP_SUFFIXES) and stated_format(path) is None


_ITK_HINT = (
    "give an ITK or ANTs transform; FSL's and FreeSurfer's matrices are converted with "
    "c3d_affine_tool or lta_convert --outitk"
)


def _read_itk(path: Path) -> sitk.Transform:
    check_file(path)
    _check_one_transform(path)
    try:
        transform: sitk.Transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        if match := _NO_SUCH_TYPE.search(str(error)):
            raise _unknown_type(path, match[1]) from None
        if "Transform is not of type" in str(error):
            raise _unheld_type(path) from None
        reason = str(error).strip().splitlines()[-1].split("): ")[-1].strip()
        raise ImageError(f"{path} is not a readable ITK transform: {reason}", _ITK_HINT) from None
    # SimpleITK has no class of its own for a few of ITK's types, or raises on the way to it.
    except (KeyError, TypeError):
        raise _unheld_type(path) from None
    _check_dimension(transform, path)
    return transform


_NO_SUCH_TYPE = re.compile(r'Could not create an instance of "([^"]*)"')


def _unknown_type(path: Path, kind: str) -> ImageError:
    return ImageError(
        f"{path} holds a transform of the type {kind[:80]!r}, which ITK does not know", _ITK_HINT
    )


def _unheld_type(path: Path) -> ImageError:
    return ImageError(
        f"{path} holds a transform of a type that SimpleITK does not know",
        "make it a warp: antsApplyTransforms -d 3 -r FIXED -t FILE -o [warp.nii.gz,1]",
    )


def _check_dimension(transform: sitk.Transform, path: Path) -> None:
    if transform.GetDimension() != 3:
        raise ImageError(
            f"{path} is a transform of {transform.GetDimension()} dimensions, expected 3",
            _ITK_HINT,
        )


def _check_one_transform(path: Path) -> None:
    """Refuse files of several transforms, and of half a one, which ITK's readers take for another.

    SimpleITK reads the first of several, ANTs all of them; and one without its parameters is the
    identity for both, without a word.
    """
    name = path.name.lower()
    if name.endswith(HDF5_SUFFIXES):
        if not _is_whole_hdf5(path):
            raise ImageError(f"{path} is truncated, or not an HDF5 file", _ITK_HINT)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            count = len(re.findall(HDF5_TYPE, raw))
            is_composite = raw.find(COMPOSITE.encode()) >= 0
    elif name.endswith(TEXT_SUFFIXES):
        types = _types_in_text(path)
        count, is_composite = len(types), bool(types) and types[0].startswith(COMPOSITE)
    elif name.endswith(".mat"):
        count, is_composite = _count_in_matlab(path), False
    else:
        _check_xfm(path)
        return
    if is_composite and count == 1:
        raise ImageError(
            f"{path} is a composite transform without any part", "write it again, with its parts"
        )
    if count > 1 and not is_composite:
        raise ImageError(
            f"{path} holds {count} transforms, expected one, or a composite one: some of ITK's "
            "readers take the first, others all",
            "write each into a file of its own, and name them with a -t each",
        )


def _types_in_text(path: Path) -> list[str]:
    """The types of a text file's transforms; refuses one whose numbers are not all there."""
    fields: list[dict[str, str]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            key, colon, value = line.partition(":")
            if key.strip() == "Transform":
                fields.append({})
            if colon and fields:
                fields[-1][key.strip()] = value.strip()
    for number, transform in enumerate(fields, 1):
        if not _TYPE.fullmatch(transform["Transform"]):
            raise _unknown_type(path, transform["Transform"])
        if transform["Transform"].startswith(COMPOSITE):
            continue
        for key in ("Parameters", "FixedParameters"):
            if key not in transform:
                raise ImageError(
                    f"{path} is truncated: transform {number} has no line {key}", "make it again"
                )
            for word in transform[key].split():
                if not _is_number(word):
                    raise ImageError(
                        f"{path} is damaged: transform {number} has {word[:40]!r} among its {key}, "
                        "expected numbers",
                        "make it again",
                    )
        wanted = _AFFINE_PARAMETERS.match(transform["Transform"])
        count = len(transform["Parameters"].split())
        if wanted and count != int(wanted[2]) * (int(wanted[1]) + 1):
            raise ImageError(
                f"{path} is damaged: transform {number} has {count} parameters, expected "
                f"{int(wanted[2]) * (int(wanted[1]) + 1)}",
                "make it again",
            )
        fewest = _FEWEST_PARAMETERS.get(transform["Transform"].partition("Transform_")[0], 0)
        if count < fewest and transform["Transform"].endswith("_3_3"):
            raise ImageError(
                f"{path} is damaged: transform {number} has {count} parameters, expected {fewest}",
                "make it again",
            )
    return [transform["Transform"] for transform in fields]


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word)) and "_" not in word
    except ValueError:
        return False


# ITK's reader puts another precision in; of a name of another form it says nothing useful.
_TYPE = re.compile(r"\w+_(?:double|float)_\d+_\d+")
# In 3-D. ITK reads beyond the end of some that have fewer, to the point of a crash.
_FEWEST_PARAMETERS = {
    "Euler3D": 6,
    "QuaternionRigid": 7,
    "Scale": 3,
    "ScaleLogarithmic": 3,
    "ScaleSkewVersor3D": 15,
    "ScaleVersor3D": 9,
    "Similarity3D": 7,
    "Translation": 3,
    "Versor": 3,
    "VersorRigid3D": 6,
}
_AFFINE_PARAMETERS = re.compile(
    r"(?:Affine|MatrixOffset)Transform(?:Base)?_(?:double|float)_(\d)_(\d)$"
)


def _count_in_matlab(path: Path) -> int:
    """How many transforms a MATLAB file has: each is a variable, followed by one called ``fixed``.

    Raises:
        ImageError: it ends before the numbers that it announces, which ITK takes for 0.

    Source: MAT-File Format, "MAT-File Level 4 Format"; itkMatlabTransformIO.cxx.
    """
    raw, at, count, fixed = path.read_bytes(), 0, 0, 0
    while len(raw) - at >= 20:
        kind, rows, columns, imaginary, length = struct.unpack_from("<5i", raw, at)
        if not 0 <= kind <= 52 or min(rows, columns) < 0 or not 0 < length < 256:
            return count  # not of level 4, or of another byte order: ITK says what it thinks of it
        is_fixed = raw[at + 20 : at + 20 + length].rstrip(b"\0") == b"fixed"
        count, fixed = count + (not is_fixed), fixed + is_fixed
        width = {0: 8, 1: 4, 2: 4, 3: 2, 4: 2, 5: 1}.get(kind // 10 % 10, 8)
        at += 20 + length + rows * columns * width * (2 if imaginary else 1)
    if count and (at != len(raw) or fixed < count):
        missing = at - len(raw)
        raise ImageError(
            f"{path} is truncated: "
            + (
                f"it ends {missing} bytes early"
                if missing > 0
                else "its last variable is not whole"
            ),
            "make it again",
        )
    return count


def _check_xfm(path: Path) -> None:
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(4096)
    if head.startswith("MNI Transform File") and XFM_BY_ITK not in head:
        raise ImageError(
            f"{path} is a transform of MINC or FreeSurfer in RAS mm, which ITK would read as LPS",
            "make it ITK's: lta_convert --inmni FILE --outitk OUT.txt --src MOVING --trg FIXED",
        )


def _is_whole_hdf5(path: Path) -> bool:
    """Whether a file is HDF5 and as long as it says; the HDF5 library would print pages about it.

    Source: HDF5 File Format Specification, II.A, the superblock.
    """
    with path.open("rb") as file:
        head = file.read(48)
    if len(head) < 48 or not head.startswith(HDF5_SIGNATURE):
        return False
    end_at = 40 if head[8] == 0 else 28
    end: int = struct.unpack_from("<Q", head, end_at)[0]
    return path.stat().st_size >= end


def _not_linear(path: Path) -> UsageError:
    return UsageError(
        f"{path} cannot be inverted on the way: only affine transforms can",
        "give the inverse warp: register --inverse-warp writes it, ANTs calls it 1InverseWarp",
    )


def _flat(transform: sitk.Transform, name: str) -> list[Step]:
    """The parts of an ITK transform in the order in which a point goes through them."""
    kind = transform.GetTransformEnum()
    if kind == sitk.sitkComposite and not transform.IsLinear():
        composite = sitk.CompositeTransform(transform)
        composite.FlattenTransform()
        parts = range(composite.GetNumberOfTransforms())
        # ITK keeps the one that a point meets first last.
        return [step for n in reversed(parts) for step in _flat(composite.GetNthTransform(n), name)]
    if kind == sitk.sitkDisplacementField:
        image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        disp = from_sitk(image).astype(np.float32) * LPS_SIGNS
        affine = np.eye(4)
        direction = np.array(image.GetDirection()).reshape(3, 3)
        affine[:3, :3] = direction * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        _check_finite(disp, name)
        return [Field(disp, Grid(image.GetSize(), LPS @ affine), name)]
    if transform.IsLinear():
        return [_linear(transform, name)]
    _check_finite(np.array(transform.GetParameters()), name)
    return [transform]


def _linear(
    transform: sitk.Transform, name: str, *, inverted: bool = False
) -> sitk.AffineTransform:
    """A linear transform of any type as what it does to points; ``inverted`` is for messages.

    SimpleITK takes ITK's MatrixOffsetTransformBase, which fMRIPrep and ANTs write, for a composite
    of itself.
    """
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    # Far out, so that little is lost where the translation is large.
    columns = [
        np.array(transform.TransformPoint(end)) - origin for end in (1e3 * np.eye(3)).tolist()
    ]
    matrix = np.stack(columns, axis=1) / 1e3
    _check_finite(np.array([matrix, np.broadcast_to(origin, (3, 3))]), name)
    _check_matrix(matrix, name, inverted)
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(matrix.ravel().tolist())
    affine.SetTranslation(origin.tolist())
    return affine


def _check_matrix(matrix: NDArray[np.float64], name: str, inverted: bool) -> None:
    """Refuse what no registration finds: a singular matrix, or one that changes volumes absurdly.

    Raises:
        ImageError: it is one of them.
    """
    does = "cannot be inverted" if inverted else "cannot be applied"
    stretches = np.linalg.svd(matrix, compute_uv=False)
    if stretches[-1] <= SINGULAR * stretches[0]:
        raise ImageError(
            f"{name} {does}: its matrix is singular, which makes space flat", "make it again"
        )
    power = float(np.log10(stretches).sum())
    if abs(power) > np.log10(VOLUME_CHANGE):
        raise ImageError(
            f"{name} {does}: it changes volumes by a factor of about 1e{power:+.0f}, expected "
            f"{1 / VOLUME_CHANGE:.0e} to {VOLUME_CHANGE:.0e}",
            "check its unit, mm, and make it again",
        )


def _check_finite(numbers: NDArray[Any], name: str) -> None:
    if not np.isfinite(numbers).all():
        raise ImageError(f"{name} has NaN or Inf", "make it again")


def chain_displacement(steps: Sequence[Step], reference: Grid, name: str) -> Displacement:
    """Where the voxels of ``reference`` come from, through all steps: one displacement.

        disp(x) = T_n(... T_2(T_1(x))) - x

    The first step, where it is a field, is interpolated linearly on ``reference`` (its own numbers
    if that is its grid) and must contain it. A later one is looked up where the points have got
    to; outside it they stay where they are, as with ITK and ANTs, and a warning says how many if
    the field does not end at 0, as those of ANTs do.

    Args:
        steps: as a point goes through them.
        reference: the grid of the result.
        name: of the reference, for messages.

    Returns:
        (X, Y, Z, 3) float32, RAS mm.

    Raises:
        GeometryError: the reference is not inside the field that comes first, or no point gets
            into one that comes later.
    """
    disp: Displacement | None = None
    for step in steps:
        if isinstance(step, Field):
            if disp is None:
                _check_contains(step, reference, name)
                disp = resample_displacement(step.disp, step.grid, reference)
                continue
            _check_met(step, disp, reference)
        disp = _through(step, disp, reference)
    if disp is None:
        raise UsageError("there is no transform", "give one at least")
    return disp


def _check_contains(field: Field, reference: Grid, name: str) -> None:
    corners = np.array(np.meshgrid(*([0, n - 1] for n in reference.shape), 1)).reshape(4, -1)
    index = (np.linalg.inv(field.grid.affine) @ reference.affine @ corners)[:3].T
    beyond = _beyond_mm(index, field.grid).max()
    if beyond > SAME_GRID_MM:
        raise GeometryError(
            f"{name} reaches {beyond:.3g} mm out of the field of {field.name}, which says nothing "
            "there",
            "give the fixed image that the warp was made for, or a crop or another resolution of "
            "it",
        )


def _check_met(field: Field, disp: Displacement, reference: Grid) -> None:
    to_index = np.linalg.inv(field.grid.affine)
    missed = 0.0
    for points in _pointed(disp, reference):
        beyond = _beyond_mm(points @ to_index[:3, :3].T + to_index[:3, 3], field.grid)
        missed += float(np.count_nonzero(beyond > 0)) / (beyond.size * reference.shape[2])
    if missed > 1 - 1e-9:
        raise GeometryError(
            f"no voxel gets into the field of {field.name}", "check the order of the transforms"
        )
    jump = _outermost_mm(field.disp)
    if missed > 0 and jump > SMOOTH_END_MM:
        logger.warning(
            "%.2g %% of the voxels get out of the field of %s and stay where they are, though it "
            "still moves points by up to %.3g mm where it ends",
            100 * missed,
            field.name,
            jump,
        )


def _outermost_mm(disp: Displacement) -> float:
    """The largest displacement on the faces of a field."""
    faces = [disp.take(end, axis) for axis in range(3) for end in (0, -1)]
    return max(float(np.linalg.norm(face, axis=-1).max()) for face in faces)


def away_mm(disp: Displacement, reference: Grid, image: Grid) -> float:
    """How far the points of a displacement stay away from an image; 0 if any is inside it."""
    to_index = np.linalg.inv(image.affine)
    nearest = np.inf
    for points in _pointed(disp, reference):
        index = points @ to_index[:3, :3].T + to_index[:3, 3]
        nearest = min(nearest, float(_beyond_mm(index, image).min()))
        if nearest == 0:
            break
    return nearest


def _pointed(disp: Displacement, grid: Grid) -> Iterator[NDArray[np.float64]]:
    """Points x + disp(x), (N, 3) RAS mm, of one plane of ``grid`` after the other, middle first."""
    x, y, planes = grid.shape
    index = np.stack(np.meshgrid(np.arange(x), np.arange(y), indexing="ij"), -1)
    in_plane = index @ grid.affine[:3, :2].T + grid.affine[:3, 3]
    for plane in sorted(range(planes), key=lambda k: abs(2 * k - planes)):
        yield (in_plane + grid.affine[:3, 2] * plane + disp[:, :, plane]).reshape(-1, 3)


def _beyond_mm(index: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """(N,), how far ``index`` (N, 3) lies outside a grid's outermost voxels; 0 inside."""
    last = np.array(grid.shape) - 0.5
    beyond = np.maximum(np.maximum(-0.5 - index, index - last), 0)
    return np.asarray(np.linalg.norm(beyond * np.linalg.norm(grid.affine[:3, :3], axis=0), axis=1))


def _through(step: Step, disp: Displacement | None, reference: Grid) -> Displacement:
    """T(x + disp(x)) - x, ITK's own double precision in between."""
    chain = [_as_itk(step) if isinstance(step, Field) else step]
    if disp is not None:
        chain.append(_as_itk(Field(disp, reference, "")))
    lps = LPS @ reference.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    total = sitk.TransformToDisplacementField(
        sitk.CompositeTransform(chain),  # the last is the one that a point meets first
        sitk.sitkVectorFloat64,
        list(reference.shape),
        lps[:3, 3].tolist(),
        spacing.tolist(),
        (lps[:3, :3] / spacing).ravel().tolist(),
    )
    return from_sitk(total).astype(np.float32) * LPS_SIGNS


def _as_itk(field: Field) -> sitk.Transform:
    image = to_sitk(field.disp * LPS_SIGNS, field.grid.affine)
    return sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
