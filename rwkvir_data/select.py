"""Which pictures of a score table become a training set: filters, duplicates, balance, split (SPEC section 4).

Pure functions on the table; no picture is read. A mask or an array of reasons has one entry a row of the table.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SPLITS = ("train", "val", "test")
KINDS = ("real", "synthetic")
MAX_SLUG = 200  # a file system allows names of 255 bytes, and sub-images and extensions add to them


@dataclass(frozen=True)
class Criteria:
    """What `select` keeps. Defaults of sizes, filters and counts are SPEC's."""

    min_side: int = 800  # pixels; height and width
    blur: tuple[float, ...] = (150, 8000)  # variance of the Laplacian, from and to
    max_flat: float = 0.5  # share of flat patches
    distance: int | None = 6  # bits by which the perceptual hashes of duplicates may differ; None keeps duplicates
    balance: bool = True  # equal numbers below and above zero complexity, in each source
    total: int = 12_000
    synthetic: float = 0.25  # share of synthetic pictures in the total
    targets: Mapping[str, int] = field(default_factory=dict)  # pictures per source, in place of total and synthetic
    shuffle: bool = True  # walk in an order drawn from the seed, else in the table's
    val: float = 0.02  # share of each half of each source
    test: float = 0.02
    seed: int = 0


def select(
    table: pa.Table, criteria: Criteria, benchmarks: Mapping[str, int] | None = None
) -> tuple[pa.Table, list[str]]:
    """The score table with the columns `dropped` (a reason or null), `split` (of what is kept) and `key`.

    Args:
        table: scores; see `resyn score`. Rows that are dropped there stay so.
        benchmarks: perceptual hashes, as 64-bit numbers, of pictures that must not be in the set, by their names.

    Returns:
        The table, in its order, and sentences about what was wanted and is missing.

    Raises:
        ValueError: `criteria.targets` does not name the table's sources.
    """
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    dropped = columns["dropped"].astype(object)
    _merge(dropped, filtered(columns, criteria))
    if criteria.distance is not None:
        hashes = np.array([int(text, 16) if text else 0 for text in columns["phash"]], np.uint64)
        _merge(dropped, leaks(hashes, _alive(dropped), benchmarks or {}, criteria.distance))
        _merge(dropped, duplicates(columns, hashes, _alive(dropped), criteria.distance))

    walk = np.arange(len(table))
    if criteria.shuffle:
        np.random.default_rng(criteria.seed).shuffle(walk)
    walk = walk[_alive(dropped)[walk]]
    kinds = dict(zip(columns["source"], columns["kind"], strict=True))
    rows = {source: walk[columns["source"][walk] == source] for source in kinds}
    is_above = columns["complexity"].astype(float) >= 0
    halves = {source: (int(np.sum(~is_above[rows[source]])), int(np.sum(is_above[rows[source]]))) for source in kinds}
    counts, missing = quotas(halves, kinds, criteria)

    splits = np.full(len(table), None, object)
    for source, count in counts.items():
        for half in _take(rows[source], is_above, count, criteria.balance):
            splits[half] = split_names(len(half), criteria.val, criteria.test)
    dropped[_alive(dropped) & (splits == None)] = "surplus"  # noqa: E711  elementwise
    for name, values in (("dropped", dropped), ("split", splits), ("key", keys(columns["source"], columns["name"]))):
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, pa.array(values, pa.string()))
    return table, missing


def filtered(columns: Mapping[str, np.ndarray], criteria: Criteria) -> np.ndarray:
    """Why a picture fails the filters, or None: 'small', 'blurred', 'sharp', 'flat'; the first that holds."""
    reasons = np.full(len(columns["width"]), None, object)
    side = np.minimum(columns["width"].astype(float), columns["height"].astype(float))
    blur = columns["blur"].astype(float)
    reasons[columns["flatness"].astype(float) > criteria.max_flat] = "flat"
    reasons[blur > criteria.blur[1]] = "sharp"
    reasons[blur < criteria.blur[0]] = "blurred"
    reasons[side < criteria.min_side] = "small"
    return reasons


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Index pairs (P, 2), i < j in each, of the different (N,) uint64 hashes that differ in at most `distance` bits.

    The bits are cut into distance + 1 bands. Two such hashes agree in one of them (pigeonhole), so only those that
    share a band are compared: they are neighbours once the hashes are sorted by that band.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(np.linspace(0, 64, distance + 2).astype(np.uint64)):
        band = (hashes >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, ordered = band[order], hashes[order]
        left, step = np.arange(len(hashes)), 0
        while left.size:  # those that still have a neighbour of the same band, `step` places further on
            step += 1
            left = left[left + step < len(hashes)]
            left = left[band[left] == band[left + step]]
            close = left[np.bitwise_count(ordered[left] ^ ordered[left + step]) <= distance]
            pairs.append(np.sort(np.stack([order[close], order[close + step]], axis=1)))
    return np.unique(np.concatenate(pairs), axis=0)


def duplicates(columns: Mapping[str, np.ndarray], hashes: np.ndarray, alive: np.ndarray, distance: int) -> np.ndarray:
    """'duplicate of SOURCE/NAME' for each of the `alive` rows that is close to one that is kept.

    Of two close pictures the one of more pixels is kept, then the one of more bytes, then the first in the table.
    """
    rows = np.flatnonzero(alive)
    pixels = columns["width"][rows].astype(float) * columns["height"][rows].astype(float)
    rows = rows[np.lexsort((rows, -columns["bytes"][rows].astype(float), -pixels))]  # the best first
    values, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
    by_rank = np.argsort(first)  # distinct hashes, each in the place of its best picture
    closer: dict[int, list[int]] = {}  # rank: ranks before it that are close to it
    for better, worse in near_pairs(values[by_rank], distance):
        closer.setdefault(worse, []).append(better)
    keeper = np.arange(len(values))  # rank: the rank that is kept for it
    for worse in sorted(closer):
        keeper[worse] = next((better for better in sorted(closer[worse]) if keeper[better] == better), worse)
    rank = np.empty_like(by_rank)
    rank[by_rank] = np.arange(len(by_rank))
    kept = rows[first[by_rank[keeper[rank[group]]]]]  # for each of `rows`, the row that stands for it
    reasons = np.full(len(alive), None, object)
    for row, keep in zip(rows, kept, strict=True):
        if row != keep:
            reasons[row] = f"duplicate of {columns['source'][keep]}/{columns['name'][keep]}"
    return reasons


def leaks(hashes: np.ndarray, alive: np.ndarray, benchmarks: Mapping[str, int], distance: int) -> np.ndarray:
    """'leak: NAME' for each of the `alive` rows that is close to the benchmark picture NAME."""
    rows, names = np.flatnonzero(alive), list(benchmarks)
    both = np.concatenate([np.array(list(benchmarks.values()), np.uint64), hashes[rows]])
    values, group = np.unique(both, return_inverse=True)
    name_of = {group[index]: names[index] for index in reversed(range(len(names)))}  # of a distinct hash
    leaked = dict(name_of)
    for pair in near_pairs(values, distance):
        for near, far in (pair, pair[::-1]):
            if near in name_of:
                leaked.setdefault(far, name_of[near])
    reasons = np.full(len(alive), None, object)
    for row, value in zip(rows, group[len(names) :], strict=True):
        if value in leaked:
            reasons[row] = f"leak: {leaked[value]}"
    return reasons


def quotas(
    halves: Mapping[str, tuple[int, int]], kinds: Mapping[str, str], criteria: Criteria
) -> tuple[dict[str, int], list[str]]:
    """How many pictures to take of each source, and sentences about what is missing.

    `halves` counts each source's pictures below and above zero, `kinds` says which kind a source is of. A source has
    room for twice its smaller half, or for all with no balance. Without targets, the total shrinks until both kinds
    can keep their shares (a kind with no room at all is left out), and a kind's pictures are divided over its sources
    in proportion to their room. With balance the counts are even.
    """
    step = 2 if criteria.balance else 1
    room = {
        source: 2 * min(below, above) if criteria.balance else below + above
        for source, (below, above) in halves.items()
    }
    if criteria.targets:
        if set(criteria.targets) != set(halves):
            raise ValueError(
                f"--target names {', '.join(sorted(criteria.targets))}, but the table's sources are "
                f"{', '.join(halves)}; give a count for each of them, 0 for none."
            )
        counts = {source: min(count, room[source]) // step * step for source, count in criteria.targets.items()}
        return counts, [
            _missing(f"source {source}", criteria.targets[source], count, [source], halves)
            for source, count in counts.items()
            if count < criteria.targets[source]
        ]

    shares = {"real": 1 - criteria.synthetic, "synthetic": criteria.synthetic}
    members = {kind: [source for source in halves if kinds[source] == kind] for kind in KINDS}
    has = {kind: sum(room[source] for source in members[kind]) for kind in KINDS}
    wants = {kind: round(criteria.total * shares[kind]) for kind in KINDS}
    scale = min([1.0, *(has[kind] / wants[kind] for kind in KINDS if wants[kind] and has[kind])])
    counts, missing = {}, []
    for kind in KINDS:
        taken = _divide(round(wants[kind] * scale) if has[kind] else 0, {s: room[s] for s in members[kind]}, step)
        counts.update(taken)
        number = sum(taken.values())
        if number < wants[kind]:
            missing.append(_missing(f"{kind} pictures", wants[kind], number, members[kind], halves))
        if number < min(wants[kind], has[kind]) // step * step:
            missing[-1] += " The rest is left out to keep the share of the other kind; see --synthetic."
    return counts, missing


def split_names(count: int, val: float, test: float) -> list[str]:
    """The splits of `count` pictures of one half of a source, in the order of the walk: test, val, then train.

    A share is rounded up, so that a small source has a picture in each split, but takes a third at most.
    """
    tests, vals = (min(int(np.ceil(share * count)), count // 3) for share in (test, val))
    return ["test"] * tests + ["val"] * vals + ["train"] * (count - tests - vals)


def keys(sources: Iterable[str], names: Iterable[str]) -> list[str]:
    """A key for each picture, SOURCE_NAME without extension, in letters that LMDBs of BasicSR and file systems allow.

    Pictures whose keys would be equal, or too long, have the beginning of a hash of their names added.
    """
    full = [f"{source}/{name}" for source, name in zip(sources, names, strict=True)]
    slugs = [re.sub(r"[^A-Za-z0-9_-]+", "-", re.sub(r"\.[^./]*$", "", text).replace("/", "_")) for text in full]
    counts = Counter(slug.lower() for slug in slugs)
    return [
        slug
        if counts[slug.lower()] == 1 and len(slug) <= MAX_SLUG
        else f"{slug[:MAX_SLUG]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        for slug, text in zip(slugs, full, strict=True)
    ]


def _merge(dropped: np.ndarray, reasons: np.ndarray) -> None:
    """Enter reasons where there is none yet."""
    alive = _alive(dropped)
    dropped[alive] = reasons[alive]


def _alive(dropped: np.ndarray) -> np.ndarray:
    return np.array([reason is None for reason in dropped], bool)


def _take(rows: np.ndarray, is_above: np.ndarray, count: int, balance: bool) -> list[np.ndarray]:
    """What is kept of a source, below zero and above: each half takes rows, as they come, while it has room."""
    if not balance:
        rows = rows[:count]
    below, above = rows[~is_above[rows]], rows[is_above[rows]]
    return [below[: count // 2], above[: count // 2]] if balance else [below, above]


def _divide(count: int, room: Mapping[str, int], step: int) -> dict[str, int]:
    """`count` divided in proportion to `room`, in multiples of `step`; the largest remainders are rounded up."""
    exact = {source: count * free / max(sum(room.values()), 1) / step for source, free in room.items()}
    counts = {source: int(share) * step for source, share in exact.items()}
    by_remainder = sorted(room, key=lambda source: int(exact[source]) - exact[source])
    for source in by_remainder[: (count - sum(counts.values())) // step]:
        counts[source] += step
    return counts


def _missing(what: str, wanted: int, taken: int, sources: list[str], halves: Mapping) -> str:
    """A sentence about a shortfall, with what the sources have."""
    has = "; ".join(f"{s} has {halves[s][0]} below and {halves[s][1]} above zero" for s in sources)
    return f"{what}: {taken} of {wanted} wanted ({has or 'there is no such source'})."


def reasons(table: pa.Table) -> pa.ChunkedArray:
    """The first word of why each row is dropped: 'small', 'duplicate', 'leak', 'unreadable', ..., or null."""
    return pc.replace_substring_regex(table["dropped"], r"(?s):? .*", "")


def tally(table: pa.Table) -> list[list]:
    """How many pictures each source has, and loses to each reason, and gives to each split: a header, a row per
    source, and their sum. The table may be one that `select` returned or, without splits, of scores."""
    has_splits = "split" in table.column_names
    fate = pc.coalesce(reasons(table), table["split"]) if has_splits else reasons(table)
    grouped = pa.table({"source": table["source"], "fate": fate}).group_by(["source", "fate"], use_threads=False)
    fates: dict[str, Counter] = {}
    for row in grouped.aggregate([([], "count_all")]).to_pylist():
        fates.setdefault(row["source"], Counter()).update({"pictures": row["count_all"], row["fate"]: row["count_all"]})
    fates["all"] = sum(fates.values(), Counter())
    lost = sorted(set(fates["all"]) - {"pictures", None, *SPLITS})
    header = ["pictures", *lost, *(SPLITS if has_splits else [])]
    return [["source", *header]] + [[source, *(counts[what] for what in header)] for source, counts in fates.items()]
