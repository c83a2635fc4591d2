"""Addresses in buckets: files.py against emulators of gs:// and s3:// on loopback."""

from __future__ import annotations

import pytest

from pixart_jax import files, object_store
from pixart_jax.errors import Unavailable, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))


def test_objects_are_written_read_listed_and_deleted(store, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)  # pieces of reads and uploads
    root = files.join(store.root, "run")
    files.check_writable(root)
    files.put(files.join(root, "a.bin"), b"0123456789")
    files.put(files.join(root, "sub", "b.bin"), b"")
    files.put(store.root + "/runner", b"not below run/")
    assert files.read_bytes(root + "/a.bin") == b"0123456789"
    assert files.read_range(root + "/a.bin", 3, 6) == b"345"
    assert files.read_range(root + "/a.bin", 8, 20) == b"89"
    found = files.list_files(root)
    assert [(e.address, e.size) for e in found] == [(root + "/a.bin", 10), (root + "/sub/b.bin", 0)]
    assert files.stat(root + "/a.bin") == found[0][1:]
    with pytest.raises(FileNotFoundError):
        files.read_bytes(root + "/c.bin")

    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    large = bytes(range(256)) * 24_000
    (folder / "part" / "large").write_bytes(large)
    (folder / "index.json").write_bytes(b"{}")
    files.upload(folder, root + "/model", last="index.json")
    staged = files.stage(root + "/model", lambda name: name != "nothing")
    assert (staged / "part" / "large").read_bytes() == large
    before = (staged / "index.json").stat()
    requests = store.proxy.requests.total()
    assert files.stage(root + "/model", lambda name: name != "nothing") == staged
    assert store.proxy.requests.total() - requests <= 2  # nothing is fetched twice
    (staged / "index.json").unlink()
    one = files.stage(root + "/model", lambda name: name != "nothing") / "index.json"
    assert one.stat().st_mtime_ns == before.st_mtime_ns
    assert files.stage(root + "/a.bin").read_bytes() == b"0123456789"
    with pytest.raises(UserError, match="no such object, and none below it"):
        files.stage(root + "/absent")

    files.delete(root + "/a.bin")
    files.delete(root + "/a.bin")
    assert all(e.address != root + "/a.bin" for e in files.list_files(root))


def test_conditional_writes_see_what_another_wrote(store):
    address = store.root + "/lock"
    first = files.create(address, b"one")
    assert files.create(address, b"one") == first  # a repeated request finds its own
    with pytest.raises(files.Conflict):
        files.create(address, b"two")
    second = files.replace(address, b"three", first)
    assert files.read_bytes(address) == b"three"
    assert files.stat(address).version == second != first
    with pytest.raises(files.Conflict):
        files.replace(address, b"four", first)
    with pytest.raises(UserError, match="was replaced while it was read"):
        files.read_range(address, 0, 3, first)
    files.delete(address)


def test_faults_are_retried_and_outages_end_in_time(store, monkeypatch):
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 2.0)
    store.proxy.faults = 0.1
    try:
        for index in range(8):
            address = f"{store.root}/faulty-{index}"
            version = files.create(address, b"%d" % index * 1000)
            assert files.replace(address, b"new %d" % index, version) != version
            assert files.read_bytes(address) == b"new %d" % index
        store.proxy.faults = 1.0
        monkeypatch.setattr(object_store, "RETRY_SECONDS", 0.3)
        with pytest.raises(Unavailable, match="could not be reached for 0.3 s"):
            files.put(store.root + "/late", b"")
    finally:
        store.proxy.faults = 0.0


LAST = {"s3": "POST .*uploadId=", "gs": r"upload_id=.* bytes .*/\d+$"}


def test_an_upload_is_complete_though_its_last_answer_was_lost(store, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 2.0)
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    (tmp_path / "large").write_bytes(bytes(range(256)) * 40_000)
    store.proxy.losing = LAST[store.scheme]
    files.upload(tmp_path / "large", store.root + "/large")
    assert not store.proxy.losing
    assert files.read_bytes(store.root + "/large") == (tmp_path / "large").read_bytes()
    absent = f"{store.scheme}://absent-bucket/large"
    with pytest.raises(UserError, match="there is no bucket absent-bucket"):
        files.upload(tmp_path / "large", absent)


def test_what_cannot_be_used_is_one_line(store, monkeypatch):
    with pytest.raises(UserError, match="there is no bucket absent-bucket"):
        files.check_writable(f"{store.scheme}://absent-bucket/run")
    for address, words in (
        ("http://host/x", "addresses begin with gs:// or s3://"),
        (f"{store.scheme}:/bucket/x", f"write {store.scheme}://BUCKET/NAME"),
        (f"{store.scheme}://", f"write {store.scheme}://BUCKET/NAME"),
    ):
        with pytest.raises(UserError, match=words):
            files.is_remote(address)
    client = type(object_store._locate(store.root + "/x")[0])
    write = client.write
    monkeypatch.setattr(client, "write", lambda *args: write(*args[:-1], None))
    with pytest.raises(UserError, match="ignores conditional writes"):
        files.check_writable(store.root)
