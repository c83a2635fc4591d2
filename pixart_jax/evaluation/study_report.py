"""``python -m pixart_jax evaluate study report``: the statistics of a study, by its votes alone.

Votes of one rater, and those on one prompt, are not independent. A variance is therefore that of
two clusterings (Cameron, Gelbach, Miller 2011): bootstrap over prompts, plus bootstrap over raters,
minus bootstrap over votes, whose part is in both; at least the largest of the three.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pixart_jax import plots
from pixart_jax.errors import UserError
from pixart_jax.evaluation import report
from pixart_jax.evaluation.shapes_score import wilson
from pixart_jax.evaluation.study import Vote, read_key, read_votes

ROUNDS = 500  # of each bootstrap
GOLD_LEAST = 0.5  # a rater with a smaller share of the gold trials right is left out


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Win rates, Bradley–Terry strengths, agreement and biases of a study's votes."""

    votes: Path
    """JSON lines: as `study serve` writes them, or, with --study, as raters' pages save them"""
    out: Path | None = None
    """folder for score.json and win_rates.png"""
    study: Path | None = None
    """the study's folder, whose key.json tells the models of a page's images"""
    prior: float = 0.0
    """wins added to each side of each pair, such as 0.5; needed where a model wins every vote"""
    seed: int = 0
    """of the bootstrap"""

    def __post_init__(self):
        if not 0 <= self.prior < float("inf") or self.seed < 0:
            raise UserError("prior and seed: at least 0")


def report_votes(options: ReportOptions) -> None:
    key = read_key(options.study) if options.study else None
    found = analyse(read_votes(options.votes, key), prior=options.prior, seed=options.seed)
    print(table(found))
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    panels: dict[str, dict[str, tuple[float, float, float]]] = {
        question: {f"{p['a']} over {p['b']}": (p["rate"], p["low"], p["high"]) for p in of["pairs"]}
        for question, of in found["questions"].items()
    }
    first: dict[str, Any] = next(iter(found["questions"].values()))["pairs"][0]
    head = {"value": first["rate"], "interval": [first["low"], first["high"]]}
    n = {name: found[name] for name in ("votes", "raters", "prompts")}
    path = options.out / "win_rates.png"
    title = f"win rates, ties as halves, 95% · {found['raters']} raters, {found['prompts']} prompts"
    chart = plots.intervals(path, panels, title=title, mark=0.5)
    report.finish(options.out, "study", head, n, found, written=[chart])


def analyse(votes: Sequence[Vote], *, prior: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """For each question: the models' order, Bradley–Terry strengths (log, mean 0) and win rates of
    pairs, with 95% intervals; agreement, self-consistency, position bias.

    Ties count half a win for each side. prior: wins added to each side of each pair; without it a
    UserError where a group of models has won all votes against the others, for which no strengths
    exist. Raters who fail the gold trials are left out.
    """
    gold = collections.defaultdict(list)
    for vote in votes:
        if vote.kind == "gold":
            gold[vote.rater].append(vote.answer == vote.expected)
    left_out = {r: [sum(a), len(a)] for r, a in gold.items() if sum(a) < GOLD_LEAST * len(a)}
    kept = [vote for vote in votes if vote.rater not in left_out]
    plain = [vote for vote in kept if not vote.kind]
    if not plain:
        raise UserError(
            "no votes are left: all raters failed the gold trials, or voted on no others"
        )
    questions = {}
    for question in sorted({vote.question for vote in plain}):
        asked = [vote for vote in kept if vote.question == question]
        try:
            questions[question] = _question(asked, prior, np.random.default_rng(seed))
        except UserError as error:
            raise UserError(f"question {question!r}: {error}") from None
    return {
        "votes": len(plain),
        "raters": len({vote.rater for vote in plain}),
        "prompts": len({vote.prompt for vote in plain}),
        "gold": {"right": sum(map(sum, gold.values())), "of": sum(map(len, gold.values()))},
        "left_out": left_out,
        "prior": prior,
        "questions": questions,
    }


def _question(asked: Sequence[Vote], prior: float, rng: np.random.Generator) -> dict[str, Any]:
    votes = [vote for vote in asked if not vote.kind]
    models = sorted({model for vote in votes for model in (vote.left, vote.right)})
    number = {model: k for k, model in enumerate(models)}
    k, rows = len(models), np.arange(len(votes))
    sides = np.array([[number[vote.left], number[vote.right]] for vote in votes])
    won = np.array([{"left": 1.0, "right": 0.0}.get(vote.answer, 0.5) for vote in votes])
    gains = np.zeros((len(votes), k, k))  # [v, i, j]: what i won against j
    gains[rows, sides[:, 0], sides[:, 1]] = won
    gains[rows, sides[:, 1], sides[:, 0]] = 1 - won
    count = gains.sum(0)
    compared = (1 - np.eye(k)) * (count + count.T > 0)
    wins = count + prior * compared
    if not connected(wins):
        best = models[int(np.argmax(count.sum(1) / (count + count.T).sum(1)))]
        raise UserError(
            "no strengths exist: some models won every vote against the others, or were not "
            f"compared with them (highest win rate: {best!r}); take more votes, or --prior 0.5"
        )
    strength = bradley_terry(wins)

    # the same over resampled prompts, raters and votes: [rounds, clusters] → [rounds, k, k] wins
    variances: list[tuple[np.ndarray, np.ndarray]] = []
    columns = gains.reshape(-1, k * k).T
    kinds = [f"{a} {b} {gain}" for (a, b), gain in zip(sides, won)]  # of votes that are alike
    for names in ([v.prompt for v in votes], [v.rater for v in votes], kinds):
        labels, sizes = np.unique(names, return_inverse=True, return_counts=True)[1:]
        sums = np.stack([np.bincount(labels, column) for column in columns], 1)
        groups, chances = len(sizes), np.full(len(sizes), 1 / len(sizes))
        if names is kinds:
            groups, chances, sums = len(votes), sizes / len(votes), sums / sizes[:, None]
        drawn = (rng.multinomial(groups, chances, ROUNDS) @ sums).reshape(-1, k, k)
        with np.errstate(invalid="ignore"):
            rates = np.ma.masked_invalid(drawn / (drawn + np.swapaxes(drawn, 1, 2)))
        drawn = drawn + prior * compared
        # half a win a side makes strengths finite where a resample has none
        drawn = drawn + 0.5 * ~connected(drawn)[:, None, None] * compared
        scale = groups / max(groups - 1, 1)
        variances.append((scale * rates.var(0).filled(0), scale * bradley_terry(drawn).var(0)))
    rate_var, strength_var = (
        np.maximum(a + b - c, np.max([a, b, c], 0)) for a, b, c in zip(*variances)
    )
    clusters = [len({v.prompt for v in votes}), len({v.rater for v in votes})]
    z = float(stats.t.ppf(0.975, max(1, min([c for c in clusters if c > 1], default=2) - 1)))
    order = sorted(range(k), key=lambda i: -strength[i])
    reach = z * np.sqrt(strength_var)
    lowest, highest = strength - reach, strength + reach

    pairs = []
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            if not (n := int(round(count[i, j] + count[j, i]))):
                continue
            decided = [v for v in votes if {number[v.left], number[v.right]} == {i, j}]
            wins_a, wins_b = (sum(v.choice == models[m] for v in decided) for m in (i, j))
            rate = count[i, j] / n
            spread = rate_var[i, j]
            effective = rate * (1 - rate) / spread if spread > 0 and 0 < rate < 1 else n
            low, high = wilson(rate * effective, effective, z)
            pair = {"a": models[i], "b": models[j], "n": n, "wins_a": wins_a, "wins_b": wins_b}
            pair |= {"ties": n - wins_a - wins_b, "rate": rate, "low": low, "high": high}
            pair |= {"difference": (wins_a - wins_b) / n}
            pairs.append(pair | {"ratio": wins_a / wins_b if wins_b else None})
    sided = [vote.answer for vote in votes if vote.answer in ("left", "right")]
    left = sided.count("left")
    same, repeats = _repeats(asked)
    times = [vote.ms for vote in votes if vote.ms is not None]
    return {
        "votes": len(votes),
        "order": [models[i] for i in order],
        "strength": {models[i]: float(strength[i]) for i in order},
        "interval": {models[i]: [float(lowest[i]), float(highest[i])] for i in order},
        "pairs": pairs,
        "alpha": krippendorff([(vote.trial, vote.choice) for vote in votes]),
        "repeats": {"same": same, "of": repeats},
        "left_share": left / len(sided) if sided else None,
        "left_p": float(stats.binomtest(left, len(sided)).pvalue) if sided else None,
        "median_ms": float(np.median(times)) if times else None,
    }


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Log strengths of mean 0 that make the wins most likely: [..., k, k] → [..., k], by Newman's
    iteration (2023), from wins of row over column whose graph is strongly connected."""
    p = np.ones(wins.shape[:-1])
    for _ in range(10_000):
        before = p.copy()
        for i in range(p.shape[-1]):  # one after the other: all at once may oscillate
            both = p[..., i, None] + p
            lost = (wins[..., :, i] / both).sum(-1)
            p[..., i] = (wins[..., i, :] * p / both).sum(-1) / lost
        p /= np.exp(np.log(p).mean(-1, keepdims=True))
        if np.abs(np.log(p / before)).max() < 1e-9:
            break
    return np.log(p)


def connected(wins: np.ndarray) -> np.ndarray:
    """Whether from each of the k models a chain of wins leads to each other one: [..., k, k] →
    [...]. Strengths exist only then (Ford 1957)."""
    k = wins.shape[-1]
    step = ((wins > 0) | np.eye(k, dtype=bool)).astype(float)
    return (np.linalg.matrix_power(step / k, k) > 0).all((-2, -1))


def krippendorff(values: Sequence[tuple[str, str]]) -> float | None:
    """Krippendorff's α of nominal values, (unit, value) of any number of raters; None where no unit
    has two, or all values are equal."""
    units, names = ([pair[i] for pair in values] for i in (0, 1))
    rows, columns = (np.unique(of, return_inverse=True)[1] for of in (units, names))
    counts = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(counts, (rows, columns), 1)
    counts = counts[counts.sum(1) > 1]
    each, total = counts.sum(1, keepdims=True), counts.sum()
    if not total:
        return None
    seen = (counts * (counts - 1) / (each - 1)).sum() / total
    chance = (counts.sum(0) * (counts.sum(0) - 1)).sum() / (total * (total - 1))
    return float(1 - (1 - seen) / (1 - chance)) if chance < 1 else None


def _repeats(votes: Sequence[Vote]) -> tuple[int, int]:
    """Of repeats with exchanged sides: (answered as the first time, all)."""

    def shown(vote: Vote) -> tuple:
        return vote.rater, vote.prompt, frozenset((vote.left, vote.right))

    first = {shown(vote): vote.choice for vote in votes if not vote.kind}
    pairs = [(first.get(shown(vote)), vote.choice) for vote in votes if vote.kind == "mirror"]
    known = [a == b for a, b in pairs if a is not None]
    return sum(known), len(known)


def table(found: Mapping[str, Any]) -> str:
    """The figures for people."""
    gold, out = found["gold"], found["left_out"]
    lines = [f"{found['votes']} votes of {found['raters']} raters on {found['prompts']} prompts"]
    if gold["of"]:
        lines[0] += f" · gold trials: {gold['right']} of {gold['of']} right"
        lines[0] += f" · left out: {', '.join(out) or 'nobody'}"

    def shown(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    for question, of in found["questions"].items():
        same, repeats = of["repeats"].values()
        share = f"{same / repeats:.2f} (of {repeats})" if repeats else "–"
        head = f"{question}: {of['votes']} votes · α {shown(of['alpha'])} · repeats alike {share}"
        head += f" · left chosen {shown(of['left_share'])} (p {shown(of['left_p'], '.3f')})"
        lines += ["", head, "", f"{'model':40} {'strength':>8}   {'95% interval':^15}"]
        for model, strength in of["strength"].items():
            low, high = of["interval"][model]
            lines.append(f"{model:40} {strength:8.2f}   {low:6.2f} – {high:6.2f}")
        head = f"{'pair':40} {'win rate':>8}   {'95% interval':^15} {'n':>6} {'wins':>11} ties"
        lines += ["", head]
        for p in of["pairs"]:
            wins = f"{p['wins_a']} : {p['wins_b']}"
            lines.append(
                f"{p['a'] + ' over ' + p['b']:40} {p['rate']:8.3f}    {p['low']:5.3f} – "
                f"{p['high']:5.3f}  {p['n']:6} {wins:>11} {p['ties']:4}"
            )
    return "\n".join(lines)
