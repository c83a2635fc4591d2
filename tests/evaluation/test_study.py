"""The user study: what raters may see, and the statistics of their votes, on votes whose truth is
known."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import optimize, stats

from pixart_jax.evaluation import study, study_report
from pixart_jax.evaluation.study import Vote
from pixart_jax.images import write_png
from tests.evaluation.calls import evaluate, refused, score_of, write_images, write_rows

MODELS = ("PixArt-XL", "Rival_2")
PROMPTS = [f"prompt number {n}, with a café" for n in range(12)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of images that record their prompt, model and seed, as sample.py writes them."""
    root = tmp_path_factory.mktemp("images")
    names = [f"{n:04d}_x.png" for n in range(12)]
    for level, model in enumerate(MODELS):
        images = [np.full((8, 8, 3), 100 * level + n, np.uint8) for n in range(12)]
        write_images(root / model, images, PROMPTS, names, model=model)
    return root


def build(folders, out, *flags) -> int:
    named = [f"{model}={folders / model}" for model in MODELS]
    return evaluate("study", "build", *named, "--out", out, *flags)


@pytest.fixture(scope="module")
def built(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    assert build(folders, out, "--per-rater", "6", "--judgements", "2") == 0
    return out


def page_of(out) -> dict:
    text = (out / "page" / "trials.js").read_text()
    return json.loads(text.removeprefix("const STUDY = ").removesuffix(";\n"))


def test_nothing_that_a_rater_gets_names_a_model(built, folders):
    files = [path for path in (built / "page").rglob("*") if path.is_file()]
    secrets = [*MODELS, "0000_x", "gold", str(folders)]
    for path in files:
        data = path.read_bytes().lower() + path.name.encode()
        assert not [name for name in secrets if name.lower().encode() in data], path
    images = [path for path in files if path.suffix == ".png"]
    assert len(images) == len(MODELS) * len(PROMPTS)
    for path in images:
        with Image.open(path) as image:
            assert not image.info and image.size == (8, 8)
    assert sum(b"tEXt" in path.read_bytes() or b"iTXt" in path.read_bytes() for path in images) == 0


def test_trials_are_balanced_with_repeats_and_gold(built):
    page, key = page_of(built), study.read_key(built)["trials"]
    assert page["trials"].keys() == key.keys()
    assert len(page["sheets"]) == 4
    counts = Counter()
    for sheet in page["sheets"]:
        assert [p["question"] for p in sheet] == [text for text, _ in study.QUESTIONS.values()]
        for name, part in zip(study.QUESTIONS, sheet):
            kinds = Counter(key[trial].get("kind", "") for trial in part["trials"])
            assert kinds == {"": 6, "mirror": 1} | ({"gold": 1} if name == "alignment" else {})
            counts.update(trial for trial in part["trials"] if "kind" not in key[trial])
    # every prompt for both questions, each on two sheets
    assert len(counts) == 2 * len(PROMPTS) and set(counts.values()) == {2}
    for name, trial in key.items():
        shown = page["trials"][name]
        assert sorted(trial["images"]) == shown["images"]
        assert shown.get("text") == (trial["prompt"] if trial["question"] == "alignment" else None)
        models = list(trial["images"].values())
        if trial.get("kind") == "gold":
            assert models[0] == models[1] and trial["expected"] in trial["images"]
        else:
            assert set(models) == set(MODELS)
        if trial.get("kind") == "mirror":
            assert key[shown["mirror"]]["images"] == trial["images"]


def test_one_seed_gives_one_study_and_a_study_is_never_rewritten(built, folders, tmp_path, capsys):
    more = ("--per-rater", "6", "--judgements", "2")
    assert build(folders, tmp_path / "again", *more) == 0
    assert build(folders, tmp_path / "other", *more, "--seed", "1") == 0
    texts = [(out / "page" / "trials.js").read_text() for out in (built, tmp_path / "again")]
    assert texts[0] == texts[1] != (tmp_path / "other" / "page" / "trials.js").read_text()
    before = (built / "key.json").read_bytes()
    assert build(folders, built) == 2 and "not empty" in capsys.readouterr().err
    assert (built / "key.json").read_bytes() == before


# ---- raters of known habits ----


def simulate(rng, strength, prompts, raters, *, ties=0.1, side=0.0, by_prompt=0.0, by_rater=0.0):
    """Votes of all raters on all pairs of a prompt: the left one wins with the probability of
    Bradley and Terry; strengths differ by prompt and rater; ``side`` favours the left."""
    k = len(strength)
    of = np.array(strength) + rng.normal(0, by_prompt, (prompts, 1, k))
    of = of + rng.normal(0, by_rater, (1, raters, k))
    votes = []
    for prompt, rater in np.ndindex(prompts, raters):
        for a in range(k):
            for b in range(a):
                left, right = (a, b) if rng.random() < 0.5 else (b, a)
                odds = of[prompt, rater, left] - of[prompt, rater, right] + side
                wins = rng.random() < 1 / (1 + np.exp(-odds))
                answer = "tie" if rng.random() < ties else "left" if wins else "right"
                names = (f"m{left}", f"m{right}")
                what = f"{prompt}-{a}-{b}", f"r{rater}", f"p{prompt}", "q"
                votes.append(Vote(*what, *names, answer))
    return votes


def true_rates(strength, ties, spread) -> np.ndarray:
    """[k, k]: expected win rates, ties as halves, where log odds have the deviation ``spread``."""
    odds = np.subtract.outer(strength, strength)[..., None]
    odds = odds + spread * stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    return (1 - ties) * (1 / (1 + np.exp(-odds))).mean(-1) + ties / 2


def coverage(studies: int, prompts: int, raters: int, by_prompt: float, by_rater: float):
    """Shares of the win rates and of the strengths that lie in their 95% intervals."""
    strength = [0.9, 0.2, -1.1]
    rates = true_rates(strength, 0.1, np.sqrt(2 * (by_prompt**2 + by_rater**2)))
    true = study_report.bradley_terry(rates * (1 - np.eye(3)))
    hits: dict[str, list[bool]] = {"rates": [], "strengths": []}
    for number in range(studies):
        rng = np.random.default_rng(number)
        votes = simulate(rng, strength, prompts, raters, by_prompt=by_prompt, by_rater=by_rater)
        found = study_report.analyse(votes)["questions"]["q"]
        for p in found["pairs"]:
            hits["rates"].append(p["low"] <= rates[int(p["a"][1]), int(p["b"][1])] <= p["high"])
        for model, (low, high) in found["interval"].items():
            hits["strengths"].append(low <= true[int(model[1])] <= high)
    return {name: np.mean(values) for name, values in hits.items()}


def test_intervals_hold_the_truth_in_a_few_studies():
    for found in coverage(12, 40, 8, 0.6, 0.3).values():
        assert found >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by_prompt", "by_rater"), [(0.0, 0.0), (0.8, 0.0), (0.0, 0.5), (0.6, 0.3)]
)
def test_intervals_hold_the_truth_at_their_nominal_rate(by_prompt, by_rater):
    """Three figures a study hang together: the share may be off by that of about 200."""
    for name, found in coverage(200, 40, 12, by_prompt, by_rater).items():
        assert 0.91 <= found <= 0.99, (name, found)


def test_strengths_are_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 30, (5, 5)) * (1 - np.eye(5))

    def loss(s):
        return (wins * np.log1p(np.exp(s[None, :] - s[:, None]))).sum()

    best = optimize.minimize(loss, np.zeros(5), tol=1e-12).x
    np.testing.assert_allclose(study_report.bradley_terry(wins), best - best.mean(), atol=1e-5)
    reverse = study_report.bradley_terry(np.stack([wins, wins.T]))[1]
    np.testing.assert_allclose(reverse, -(best - best.mean()), atol=1e-5)


def test_a_position_bias_is_found_where_it_is_planted_and_not_otherwise():
    p = [
        study_report.analyse(simulate(np.random.default_rng(seed), [0.5, -0.5], 30, 10, side=side))
        for side in (0.0, 0.6)
        for seed in range(2)
    ]
    fair, biased = ([f["questions"]["q"] for f in some] for some in (p[:2], p[2:]))
    assert all(f["left_p"] > 0.01 and abs(f["left_share"] - 0.5) < 0.09 for f in fair)
    assert all(f["left_p"] < 0.001 and f["left_share"] > 0.55 for f in biased)
    for f in biased:  # the sides are even, so the rate is not moved
        assert f["order"] == ["m0", "m1"] and f["pairs"][0]["low"] < 0.7 < f["pairs"][0]["high"]


def test_agreement_is_the_planted_one():
    rng = np.random.default_rng(0)
    for copied in (0.0, 0.6, 1.0):  # each copies the unit's truth with this probability
        truth = rng.integers(0, 4, (1500, 1)) + np.zeros((1, 4), int)
        seen = np.where(rng.random(truth.shape) < copied, truth, rng.integers(0, 4, truth.shape))
        values = [(f"u{u}", f"v{seen[u, r]}") for u, r in np.ndindex(seen.shape) if (u + r) % 7]
        assert study_report.krippendorff(values) == pytest.approx(copied**2, abs=0.03)
    assert study_report.krippendorff([("a", "x"), ("b", "y")]) is None  # no unit has two
    # Krippendorff's own example of two observers and ten units (2011): α = 0.095
    pairs = zip("0100000010", "1110010000")
    values = [(str(unit), value) for unit, pair in enumerate(pairs) for value in pair]
    assert study_report.krippendorff(values) == pytest.approx(0.095, abs=5e-4)


def test_gold_trials_leave_a_rater_out_and_repeats_are_counted():
    votes = simulate(np.random.default_rng(0), [1.0, -1.0], 20, 3)
    bad = [Vote(f"b{n}", "idle", f"p{n}", "q", "m1", "m0", "left") for n in range(20)]
    gold = [
        Vote(f"g{n}", rater, "p0", "q", "m0", "m0", answer, kind="gold", expected="left")
        for n in range(3)
        for rater, answer in (("r0", "left"), ("idle", "right"))
    ]
    # one repeat says the same with exchanged sides, one says 'left' again and so the other model
    first, second = [vote for vote in votes if vote.answer == "left"][:2]
    repeats = [
        Vote("x", v.rater, v.prompt, "q", v.right, v.left, answer, kind="mirror")
        for v, answer in ((first, "right"), (second, "left"))
    ]
    found = study_report.analyse([*votes, *bad, *gold, *repeats])
    assert found["left_out"] == {"idle": [0, 3]} and found["gold"] == {"right": 3, "of": 6}
    assert found["votes"] == len(votes) and found["raters"] == 3
    assert found["questions"]["q"]["repeats"] == {"same": 1, "of": 2}


# ---- files of votes ----


def votes_of_page(built, rater: str, sheet: int, better: str, odds: float, rng) -> list[dict]:
    """Votes as the page sends them: names of images, no models."""
    page, key = page_of(built), study.read_key(built)["trials"]
    votes = []
    for trial in (trial for part in page["sheets"][sheet] for trial in part["trials"]):
        left, right = rng.permutation(page["trials"][trial]["images"])
        good = key[trial].get("expected") or next(
            (image for image, model in key[trial]["images"].items() if model == better)
        )
        wins = rng.random() < odds or "expected" in key[trial]
        answer = "left" if (left == good) == wins else "right"
        vote = {"trial": trial, "rater": rater, "left": left, "answer": answer, "ms": 900}
        votes.append({**vote, "version": page["version"]})
    return votes


def test_report_from_the_votes_of_a_page(built, tmp_path, capsys):
    rng = np.random.default_rng(0)
    votes = []
    for number in range(8):
        votes += votes_of_page(built, f"r{number}", number % 4, MODELS[0], 0.85, rng)
    lines = write_rows(tmp_path / "votes.jsonl", [*votes, votes[0]])  # sent twice, counted once
    with lines.open("a") as file:
        file.write('{"trial": "cut o')
    out = tmp_path / "score"
    flags = "--votes", lines, "--study", built, "--out", out
    assert evaluate("study", "report", *flags) == 0
    caught = capsys.readouterr()
    assert "the last line is cut off" in caught.err
    assert f"{MODELS[0]} over {MODELS[1]}" in caught.out
    record = score_of(out)
    assert record["metric"] == "study" and record["n"] == {"votes": 96, "raters": 8, "prompts": 12}
    assert record["gold"] == {"right": 8, "of": 8} and record["left_out"] == {}
    for name in study.QUESTIONS:
        of = record["questions"][name]
        assert of["order"] == list(MODELS) and of["votes"] == 48 and of["repeats"]["of"] == 8
        (pair,) = of["pairs"]
        assert pair["n"] == 48 == pair["wins_a"] + pair["wins_b"] + pair["ties"]
        assert pair["low"] < pair["rate"] < pair["high"] and pair["rate"] > 0.6
    with Image.open(out / "win_rates.png") as picture:
        assert picture.size[0] > 600
    # a file that names the models needs no study, and is the same to the digit
    named = [vars(vote) for vote in study.read_votes(lines, study.read_key(built))]
    flags = "--votes", write_rows(tmp_path / "named.jsonl", named), "--out", tmp_path / "again"
    assert evaluate("study", *flags) == 0
    assert score_of(tmp_path / "again") == record


GOOD = {"trial": "t", "rater": "r", "prompt": "p", "question": "q", "left": "A", "right": "B"}
GOOD["answer"] = "left"


@pytest.mark.parametrize(
    ("votes", "flags", "says"),
    [
        ([{**GOOD, "left": "nothing"}], ["--study", "STUDY"], "votes.jsonl:1: trial 't' is not of"),
        ([GOOD, {**GOOD, "answer": "up"}], [], "votes.jsonl:2: answer 'up': one of left, right"),
        ([{k: v for k, v in GOOD.items() if k != "rater"}], [], "needs 'rater'"),
        ([{"trial": "t", "rater": "r", "left": "x", "answer": "tie"}], [], "--study names"),
        ([{**GOOD, "right": "A"}], [], "left and right are both 'A'"),
        ([{**GOOD, "ms": "soon"}], [], "ms 'soon'"),
        ([[1], GOOD], [], "votes.jsonl:1 is not a JSON object"),
        ([], [], "holds no votes"),
        ([GOOD] * 3, ["--study", "FILE"], "holds no key.json"),
        ([GOOD, {**GOOD, "prompt": "other"}], [], "no strengths exist"),
        ([GOOD], ["--prior", "-1"], "prior and seed"),
    ],
)
def test_bad_votes_are_one_line_and_nothing_is_written(votes, flags, says, built, tmp_path, capsys):
    file = write_rows(tmp_path / "votes.jsonl", votes)
    flags = [f.replace("STUDY", str(built)).replace("FILE", str(tmp_path)) for f in flags]
    out = tmp_path / "out"
    argv = "study", "report", "--votes", file, "--out", out, *flags
    assert says in refused(capsys, *argv) and not out.exists()


def test_a_prior_gives_strengths_where_one_model_wins_every_vote(tmp_path, capsys):
    file = write_rows(tmp_path / "v", [{**GOOD, "prompt": f"p{n}", "trial": n} for n in range(9)])
    assert evaluate("study", "report", "--votes", file, "--prior", 0.5) == 0
    assert "A over B" in capsys.readouterr().out
    found = study_report.analyse(study.read_votes(file), prior=0.5)["questions"]["q"]
    assert found["strength"]["A"] == pytest.approx(np.log(9.5 / 0.5) / 2)
    (pair,) = found["pairs"]
    assert pair["rate"] == pytest.approx(pair["high"]) == 1 and 0.5 < pair["low"] < 0.8


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        (lambda b: (b / "0003_x.png").unlink(), [], "not hold images of the same names: 1 are"),
        (lambda b: write_png(b / "0003_x.png", np.zeros((9, 8, 3), "u1")), [], "differ in size"),
        (lambda b: (b / "0003_x.png").write_bytes(b"\x89PNG"), [], "0003_x.png"),
        (lambda b: None, ["--prompts", "FILE"], "1 prompts for 12 images"),
        (lambda b: None, ["--per-rater", "0"], "at least 1"),
        (lambda b: None, ["--questions", "beauty"], "beauty"),
    ],
)
def test_bad_folders_are_one_line_and_nothing_is_written(
    change, flags, says, folders, tmp_path, capsys
):
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    (tmp_path / "prompts.txt").write_text("one\n")
    change(tmp_path / MODELS[1])
    flags = [flag.replace("FILE", str(tmp_path / "prompts.txt")) for flag in flags]
    assert build(tmp_path, tmp_path / "out", *flags) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and says in err.splitlines()[-1]
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_prompts_come_from_names_where_images_have_none(tmp_path, capsys):
    for model in MODELS:
        names = [f"a cat no. {n}_{n:06d}.png" for n in range(3)]
        write_images(tmp_path / model, np.zeros((3, 8, 8, 3), "u1"), names=names)
    assert build(tmp_path, tmp_path / "out", "--questions", "alignment") == 0
    texts = {trial["text"] for trial in page_of(tmp_path / "out")["trials"].values()}
    assert texts == {"a cat no. 0", "a cat no. 1", "a cat no. 2"}
    for model in MODELS:
        write_images(tmp_path / "bare" / model, np.zeros((3, 8, 8, 3), "u1"))
    assert build(tmp_path / "bare", tmp_path / "other") == 2
    assert "do not say their prompts" in capsys.readouterr().err
