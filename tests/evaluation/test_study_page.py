"""The study's page in a real browser: from its first screen to the votes of a whole sheet."""

from __future__ import annotations

import functools
import http.server
import json
import threading

import numpy as np
import pytest

from pixart_jax.evaluation import study
from pixart_jax.images import write_png
from tests.serving import browser

pytestmark = pytest.mark.skipif(browser.program() is None, reason="no chromium on this machine")
PROMPT = "<img src=x onerror=alert(1)> no. "
READY = "!$('trial').hidden && !document.querySelector('#answers :disabled')"


class Stub(http.server.SimpleHTTPRequestHandler):
    """A static server that takes votes as `study serve` does, or says that its disk is full."""

    votes: list[dict] = []
    full = False

    def log_message(self, *_):
        pass

    def answer(self, status: int, value) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if not self.path.startswith("/v1/votes"):
            return super().do_GET()
        self.answer(200, {"sheet": 1, "done": [vote["trial"] for vote in Stub.votes]})

    def do_POST(self):
        vote = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Stub.full:
            return self.answer(503, {"error": {"message": "The disk is full."}})
        Stub.votes.append(vote)
        self.answer(200, {})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for level, model in enumerate("AB"):
        (root / model).mkdir()
        for n in range(6):
            settings = {"prompt": f"{PROMPT}{n}", "index": n, "seed": 0}
            pixels = np.full((16, 16, 3), 60 + 99 * level + n, np.uint8)
            write_png(root / model / f"{n}.png", pixels, settings)
    study.build({m: root / m for m in "AB"}, root / "out", per_rater=3, judgements=1)
    return root / "out"


@pytest.fixture(scope="module")
def page():
    found = browser.Page("about:blank")
    yield found
    found.close()


@pytest.fixture(scope="module")
def address(built):
    handler = functools.partial(Stub, directory=built / study.PAGE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


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


def test_a_rater_answers_a_sheet_and_resumes_after_a_reload(page, address, built):
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
    Stub.full = True
    page.key("ArrowRight")
    page.wait("!$('problem').hidden && $('problem').textContent.includes('The disk is full.')")
    assert trial(page) == second and len(Stub.votes) == 1
    Stub.full = False
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
    votes = {vote["trial"]: vote for vote in Stub.votes}
    assert votes.keys() == {t for part in shown["sheets"][1] for t in part["trials"]}
    assert len(Stub.votes) == 9
    for place, name in enumerate(votes):
        if first := shown["trials"][name].get("mirror"):
            assert votes[name]["left"] != votes[first]["left"] and first in list(votes)[:place]
    key = study.read_key(built)
    resolved = [study.resolve(vote, key) for vote in Stub.votes]
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
    found = [
        study.resolve(json.loads(v), study.read_key(built))
        for v in page.run(script).split("\n")
        if v
    ]
    assert len(found) == 9 and {vote.answer for vote in found} == {"tie"}
