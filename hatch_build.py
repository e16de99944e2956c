"""What hatchling runs when it builds a wheel, or installs a clone: build the C kernel, if there is a C compiler.

`FUNCAVG_KERNEL=off` leaves it out, and `require` makes it an error if it cannot be built. Without it the wheel is one
for all platforms, and means are calculated by NumPy and torch.

What was built is loaded and tried at once, by this Python: so there is no cross compiling. `CFLAGS` is not heard, since
flags that are good for others (`-Ofast`) would change what comes out; what `CC` says is taken whole.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging import tags

SOURCE = "funcavg/_engine"  # its .c and .h
LIBRARY = "funcavg/_engine/libkernel.so"
# C99's arithmetic as it is written: nothing contracted. No exception and no errno is looked at, so none need be kept.
FLAGS = "-std=c99 -O3 -ffp-contract=off -fno-trapping-math -fno-math-errno -fvisibility=hidden -fPIC -shared"
# A few bits that flags can spoil, also for whoever loads the library: a sum above the largest float, and denormals.
TRIAL = """
import ctypes, struct, sys
kernel = ctypes.CDLL(sys.argv[1])
plan = struct.pack("@qPdiii", 2, 0, 2.0, 0, 0, kernel.funcavg_level())
shards = [ctypes.create_string_buffer(struct.pack("=2f", 3.4e38, small), 8) for small in (1e-45, 3e-45)]
addresses, out = (ctypes.c_void_p * 2)(*map(ctypes.addressof, shards)), ctypes.create_string_buffer(8)
kernel.funcavg_mean(plan, addresses, out, None, ctypes.c_size_t(8))
if out.raw != struct.pack("=2f", 3.4e38, 3e-45) or 5e-324 * 1.0 == 0.0:
    raise SystemExit(f"its mean of (3.4e38, 3.4e38) and (1e-45, 3e-45) is {struct.unpack('=2f', out.raw)}")
"""


def compiler() -> list[str]:
    """Return the command of the C compiler; of none, an empty list."""
    asked = shlex.split(os.environ.get("CC", ""))
    return asked or next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])


def build(source: Path, library: Path) -> str:
    """Build the library of a folder's source, and try it; return what went wrong."""
    command = compiler()
    if not command:
        return "no C compiler was found: cc, gcc, clang, or what CC says"
    made = library.with_name(f".{library.name}.{os.getpid()}")  # the old one may be in use
    told = f"-DFUNCAVG_SOURCE={zlib.crc32(b''.join(file.read_bytes() for file in sorted(source.glob('*.[ch]'))))}u"
    command = [*command, *FLAGS.split(), told, "-o", str(made), *map(str, sorted(source.glob("*.c")))]
    try:
        for step in (command, [sys.executable, "-c", TRIAL, str(made)]):
            done = subprocess.run(step, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode:
                what = "failed" if step is command else "made a library that this Python cannot use"
                return f"{shlex.join(command)} {what}:\n{done.stderr}"
        made.replace(library)
    except OSError as error:
        return f"{shlex.join(command)}: {error}"
    finally:
        made.unlink(missing_ok=True)
    return ""


def platform_tag() -> str:
    """Return the platform that a library is for which was built here, as wheels call it."""
    # Who builds at home promises nothing about other distributions.
    return next(tag for tag in tags.platform_tags() if not tag.startswith(("manylinux", "musllinux")))


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Builds the kernel: into the wheel, or, for an editable installation, into the clone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build it, and say that the wheel is for this platform."""
        setting = os.environ.get("FUNCAVG_KERNEL", "")
        if setting.lower() not in ("", "off", "require"):
            raise ValueError(f"FUNCAVG_KERNEL must be off or require, or not be set, got {setting!r}")
        root = Path(self.root)
        if version == "editable":
            library = root / LIBRARY
            library.unlink(missing_ok=True)  # that of an earlier source, or of a setting that has changed
        else:
            folder = tempfile.mkdtemp(prefix="funcavg-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)  # when the wheel is there
            library = Path(folder, "libkernel.so")
        if setting.lower() == "off":
            return
        problem = build(root / SOURCE, library)
        if problem and setting:
            raise RuntimeError(f"FUNCAVG_KERNEL={setting}, but the C kernel was not built: {problem}")
        if problem:
            self.app.display_warning(f"funcavg goes without its C kernel: {problem}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = LIBRARY
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"
