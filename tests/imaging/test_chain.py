"""ITK's transform files: each is what ITK's own TransformPoint does, or refused in one sentence."""

import re
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from _support.arrays import assert_arrays_close
from _support.brains import grid_affine, world
from _support.tolerances import TOL
from ulae_rt.errors import ImageError, UlaeError, UsageError
from ulae_rt.imaging.chain import chain_displacement, read_transform, transform_path
from ulae_rt.imaging.grid import Grid
from ulae_rt.imaging.nifti import volume_from_array
from ulae_rt.imaging.warpfile import Warp

SHAPE, AFFINE = grid_affine((5, 6, 7), (2, 1, 1.3), "PSR", (20, -10, 15), (10, -20, 5))
REFERENCE = volume_from_array(np.ones(SHAPE, np.uint8), AFFINE, name="fixed", kind="labels")
LPS_POINTS = (world(SHAPE, AFFINE) * [-1, -1, 1]).reshape(-1, 3)
FILES = ("txt", "tfm", "xfm", "mat", "h5")
quick = settings(
    database=None, max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def displacement(path):
    return chain_displacement(read_transform(str(path), REFERENCE), Grid(SHAPE, AFFINE), "fixed")


def itk_displacement(transform):
    """By TransformPoint, RAS mm."""
    moved = np.array([transform.TransformPoint(point) for point in LPS_POINTS.tolist()])
    return ((moved - LPS_POINTS) * [-1, -1, 1]).reshape(*SHAPE, 3)


def assert_as_itk(path, transform):
    expected = itk_displacement(transform)
    assert_arrays_close(path.name, displacement(path), expected, TOL["displacement float32"])


def field(random):
    """A displacement that contains the reference, of 3 mm or so."""
    lps = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(random.normal(size=(*SHAPE[::-1], 3)), isVector=True)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return sitk.DisplacementFieldTransform(image)


def spline(random):
    transform = sitk.BSplineTransform(3, 3)
    low, high = LPS_POINTS.min(0) - 5, LPS_POINTS.max(0) + 5
    transform.SetTransformDomainOrigin(low.tolist())
    transform.SetTransformDomainPhysicalDimensions((high - low).tolist())
    transform.SetTransformDomainMeshSize((3, 3, 3))
    transform.SetParameters(random.normal(size=len(transform.GetParameters())).tolist())
    return transform


def of_kind(kind, random):
    """A random transform of a type, with a centre of its own where it has one."""
    shift, centre = (random.normal(size=3) * 5).tolist(), (random.normal(size=3) * 20).tolist()
    angles, scale = random.normal(size=3) * 0.2, random.uniform(0.8, 1.2, 3).tolist()
    axis = (random.normal(size=3) + 0.1).tolist()
    if kind == "translation":
        return sitk.TranslationTransform(3, shift)
    if kind == "scale":
        transform = sitk.ScaleTransform(3, scale)
        transform.SetCenter(centre)
        return transform
    if kind in ("identity", "logarithm", "quaternion"):
        transform = sitk.Transform(3, {
            "identity": sitk.sitkIdentity, "logarithm": sitk.sitkScaleLogarithmic,
            "quaternion": sitk.sitkQuaternionRigid,
        }[kind])  # fmt: skip
        if kind == "logarithm":
            transform.SetParameters(np.log(scale).tolist())
        if kind == "quaternion":
            half = angles[0] / 2
            transform.SetParameters([0, 0, np.sin(half), np.cos(half), *shift])
        return transform
    if kind == "affine":
        transform = sitk.AffineTransform(3)
        transform.SetMatrix((np.eye(3) + 0.1 * random.normal(size=(3, 3))).ravel().tolist())
        transform.SetTranslation(shift)
        transform.SetCenter(centre)
        return transform
    skew = (random.normal(size=6) * 0.1).tolist()
    rotation = axis, angles[0]
    return {
        "euler": lambda: sitk.Euler3DTransform(centre, *angles.tolist(), shift),
        "similarity": lambda: sitk.Similarity3DTransform(scale[0], *rotation, shift, centre),
        "versor": lambda: sitk.VersorTransform(*rotation, centre),
        "rigid": lambda: sitk.VersorRigid3DTransform(*rotation, shift, centre),
        "scale versor": lambda: sitk.ScaleVersor3DTransform(scale, *rotation, shift, centre),
        "scale skew": lambda: sitk.ScaleSkewVersor3DTransform(
            scale, skew, *rotation, shift, centre
        ),
        "compose": lambda: sitk.ComposeScaleSkewVersor3DTransform(
            scale, skew[:3], *rotation, shift, centre
        ),
        "field": lambda: field(random),
        "spline": lambda: spline(random),
    }[kind]()


LINEAR = (
    "identity", "translation", "scale", "logarithm", "quaternion", "affine", "euler", "similarity",
    "versor", "rigid", "scale versor", "scale skew",
)  # fmt: skip
KINDS = (*LINEAR, "compose", "field", "spline")


def written(transform, path):
    """Whether ITK writes it to such a file."""
    try:
        sitk.WriteTransform(transform, str(path))
    except RuntimeError:
        return False
    return True


@quick
@given(st.sampled_from(FILES), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_that_itk_writes(tmp_path, kind, suffix, seed):
    transform = of_kind(kind, np.random.default_rng(seed))
    path = tmp_path / f"t.{suffix}"
    if not written(transform, path):
        return
    if kind == "compose" and suffix != "xfm":
        # SimpleITK writes it and cannot read it.
        with pytest.raises(ImageError, match="of a type that SimpleITK does not know"):
            read_transform(str(path), REFERENCE)
        return
    assert_as_itk(path, transform)


@quick
@given(
    st.lists(st.sampled_from([k for k in KINDS if k != "compose"]), min_size=1, max_size=4),
    st.sampled_from(["txt", "tfm", "h5"]),
    st.integers(0, 2**32 - 1),
)
def test_composite_files(tmp_path, kinds, suffix, seed):
    """A field comes last for a point: it would have to contain where the points have got to."""
    random = np.random.default_rng(seed)
    transform = sitk.CompositeTransform([of_kind(kind, random) for kind in kinds])
    path = tmp_path / f"c.{suffix}"
    sitk.WriteTransform(transform, str(path))
    try:
        assert_as_itk(path, transform)
    except UlaeError as error:
        assert re.search("reaches .* out of the field|no voxel gets into the field", str(error))  # noqa: PT017
        assert "field" in kinds


def test_nested_composites_are_flattened(tmp_path):
    random = np.random.default_rng(0)
    inner = sitk.CompositeTransform([of_kind("affine", random), of_kind("euler", random)])
    transform = sitk.CompositeTransform([inner, of_kind("scale", random)])
    assert not written(transform, tmp_path / "nested.h5")  # ITK refuses
    flat = sitk.CompositeTransform(transform)
    flat.FlattenTransform()
    sitk.WriteTransform(flat, str(tmp_path / "flat.h5"))
    assert_as_itk(tmp_path / "flat.h5", transform)


NUMBERS = "0.99 -0.1 0.02 0.1 0.98 0.01 -0.02 0.03 1.01 1 2 3"
HEAD = "#Insight Transform File V1.0\n"


def text(kind, parameters=NUMBERS, fixed="5 6 7"):
    return f"#Transform 0\nTransform: {kind}\nParameters: {parameters}\nFixedParameters: {fixed}\n"


def save_text(path, *transforms):
    path.write_text(HEAD + "".join(transforms))
    return path


# What ITK's own text files may call them; the centre is 5 6 7.
TEXT_TYPES = {
    "AffineTransform": NUMBERS,
    "MatrixOffsetTransformBase": NUMBERS,
    "Euler3DTransform": "0.1 0.02 0.03 1 2 3",
    "VersorRigid3DTransform": "0.1 0.02 0.03 1 2 3",
    "VersorTransform": "0.1 0.02 0.03",
    "QuaternionRigidTransform": "0 0 0.0998334166468282 0.995004165278026 1 2 3",
    "ScaleTransform": "1.1 0.9 1.2",
    "ScaleLogarithmicTransform": "0.1 0.02 0.03",
    "Similarity3DTransform": "0.1 0.02 0.03 1 2 3 1.1",
    "TranslationTransform": "1 2 3",
    "IdentityTransform": "",
    "ScaleVersor3DTransform": "0.1 0.02 0.03 1 2 3 1.1 0.9 1.2",
    "ScaleSkewVersor3DTransform": "0.1 0.02 0.03 1 2 3 1.1 0.9 1.2 .01 .02 .03 .01 .02 .03",
}


@pytest.mark.parametrize("precision", ["double", "float"])
@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_text_of_either_precision(tmp_path, kind, precision):
    fixed = "" if kind in ("TranslationTransform", "IdentityTransform") else "5 6 7"
    name = f"{kind}_{precision}_3_3"
    path = save_text(tmp_path / "t.txt", text(name, TEXT_TYPES[kind], fixed))
    assert_as_itk(path, sitk.ReadTransform(str(path)))
    if kind in ("AffineTransform", "MatrixOffsetTransformBase"):  # and by hand
        numbers, centre = np.array(NUMBERS.split(), float), np.array([5.0, 6, 7])
        matrix, shift = numbers[:9].reshape(3, 3), numbers[9:]
        moved = (LPS_POINTS - centre) @ matrix.T + centre + shift
        expected = ((moved - LPS_POINTS) * [-1, -1, 1]).reshape(*SHAPE, 3)
        assert_arrays_close(kind, displacement(path), expected, TOL["displacement float32"])


@pytest.mark.parametrize("precision", ["double", "float"])
@pytest.mark.parametrize("suffix", ["txt", "h5", "mat"])
def test_fmriprep_s_affines_and_their_inverses(tmp_path, suffix, precision):
    """MatrixOffsetTransformBase made 3,000 lines of RecursionError."""
    name = f"MatrixOffsetTransformBase_{precision}_3_3"
    path = tmp_path / f"t.{suffix}"
    if suffix == "txt":
        save_text(path, text(name))
    elif suffix == "mat":
        path.write_bytes(matlab(name, NUMBERS, "5 6 7"))
    else:
        save_hdf5(path, [(name, NUMBERS, "5 6 7")], precision)
    transform = sitk.ReadTransform(str(path))
    assert_as_itk(path, transform)
    (step,) = read_transform(f"[{path},1]", REFERENCE)
    back = chain_displacement([step], Grid(SHAPE, AFFINE), "fixed")
    expected = itk_displacement(transform.GetInverse())
    assert_arrays_close("inverse", back, expected, TOL["displacement float32"])


def matlab(kind, parameters, fixed):
    """A transform as ITK writes it: two variables of MATLAB's level 4."""
    content = b""
    for name, numbers in ((kind, parameters), ("fixed", fixed)):
        values = np.array(numbers.split(), float)
        content += struct.pack("<5i", 0, values.size, 1, 0, len(name) + 1)
        content += name.encode() + b"\0" + values.tobytes()
    return content


def save_hdf5(path, transforms, precision="double"):
    h5py = pytest.importorskip("h5py")
    dtype = "f8" if precision == "double" else "f4"
    with h5py.File(path, "w") as file:
        for name in ("ITKVersion", "HDFVersion", "OSName", "OSVersion"):
            file.create_dataset(name, data=["x"], dtype=h5py.string_dtype("ascii"))
        group = file.create_group("TransformGroup")
        for number, (kind, parameters, fixed) in enumerate(transforms):
            part = group.create_group(str(number))
            part.create_dataset("TransformType", data=[kind], dtype=h5py.string_dtype("ascii"))
            if parameters is not None:
                values = np.array(parameters.split(), dtype)
                part.create_dataset("TransformParameters", data=values)
                values = np.array(fixed.split(), "f8")
                part.create_dataset("TransformFixedParameters", data=values)
    return path


AFFINE_3 = "AffineTransform_double_3_3"
COMPOSITE = "CompositeTransform_double_3_3"


def test_composites_with_fmriprep_s_affines(tmp_path):
    parts = [(COMPOSITE, None, None), ("MatrixOffsetTransformBase_double_3_3", NUMBERS, "5 6 7")]
    parts.append((AFFINE_3, NUMBERS, "0 0 0"))
    path = save_hdf5(tmp_path / "c.h5", parts)
    assert_as_itk(path, sitk.ReadTransform(str(path)))
    moved = sitk.CompositeTransform(sitk.ReadTransform(str(path)))
    moved.AddTransform(of_kind("spline", np.random.default_rng(0)))
    sitk.WriteTransform(moved, str(tmp_path / "d.h5"))
    assert_as_itk(tmp_path / "d.h5", moved)


@pytest.mark.follows("write each into a file of its own, and name them with a -t each")
@pytest.mark.parametrize("suffix", ["txt", "tfm", "mat", "h5"])
@pytest.mark.parametrize("count", [2, 5])
def test_several_transforms_in_a_file_are_refused_and_the_hint_works(
    tmp_path, capfd, suffix, count
):
    """SimpleITK takes the first, with a word on stderr; ANTs takes all of them."""
    path = tmp_path / f"t.{suffix}"
    parts = [(AFFINE_3, f"1 0 0 0 1 0 0 0 1 {10**n} 0 0", "0 0 0") for n in range(count)]
    if suffix == "mat":
        path.write_bytes(b"".join(matlab(*part) for part in parts))
    elif suffix == "h5":
        save_hdf5(path, parts)
    else:
        save_text(path, *(text(*part) for part in parts))
    with pytest.raises(ImageError, match=f"holds {count} transforms, expected one") as caught:
        read_transform(str(path), REFERENCE)
    assert capfd.readouterr().err == ""
    assert caught.value.hint == ("write each into a file of its own, and name them with a -t each")
    steps = []
    for number, part in enumerate(parts):
        own = save_text(tmp_path / f"{number}.txt", text(*part))
        steps += read_transform(str(own), REFERENCE)
    moved = chain_displacement(steps, Grid(SHAPE, AFFINE), "fixed")
    shift = sum(10**n for n in range(count))
    assert_arrays_close("x", moved[..., 0], -shift, TOL["displacement float32"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"Transform: {AFFINE_3}\n", "is truncated: transform 1 has no line Parameters"),
        (f"Transform: {AFFINE_3}\nParameters: {NUMBERS}\n", "has no line FixedParameters"),
        (text(AFFINE_3, NUMBERS + " 4 5"), "transform 1 has 14 parameters, expected 12"),
        (text(AFFINE_3, NUMBERS[:-4]), "transform 1 has 10 parameters, expected 12"),
        (text(AFFINE_3, NUMBERS[:-1] + "x"), "1 has 'x' among its Parameters, expected numbers"),
        (text(AFFINE_3, NUMBERS[:-1] + "nan"), "1 has 'nan' among its Parameters"),
        (text(AFFINE_3, NUMBERS[:-1] + "-inf"), "1 has '-inf' among its Parameters"),
        (text(AFFINE_3, NUMBERS[:-1] + "1e999"), "1 has '1e999' among its Parameters"),
        (text(AFFINE_3, NUMBERS, "5 x 7"), "1 has 'x' among its FixedParameters"),
        (text(COMPOSITE, "", ""), "is a composite transform without any part"),
        (text("AffineTransform_double_2_2", "1 0 0 1 2 3", "0 0"), "of 2 dimensions, expected 3"),
        (text("MatrixOffsetTransformBase_double_2_2", "1 0 0 1 2 3", "0 0"), "of 2 dimensions"),
        (text("Rigid2DTransform_double_2_2", "0.1 2 3", "0 0"), "of 2 dimensions, expected 3"),
        (text("Euler2DTransform_float_2_2", "0.1 2 3", "0 0"), "of 2 dimensions, expected 3"),
        (text("TranslationTransform_double_2_2", "1 2", ""), "of 2 dimensions, expected 3"),
        (text("AffineTransform_double_4_4", "1 " * 20), "is not a readable ITK transform"),
        (text("CenteredAffineTransform_double_3_3", NUMBERS + " 4 5 6"), "type that SimpleITK"),
        (text("CenteredEuler3DTransform_double_3_3", "0 0 0 1 2 3 4 5 6"), "type that SimpleITK"),
        (text("VersorTransform_float_3_3", ""), "transform 1 has 0 parameters, expected 3"),
        (text("VersorTransform_double_3_3", "0.1 0"), "1 has 2 parameters, expected 3"),
        (text("Similarity3DTransform_double_3_3", "0.1 0"), "1 has 2 parameters, expected 7"),
        (text("ScalableAffineTransform_double_3_3"), "of a type that SimpleITK does not know"),
        (text("ThinPlateSplineKernelTransform_double_3_3"), "which ITK does not know"),
        (text("BSplineDeformableTransform_double_3_3"), "which ITK does not know"),
        (text("NoSuchTransform_double_3_3"), "which ITK does not know"),
        (text("BSplineTransform_double_3_3", "1 2 3"), "is not a readable ITK transform"),
        (text("DisplacementFieldTransform_double_3_3", "1 2 3"), "is not a readable ITK transform"),
        (text("NoSuchTransform_float_3_3"), "the type 'NoSuchTransform_.*', which ITK does not"),
        (text("AffineTransform"), "the type 'AffineTransform', which ITK does not know"),
        (text(""), "the type '', which ITK does not know"),
        ("", "is not a readable ITK transform"),
        ("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "is not a readable ITK transform"),
    ],
)  # fmt: skip
def test_what_is_no_transform_is_one_sentence(tmp_path, capfd, content, message):
    path = save_text(tmp_path / "t.txt", content)
    with pytest.raises(ImageError, match=message) as caught:
        read_transform(str(path), REFERENCE)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert capfd.readouterr().err == ""


@quick
@given(st.binary(max_size=200), st.sampled_from(FILES))
def test_anything(tmp_path, content, suffix):
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ImageError):
        read_transform(str(path), REFERENCE)


@quick
@given(st.integers(0, 192), st.integers(0, 255), st.booleans())
def test_a_damaged_mat(tmp_path, at, value, cut):
    content = bytearray(matlab(AFFINE_3, NUMBERS, "5 6 7"))
    content[at % len(content)] = value
    path = tmp_path / "t.mat"
    path.write_bytes(bytes(content[:at] if cut else content))
    try:
        displacement(path)
    except UlaeError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("cut", [1, 4, 8, 16, 20, 24, 30, 35, 50, 60, 100, 140])
@pytest.mark.parametrize("kind", ["affine", "translation", "euler"])
def test_a_truncated_mat_is_refused(tmp_path, kind, cut):
    """ITK takes the numbers that are missing for 0."""
    path = tmp_path / "t.mat"
    sitk.WriteTransform(of_kind(kind, np.random.default_rng(0)), str(path))
    read_transform(str(path), REFERENCE)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.raises(
        ImageError, match=r"is truncated: it|is not a readable ITK|is empty"
    ) as caught:
        read_transform(str(path), REFERENCE)
    assert caught.value.hint


@pytest.mark.parametrize("suffix", ["mat", "txt", "h5"])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((3, 3)), "its matrix is singular"),
        (np.diag([1.0, 1, 0]), "its matrix is singular"),
        (np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), "its matrix is singular"),
        (np.eye(3) * 1e-9, "changes volumes by a factor of about 1e-27, expected 1e-06 to 1e\\+06"),
        (np.eye(3) * 1e300, "changes volumes by a factor of about 1e\\+900, expected 1e-06"),
        (np.eye(3) * np.nan, "NaN or Inf|has 'nan' among"),
    ],
)
def test_a_matrix_that_no_registration_finds_is_refused(
    tmp_path, suffix, inverted, matrix, message
):
    numbers = " ".join(map(repr, [*matrix.ravel().tolist(), 1.0, 2.0, 3.0]))
    path = tmp_path / f"t.{suffix}"
    if suffix == "txt":
        save_text(path, text(AFFINE_3, numbers))
    elif suffix == "mat":
        path.write_bytes(matlab(AFFINE_3, numbers, "5 6 7"))
    else:
        save_hdf5(path, [(AFFINE_3, numbers, "5 6 7")])
    with pytest.raises(ImageError, match=message) as caught:
        read_transform(f"[{path},{int(inverted)}]", REFERENCE)
    if "singular" in message:
        does = "inverted" if inverted else "applied"
        assert f"t.{suffix} cannot be {does}: " in str(caught.value)


@pytest.mark.parametrize("matrix", [np.diag([-1.0, 1, 1]), np.diag([90.0, 90, 90]), np.eye(3) / 90])
def test_a_mirror_and_other_units_are_applied(tmp_path, matrix):
    numbers = " ".join(map(repr, [*matrix.ravel().tolist(), 1e5, 2.0, 3.0]))
    path = save_text(tmp_path / "t.txt", text(AFFINE_3, numbers))
    assert read_transform(str(path), REFERENCE)


@quick
@given(st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("kind", LINEAR)
def test_every_linear_type_is_inverted(tmp_path, kind, seed):
    """SimpleITK has no inverse of some."""
    transform = of_kind(kind, np.random.default_rng(seed))
    path = tmp_path / "t.tfm"
    sitk.WriteTransform(transform, str(path))
    (inverse,) = read_transform(f"[{path},1]", REFERENCE)
    back = [inverse.TransformPoint(transform.TransformPoint(p)) for p in LPS_POINTS.tolist()]
    assert_arrays_close(kind, np.array(back), LPS_POINTS, TOL["displacement float32"])


def test_a_transform_of_minc_is_refused_and_one_of_itk_s_own_is_not(tmp_path):
    """FreeSurfer's talairach.xfm is in RAS, which ITK reads as if it were LPS."""
    path = tmp_path / "talairach.xfm"
    sitk.WriteTransform(of_kind("affine", np.random.default_rng(0)), str(path))
    read_transform(str(path), REFERENCE)
    path.write_text(path.read_text().replace("%ITK-XFM writer", "% tal_avi"))
    with pytest.raises(ImageError, match="of MINC or FreeSurfer in RAS mm, which ITK would read"):
        read_transform(str(path), REFERENCE)


@pytest.mark.parametrize(
    ("given_text", "path", "inverted"),
    [
        ("a.mat", "a.mat", False), ("[a.mat,1]", "a.mat", True), ("[a.mat,0]", "a.mat", False),
        ("[ a.mat, 1 ]", "a.mat", True), (" [a b.mat ,1] ", "a b.mat", True),
        ("[a,b.mat,1]", "a,b.mat", True), ("[/x/[1].mat,1]", "/x/[1].mat", True),
    ],
)  # fmt: skip
def test_brackets_as_people_write_them(given_text, path, inverted):
    found = transform_path(given_text)
    assert (str(found[0]), found[1]) == (path, inverted)


@pytest.mark.parametrize(
    "wrong", ["a.mat[1]", "a.mat [1]", "a.mat[ 1 ]", "[a.mat]", "[a.mat 1]", "[a.mat,2]",
              "[a.mat;1]", "[a.mat, yes]"],
)  # fmt: skip
def test_brackets_that_mean_something_else_and_the_hint(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    sitk.WriteTransform(of_kind("affine", np.random.default_rng(0)), "a.mat")
    with pytest.raises(UsageError, match=re.escape(f"{wrong!r} is no transform")) as caught:
        read_transform(wrong, REFERENCE)
    assert caught.value.hint == "write '[a.mat,1]' for the inverse of a.mat, or a.mat"
    for right in ("[a.mat,1]", "a.mat"):
        read_transform(right, REFERENCE)


@pytest.mark.parametrize("wrong", ["[,1]", "[ , 0]", "[ ,1 ]", "[]", "[,]", "[;1]", "", " "])
def test_brackets_without_a_file(wrong):
    with pytest.raises(UsageError, match=re.escape(f"{wrong!r} names no file")) as caught:
        transform_path(wrong)
    assert "in front of the comma" in caught.value.hint


def test_a_file_whose_name_has_brackets_is_itself(tmp_path):
    path = tmp_path / "a[1]"
    path.touch()
    assert transform_path(str(path)) == (path, False)


def test_an_inverse_of_a_field_is_refused_and_its_own_file_is_not(tmp_path):
    path = tmp_path / "w.nii.gz"
    Warp(np.zeros((*SHAPE, 3), np.float32), REFERENCE).save(path)
    with pytest.raises(UsageError, match="cannot be inverted on the way") as caught:
        read_transform(f"[{path},1]", REFERENCE)
    assert "register --inverse-warp writes it" in caught.value.hint
    read_transform(str(path), REFERENCE)


def test_hdf5_without_parts_or_parameters(tmp_path):
    path = save_hdf5(tmp_path / "c.h5", [(COMPOSITE, None, None)])
    with pytest.raises(ImageError, match="is a composite transform without any part"):
        read_transform(str(path), REFERENCE)
    path = save_hdf5(tmp_path / "n.h5", [(AFFINE_3, NUMBERS[:-1] + "nan", "0 0 0")])
    with pytest.raises(ImageError, match="has NaN or Inf"):
        read_transform(str(path), REFERENCE)


def assert_moves_by(path, matrix):
    """Every point of the reference goes where ``matrix`` (4, 4), RAS mm, takes it."""
    points = world(SHAPE, AFFINE)
    expected = points @ matrix[:3, :3].T + matrix[:3, 3] - points
    assert_arrays_close(path.name, displacement(path), expected, TOL["displacement float32"])


def save_as_itk(path, matrix):
    """A matrix in RAS mm, fixed to moving, as the programs of a hint write it."""
    signs = np.diag([-1.0, -1, 1, 1])
    lps = signs @ matrix @ signs
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    sitk.WriteTransform(transform, str(path))
    return path


TURN = np.array(
    [[0.99, -0.1, 0.02, 3], [0.1, 0.98, 0.01, -2], [-0.02, 0.03, 1.01, 1], [0, 0, 0, 1]]
)


def rows(matrix):
    return "\n".join(" ".join(map(str, row)) for row in matrix)


def fsl_mm(shape, affine):
    """From FSL's millimetres, whose first axis grows to the left, to RAS mm."""
    scale = np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1])
    if np.linalg.det(affine[:3, :3]) > 0:
        scale = np.diag([-1.0, 1, 1, 1]) @ scale
        scale[0, 3] = -scale[0, 0] * (shape[0] - 1)
    return affine @ np.linalg.inv(scale)


@pytest.mark.follows("give an ITK or ANTs transform; FSL's and FreeSurfer's matrices are converted")
def test_a_matrix_of_fsl_is_converted(tmp_path):
    """As `c3d_affine_tool -ref FIXED -src MOVING flirt.mat -fsl2ras -oitk` does."""
    shape, affine = (9, 8, 7), np.diag([1.5, 1, 2, 1])  # of the moving image
    to_moving, to_fixed = fsl_mm(shape, affine), fsl_mm(SHAPE, AFFINE)
    path = tmp_path / "flirt.mat"
    path.write_text(rows(np.linalg.inv(np.linalg.inv(to_moving) @ TURN @ to_fixed)))
    with pytest.raises(ImageError, match="is not a readable ITK transform") as caught:
        read_transform(str(path), REFERENCE)
    assert "are converted with c3d_affine_tool" in caught.value.hint
    flirt = np.loadtxt(path)
    itk = save_as_itk(
        tmp_path / "itk.mat", to_moving @ np.linalg.inv(flirt) @ np.linalg.inv(to_fixed)
    )
    assert_moves_by(itk, TURN)


@pytest.mark.follows("convert it first, e.g. with mri_warp_convert, c3d_affine_tool or wb_command")
def test_an_lta_of_freesurfer_is_converted(tmp_path):
    """RAS to RAS, moving to fixed."""
    path = tmp_path / "t.lta"
    path.write_text(f"type = 1\nnxforms = 1\n1 4 4\n{rows(np.linalg.inv(TURN))}\n")
    with pytest.raises(UsageError, match="is no kind of transform that is known") as caught:
        read_transform(str(path), REFERENCE)
    assert "convert it first" in caught.value.hint
    lta = np.loadtxt(path.read_text().splitlines()[3:])
    assert_moves_by(save_as_itk(tmp_path / "itk.txt", np.linalg.inv(lta)), TURN)


@pytest.mark.follows("make it ITK's: lta_convert --inmni FILE --outitk OUT.txt")
def test_a_transform_of_minc_is_converted(tmp_path):
    """RAS mm, moving to fixed, as lta_convert reads it."""
    path = tmp_path / "talairach.xfm"
    path.write_text(
        "MNI Transform File\n% tal_avi\n\nTransform_Type = Linear;\nLinear_Transform =\n"
        f"{rows(np.linalg.inv(TURN)[:3])};\n"
    )
    with pytest.raises(ImageError, match="of MINC or FreeSurfer in RAS mm") as caught:
        read_transform(str(path), REFERENCE)
    assert "lta_convert --inmni FILE --outitk OUT.txt" in caught.value.hint
    lines = path.read_text().rstrip(";\n").splitlines()[-3:]
    xfm = np.vstack([np.loadtxt(lines), [0, 0, 0, 1]])
    assert_moves_by(save_as_itk(tmp_path / "itk.txt", np.linalg.inv(xfm)), TURN)
