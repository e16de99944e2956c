"""torch.compile: a step that averages breaks its graph there, and gives the same numbers."""

import pytest
import torch
from helpers.processes import run_processes

from funcavg import average, should_average, start_average


def step_of(rank):
    def step(params, number):
        moved = {name: leaf * 0.5 + rank for name, leaf in params.items()}
        if should_average(number, warmup=1, period=2):
            moved = average(moved, weight=1.0 + rank, timeout=30)
        return moved, sum((leaf**2).sum() for leaf in moved.values())

    return step


def compiled_and_not(rank, backend):
    torch._dynamo.reset()
    step, found = step_of(rank), []
    for fn in (step, torch.compile(step, backend=backend)):
        params = {"w": torch.full((3,), float(rank)), "b": torch.ones(2, dtype=torch.bfloat16)}
        with torch.no_grad():
            for number in range(4):
                params, loss = fn(params, number)
        leaf = torch.full((3,), 1.0 + rank, requires_grad=True)
        fn({"w": leaf}, 1)[1].backward()
        found.append([loss.item(), leaf.grad.tolist(), *(leaf.tolist() for leaf in params.values())])
    return found


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_numbers_are_the_same(backend):
    for compiled, eager in run_processes(2, compiled_and_not, backend, timeout=100):
        assert compiled == eager


def in_the_background(rank):
    @torch.compile(backend="eager")
    def step(leaf):
        handle = start_average(leaf + 1, timeout=30)
        return handle.wait() * 2

    with torch.no_grad():
        return step(torch.full((2,), float(rank))).tolist()


def test_a_handle_is_waited_for_in_compiled_code():
    assert run_processes(2, in_the_background, timeout=100) == [[3.0, 3.0]] * 2
