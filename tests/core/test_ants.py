"""ANTs as a client: it reads our warps, and we read what its own registration leaves."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from _support.arrays import assert_arrays_close, assert_labels_agree
from _support.brains import centre_of, grid_affine, save_brain, world
from _support.networks import FakeMetadata, FakeNetwork
from _support.tolerances import TOL
from ulae_rt.cli import main
from ulae_rt.errors import ImageError
from ulae_rt.imaging.chain import chain_displacement, read_transform
from ulae_rt.imaging.grid import grid_of
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.registration.registrar import Registrar

pytestmark = pytest.mark.usefixtures("upright")

ants = pytest.importorskip("ants", reason="antspyx has no wheel for this machine")

# 3 mm and 2.5 x 3 x 4 mm: a whole head, and a registration of a second or two.
GEOMETRIES = {
    "LAS": grid_affine((24, 30, 22), (3, 3, 3), "LAS"),
    "LIA": grid_affine((26, 30, 24), (3, 3, 3), "LIA", centre=(-40, 60, 20)),
    "oblique-PIR": grid_affine((28, 30, 18), (2.5, 3, 4), "PIR", (20, -10, 15), (12, -30, 40)),
}
TURN = nib.eulerangles.euler2mat(0.1, -0.05, 0.08) @ np.diag([1.05, 0.95, 1.1])


def brain(path, name, turned=False):
    shape, affine = GEOMETRIES[name]
    pull = nib.affines.from_matvec(np.eye(3), -centre_of(shape, affine))
    if turned:
        pull = nib.affines.from_matvec(TURN, [3, -4, 2]) @ pull
    return save_brain(path, shape, affine, pull)


def values(path):
    return np.asanyarray(nib.load(path).dataobj)


def ants_applies(folder, fixed, moving, transforms, inverted=None, interpolator="linear"):
    """(X, Y, Z), what ANTs makes of the files."""
    images = (ants.image_read(str(folder / f"{name}.nii.gz")) for name in (fixed, moving))
    return ants.apply_transforms(
        *images, [str(t) for t in transforms], interpolator, whichtoinvert=inverted
    ).numpy()


def apply(folder, fixed, moving, transforms, *flags):
    named = [word for transform in transforms for word in ("-t", str(transform))]
    files = [str(folder / f"{name}.nii.gz") for name in (moving, fixed, "out")]
    command = ["apply", "-i", files[0], "-r", files[1], "-o", files[2], "--overwrite"]
    assert main([*command, *named, *flags]) == 0
    return values(folder / "out.nii.gz")


@pytest.mark.parametrize("fixed", GEOMETRIES)
@pytest.mark.parametrize("moving", GEOMETRIES)
def test_ants_reads_our_warp_and_gives_our_image(tmp_path, fixed, moving):
    brain(tmp_path / "f.nii.gz", fixed)
    brain(tmp_path / "m.nii.gz", moving, turned=True)
    bumps = np.random.default_rng(0).normal(size=(3, 6, 8, 6)).repeat(8, 1).repeat(8, 2)
    answer = bumps.repeat(8, 3).astype(np.float32)
    network = FakeNetwork(answer=answer, metadata=FakeMetadata((48, 64, 48), 2.0))
    result = Registrar(network, affine="com")(tmp_path / "m.nii.gz", tmp_path / "f.nii.gz")
    result.save(tmp_path / "moved.nii.gz", tmp_path / "warp.nii.gz")
    seen = ants_applies(tmp_path, "f", "m", [tmp_path / "warp.nii.gz"])
    ours = values(tmp_path / "moved.nii.gz")
    assert np.corrcoef(ours.ravel(), values(tmp_path / "f.nii.gz").ravel())[0, 1] > 0.8
    # The outermost voxels are in or out by a last digit.
    inside = (slice(1, -1),) * 3
    assert_arrays_close("ANTs", ours[inside], seen[inside], TOL["image by others"])


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """What `ants.registration` writes: an affine, a warp and its inverse."""
    folder = tmp_path_factory.mktemp("ants")
    brain(folder / "f.nii.gz", "LAS")
    brain(folder / "m.nii.gz", "oblique-PIR", turned=True)
    fixed, moving = (ants.image_read(str(folder / f"{name}.nii.gz")) for name in "fm")
    found = ants.registration(
        fixed, moving, "SyN", outprefix=str(folder / "o"), reg_iterations=(6, 3),
        aff_iterations=(20, 10), aff_shrink_factors=(2, 1), aff_smoothing_sigmas=(1, 0),
        random_seed=1,
    )  # fmt: skip
    labels = np.digitize(values(folder / "m.nii.gz"), [1, 60, 90, 120, 160]).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, nib.load(folder / "m.nii.gz").affine), folder / "l.nii.gz")
    return folder, found


def test_we_read_what_ants_registered(registered):
    folder, found = registered
    transforms = found["fwdtransforms"]
    assert [name[-4:] for name in transforms] == ["i.gz", ".mat"]  # a warp, then an affine
    ours = apply(folder, "f", "m", transforms)
    assert np.corrcoef(ours.ravel(), values(folder / "f.nii.gz").ravel())[0, 1] > 0.95
    seen = ants_applies(folder, "f", "m", transforms)
    assert_arrays_close("ANTs", ours, seen, TOL["image by others"])
    # Each of the two does something, so that neither could be left out or come first.
    for other in (transforms[:1], transforms[1:], transforms[::-1]):
        assert np.abs(apply(folder, "f", "m", other) - ours).max() > 1


def test_labels_come_out_as_from_ants(registered):
    folder, found = registered
    ours = apply(folder, "f", "l", found["fwdtransforms"], "--interp", "nearest")
    seen = ants_applies(folder, "f", "l", found["fwdtransforms"], None, "nearestNeighbor")
    assert ours.dtype == np.uint8
    assert_labels_agree("ANTs", ours, seen, TOL["label ties"])


def test_the_way_back_is_antss_inverse(registered):
    folder, found = registered
    affine, inverse = found["invtransforms"]
    ours = apply(folder, "m", "f", [f"[{affine},1]", inverse])
    seen = ants_applies(folder, "m", "f", [affine, inverse], [True, False])
    assert_arrays_close("ANTs", ours, seen, TOL["image by others"])
    assert ours.max() > 100


@pytest.mark.parametrize("name", ["c.h5", "c"])
def test_composites_of_ants_are_read(registered, name):
    """.h5 with all parts in it, or one warp with the affine in it."""
    folder, found = registered
    images = (ants.image_read(str(folder / f"{image}.nii.gz")) for image in "fm")
    path = ants.apply_transforms(*images, found["fwdtransforms"], compose=str(folder / name))
    ours = apply(folder, "f", "m", [path])
    seen = ants_applies(folder, "f", "m", found["fwdtransforms"])
    assert_arrays_close("ANTs", ours, seen, TOL["image by others"])


@pytest.mark.follows("make it a warp: antsApplyTransforms -d 3 -r FIXED -t FILE -o [warp.nii.gz,1]")
def test_a_transform_that_simpleitk_does_not_know_is_made_a_warp(tmp_path):
    """ITK's ComposeScaleSkewVersor3DTransform: SimpleITK writes it, and cannot read it."""
    fixed, path = tmp_path / "f.nii.gz", tmp_path / "t.tfm"
    brain(fixed, "LAS")
    transform = sitk.ComposeScaleSkewVersor3DTransform(
        [1.1, 0.9, 1.2], [0.1, 0.02, 0.03], [1, 2, 3], 0.1, [1, 2, 3], [4, 5, 6]
    )
    sitk.WriteTransform(transform, str(path))
    reference = read_volume(fixed)
    with pytest.raises(ImageError, match="of a type that SimpleITK does not know") as caught:
        read_transform(str(path), reference)
    command = caught.value.hint.partition(": ")[2].replace("FIXED", str(fixed))
    command = command.replace("FILE", str(path)).replace("warp.nii", f"{tmp_path}/warp.nii")
    ants.lib.antsApplyTransforms(command.split()[1:])
    steps = read_transform(str(tmp_path / "warp.nii.gz"), reference)
    found = chain_displacement(steps, grid_of(reference), "fixed")
    points = world(*GEOMETRIES["LAS"])
    lps = [transform.TransformPoint(p) for p in (points * [-1, -1, 1]).reshape(-1, 3).tolist()]
    expected = np.reshape(lps, points.shape) * [-1, -1, 1] - points
    assert_arrays_close("ANTs", found, expected, TOL["displacement float32"])
