"""What the command sets for its process, and that `import lmx` sets nothing."""

import json
import os
import platform
import subprocess
import sys

import pytest

SETTINGS = (
    "GLIBC_TUNABLES", "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)  # fmt: skip
SHOW = f"import json, os; print(json.dumps({{name: os.environ.get(name) for name in {SETTINGS!r}}}))"
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="GLIBC_TUNABLES are glibc's")


def shown(source: str, **environment: str) -> dict[str, str | None]:
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", f"{source}\n{SHOW}"]
    done = subprocess.run(command, env=clean | environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@glibc
def test_the_command_starts_anew_with_huge_pages_once(tmp_path):
    again = "from lmx.cli import start; start.start_anew(); start.keep_compiled()"
    settings = shown(again, XDG_CACHE_HOME=str(tmp_path))
    assert "glibc.malloc.hugetlb=1" in settings["GLIBC_TUNABLES"]
    assert settings["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "lmx" / "compiled"))
    assert int(settings["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 4 << 30


def test_what_the_user_has_set_stays(tmp_path):
    told = {"GLIBC_TUNABLES": "glibc.malloc.check=0", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    settings = shown("from lmx.cli import start; start.start_anew(); start.keep_compiled()", **told)
    assert {name: settings[name] for name in told} == told
    assert settings["JAX_COMPILATION_CACHE_MAX_SIZE"] is None  # nothing of the user's is thrown away


def test_importing_lmx_sets_nothing():
    settings = shown("import lmx, jax; lmx.preset('llama-tiny'); assert jax.config.jax_compilation_cache_dir is None")
    assert set(settings.values()) == {None}


def test_a_second_start_compiles_nothing_new(tmp_path):
    source = """
from lmx.cli import start
start.keep_compiled()
import jax, jax.numpy as jnp
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum()))
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.clear_caches()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
assert hits.count("/jax/compilation_cache/cache_hits") > 0, hits
assert "/jax/compilation_cache/cache_misses" not in hits, hits
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", source], env=environment, check=True, capture_output=True)
    kept = [path for path in tmp_path.rglob("*-cache") if path.is_file()]
    assert kept and all(path.stat().st_size for path in kept)


@glibc
def test_memory_goes_back_after_a_long_compilation():
    source = """
import ctypes, os
from lmx.cli import start
start.return_memory()
import jax
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
blocks = [libc.malloc(100_000) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:  # the last one keeps glibc from giving them back by itself
    libc.free(block)
full = megabytes()
event = "/jax/core/compile/backend_compile_duration"
jax.monitoring.record_event_duration_secs(event, start.LONG / 2)
assert full - megabytes() < 20, (full, megabytes())
jax.monitoring.record_event_duration_secs(event, start.LONG * 2)
assert full - megabytes() > 150, (full, megabytes())
"""
    subprocess.run([sys.executable, "-c", source], check=True, capture_output=True)
