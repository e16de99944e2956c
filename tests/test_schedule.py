"""When: should_average."""

import subprocess
import sys

import numpy as np
import pytest
from helpers.frameworks import torch

from funcavg import should_average


def test_fires_on_the_steps_of_the_definition():
    for warmup in range(8):
        for period in range(1, 7):
            for step in range(40):
                expected = step >= warmup and (step - warmup) % period == 0
                assert should_average(step, warmup=warmup, period=period) is expected


@pytest.mark.parametrize(("warmup", "period"), [(0, 1), (0, 4), (5, 4), (7, 3)])
def test_fires_when_torchs_averager_fires(warmup, period, monkeypatch):
    from torch.distributed.algorithms.model_averaging import averagers

    fired = []
    averager = object.__new__(averagers.PeriodicModelAverager)  # its constructor needs a process group
    averager.warmup_steps, averager.period, averager.step, averager.process_group = warmup, period, 0, object()
    monkeypatch.setattr(
        averagers.utils, "average_parameters_or_parameter_groups", lambda *_: fired.append(averager.step)
    )
    for _ in range(30):
        averager.average_parameters([])
    assert fired == [step for step in range(30) if should_average(step, warmup=warmup, period=period)]


@pytest.mark.parametrize("step", [7, np.int64(7), np.uint8(7), np.array(7), np.array(7, np.int32)], ids=repr)
def test_integers_of_python_and_numpy_give_a_python_bool(step):
    assert should_average(step, warmup=3, period=2) is True
    assert should_average(step, warmup=8, period=2) is False
    assert should_average(9, warmup=np.int64(3), period=np.array(2)) is True


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_torch_tensor_gives_a_boolean_tensor(dtype):
    due = should_average(torch.arange(20, dtype=dtype), warmup=5, period=4)
    assert due.dtype == torch.bool
    assert due.nonzero().flatten().tolist() == [5, 9, 13, 17]
    assert should_average(torch.tensor(5, dtype=dtype), warmup=5, period=4).shape == ()
    late = should_average(torch.tensor([0, 50, 250], dtype=dtype), warmup=300, period=1)  # no uint8
    assert late.tolist() == [False] * 3


def test_works_under_vmap():
    fn = torch.func.vmap(lambda step: should_average(step, warmup=1, period=2))
    assert fn(torch.arange(4)).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"period": 0}, ValueError, "period must be at least 1, got 0"),
        ({"period": -1}, ValueError, "period must be at least 1, got -1"),
        ({"period": 2.5}, TypeError, "period must be an integer, got 2.5 of type float"),
        ({"period": True}, TypeError, "period must be an integer, got True of type bool"),
        ({"period": None}, TypeError, "period must be an integer, got None of type NoneType"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
        ({"warmup": 1.0}, TypeError, "warmup must be an integer, got 1.0 of type float"),
        ({"warmup": "3"}, TypeError, "warmup must be an integer, got '3' of type str"),
        ({"step": 1.0}, TypeError, "step must be an integer, got 1.0 of type float"),
        ({"step": False}, TypeError, "step must be an integer, got False of type bool"),
        ({"step": np.True_}, TypeError, "step must be an integer, got np.True_ of type bool"),
        ({"step": np.array([1, 2])}, TypeError, r"step must be an integer, got array\(\[1, 2\]\) of type ndarray"),
        ({"step": torch.tensor(1.0)}, TypeError, r"step must be an integer tensor, got dtype torch.float32: tensor"),
        ({"step": torch.tensor(True)}, TypeError, "step must be an integer tensor, got dtype torch.bool"),
        ({"period": torch.tensor(True)}, TypeError, r"period must be an integer, got tensor\(True\) of type Tensor"),
    ],
)
def test_bad_arguments(arguments, kind, text):
    with pytest.raises(kind, match=f"should_average: {text}"):
        should_average(**{"step": 0, "warmup": 0, "period": 1, **arguments})


def test_needs_no_framework():
    code = "import sys, funcavg; print(funcavg.should_average(4, warmup=0, period=2), 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "False"]
