"""Orthogonal matrices whose entries all have the same magnitude, as far as a size has one.

Sylvester's doubling and Paley's two constructions (1933) give Hadamard matrices, whose entries are
±1. For an odd factor of a size without one there is Hartley's matrix, ``cos + sin``, which is
orthogonal for every size.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def factor_matrices(size: int) -> tuple[Float64, Float64]:
    """Return two orthogonal matrices whose Kronecker product has this size, of orders as near to
    each other as there are: Hadamard matrices, normalised, where both sizes have one."""
    pairs = [(rows, size // rows) for rows in range(1, math.isqrt(size) + 1) if size % rows == 0]
    both = [pair for pair in pairs if all(_hadamard(order) is not None for order in pair)]
    return _normalised(*both[-1]) if both else _with_hartley(size)


def _normalised(rows: int, columns: int) -> tuple[Float64, Float64]:
    first, second = _hadamard(rows), _hadamard(columns)
    assert first is not None and second is not None
    return first / math.sqrt(rows), second / math.sqrt(columns)


def _with_hartley(size: int) -> tuple[Float64, Float64]:
    """Return Hartley's matrix of the odd factor, and Sylvester's of the rest."""
    even = size & -size
    odd = size // even
    angles = 2 * np.pi / odd * (np.outer(np.arange(odd), np.arange(odd)) % odd)
    hartley = (np.cos(angles) + np.sin(angles)) / math.sqrt(odd)
    sylvester = _hadamard(even)
    assert sylvester is not None
    return hartley, sylvester / math.sqrt(even)


@cache
def _hadamard(order: int) -> Float64 | None:
    """Return a matrix of ±1 with orthogonal rows; none where these constructions have none."""
    if order == 1:
        return np.ones((1, 1))
    if order == 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])
    if order % 4:
        return None
    if (half := _hadamard(order // 2)) is not None:
        return np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)
    if _is_prime(order - 1):
        return _paley_1(order - 1)
    prime = order // 2 - 1
    return _paley_2(prime) if prime % 4 == 1 and _is_prime(prime) else None


def _paley_1(prime: int) -> Float64:
    """``I + S`` of order ``prime + 1``, for primes 3 mod 4, with S skew."""
    skew = np.ones((prime + 1, prime + 1))
    skew[0, 0] = 0
    skew[1:, 0] = -1
    skew[1:, 1:] = _jacobsthal(prime)
    return skew + np.eye(prime + 1)


def _paley_2(prime: int) -> Float64:
    """Order ``2 (prime + 1)``, for primes 1 mod 4: 0 and ±1 of a symmetric conference matrix
    become blocks."""
    conference = np.ones((prime + 1, prime + 1))
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(prime)
    blocks = np.kron(conference, np.array([[1.0, 1.0], [1.0, -1.0]]))
    blocks += np.kron(np.eye(prime + 1), np.array([[1.0, -1.0], [-1.0, -1.0]]))
    return blocks


def _jacobsthal(prime: int) -> Float64:
    """``χ(row - column)``: 1 of squares, -1 of others, 0 of 0."""
    character = -np.ones(prime)
    character[np.arange(1, prime) ** 2 % prime] = 1
    character[0] = 0
    index = np.arange(prime)
    found: Float64 = character[(index[:, None] - index) % prime]
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, math.isqrt(number) + 1))
