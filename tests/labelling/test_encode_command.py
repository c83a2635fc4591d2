import pytest

from pixart_jax.data.buckets import TABLES
from pixart_jax.errors import UserError
from pixart_jax.labelling import encode_command
from pixart_jax.labelling.encode import EncodeOptions, ensure
from tests.labelling import tiny_encoders as tiny


@pytest.fixture
def folder(tmp_path):
    return ensure(tiny.Noise(20), EncodeOptions(buckets=((32, 32), (32, 64)), shard_size=4), vae=tiny.vae(), folder=tmp_path / "set", progress=False)


def test_check_passes_sound_shards_and_says_what_they_hold(folder, capsys):
    assert encode_command.main(["--check", "--out", str(folder)]) == 0
    assert "no damage: 20 records (32×32: 15, 32×64: 5)" in capsys.readouterr().out


def test_check_names_a_shard_with_one_flipped_bit(folder, capsys):
    victim = folder / "00001-32x32.array_record"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match="1 of the shards"):
        encode_command.main(["--check", "--out", str(folder)])
    assert "00001-32x32.array_record is damaged: its checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--buckets", "64"], "--buckets '64'"),
        (["--buckets", "64x0"], "HEIGHTxWIDTH"),
        (["--batch-size", "0"], "batch size 0"),
        (["--model", "nowhere"], "no vae in nowhere"),
        (["--check"], "--check needs --out"),
        (["--check", "--out", "nowhere"], "nowhere holds no manifest.json"),
        (["--bukets", "64x64"], "--buckets"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        encode_command.main(arguments)
    assert "\n" not in str(caught.value)


def test_a_base_stands_for_its_table():
    assert encode_command.parse_buckets("512") == tuple(TABLES[512].values())
    assert encode_command.parse_buckets("64x64, 64×96") == ((64, 64), (64, 96))
