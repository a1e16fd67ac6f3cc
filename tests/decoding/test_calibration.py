"""Reliability of confidences, by hand."""

import pytest

from isthmus.decoding.calibration import calibrate


def test_the_error_is_the_distance_between_sure_and_right() -> None:
    found = calibrate(
        [
            ([0.95, 0.95], [("go", "go"), ("left", "left")]),
            ([0.95, 0.95], [("go", "go"), ("on", "off")]),
            ([0.25], [("stop", "top"), ("now", "")]),
        ]
    )
    assert found is not None
    assert [(one.words, one.right) for one in found.bins] == [(1, 0.0), (4, 0.75)]
    assert found.error == pytest.approx((0.25 + 4 * 0.2) / 5)
    assert (found.words, found.skipped) == (5, 0)


def test_utterances_whose_words_were_cut_otherwise_are_counted_and_left_out() -> None:
    found = calibrate([([0.5], [("can", "can"), ("not", "not")]), ([1.0], [("go", "go")])])
    assert found is not None
    assert (found.words, found.skipped, found.error) == (1, 2, 0.0)
    assert calibrate([]) is None
