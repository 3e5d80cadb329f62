"""Several processes on this machine see each other."""


def test_processes_join(loopback):
    said = loopback("print(jax.process_index(), jax.process_count(), jax.device_count(), *arguments)", 2, "a", 1)
    assert [line.split() for line in said] == [["0", "2", "4", "a", "1"], ["1", "2", "4", "a", "1"]]
