"""Train a small language model on workers that may die, and go on without them: one loop, three engines.

Who is still there is for the engine to say; funcavg ends the call that waits for the lost worker, and makes equal those
that are left. Worker 1 kills itself where --kill says, and the first of the others prints what came of it.

    python examples/go_on.py torchft --kill 1@64
    mpiexec --with-ft ulfm -n 3 python examples/go_on.py ulfm --kill 1@64
    torchrun --standalone --nproc-per-node 3 --max-restarts 1 examples/go_on.py torchrun --kill 1@64

With torchft, this starts a lighthouse and three replicas, and the one that was killed again, which joins later.
(torchft says much on the way: 2> torchft.log.) Open MPI's ULFM shrinks the communicator. torchrun starts all workers
again, which go on from the checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from charlm import init_params, load_corpus, loss_fn, sample, sgd, shard, spread
from torch.func import grad_and_value

from funcavg import PeerLostError, average, broadcast, furthest

Tree = dict[str, Any]  # {"params": ..., "step": so many steps have been taken and averaged}
WORKERS = 3


@dataclass
class Report:
    """What is told of a loss when there is a mean again."""

    since: float = 0.0  # when the loss was noticed, or, under torchrun, when there was the last mean
    loss: float = math.nan  # of the last mean
    words: str = ""  # who was lost; empty where nobody was


class Engine:
    """What differs between engines: the group, and what follows a loss."""

    group: Any = None
    worker = 0  # its number stays the same, whatever its rank in the group becomes
    is_first = True  # of those that are left: it prints

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.report = args, Report()

    def lose(self, error: PeerLostError) -> None:
        """Note that somebody was lost, until there is a mean again."""
        if not self.report.words:
            self.report.words, self.report.since = f"{error}".partition(". ")[0], time.time()
            say(f"worker {self.worker}: {self.report.words}")

    def resume(self, state: Tree) -> Tree:
        """Return what to begin with."""
        return state

    def synchronise(self, trained: Tree) -> Tree:
        """Return the mean of what the workers have trained."""
        raise NotImplementedError

    def keep(self, state: Tree) -> None:
        """Keep what a worker that is started again can go on from."""

    def mean(self, trained: Tree, weight: float = 1.0) -> Tree:
        """Average parameters and momentum. Here a worker may kill itself, while the others wait for it."""
        if self.args.kill == (self.worker, trained["step"]):
            say(f"worker {self.worker} kills itself at step {trained['step']}")
            os.kill(os.getpid(), signal.SIGKILL)
        return {**trained, "params": average(trained["params"], self.group, weight=weight, timeout=self.args.timeout)}


class ULFM(Engine):
    """Open MPI, started with --with-ft ulfm: those that are left shrink the communicator."""

    def __init__(self, args: argparse.Namespace) -> None:
        from mpi4py import MPI

        super().__init__(args)
        self.group, self.worker = MPI.COMM_WORLD, MPI.COMM_WORLD.rank
        self.is_first = self.worker == 0

    def synchronise(self, trained: Tree) -> Tree:
        """Average; after a loss, again among those that are left."""
        has_mean, shrunk = False, False
        while True:
            try:
                # Of a round that was lost, some may have had the mean, and others not: all take it then.
                if shrunk and (root := furthest(trained["step"] + has_mean, self.group)) is not None:
                    trained = broadcast(trained, self.group, root=root)
                trained, has_mean, all_is_well = self.mean(trained), True, True
            except PeerLostError as error:
                all_is_well = False
                self.lose(error)
                self.group.Revoke()  # whoever still waits for us hears of it
            # In every round, lest one leave at the end while another has to average again.
            if self.all_agree(all_is_well):
                return trained
            self.group, shrunk = self.group.Shrink(), True
            self.is_first = self.group.rank == 0

    def all_agree(self, have_it: bool) -> bool:
        """Ask all that are left, who get the same answer, also where another dies meanwhile."""
        from mpi4py import MPI

        try:
            return bool(self.group.Agree(int(have_it)))
        except MPI.Exception:  # raised on all alike: somebody was lost that not all know of
            return False


class TorchFT(Engine):
    """torchft: a quorum before each average configures the group anew, and brings those that are behind up to date."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch.distributed as dist
        from torchft import Manager
        from torchft.process_group import ProcessGroupGloo

        super().__init__(args)
        self.worker, self.group = args.replica, ProcessGroupGloo(timeout=timedelta(seconds=args.timeout))
        self.state: Tree = {}
        self.healed = False
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        seconds = timedelta(seconds=3 * args.timeout)
        self.manager = Manager(
            pg=self.group,
            load_state_dict=self.load,
            state_dict=lambda: dict(self.state),
            min_replica_size=1,
            use_async_quorum=False,  # as for torchft's own LocalSGD: a replica that joins is healed before it averages
            init_sync=False,  # all begin with the same parameters
            rank=0,
            world_size=1,
            store_addr="localhost",
            store_port=self.store.port,
            replica_id=f"worker{args.replica}",
            hostname="localhost",
            timeout=seconds,
            quorum_timeout=seconds,
        )

    def load(self, state: Tree) -> None:
        """Take what another replica has."""
        self.state, self.healed = state, True

    def resume(self, state: Tree) -> Tree:
        """Begin, or join."""
        self.state = state
        return state

    def synchronise(self, trained: Tree) -> Tree:
        """Average among the quorum; where somebody is lost, among the next one."""
        self.healed = False
        while True:
            self.manager.start_quorum()
            self.is_first = self.manager.participating_rank() == 0
            if self.healed:  # what this replica has trained was from parameters that are out of date
                trained = {**self.state, "step": self.state["step"] + self.args.period}
            try:
                # One that was healed counts for nothing, unless no other is left.
                result = self.mean(trained, weight=1e-9 if self.healed else 1.0)
            except PeerLostError as error:
                self.lose(error)
                self.manager.report_error(error)  # else the next quorum would not configure the group anew
            if self.manager.should_commit():
                self.state = result
                return result


class Torchrun(Engine):
    """torchrun: it starts all workers again, and they go on from the checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch.distributed as dist

        super().__init__(args)
        self.restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self.worker, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.is_first = self.worker == 0
        # torchrun's store outlives the workers, and has the addresses of those that were there before.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart{self.restarts}", store)
        dist.init_process_group("gloo", store=store, rank=self.worker, world_size=size)
        if self.restarts:
            args.kill = None  # once is enough

    def resume(self, state: Tree) -> Tree:
        """Take rank 0's checkpoint, if there is one."""
        path = self.args.checkpoint
        if self.worker == 0 and not self.restarts:
            path.unlink(missing_ok=True)  # another job's
        if self.worker == 0 and path.exists():
            state = torch.load(path, weights_only=True)
            self.report = Report(*state.pop("report"), f"torchrun has started all again from step {state['step']}")
        return broadcast(state)

    def synchronise(self, trained: Tree) -> Tree:
        """Average. A loss ends this worker, and torchrun the others."""
        try:
            return self.mean(trained)
        except PeerLostError as error:
            self.lose(error)
            sys.exit(1)

    def keep(self, state: Tree) -> None:
        """Write a checkpoint, whole or not at all."""
        if self.worker == 0:
            draft = self.args.checkpoint.with_suffix(".draft")
            torch.save({**state, "report": (self.report.since, self.report.loss)}, draft)
            draft.replace(self.args.checkpoint)


ENGINES = {"ulfm": ULFM, "torchft": TorchFT, "torchrun": Torchrun}


def train(engine: Engine, args: argparse.Namespace) -> None:
    """Train to the end: this loop knows of no engine, and of no loss."""
    corpus = load_corpus()
    text = shard(corpus.train, engine.worker % WORKERS, WORKERS)
    valid = spread(torch.cat(corpus.valid), 128)
    params = init_params(args.seed)
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    state = engine.resume({"params": {"params": params, "velocity": zeros}, "step": 0})
    while (step := state["step"]) < args.steps:
        trained = state["params"]
        for local in range(step, step + args.period):
            batch = sample(text, args.batch, seed=args.seed, rank=engine.worker, step=local)
            grads, _ = grad_and_value(loss_fn)(trained["params"], batch)
            trained = sgd(trained, grads, args.rate * (1 - local / (args.steps + args.period)))
        state = engine.synchronise({"params": trained, "step": step + args.period})
        last, now = engine.report, time.time()
        with torch.no_grad():
            loss = loss_fn(state["params"]["params"], valid).item()
        if engine.is_first:
            if last.words:
                say(f"lost: {last.words}")
                say(f"next mean after {now - last.since:.2f} s; loss before {last.loss:.3f}, after {loss:.3f}")
            say(f"step {state['step']:4}  loss {loss:.3f}")
        engine.report = Report(now, loss)
        engine.keep(state)
    if engine.is_first:
        say(f"done: {state['step']} steps, loss {engine.report.loss:.3f}")
    sys.stdout.flush()
    os._exit(0)  # libraries that have lost a peer may wait for it when they are taken down


def say(words: str) -> None:
    """Print a line at once, whole."""
    os.write(1, f"{words}\n".encode())


def start_replicas() -> int:
    """Start a lighthouse and the replicas, and each that has died once more, as a scheduler would."""
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=500, heartbeat_timeout_ms=1000)
    environ = os.environ | {"TORCHFT_LIGHTHOUSE": lighthouse.address()}

    def start(worker: int, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, *sys.argv, "--replica", str(worker), *more]
        return subprocess.Popen(command, env=environ)  # noqa: S603  # this very program

    replicas, restarted = [start(worker) for worker in range(WORKERS)], False
    while 0 not in (codes := [replica.poll() for replica in replicas]):
        dead = [worker for worker, code in enumerate(codes) if code]
        if dead and not restarted:
            restarted, replicas[dead[0]] = True, start(dead[0], "--kill", "never")
            say(f"worker {dead[0]} is started again")
        elif len(dead) == WORKERS:
            sys.exit("all replicas have failed: see what they have said")
        time.sleep(0.05)
    for replica in replicas:  # all end at the same step, but for one that comes too late to join
        with contextlib.suppress(subprocess.TimeoutExpired):
            replica.wait(5)
        replica.kill()
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--kill", default="never", help="WORKER@STEP: a worker that kills itself, such as 1@64")
    parser.add_argument("--steps", type=int, default=480, help="of each worker (default: 480)")
    parser.add_argument("--period", type=int, default=16, help="steps between averages (default: 16)")
    parser.add_argument("--batch", type=int, default=8, help="windows of text in a step (default: 8)")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate, falling to 0 (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for other workers (default: 20)")
    parser.add_argument("--checkpoint", type=Path, default=Path("go_on.pt"), help="torchrun's (default: go_on.pt)")
    parser.add_argument("--replica", type=int, help="be this replica of torchft's; set by the command itself")
    args = parser.parse_args()
    worker, at, step = args.kill.partition("@")
    if args.kill != "never" and not (at and worker.isdigit() and step.isdigit()):
        parser.error(f"--kill must be WORKER@STEP, such as 1@64, got {args.kill}")
    args.kill = None if args.kill == "never" else (int(worker), int(step))
    if args.steps < 1 or args.period < 1:
        parser.error(f"--steps and --period must be at least 1, got {args.steps} and {args.period}")
    if args.kill and args.kill[1] % args.period:
        parser.error(f"--kill: workers average at multiples of {args.period} steps, got {args.kill[1]}")
    return args


def main() -> None:
    """Be a worker, or start them."""
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.engine == "torchft" and args.replica is None:
        sys.exit(start_replicas())
    train(ENGINES[args.engine](args), args)


if __name__ == "__main__":
    main()
