"""A rank is killed, and the others go on: the same loop over torch's own groups and over ones that are configured anew.

MPI's have a file of their own (tests/collectives/test_ulfm.py), and so has torchft.
"""

from itertools import count
from pathlib import Path

import pytest
from helpers import losing
from helpers.frameworks import dist
from helpers.processes import run_processes

SIZE = 3


def train(rank, case, kind, folder):
    """Whoever runs the job says who is left; here it is known."""
    from helpers.configured import Wrapper

    left, numbers = [who for who in range(SIZE) if who != case.victim], count()
    first = Wrapper()
    group = first if kind == "configured" else dist.group.WORLD
    if kind == "configured":
        first.configure(Path(folder, "first"), rank, SIZE, 0)

    def configured(wrapper):
        number = next(numbers)
        wrapper.configure(Path(folder, str(number)), left.index(rank), len(left), 1 + number)
        return wrapper

    def again(_):
        return configured(Wrapper())

    return losing.train_and_lose(rank, case, group, lambda: configured(first), again)


def assert_all_go_on(case, kind, folder):
    """Return the seconds until the call that was lost had ended, at most."""
    seen = run_processes(SIZE, train, case, kind, str(folder), dies=(case.victim,), timeout=90)
    return losing.assert_all_went_on(case, seen)


@pytest.mark.parametrize("mode", losing.MODES)
@pytest.mark.parametrize("point", losing.ONCE + losing.PER_BUCKET)
def test_survivors_go_on(tmp_path, point, mode):
    """A sample; tests/kills.py goes through all."""
    number = [*losing.MODES].index(mode) + (losing.ONCE + losing.PER_BUCKET).index(point)
    kind = ("torch", "configured")[number % 2]
    at = 0 if point in losing.ONCE else number % 5
    case = losing.Case(mode, losing.METHODS[number % 3], point, at, number % SIZE)
    if not losing.can_be(case, SIZE):
        case = case._replace(victim=2)
        if not losing.can_be(case, SIZE):
            pytest.skip("there is no node")
    assert_all_go_on(case, kind, tmp_path)
