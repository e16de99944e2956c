"""Fragments: how trees are cut, and when parts of them are sent and applied."""

import itertools

import numpy as np
import pytest
from helpers.frameworks import jnp, torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from funcavg import FuncavgError, average, outer, stacked, streaming_diloco
from funcavg.averagers._fragments import Size, Timetable, cut_by_number
from funcavg.collectives import Solo
from funcavg.testing import run_ranks


def smallest_largest(nbytes, count):
    """Try all ways to cut a row of rows."""
    best = None
    for cuts in itertools.combinations(range(1, len(nbytes)), count - 1):
        ends = zip((0, *cuts), (*cuts, len(nbytes)), strict=True)
        largest = max(sum(nbytes[begin:end]) for begin, end in ends)
        best = largest if best is None else min(best, largest)
    return best


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=5), st.data())
def test_a_number_cuts_all_rows_in_order_and_the_largest_part_is_as_small_as_can_be(leaves, data):
    sizes = [Size(rows, nbytes * bool(rows)) for rows, nbytes in leaves]
    tied = data.draw(st.sets(st.sampled_from(range(len(sizes))), max_size=len(sizes) - 1))
    kept = [i for i in range(len(sizes)) if i not in tied]
    rows = [(i, row) for i in kept if sizes[i].total for row in range(sizes[i].rows)]
    assume(rows)
    count = data.draw(st.integers(1, min(len(rows), 6)))
    parts = cut_by_number(sizes, count, kept)
    found, weights, empty = [], [], []
    for part in parts:
        taken = []
        assert [piece.leaf for piece in part] == sorted({piece.leaf for piece in part})
        for piece in part:
            if not sizes[piece.leaf].total:  # it goes somewhere, too, beside others
                assert piece.rows is None
                empty.append(piece.leaf)
                continue
            span = piece.rows or slice(0, sizes[piece.leaf].rows)
            taken += [(piece.leaf, row) for row in range(span.start, span.stop)]
        found += taken
        weights.append(sum(sizes[i].nbytes for i, _ in taken))
        assert taken
    assert found == rows
    assert sorted(empty) == [i for i in kept if not sizes[i].total]
    assert len(parts) == count
    assert max(weights) == smallest_largest([sizes[i].nbytes for i, _ in rows], count)


def test_more_fragments_than_rows():
    averager = streaming_diloco(9, fragments=4, group=Solo())
    with pytest.raises(ValueError, match="4 fragments of a tree whose averaged leaves have 3 rows along their first"):
        averager.init({"w": np.zeros((2, 5)), "b": np.zeros(()), "n": 3})
    with pytest.raises(ValueError, match="have 0 rows"):
        averager.init({"n": 3})


def shapes(anchors):
    return [{name: None if leaf is None else np.shape(leaf) for name, leaf in anchor.items()} for anchor in anchors]


@pytest.mark.parametrize("array", [np.zeros, torch.zeros, jnp.zeros])
def test_leaves_are_cut_between_rows_and_stacked_replicas_never_apart(array):
    tree = {"a": array((4, 2)), "b": array((2,)), "c": array((6, 1))}
    state = streaming_diloco(3, fragments=3, group=Solo()).init(tree)
    assert shapes(state.anchor) == [
        {"a": (3, 2), "b": None, "c": None},
        {"a": (1, 2), "b": (2,), "c": (2, 1)},
        {"a": None, "b": None, "c": (4, 1)},
    ]
    replicas = {"a": array((2, 4, 2)), "b": array((2, 2)), "c": array((2, 6, 1)), "s": array(2)}
    state = streaming_diloco(3, fragments=3, group=stacked()).init(replicas)
    assert shapes(state.anchor) == [
        {"a": (2, 3, 2), "b": None, "c": None, "s": None},
        {"a": (2, 1, 2), "b": (2, 2), "c": (2, 2, 1), "s": None},
        {"a": None, "b": None, "c": (2, 4, 1), "s": (2,)},
    ]
    state = streaming_diloco(3, fragments=2, group=stacked(-1)).init({"a": array((4, 2, 3))})
    assert shapes(state.anchor) == [{"a": (2, 2, 3)}, {"a": (2, 2, 3)}]


def test_predicates_take_whole_leaves_and_the_first_that_accepts_wins():
    tree = {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(4), "n": 3, "left": "text"}
    fragments = [lambda path: path[0] == "b", lambda path: True]
    averager = streaming_diloco(4, fragments=fragments, where=lambda path: path[0] != "left", group=Solo())
    assert shapes(averager.init(tree).anchor) == [
        {"a": None, "b": (3,), "c": None, "n": None, "left": None},
        {"a": (2,), "b": None, "c": (4,), "n": None, "left": None},
    ]


def test_a_leaf_that_no_predicate_accepts_and_one_that_accepts_none():
    tree = {"a": {"w": np.zeros(2)}, "b": np.zeros(3)}
    averager = streaming_diloco(4, fragments=[lambda path: path[0] == "b"], group=Solo())
    with pytest.raises(
        ValueError, match=r"params_tree\['a'\]\['w'\] is averaged, and no fragment .* \('a', 'w'\). Add"
    ):
        averager.init(tree)
    averager = streaming_diloco(4, fragments=[lambda path: True, lambda path: "w" in path], group=Solo())
    words = (
        r"fragment 1 of 2 \(<function .*\) accepts nothing that earlier ones leave it: params_tree\['a'\]\['w'\], for"
    )
    with pytest.raises(ValueError, match=words):
        averager.init(tree)
    averager = streaming_diloco(4, fragments=[lambda path: path[0] == "w", lambda path: True], group=Solo())
    words = (
        r"fragment 0 of 2 .* accepts none of the 2 averaged leaves.*: that of params_tree\['a'\]\['w'\] is \('a', 'w'\)"
    )
    with pytest.raises(ValueError, match=words):
        averager.init(tree)
    averager = streaming_diloco(4, fragments=[lambda path: path[0] == "e", lambda path: True], group=Solo())
    with pytest.raises(ValueError, match=r"fragment 0 .* leaves without elements only, such as params_tree\['e'\]"):
        averager.init(tree | {"e": np.zeros((0, 3))})


@pytest.mark.parametrize("delay", [0, 1])
def test_empty_leaves_go_with_others(delay):
    def fn(group):
        params = {"a": np.zeros((0, 3)), "w": np.full((2, 4), float(group.rank)), "z": np.zeros(0)}
        averager = streaming_diloco(4, fragments=2, delay=delay, group=group, outer=outer.sgd(1.0))
        state = averager.init(params)
        for _ in range(4):
            params, state = averager.update({name: leaf + group.rank for name, leaf in params.items()}, state)
        return [params[name].shape for name in "az"], shapes(state.anchor), params["w"][1, 0]

    last = 0.5 + 4 / 2 if delay == 0 else 0.5 + 3 / 2
    found = [(0, 3), (0,)], [{"a": (0, 3), "w": (1, 4), "z": None}, {"a": None, "w": (1, 4), "z": (0,)}], last
    assert run_ranks(2, fn) == [found] * 2


def test_a_wire_that_cannot_be_is_refused_by_init():
    with pytest.raises(ValueError, match="wire must be one of .* got 'int9'"):
        streaming_diloco(4, fragments=1, group=Solo(), wire="int9").init({"a": np.zeros(2)})
    with pytest.raises(ValueError, match="streaming_diloco: wire='int8' is for groups of processes"):
        streaming_diloco(4, fragments=1, group=stacked(), wire="int8").init({"a": np.zeros((2, 2))})


def test_a_predicate_that_fails_on_one_rank_fails_on_all():
    def fn(group):
        def accepts(path):
            return path[0] if group.rank == 0 else 1 / 0

        averager = streaming_diloco(4, fragments=[accepts], group=group, timeout=20)
        with pytest.raises((ZeroDivisionError, FuncavgError), match="division by zero"):
            averager.init({"a": np.zeros(2)})
        return average(float(group.rank), group)

    assert run_ranks(2, fn) == [0.5, 0.5]


def test_when():
    assert Timetable(7, 3, 1, 0).events == [1, 4, 2, 5, 0, 3, 6]
    table = Timetable(6, 2, 2, 3)
    assert [table.at(step) for step in range(15)] == [0, 0, 5, 1, 0, 3, 2, 0, 4, 1, 0, 3, 2, 0, 4]
    assert [int(table.at(jnp.int32(step))) for step in range(15)] == [table.at(step) for step in range(15)]
    assert [table.under_way(step) for step in range(3, 9)] == [None, (0, 3), None, None, (1, 6), None]


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"period": 0}, ValueError, "streaming_diloco: period must be at least 1, got 0"),
        ({"period": 2.0}, TypeError, "streaming_diloco: period must be an integer, got 2.0"),
        ({"warmup": -1}, ValueError, "streaming_diloco: warmup must be at least 0, got -1"),
        ({"fragments": 0}, ValueError, "at least 1 fragment, and at most one for each step of a period, got 0 and"),
        ({"fragments": 7}, ValueError, "and at most one for each step of a period, got 7 and period=6"),
        ({"fragments": []}, ValueError, "there must be at least 1 fragment, .* got 0 and period=6"),
        ({"fragments": True}, TypeError, "fragments must be a number, or a list of functions of a path, got True"),
        ({"fragments": 2.0}, TypeError, "fragments must be a number, or a list of functions of a path, got 2.0"),
        ({"fragments": ["w"]}, TypeError, r"fragments must be a number, or a list of functions .*, got \['w'\]"),
        ({"fragments": {"w": len}}, TypeError, "fragments must be a number, or a list of functions of a path, got {"),
        ({"delay": -1}, ValueError, "delay must be at least 0 and less than the 3 steps from one fragment .*got -1"),
        ({"delay": 3}, ValueError, r"the 3 steps from one fragment to the next \(period=6, 2 fragments\), .* got 3"),
        ({"delay": 1.0}, TypeError, "delay must be an integer, got 1.0"),
        ({"mix": -0.1}, ValueError, "mix must be at least 0 and at most 1, got -0.1"),
        ({"mix": float("nan")}, ValueError, "mix must be at least 0 and at most 1, got nan"),
        ({"mix": 1.5}, ValueError, "mix must be at least 0 and at most 1, got 1.5"),
        ({"mix": "half"}, TypeError, "mix must be a number, got 'half' of type str"),
        (
            {"outer": 3},
            TypeError,
            "streaming_diloco: outer must be of funcavg.outer, an optax transform, or a function",
        ),
        ({"timeout": 0}, ValueError, "streaming_diloco: timeout must be positive"),
    ],
)
def test_what_is_refused_at_once(arguments, kind, words):
    with pytest.raises(kind, match=words):
        streaming_diloco(**{"period": 6, "fragments": 2} | arguments)


def test_numbers_of_numpys_are_numbers():
    streaming_diloco(np.int64(6), fragments=np.int64(2), delay=np.int32(1), mix=np.float32(0.5))
