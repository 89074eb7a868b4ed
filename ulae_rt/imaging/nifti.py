"""NIfTI files in and out: everything that can be wrong with one is said before work starts."""

import contextlib
import errno
import gzip
import logging
import os
import re
import secrets
import shlex
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from ulae_rt.arguments import PathLike
from ulae_rt.errors import DiskFull, GeometryError, ImageError, OutputError, UsageError
from ulae_rt.files import locked_folders
from ulae_rt.messages import about

logger = logging.getLogger(__name__)

Kind = Literal["image", "labels", "values"]

SUFFIXES = (".nii.gz", ".nii")
# A 0.25 mm whole head is 700 x 900 x 700; what lies beyond is a damaged header or another organ.
MAX_AXIS = 1024
MAX_VOXELS = 512_000_000
# ITK and its users cannot represent shear; this is rounding in a header, in radians.
MAX_SHEAR = 1e-3
MAX_FORM_DIFFERENCE_MM = 1e-3
DEFLATE = 1032  # bytes that one byte of a .gz can stand for, at most
MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}
GZIP_SIGNATURE = b"\x1f\x8b"
# sizeof_hdr by the header's bytes; one file's magic; where its voxels may begin at the earliest.
_HEADERS: tuple[tuple[int, type[nib.Nifti1Header]], ...] = (
    (348, nib.Nifti1Header), (540, nib.Nifti2Header),
)  # fmt: skip
# Extensions of more than this hold no header of a scan: what is before the voxels is not read on.
MAX_EXTENSIONS = 64 << 20
# Whole numbers up to here are all exact in double precision, through which ITK carries labels.
MAX_EXACT = 2**53
# Single precision has steps of 1e-45 near 0: a brain fainter than this would have few shades.
FAINTEST = 1e-35
# Hidden names are longer than the places' own, and a file system takes 255 bytes.
MAX_STEM = 100
_HIDDEN = re.compile(r"\.([^/]*)\.\d+-[0-9a-f]{8}\.part([^/]*)$")
# What reading a damaged file raises; isal's stubs take its class for an instance.
_IsalError = cast(type[Exception], isal_zlib.IsalError)
_UNREADABLE: tuple[type[Exception], ...] = (_IsalError, EOFError, OSError, ValueError)


class Brightness(NamedTuple):
    """How bright a brain is: quantiles of the voxels above 0.

    Attributes:
        p95, p999: the 95th and the 99.9th percentile.
        maximum: the brightest voxel.
    """

    p95: float
    p999: float
    maximum: float


@dataclass(frozen=True)
class Volume:
    """A 3-D brain volume with its geometry.

    Attributes:
        data: (X, Y, Z), in the file's own type, or an image's float32 where the file scales its
            values.
        affine: (4, 4) float64, voxel index to world RAS mm.
        header: the file's own header, copied unchanged to what is written on this grid.
        name: what to call it in a message: the path, or the caller's word for an array.
        path: the file it came from, None for an image in memory.
    """

    data: NDArray[Any]
    affine: NDArray[np.float64]
    header: nib.Nifti1Header
    name: str
    path: Path | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        x, y, z = self.data.shape
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each array axis, mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @cached_property
    def brightness(self) -> Brightness:
        """Of its voxels above 0; found when it is first asked for.

        Raises:
            ImageError: there is none.
        """
        brain = self.data[self.data > 0]
        if brain.size == 0:
            raise ImageError(f"{self.name} has no voxel above 0", "check how it was masked")
        places = [int(part * (brain.size - 1)) for part in (0.95, 0.999, 1.0)]
        return Brightness(*(float(value) for value in np.partition(brain, places)[places]))


def read_volume(path: PathLike, *, kind: Kind = "image") -> Volume:
    """Read and check one NIfTI file.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        kind: ``labels`` demands whole numbers and allows a single value; ``values`` takes
            anything finite.

    Raises:
        ImageError: the file is missing, unreadable, damaged, not NIfTI, not one 3-D volume, or
            its values cannot be registered (NaN, Inf, constant, complex, colour).
        GeometryError: its affine is missing, singular or sheared.
    """
    image = open_image(path)
    return volume_from_image(image, name=str(path), kind=kind, path=Path(path))


def open_image(path: PathLike) -> nib.Nifti1Image:
    """Open a NIfTI file and read its header.

    Raises:
        ImageError: missing, unreadable, damaged, or not NIfTI.
    """
    path = Path(path)
    check_file(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise ImageError(
            f"{path} is not named as a NIfTI image, expected .nii or .nii.gz",
            "convert it first, e.g. with mri_convert or dcm2niix",
        )
    try:
        with about(str(path)):
            _check_layout(path)
            image = nib.load(path)
    except ImageError:
        raise
    except PermissionError:
        raise ImageError(f"{path} cannot be read: permission denied", "check its mode") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, _IsalError) as error:
        raise _damaged(path, error) from None
    except Exception as error:  # nibabel lets many kinds through for a header it cannot parse
        raise ImageError(
            f"{path} is not a readable NIfTI image: {error}",
            "give a NIfTI-1 or NIfTI-2 file; convert other formats first, e.g. with mri_convert",
        ) from None
    if not isinstance(image, nib.Nifti1Image):  # a Nifti2Image is one too
        raise ImageError(f"{path} is a {type(image).__name__}, expected NIfTI", "convert it first")
    return image


def _check_layout(path: Path) -> None:
    """Refuse a header whose numbers contradict each other or the file, before voxels are read.

    nibabel takes such headers, in silence or with a line in its log, and then reads other bytes
    for voxels, or other values than ITK does.

    Source: nifti1.h and nifti2.h, the comments on the fields.
    """
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == GZIP_SIGNATURE
    is_named_gzip = path.name.lower().endswith(".gz")
    if is_gzip and not is_named_gzip:
        raise ImageError(
            f"{path} is compressed with gzip, though its name does not end in .gz",
            f"rename it: mv {_quoted(path)} {_quoted(f'{path}.gz')}",
        )
    with igzip.open(path, "rb") if is_gzip else path.open("rb") as stream:
        start = stream.read(4)
        if is_gzip and start.startswith(GZIP_SIGNATURE):
            raise ImageError(
                f"{path} is compressed twice",
                f"unpack it once: gzip -dc {_quoted(path)} > {_quoted(_once(path))}",
            )
        header = _raw_header(start, stream)
        if header is None:
            return  # nibabel says what it is instead
        if is_named_gzip and not is_gzip:
            raise ImageError(
                f"{path} is not compressed, though its name ends in .gz",
                f"rename it: mv {_quoted(path)} {_quoted(path.with_suffix(''))}",
            )
        if header["magic"].item().rstrip(b"\0") not in (b"n+1", b"n+2", b"n+2\0\r\n\x1a\n"):
            return
        hint = "write it again with the tool that made it, e.g. as mri_convert IN OUT"
        _check_fields(header, str(path), hint)
        size = None if is_gzip else path.stat().st_size
        _check_offset(header, size, str(path), hint)
        _check_extensions(header, stream, str(path))


def _quoted(path: PathLike) -> str:
    """For a shell."""
    return shlex.quote(str(path))


def _once(path: Path) -> Path:
    return path.with_name(f"once-{path.name}")


def _raw_header(start: bytes, stream: Any) -> nib.Nifti1Header | None:
    """The header as it stands in the file, without nibabel's repairs; None where it is none."""
    for size, header_class in _HEADERS:
        for order in "<>":
            if start == struct.pack(f"{order}i", size):
                block = start + stream.read(size - 4)
                if len(block) == size:
                    return header_class(block, endianness=order, check=False)
    return None


def _check_fields(header: nib.Nifti1Header, name: str, hint: str) -> None:
    dimensions = int(header["dim"][0])
    if not 1 <= dimensions <= 7:
        raise ImageError(f"{name} has {dimensions} dimensions by its header, expected 3", hint)
    try:
        bits = 8 * header.get_data_dtype().itemsize
    except nib.spatialimages.HeaderDataError:
        bits = 0  # an unknown type, which nibabel names
    if bits and int(header["bitpix"]) not in (0, bits):
        raise ImageError(
            f"{name} contradicts itself: its datatype {int(header['datatype'])} has {bits} bits a "
            f"voxel, and its bitpix is {int(header['bitpix'])}",
            hint,
        )
    steps = np.asarray(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(steps).all() and (steps > 0).all()) and dimensions >= 3:
        raise GeometryError(
            f"{name} has voxels of {_mm(steps)} mm in pixdim, expected numbers above 0",
            "set them right, e.g. with nibabel's header.set_zooms",
        )
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isinf(slope) or np.isinf(inter) or (np.isnan(inter) and slope not in (0, 1)
        and np.isfinite(slope)):  # fmt: skip
        raise ImageError(
            f"{name} has the scaling slope {slope:g} and intercept {inter:g}, expected numbers",
            hint,
        )
    if (slope == 0 or np.isnan(slope)) and np.isfinite(inter) and inter != 0:
        raise ImageError(
            f"{name} has the scaling slope {slope:g}, which means none, and the intercept "
            f"{inter:g}: some readers add it and some do not",
            "set both, slope 1 where only the intercept is meant, e.g. with nibabel's "
            "header.set_slope_inter",
        )


def _check_offset(header: nib.Nifti1Header, size: int | None, name: str, hint: str) -> None:
    """Refuse a place of the first voxel that is none; ``size``: of a file that is not packed."""
    offset, earliest = float(header["vox_offset"]), header.single_vox_offset
    if not np.isfinite(offset) or offset != np.floor(offset) or offset < earliest:
        raise ImageError(
            f"{name} has its voxels begin at byte {offset:.10g} (vox_offset), expected a whole "
            f"number from {earliest} on, behind its header",
            hint,
        )
    if size is not None and offset >= size:
        raise _damaged(
            name, f"its voxels begin at byte {offset:g} (vox_offset), and it has {size} bytes"
        )


def _check_extensions(header: nib.Nifti1Header, stream: Any, name: str) -> None:
    """Refuse extensions that reach into the voxels."""
    left = int(header["vox_offset"]) - header.sizeof_hdr - 4
    if left > MAX_EXTENSIONS:
        raise ImageError(
            f"{name} has {left} bytes between its header and its voxels, expected "
            f"{MAX_EXTENSIONS} at most",
            "copy or download it again",
        )
    if not (extender := stream.read(4)) or extender[0] == 0:
        return
    block = stream.read(left)
    at = 0
    while len(block) - at >= 8:
        size = struct.unpack_from(f"{header.endianness}i", block, at)[0]
        if size == 0:  # filled up with zeros
            return
        if size < 8 or at + size > left:
            raise ImageError(
                f"{name} has an extension of {size} bytes where {left - at} are left before its "
                "voxels: one of the two is cut short",
                "copy or download it again",
            )
        at += size


def read_grid(path: PathLike) -> Volume:
    """The grid and header of one NIfTI file, which may hold any values; they are not read.

    Raises:
        ImageError: as for `read_volume`, as far as the header tells.
        GeometryError: its affine is missing, singular or sheared.
    """
    image, name = open_image(path), str(path)
    return volume_without_values(image, checked_shape(image.shape, name), name)


def volume_without_values(image: nib.Nifti1Image, shape: tuple[int, int, int], name: str) -> Volume:
    """A volume of zeros that take no memory, on the grid of ``image``."""
    affine = checked_affine(image, name)
    return Volume(np.broadcast_to(np.uint8(0), shape), affine, image.header, name, Path(name))


def volume_from_image(
    image: Any, *, name: str, kind: Kind = "image", path: Path | None = None
) -> Volume:
    """Check an opened nibabel image and read its values; see `read_volume`."""
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is one too
        raise ImageError(
            f"{name} is a {type(image).__name__}, expected a single-file NIfTI image",
            "convert it to .nii or .nii.gz first",
        )
    shape = checked_shape(image.shape, name)
    affine = checked_affine(image, name)
    dtype = image.get_data_dtype()
    if dtype.kind not in "iufb":
        raise ImageError(
            f"{name} holds {'colour' if dtype.names else dtype.name} voxels, expected one number",
            "extract one channel or the magnitude first",
        )
    data = read_data(image, name, kind).reshape(shape)
    _check_values(data, name, kind)
    if kind == "labels":
        check_exact_labels(data, name)
    return Volume(data, affine, image.header.copy(), name, path)


def volume_from_array(
    data: NDArray[Any], affine: NDArray[Any], *, name: str, kind: Kind = "image"
) -> Volume:
    """Check an array (X, Y, Z) with its affine (4, 4), voxel to RAS mm; see `read_volume`."""
    if np.ma.isMaskedArray(data):
        raise ImageError(
            f"{name} is a masked array, and what is masked would count",
            "fill it first, with array.filled(0)",
        )
    data, matrix = np.asarray(data), np.asarray(affine)
    hint = "give (array, affine) with affine from voxel index to RAS mm"
    if matrix.shape != (4, 4) or matrix.dtype.kind not in "iuf":
        raise GeometryError(
            f"{name} comes with an affine of {matrix.dtype} and shape {matrix.shape}, expected "
            "real numbers and (4, 4)",
            hint,
        )
    affine = matrix.astype(np.float64)
    if not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise GeometryError(
            f"{name} comes with the affine {' '.join(f'{x:g}' for x in affine.ravel())}, expected "
            "finite numbers and 0 0 0 1 in its last row",
            hint,
        )
    if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise GeometryError(f"{name} comes with an affine that cannot be inverted", hint)
    if data.dtype == np.bool_:
        data = data.astype(np.uint8)
    elif data.dtype == np.float16:
        data = data.astype(np.float32)
    try:
        image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    except Exception as error:  # unsupported types and shapes: nibabel raises several kinds
        raise ImageError(f"{name} is not a volume: {error}", "give a 3-D numeric array") from None
    return volume_from_image(image, name=name, kind=kind)


def check_exact_labels(data: NDArray[Any], name: str) -> None:
    """Refuse whole numbers that ITK, which carries labels as doubles, would change.

    Raises:
        ImageError: a value beyond 2^53.
    """
    if data.dtype.itemsize < 8 or data.size == 0:
        return
    low, high = data.min(), data.max()
    if low < -MAX_EXACT or high > MAX_EXACT:
        raise ImageError(
            f"{name} holds labels up to {max(int(high), -int(low))}, expected {MAX_EXACT} at most: "
            "double precision would make others of them",
            "number its labels from 1, e.g. with numpy.unique(labels, return_inverse=True)",
        )


def check_file(path: Path) -> None:
    """Refuse what is no file to read, whatever its format.

    Raises:
        ImageError: missing, a link to nothing, a folder, no regular file, empty, or closed to
            this user.
    """
    try:
        missing = not path.exists()
        target = os.readlink(path) if missing and path.is_symlink() else None
    except PermissionError:
        raise ImageError(f"{path} cannot be read: permission denied", "check its mode") from None
    except OSError as error:  # a name that is too long
        raise ImageError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    if target is not None:
        raise ImageError(
            f"{path} is a link to {target}, which does not exist",
            "get the file that it leads to (datalad get, git annex get), or set the link right",
        )
    if missing:
        raise ImageError(f"{path} does not exist", "check the path")
    if path.is_dir():
        raise ImageError(f"{path} is a folder, expected a file", "name the file inside it")
    if not path.is_file():
        raise ImageError(f"{path} is not a regular file", "give a file on a disk")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes)", "copy or download it again")


def _damaged(path: PathLike, error: BaseException | str) -> ImageError:
    again = "copy or download it again"
    packed = str(path).lower().endswith(".gz")
    return ImageError(
        f"{path} is truncated or damaged: {error}",
        f"{again}; 'gzip -t' says whether it is whole" if packed else again,
    )


def checked_shape(shape: Sequence[int], name: str) -> tuple[int, int, int]:
    """The 3-D shape; refuses, before any voxel is read, what is no single volume."""
    size = "x".join(map(str, shape))
    spatial = tuple(shape[:3])
    if len(shape) < 3 or len([n for n in spatial if n > 1]) < 3:
        if any(n <= 0 for n in shape):
            raise ImageError(f"{name} has size {size}: no voxels", "check how it was made")
        raise ImageError(
            f"{name} has size {size}, expected a 3-D volume", "stack its slices into one volume"
        )
    if any(n <= 0 for n in shape):
        raise ImageError(f"{name} has size {size}: no voxels", "check how it was made")
    if any(n > 1 for n in shape[3:]):
        raise ImageError(
            f"{name} has size {size}, expected one 3-D volume",
            "extract one frame first, e.g. with fslroi or nibabel's four_to_three",
        )
    voxels = int(np.prod(spatial, dtype=np.int64))
    if max(spatial) > MAX_AXIS or voxels > MAX_VOXELS:
        raise ImageError(
            f"{name} has size {size}, more than {MAX_AXIS} on an axis or {MAX_VOXELS:.0e} voxels",
            "crop it or resample it to about 1 mm; if it is smaller than that, it is damaged",
        )
    x, y, z = spatial
    return x, y, z


def checked_affine(image: nib.Nifti1Image, name: str) -> NDArray[np.float64]:
    """World RAS mm from voxel index: the sform where there is one, else the qform.

    Raises:
        GeometryError: missing, not finite, singular or sheared.
    """
    header = image.header
    hint = "set it with nibabel's set_sform, fslorient or 3drefit, or convert from DICOM again"
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise GeometryError(f"{name} has no affine: sform_code and qform_code are 0", hint)
    try:
        affine = np.asarray(image.affine, dtype=np.float64)
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except Exception as error:  # a quaternion that is none: nibabel raises several kinds
        raise GeometryError(f"{name} has an unusable affine: {error}", hint) from None
    if not np.isfinite(affine).all():
        raise GeometryError(f"{name} has NaN or Inf in its affine", hint)
    # ITK honours the header's unit of length and nibabel does not: the two would disagree.
    unit = header.get_xyzt_units()[0]
    scale = np.diag([*[MM_PER_UNIT.get(unit, 1.0)] * 3, 1.0])
    affine = scale @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    determinant = abs(np.linalg.det(affine[:3, :3]))
    if not (spacing > 0).all() or determinant < 1e-6 * np.prod(spacing):
        raise GeometryError(f"{name} has an affine that cannot be inverted", hint)
    if max(spacing) > 100 or min(spacing) < 0.01:
        raise GeometryError(
            f"{name} has voxels of {_mm(spacing)} mm, expected 0.01 to 100 mm", hint
        )
    unit_columns = affine[:3, :3] / spacing
    shear = float(np.abs(unit_columns.T @ unit_columns - np.eye(3)).max())
    if shear > MAX_SHEAR:
        raise GeometryError(
            f"{name} has a sheared affine (axes {shear:.3f} from orthogonal), which ITK's "
            "tools cannot represent",
            "resample it to an orthogonal grid first, e.g. with nibabel.processing."
            "resample_to_output",
        )
    if sform is not None and qform is not None:
        corners = _corners(image.shape[:3])
        gap = (scale @ (sform - qform) @ corners)[:3]
        difference = float(np.linalg.norm(gap, axis=0).max())
        if difference > MAX_FORM_DIFFERENCE_MM:
            logger.warning(
                "%s: sform and qform differ by up to %.3g mm; the sform is used "
                "(ITK and ANTs may take the qform and then disagree)",
                name,
                difference,
            )
    return affine


def _corners(shape: Sequence[int]) -> NDArray[np.float64]:
    """(4, 8) homogeneous indices of a volume's corner voxels."""
    last = [n - 1 for n in shape]
    grid = np.meshgrid(*([0, n] for n in last), [1], indexing="ij")
    return np.stack([g.ravel() for g in grid]).astype(np.float64)


def _mm(lengths: Iterable[float]) -> str:
    return "x".join(f"{length:.3g}" for length in lengths)


def read_data(image: nib.Nifti1Image, name: str, kind: Kind = "image") -> NDArray[Any]:
    """The values in the file's type; an image's as float32 where they are scaled or wider.

    Labels and other values stay exact: single precision would round a label above 16 777 216.

    Raises:
        ImageError: the file ends early or is damaged, or it does not fit in memory.
    """
    path = image.get_filename()
    if path is not None:
        _check_promise(image, Path(path), name)
    # What overflows becomes Inf, which is refused by name.
    with np.errstate(all="ignore"), about(name):
        try:
            if path is not None and str(path).lower().endswith(".gz"):
                data = _read_packed(image, path)
            else:
                data = np.asanyarray(image.dataobj)
        except _UNREADABLE as error:
            raise _damaged(name, error) from None
        except MemoryError:
            raise ImageError(
                f"{name} does not fit in memory", "resample it to about 1 mm"
            ) from None
        widest = np.dtype(np.float32 if kind == "image" else np.float64)
        if data.dtype.kind == "f" and data.dtype.itemsize > widest.itemsize:
            if kind == "image":
                check_single_precision(data, name)
            data = data.astype(widest)
    return data.astype(data.dtype.newbyteorder("="), copy=False)


def check_single_precision(data: NDArray[Any], name: str) -> None:
    """Refuse finite values that single precision has no numbers for.

    Raises:
        ImageError: the largest is beyond 3e38, or so near 0 that all would become 0.
    """
    if data.size == 0 or data.dtype.kind != "f" or data.dtype.itemsize <= 4:
        return
    largest = max(abs(float(data.min())), abs(float(data.max())))
    low, high = FAINTEST, float(np.finfo(np.float32).max)
    if np.isfinite(largest) and largest > 0 and not low <= largest <= high:
        raise ImageError(
            f"{name} has values up to {largest:.3g}, expected {low:g} to {high:.3g}: single "
            "precision has no others",
            "scale its values, e.g. with numpy",
        )


def _check_promise(image: nib.Nifti1Image, path: Path, name: str) -> None:
    """Refuse a header that promises more than its file can hold, before room is made for it."""
    promised = int(np.prod(image.shape, dtype=np.int64)) * image.get_data_dtype().itemsize
    size = path.stat().st_size
    most = size * DEFLATE if path.name.lower().endswith(".gz") else size
    if promised > most:
        raise _damaged(
            name,
            f"its header promises {promised} bytes of voxels, and a file of {size} bytes holds "
            f"{most} at most",
        )


def _read_packed(image: nib.Nifti1Image, path: PathLike) -> NDArray[Any]:
    """The values of a gzipped file, read to its very end: that is where the checksum is."""
    with igzip.open(path, "rb") as stream:
        data = np.asanyarray(type(image).from_stream(stream).dataobj)
        while stream.read(1 << 20):
            pass
    return data


def _check_values(data: NDArray[Any], name: str, kind: Kind) -> None:
    low, high = data.min(), data.max()  # NaN and Inf show here without a mask of the volume
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(data.size - np.count_nonzero(np.isfinite(data)))
        raise ImageError(
            f"{name} has {bad} NaN or Inf voxels of {data.size}",
            "replace them, e.g. with numpy.nan_to_num, once you know where they come from",
        )
    if kind == "labels":
        if data.dtype.kind == "f" and not (data == np.rint(data)).all():
            raise ImageError(
                f"{name} holds fractions, expected whole-number labels",
                "give the label map as segmented, not interpolated",
            )
    elif kind == "image" and low == high:
        raise ImageError(
            f"{name} is constant: every voxel is {low}", "check how it was made or masked"
        )
    elif kind == "image" and (largest := max(abs(float(low)), abs(float(high)))) < FAINTEST:
        raise ImageError(
            f"{name} has no value further from 0 than {largest:.3g}, expected {FAINTEST:g} at "
            "least: single precision ends there",
            "multiply its values, e.g. with numpy",
        )


def image_on_grid(
    data: NDArray[Any], like: Volume, affine: NDArray[np.float64] | None = None
) -> nib.Nifti1Image:
    """``data`` as an image on ``like``'s grid: sform, qform, codes and units untouched.

    Args:
        data: (X, Y, Z[, ...]), the values written, unscaled, in their own type.
        like: the volume whose grid it lies on.
        affine: (4, 4); given, it is written in mm as both sform and qform, whatever the two of
            ``like`` are, with ``like``'s code. For files whose readers must not have a choice.
    """
    header = like.header.copy()
    header.set_data_dtype(data.dtype)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0.0
    header["descrip"] = b"ulae-rt"
    # Extensions describe the other file (its DICOM fields, its history), not this one.
    header.extensions.clear()
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # Without an affine of its own nibabel leaves both forms as the header has them.
    image = image_class(data, affine, header, dtype=data.dtype)
    if affine is not None:
        code = int(like.header["sform_code"]) or int(like.header["qform_code"]) or 1
        image.set_sform(affine, code=code)
        image.set_qform(affine, code=code)
        image.header.set_xyzt_units("mm")
    return image


def write_volume(path: PathLike, data: NDArray[Any], like: Volume) -> None:
    """Write ``data`` (X, Y, Z) on ``like``'s grid; nothing is left when it fails half-way."""
    with Outputs([path], overwrite=True) as outputs:
        save_image(image_on_grid(data, like), outputs.temporary(path))
        outputs.commit()


def save_image(image: nib.Nifti1Image, path: PathLike) -> None:
    """Write a nibabel image; the same image gives the same bytes every time.

    Raises:
        OutputError: the folder is gone or closed; DiskFull: what it says.
    """
    try:
        with open(path, "wb") as raw:
            if not str(path).endswith(".gz"):
                image.to_stream(raw)
                return
            # No name and no time: the same image gives the same bytes. Level 2 packs interpolated
            # floats as small as zlib does, at a seventh of the time.
            with igzip.IGzipFile("", "wb", 2, raw, mtime=0) as packed:
                image.to_stream(packed)
    except OSError as error:
        raise output_error(path, error) from None


def output_error(path: PathLike, error: OSError) -> OutputError:
    """The error for a path that could not be written: `DiskFull`, or what the system says."""
    path = _HIDDEN.sub(r"\1\2", str(path))  # as the user has it
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{path} cannot be written: the disk is full", "free some of it")
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}", "check space and permissions"
    )


def check_output(path: PathLike, *, overwrite: bool, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse an output that could not be written, before any work is done for it.

    Raises:
        UsageError: its name does not end as its format demands.
        OutputError: its folder is missing or closed, or it exists and may not be overwritten.
    """
    path = Path(path)
    if not path.name.lower().endswith(tuple(suffixes)):
        raise UsageError(f"{path} must end in {' or '.join(suffixes)}", "rename the output")
    folder = path.parent
    if not os.path.isdir(folder):  # pathlib raises for some folders
        raise OutputError(
            f"the folder {folder} does not exist", f"make it: mkdir -p {_quoted(folder)}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {folder} cannot be written to", "check its permissions")
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder, expected a file name", "add a file name")
    if _is_there(path) and not overwrite:
        raise _exists(path)


def _is_there(path: Path) -> bool:
    """Whether something has this name, be it a link to what is not there."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written: {reason}", "choose another name") from None
    return True


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path} exists already", "give --overwrite to replace it")


class Outputs:
    """All files of one run: written beside their places, put there together, or not at all.

    Use as a context manager: `temporary` gives the path to write to, `commit` renames. What is
    not committed when the block ends, for an error, Ctrl-C or SIGTERM, is removed. Of two that
    write to the same places at the same time each puts all of its files there, one after the
    other, or none.
    """

    def __init__(
        self,
        paths: Iterable[PathLike],
        *,
        overwrite: bool,
        inputs: Iterable[PathLike] = (),
        suffixes: Mapping[Path, Sequence[str]] | None = None,
    ) -> None:
        """Check every path (see `check_output`) and that none is an input or there twice."""
        self._temporary: dict[Path, Path] = {}
        self._overwrite = overwrite
        sources = {Path(path).resolve() for path in inputs}
        seen: set[Path] = set()
        for path in paths:
            resolved = Path(path).resolve()
            if resolved in sources:
                raise UsageError(f"{path} is also an input", "choose another output")
            if resolved in seen:
                raise UsageError(f"{path} is named twice as an output", "choose another output")
            seen.add(resolved)
            check_output(
                path, overwrite=overwrite, suffixes=(suffixes or {}).get(Path(path), SUFFIXES)
            )

    def temporary(self, path: PathLike) -> Path:
        """A hidden path beside ``path``, on the same disk and with the same suffix."""
        path = Path(path)
        suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), path.suffix)
        stem = path.name[: len(path.name) - len(suffix)]
        # By itself the number of the process would not do: threads and other machines have it too.
        unique = f"{os.getpid()}-{secrets.token_hex(4)}"
        hidden = path.with_name(f".{stem[:MAX_STEM]}.{unique}.part{suffix.lower()}")
        self._temporary[path] = hidden
        return hidden

    def commit(self) -> list[Path]:
        """Move everything written to its place; returns the places.

        Raises:
            OutputError: a place has been taken since the paths were checked, or a file cannot be
                moved; those moved before it are taken back.
        """
        places = list(self._temporary)
        with locked_folders(path.parent for path in places), contextlib.ExitStack() as kept:
            if not self._overwrite:
                for path in places:
                    if _is_there(path):
                        raise _exists(path)
            before = {path: self._keep(path, kept) for path in places if _is_there(path)}
            moved: list[Path] = []
            try:
                for path in places:
                    os.replace(self._temporary[path], path)
                    moved.append(path)
            except BaseException as error:
                for done in moved:
                    _take_back(done, before)
                if isinstance(error, OSError):
                    raise output_error(path, error) from None
                raise
            self._temporary.clear()
        return places

    @staticmethod
    def _keep(path: Path, kept: contextlib.ExitStack) -> Path | None:
        """A second name of what is in ``path`` now, for as long as ``kept`` lasts."""
        second = path.with_name(f".{path.name[:MAX_STEM]}.{secrets.token_hex(4)}.old")
        try:
            os.link(path, second, follow_symlinks=False)
        except OSError:  # a file system without links
            return None
        kept.callback(second.unlink, missing_ok=True)
        return second

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hidden in self._temporary.values():
            hidden.unlink(missing_ok=True)


def _take_back(path: Path, before: Mapping[Path, Path | None]) -> None:
    """Make a place what it was; what has been replaced without a second name cannot come back."""
    with contextlib.suppress(OSError):
        if path not in before:
            path.unlink()
        elif (second := before[path]) is not None:
            os.replace(second, path)
