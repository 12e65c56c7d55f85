"""Where the plugin that shares out cores puts a worker; without taking this one anywhere."""

import os

import pytest

from tests import cores


@pytest.mark.parametrize(
    ("worker", "workers", "placed"),
    [("gw0", 2, [{5}]), ("gw1", 2, [{7}]), ("gw2", 4, [{5}]), ("gw0", 1, []), (None, 0, [])],
    ids=["first", "second", "more workers than cores", "cores left over", "no worker"],
)
def test_every_worker_has_a_core_if_there_are_as_many(worker, workers, placed, monkeypatch):
    found = []
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", str(workers))
    own = {
        "SCHED_IDLE": 5,
        "sched_param": lambda priority: priority,
        "sched_getaffinity": lambda process: {7, 5},
        "sched_setaffinity": lambda process, cpus: found.append(cpus),
        "sched_setscheduler": lambda process, policy, priority: found.append((process, policy, priority)),
    }
    for name, value in own.items():
        monkeypatch.setattr(os, name, value, raising=False)
    cores.pytest_configure()
    assert found == placed + [(0, 5, 0)] * len(placed)


def test_a_sandbox_may_refuse(monkeypatch):
    asked = []

    def refuses(*arguments):
        asked.append(arguments)
        raise PermissionError

    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    monkeypatch.setattr(os, "SCHED_IDLE", 5, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", refuses, raising=False)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *arguments: asked.append(arguments), raising=False)
    cores.pytest_configure()
    assert asked == [(0, {0})]  # and no lower priority on a core that others have too
