"""Errors of what other libraries send in place of float32, beside those of funcavg's wires.

As a script it prints two tables: the error of one code, of three kinds of numbers; and the error of the mean of N
ranks. Ours is measured through `funcavg.average` over threads, which count as hosts. The others' codecs are written
anew here, from what their sources do:

- PCCL, `ccoip/src/cpp/quantize_kernels.cpp` and `reduce.cpp` (github.com/PrimeIntellect-ai/pccl): one range, from the
  least number to the largest, for all that a rank sends to the next one of a ring; cut to 8 bits by truncation; encoded
  anew at each hop.
- prime and hivemind, `hivemind/compression/quantization.py` (github.com/learning-at-home/hivemind; prime has it in
  C++): 256 bins within three standard deviations of the mean, and beside them the mean of what fell into each. prime
  sends them around a ring; here, too.
- torchft, `torchft/quantization.py` (github.com/meta-pytorch/torchft): a scale for each row, here of 1024 numbers, and
  int8 by truncation where a GPU has no 8-bit floats. The owner of a row sums, and encodes once.
- Streaming DiLoCo (arxiv.org/abs/2501.18512): E3M0, a sign and three bits of exponent; sums in float32. That blocks of
  256 have the scale of their largest number, and that sums are not encoded again, is chosen here.

Errors are energies: NMSE = ||Q(x) - x||² / ||x||².
"""

import argparse

import numpy as np

from funcavg import average
from funcavg.testing import run_ranks

LENGTH, SIZES = 1 << 17, (2, 8, 32)
WIRES = ("bfloat16", "int8", "int4", "int2")
OURS = {wire: f"funcavg, {wire}" for wire in WIRES}
BYTES = {"bfloat16": 2, "int8": 1 + 4 / 256, "int4": 1 / 2 + 4 / 1024, "int2": 1 / 4 + 4 / 1024}  # of an element
PCCL, PRIME, TORCHFT, STREAMING = "PCCL, min-max", "prime and hivemind, 256 bins", "torchft, int8", "E3M0"
ROW, BLOCK = 1024, 256


def drawn(kind, draw, length):
    """Return numbers of a kind."""
    if kind == "Gauss":
        return draw.standard_normal(length)
    if kind == "Laplace":
        return draw.laplace(size=length)
    rows = draw.standard_t(3, (length // ROW, ROW))  # of unlike scales, as leaves in one buffer are
    return (rows * np.exp(draw.standard_normal((len(rows), 1)))).ravel()


KINDS = ("Gauss", "Laplace", "t3 rows")

# Codecs, as what they leave of a vector


def within_one_range(numbers):
    """PCCL's: 8 bits from the least number to the largest."""
    low, high = numbers.min(), numbers.max()
    step = (high - low) / 255 or 1.0
    return np.trunc((numbers - low) / step) * step + low


def in_bins(numbers):
    """Hivemind's: the mean of all numbers in the same one of 256 bins."""
    step = 6 * numbers.std(ddof=1) / 256
    bins = np.clip(np.rint((numbers - numbers.mean()) / step) + 128, 0, 255).astype(np.int64)
    return (np.bincount(bins, numbers, 256) / np.maximum(np.bincount(bins, minlength=256), 1))[bins]


def in_rows(numbers):
    """Torchft's: a scale for each row, and integers by truncation."""
    rows = numbers.reshape(-1, ROW)
    scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-300) / 127
    return (np.trunc(rows / scales) * scales).ravel()


def as_powers(numbers):
    """Streaming DiLoCo's: the nearest of 0 and eight powers of two, of either sign."""
    blocks = numbers.reshape(-1, BLOCK)
    largest = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), 1e-300)
    levels = np.concatenate([[0.0], 2.0 ** np.arange(-7, 1)])
    index = np.searchsorted((levels[1:] + levels[:-1]) / 2, np.abs(blocks) / largest)
    return (np.sign(blocks) * levels[index] * largest).ravel()


# Means, as each of these libraries takes them


def around_a_ring(codec, ranks):
    """Return the mean: of each chunk the sum goes around, encoded at each hop, and at the end once more for all."""
    means = []
    for first, chunks in enumerate(zip(*(np.array_split(numbers, len(ranks)) for numbers in ranks), strict=True)):
        total = chunks[first]
        for hop in range(1, len(ranks)):
            total = codec(total) + chunks[(first + hop) % len(ranks)]
        means.append(codec(total / len(ranks)))
    return np.concatenate(means)


def by_owners(codec, ranks):
    """Return the mean: what each rank sends is encoded once, and the mean once more."""
    return codec(np.mean([codec(numbers) for numbers in ranks], axis=0))


def gathered(codec, ranks):
    """Return the mean of codes, as it is."""
    return np.mean([codec(numbers) for numbers in ranks], axis=0)


def over_a_wire(wire, ranks):
    """Return what `funcavg.average` returns."""
    trees = [numbers.astype(np.float32) for numbers in ranks]
    return run_ranks(len(trees), lambda group: average(trees[group.rank], group, wire=wire), timeout=300)[0]


def through_a_wire(wire, numbers):
    """Return what one code leaves of a vector.

    Rank 0 owns the first half of a mean that is its own numbers, for rank 1 has weight 0: so of these nothing is
    encoded but the mean.
    """
    padded = np.concatenate([numbers, np.zeros_like(numbers)]).astype(np.float32)

    def run(group):
        return average(padded, group, weight=float(group.rank == 0), wire=wire)

    return run_ranks(2, run)[1][: len(numbers)]


PEERS = {  # name: bytes of an element, codec, how a mean is taken
    PCCL: (1, within_one_range, around_a_ring),
    PRIME: (1, in_bins, around_a_ring),
    TORCHFT: (1 + 4 / ROW, in_rows, by_owners),
    STREAMING: (1 / 2 + 4 / BLOCK, as_powers, gathered),
}


def nmse(found, exact):
    """Return the energy of an error, relative to what it is the error of."""
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def errors_of_one_code(length=LENGTH, seed=0):
    """Return {name: {kind: error}}."""
    draw = np.random.default_rng(seed)
    numbers = {kind: drawn(kind, draw, length) for kind in KINDS}
    found = {name: {kind: nmse(codec(x), x) for kind, x in numbers.items()} for name, (_, codec, _) in PEERS.items()}
    ours = {
        OURS[wire]: {kind: nmse(through_a_wire(wire, x), x.astype(np.float32)) for kind, x in numbers.items()}
        for wire in WIRES
    }
    return ours | found


def errors_of_means(length=LENGTH, seed=0, sizes=SIZES, kind="Gauss"):
    """Return {name: {size: error}}."""
    draw = np.random.default_rng(seed)
    found = {name: {} for name in [*OURS.values(), *PEERS]}
    for size in sizes:
        ranks = [drawn(kind, draw, length) for _ in range(size)]
        exact = np.mean(ranks, axis=0)
        for wire, name in OURS.items():
            found[name][size] = nmse(over_a_wire(wire, ranks), exact)
        for name, (_, codec, mean) in PEERS.items():
            found[name][size] = nmse(mean(codec, ranks), exact)
    return found


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=LENGTH, help=f"numbers of a rank (default: {LENGTH})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    nbytes = {name: BYTES[wire] for wire, name in OURS.items()} | {name: peer[0] for name, peer in PEERS.items()}
    one = errors_of_one_code(args.length, args.seed)
    means = {kind: errors_of_means(args.length, args.seed, kind=kind) for kind in ("Gauss", "t3 rows")}
    columns = [(kind, size) for kind in means for size in SIZES]
    print(f"| one code | bytes an element | {' | '.join(KINDS)} |\n|---|--:|{'--:|' * len(KINDS)}")
    for name, found in one.items():
        print(f"| {name} | {nbytes[name]:.3f} | {' | '.join(f'{found[kind]:.1e}' for kind in KINDS)} |")
    print(f"\n| mean | {' | '.join(f'{kind}, N = {size}' for kind, size in columns)} |\n|---|{'--:|' * len(columns)}")
    for name in one:
        print(f"| {name} | {' | '.join(f'{means[kind][name][size]:.1e}' for kind, size in columns)} |")


if __name__ == "__main__":
    main()
