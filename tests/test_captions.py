"""Cleaning against diffusers' own, string by string."""

from __future__ import annotations

import random

import pytest
from diffusers import PixArtAlphaPipeline

from pixart_jax.data import shapes
from pixart_jax.text import clean_caption, lower_caption

WRITTEN = [
    "",
    "  A Large RED Star  ",
    "an astronaut riding a horse, 4k, trending on artstation.",
    "see https://example.com/a/b?c=d or www.site.org/page and mail me@there.net",
    "<b>bold</b> &amp; <i>it&quot;s</i> <person> walks&nbsp;on <br/> grass &lt;3",
    "@nick_name says “hello” — ‘quoted’ … and «more» ¨x¨ `code`",
    "IMG_1234.JPG photo of a cat.png free download worldwide free shipping",
    "this-is-my-cute-cat and_here_is_one_more",
    "one-two three-four",
    "call 192.168.10.1 at 5:30 ",
    "#123 #12345 #1234 1234567 12345 abc123 abc12345 a1b 66b2 j2d1a2a",
    "***SALE*** ((now)) [only] {today} | a/b \\ c",
    "''quoted'' \"\"twice\"\" '''thrice'''",
    '"all of it"',
    "'single'",
    "-starts and ends-",
    ":colon : in the middle :",
    "dots... and .. more . alone . here",
    ".hidden",
    "a\\nb\nc\td",
    "click for more click on this page 12 pdf images jpg image",
    "64x64 12.5х3.2 3×4 poster",
    "ünïcödé ï¿½ â€œmojibakeâ€\x9d schÃ¶n",
    "一只猫 sits ㊀ 㐀 ㌀ ㇰ on 猫 mat",
    "dash ‐ ‑ ‒ – — ― 〜 － all",
    "%41%42 plus+signs+are+blanks 100%",
    "a,b.c/d,e 1,000.50 and 3.14",
    "¿qué? ¡sí! ½ cup § 5 ~ º • © ® ™",
    "a : b:c ; d",
    "word " * 60,
    "&amp;amp; &#39;x&#39; &lt;b&gt;y&lt;/b&gt;",
    "file:///x/y.txt C:\\temp\\x.mp4",
    "😀 smile 👍🏽 family",
    "/",
    "a.b",
]
PIECES = [
    *" .,;:-_'\"`#@&/\\()[]{}|*+%~…—“”‘’<>\n",
    *"&amp; &quot; <b> </b> <person> https:// www. .com .png jpg download shipping".split(),
    *"red Star a 12 345 6789012 x × х 猫 é ï¿½".split(),
    *("free ", "page ", "click on "),
]


@pytest.fixture(scope="module")
def reference():
    pipeline = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)  # the rules need none of its parts
    return lambda text, clean=True: pipeline._text_preprocessing(text, clean_caption=clean)[0]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_text_is_what_diffusers_makes_of_it(reference, text):
    assert clean_caption(text) == reference(text)
    assert lower_caption(text) == reference(text, clean=False)


@pytest.mark.filterwarnings("ignore")
def test_two_thousand_texts_of_random_pieces_are_what_diffusers_makes_of_them(reference):
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 30)))
        assert clean_caption(text) == reference(text), repr(text)


def test_captions_of_the_embedded_world_are_clean_already():
    for level in shapes.LEVELS:
        for index in range(40):
            for text in shapes.captions(shapes.scene_at(level, "train", index)).values():
                assert clean_caption(text) == text
