"""torchft's own lighthouse, managers and process groups: replicas are killed and join, and every mean is right."""

import gc
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.frameworks import skip_without, torch
from helpers.losing import ONCE, PER_BUCKET, left_behind
from helpers.pages import LOST
from helpers.replicas import manager_of, run_replicas

import funcavg
from funcavg import PeerLostError, _points, average, outer

STEPS, TOGETHER = 110, 15  # rounds; how many a replica goes through with all three before it is killed
NODES = ["one", "off"]


def groups_of(job, load, state, *, managed, **options):
    """Return a manager, and the group to average over."""
    from datetime import timedelta

    from torchft.process_group import ManagedProcessGroup, ProcessGroupGloo

    bare = ProcessGroupGloo(timeout=timedelta(seconds=10))
    manager = manager_of(job, bare, load, state, **options)
    return manager, ManagedProcessGroup(manager) if managed else bare


class Events:
    """Replica 1 is killed when all have been there for a while; replica 2 joins when the others have begun."""

    def __init__(self, job):
        self.job, self.together = job, 0
        self.begun = Path(job.folder, "begun")
        if job.number == 2:
            while not self.begun.exists():
                time.sleep(0.01)

    def before_the_mean(self, step, replicas):
        self.together += replicas == 3
        if step == 10:
            self.begun.touch()
        if self.job.number == 1 and self.together == TOGETHER:
            os.kill(os.getpid(), signal.SIGKILL)


def agrees(ours, theirs, rounding=8):
    """Compare within some roundings of float32."""
    rtol = rounding * 2.0**-24
    return all(torch.allclose(ours[name], theirs[name], rtol=rtol, atol=1e-6) for name in theirs)


def reduced_by_torchft(manager, tree):
    """Return torchft's own mean."""
    theirs = {name: leaf.clone() for name, leaf in tree.items()}
    for leaf in theirs.values():
        manager.allreduce(leaf).wait()
    return theirs


def beginning(number):
    return {"w": torch.arange(300_000.0) * (number + 1), "b": torch.full((7,), float(number))}


def averages(job, node, managed):
    """Each step is taken alone and averaged, with weight 0 for a replica that is still being healed."""
    os.environ["FUNCAVG_NODE"] = node
    params, events, seen = beginning(job.number), Events(job), []
    manager, group = groups_of(job, params.update, lambda: dict(params), managed=managed)
    while manager.current_step() < STEPS:
        manager.start_quorum()
        manager.wait_quorum()  # until then the group is being configured, in another thread
        step, ours = manager.current_step(), None
        params.update({name: leaf + (job.number + 1) * 0.25 for name, leaf in params.items()})
        time.sleep(0.01)
        theirs = reduced_by_torchft(manager, params)
        events.before_the_mean(step, manager.num_participants())
        try:
            ours = average(params, group, weight=float(manager.is_participating()), timeout=8)
        except PeerLostError as error:
            manager.report_error(error)
        if manager.should_commit():
            seen.append((step, manager.num_participants(), agrees(ours, theirs)))
            params.update(ours)
    return seen


def assert_right(replicas, steps=STEPS):
    """All replicas that are left have seen right means only, with two and with three replicas."""
    assert replicas[1] is None
    assert sum(len(seen) for seen in (replicas[0], replicas[2])) >= steps - 2 + TOGETHER
    assert len(replicas[0]) >= steps - 2
    for seen in (replicas[0], replicas[2]):
        assert [row for row in seen if not row[2]] == []
        assert sum(sized == 3 for _, sized, _ in seen) >= TOGETHER - 3, [sized for _, sized, _ in seen]
        assert sum(sized == 2 for _, sized, _ in seen) >= 5


@pytest.mark.parametrize("managed", [False, True])
@pytest.mark.parametrize("node", NODES)
def test_every_committed_mean_is_torchfts_own(node, managed):
    assert_right(run_replicas(3, averages, node, managed, dies=(1,), least=2))


def local(params, number):
    return {name: leaf * 0.99 + (number + 1) * 0.01 for name, leaf in params.items()}


def synchronises(job, node, managed, method):
    """Rounds of two local steps. As for torchft's own LocalSGD and DiLoCo, healing comes before a round."""
    os.environ["FUNCAVG_NODE"] = node
    now, events, seen = {"params": beginning(job.number)}, Events(job), []
    if job.number != 0:
        now["params"] = beginning(0)  # replicas start alike, as torchft's init_sync makes them

    def load(state):
        now.update(params=state["params"], state=state["state"])

    manager, group = groups_of(job, load, lambda: dict(now), managed=managed, use_async_quorum=False)
    solo = funcavg.collectives.Solo()
    pair = {
        "periodic": lambda group: funcavg.periodic(2, group=group, timeout=8),
        "diloco": lambda group: funcavg.diloco(2, outer=outer.nesterov(0.7, 0.9), group=group, timeout=8),
    }[method]
    now["state"] = pair(solo).init(now["params"])  # no anchor to agree about: all have the same
    averager, alone = pair(group), pair(solo)
    while manager.current_step() < STEPS // 2:
        manager.start_quorum()
        step, (params, state) = manager.current_step(), (now["params"], now["state"])
        time.sleep(0.01)
        synchronises_first = method == "periodic"  # at the first of every two steps; diloco at the second
        if not synchronises_first:
            params, state = averager.update(local(params, job.number), state)
        params = local(params, job.number)
        mean = reduced_by_torchft(manager, params)
        theirs, _ = alone.update(mean, state)  # of one worker, which has moved as all have in the mean
        events.before_the_mean(step, manager.num_participants())
        try:
            params, state = averager.update(params, state)
        except PeerLostError as error:
            manager.report_error(error)
        if synchronises_first and manager.errored() is None:
            params, state = averager.update(params, state)
            theirs, _ = alone.update(theirs, state)
        if manager.should_commit():
            seen.append((step, manager.num_participants(), agrees(params, theirs, rounding=64)))  # momentum adds them
            now.update(params=params, state=state)
    return seen


@pytest.mark.parametrize("method", ["periodic", "diloco"])
@pytest.mark.parametrize(("node", "managed"), [("one", True), ("off", False)])
def test_averagers_follow(node, managed, method):
    assert_right(run_replicas(3, synchronises, node, managed, method, dies=(1,), least=2), STEPS // 2)


def stands_in(job, node, managed):
    """A classic loop; after a loss, the parameters are whole, and the step is not counted."""
    os.environ["FUNCAVG_NODE"] = node
    model, events, seen = torch.nn.Linear(400, 300), Events(job), []
    manager, group = groups_of(job, model.load_state_dict, model.state_dict, managed=managed, use_async_quorum=False)
    averager = funcavg.PeriodicModelAverager(2, process_group=group, timeout=8, donate=False)
    while manager.current_step() < STEPS // 2:
        manager.start_quorum()
        step = manager.current_step()
        time.sleep(0.01)
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.99).add_((job.number + 1) * 0.01)
                param.grad = torch.zeros_like(param)
        theirs = reduced_by_torchft(manager, {name: leaf.detach() for name, leaf in model.named_parameters()})
        events.before_the_mean(step, manager.num_participants())
        before = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
        try:
            averager.average_parameters(model.parameters())  # the first of every two steps
            averager.step += averager.step % 2
        except PeerLostError as error:
            assert all(torch.equal(leaf, before[name]) for name, leaf in model.named_parameters())
            manager.report_error(error)
        if manager.should_commit():
            seen.append((step, manager.num_participants(), agrees(dict(model.named_parameters()), theirs)))
    return seen


@pytest.mark.parametrize(("node", "managed"), [("one", False), ("off", True)])
def test_the_stand_in_follows(node, managed):
    assert_right(run_replicas(3, stands_in, node, managed, dies=(1,), least=2), STEPS // 2)


def killed_at(job, node, point, at, victim, steps):
    """A replica is killed inside of a call; return the seconds from the kill to the next right mean, and leftovers."""
    os.environ["FUNCAVG_NODE"] = node
    params, passed, right, errors = beginning(job.number), [0], [], []
    manager, group = groups_of(job, params.update, lambda: dict(params), managed=False)

    def reached(where, number=0):
        if job.number == victim and where == point and group.size() == 3:
            if passed[0] == at:
                Path(job.folder, "killed").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            passed[0] += 1

    _points.reached = reached
    after = 0
    while after < steps:
        manager.start_quorum()
        manager.wait_quorum()
        params.update({name: leaf + (job.number + 1) * 0.25 for name, leaf in params.items()})
        theirs, ours = reduced_by_torchft(manager, params), None
        killed = Path(job.folder, "killed").exists()
        try:
            ours = average(params, group, weight=float(manager.is_participating()), timeout=8)
        except PeerLostError as error:
            errors.append(str(error))
            manager.report_error(error)
        if manager.should_commit():
            assert agrees(ours, theirs), (manager.current_step(), manager.num_participants())
            params.update(ours)
            after += killed and manager.num_participants() == 2
            right.append((time.time(), manager.num_participants()))
        else:
            time.sleep(0.01)
    begun = float(Path(job.folder, "killed").read_text())
    again = min(when for when, replicas in right if when > begun and replicas == 2) - begun
    gc.collect()
    return again, errors, left_behind(1)


def assert_goes_on(node, point, at, victim):
    replicas = run_replicas(3, killed_at, node, point, at, victim, 5, dies=(victim,), least=2)
    assert [number for number, found in enumerate(replicas) if found is None] == [victim]
    for again, errors, left in filter(None, replicas):
        assert again < 8, (again, errors)
        assert left == [], "left behind"
    return max(again for again, *_ in filter(None, replicas))


def two_losses(job, first):
    """A replica is lost in an average of ours and one in an all-reduce of torchft's; return the seconds after each.

    ``first`` says which comes first.
    """
    params = {"w": torch.full((10_000_000,), float(job.number))}
    manager, group = groups_of(job, params.update, lambda: dict(params), managed=False)
    after = {}
    for turn, (method, replicas) in enumerate([(first, 4), ({"ours": "torchft's", "torchft's": "ours"}[first], 3)]):
        rounds, killed = 0, Path(job.folder, f"killed{turn}")

        def die(killed=killed):
            killed.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

        while method not in after:
            manager.start_quorum()
            manager.wait_quorum()
            rounds += group.size() == replicas
            dies = job.number == 3 - turn and rounds == 4
            if method == "ours":
                _points.reached = lambda where, at=0, dies=dies, die=die: (
                    die() if dies and (where, at) == ("arrived", 5) else None
                )
                try:
                    average(params, group, weight=float(manager.is_participating()), timeout=10)
                except PeerLostError as error:
                    manager.report_error(error)
            else:
                work = manager.allreduce(params["w"].clone())
                if dies:
                    die()
                work.wait()
            if manager.should_commit() and killed.exists() and manager.num_participants() == replicas - 1:
                after[method] = time.time() - float(killed.read_text())
    return after


def seconds_to_go_on(runs):
    """Return the seconds from a kill to the next committed mean, over torchft's own all-reduce and over ours."""
    seconds = {"ours": [], "torchft's": []}
    for number in range(runs):
        first = ("ours", "torchft's")[number % 2]
        found = [f for f in run_replicas(4, two_losses, first, dies=(2, 3), least=2, timeout=120) if f is not None]
        for method, rows in seconds.items():
            rows.append(max(after[method] for after in found))
    return seconds


def test_it_goes_on_as_soon_as_torchft_does():
    seconds = seconds_to_go_on(2)
    assert min(seconds["ours"]) < min(seconds["torchft's"]) + 1, seconds


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("point", ONCE + PER_BUCKET)
def test_a_replica_that_is_killed_in_a_call(node, point):
    """A sample; tests/kills.py goes through all."""
    if node == "off" and point in ("published", "attached"):
        pytest.skip("there is no node")
    number = (ONCE + PER_BUCKET).index(point) + (node == "off")
    assert_goes_on(node, point, 0 if point in ONCE else number % 4, number % 3)


def as_the_page_has_it(job):
    scope = {"average": average, "PeerLostError": PeerLostError, "params": beginning(job.number)}
    scope["manager"], scope["group"] = groups_of(
        job, lambda state: scope.update(params=state), lambda: dict(scope["params"]), managed=False
    )
    while scope["manager"].current_step() < 3:
        exec(LOST[0], scope)
    return scope["params"]["w"][1].item()


def test_the_loop_of_the_page():
    assert run_replicas(2, as_the_page_has_it, least=2) == [1.5, 1.5]


def refused(job, kind):
    """Classes that cannot be served, by name."""
    from torchft import process_group

    group = getattr(process_group, kind)()
    manager = manager_of(job, group, lambda state: None, dict)
    manager.start_quorum()
    manager.wait_quorum()
    with pytest.raises(TypeError) as caught:
        average({"w": np.ones(3)}, group, timeout=8)
    group.shutdown()
    return str(caught.value)


def test_what_cannot_be_served():
    skip_without("torchft")
    for words in run_replicas(2, refused, "ProcessGroupBabyGloo", least=2):
        assert "a ProcessGroupBabyGloo of 2 ranks, each of which says it is rank 0" in words
        assert "use a ProcessGroupGloo" in words


def registered(job):
    """A group that torch knows, with a store of one rank: it goes by its own transfers as before."""
    import torch.distributed as dist
    from torchft.process_group import ProcessGroupGloo

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = ProcessGroupGloo()
    manager = manager_of(job, group, lambda state: None, lambda: {"nothing": 0})
    known = group.register(f"replicas{job.number}")
    manager.start_quorum()
    manager.wait_quorum()
    return [average(float(job.number), which, timeout=8) for which in (known, group)]


def test_a_group_that_has_been_registered():
    assert run_replicas(2, registered, least=2) == [[0.5, 0.5]] * 2
