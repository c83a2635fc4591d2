"""The study's page in a real browser: from its first screen to the votes of a whole sheet."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pixart_jax.evaluation import study
from pixart_jax.serving.errors import ApiError
from pixart_jax.serving.guard import Access
from pixart_jax.serving.study import Ballot, create_app
from tests.evaluation.calls import rows_of, write_images
from tests.serving import browser, servers

pytestmark = pytest.mark.skipif(browser.program() is None, reason="no chromium on this machine")
PROMPT = "<img src=x onerror=alert(1)> no. "
READY = "!$('trial').hidden && !document.querySelector('#answers :disabled')"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for level, model in enumerate("AB"):
        images = [np.full((16, 16, 3), 60 + 99 * level + n, np.uint8) for n in range(6)]
        write_images(root / model, images, [f"{PROMPT}{n}" for n in range(6)])
    folders, out = tuple(str(root / model) for model in "AB"), root / "out"
    study.build(study.BuildOptions(folders, out, per_rater=3, judgements=1))
    return out


@pytest.fixture(scope="module")
def page():
    found = browser.Page("about:blank")
    yield found
    found.close()


@pytest.fixture(scope="module")
def ballot(built):
    with (built / "votes.jsonl").open("a+b") as file:
        yield Ballot(built, file)


@pytest.fixture(scope="module")
def address(built, ballot):
    with servers.listening(create_app(built, ballot, Access())) as address:
        yield f"{address}/"


def enter(page, address: str, name: str) -> None:
    page.open(address)
    page.run(
        f"$('rater').value = {json.dumps(name)}; document.querySelector('#start button').click()"
    )
    page.wait("!$('pass').hidden || !$('done').hidden")


def trial(page) -> list[str]:
    """[place, left image, right image], once both are shown."""
    page.wait(READY)
    sources = "...[...document.querySelectorAll('#images img')].map((image) => image.src)"
    return page.run(f"[$('place').textContent, {sources}]")


def test_a_rater_answers_a_sheet_and_resumes_after_a_reload(
    page, address, built, ballot, monkeypatch
):
    def full(vote):
        raise ApiError(503, "The disk is full.")

    enter(page, address, "Ada <b>")
    assert page.run("$('question').textContent") == "Which image looks better?"
    page.click("#begin")
    assert trial(page)[0] == "1 of 9" and page.run("$('text').hidden")
    page.click("[data-answer=left]")
    page.wait("$('place').textContent === '2 of 9'")
    second = trial(page)
    enter(page, address, "Ada <b>")  # goes on where it was, with the same sides
    page.click("#begin")
    assert trial(page) == second
    # a vote that was not taken is not lost: the trial stays, and may be answered again
    monkeypatch.setattr(ballot, "cast", full)
    page.key("ArrowRight")
    page.wait("!$('problem').hidden && $('problem').textContent.includes('The disk is full.')")
    assert trial(page) == second and len(rows_of(built / "votes.jsonl")) == 1
    monkeypatch.undo()
    page.console.clear()
    for number, key in enumerate(("ArrowRight", "ArrowUp", "ArrowDown", "ArrowLeft") * 2, 2):
        if number == 5:  # the second pass, with its question
            assert page.wait("!$('pass').hidden && $('part').textContent") == "Part 2 of 2"
            page.click("#begin")
            trial(page)
            assert page.run("$('text').textContent").startswith(PROMPT)  # text, not markup
        page.wait(f"{READY} && $('place').textContent === '{number} of 9'")
        page.key(key)
    assert "saved" in page.wait("!$('done').hidden && $('thanks').textContent")
    assert not page.console
    # each trial of the sheet once; a repeat comes later, with the sides exchanged
    shown = json.loads((built / "page/trials.js").read_text()[len("const STUDY = ") : -len(";\n")])
    lines = rows_of(built / "votes.jsonl")
    votes = {vote["trial"]: vote for vote in lines}
    sheet = shown["sheets"][lines[0]["sheet"]]
    assert votes.keys() == {t for part in sheet for t in part["trials"]} and len(lines) == 9
    for place, name in enumerate(votes):
        if first := shown["trials"][name].get("mirror"):
            assert votes[name]["left"] != votes[first]["left"] and first in list(votes)[:place]
    resolved = study.read_votes(built / "votes.jsonl", study.read_key(built))
    assert {(vote.rater, vote.version) for vote in resolved} == {("Ada <b>", shown["version"])}
    assert sum(not vote.kind for vote in resolved) == 6


def test_without_a_server_the_votes_are_a_file(page, built):
    enter(page, (built / "page" / "index.html").as_uri(), "b")
    for number in range(1, 10):
        if page.wait("!$('pass').hidden || " + READY) and page.run("!$('pass').hidden"):
            page.click("#begin")
        page.wait(f"{READY} && $('place').textContent === '{number} of 9'")
        page.click("[data-answer=tie]")
        page.wait(f"$('place').textContent !== '{number} of 9'")
    page.wait("!$('done').hidden")
    script = "fetch(download.href).then((file) => file.text())"
    texts, key = filter(None, page.run(script).split("\n")), study.read_key(built)
    found = [study.resolve(json.loads(text), key) for text in texts]
    assert len(found) == 9 and {vote.answer for vote in found} == {"tie"}
