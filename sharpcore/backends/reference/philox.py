"""Counter-based random probes in plain PyTorch: the numbers are the same bits on every backend and device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sharpcore.errors import InvalidInput

# A kind's place in this list is its code, the two highest bits of the counter.
KINDS = ("rademacher", "normal", "sphere")
MOST_SEEDS = 2**63
MOST_PROBES = 2**32
MOST_ELEMENTS = 2**31

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 2**32 - 1

_ROOT_HALF = 0.7071067811865476
# ln(2) in two parts, of which the first times a small integer is exact.
_LN2_HIGH = float.fromhex("0x1.62e42fefa38p-1")
_LN2_LOW = float.fromhex("0x1.ef35793c7673p-45")
# Minimax polynomials in the square of the argument, fitted in 60 digits: 2 atanh(s) / s - 2 for |s| < 0.172
# (off by 2e-18), sin(pi t / 2) / t - pi / 2 (6e-18) and cos(pi t / 2) - 1 (6e-20) for |t| < 1/2, each divided
# by the square.
_LOG = (
    0.666666666666671,
    0.39999999999520114,
    0.2857142872920423,
    0.2222219910037862,
    0.18183570998444593,
    0.15313179277392916,
    0.14810362639819422,
)
_SIN = (
    -0.6459640975062453,
    0.07969262624607465,
    -0.004681754132695618,
    0.00016044115236531464,
    -3.5986459595301474e-06,
    5.633936132273839e-08,
)
_COS = (
    -1.2337005501361697,
    0.25366950790104714,
    -0.02086348076331817,
    0.0009192602742368791,
    -2.520203696171001e-05,
    4.7106122863704585e-07,
    -6.321258921032388e-09,
)


def philox_probes(
    kind: str,
    seed: int,
    sample_ids: Tensor,
    first: int,
    count: int,
    dimension: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Probes `first` to `first + count - 1` of each of B samples, made of nothing but their numbers.

    Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) turns a key and a counter into 128 random bits. The
    key is the seed, low word first; the counter's words are

    ====  ==========================================================================
    c0    30 bits: the block of elements; above them 2 bits: 0, 1, 2 for the kind
    c1    the probe
    c2    the low word of the sample's id
    c3    its high word
    ====  ==========================================================================

    so that an element depends on (kind, seed, sample id, probe, element) alone. With the words w0 ... w3 of a
    block b:

    - "rademacher": element 128 b + 32 j + i is -1 where bit i of w_j is set, else 1.
    - "normal": Box-Muller. u = (2 k + 1) / 2^53 of k = the upper 52 bits of (w1, w0) gives the radius r =
      sqrt(-2 log(u)), negated where bit 31 of w3 is set; t = (2 k + 1) / 2^53 - 1/2 of k = the 52 bits that
      follow the upper two of (w3, w2) gives c, s = r cos(pi t / 2), r sin(pi t / 2). Elements 2 b and 2 b + 1
      are c and s, or s and c where bit 30 of w3 is set. Magnitudes reach 8.57; none is zero.
    - "sphere": such normals times sqrt(d / sum of their squares), so that the norm is sqrt(d). The sum adds
      neighbours, then neighbouring sums, and so on, as if zeros filled the row up to a power of two.

    All is float64 in IEEE additions, products, quotients and square roots, in the order of this file and with
    none fused, and is rounded to `dtype` at the end (to 16 bits by way of float32, as PyTorch does).

    Args:
        kind: "rademacher", "normal" or "sphere".
        seed: 0 to 2^63 - 1.
        sample_ids: [B] int64, none negative, on any device.
        first, count: at least 0; their sum is at most 2^32.
        dimension: d, the elements of a probe, 1 to 2^31.
        dtype: a floating dtype.
        device: where the probes are made.

    Returns:
        [count, B, d] of `dtype` on `device`.

    Raises:
        InvalidInput: an argument is none of these.
    """
    check_probes(kind, seed, sample_ids, first, count, dimension, dtype)
    device = torch.device(device)
    elements = 128 if kind == "rademacher" else 2
    blocks = torch.arange(-(-dimension // elements), device=device) | KINDS.index(kind) << 30
    probes = torch.arange(first, first + count, device=device)[:, None, None]
    samples = sample_ids.to(device)[:, None]
    words = philox((blocks, probes, samples & _WORD, samples >> 32), (seed & _WORD, seed >> 32))
    if kind == "rademacher":
        bits = torch.stack(words, -1)[..., None] >> torch.arange(32, device=device) & 1
        return (1 - 2 * bits).flatten(2)[..., :dimension].to(dtype)
    values = torch.stack(box_muller(words), -1).flatten(2)[..., :dimension]
    if kind == "sphere":
        total = _sum_of_neighbours(values * values)
        # A number over a tensor would be a product with the reciprocal, which rounds twice.
        values = values * _sqrt(torch.full_like(total, dimension) / total)
    return values.to(dtype)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words for a counter of four and a key of two; words are int64 from 0 to
    2^32 - 1, tensors of them broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def box_muller(words: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers, float64, of four random words, as :func:`philox_probes`
    says."""
    w0, w1, w2, w3 = words
    u = _odd(w1 << 20 | w0 >> 12)
    t = _odd((w3 & 2**30 - 1) << 22 | w2 >> 10) - 0.5
    radius = _sqrt(-2 * log(u))
    radius = torch.where(w3 >> 31 != 0, -radius, radius)
    sine, cosine = sincos(t)
    swapped = w3 >> 30 & 1 != 0
    return radius * torch.where(swapped, sine, cosine), radius * torch.where(swapped, cosine, sine)


def log(u: Tensor) -> Tensor:
    """The logarithm of positive normal float64 numbers, within one unit in the last place.

    u = 2^e (1 + f), s = f / (2 + f): log(1 + f) = 2 atanh(s) = f - (f^2 / 2 - s (f^2 / 2 + R)).
    """
    m, e = torch.frexp(u)
    low = m < _ROOT_HALF
    f = torch.where(low, 2 * m, m) - 1
    exponent = (e - low.to(e.dtype)).to(u.dtype)
    s = f / (2 + f)
    z = s * s
    remainder = z * _polynomial(_LOG, z)
    half = 0.5 * f * f
    return exponent * _LN2_HIGH - ((half - (s * (half + remainder) + exponent * _LN2_LOW)) - f)


def sincos(t: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of pi t / 2 for |t| <= 1/2, float64, within two units in the last place."""
    z = t * t
    return t * (math.pi / 2 + z * _polynomial(_SIN, z)), 1 + z * _polynomial(_COS, z)


def check_probes(
    kind: str, seed: int, sample_ids: Tensor, first: int, count: int, dimension: int, dtype: torch.dtype
) -> None:
    """Raise InvalidInput where an argument of `philox_probes` is out of its range."""
    if kind not in KINDS:
        raise InvalidInput(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= seed < MOST_SEEDS:
        raise InvalidInput(f"seed: expected 0 to 2^63 - 1, got {seed}")
    if sample_ids.dim() != 1 or sample_ids.dtype != torch.int64:
        raise InvalidInput(f"sample_ids: expected int64 [B], got {sample_ids.dtype} {list(sample_ids.shape)}")
    if sample_ids.numel() and int(sample_ids.min()) < 0:
        raise InvalidInput(f"sample_ids: expected none below 0, got {int(sample_ids.min())}")
    if first < 0 or count < 0 or first + count > MOST_PROBES:
        raise InvalidInput(
            f"first, count: expected at least 0 and a sum of at most 2^32, got {first} and {count}"
        )
    if not 1 <= dimension <= MOST_ELEMENTS:
        raise InvalidInput(f"dimension: expected 1 to 2^31, got {dimension}")
    if not dtype.is_floating_point:
        raise InvalidInput(f"dtype: expected a floating dtype, got {dtype}")


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product, by halves of the multiplier: int64 does not overflow."""
    upper, lower = word * (multiplier >> 16), word * (multiplier & 0xFFFF)
    low = ((upper & 0xFFFF) << 16) + lower
    return (upper >> 16) + (low >> 32), low & _WORD


def _odd(bits: Tensor) -> Tensor:
    """(2 k + 1) / 2^53 of 52 bits: exact, never 0 or 1."""
    return (2 * bits + 1).to(torch.float64) * 2.0**-53


def _sqrt(x: Tensor) -> Tensor:
    """The IEEE square root. PyTorch's own on the CPU is that of MKL, one unit off for 1 in 75 numbers."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.is_cpu else torch.sqrt(x)


def _polynomial(coefficients: tuple[float, ...], z: Tensor) -> Tensor:
    total = z * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * z + coefficient
    return total


def _sum_of_neighbours(values: Tensor) -> Tensor:
    """[..., d] to [..., 1]."""
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., 0::2] + values[..., 1::2]
    return values
