"""What: the mean of a tree over the ranks of a group, as a pure function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from funcavg._compile import not_compiled
from funcavg._engine import Handle, carry_out, session_of
from funcavg._transforms import Call, way_of
from funcavg._trees import Options, Timeout, Where, failed_request
from funcavg.collectives import as_collective

if TYPE_CHECKING:
    from funcavg.wires import Wire

__all__ = ["average", "average_with", "report_mistake", "start_average", "start_with"]

T = TypeVar("T")


def average(  # noqa: PLR0913  # public: its options are keywords
    params_tree: T,
    group: Any = None,
    *,
    weight: float | Sequence[float] | None = None,
    where: Where | None = None,
    donate: bool = False,
    timeout: Timeout = None,
    wire: str | Wire | None = None,
) -> T:
    r"""Return the mean of a parameter tree over the ranks of ``group``.

    A list of trees is a tree, too: for the mean of several trees that one process holds, see `funcavg.mean`.

    Every floating or complex leaf becomes ``Σ_i w_i x_i / Σ_i w_i`` over ranks ``i``. Use the return
    value: the inputs are never written to (unless donated), and no averaged leaf shares memory with them.

    Args:
        params_tree: Leaves in dicts, lists, tuples, NamedTuples and registered dataclasses, nested at will, and
            in whatever ``jax.tree_util`` knows. torch tensors, JAX and NumPy arrays and numbers of floating and complex
            dtypes are averaged, ``ml_dtypes`` included. Bools, integers, typed PRNG keys and ``None`` pass through: the
            same object comes back. All ranks pass the same paths, shapes and dtypes.
        group: Who takes part: ``None``, a torch ``ProcessGroup`` or 1-D ``DeviceMesh``, an mpi4py communicator, or a
            `Collective`; see `funcavg.collectives.as_collective`. Inside ``jax.shard_map``, ``pmap`` and ``vmap``, an
            axis name or a tuple of them. For replicas that this process holds, `funcavg.stacked`. A rank outside of
            the group gets its very tree back.
        weight: This rank's weight, a finite number at least 0; ``None`` on all ranks for the plain mean. Values of
            a rank with weight 0 are never read.
        where: Called with the path of each leaf, a tuple of keys and positions; leaves that it refuses pass through
            before their type is looked at. It must refuse the same leaves on all ranks.
        donate: Let the result be written into the inputs' memory: the very same arrays come back, and nothing of
            the tree's size is allocated. After an error their values are undefined. Ignored for JAX leaves.
        timeout: Seconds, or a ``timedelta``, to wait for the other ranks to arrive, and then for any one bucket to make
            its way. ``None`` for the timeout that a torch group was made with, where that is not torch's default; else
            for 300 seconds.
        wire: How numbers are written while they travel between hosts: ``"bfloat16"``, ``"int8"``, ``"int4"`` or
            ``"int2"`` send 2, 4, 8 and 16 times fewer bytes than float32, and round means (relative error 0.002, 0.01,
            0.14 and 0.5); a `funcavg.wires.Wire` of your own; ``None`` for exactly. The same on all ranks. For what is
            small in itself, as pseudo-gradients are, and not for parameters: see "Slow links" in the docs. float64,
            leaves that are no wider than the code, and ranks of one host, are as without. Ranks that are threads count
            as hosts.

    Returns:
        A tree of the same containers, key order kept. Each averaged leaf has its input's framework, dtype, shape,
        device and memory format; tied leaves come back tied. All ranks of a call get the same bits. Outside of a
        torch graph, ``requires_grad`` and ``nn.Parameter`` are kept; under ``torch.func`` transforms and where
        gradients are recorded, the result is differentiable, and its adjoint is again an average:
        ``x̄_i = (w_i / Σ w) Σ_j ȳ_j``, which all ranks must take.

    Raises:
        TreeMismatchError: If ranks disagree about paths, shapes, dtypes, order or options. On every rank alike.
        TypeError: If a leaf can be neither averaged nor passed through, or a weight is no number. On every rank
            alike, whoever made the mistake. If ``group`` is not a group: on this rank.
        ValueError: If a weight is negative or not finite, all weights are 0, a leaf cannot be donated, or there is no
            such ``wire``; or with a ``wire`` under torch's derivatives. On every rank alike. If ``timeout`` is not
            positive; or with a ``wire`` over an axis, over stacked replicas, or where JAX traces a derivative: on this
            rank.
        PeerLostError: If a rank dies or does not come in time. On the ranks that wait for it.
        RuntimeError: If ``group=None`` under a launcher without an initialised group, or another call is under way
            on the group. On this rank.

        Whatever is raised, inputs are unchanged (unless donated).

    Communication:
        One gather of 48 bytes per rank, then, with ``B`` the bytes of all averaged leaves, ``N`` ranks send
        ``2 B (N-1) / N`` each, in buckets of at most 16 MiB. Ranks of one host do so through shared memory
        (unless ``FUNCAVG_NODE=off``), and one of them for each shard sends on to the other hosts. The first call on a
        group gathers three times more, to find out who shares memory. With a ``wire``, ``B`` is what the code takes,
        and leaves on an accelerator that it encodes travel by way of the host, where there are several.

    Accuracy:
        ``|result - mean| ≤ ½ ulp + N u mean|x_i|`` with
        ``u = 2⁻⁵³``; ``u = 2⁻²⁴`` on NCCL, which sums float32 in float32, and where means of several
        hosts' ranks cross between them. With a ``wire``, the error of two codes besides, whatever the number of ranks:
        of what each rank sends, and of the mean.

    Examples:
        >>> import numpy as np
        >>> from funcavg import average
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     params = {"w": np.full(2, float(group.rank)), "step": 7}
        ...     return average(params, group, weight=1 + group.rank)
        >>> run_ranks(2, fn)[0]
        {'w': array([0.66666667, 0.66666667]), 'step': 7}

    References:
        Stich, [Local SGD Converges Fast and Communicates Little](https://arxiv.org/abs/1805.09767), ICLR 2019.
    """
    options = Options(weight, where, donate, timeout, wire=wire).checked("average")
    return average_with(options, params_tree, group)


def report_mistake(mistake: Exception, group: Any, options: Options) -> None:
    """Come to a call of `average` that the other ranks make, only to raise a mistake of this rank on all of them."""
    collective = as_collective(group)
    if collective is not None:
        with session_of(collective).entered("average"):
            carry_out(failed_request(mistake, options), collective)


@not_compiled
def start_average(  # noqa: PLR0913  # as average
    params_tree: T,
    group: Any = None,
    *,
    weight: float | Sequence[float] | None = None,
    where: Where | None = None,
    donate: bool = False,
    timeout: Timeout = None,
    wire: str | Wire | None = None,
) -> Handle[T]:
    """Start to average, and return a handle; the result is that of `average`, which see.

    Agreement and transfers go on in the background, so this never waits for other ranks. The inputs must be
    neither written to nor freed until ``handle.wait()`` has returned, as with ``MPI_Iallreduce``. (With FSDP: wait
    before parameters are resharded.) One call at a time can be under way
    on a group. Leaves in a GPU's memory, groups that cannot be duplicated, and the first call on an MPI communicator
    are averaged inside ``wait()``, whose current CUDA stream the result belongs to.

    Args:
        params_tree: As for `average`, like all that follows.
        group: Who takes part.
        weight: This rank's weight.
        where: Which leaves are averaged.
        donate: Let the result be written into the inputs' memory.
        timeout: Seconds to wait for the other ranks, and for any one bucket.
        wire: How numbers are written while they travel between hosts.

    Returns:
        A `Handle`. One that is dropped without ``wait`` warns.

    Raises:
        RuntimeError: If another call is under way on the group, or a transform of ``torch.func`` is active, or a leaf
            requires grad while gradients are recorded. On this rank, at once. All that `average` raises on the word
            of other ranks is raised by ``wait``.

    Examples:
        >>> import numpy as np
        >>> from funcavg import start_average
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     handle = start_average({"w": np.array([float(group.rank)])}, group)
        ...     # ... compute something that does not write to the tree ...
        ...     return handle.wait()
        >>> run_ranks(2, fn)
        [{'w': array([0.5])}, {'w': array([0.5])}]
    """
    options = Options(weight, where, donate, timeout, wire=wire).checked("start_average")
    return start_with(options, params_tree, group)


def start_with(
    options: Options,
    params_tree: T,
    group: Any,
    who: str = "start_average",
    keep: Callable[[Handle[Any]], None] | None = None,
) -> Handle[T]:
    """As `start_average`, with options that have been checked, for ``who``; ``keep``: see `depart`."""
    call = Call(who, params_tree, group, options, keep)
    return cast("Handle[T]", way_of(call).start(call))


@not_compiled
def average_with(options: Options, params_tree: T, group: Any) -> T:
    """As `average`, with options that have been checked."""
    call = Call("average", params_tree, group, options)
    return cast("T", way_of(call).average(call))
