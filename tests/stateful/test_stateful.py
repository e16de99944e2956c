"""The shims side by side with torch's own classes: same model, same data."""

import copy
import inspect
import io
import itertools
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.algorithms.model_averaging.averagers as torch_averagers
import torch.distributed.algorithms.model_averaging.hierarchical_model_averager as torch_hierarchical
import torch.distributed.algorithms.model_averaging.utils as torch_utils
from helpers.processes import run_processes
from torch.distributed.optim import PostLocalSGDOptimizer as TorchOptimizer

import funcavg
from funcavg import TreeMismatchError, stateful
from funcavg.stateful import _averaging
from funcavg.testing import run_ranks

OURS, THEIRS = funcavg.PeriodicModelAverager, torch_averagers.PeriodicModelAverager
OUR_HIERARCHY, THEIR_HIERARCHY = funcavg.HierarchicalModelAverager, torch_hierarchical.HierarchicalModelAverager


@pytest.fixture
def alone():
    """Make this process the one rank of a default group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parameters(*tensors, grads=True):
    """Make parameters that have gradients."""
    params = [torch.nn.Parameter(tensor) for tensor in tensors]
    for param in params:
        param.grad = torch.zeros_like(param) if grads else None
    return params


# Construction: torch's by construction, except for types


def words(make, **arguments):
    """Return what constructing raises and warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = None
        try:
            make(**arguments)
        except Exception as raised:
            error = type(raised), str(raised)
    return error, [(warning.category, str(warning.message), warning.filename, warning.lineno) for warning in caught]


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        *(
            (OURS, THEIRS, arguments)
            for arguments in [
                {"period": 4},
                {"period": 0},
                {"period": -1},
                {"period": 4, "warmup_steps": -1},
                {"period": 0, "warmup_steps": -1},  # which is looked at first?
                {"period": 1, "warmup_steps": 3},  # warns
                {"period": np.int64(2), "warmup_steps": np.int32(3)},
            ]
        ),
        *(
            (OUR_HIERARCHY, THEIR_HIERARCHY, arguments)
            for arguments in [
                {"period_group_size_dict": {4: 1}, "warmup_steps": 3},
                {"period_group_size_dict": {2: 1, 6: 1}},
                {},
                {"period_group_size_dict": {}},
                {"period_group_size_dict": {0: 1}},
                {"period_group_size_dict": {-2: 1, 4: 1}},
                {"period_group_size_dict": {4: 2}},
                {"period_group_size_dict": {4: 2}, "warmup_steps": -1},
                {"period_group_size_dict": {4: 1}, "warmup_steps": -1},
                {"period_group_size_dict": {1: 1}},  # warns
                {"period_group_size_dict": {1: 2}},  # warns, then raises
            ]
        ),
    ],
)
@pytest.mark.parametrize("group", [True, False])
def test_the_same_words_as_torch(request, group, ours, theirs, arguments):
    """Errors, their order, warnings and the line that they point to: also without a default group."""
    if group:
        request.getfixturevalue("alone")
    expected = words(theirs, **arguments)
    assert words(ours, **arguments) == expected
    assert all(filename == __file__ for *_, filename, _ in expected[1])
    assert expected[0] is not None or group


@pytest.mark.usefixtures("alone")
def test_the_warning_for_period_1_points_to_the_users_line():
    with pytest.warns(UserWarning, match="^When period is 1, no need to use model averaging because") as caught:
        OURS(1)
    assert (caught[0].filename, caught[0].lineno) == (__file__, inspect.currentframe().f_lineno - 1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [(OURS, THEIRS, (4, 3)), (OUR_HIERARCHY, THEIR_HIERARCHY, ({2: 1, 4: 1}, 3))],
)
def test_the_same_attributes_and_signature_as_torch(ours, theirs, arguments):
    averager = ours(*arguments)
    assert vars(averager) == vars(theirs(*arguments)) | {"where": None, "timeout": None, "donate": True}
    assert averager.step == 0
    assert averager.process_group is dist.group.WORLD
    assert isinstance(averager, (theirs, funcavg.ModelAverager))
    assert isinstance(averager, torch_averagers.ModelAverager)
    added = {"where": None, "timeout": None, "donate": True}
    mine, torchs = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert [(p.name, p.kind, p.default) for p in mine.values() if p.name not in added] == [
        (p.name, p.kind, p.default) for p in torchs.values()
    ]
    assert {name: mine[name].default for name in added} == added
    assert {mine[name].kind for name in added} == {inspect.Parameter.KEYWORD_ONLY}
    assert vars(copy.copy(averager)) == vars(averager)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 2.5}, "Arg ``period`` must be an integer, got 2.5 of type float."),
        ({"period": True}, "Arg ``period`` must be an integer, got True of type bool."),
        ({"period": np.True_}, "Arg ``period`` must be an integer, got (np.True_|True) of type bool_?."),
        ({"period": torch.tensor(True)}, r"Arg ``period`` must be an integer, got tensor\(True\) of type Tensor."),
        ({"period": "4"}, "Arg ``period`` must be an integer, got '4' of type str."),
        ({"period": None}, "Arg ``period`` must be an integer, got None of type NoneType."),
        ({"period": 4, "warmup_steps": 1.0}, "Arg ``warmup_steps`` must be an integer, got 1.0 of type float."),
        ({"period": 4, "warmup_steps": False}, "Arg ``warmup_steps`` must be an integer, got False of type bool."),
    ],
)
def test_periodic_types_are_checked(arguments, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        OURS(**arguments, process_group=funcavg.collectives.Solo())


def test_torch_checks_no_types():
    """Hence the check."""
    averager = THEIRS(2.5, warmup_steps=True, process_group=funcavg.collectives.Solo())
    assert (averager.period, averager.warmup_steps) == (2.5, True)


HIERARCHY = "arg ``period_group_size_dict``"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([(2, 1)],), TypeError, rf"A{HIERARCHY[1:]} must be a mapping, got \[\(2, 1\)\] of type list."),
        (({2.5: 1},), TypeError, f"A period in {HIERARCHY} must be an integer, got 2.5 of type float."),
        (({True: 1},), TypeError, f"A period in {HIERARCHY} must be an integer, got True of type bool."),
        (({2: 1.0},), TypeError, f"A group size in {HIERARCHY} must be an integer, got 1.0 of type float."),
        (({2: True},), TypeError, f"A group size in {HIERARCHY} must be an integer, got True of type bool."),
        (({2: 1}, 1.5), TypeError, "Arg ``warmup_steps`` must be an integer, got 1.5 of type float."),
        (({2: 1}, 0, "x"), TypeError, "Arg ``process_group`` must be a ProcessGroup or None, got 'x' of type str."),
        (
            ({16: 1, 4: 1},),
            ValueError,
            (
                rf"Periods in {HIERARCHY} must ascend, got \[16, 4\]. The last one that divides a step is used, so a "
                "larger one before it may never be."
            ),
        ),
        *(
            (
                (hierarchy,),
                ValueError,
                rf"Group sizes in {HIERARCHY} must be positive and each divide the next, got \[{sizes}\].",
            )
            for hierarchy, sizes in [({2: 2, 4: 1}, "2, 1"), ({2: 2, 4: 3}, "2, 3"), ({2: 0, 4: 1}, "0, 1")]
        ),
    ],
)
def test_a_hierarchy_is_checked(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        OUR_HIERARCHY(*arguments)


@pytest.mark.usefixtures("alone")
def test_torch_never_reaches_a_larger_period_that_comes_first():
    """Hence the check."""
    averager = THEIR_HIERARCHY({16: 1, 4: 1})
    small = averager.period_process_group_dict[4] = object()
    reached = [setattr(averager, "step", step) or averager._find_process_group() for step in range(64)]
    assert {group for group in reached if group} == {small}


@pytest.mark.usefixtures("alone")
def test_subclasses_may_take_other_arguments():
    class Named(OURS):
        def __init__(self, name, period):
            super().__init__(period)
            self.name = name

    averager = Named("mine", 2)
    assert (averager.name, averager.period) == ("mine", 2)
    with pytest.raises(TypeError, match="Arg ``period`` must be an integer, got 2.5 of type float"):
        Named("mine", 2.5)


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        funcavg.ModelAverager(funcavg.collectives.Solo())

    class Never(funcavg.ModelAverager):
        def average_parameters(self, params):
            self.step += 1

    averager = Never(funcavg.collectives.Solo())
    averager.average_parameters([])
    assert averager.state_dict() == {"step": 1}


def test_without_torch_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None; import funcavg\n"
        "for name in ('ModelAverager', 'PostLocalSGDOptimizer'):\n"
        "    try: getattr(funcavg, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cure = "Install it with `pip install 'funcavg[torch]'`."
    assert done.stdout == 2 * f"funcavg.stateful needs torch with torch.distributed. {cure}\n"


# When: the same steps as torch


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("periods", "warmup"), [*itertools.product([(1,), (4,), (2, 4), (3, 4), (2, 3, 8)], [0, 1, 6, 13])]
)
def test_a_hierarchy_averages_at_torchs_steps_over_torchs_groups(periods, warmup):
    """Periods divide the step, not the steps since the warm-up; the largest wins; all steps count."""
    trace = {OUR_HIERARCHY: [], THEIR_HIERARCHY: []}
    for kind, module, name in [
        (OUR_HIERARCHY, stateful, "average_parameters"),
        (THEIR_HIERARCHY, torch_utils, "average_parameters_or_parameter_groups"),
    ]:
        with warnings.catch_warnings(), mock.patch.object(module, name) as average:
            warnings.simplefilter("ignore")
            averager = kind(dict.fromkeys(periods, 1), warmup)
            averager.period_process_group_dict = {period: f"the group of {period}" for period in periods}
            for step in range(40):
                averager.average_parameters([])
                trace[kind] += [(step, call.args[1]) for call in average.call_args_list]
                average.reset_mock()
            assert averager.step == 40
    assert trace[OUR_HIERARCHY] == trace[THEIR_HIERARCHY]
    if (periods, warmup) == ((4,), 13):
        assert [step for step, _ in trace[OUR_HIERARCHY]] == [16, 20, 24, 28, 32, 36]


# Side by side: one job for each number of ranks

PERIODS, WARMUPS, STEPS = range(1, 6), range(8), 14


class Net(torch.nn.Module):
    """Has a frozen layer, which differs between ranks and must go on doing so."""

    def __init__(self, rank):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        draw = torch.Generator().manual_seed(0)  # torch's default one is shared by threads
        for param in self.layers.parameters():
            torch.nn.init.normal_(param, generator=draw)
        self.frozen = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.frozen.weight.fill_(rank)

    def forward(self, x):
        return self.frozen(self.layers(x))


def batch(rank, step):
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 4, generator=draw)


def flat(params):
    return torch.cat([param.detach().reshape(-1).double() for param in params])


def optimizer_of(net):
    groups = [{"params": list(net.layers[0].parameters()), "lr": 0.02}, {"params": [*net.layers[2:].parameters()]}]
    groups.append({"params": list(net.frozen.parameters())})
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def train_both(rank, period, warmup):
    """Train two models, one with torch's averager. Return both lists of averaging steps, and what was averaged."""
    size, both = dist.get_world_size(), []
    for kind in (OURS, THEIRS):
        net = Net(rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # period 1
            both.append((net, optimizer_of(net), kind(period, warmup)))
    steps, firings = ([], []), []
    patches = (
        mock.patch.object(_averaging, "average_with", wraps=_averaging.average_with),
        mock.patch.object(torch_utils, "average_parameters", wraps=torch_utils.average_parameters),
    )
    with patches[0] as ours, patches[1] as theirs:
        for step in range(STEPS):
            for net, optimizer, _ in both:
                optimizer.zero_grad()
                net(batch(rank, step)).square().mean().backward()
                optimizer.step()
            before = [flat(net.layers.parameters()) for net, _, _ in both]
            assert torch.equal(*before), before
            assert torch.isfinite(before[0]).all()
            for i, (net, optimizer, averager) in enumerate(both):
                # Odd periods pass parameters, even ones parameter groups.
                averager.average_parameters(net.parameters() if period % 2 else optimizer.param_groups)
                if (ours, theirs)[i].called:
                    steps[i].append(step)
                    (ours, theirs)[i].reset_mock()
                assert averager.step == step + 1
            after = [flat(net.layers.parameters()) for net, _, _ in both]
            if steps[0][-1:] == [step]:
                firings.append((before[0], *after))
            if size > 2:  # ours rounds once and torch three times: go on from the same numbers
                for mine, yours in zip(both[0][0].parameters(), both[1][0].parameters(), strict=True):
                    yours.data.copy_(mine.data)
    frozen = [[torch.unique(net.frozen.weight).tolist(), net.frozen.weight.grad] for net, _, _ in both]
    return *steps, firings, frozen


def average_both(tensors):
    """Average copies of the tensors with our averager and with torch's."""
    results = []
    for kind in (OURS, THEIRS):
        params = parameters(*(tensor.clone() for tensor in tensors))
        kind(2).average_parameters(params)
        results.append([param.data for param in params])
    return tensors, *results


def side_by_side(rank):
    torch.manual_seed(rank)
    exact = torch.randint(-(2**13), 2**13, (500,)) / 2**10  # float32 holds their sums
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    return {
        "trained": {pair: train_both(rank, *pair) for pair in itertools.product(PERIODS, WARMUPS)},
        "exact": average_both([exact]),
        "random": average_both([torch.randn(2000)]),
        "mixed": average_both([torch.randn(50).to(dtype) for dtype in dtypes]),
    }


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request):
    return run_processes(request.param, side_by_side)


def bound(befores, result, unit):
    """Return the accuracy bound: half an ulp of the result, and size * unit * mean |x|."""
    _, exponent = torch.frexp(result.double())
    ulp = torch.finfo(result.dtype).eps * torch.exp2(exponent.double() - 1)
    return ulp / 2 + len(befores) * unit * torch.stack(befores).double().abs().mean(0)


def assert_bounds_hold(befores, ours, theirs, units=(2**-53, 2**-24)):
    """Check both results against the mean, which float64 knows to 2 ** -53 as well."""
    mean = torch.stack(befores).double().sum(0) / len(befores)
    slack = len(befores) * 2**-53 * mean.abs()
    for result, unit in zip((ours, theirs), units, strict=True):
        assert ((result.double() - mean).abs() <= bound(befores, result, unit) + slack).all()


def test_training_averages_at_torchs_steps(ranks):
    for period, warmup in itertools.product(PERIODS, WARMUPS):
        expected = [step for step in range(STEPS) if step >= warmup and (step - warmup) % period == 0]
        assert expected
        for rank in ranks:
            assert rank["trained"][period, warmup][:2] == (expected, expected)


def test_training_comes_to_torchs_parameters(ranks):
    """At sizes 1 and 2 bit for bit, in a whole training run; else at each averaging, within the accuracy bound."""
    for pair in itertools.product(PERIODS, WARMUPS):
        for firing in zip(*(rank["trained"][pair][2] for rank in ranks), strict=True):
            befores, ours, theirs = ([x.float() for x in column] for column in zip(*firing, strict=True))
            assert all(torch.equal(ours[0], other) for other in ours)
            assert len(ranks) == 1 or not torch.equal(befores[0], befores[1])
            if len(ranks) <= 2:
                assert torch.equal(ours[0], theirs[0])
            assert_bounds_hold(befores, ours[0], theirs[0])


def test_frozen_parameters_stay_as_they_are(ranks):
    for pair in itertools.product(PERIODS, WARMUPS):
        for number, rank in enumerate(ranks):
            assert rank["trained"][pair][3] == [[[number], None]] * 2


def test_the_bits_of_torch_wherever_float32_holds_the_sum(ranks):
    if len(ranks) != 3:
        for _, ours, theirs in (rank["exact"] for rank in ranks):
            assert torch.equal(ours[0], theirs[0])


def test_elsewhere_the_sum_in_float64_is_nearer(ranks):
    befores, ours, theirs = zip(*(rank["random"] for rank in ranks), strict=True)
    assert_bounds_hold([before[0] for before in befores], ours[0][0], theirs[0][0])
    mean = torch.stack([before[0] for before in befores]).double().mean(0)
    errors = [(result[0][0] - mean).abs().sum() for result in (ours, theirs)]
    assert errors[0] < errors[1] if len(ranks) > 2 else errors[0] == errors[1]


def test_mixed_dtypes(ranks):
    """Torch promotes all of them to the widest, here float64; funcavg averages each in its own way."""
    befores, ours, theirs = zip(*(rank["mixed"] for rank in ranks), strict=True)
    for i, before in enumerate(befores[0]):
        assert ours[0][i].dtype == theirs[0][i].dtype == before.dtype
        assert_bounds_hold([tensors[i] for tensors in befores], ours[0][i], theirs[0][i], (2**-53, 2**-53))


# Groups


@pytest.mark.usefixtures("alone")
def test_periodic_averagers_take_whatever_group_average_takes():
    mesh = dist.init_device_mesh("cpu", (1,))
    averager = OURS(2, process_group=mesh)
    with mock.patch.object(_averaging, "average_with", wraps=_averaging.average_with) as average:
        averager.average_parameters(parameters(torch.ones(2)))
    assert average.call_args.args[2] is mesh
    averager = OURS(2, process_group="ranks")
    with pytest.raises(TypeError, match="is an axis name, which funcavg.average takes inside"):
        averager.average_parameters(parameters(torch.ones(2)))
    averager = OURS(2, process_group=4.5)
    with pytest.raises(
        TypeError, match="group must be None, a torch.distributed ProcessGroup, .* got 4.5 of type float"
    ):
        averager.average_parameters(parameters(torch.ones(2)))


def hierarchies(rank):
    ours, theirs = {}, {}
    for hierarchy, warmup in itertools.product([{2: 2, 4: 4}, {1: 1, 3: 2, 4: 4}], [0, 3]):
        for kind, trace in ((OUR_HIERARCHY, ours), (THEIR_HIERARCHY, theirs)):
            averager = kind(hierarchy, warmup)
            results = trace[tuple(hierarchy), warmup] = []
            for step in range(14):
                params = parameters(torch.tensor([4.0**rank, step]))  # the mean tells whose it is
                averager.average_parameters(params)
                results.append(params[0].tolist())
            sizes = {period: dist.get_world_size(group) for period, group in averager.period_process_group_dict.items()}
            assert sizes == hierarchy
    return ours, theirs


def test_a_hierarchy_of_four_ranks():
    for rank, (trace, torchs_trace) in enumerate(run_processes(4, hierarchies)):
        assert trace == torchs_trace
        pair = [1.0, 4.0] if rank < 2 else [16.0, 64.0]
        means = {0: 85 / 4, 2: sum(pair) / 2, 3: 4.0**rank, 5: 4.0**rank}
        for step, mean in means.items():
            assert trace[(2, 4), 0][step] == [mean, step]
        assert trace[(2, 4), 3][2] == [4.0**rank, 2]


def outside_and_disagreement(rank):
    """Ranks 0 and 1 are a group. On rank 1 a parameter has no gradient; rank 2 is outside."""
    group = dist.new_group([0, 1])
    averager, theirs = OURS(2, process_group=group), THEIRS(2, process_group=group)
    params = parameters(torch.full((3,), float(rank)), torch.full((2,), float(rank)))
    if rank == 1:
        params[1].grad = None
    message = None
    try:
        averager.average_parameters(params)
    except TreeMismatchError as error:
        message = str(error)
    unchanged, step = [param.tolist() for param in params], averager.step
    params[1].grad = torch.zeros(2)
    averager.average_parameters(params)
    if rank == 2:  # not even a missing gradient matters there
        params[0].grad = params[1].grad = None
        averager.average_parameters(params)
        theirs.average_parameters(params)
    return message, unchanged, step, [param.tolist() for param in params], averager.step, theirs.step


MISSING_GRADIENT = (
    "average: ranks passed trees that do not match (1 of 2 ranks differs from rank 0).\n"
    "    params_tree[1]:  rank 0 float32[2],  rank 1 has no such leaf\n"
    "Nothing was sent and the inputs are unchanged, on every rank. Every rank must pass the same paths, shapes, "
    "dtypes, order and options. A parameter whose grad is None counts as no leaf."
)


def test_processes_that_disagree_about_gradients_and_one_outside_of_the_group():
    """Torch's averager hangs, or dies with a reset connection."""
    first, second, outside = run_processes(3, outside_and_disagreement)
    assert first == (MISSING_GRADIENT, [[0.0] * 3, [0.0] * 2], 0, [[0.5] * 3, [0.5] * 2], 1, 0)
    assert second == (MISSING_GRADIENT, [[1.0] * 3, [1.0] * 2], 0, [[0.5] * 3, [0.5] * 2], 1, 0)
    assert outside == (None, [[2.0] * 3, [2.0] * 2], 1, [[2.0] * 3, [2.0] * 2], 3, 1)


def optimizers(rank):
    """Pair both optimizers with both averagers; look at what becomes of parameters' memory."""
    results = {}
    for ours in itertools.product([True, False], repeat=2):
        net = Net(rank)
        averager = (OURS if ours[1] else THEIRS)(period=3, warmup_steps=2)
        optimizer = (funcavg.PostLocalSGDOptimizer if ours[0] else TorchOptimizer)(optimizer_of(net), averager)
        addresses = [param.data_ptr() for param in net.layers.parameters()]
        alias = next(net.parameters()).detach().view(-1)
        for step in range(7):
            optimizer.zero_grad()
            net(batch(rank, step)).square().mean().backward()
            assert optimizer.step() is None
        kept = addresses == [param.data_ptr() for param in net.layers.parameters()]
        fresh = torch.equal(alias, next(net.parameters()).detach().view(-1))
        state = optimizer.state_dict()
        shared = len({param.untyped_storage().data_ptr() for param in net.layers.parameters()}) == 1
        results[ours] = flat(net.parameters()), (kept, fresh, shared), (list(state), state["step"]), repr(optimizer)
    return results


def test_optimizers_and_averagers_of_either_kind_go_together():
    for rank in run_processes(2, optimizers):
        params, _, layout, shown = rank[True, True]
        for (_, our_averager), (other, memory, other_layout, other_shown) in rank.items():
            assert torch.equal(params, other)
            assert layout == other_layout == (["state", "param_groups", "step"], 7)
            assert shown == other_shown
            # Torch makes all parameters views of one new tensor, and leaves earlier views behind.
            assert memory == ((True, True, False) if our_averager else (False, False, True))


# Memory


def test_parameters_keep_their_memory_and_its_layout():
    def fn(group):
        image = torch.full((2, 3, 4, 5), float(group.rank)).contiguous(memory_format=torch.channels_last)
        array = np.full(6, float(group.rank), np.float32)
        params = parameters(image, torch.from_numpy(array), torch.full((3,), group.rank + 0j))
        params.append(params[1])  # the same parameter twice
        before = [(param.data_ptr(), param.stride(), param.requires_grad, id(param.grad)) for param in params]
        OURS(2, process_group=group).average_parameters(params)
        after = [(param.data_ptr(), param.stride(), param.requires_grad, id(param.grad)) for param in params]
        return before == after, array.tolist(), {complex(x) for param in params for x in param.detach().reshape(-1)}

    assert run_ranks(2, fn) == [(True, [0.5] * 6, {0.5 + 0j})] * 2


def test_parameters_that_overlap_are_refused_by_all_ranks():
    def fn(group):
        memory = torch.full((5,), float(group.rank))
        averager = OURS(2, process_group=group)
        with pytest.raises(
            ValueError,
            match="average_parameters: .* in their own memory, but params_tree.0. and params_tree.1. overlap",
        ):
            averager.average_parameters(parameters(memory[:3], memory[2:]))
        return averager.step, memory.unique().tolist()

    assert run_ranks(2, fn) == [(0, [0.0]), (0, [1.0])]


# Which parameters


def test_parameters_and_groups_may_be_mixed_and_come_from_generators():
    def fn(group):
        a, b, c = parameters(*(torch.tensor(float(group.rank)) for _ in range(3)))
        b.grad = None
        OURS(2, process_group=group).average_parameters(item for item in [a, {"params": iter([b, c]), "lr": 1}])
        return a.item(), b.item(), c.item()

    assert run_ranks(2, fn) == [(0.5, 0.0, 0.5), (0.5, 1.0, 0.5)]


@pytest.mark.parametrize("without", [[0, 1], [1]])
def test_a_gradient_missing_in_a_parameter_group(without):
    def fn(group):
        params = parameters(torch.ones(2) * group.rank, torch.ones(3) * group.rank)
        if group.rank == 1:
            for i in without:
                params[i].grad = None
        averager = OURS(2, process_group=group)
        with pytest.raises(TreeMismatchError) as caught:
            averager.average_parameters([{"params": params[:1]}, {"params": params[1:]}])
        assert averager.step == 0
        assert all(torch.equal(param.detach(), torch.ones(len(param)) * group.rank) for param in params)
        return str(caught.value)

    messages = run_ranks(3, fn)
    assert messages == messages[:1] * 3
    lines = [f"params_tree[{i}]['params'][0]:  rank 0 float32[{2 + i}],  rank 1 has no such leaf" for i in without]
    assert [line.strip() for line in messages[0].splitlines()[1:-1]] == lines
    assert messages[0].endswith("A parameter whose grad is None counts as no leaf.")


@pytest.mark.parametrize(("params", "count"), [([torch.ones(1), torch.ones(2)], 2), ([], 0)])
def test_no_gradient_at_all(params, count):
    message = (
        f"^average_parameters: none of the {count} parameters has a gradient, on any rank, so there is nothing to "
        r"average. Call it after backward\(\) and before zero_grad\(\).$"
    )

    def fn(group):
        averager = OURS(2, process_group=group)
        with pytest.raises(ValueError, match=message):
            averager.average_parameters(parameters(*params, grads=False))
        with pytest.raises(ValueError, match=message):
            averager.average_parameters([{"params": parameters(*params, grads=False)}])
        averager.average_parameters(good := parameters(torch.tensor(float(group.rank))))
        return averager.step, good[0].item()

    assert run_ranks(2, fn) == [(1, 0.5)] * 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("params", "error"),
    [
        ([torch.ones(2)], NotImplementedError),
        (["weight"], NotImplementedError),
        (None, TypeError),
        ([{"lr": 1}], KeyError),
        (parameters(torch.ones(2), grads=False), ValueError),
    ],
)
def test_mistakes_are_torchs_and_do_not_count_as_a_step(params, error):
    caught = []
    for kind in (OURS, THEIRS):
        averager = kind(2)
        with pytest.raises(error) as raised:
            averager.average_parameters(params)
        assert averager.step == 0
        caught.append(raised.value)
    assert type(caught[0]) is type(caught[1]) is error
    if error is not ValueError:  # torch complains about torch.cat
        assert str(caught[0]) == str(caught[1])


def test_one_ranks_plain_tensor_is_heard_of_by_all():
    text = "Parameter input of type <class 'torch.Tensor'> is not supported"

    def fn(group):
        averager = OURS(2, process_group=group)
        params = parameters(torch.tensor(float(group.rank)))
        error, message = NotImplementedError, f"^{text}$" if group.rank == 1 else f"rank 1: .*{text}"
        with pytest.raises(error, match=message):
            averager.average_parameters(params if group.rank != 1 else [*params, torch.ones(1)])
        averager.average_parameters(params)
        return averager.step, params[0].item()

    assert run_ranks(3, fn, timeout=10) == [(1, 1.0)] * 3


# State


def train(group, steps, start=0, checkpoint=None):
    """Train from a checkpoint; return parameters, a new checkpoint, and the step that the averager has come to."""
    net = Net(group.rank)
    averager = OURS(period=4, warmup_steps=2, process_group=group)
    optimizer = funcavg.PostLocalSGDOptimizer(optimizer_of(net), averager)
    if checkpoint is not None:
        saved = torch.load(io.BytesIO(checkpoint))
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(start, steps):
        optimizer.zero_grad()
        net(batch(group.rank, step)).square().mean().backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return flat(net.parameters()), file.getvalue(), averager.state_dict()


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 8])
def test_a_run_resumed_in_the_middle_of_a_period_is_the_same_run(cut):
    def fn(group):
        straight, _, state = train(group, 12)
        _, checkpoint, middle = train(group, cut)
        resumed, _, resumed_state = train(group, 12, cut, checkpoint)
        assert (middle, state) == ({"step": cut}, {"step": 12})
        assert resumed_state == state
        return torch.equal(straight, resumed), not torch.equal(straight, train(group, 12, cut)[0])

    assert run_ranks(2, fn) == [(True, True)] * 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("make", [lambda: OURS(4, 3), lambda: OUR_HIERARCHY({2: 1, 4: 1}, 3)])
def test_an_averagers_state(make):
    averager, other = make(), make()
    for _ in range(6):
        averager.average_parameters(parameters(torch.ones(1)))
    assert averager.state_dict() == {"step": 6}
    for step in (6, np.array(6), torch.tensor(6)):
        other.step = 0
        other.load_state_dict({"step": step})
        assert type(other.step) is int
        assert vars(other) == vars(averager)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (5, TypeError, "state_dict must be a mapping, got 5 of type int"),
        (None, TypeError, "state_dict must be a mapping, got None of type NoneType"),
        ({}, ValueError, r"state_dict must have the one key 'step', got \[\]"),
        ({"step": 5, "lr": 1}, ValueError, r"state_dict must have the one key 'step', got \['step', 'lr'\]"),
        ({"step": 2.5}, TypeError, "the step must be an integer, got 2.5 of type float."),
        ({"step": True}, TypeError, "the step must be an integer, got True of type bool."),
        ({"step": None}, TypeError, "the step must be an integer, got None of type NoneType."),
        ({"step": -1}, ValueError, "the step must be at least 0, got -1"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(state, error, message):
    averager = OURS(4, process_group=funcavg.collectives.Solo())
    averager.step = 7
    with pytest.raises(error, match=f"^PeriodicModelAverager.load_state_dict: {message}$"):
        averager.load_state_dict(state)
    assert averager.state_dict() == {"step": 7}


def solo_optimizer(kind=funcavg.PostLocalSGDOptimizer):
    params = parameters(torch.ones(2))
    averager = OURS(4, process_group=funcavg.collectives.Solo())
    return kind(torch.optim.SGD(params, lr=1.0, momentum=0.9), averager)


@pytest.mark.parametrize(("kind", "live"), [(funcavg.PostLocalSGDOptimizer, True), (TorchOptimizer, False)])
def test_a_scheduler_reaches_the_local_optimizer_after_a_checkpoint_is_loaded(kind, live):
    """Torch's wrapper keeps the groups that the local optimizer had when it was wrapped."""
    optimizer = solo_optimizer(kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.param_groups is optimizer.optim.param_groups) == live
    optimizer.step()
    scheduler.step()
    assert optimizer.optim.param_groups[0]["lr"] == (0.5 if live else 1.0)
    assert scheduler.get_last_lr() == [0.5]


def test_groups_of_the_optimizer():
    optimizer = solo_optimizer()
    optimizer.add_param_group({"params": parameters(torch.ones(3)), "lr": 3.0})
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 3.0]
    optimizer.step()
    assert optimizer.state is optimizer.optim.state
    assert len(optimizer.state) == 2
    optimizer.zero_grad()
    assert optimizer.param_groups[1]["params"][0].grad is None
    optimizer.param_groups = optimizer.param_groups[:1]
    assert len(optimizer.optim.param_groups) == 1
    assert isinstance(optimizer, TorchOptimizer)


@pytest.mark.parametrize("kind", [funcavg.PostLocalSGDOptimizer, TorchOptimizer])
def test_a_checkpoint_without_a_step_warns_at_the_users_line(kind):
    optimizer = solo_optimizer(kind)
    optimizer.step()
    state = optimizer.state_dict()
    assert state.pop("step") == 1
    text = "^Loaded state dict does not contain a step counter for an averager. Setting step counter to 0.$"
    with pytest.warns(UserWarning, match=text) as caught:
        optimizer.load_state_dict(state)
    assert (caught[0].filename, caught[0].lineno) == (__file__, inspect.currentframe().f_lineno - 1)
    assert optimizer.averager.step == 0


@pytest.mark.parametrize("donate", [True, False])
def test_parameters_keep_their_memory_whether_donated_or_not(donate):
    def fn(group):
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(group.rank)
        view = model.weight.data_ptr()
        averager = funcavg.PeriodicModelAverager(2, process_group=group, donate=donate)
        model(torch.ones(3)).sum().backward()
        averager.average_parameters(model.parameters())
        return model.weight.data_ptr() == view, model.weight.unique().tolist(), model.bias.unique().tolist()

    assert run_ranks(2, fn) == [(True, [0.5], [0.5])] * 2


def test_parameters_are_whole_after_a_loss_unless_donated():
    def fn(group):
        weight = torch.nn.Parameter(torch.full((600_000,), float(group.rank)))
        weight.grad = torch.zeros_like(weight)
        averager = funcavg.PeriodicModelAverager(2, process_group=group, donate=False, timeout=0.5)
        if group.rank == 0:
            with pytest.raises(funcavg.PeerLostError):
                averager.average_parameters([weight])
        return averager.step, weight.detach().unique().tolist()

    assert run_ranks(2, fn) == [(0, [0.0]), (0, [1.0])]


@pytest.mark.parametrize("kind", [funcavg.PeriodicModelAverager, funcavg.HierarchicalModelAverager])
def test_donate_is_a_bool(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__}: donate must be True or False, got 1 of type int"):
        kind(2 if kind is funcavg.PeriodicModelAverager else {2: 1}, donate=1)
