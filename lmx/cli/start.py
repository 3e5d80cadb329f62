"""What the `lmx` command sets for its own process; `import lmx` sets none of it.

- glibc gets memory in huge pages and keeps what it got: a training step on a CPU otherwise spends its time on faults of
  small pages. That has to stand in the environment before a process starts, so the command starts itself anew.
- What XLA compiles is kept in the user's cache folder, so that a second start need not compile.
- After long compilations the memory that they freed goes back to the system.

What the user has set (GLIBC_TUNABLES, JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=0) stays as it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

TUNABLES = ":".join(f"glibc.malloc.{setting}" for setting in (
    "hugetlb=1", "mmap_max=0", "arena_max=1", "trim_threshold=17179869184"
))  # fmt: skip
KEPT_BYTES = 4 << 30  # of compiled programs; the longest unused ones go first
LONG = 0.5  # seconds of a compilation after which memory is given back


def main() -> None:
    """The entry point of the command: this process made ready, then `lmx.cli.main`."""
    start_anew()
    keep_compiled()
    return_memory()
    from lmx.cli.main import main  # imports jax, which the process must be ready for

    main()


def start_anew() -> None:
    """Replace this process by the same one with glibc's settings in its environment, where there is a glibc."""
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": TUNABLES})


def keep_compiled() -> None:
    """Have jax keep compiled programs in `cache_folder()`, unless the user told it another folder or none."""
    folder = cache_folder()
    if folder is None:
        return
    settings = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # in the user's own, nothing is to be thrown away
        settings |= {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_COMPILATION_CACHE_MAX_SIZE": str(KEPT_BYTES)}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def cache_folder() -> Path | None:
    """Where compiled programs are kept: a folder for each kind of processor, as they run on no other; None without a
    home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(
        "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    )
    kind = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    return None if base.startswith("~") else Path(base) / "lmx" / "compiled" / kind


def _processor() -> str:
    """What tells processors apart: the features that Linux lists, elsewhere the machine's name for its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return features[0] if features else f"{platform.machine()} {platform.processor()}"


def return_memory() -> None:
    """Give the memory that a long compilation freed back to the system, where there is a glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    trim = ctypes.CDLL(None).malloc_trim

    def listen(event: str, seconds: float, **more: object) -> None:
        if event.endswith("backend_compile_duration") and seconds > LONG:
            trim(0)

    import jax

    jax.monitoring.register_event_duration_secs_listener(listen)
