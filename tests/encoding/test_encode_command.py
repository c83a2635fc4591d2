import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.data import records
from pixart_jax.data.buckets import TABLES
from pixart_jax.encoding import command as encode_command
from pixart_jax.encoding import options
from pixart_jax.encoding.encode import encode_dataset
from pixart_jax.encoding.options import EncodeOptions, parse_buckets
from pixart_jax.errors import UserError
from pixart_jax.pipeline.encoder_identity import component_identity, tokenizer_identity
from pixart_jax.text import word_tokenizer
from pixart_jax.weights import component
from tests.encoding import tiny_encoders as tiny
from tests.training import tiny_run


@pytest.fixture
def folder(tmp_path):
    return encode_dataset(
        tiny.Noise(20),
        EncodeOptions(buckets=((32, 32), (32, 64)), shard_size=4),
        vae=tiny.vae(),
        folder=tmp_path / "set",
        progress=False,
    )


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
        ("--buckets 64", "--buckets '64'"),
        ("--buckets 64x0", "HEIGHTxWIDTH"),
        ("--batch-size 0", "batch size 0"),
        ("--model nowhere", "no vae in nowhere"),
        ("--check", "--check needs --out"),
        ("--dtype float16", "--dtype"),
        ("--mesh rows=2", "rows"),
        ("--check --out nowhere", "nowhere holds no manifest.json"),
        ("--bukets 64x64", "--buckets"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        encode_command.main(arguments.split())
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny VAE and T5 of random weights with a tokenizer, as a model folder."""
    return tiny_run.parts(tmp_path_factory.mktemp("model"))


def test_a_model_folder_encodes_a_set_into_the_cache_under_its_encoders_identity(
    model, tmp_path, monkeypatch, capsys
):
    source = tiny.Noise(10)
    monkeypatch.setattr(options, "open_source", lambda *args, **kwargs: source)
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    flags = f"--model {model} --buckets 32x32 --captions dense,short --batch-size 4"
    assert encode_command.main([*flags.split(), "--max-text-tokens", "24"]) == 0
    (folder,) = (tmp_path / "cache" / "encoded").iterdir()
    said = capsys.readouterr().out
    assert "10 records (32×32: 10) in 1 shards, 0." in said and str(folder) in said
    vae = component.load_component(model / "vae")
    text = component.load_component(model / "text_encoder")
    expected = {"vae": component_identity(vae), "text_encoder": component_identity(text)}
    made = records.Records(folder, expected)
    assert len(made) == 10 and {metadata["key"] for _, metadata in made} == {
        source[index].key for index in range(10)
    }


def test_flips_and_a_bfloat16_text_encoder_by_flags(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(options, "open_source", lambda *args, **kwargs: tiny.Noise(10))
    arguments = f"--model {model} --buckets 32x32,32x64 --batch-size 4 --max-text-tokens 24".split()
    arguments += f"--flip --out {tmp_path / 'set'} --dtype bfloat16 --mesh data=-1".split()
    assert encode_command.main(arguments) == 0
    assert "10 records (32×32: 8, 32×64: 2), each mirrored too" in capsys.readouterr().out
    manifest = records.Manifest.read(tmp_path / "set")
    dtypes = {part: made["dtype"] for part, made in manifest.made_from.items()}
    assert dtypes["text_encoder"] == "bfloat16" and dtypes["vae"] == "float32"


def test_the_identity_of_an_encoder_is_that_of_its_weights(model):
    first = component.load_component(model / "vae")
    assert component_identity(first) == component_identity(component.load_component(model / "vae"))
    assert component_identity(first) != component_identity(
        component.load_component(model / "vae", dtype=jnp.bfloat16)
    )
    params = jax.tree.map(np.array, dict(first.params))
    leaf = jax.tree.leaves(params)[5]
    leaf.reshape(-1)[0] = np.nextafter(leaf.reshape(-1)[0], np.float32(9))
    assert component_identity(first) != component_identity(first.replace(params=params))


def test_a_tokenizer_s_identity_does_not_depend_on_what_it_did():
    used = tiny.words()
    used("a red circle", max_length=3, truncation=True, padding="max_length")
    assert tokenizer_identity(used) == tokenizer_identity(tiny.words())
    assert tokenizer_identity(used) != tokenizer_identity(word_tokenizer(tiny.WORDS[1:]))


def test_a_base_stands_for_its_table():
    assert parse_buckets("512") == tuple(TABLES[512].values())
    assert parse_buckets("64x64, 64×96") == ((64, 64), (64, 96))
