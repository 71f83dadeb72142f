"""How well a fit knows its constants: standard errors, constants that look alike, points left out.

After the fit, from the Jacobian and the residuals at its solution, both without the robust loss's weights, which are
given once for both. It runs no simulation and changes no constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: correlation of two constants beyond which the data can't tell them apart
CONFOUNDED = 0.95
#: length of a column of the Jacobian below which its constant changes nothing
_NOTHING = 1e-6
#: singular values below this share of the largest are differences' noise
_SINGULAR = 1e-9


def soft_l1_weights(residuals: FloatArray, scale: float) -> FloatArray:
    """float64[rows]: what multiplies each squared residual, (1 + (r / scale)^2)^(-1/2), the loss's derivative.

    Of the loss 2 ((1 + z)^(1/2) - 1) with z = (r / scale)^2 (Triggs et al., Bundle Adjustment, 2000).
    """
    weights: FloatArray = 1.0 / np.sqrt(1.0 + (residuals / scale) ** 2)
    return weights


def changes_something(jacobian: FloatArray) -> npt.NDArray[np.bool_]:
    """bool[constants]: whether any of these rows, which are data, depends on a constant."""
    return np.asarray(np.linalg.norm(jacobian, axis=0) >= _NOTHING)


def standard_errors(jacobian: FloatArray, residuals: FloatArray, weights: FloatArray) -> FloatArray:
    """float64[constants] sqrt(diag(s^2 (J^T W J)^-1)) of weighted least squares; rows are data only, no priors.

    NaN for what these rows can't tell: a constant that changes nothing, or only what another changes too, and all where
    there are no more rows than constants.
    """
    rows, size = jacobian.shape
    inverse, told = _inverse(jacobian, weights)
    if rows <= size:
        return np.full(size, np.nan)
    variance = float(weights @ residuals**2) / (rows - size)
    return np.where(told, np.sqrt(np.diag(inverse) * variance), np.nan)


def confounded(jacobian: FloatArray, weights: FloatArray) -> list[tuple[int, int, float]]:
    """Pairs (later, earlier) of constants that these rows can't tell apart, with the correlation of their estimates."""
    inverse, _ = _inverse(jacobian, weights)
    deviations = np.sqrt(np.maximum(np.diag(inverse), 0.0))
    found = []
    for i in range(len(deviations)):
        for j in range(i):
            product = deviations[i] * deviations[j]
            if product > 0 and abs(correlation := float(inverse[i, j] / product)) > CONFOUNDED:
                found.append((i, j, correlation))
    return found


def _inverse(jacobian: FloatArray, weights: FloatArray) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """(J^T W J)^-1, pseudo where it is singular, and bool[constants]: which have no part in what is singular."""
    weighted = np.where(changes_something(jacobian), np.sqrt(weights)[:, None] * jacobian, 0.0)
    inverse = np.linalg.pinv(weighted, rcond=_SINGULAR)
    return inverse @ inverse.T, np.diag(inverse @ weighted) > 1.0 - _NOTHING


def left_out(jacobian: FloatArray, residuals: FloatArray, weights: FloatArray, groups: Sequence[int]) -> FloatArray:
    """float64[len(groups)] residuals of the first rows, each as predicted by a fit without its whole group.

    (I - H_gg)^-1 r_g with the hat matrix H of all rows, those of priors at the end too: PRESS (Allen, Technometrics 16,
    1974) in blocks, exact for a linear model. NaN where only the group itself tells a constant.
    """
    roots = np.sqrt(weights)
    weighted, off = roots[:, None] * jacobian, roots * residuals
    hat = weighted @ np.linalg.pinv(weighted)
    found = np.full(len(groups), np.nan)
    group_of = np.array(groups)
    for group in dict.fromkeys(groups):
        rows = np.flatnonzero(group_of == group)
        rest = np.eye(len(rows)) - hat[np.ix_(rows, rows)]
        if np.linalg.eigvalsh((rest + rest.T) / 2)[0] > _NOTHING:
            found[rows] = np.linalg.solve(rest, off[rows]) / roots[rows]
    return found
