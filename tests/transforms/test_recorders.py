"""While torch records a program, or pretends to run one, an average is refused on every rank."""

import functools
import io
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import mpi
from helpers.processes import run_processes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from funcavg import PeriodicModelAverager, average, diloco, stacked, start_average
from funcavg.collectives import Solo
from funcavg.testing import run_ranks


class Module(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, x):
        return average({"x": x}, self.group)["x"] * 2


def faked(call):
    with FakeTensorMode():
        return call(torch.ones(2))


def faked_without_a_tensor(call, group):
    with FakeTensorMode():
        return average(1.0, group)


RECORDERS = {
    "make_fx": (lambda call, _: make_fx(call)(torch.ones(2)), "make_fx"),
    "make_fx, fake": (lambda call, _: make_fx(call, tracing_mode="fake")(torch.ones(2)), "make_fx"),
    "fake": (lambda call, _: faked(call), "fake tensors"),
    "fake, of a number": (faked_without_a_tensor, "fake tensors"),
    "jit.trace": (lambda call, _: torch.jit.trace(call, torch.ones(2)), "torch.jit.trace"),
    "functionalize": (lambda call, _: torch.func.functionalize(call)(torch.ones(2)), "torch.func.functionalize"),
    "export": (lambda _, group: torch.export.export(Module(group), (torch.ones(2),)), "fake tensors, or torch.export"),
}


def told(fn, *args):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fn(*args)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def program(call, group):
    return lambda x: call({"x": x}, group)["x"] * 2


def refusals(rank, group, recording=0):
    """Let one rank record, and the other average; then all average."""
    said = {}
    for name, (record, _) in RECORDERS.items():
        for call in (average, lambda *args: start_average(*args).wait()):
            if rank == recording:
                key = name, call is average
                said[key] = told(record, program(call, group), group)
            else:
                said[name, call is average] = told(average, {"x": torch.ones(2)}, group)
        assert average(torch.tensor(float(rank)), group).item() == 0.5  # the group is usable, and right
    return said


def check(outcomes):
    assert len(outcomes[0]) == 2 * len(RECORDERS)
    for said in outcomes:
        for (name, _), words in said.items():
            what = RECORDERS[name][1]
            assert "average: rank 0: this is run under " in words, (name, words)
            assert what in words, (name, words)
            assert "Average outside of it. Nothing was sent" in words, (name, words)


@pytest.mark.filterwarnings("ignore")
def test_over_threads():
    """Of which one records: torch's modes are each thread's own."""
    check(run_ranks(2, lambda group: refusals(group.rank, group)))


def over_gloo(rank, node):
    os.environ["FUNCAVG_NODE"] = node
    return refusals(rank, dist.group.WORLD)


@pytest.mark.parametrize("node", ["", "off"])
def test_over_gloo(node):
    check(run_processes(2, over_gloo, node))


def over_mpi(comm):
    return refusals(comm.rank, comm)


@pytest.mark.mpi
def test_over_mpi():
    check(mpi.run_mpi(2, over_mpi))


@pytest.mark.filterwarnings("ignore:When period is 1")
def test_all_ways_in():
    def replicas(x):
        return average(x, stacked())

    def averager(x):
        pair = diloco(1, group=Solo())
        return pair.update({"x": x}, pair.init({"x": x}))[0]["x"]

    def stand_in(x):
        parameter = torch.nn.Parameter(x)
        parameter.grad = torch.ones_like(x)
        PeriodicModelAverager(1, process_group=Solo()).average_parameters([parameter])
        return parameter

    for call in (replicas, averager, stand_in):
        for record in (make_fx(call), functools.partial(lambda call, _: faked(call), call)):
            with pytest.raises(RuntimeError, match="this is run under (make_fx|fake tensors)"):
                record(torch.ones(2, 2))


class Logging(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_modes_that_only_look_on_are_fine():
    def fn(group):
        leaf = torch.full((300_000,), float(group.rank))
        with Logging(), FlopCounterMode(display=False):
            mean = average({"x": leaf, "y": torch.ones(2, dtype=torch.bfloat16)}, group)
            begun = start_average({"x": leaf}, group).wait()
        with torch.device("cpu"), torch.inference_mode():
            inside = average(leaf, group)
        return mean["x"].unique().tolist(), begun["x"].unique().tolist(), inside.unique().tolist()

    assert run_ranks(2, fn) == [([0.5], [0.5], [0.5])] * 2


def in_a_default_device(rank):
    with torch.device("meta"):  # where modules are made without memory
        return average({"x": torch.full((300_000,), float(rank), device="cpu")})["x"].unique().tolist()


def test_a_default_device_is_not_for_what_transports_make():
    assert run_processes(2, in_a_default_device) == [[0.5], [0.5]]


def test_forward_mode_over_threads_is_refused():
    def fn(group):
        x = torch.full((2,), float(group.rank))
        if group.rank:  # at one time, torch itself would fail now and then
            return [told(average, x, group), told(average, x, group)]
        return [
            told(torch.func.jvp, lambda x: average(x, group), (x,), (x,)),
            told(torch.func.jacfwd(lambda x: average(x, group)), x),
        ]

    for said in run_ranks(2, fn):
        for words in said:
            assert "forward mode (jvp, jacfwd, hessian) over ranks that are threads" in words
    alone = torch.func.jvp(lambda x: average(x, Solo()), (torch.ones(2),), (torch.ones(2),))
    assert alone[1].tolist() == [1.0, 1.0]


def test_scripted_and_saved_programs_are_not_concerned():
    """What has been recorded without an average is data."""
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    result = average(dict(scripted.named_parameters()), Solo())
    assert set(result) == {"weight", "bias"}
