"""Whether an MPI library takes pointers to a GPU's memory. One that does not ends the process when it gets some."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["is_gpu_aware"]

YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
GPU_KINDS = ("cuda", "rocm", "level_zero")
GPU_SWITCHES = (
    "MPICH_GPU_SUPPORT_ENABLED",  # Cray MPICH
    "MPIR_CVAR_ENABLE_GPU",  # MPICH
    "OMPI_MCA_opal_cuda_support",  # Open MPI
    "MV2_USE_CUDA",  # MVAPICH2
    "MVP_USE_CUDA",  # MVAPICH
    "I_MPI_OFFLOAD",  # Intel MPI
    "PSP_CUDA",  # ParaStation MPI
)


def is_gpu_aware(memory_kinds: str, environ: Mapping[str, str]) -> bool:
    """Decide whether device buffers can be handed to MPI: a pure function.

    ``FUNCAVG_MPI_GPU`` (1 or 0) decides if it is set; else what the library says of itself, which is MPI 4.1's
    ``mpi_memory_alloc_kinds``; and where it says nothing, the variables by which libraries are told to be GPU-aware.

    >>> is_gpu_aware("system,mpi", {}), is_gpu_aware("system,mpi,cuda:device", {})
    (False, True)
    >>> is_gpu_aware("", {"MPICH_GPU_SUPPORT_ENABLED": "1"}), is_gpu_aware("mpi", {"MPIR_CVAR_ENABLE_GPU": "1"})
    (True, False)
    >>> is_gpu_aware("system,mpi", {"FUNCAVG_MPI_GPU": "True"}), is_gpu_aware("cuda", {"FUNCAVG_MPI_GPU": "0"})
    (True, False)
    """
    override = environ.get("FUNCAVG_MPI_GPU", "")
    if override:
        if override.lower() not in (*YES, *NO):
            raise ValueError(f"average: FUNCAVG_MPI_GPU must be 1 or 0, got {override!r}")
        return override.lower() in YES
    if memory_kinds:
        return not {kind.partition(":")[0] for kind in memory_kinds.split(",")}.isdisjoint(GPU_KINDS)
    return any(environ.get(name, "").lower() in YES for name in GPU_SWITCHES)
