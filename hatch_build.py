"""What hatchling runs when it builds a wheel, or installs a clone: build the C kernel, if there is a C compiler.

`FUNCAVG_KERNEL=off` leaves it out, and `require` makes it an error if it cannot be built. Without it the wheel is one
for all platforms, and means are calculated by NumPy and torch.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "funcavg/_engine/kernel.c"
LIBRARY = "funcavg/_engine/libkernel.so"
# C99's arithmetic as it is written: nothing contracted. No exception is looked at, so none need be kept.
FLAGS = "-std=c99 -O3 -ffp-contract=off -fno-trapping-math -fvisibility=hidden -fPIC -shared"


def compiler() -> list[str]:
    """Return the command of the C compiler; of none, an empty list."""
    asked = shlex.split(os.environ.get("CC", ""))
    return asked or next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])


def build(source: Path, library: Path) -> str:
    """Build the library; return what went wrong."""
    command = compiler()
    if not command:
        return "no C compiler was found: cc, gcc, clang, or what CC says"
    made = library.with_name(f".{library.name}.{os.getpid()}")  # the old one may be in use
    told = f"-DFUNCAVG_SOURCE={zlib.crc32(source.read_bytes())}u"
    users = shlex.split(os.environ.get("CFLAGS", ""))
    command = [*command, *users, *FLAGS.split(), told, "-o", str(made), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        return f"{shlex.join(command)}: {error}"
    if done.returncode or not made.exists():
        made.unlink(missing_ok=True)
        return f"{shlex.join(command)} failed:\n{done.stderr}"
    made.replace(library)
    return ""


def platform_tag() -> str:
    """Return the platform that a library is for which was built here, as wheels call it."""
    name = sysconfig.get_platform().replace("universal2", platform.machine())  # the library is for this machine alone
    return name.replace("-", "_").replace(".", "_")


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Builds the kernel: into the wheel, or, for an editable installation, into the clone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build it, and say that the wheel is for this platform."""
        setting = os.environ.get("FUNCAVG_KERNEL", "").lower()
        if setting not in ("", "off", "require"):
            raise ValueError(f"FUNCAVG_KERNEL must be off or require, or not be set, got {setting!r}")
        root = Path(self.root)
        if setting == "off":
            return
        self._made = Path(tempfile.mkdtemp(prefix="funcavg-"))
        library = root / LIBRARY if version == "editable" else self._made / "libkernel.so"
        problem = build(root / SOURCE, library)
        if problem:
            shutil.rmtree(self._made)
        if problem and setting == "require":
            raise RuntimeError(f"FUNCAVG_KERNEL=require, but the C kernel was not built: {problem}")
        if problem:
            self.app.display_warning(f"funcavg goes without its C kernel: {problem}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = LIBRARY
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Take the wheel's library away again."""
        if hasattr(self, "_made"):
            shutil.rmtree(self._made, ignore_errors=True)
