"""HD95 against DeepMind's own package, and by hand."""

import numpy as np
import pytest
import surface_distance
from scipy.ndimage import gaussian_filter
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

from _support.arrays import assert_arrays_close
from _support.tolerances import TOL
from ulae_rt.evaluation.surface import _areas, hd95_per_label

SPACINGS = [(1.0, 1.0, 1.0), (1.0, 1.3, 2.0), (0.7, 2.0, 0.9)]
# It is older than the SciPy that runs it.
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")


def blobs(seed, shape=(17, 14, 19), labels=4):
    """A label map without background: every label has ragged surfaces, on the border too."""
    random = np.random.default_rng(seed)
    fields = [gaussian_filter(random.standard_normal(shape), 1.5) for _ in range(labels)]
    return np.argmax(fields, axis=0) + 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_areas_are_those_of_the_published_table(spacing):
    expected = create_table_neighbour_code_to_surface_area(spacing)
    assert_arrays_close("areas", _areas(spacing), expected, TOL["measure float64"])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_agrees_with_the_published_code(spacing):
    x, y = blobs(0), blobs(1)
    found = hd95_per_label(x, y, [1, 2, 3, 4], spacing)
    for label, value in found.items():
        distances = surface_distance.compute_surface_distances(x == label, y == label, spacing)
        expected = surface_distance.compute_robust_hausdorff(distances, 95.0)
        assert_arrays_close(f"HD95 of {label}", value, expected, TOL["measure float64"])
        assert value > 1


def test_by_hand():
    x = np.zeros((12, 9, 9), int)
    x[2:5, 3:6, 3:6] = 7
    assert hd95_per_label(x, x, [7]) == {7: 0.0}
    y = np.roll(x, 4, axis=0)
    # Beyond 1/9 of either cube's area lie more than 5 % at the full 4 voxels of 1.5 mm.
    assert hd95_per_label(x, y, [7], (1.5, 1.0, 1.0)) == {7: 6.0}


def test_a_speck_of_less_than_five_percent_does_not_count():
    x = np.zeros((40, 12, 12), int)
    x[1:11, 1:11, 1:11] = 1
    y = x.copy()
    y[30, 5, 5] = 1
    assert hd95_per_label(x, y, [1]) == {1: 0.0}
    y[28:34, 3:9, 3:9] = 1
    assert hd95_per_label(x, y, [1])[1] > 17


def test_a_label_that_one_map_lacks_has_no_distance():
    x = np.array([[[0, 1], [2, 2]]])
    found = hd95_per_label(x, np.where(x == 1, 0, x), [1, 2, 5])
    assert found[2] == 0
    assert np.isnan(found[1])
    assert np.isnan(found[5])
