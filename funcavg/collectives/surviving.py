"""Whether an MPI library goes on when a rank dies, as ULFM has it, and what whoever has lost one can do."""

from __future__ import annotations

import ctypes
import re

__all__ = ["advice_for", "is_fault_tolerant"]


def is_fault_tolerant(library: str, path: str) -> bool:
    """Say whether a job of this library survives the death of a rank. ``path``: mpi4py's module, which has loaded it.

    mpi4py has Revoke and Shrink over every library, and makes do where it has none: asking for them tells nothing.
    Open MPI has them since 5.0, and they are in force where its parameter ``mpi_ft_enable`` is true.
    """
    return "Open MPI" in library and _control_variable(path, "mpi_ft_enable")


def advice_for(library: str, *, fault_tolerant: bool) -> str:
    """Say what to do when a rank is lost.

    >>> advice_for("MPICH Version: 5.0.2", fault_tolerant=False)[:63]
    'MPICH ends a job of which a rank dies, and cannot go on without'
    """
    if fault_tolerant:
        return (
            "The job can go on: comm.Revoke(), then comm.Shrink() is a communicator of the ranks that are left; "
            "funcavg.furthest says from whose parameters."
        )
    end = "Run MPI jobs as `python -m mpi4py script.py`: it ends all ranks when one fails."
    if "Open MPI" in library:
        return f"{end} To go on without a lost rank, start the job with `mpiexec --with-ft ulfm`."
    name = re.split(r" (?:Version|Library)|[\d:,]", library or "MPI")[0].strip()
    return f"{name} ends a job of which a rank dies, and cannot go on without it (Open MPI can). {end}"


def _control_variable(path: str, name: str) -> bool:
    """Read a parameter by MPI's own interface for tools, which mpi4py does not wrap; False where it is unknown."""
    mpi = ctypes.CDLL(path)
    level, index, count = (ctypes.c_int(0) for _ in range(3))
    handle, value = ctypes.c_void_p(), (ctypes.c_char * 8)()  # a bool of C's, or an int
    try:
        # With less than MPI_THREAD_MULTIPLE (3 in Open MPI) it would lower the level that the program has asked for.
        if mpi.MPI_T_init_thread(3, ctypes.byref(level)) != 0:
            return False
        try:
            known = mpi.MPI_T_cvar_get_index(name.encode(), ctypes.byref(index)) == 0
            got = known and mpi.MPI_T_cvar_handle_alloc(index, None, ctypes.byref(handle), ctypes.byref(count)) == 0
            return bool(got) and mpi.MPI_T_cvar_read(handle, value) == 0 and any(value.raw)
        finally:
            mpi.MPI_T_finalize()
    except AttributeError:  # a library without the interface
        return False
