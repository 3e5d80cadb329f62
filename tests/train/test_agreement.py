"""Agreement in a program that called jax.distributed.initialize itself; over a channel: test_processes.py."""

from __future__ import annotations

SOURCE = """
from lmx.core.errors import DataError, FolderError
from lmx.train import agreement
index = jax.process_index()

def fail(error):
    raise error

def told(work):
    try:
        work()
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])

print(agreement.everyone(index), agreement.first(lambda: {"from": index}))
told(lambda: agreement.first(lambda: fail(DataError("no text"))))
told(lambda: agreement.first(lambda: fail(PermissionError("not yours"))))
try:
    with agreement.agreed():
        if index == 1:
            fail(FolderError("a changed bit"))
except FolderError as error:
    print(error)
step = 0
asked = agreement.agree_to_stop(lambda: index == 1 and step == 5)
while not asked():
    step += 1
print("stopped at", step)
"""


def test_values_errors_and_the_step_to_stop_at_are_the_same_in_all(loopback):
    first, second = loopback(SOURCE, 2)
    wanted = ["[0, 1] {'from': 0}", "DataError no text", "PermissionError not yours", "a changed bit", "stopped at 6"]
    assert first.splitlines() == wanted
    assert second.splitlines() == [line.replace("PermissionError", "FolderError") for line in wanted]
