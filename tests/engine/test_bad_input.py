"""Mistakes: an error that shows what was passed, on every rank; nothing moved or changed, and the group usable."""

import os
import re
import time
from collections import OrderedDict
from datetime import timedelta
from fractions import Fraction
from functools import partial

import numpy as np
import optree
import pytest
from helpers.frameworks import dist, is_tensor, needed_by, no_grad, skip_without, torch
from helpers.processes import run_processes
from helpers.trees import raw_memory

import funcavg
from funcavg import (
    FuncavgError,
    PeerLostError,
    TreeMismatchError,
    average,
    diloco,
    hierarchical,
    periodic,
    start_average,
)
from funcavg._engine.agree import TEXT_BYTES
from funcavg._trees import Options
from funcavg._trees.claim import FORMAT
from funcavg.collectives import Solo, as_collective, launched_ranks
from funcavg.collectives.blocks import block_of
from funcavg.testing import run_ranks

# Mistakes of a tree, a weight, `where` or `donate`: raised alike on every rank. Each row: what each rank passes, the
# error and its text. Rank 1 is the one that errs, unless all do.

ROWS = {}
CURE = r"Leaves must be arrays, numbers, bools or None; leave others out with where=, or with equinox.partition\."


def row(name, kind, text):
    def add(make):
        ROWS[name] = make, kind, text
        return make

    return add


def bad_leaf(name, make, text):
    """Add two rows: a leaf that no rank may pass, and one that only rank 1 passes."""
    shown = rf"1 of 2 leaves can be neither averaged nor passed through: params_tree\['w'\] is a {text}\. {CURE}"
    row(name, TypeError, rf"average: rank 0: {shown} \(\d of \d ranks found a mistake\.\)")(
        lambda rank: ({"w": make(), "x": 1.0}, {})
    )
    row(f"{name} on one rank", TypeError, rf"average: rank 1: {shown} Nothing was sent")(
        lambda rank: ({"w": make() if rank == 1 else 1.0, "x": 1.0}, {})
    )


class Subclass(torch.Tensor):
    pass


def a_function():
    pass


bad_leaf("string", lambda: "text", "str: 'text'")
bad_leaf("long string", lambda: "t" * 100, r"str: 't{56}\.\.\.")
bad_leaf("bytes", lambda: b"text", "bytes: b'text'")
bad_leaf("function", lambda: a_function, "function: <function a_function at 0x[0-9a-f]+>")
bad_leaf("object", Solo, r"funcavg.collectives.solo.Solo: <.*>")
bad_leaf("set", lambda: {1.0}, r"set, whose order ranks cannot agree about \(pass a sorted list\)")
bad_leaf("iterator", lambda: iter([1.0]), r"list_iterator, which can be read only once \(pass list\(\.\.\.\) of it\)")
bad_leaf(
    "module",
    lambda: torch.nn.Linear(1, 1),
    r"Linear, a torch.nn.Module \(pass dict\(module.named_parameters\(\)\) or module.state_dict\(\)\)",
)
bad_leaf("array of objects", lambda: np.array([None]), "NumPy array of dtype object")
bad_leaf("array of strings", lambda: np.array(["a"]), "NumPy array of dtype <U1")
bad_leaf("array of dates", lambda: np.array(["2020"], "M8[s]"), r"NumPy array of dtype datetime64\[s\]")
bad_leaf("records", lambda: np.zeros(2, [("a", "f4")]), r"NumPy array of dtype \[\('a', '<f4'\)\]")
bad_leaf(
    "masked array",
    lambda: np.ma.array([1.0]),
    r"NumPy subclass numpy.ma.MaskedArray \(averaging its data alone would lose what the subclass means; "
    r"pass np.asarray\(leaf\)\)",
)
bad_leaf(
    "sparse tensor", lambda: torch.eye(2).to_sparse(), r"sparse_coo tensor of dtype float32 \(pass leaf.to_dense\(\)\)"
)
bad_leaf("meta tensor", lambda: torch.empty(2, device="meta"), "meta tensor of dtype float32, which has no values")
bad_leaf("tensor subclass", lambda: torch.zeros(2).as_subclass(Subclass), r"tensor subclass .*\.Subclass")


@row(
    "many bad leaves",
    TypeError,
    r"rank 0: 7 of 8 leaves can be neither averaged nor passed through: params_tree\[0\] is a str: '0'; "
    r".*params_tree\[4\] is a str: '4'; and 2 more\. ",
)
def _(rank):
    return [*map(str, range(7)), 1.0], {}


def itself():
    tree = [1.0]
    tree.append(tree)
    return tree


@row("a tree that holds itself", FuncavgError, r"average: rank 1: RecursionError: .*Nothing was sent")
def _(rank):
    return itself() if rank == 1 else [1.0], {}


MISMATCH = r"average: ranks passed trees that do not match \(1 of \d ranks differs from rank 0\)\.\n"
END = r"\nNothing was sent and the inputs are unchanged, on every rank\. Every rank must pass the same paths, shapes, "
END += r"dtypes, order and options\."


def mismatch(name, ours, theirs, *lines, options=(None, None)):
    text = MISMATCH + "\n".join(rf"    {line}" for line in lines) + END
    row(name, TreeMismatchError, text)(
        lambda rank: (theirs() if rank == 1 else ours(), options[rank == 1] or {}),
    )


mismatch(
    "keys",
    lambda: {"a": np.ones(2), "b": 1.0},
    lambda: {"a": np.ones(2), "c": 1.0},
    r"params_tree\['b'\]:  rank 0 float64\[\],  rank 1 has no such leaf",
    r"params_tree\['c'\]:  rank 0 has no such leaf,  rank 1 float64\[\]",
)
mismatch(
    "shape",
    lambda: {"w": torch.ones(2, 3)},
    lambda: {"w": torch.ones(3, 2)},
    r"params_tree\['w'\]:  rank 0 float32\[2, 3\],  rank 1 float32\[3, 2\]",
)
mismatch(
    "dtype",
    lambda: [torch.ones(2), 1.0],
    lambda: [torch.ones(2).bfloat16(), 1.0],
    r"params_tree\[0\]:  rank 0 float32\[2\],  rank 1 bfloat16\[2\]",
)
mismatch("kind of number", lambda: [1.0], lambda: [1], r"params_tree\[0\]:  rank 0 float64\[\],  rank 1 int")
mismatch(
    "number of leaves",
    lambda: [1.0] * 9,
    lambda: [1.0] * 2,
    *(rf"params_tree\[{i}\]:  rank 0 float64\[\],  rank 1 has no such leaf" for i in range(2, 7)),
    r"\.\.\. and 2 more",
)
mismatch(
    "None for a leaf",
    lambda: {"w": 1.0},
    lambda: {"w": None},
    r"params_tree\['w'\]:  rank 0 float64\[\],  rank 1 has no such leaf",
)
mismatch(
    "order",
    lambda: OrderedDict(a=1.0, b=2.0),
    lambda: OrderedDict(b=2.0, a=1.0),
    r"leaf 0:  rank 0 params_tree\['a'\],  rank 1 params_tree\['b'\] \(the same leaves in another order; a plain dict "
    r"is matched by key, so dict\(params_tree\) cures an OrderedDict\)",
)
mismatch(
    "where",
    lambda: {"a": np.ones(2), "b": np.ones(2)},
    lambda: {"a": np.ones(2), "b": np.ones(2)},
    r"params_tree\['b'\]:  rank 0 float64\[2\],  rank 1 not averaged",
    options=(None, {"where": lambda path: path == ("a",)}),
)
mismatch(
    "a weight on one rank",
    lambda: [1.0],
    lambda: [1.0],
    r"options:  rank 0 without weight,  rank 1 with a weight",
    options=(None, {"weight": 1}),
)


def weights(name, kind, text, *given):
    row(name, kind, rf"average: {text} ")(lambda rank: ([1.0], {"weight": given[min(rank, len(given) - 1)]}))


NUMBER = "weight must be a number, at least 0, got"
weights("weight NaN", ValueError, r"rank 1: weight must be finite and at least 0, got nan\.", 1, float("nan"), 1)
weights("weight inf", ValueError, r"rank 1: weight must be finite and at least 0, got inf\.", 1, float("inf"), 1)
weights("weight -1", ValueError, r"rank 1: weight must be finite and at least 0, got -1\.", 1, -1, 1)
weights("all weights 0", ValueError, r"the weights of all \d ranks are 0\.", 0)
weights("weight True", TypeError, rf"rank 1: {NUMBER} True of type bool\.", 1, True, 1)
weights("weight text", TypeError, rf"rank 1: {NUMBER} '2' of type str\.", 1, "2", 1)
weights("weight complex", TypeError, rf"rank 1: {NUMBER} 1j of type complex\.", 1, 1j, 1)
weights("weight list", TypeError, rf"rank 1: {NUMBER} \[1\] of type list\.", 1, [1], 1)
weights("weight of two", TypeError, rf"rank 1: {NUMBER} tensor\(\[1\., 1\.\]\) of type Tensor\.", 1, torch.ones(2), 1)


def breaks(path):
    raise LookupError(f"asked about {path}")


row(
    "where raises",
    RuntimeError,
    r"average: rank 1: where raised LookupError: asked about \('w',\), for path \('w',\)\. N",
)(lambda rank: ({"w": 1.0}, {"where": breaks if rank == 1 else None}))


def donated(name, make, text):
    row(f"donate {name}", ValueError, rf"average: rank 1: donate=True, but params_tree\[0\] {text}")(
        lambda rank: (make() if rank == 1 else [leaf + 0 for leaf in make()], {"donate": rank == 1})
    )


def read_only():
    leaf = np.ones(3)
    leaf.setflags(write=False)
    return leaf


EXPANDED = "is an expanded array, several elements of which share one memory cell. Pass donate=False, or a copy of it"
ONE = torch.arange(8.0)
donated("read-only", lambda: [read_only()], r"is a read-only NumPy array\. Pass donate=False, or a copy of it\.")
donated("broadcast", lambda: [np.broadcast_to(np.ones(1), 3)], "is a read-only NumPy array")
donated("expanded", lambda: [torch.ones(1).expand(3)], EXPANDED)
donated("conjugated", lambda: [torch.ones(3, dtype=torch.complex64).conj()], "is a lazily conjugated view")
donated(
    "overlap",
    lambda: [ONE[:4], ONE[3:7]],
    r"and params_tree\[1\] overlap in memory without being equal views\. Pass donate=False, or copies of them\.",
)
donated("other strides", lambda: [ONE[:4], ONE[::2][:4]], r"and params_tree\[1\] overlap in memory")
donated("other shape", lambda: [ONE.view(2, 4), ONE.view(4, 2)], r"and params_tree\[1\] overlap in memory")


@row("donate ties of one rank", ValueError, r"average: donate=True on rank 1, whose tree holds the same memory twice")
def _(rank):
    leaf = np.ones(3)
    return [leaf, leaf if rank == 1 else leaf.copy()], {"donate": True}


def by_average(tree, group, **options):
    return average(tree, group, **options)


def by_start_average(tree, group, **options):
    return start_average(tree, group, **options).wait()


CALLS = {"average": by_average, "start_average": by_start_average}


def check(group, call, name):
    """Run one row on one rank; return the error's text."""
    make, kind, text = ROWS[name]
    collective = as_collective(group)
    tree, options = make(collective.rank)
    if (framework := needed_by(options)) is not None:
        skip_without(framework)
    leaves = [] if name == "a tree that holds itself" else optree.tree_leaves(tree)
    before, sent = [raw_memory(leaf) for leaf in leaves if not_strange(leaf)], collective.bytes_sent
    with no_grad(), pytest.raises(kind) as caught:
        CALLS[call](tree, group, **options)
    assert type(caught.value) is kind
    assert re.search(text, str(caught.value)), str(caught.value)
    assert "Nothing was sent and the inputs are unchanged, on every rank." in str(caught.value)
    assert [raw_memory(leaf) for leaf in leaves if not_strange(leaf)] == before
    words = (collective.bytes_sent - sent) / (collective.size - 1) - FORMAT.size
    assert words in (0, 4 + TEXT_BYTES)  # of agreement, and nothing else
    assert average(float(collective.rank), group) == (collective.size - 1) / 2
    return str(caught.value)


def not_strange(leaf):
    if is_tensor(leaf):
        return leaf.layout == torch.strided and leaf.device.type == "cpu"
    return isinstance(leaf, np.ndarray) and leaf.dtype != object


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ROWS)
def test_every_rank_raises_the_same(name, call):
    assert len(set(run_ranks(3, lambda group: check(group, call, name)))) == 1


def all_rows(rank):
    texts = []
    for name in ROWS:
        try:
            texts.append(check(None, "average", name))
        except BaseException as error:
            error.add_note(f"in row {name!r}") if hasattr(error, "add_note") else None
            raise
    return texts


def test_every_rank_raises_the_same_over_gloo():
    one, other = run_processes(2, all_rows)
    assert one == other
    assert len(one) == len(ROWS)


def test_a_signature_that_is_too_long_is_cut():
    """The text that carries it has a fixed size; what fits is compared, and a later difference is still an error."""
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("abcdefghijklmnop"), 30)) for _ in range(8000)]

    def fn(group):
        tree = OrderedDict.fromkeys(names, 1.0)
        tree["last"] = 1.0 if group.rank == 0 else np.ones(2)
        with pytest.raises(TreeMismatchError, match=r"the first \d{4} leaves are alike; a later one differs"):
            average(tree, group)
        return group.bytes_sent

    assert run_ranks(2, fn) == [FORMAT.size + 4 + TEXT_BYTES] * 2


def test_ranks_that_are_not_the_first_two():
    """The first rank that differs is shown, and how many there are."""

    def fn(group):
        with pytest.raises(TreeMismatchError, match=r"\(2 of 4 ranks differ from rank 0\)(.|\n)*rank 2 int"):
            average([1.0 if group.rank < 2 else 1], group)

    run_ranks(4, fn)


def test_another_version_of_the_protocol(monkeypatch):
    class Old:
        rank, size, bytes_sent = 0, 2, 0

        def gather(self, payload, timeout):
            return [payload, FORMAT.pack(b"favg", 0, 0, 1.0, bytes(16), b"", b"")]

        def exchange(self, send, receive, timeout):
            raise AssertionError("moved")

        share = exchange

    with pytest.raises(
        FuncavgError, match=r"rank 1 speaks another version of the protocol \(b'favg' 0, here b'favg' 2\)"
    ):
        average(1.0, Old())


# A mistake about the group or the timeout: an error on this rank, at once


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (object(), r"group must be .*, got <object object at 0x[0-9a-f]+> of type object"),
        (3, "group must be .*, got 3 of type int"),
        ({"rank": 0, "size": 1}, r"group must be .*, got \{'rank': 0, 'size': 1\} of type dict"),
        ([0, 1], r"group must be .*, got \[0, 1\] of type list"),
        (
            type("Half", (), {"rank": 0, "size": 1, "gather": None})(),
            r"group .*Half.* is no Collective: it lacks \['exch",
        ),
        (Solo, r"group is a class, <class 'funcavg.collectives.solo.Solo'>; pass an instance of it"),
    ],
)
@pytest.mark.parametrize("call", [average, start_average])
def test_what_is_no_group(call, group, text):
    with pytest.raises(TypeError, match=f"average: {text}"):
        call({"w": 1.0}, group)


def test_axis_names_that_nothing_binds():
    for group in ("xxx", ("a", "b")):
        with pytest.raises(ValueError, match=r"is an axis name, but no such axis is bound here"):
            average(1.0, group)
        with pytest.raises(RuntimeError, match="is an axis name; under JAX transformations use average"):
            start_average(1.0, group)
        with pytest.raises(TypeError, match="is an axis name, which funcavg.average takes inside jax.shard_map only"):
            as_collective(group)


def test_what_a_group_may_be_is_told():
    kinds = (
        "None, a torch.distributed ProcessGroup, a 1-D DeviceMesh, an mpi4py communicator, a funcavg.Collective or "
        "funcavg.stacked()"
    )
    with pytest.raises(TypeError, match=re.escape(f"average: group must be {kinds}, got 1.5 of type float")):
        average({"w": 1.0}, 1.5)


@pytest.mark.parametrize(
    "timeout", [3, 2.5, np.float32(2.5), np.int64(3), Fraction(5, 2), timedelta(seconds=2.5), timedelta(hours=3), None]
)
def test_timeouts_of_every_kind(timeout):
    assert average(1.5, Solo(), timeout=timeout) == start_average(1.5, Solo(), timeout=timeout).wait() == 1.5
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    assert Options(timeout=timeout).checked("average").timeout == seconds


def late_by(call):
    """Let rank 1 come too late, and return what rank 0 was told and after how long."""

    def fn(group):
        if group.rank == 1:
            time.sleep(1.5)
            return None
        start = time.monotonic()
        with pytest.raises(PeerLostError) as caught:
            call(group)
        return str(caught.value), time.monotonic() - start

    words, waited = run_ranks(2, fn)[0]
    assert "waited 0.3 s" in words
    assert 0.2 < waited < 1.2


@pytest.mark.filterwarnings("ignore:When period is 1")
def test_averagers_and_stand_ins_wait_as_long_as_they_are_told():
    params = {"w": np.ones(2)}
    for make in (
        lambda group: periodic(1, group=group, timeout=0.3),
        lambda group: hierarchical({1: group}, timeout=np.float32(0.3)),
        lambda group: diloco(1, warmup=1, group=group, timeout=timedelta(milliseconds=300)),
    ):

        def updated(group, make=make):
            averager = make(group)
            state = averager.init(params)
            averager.update(params, state)

        late_by(updated)

    late_by(lambda group: average(1.0, Defaulted(group)))  # the group's own
    skip_without("torch")
    stand_in = funcavg.PeriodicModelAverager  # imported now, and not while the clock runs

    def by_stand_in(group):
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        stand_in(1, process_group=group, timeout=0.3).average_parameters([parameter])

    late_by(by_stand_in)


class Defaulted:
    """A transport that knows how long its users wait, and hands the rest on to another."""

    default_timeout = 0.3

    def __init__(self, group):
        self._group, self.rank, self.size = group, group.rank, group.size

    def __getattr__(self, name):
        return getattr(self._group, name)


def test_a_mistake_is_told_within_the_averagers_timeout():
    """And not within 300 seconds: the other rank does not come."""

    def fn(group):
        if group.rank == 1:
            time.sleep(1.5)
            return
        averager = periodic(1, group=group, timeout=0.3)
        state = averager.init({"w": np.ones(2)})
        start = time.monotonic()
        with pytest.raises(ValueError, match="another tree than init"):
            averager.update({"w": np.ones(3)}, state)
        assert time.monotonic() - start < 1.2

    run_ranks(2, fn)


@pytest.mark.parametrize("make", [partial(periodic, 2), partial(hierarchical, {2: Solo()}), partial(diloco, 2)])
def test_averagers_refuse_bad_timeouts_at_once(make):
    with pytest.raises(ValueError, match=r"(periodic|hierarchical|diloco): timeout must be positive"):
        make(timeout=-1)


@pytest.mark.parametrize(
    ("timeout", "kind", "text"),
    [
        (0, ValueError, r"positive and at most 1e\+07 seconds, got 0"),
        (-1.5, ValueError, r"positive and at most 1e\+07 seconds, got -1.5"),
        (float("nan"), ValueError, r"positive and at most 1e\+07 seconds, got nan"),
        (1e9, ValueError, r"positive and at most 1e\+07 seconds, got 1000000000.0"),
        (float("inf"), ValueError, r"positive and at most 1e\+07 seconds, got inf"),
        (10**400, ValueError, r"positive and at most 1e\+07 seconds, got 1000"),
        (timedelta(0), ValueError, r"positive and at most 1e\+07 seconds, got datetime.timedelta\(0\)"),
        ("3", TypeError, "a number of seconds, a timedelta or None, got '3' of type str"),
        (True, TypeError, "a number of seconds, a timedelta or None, got True of type bool"),
        (1j, TypeError, "a number of seconds, a timedelta or None, got 1j of type complex"),
    ],
)
@pytest.mark.parametrize("call", [average, start_average])
def test_bad_timeout(call, timeout, kind, text):
    with pytest.raises(kind, match=f"{call.__name__}: timeout must be {text}"):
        call({"w": 1.0}, timeout=timeout)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (
            {"WORLD_SIZE": "2", "RANK": "1"},
            r"torchrun has started 2 ranks .* call torch.distributed.init_process_group\(\)",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"},
            "Open MPI's mpiexec has started 3 ranks .*First call `from mpi4py import MPI`",
        ),
        (
            {"PMI_SIZE": "4", "PMI_RANK": "0"},
            "MPICH's mpiexec has started 4 ranks .*First call `from mpi4py import MPI`",
        ),
        ({"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4"}, r"srun has started 5 ranks .*init_process_group\(\)\."),
    ],
)
def test_a_launchers_environment_without_a_group(environment, text, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cure = r"If each process is to be on its own, pass group=funcavg.collectives.Solo\(\)\."
    with pytest.raises(RuntimeError, match=f"average: group=None, but {text}(.|\n)*{cure}"):
        average({"w": 1.0})
    assert average({"w": 1.0}, Solo()) == {"w": 1.0}


def test_a_torch_world_of_one_rank_among_several(monkeypatch):
    """It may be a library's own; that it exists does not mean that the ranks are connected."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=r"default group, which has one rank here, but torchrun has started 2: "):
            average({"w": 1.0})
        with pytest.raises(RuntimeError, match="torchrun has started 2"):
            block_of(None, 1)
        assert average({"w": 1.0}, dist.group.WORLD) == average({"w": 1.0}, Solo()) == {"w": 1.0}
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert average({"w": 1.0}) == {"w": 1.0}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "8"},  # set by somebody for something else
        {"WORLD_SIZE": "many", "RANK": "0"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # an allocation, whose batch script is one process
    ],
)
def test_an_environment_of_one_process(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_ranks(os.environ) is None
    assert average({"w": 1.0}) == {"w": 1.0}


# Peers that die, and groups that do


def killed_between_calls(rank):
    leaf = torch.full((3,), float(rank))
    assert average(leaf).tolist() == [1.0] * 3
    if rank == 1:
        os.kill(os.getpid(), 9)
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match=rf"rank {rank} of 3 waited"):
        average(leaf, timeout=10)
    took, begin = time.monotonic() - begin, time.monotonic()
    with pytest.raises(PeerLostError, match=r"average: this group is spent, since an earlier call on it failed \(Peer"):
        average(leaf)
    with pytest.raises(PeerLostError, match=r"start_average: this group is spent"):
        start_average(leaf)
    return took, time.monotonic() - begin, leaf.tolist()


def test_a_killed_peer():
    for rank, outcome in enumerate(run_processes(3, killed_between_calls, dies=(1,))):
        if rank != 1:
            took, again, leaf = outcome
            assert took < 10
            assert again < 0.1
            assert leaf == [float(rank)] * 3


def killed_in_the_middle(rank, at):
    os.environ["FUNCAVG_NODE"] = "off"
    leaves = [torch.full((4_000_000,), float(rank)), np.full(5, float(rank))]
    average(1.0)
    if rank == 1:
        collective = as_collective()
        transfer, left = collective.transfer, iter(range(at))
        collective.transfer = lambda *args: transfer(*args) if next(left, None) is not None else os.kill(os.getpid(), 9)
    try:
        result = [np.unique(leaf).tolist() for leaf in average(leaves, timeout=10)]
    except PeerLostError:
        result = None
    unchanged = (leaves[0] == rank).all().item() and (leaves[1] == rank).all().item()
    return unchanged, result


@pytest.mark.parametrize("at", [1, 6, 12])
def test_a_peer_killed_in_the_middle_of_a_call(at):
    """At its n-th of thirteen transfers. No rank returns a wrong tree, and inputs stay as they are."""
    outcomes = run_processes(3, killed_in_the_middle, at, dies=(1,))
    assert outcomes[1] is None
    for unchanged, result in (outcomes[0], outcomes[2]):
        assert unchanged
        assert result is None or result == [[1.0], [1.0]]
    assert at > 6 or outcomes[0][1] is outcomes[2][1] is None  # with most means still to come


def stalls_in_the_middle(rank):
    os.environ["FUNCAVG_NODE"] = "off"
    leaf = torch.full((4_000_000,), float(rank))
    average(1.0)
    if rank == 1:
        collective = as_collective()
        transfer, pauses = collective.transfer, iter([0] * 6 + [2.5] + [0] * 9)
        collective.transfer = lambda *args: time.sleep(next(pauses)) or transfer(*args)
    begin = time.monotonic()
    if rank != 1:
        with pytest.raises(PeerLostError, match=rf"rank {rank} of 3 waited (for rank \d|to start a transfer) "):
            average(leaf, timeout=1)
        assert time.monotonic() - begin < 2.4
        time.sleep(2)  # until the other is up again: what it sends must not arrive
    else:
        with pytest.raises(PeerLostError, match="rank 1 of 3 waited"):
            average(leaf, timeout=1)
    return (leaf == rank).all().item()


def test_a_peer_that_stalls_in_the_middle_of_a_call():
    """The timeout bounds every interval without progress."""
    assert run_processes(3, stalls_in_the_middle) == [True] * 3


def killed_before_the_first_call(rank):
    if rank == 1:
        os.kill(os.getpid(), 9)
    with pytest.raises(
        PeerLostError, match=rf"rank {rank} of 3 waited 1.5 s for rank\(s\) 1, which never called average"
    ):
        average(torch.ones(3), timeout=1.5)


def test_a_peer_killed_before_the_first_call():
    run_processes(3, killed_before_the_first_call, dies=(1,))


def never_comes(rank):
    """The group is spent; a new one works."""
    leaf = torch.full((3,), float(rank))
    if rank == 0:
        with pytest.raises(PeerLostError, match=r"waited 0.5 s for rank\(s\) 1"):
            average(leaf, timeout=0.5)
    dist.barrier()
    return average(leaf, dist.new_group()).tolist()


def test_a_peer_that_never_comes_and_a_new_group():
    assert run_processes(2, never_comes) == [[0.5] * 3] * 2


def destroyed(rank):
    group = dist.new_group()
    average(1.0, group)
    dist.destroy_process_group(group)
    with pytest.raises(
        ValueError, match=r"not registered with torch.distributed \(has it been destroyed\?\).*ProcessGroup"
    ):
        average(1.0, group)
    world = dist.group.WORLD
    assert average(float(rank)) == 0.5
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"Make a new one with init_process_group or new_group\."):
        average(1.0, world)
    return average(float(rank))  # group=None is now this process alone


def test_a_destroyed_process_group():
    assert run_processes(2, destroyed) == [0.0, 1.0]


def dtensors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    whole = torch.arange(6.0).view(2, 3)
    placed = distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
    leaf = DTensor.from_local(placed.to_local() + rank // 2, mesh, placed.placements, run_check=False)
    text = (
        r"\['w'\]:  rank 0 float32\[1, 3\] of DTensor\[2, 3\] \(.* at 0\),  rank 1 float32\[1, 3\] .* at 1\)(.|\n)*"
        r"A group that spans the shards of a DTensor cannot average it: pass the mesh of its replicate dimension\."
    )
    for group in (None, mesh["shard"]):
        if group is None or rank < 2:
            with pytest.raises(TreeMismatchError, match=text):
                average({"w": leaf}, group)
    with pytest.raises(
        ValueError, match=r"group must be a 1-D DeviceMesh, got 2 dimensions of shape \(2, 2\). Pass one"
    ):
        average({"w": leaf}, mesh)
    partial = DTensor.from_local(torch.ones(3), mesh, [Replicate(), Partial()], run_check=False)
    with pytest.raises(
        TypeError, match=r"\['p'\] is a DTensor with placement P(artial)?\(sum\), whose values are not yet summed"
    ):
        average({"p": partial}, mesh["replicate"])
    result = average({"w": leaf}, mesh["replicate"])["w"]
    assert isinstance(result, DTensor)
    assert (result.placements, result.shape, result.device_mesh) == (leaf.placements, leaf.shape, mesh)
    parameter = torch.nn.Parameter(leaf)
    with torch.no_grad():
        kept, donated = average([parameter], mesh["replicate"])[0], average([leaf], mesh["replicate"], donate=True)[0]
    assert isinstance(kept, torch.nn.Parameter)
    assert isinstance(kept.data, DTensor)
    assert donated is leaf
    assert torch.equal(leaf.to_local(), result.to_local())
    return result.to_local().tolist()


def test_dtensors():
    """Averaged over the dimension that replicates them, refused over one that shards them."""
    rows = [[[0.5, 1.5, 2.5]], [[3.5, 4.5, 5.5]]]
    assert run_processes(4, dtensors) == rows + rows
