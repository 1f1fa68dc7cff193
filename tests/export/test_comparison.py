"""The comparison of an export with its model."""

import numpy as np
import pytest

from keras_bnrnn.export import ExportMismatchError
from keras_bnrnn.export.comparison import gap, require_small


@pytest.mark.parametrize(
    ("expected", "found", "wanted"),
    [
        ([0.25, 0.5], [0.25, 0.25], 0.25),
        ([2.0, -4.0], [2.0, -3.0], 0.25),
        ([1, 2], [1, 3], 1.0),
        ([True], [True], 0.0),
        ([[1.0]], [1.0], np.inf),
        ([1.0], [np.nan], np.nan),
        (np.zeros([0, 2]), np.zeros([0, 2]), 0.0),
        (np.array([b"a"], object), np.array([b"b"], object), 1.0),
    ],
)
def test_gap(expected, found, wanted):
    np.testing.assert_equal(gap(np.array(expected), np.array(found)), wanted)


@pytest.mark.parametrize("bad", [0.2, np.inf, np.nan])
def test_require_small(bad):
    require_small({"a": 0.1, "b": 0.0}, 0.1, "file")
    with pytest.raises(ExportMismatchError, match=r"file must .* 0\.1\. .*output 'b'"):
        require_small({"a": 0.15, "b": bad, "c": 0.1}, 0.1, "file")
