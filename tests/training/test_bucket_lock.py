"""The lock of a run in a bucket: one holder, and none that was silent for a lease."""

from __future__ import annotations

import json
import os
import time
import warnings

import pytest

from pixart_jax import files
from pixart_jax.errors import Unavailable, UserError
from pixart_jax.training import bucket_lock
from pixart_jax.training.bucket_lock import RunLock


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setattr(bucket_lock, "LEASE_SECONDS", 0.6)


def test_a_second_writer_is_refused_and_a_silent_one_is_replaced(store):
    run = store.root + "/run"
    first, second = RunLock(run), RunLock(run)
    first.acquire()
    first.record([])
    first.record([3])
    with pytest.warns(match="waiting for a sign of life"), pytest.raises(UserError) as error:
        second.acquire()
    assert f"in use by another run, on {os.uname().nodename} (process {os.getpid()})" in str(
        error.value
    )

    first._released.set()  # its thread renews no more, as if the process were frozen
    time.sleep(0.2)
    begun = time.monotonic()
    with pytest.warns(match="waiting for a sign of life"):
        second.acquire()
    assert time.monotonic() - begun >= 0.6
    assert second.committed == [3]
    second.record([3, 6])
    with pytest.raises(Unavailable, match="was taken over by another process"):
        first.record([9])
    with pytest.raises(Unavailable, match="was taken over by another process"):
        first.check()
    first.release()
    assert json.loads(files.read_bytes(run + "/.lock"))["committed"] == [3, 6]
    second.release()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody is waited for
        third = RunLock(run)
        third.acquire()  # the lock was released
        assert third.committed == [3, 6]
        third._released.set()
        state = json.loads(files.read_bytes(run + "/.lock"))
        files.put(run + "/.lock", json.dumps({**state, "started": "0"}).encode())
        fourth = RunLock(run)
        fourth.acquire()  # that process of this machine has ended
        fourth.release()

    files.put(run + "/.lock", b"something else")
    with pytest.raises(UserError, match="is not a run's lock"):
        RunLock(run).acquire()
