from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from rwkvir_data.select import (
    MAX_SLUG,
    Criteria,
    duplicates,
    filtered,
    keys,
    leaks,
    near_pairs,
    quotas,
    select,
    split_names,
    tally,
)

FAR = [int.from_bytes(np.random.default_rng(i).bytes(8), "big") for i in range(1000)]  # hashes far from each other


def table(*sources):
    """A score table of sources (name, kind, complexities): every picture passes the filters, none is a duplicate."""
    rows = [
        {
            "source": source,
            "root": f"/{source}",
            "name": f"{source}{i}.png",
            "kind": kind,
            "width": 1000,
            "height": 900,
            "bytes": 1000,
            "complexity": float(score),
            "blur": 1000.0,
            "flatness": 0.1,
            "sha256": "",
            "dropped": None,
        }
        for source, kind, scores in sources
        for i, score in enumerate(scores)
    ]
    for row, far in zip(rows, FAR, strict=False):
        row["phash"] = f"{far:016x}"
    schema = pa.Table.from_pylist(rows).schema
    return pa.Table.from_pylist(rows, schema.set(schema.get_field_index("dropped"), pa.field("dropped", pa.string())))


def change(scores, row, **values):
    rows = scores.to_pylist()
    rows[row].update(values)
    return pa.Table.from_pylist(rows, scores.schema)


def column(selection, name):
    return selection[name].to_pylist()


def scores_of(selection, source, split=None):
    rows = selection.to_pylist()
    return [r["complexity"] for r in rows if r["source"] == source and r["split"] and split in (None, r["split"])]


REAL = Criteria(synthetic=0, val=0, test=0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, None),
        ({"width": 800, "height": 800, "blur": 150.0, "flatness": 0.5}, None),
        ({"height": 799}, "small"),
        ({"width": 799}, "small"),
        ({"blur": 149.0}, "blurred"),
        ({"blur": 8001.0}, "sharp"),
        ({"flatness": 0.51}, "flat"),
        ({"blur": 1.0, "flatness": 1.0, "width": 10}, "small"),
    ],
)
def test_filters(values, reason):
    one = change(table(("a", "real", [0])), 0, **values)
    columns = {name: one[name].to_numpy(zero_copy_only=False) for name in one.column_names}
    assert filtered(columns, Criteria()).tolist() == [reason]


@pytest.mark.parametrize("distance", [0, 1, 4, 6, 11])
def test_near_pairs_are_those_of_comparing_all(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 14), replace=False)) for _ in range(300)]
    hashes = np.unique(np.concatenate([hashes, hashes ^ np.array(flips, np.uint64), hashes[:50] + np.uint64(1)]))
    expected = np.argwhere(np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= distance, 1))
    assert np.array_equal(near_pairs(hashes, distance), expected)
    assert distance == 0 or len(expected) > 10


def test_of_duplicates_the_best_is_kept():
    def reasons(hashes, sizes, alive=None):
        rows = range(len(hashes))
        columns = {
            "width": np.array(sizes),
            "height": np.array(sizes),
            "bytes": np.array([10] * len(sizes)),
            "source": np.array(["s"] * len(sizes)),
            "name": np.array([str(i) for i in rows]),
        }
        alive = np.ones(len(hashes), bool) if alive is None else np.array(alive)
        return duplicates(columns, np.array(hashes, np.uint64), alive, 2).tolist()

    assert reasons([0, 0b11], [900, 900]) == [None, "duplicate of s/0"]
    assert reasons([0, 0b11], [900, 901]) == ["duplicate of s/1", None]
    assert reasons([0, 0b111], [900, 901]) == [None, None]
    assert reasons([7, 7, 7], [1, 3, 2]) == ["duplicate of s/1", None, "duplicate of s/1"]
    # In a chain, what is close only to a dropped picture is kept.
    assert reasons([0, 0b11, 0b1111], [3, 2, 1]) == [None, "duplicate of s/0", None]
    assert reasons([0, 0b11, 0b1111], [3, 2, 1], [False, True, True]) == [None, None, "duplicate of s/1"]


def test_leaks():
    hashes = np.array([0, 0b11, 0b1111, 1 << 60], np.uint64)
    alive = np.array([True, True, True, False])
    found = leaks(hashes, alive, {"Set5/baby.png": 0, "Set5/bird.png": 1 << 60}, 2)
    assert found.tolist() == ["leak: Set5/baby.png", "leak: Set5/baby.png", None, None]
    assert leaks(hashes, alive, {}, 2).tolist() == [None] * 4


def test_duplicates_across_sources_and_leaks_in_the_table():
    scores = table(("a", "real", [-1, 1, -2, 2]), ("b", "real", [-1, 1]))
    scores = change(scores, 4, phash=f"{FAR[0] ^ 0b101:016x}")
    selection, _ = select(scores, REAL, {"bench/x.png": FAR[3]})
    assert column(selection, "dropped")[3:5] == ["leak: bench/x.png", "duplicate of a/a0.png"]
    selection, _ = select(scores, replace(REAL, distance=None), {"bench/x.png": FAR[3]})
    assert column(selection, "dropped") == [None] * 6


def test_what_scoring_dropped_stays_dropped():
    scores = change(
        table(("a", "real", [-1, 1])),
        0,
        dropped="unreadable: the file is empty",
        **dict.fromkeys(("width", "height", "bytes", "complexity", "blur", "flatness", "phash"), None),
    )
    selection, missing = select(scores, REAL)
    assert column(selection, "dropped") == ["unreadable: the file is empty", "surplus"]
    assert missing == ["real pictures: 0 of 12000 wanted (a has 0 below and 1 above zero)."]


def test_the_balance_of_each_source():
    scores = table(("a", "real", [-3, -2, -1, 0, 1]), ("b", "real", [-1] * 10 + [1] * 4))
    selection, _ = select(scores, REAL)
    for source, half in (("a", 2), ("b", 4)):
        kept = np.array(scores_of(selection, source))
        assert (np.sum(kept < 0), np.sum(kept >= 0)) == (half, half)
    assert set(column(selection, "dropped")) == {None, "surplus"}


def test_the_walk_in_the_tables_order_keeps_the_first():
    selection, _ = select(table(("a", "real", [-3, -2, 4, -1, 5])), replace(REAL, shuffle=False, total=2))
    assert scores_of(selection, "a") == [-3, 4]
    selection, _ = select(
        table(("a", "real", [-3, -2, 4, -1, 5])), replace(REAL, shuffle=False, total=3, balance=False)
    )
    assert scores_of(selection, "a") == [-3, -2, 4]


def test_a_seed_gives_one_selection_whatever_the_run():
    scores = table(("a", "real", np.linspace(-5, 5, 200)))
    criteria = Criteria(total=20, synthetic=0, val=0.1, test=0.1)
    first, again, other = (column(select(scores, replace(criteria, seed=s))[0], "split") for s in (1, 1, 2))
    assert first == again != other


def test_shares_shrink_together_and_say_so():
    halves = {"r1": (100, 50), "r2": (30, 40), "s": (9, 5)}
    kinds = {"r1": "real", "r2": "real", "s": "synthetic"}
    counts, missing = quotas(halves, kinds, Criteria())
    assert counts == {"r1": 18, "r2": 12, "s": 10}
    assert missing == [
        "real pictures: 30 of 9000 wanted (r1 has 100 below and 50 above zero; r2 has 30 below and 40 above zero). "
        "The rest is left out to keep the share of the other kind; see --synthetic.",
        "synthetic pictures: 10 of 3000 wanted (s has 9 below and 5 above zero).",
    ]
    assert quotas(halves, kinds, Criteria(total=40)) == ({"r1": 18, "r2": 12, "s": 10}, [])
    counts, missing = quotas({"r1": (100, 50)}, {"r1": "real"}, Criteria())
    assert counts == {"r1": 100}
    assert missing[1] == "synthetic pictures: 0 of 3000 wanted (there is no such source)."


def test_targets():
    halves, kinds = {"a": (10, 4), "b": (5, 5)}, {"a": "real", "b": "synthetic"}
    counts, missing = quotas(halves, kinds, Criteria(targets={"a": 100, "b": 6}))
    assert counts == {"a": 8, "b": 6}
    assert missing == ["source a: 8 of 100 wanted (a has 10 below and 4 above zero)."]
    with pytest.raises(ValueError, match="--target names a, but the table's sources are a, b; give a count for each"):
        quotas(halves, kinds, Criteria(targets={"a": 3}))


def test_splits_are_balanced():
    selection, _ = select(table(("a", "real", np.linspace(-5, 5, 200))), replace(REAL, val=0.03, test=0.05))
    assert Counter(column(selection, "split")) == {"train": 184, "val": 6, "test": 10}
    for split in ("train", "val", "test"):
        assert np.sign(scores_of(selection, "a", split)).sum() == 0


@pytest.mark.parametrize(("count", "expected"), [(0, []), (2, ["train"] * 2), (3, ["test", "val", "train"])])
def test_small_halves(count, expected):
    assert split_names(count, 0.02, 0.02) == expected


def test_keys():
    names = ["x/a.b c.png", "x/a.b-c.jpg", "ü.png", "K.png", "k.png", "plain.png", "n" * 300 + ".png"]
    made = keys(["s.1"] * len(names), names)
    assert made[2] == "s-1_-" and made[5] == "s-1_plain"
    assert all(key.isascii() and "." not in key and "/" not in key and len(key) < MAX_SLUG + 20 for key in made)
    assert len({key.lower() for key in made}) == len(names)
    assert keys(["s.1"] * 2, names[:2]) == made[:2]  # whatever else is in the table


def test_tally():
    scores = change(table(("a", "real", [-1, 1, 1]), ("b", "real", [1])), 2, dropped="unreadable: cut short")
    assert tally(select(scores, REAL)[0]) == [
        ["source", "pictures", "surplus", "unreadable", "train", "val", "test"],
        ["a", 3, 0, 1, 2, 0, 0],
        ["b", 1, 1, 0, 0, 0, 0],
        ["all", 4, 1, 1, 2, 0, 0],
    ]
    assert tally(scores)[0::2] == [["source", "pictures", "unreadable"], ["b", 1, 0]]
