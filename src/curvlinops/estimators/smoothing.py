"""How far a Gauss rule resolves a spectrum, and how well random vectors measure it."""

from __future__ import annotations

import numpy as np
from scipy.special import betainc, logsumexp


def node_spacing(
    nodes: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return how far the mass of a Gauss rule's nodes may really be spread.

    .. math::
        s_j = \frac{\pi}{\sqrt 3} \left(\sum_{k \neq j} \frac{e_k^2}{e_j^2}
        \frac{1}{(\theta_j - \theta_k)^2}\right)^{-1/2},
        \quad e_j^2 \propto \frac{1}{w_j \prod_{k \neq j} (\theta_j - \theta_k)^2}

    with the last entries :math:`e_j` of the tridiagonal matrix's eigenvectors, to which
    the residuals of the nodes are proportional. It is where the Christoffel function
    :math:`1 / \sum_k \ell_k^2 / w_k` falls off beside a node, scaled: the distance of
    the nodes where they are regular, and zero where a node has converged to an
    eigenvalue. It is cut off at the distance to the neighbours, and raised so that it
    falls by at most a quarter of the distance.

    Parameters
    ----------
    nodes, weights : numpy.ndarray
        One rule, of shape ``(m,)``.

    Returns
    -------
    tuple of numpy.ndarray
        Different nodes, ascending, and the spacing there. It is zero where the rule
        ended in an invariant subspace, as weightless nodes show: that is exact.
    """
    order = np.argsort(nodes)
    x, w = nodes[order], weights[order]
    first = np.append(True, np.diff(x) > 1e-13 * np.abs(x).max())
    w = np.add.reduceat(w, np.flatnonzero(first))
    x, w = x[first][w > 0], w[w > 0]
    if len(x) < 2 or weights[-1] == 0:
        return x, np.zeros(len(x))
    distances = np.abs(x[:, None] - x)
    logs = np.log(distances + np.eye(len(x)))
    last = -2 * logs.sum(1) - np.log(np.maximum(w, 1e-30))  # below is rounding
    terms = last - last[:, None] - 2 * logs
    np.fill_diagonal(terms, -np.inf)
    gaps = np.diff(x)
    gap = np.maximum(np.append(gaps, 0.0), np.append(0.0, gaps))
    spread = np.log(np.pi / np.sqrt(3)) - logsumexp(terms, axis=1) / 2
    spacing = np.exp(np.minimum(spread, np.log(gap)))
    return x, np.max(spacing - distances / 4, axis=1)


def beta_means(
    part: np.ndarray, count: float, tails: tuple[float, ...]
) -> list[np.ndarray]:
    """Return the means for which what was seen lies at quantiles of its distribution.

    Parameters
    ----------
    part : numpy.ndarray
        What was seen: drawn from a beta distribution, in [0, 1].
    count : float
        Sum of that distribution's parameters: it has the variance
        ``mean * (1 - mean) / (count + 1)``.
    tails : tuple of float
        Probabilities of something smaller.

    Returns
    -------
    list of numpy.ndarray
        One mean for each tail, found by bisection to 1e-15.

    Examples
    --------
    >>> from scipy.stats import beta
    >>> (mean,) = beta_means(np.array([0.3]), 10.0, (0.9,))
    >>> bool(np.isclose(beta(10 * mean, 10 * (1 - mean)).cdf(0.3), 0.9))
    True
    """
    means = []
    for tail in tails:
        low, high = np.zeros_like(part), np.ones_like(part)
        for _ in range(50):
            middle = (low + high) / 2
            above = betainc(count * middle, count * (1 - middle), part) > tail
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        means.append(low)
    return means
