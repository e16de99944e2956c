"""Nobody pays for a framework that he does not use."""

import os
import subprocess
import sys

import pytest
from helpers.frameworks import skip_without

FRAMEWORKS = {"torch", "jax", "mpi4py", "ml_dtypes"}
BUDGET = 0.030  # seconds, on machines where NumPy and optree take some 90 ms; there are slower ones


def python(code, **environ):
    command = [sys.executable, "-c", code]
    environ = {**os.environ, **environ}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)
    return done.stdout.strip(), done.stderr


def loaded(imports):
    out, _ = python(f"{imports}\nimport sys; print(*sorted({FRAMEWORKS!r} & set(sys.modules)))")
    return set(out.split())


def test_import_loads_no_framework():
    assert loaded("import funcavg, funcavg.testing, funcavg.collectives") == set()


def test_import_loads_little_of_the_standard_library():
    # OpenSSL's hashes and pathlib's URLs took a fifth of the time, for functions that most calls never reach
    code = "import numpy, optree, sys; before = set(sys.modules); import funcavg; print(*set(sys.modules) - before)"
    out, _ = python(code)
    assert {"hashlib", "pathlib", "traceback", "urllib", "ssl"} & set(out.split()) == set()


def test_averaging_numpy_loads_no_framework():
    assert loaded("import funcavg, numpy as np; funcavg.average({'w': np.ones(3)})") == set()


def test_the_check_would_notice():
    skip_without("torch")
    assert "torch" in loaded("import funcavg; funcavg.PeriodicModelAverager")


def test_import_takes_under_30_ms(tmp_path):
    # Processor time, and the best of several: the machine may be busy with other tests. From bytecode, as installed.
    environ = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = (
        "from time import process_time as now; start = now(); import numpy, optree; ready = now(); import funcavg\n"
        "print(now() - ready, ready - start)"
    )
    ours, theirs = zip(*(map(float, python(code, **environ)[0].split()) for _ in range(7)), strict=True)
    assert min(ours) < max(BUDGET, min(theirs) / 3)


def test_import_needs_no_c_library():
    out, _ = python("import ctypes, numpy, optree; ctypes.CDLL = None; import funcavg; print(funcavg.average(1.5))")
    assert out == "1.5"


@pytest.mark.parametrize("name", ["PeriodicModelAverager", "PostLocalSGDOptimizer"])
def test_a_missing_extra_names_its_cure(name):
    _, error = python(f"import sys; sys.modules['torch'] = None; import funcavg; funcavg.{name}")
    assert "ImportError: funcavg.stateful needs torch with torch.distributed" in error
    assert "pip install 'funcavg[torch]'" in error


def test_everything_else_works_without_torch():
    out, _ = python(
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, funcavg\n"
        "print(funcavg.average({'w': np.ones(2), 'x': 1.5}), funcavg.should_average(4, warmup=0, period=2))"
    )
    assert out == "{'w': array([1., 1.]), 'x': 1.5} True"
