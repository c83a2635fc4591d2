"""The web page, in a real browser."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_jax.evaluation.checker import find_objects
from pixart_jax.images import png_parameters
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.serving.api import create_app
from pixart_jax.serving.guard import Access
from pixart_jax.serving.offer import Offer
from tests.serving import browser
from tests.serving.servers import ROOT, SHIPPED, listening, stub_service

PROMPT = "a large red star left of a small blue circle"
TILES = "document.querySelectorAll('article:first-child button.tile').length"

# of the last run, from the gallery's database: the page's policy lets no script fetch blob: URLs
FILES = """(async () => {
  const open = await new Promise((done) => {
    const request = indexedDB.open('pixart_jax', 1);
    request.onsuccess = () => done(request.result); });
  const all = await new Promise((done) => {
    const request = open.transaction('runs').objectStore('runs').getAll();
    request.onsuccess = () => done(request.result); });
  open.close();
  if (all.length !== document.querySelectorAll('article').length) return null; // not stored yet
  return Promise.all(all.at(-1).images.map(async ({ blob }) =>
    btoa(String.fromCharCode(...new Uint8Array(await blob.arrayBuffer())))));
  })()"""


class Site:
    """A server and a page of it."""

    def __init__(self, page, address, service, renderer):
        self.page, self.address = page, address
        self.service, self.renderer = service, renderer

    def open(self):
        """The page, its gallery empty."""
        self.page.open(self.address)
        self.page.wait("document.querySelector('#tokens').textContent")
        self.page.run("document.querySelector('#clear').click()")
        self.page.wait("!document.querySelector('article')")
        self.page.look()
        self.page.console.clear()

    def fill(self, **fields):
        for name, value in fields.items():
            self.page.run(
                f"(() => {{ const field = document.getElementById({name!r});"
                f" field.value = {json.dumps(value)}; field.dispatchEvent(new Event('input'));"
                " field.dispatchEvent(new Event('change')); })()"
            )

    def fields(self) -> dict:
        names = ("prompt", "negative", "size", "seed", "n", "solver")
        values = ", ".join(f"{name}: document.getElementById('{name}').value" for name in names)
        shown = ", ".join(
            f"{name}: document.getElementById('{name}-value').textContent"
            for name in ("steps", "guidance")
        )
        return self.page.run(f"({{{values}, {shown}}})")

    def press(self, text, inside="body"):
        self.page.run(
            f"[...document.querySelectorAll('{inside} button')]"
            f".find((one) => one.textContent.trim() === {text!r}).click()"
        )

    def generate(self, images=1) -> list[bytes]:
        """The images' files."""
        before = self.page.run("document.querySelectorAll('article').length")
        self.page.click("#prompt")
        self.page.key("Enter", modifiers=2)
        self.page.wait(
            f"document.querySelectorAll('article').length > {before} && {TILES} == {images}"
        )
        return self.files()

    def files(self) -> list[bytes]:
        return [base64.b64decode(one) for one in self.page.wait(FILES)]

    def drop(self, data: bytes, name="image.png"):
        """Drag a file onto the page."""
        self.page.run(
            "(() => { const data = new DataTransfer();"
            " document.querySelector('#notice').textContent = '';"
            f" const bytes = Uint8Array.from(atob('{base64.b64encode(data).decode()}'),"
            f" (c) => c.charCodeAt(0)); data.items.add(new File([bytes], {name!r}));"
            " document.querySelector('main').dispatchEvent(new DragEvent('drop',"
            " {dataTransfer: data, bubbles: true, cancelable: true})); })()"
        )
        return self.page.wait("document.querySelector('#notice').textContent")


@pytest.fixture(scope="module")
def chromium():
    if browser.program() is None:
        pytest.skip(f"the page is tested in a browser: none of {', '.join(browser.NAMES)} is found")
    page = browser.Page("about:blank")
    yield page
    page.close()


@pytest.fixture(scope="module")
def shared(chromium):
    offer = Offer.of(ModelFolder.open(SHIPPED), adapters=["heart"], controlnets=["edges"])
    service, renderer = stub_service(offer=offer)
    with listening(create_app(service)) as address:
        yield Site(chromium, address, service, renderer)


@pytest.fixture
def site(shared):
    shared.open()
    yield shared
    assert shared.page.console == []


def test_it_generates_and_repeats_a_seed_to_the_byte(site):
    site.page.wait("document.activeElement.id === 'prompt'")
    site.page.type(PROMPT)
    site.fill(n="2", seed="18446744073709551615")
    first = site.generate(2)
    settings = json.loads(Image.open(io.BytesIO(first[0])).text["pixart_jax"])
    assert (settings["prompt"], int(settings["seed"])) == (PROMPT, 2**64 - 1)
    site.press("Reuse settings")
    assert site.generate(2) == first
    other = site.generate(2)  # an unlocked seed is a new one
    assert other != first and site.fields()["seed"] != "18446744073709551615"
    site.page.click("#lock")
    assert site.generate(2) == other
    site.page.open(site.address)
    assert site.page.wait("document.querySelectorAll('article').length") == 4  # kept
    assert site.files() == other


def test_cancel_ends_the_run(site):
    site.renderer.gate.clear()
    try:
        site.page.type(PROMPT)
        site.page.click("#generate")
        site.page.wait("/Step|Compiling/.test(document.querySelector('.progress')?.textContent)")
        site.page.click("#generate")
        site.page.wait("!document.querySelector('.progress')")
        assert site.page.run("document.querySelector('#generate').textContent") == "Generate"
        assert site.page.run("document.querySelector('#live').textContent") == "Cancelled"
    finally:
        site.renderer.gate.set()
    assert len(site.generate()) == 1


def test_a_dropped_png_restores_every_field(site):
    wanted = {"prompt": "a ring, a cross", "negative": "blur", "size": "64x96", "seed": "7"}
    wanted |= {"n": "1", "solver": "sa", "steps": "28", "guidance": "3.25"}
    site.fill(**{k: v for k, v in wanted.items() if k not in ("steps", "guidance")})
    site.page.run("document.getElementById('guidance').step = 'any'")
    site.fill(guidance="3.25", steps="4")
    site.page.run("document.querySelector('#adapters input').click()")
    assert site.fields() == wanted
    (made,) = site.generate()
    site.open()
    assert site.fields()["prompt"] == ""
    assert "Restored" in site.drop(made)
    assert site.fields() == wanted
    assert site.page.run("document.querySelector('#adapters input').checked")
    assert site.generate() == [made]


@pytest.mark.parametrize("chunk", ["tEXt", "iTXt", "zTXt"])
def test_a_png_of_another_tool_restores_what_is_offered(site, chunk):
    prompt = "ein großer Stern,\nrot: “hell”" if chunk == "iTXt" else "a star,\nred: bright"
    facts = {"prompt": prompt, "negative_prompt": "blur, noise", "steps": 20, "guidance": 4.5}
    facts |= {"solver": "DPM++ 2M", "seed": 11, "height": 64, "width": 96, "model": "a: b, c"}
    info = PngInfo()
    text = png_parameters({**facts, "hires_upscale": 2})
    info.add_text("parameters", text, zip=chunk == "zTXt")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    assert chunk.encode() in file.getvalue()
    said = site.drop(file.getvalue())
    assert "Hires upscale" in said and "made with a: b, c" in said
    found = site.fields()
    assert (found["prompt"], found["negative"], found["size"]) == (prompt, "blur, noise", "96x64")
    assert (found["seed"], found["steps"], found["guidance"]) == ("11", "20", "4.5")


def test_settings_of_jpeg_and_webp_and_of_damaged_files(site):
    comment = b"UNICODE\0" + "a star\nSteps: 8, Seed: 5, Size: 64x64, CFG scale: 3".encode(
        "utf-16be"
    )
    for kind in ("JPEG", "WEBP"):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind, exif=exif)
        site.fill(prompt="", seed="0")
        assert "Restored" in site.drop(file.getvalue(), f"image.{kind}")
        found = site.fields()
        assert (found["prompt"], found["seed"], found["steps"]) == ("a star", "5", "8")
        assert "no settings" in site.drop(file.getvalue()[:40], "cut")


def test_a_painted_mask_and_its_image_reach_the_server(site):
    site.page.type(PROMPT)
    site.fill(size="96x64")
    (made,) = site.generate()
    site.page.click("button.tile")
    site.press("Repaint a part", "#actions")
    site.page.wait("document.querySelector('#painter').open")
    x, y, width, height = site.page.run(
        "(({x, y, width, height}) => [x, y, width, height])"
        "(document.querySelector('#canvas').getBoundingClientRect())"
    )
    site.page.mouse(
        *[(x + width * u, y + height * v) for u, v in ((0.2, 0.5), (0.3, 0.5), (0.4, 0.5))]
    )
    site.press("Invert", "#painter")
    site.press("Undo", "#painter")
    site.page.run("document.querySelector('#canvas').focus()")
    site.page.key(" ")  # at the pointer
    site.press("Use this mask", "#painter")
    site.page.wait("!document.querySelector('#painter').open")
    site.generate()
    generation = site.renderer.batches[-1][0][0]
    assert np.array_equal(generation.image, np.asarray(Image.open(io.BytesIO(made))))
    mask = generation.mask
    assert mask.shape == (64, 96) and mask[32, 20:38].all()
    assert not mask[:24].any() and not mask[:, 46:].any()
    assert generation.strength == 1
    site.press("Remove the mask", "#form")
    site.generate()
    generation = site.renderer.batches[-1][0][0]
    assert generation.mask is None and generation.image is not None and generation.strength == 0.6


def test_an_edge_map_and_a_style_reach_the_server(site, tmp_path):
    site.page.type("a star")
    site.fill(style="Ink", negative="blur")
    file = tmp_path / "map.png"
    Image.new("RGB", (64, 64), (9, 9, 9)).save(file)
    site.page.choose("#control", file)
    site.page.wait("!document.querySelector('#control-chosen').hidden")
    site.page.run("document.getElementById('control-scale').stepDown(10)")
    site.generate()
    generation = site.renderer.batches[-1][0][0]
    assert (
        generation.image is None
        and (generation.control == 9).all()
        and generation.control_scale == 0.5
    )
    assert generation.prompt.startswith("a star, ink drawing")
    assert generation.negative_prompt.startswith("blur, ")
    site.page.choose("#image", file)
    site.fill(**{"control-from": "canny"})
    site.generate()
    generation = site.renderer.batches[-1][0][0]
    assert (generation.image == 9).all() and not generation.control.any()  # no edges in it


def test_text_beyond_the_limit_is_shown(site):
    site.page.type("a star " * 40 + "lost")
    assert "lost" in site.page.wait("document.querySelector('#lost').textContent")
    site.generate()
    assert "lost" in site.page.run("document.querySelector('article .note').textContent")


def test_markup_in_a_prompt_is_text(site):
    prompt = "<script>console.log(1)</script><img src=x onerror=console.log(2)> a star"
    site.page.type(prompt)
    site.generate()
    assert site.page.run("document.querySelector('article .prompt').textContent") == prompt
    site.page.click("button.tile")
    assert site.page.run("document.querySelector('#large-prompt').textContent") == prompt
    assert site.page.run("document.scripts.length") == 1


def test_the_lightbox_by_keyboard(site):
    site.page.type(PROMPT)
    site.fill(n="2", seed="5")
    site.generate(2)
    site.page.run("document.querySelector('button.tile').focus()")
    site.page.key("Enter")
    site.page.wait("document.querySelector('#lightbox').open")
    shown = "document.querySelector('#facts').textContent"
    assert "seed5" in site.page.run(shown)
    site.page.key("ArrowRight")
    assert "seed6" in site.page.run(shown)
    site.page.key("Escape")
    assert not site.page.run("document.querySelector('#lightbox').open")
    assert site.page.run("document.activeElement.className").startswith("tile")


CONTRAST = """(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (color) => {
    const [r, g, b] = parse(color).map(linear);
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((parse(color)[3] ?? 1) > .5) return color;
    } };
  const low = [];
  for (const node of document.querySelectorAll('body *')) {
    if (![...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())) continue;
    if (!node.checkVisibility() || node.disabled || node.closest('option, svg')) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) low.push([node.outerHTML.slice(0, 80), (a + .05) / (b + .05)]);
  }
  return low; })()"""
UNNAMED = """[...document.querySelectorAll('input, select, textarea, button')].filter((node) =>
  !node.labels?.length && !node.ariaLabel && !node.textContent.trim()).map((node) => node.id)"""


def test_every_field_has_a_name_and_all_text_has_contrast(site):
    site.page.type(PROMPT)
    site.generate()
    site.drop(b"nothing")
    assert site.page.run(UNNAMED) == []
    for dark in (False, True):
        site.page.look(dark=dark)
        assert site.page.run(CONTRAST) == []
    site.page.run("document.querySelector('#prompt').focus()")
    order = []
    for _ in range(6):
        site.page.key("Tab")
        order.append(site.page.run("document.activeElement.id || document.activeElement.value"))
    assert order == ["negative", "style", "64x64", "96x64", "64x96", "size"]
    site.page.look(360, 740)
    assert site.page.run("document.documentElement.scrollWidth") <= 360
    site.page.click("button.tile")
    assert site.page.run("document.querySelector('#lightbox').scrollWidth") <= 360


def test_errors_are_shown_where_they_belong(shared):
    shared.open()
    shared.fill(prompt="explode", seed="-1")
    shared.page.click("#generate")
    assert "whole number" in shared.page.wait("document.querySelector('#e-seed').textContent")
    shared.fill(seed="1")
    shared.page.click("#generate")
    shared.page.wait("document.querySelector('article .error')")
    shared.press("Try again")
    shared.page.wait("document.querySelector('article .error')")
    assert "secret" not in shared.page.run("document.body.textContent")
    shared.fill(prompt="a star")
    shared.page.run("document.querySelector('#size').append(new Option('1x1'))")
    shared.fill(size="1x1")
    shared.page.click("#generate")
    assert "not offered" in shared.page.wait("document.querySelector('#e-size').textContent")
    assert shared.page.run("document.activeElement.id") == "size"


def test_a_server_with_a_key_asks_for_it(chromium):
    import hashlib

    service, _ = stub_service()
    access = Access(keys={"me": hashlib.sha256(b"sesame").digest()})
    with listening(create_app(service, access)) as address:
        chromium.open(address)
        chromium.look()
        chromium.wait("document.querySelector('#key').open")
        chromium.type("wrong")
        chromium.key("Enter")
        chromium.wait("document.querySelector('#key-text').textContent.includes('refused')")
        chromium.type("sesame")
        chromium.key("Enter")
        chromium.wait("document.querySelector('#tokens').textContent")
        chromium.open(address)
        chromium.wait("document.querySelector('#tokens').textContent")  # still known in this tab
        # another site, for the browser, with a link to the page
        other = address.replace("127.0.0.1", "localhost")
        chromium.run(f"void (location.href = {other!r})")
        chromium.wait("location.hostname === 'localhost' && document.title === 'pixart_jax'")
        chromium.open("about:blank")


@pytest.mark.slow
def test_the_shipped_model_end_to_end(chromium, tmp_path):
    from pixart_jax.pipeline.lora_flags import LoraFlags
    from pixart_jax.serving.api import Service
    from pixart_jax.serving.engine import Limits
    from pixart_jax.serving.opening import EngineFlags

    loras = LoraFlags(lora=(str(ROOT / "assets" / "shapes_heart"),))
    engine, offer = EngineFlags(loras=loras, limits=Limits(2)).build()
    service = Service(engine, offer)
    with listening(create_app(service)) as address:
        site = Site(chromium, address, service, None)
        chromium.open(address)  # its state is 'compiling'
        site.page.wait("document.querySelector('#status').textContent === 'Ready'", 240)
        site.open()
        site.page.type(PROMPT)
        (made,) = site.generate()
        pixels = np.asarray(Image.open(io.BytesIO(made))).astype(int)
        assert (pixels[:, :32, 0] - pixels[:, :32, 2]).max() > 100  # red on the left
        assert (pixels[:, 32:, 2] - pixels[:, 32:, 0]).max() > 100  # blue on the right
        site.press("Reuse settings")
        assert site.generate() == [made]
        site.open()
        site.drop(made)
        assert site.generate() == [made]
        site.page.run("document.querySelector('#adapters input').click()")
        (adapted,) = site.generate()
        assert adapted != made
        # a control image, as a picture whose edges are followed
        site.page.run("document.querySelector('#adapters input').click()")
        Image.open(io.BytesIO(made)).save(tmp_path / "picture.png")
        site.page.choose("#control", tmp_path / "picture.png")
        site.page.wait("!document.querySelector('#control-chosen').hidden")
        site.fill(prompt="a green object left of a yellow object", **{"control-from": "canny"})
        (followed,) = site.generate()
        before, after = (
            find_objects(np.asarray(Image.open(io.BytesIO(f)))) for f in (made, followed)
        )
        assert {one.colour for one in after} == {"green", "yellow"}
        places = [sorted((round(o.x), round(o.y)) for o in found) for found in (before, after)]
        assert len(places[0]) == len(places[1]) == 2, places
        assert np.abs(np.subtract(*places)).max() <= 4, places
        assert chromium.console == []
