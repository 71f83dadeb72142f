"""Standard errors and points left out, against least squares that is really done again, and what can't be told."""

from __future__ import annotations

import numpy as np
import pytest

from mist.calibration.uncertainty import changes_something, confounded, left_out, soft_l1_weights, standard_errors

RNG = np.random.default_rng(5)
GROUPS = [0, 0, 0, 1, 1, 2, 3, 3, 4]
#: the last row is a prior
ROWS = RNG.normal(size=(len(GROUPS) + 1, 2))
SEEN = RNG.normal(size=len(ROWS))
WEIGHTS = RNG.uniform(0.2, 1.0, len(ROWS))


def solved(rows: np.ndarray, seen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    roots = np.sqrt(weights)
    return np.asarray(np.linalg.lstsq(roots[:, None] * rows, roots * seen, rcond=None)[0])


def test_a_point_left_out_is_a_fit_without_all_of_its_rows() -> None:
    misfit = ROWS @ solved(ROWS, SEEN, WEIGHTS) - SEEN
    found = left_out(ROWS, misfit, WEIGHTS, GROUPS)
    for group in set(GROUPS):
        rest = np.array([*(g != group for g in GROUPS), True])
        without = solved(ROWS[rest], SEEN[rest], WEIGHTS[rest])
        expected = (ROWS @ without - SEEN)[~rest]
        assert found[np.flatnonzero(np.array(GROUPS) == group)] == pytest.approx(expected)


def test_a_point_that_alone_tells_a_constant_is_not_predicted_without_it() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    found = left_out(rows, np.array([0.1, -0.1, 0.0]), np.ones(3), [0, 1, 2])
    assert np.isnan(found).tolist() == [False, False, True]


def test_standard_errors_are_those_of_weighted_least_squares() -> None:
    misfit = ROWS @ solved(ROWS, SEEN, WEIGHTS) - SEEN
    variance = np.sum(WEIGHTS * misfit**2) / (len(ROWS) - 2)
    expected = np.sqrt(np.diag(np.linalg.inv(ROWS.T @ np.diag(WEIGHTS) @ ROWS)) * variance)
    assert standard_errors(ROWS, misfit, WEIGHTS) == pytest.approx(expected)


def test_what_the_rows_do_not_tell_has_no_standard_error() -> None:
    ones, zeros = np.ones(4), np.zeros(4)
    slope = np.arange(4.0)
    rows, misfit = np.stack((ones, zeros, slope, 2 * slope), axis=1), np.full(4, 0.1)
    assert changes_something(rows).tolist() == [True, False, True, True]
    assert np.isnan(standard_errors(rows[:, :3], misfit, ones)).tolist() == [False, True, False]
    assert [(i, j) for i, j, _ in confounded(rows, ones)] == [(3, 2)]
    more = np.concatenate((rows, rows))
    assert np.isnan(standard_errors(more, np.full(8, 0.1), np.ones(8))).tolist() == [False, True, True, True]
    assert np.isnan(standard_errors(rows[:2, :2], misfit[:2], ones[:2])).all()


def test_weights_are_the_slope_of_the_loss() -> None:
    def loss(squared: np.ndarray) -> np.ndarray:
        return np.asarray(2 * (np.sqrt(1 + squared) - 1))

    misfit, scale = np.array([0.0, 0.05, 0.1, 3.0]), 0.1
    squared = (misfit / scale) ** 2
    slope = (loss(squared + 1e-6) - loss(squared)) / 1e-6
    assert soft_l1_weights(misfit, scale) == pytest.approx(slope, rel=1e-4)
