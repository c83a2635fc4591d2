"""`study serve`: votes over HTTP, from raters with the key alone, none lost and none twice."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from starlette.testclient import TestClient

from pixart_jax import cli
from pixart_jax.evaluation import study
from pixart_jax.serving.guard import Access
from pixart_jax.serving.study import Ballot, create_app, main
from tests.evaluation.calls import write_images

KEYED = {"Authorization": "Bearer opens"}
KEYS = {"raters": hashlib.sha256(b"opens").digest()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for level, model in enumerate(("ours-XL", "theirs")):
        images = [np.full((8, 8, 3), 90 * level + n, np.uint8) for n in range(4)]
        write_images(root / model, images, [f"prompt {n}" for n in range(4)])
    folders, out = (str(root / "ours-XL"), str(root / "theirs")), root / "out"
    study.build(study.BuildOptions(folders, out, per_rater=2, judgements=2))
    return out


@pytest.fixture
def votes(tmp_path):
    return tmp_path / "votes.jsonl"


def client(built, votes, keys=KEYS):
    app = create_app(built, Ballot(built, votes.open("a+b")), Access(keys))
    return TestClient(app, base_url="http://localhost", headers=KEYED if keys else {})


def vote_of(built, rater: str, sheet: int, number: int) -> dict:
    page = json.loads((built / "page/trials.js").read_text()[len("const STUDY = ") : -len(";\n")])
    trial = page["sheets"][sheet][0]["trials"][number]
    left = page["trials"][trial]["images"][0]
    vote = {"trial": trial, "rater": rater, "sheet": sheet, "left": left, "answer": "left"}
    return {**vote, "ms": 800, "version": page["version"]}


def test_votes_are_kept_once_and_a_rater_resumes_after_a_crash(built, votes):
    app = client(built, votes)
    sheets = [app.get(f"/v1/votes?rater=r{n}").json()["sheet"] for n in range(4)]
    assert sorted(sheets) == [0, 1, 2, 3]  # the least taken one
    sent = vote_of(built, "r2", sheets[2], 0)
    for _ in range(2):  # the second is a repeated request
        assert app.post("/v1/votes", json=sent).status_code == 200
    with votes.open("ab") as file:
        file.write(b'{"trial": "killed while wri')
    again = client(built, votes)
    found = again.get("/v1/votes?rater=r2").json()
    assert found == {"sheet": sheets[2], "done": [sent["trial"]]}
    assert again.post("/v1/votes", json=vote_of(built, "r2", sheets[2], 1)).status_code == 200
    read = study.read_votes(votes, study.read_key(built))
    assert [vote.rater for vote in read] == ["r2", "r2"] and len(
        votes.read_text().splitlines()
    ) == 2
    assert {vote.left for vote in read} <= {"ours-XL", "theirs"} and read[0].ms == 800


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"trial": "nothing"}, 400, "not of this study"),
        ({"left": "ours-XL"}, 400, "is not of trial"),
        ({"answer": "up"}, 400, "one of left"),
        ({"rater": ""}, 400, "1 to 64 characters"),
        ({"rater": "x" * 65}, 400, "1 to 64 characters"),
        ({"ms": -1}, 400, "milliseconds"),
        ({"sheet": 99}, 400, "sheet '99'"),
        ({"version": "old"}, 400, "reload it"),
    ],
)
def test_a_vote_that_does_not_fit_is_refused(change, status, says, built, votes):
    answer = client(built, votes).post("/v1/votes", json={**vote_of(built, "r", 0, 0), **change})
    assert answer.status_code == status and says in answer.json()["error"]["message"]
    assert votes.read_bytes() == b""


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Host": "evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Length": str(2**21)}, 413),
    ],
)
def test_requests_of_others_are_refused(headers, status, built, votes):
    app = client(built, votes)
    body = json.dumps(vote_of(built, "r", 0, 0))
    sent = {"Content-Type": "application/json", **KEYED, **headers}
    assert app.post("/v1/votes", content=body, headers=sent).status_code == status
    assert votes.read_bytes() == b""


def test_the_page_is_open_and_names_no_model(built, votes):
    app = client(built, votes, keys={})
    images = [f"/pictures/{path.name}" for path in (built / "page/pictures").iterdir()]
    for path in ("/", "/study.js", "/study.css", "/trials.js", *images):
        answer = app.get(path)
        assert (
            answer.status_code == 200
            and "default-src 'none'" in answer.headers["Content-Security-Policy"]
        )
        assert b"ours-XL" not in answer.content and b"theirs" not in answer.content
    for path in ("/key.json", "/../key.json", "/%2e%2e/key.json", "/pictures/../../key.json"):
        assert app.get(path).status_code == 404


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["EMPTY"], "holds no key.json"), (["STUDY", "--host", "0.0.0.0"], "--api-key-file")],
)
def test_mistakes_are_one_line(flags, says, built, tmp_path, capsys):
    flags = [flag.replace("STUDY", str(built)).replace("EMPTY", str(tmp_path)) for flag in flags]
    assert cli.run(main, flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err


@pytest.mark.slow
def test_no_acknowledged_vote_is_lost_by_kill_9(built, votes):
    command = [sys.executable, "-m", "pixart_jax", "evaluate", "study", "serve", str(built)]
    command += ["--votes", str(votes), "--port", "0"]
    for number in range(2):
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = server.stdout.readline().split()[2].rstrip(",")
            data = json.dumps(vote_of(built, "r", 0, number)).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/v1/votes", data, headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.status == 200
        finally:
            server.kill()
            server.communicate()
        assert len(study.read_votes(votes)) == number + 1
