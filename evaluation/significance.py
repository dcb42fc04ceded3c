"""When a difference is more than noise, whose size is itself known from a few blocks of images only."""

import functools
import math

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)  # of Gauss' quadrature over [-1, 1]
NUM_HALVINGS = 100


def student_tail(t: float, degrees_of_freedom: int) -> float:
    """Probability that a value of Student's t distribution is above t, for t ≥ 0, also far out: the integral of
    sin(u)^(dof - 1) up to arctan(sqrt(dof) / t), which is the tail after u = arctan(sqrt(dof) / x), by Gauss' quadrature."""
    end = math.atan2(math.sqrt(degrees_of_freedom), t)
    integral = end / 2 * float(WEIGHTS @ np.sin(end / 2 * (NODES + 1)) ** (degrees_of_freedom - 1))
    factor = math.lgamma((degrees_of_freedom + 1) / 2) - math.lgamma(degrees_of_freedom / 2)
    return math.exp(factor) / math.sqrt(math.pi) * integral


@functools.lru_cache(maxsize=1024)
def threshold_among(num_earlier: int, threshold: float, degrees_of_freedom: int) -> float:
    """Standard errors that count as worse than the best of several: the best of many noisy values is better than they are, and without
    this the false flags would grow with the history. By Bonferroni's bound they stay as rare as for one earlier value.

    Args:
        num_earlier: values that are compared with, at least 1.
        threshold: standard errors that count where there is one.
        degrees_of_freedom: of the standard error of a difference.
    """
    rarity = student_tail(threshold, degrees_of_freedom) / num_earlier
    low, high = threshold, threshold + 1.0
    while student_tail(high, degrees_of_freedom) > rarity:
        low, high = high, 2.0 * high
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if student_tail(middle, degrees_of_freedom) > rarity else (low, middle)
    return high if num_earlier > 1 else threshold
