import pytest

from pixart_jax.data.faults import BadRecord, BadRecords
from pixart_jax.errors import UserError


def test_what_is_mended_is_counted_apart_from_what_is_left_out(tmp_path):
    faults = BadRecords()
    faults.add("a.txt", "control characters", repaired=True)
    for _ in range(2):
        faults.add("b.jpg", "unreadable image", "cut")
    faults.add("c.jpg", "unreadable image")
    assert len(faults) == 2
    assert faults.summary() == "2 left out: 2 unreadable image; 1 mended: 1 control characters"
    assert faults.report(3).startswith("5 read: 3 used, 2 left out: 2 unreadable image; 1 mended")
    assert faults.write(tmp_path / "faults.jsonl")
    assert list(BadRecords.read(tmp_path / "faults.jsonl")) == list(faults)
    assert list(faults)[0] == BadRecord("a.txt", "control characters", "", True)
    other = BadRecords()
    other.extend(faults)
    assert other.summary() == faults.summary()
    message = "a.txt: control characters; without --strict it would be counted and put right"
    with pytest.raises(UserError, match=message):
        BadRecords(strict=True).extend(faults)


def test_a_fault_is_one_printable_line():
    faults = BadRecords()
    faults.add("a\nb\x07.txt", "unreadable row", "x" * 1000)
    (fault,) = faults
    assert str(fault).isprintable() and len(str(fault)) < 400
