"""The page that `sbn-tf train` writes: is it better, calibrated, aware of its errors, and where is it worst?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sbn_tf.core.histograms import NUM_BINS
from sbn_tf.core.predictions import LABELS, SEGMENTATION
from sbn_tf.core.statistics import bin_index
from sbn_tf.datasets.base import Split
from sbn_tf.experiments import pages, scoring
from sbn_tf.experiments.experiment import Experiment
from sbn_tf.experiments.plots import plot_risk_coverage
from sbn_tf.experiments.plots.style import colours, plain, short_name
from sbn_tf.experiments.predictor import BATCH, Predictor
from sbn_tf.experiments.records import Record
from sbn_tf.experiments.rows import LEVEL, labelled, paired, rows
from sbn_tf.experiments.table import table
from sbn_tf.metrics import METRICS

# What a network is judged by: task -> keys.
JUDGED = {
    **dict.fromkeys(LABELS, ("auc", "accuracy", "nll", "brier", "ece")),
    SEGMENTATION: ("dice", "nll", "brier", "ece"),
}
USED = ("aurc", "excess_aurc", "error_auroc", "error_auroc_mi")
CONTROL = "deterministic_longer"
PLAIN = {"deterministic": "plain network", CONTROL: "plain network, the epochs of both steps"}
CASES = 6  # pictures of a kind
FEW = 30  # test images
TEMPERED = "ours, with its temperature"
LEGEND = (
    "The least certain by their entropy, the worst by the share of wrong labels.",
    "Truth and hits are green, false alarms blue, misses red. Uncertainty is the entropy of each pixel, from 0 (dark) "
    "to ln 2 nats (yellow).",
)


def write_training_page(
    path: str | os.PathLike, settings: Experiment, predictor: Predictor, frame: pd.DataFrame, method: str
) -> None:
    """Write the report of a training.

    Args:
        path: of the page.
        settings: the experiment, whose test images are predicted once more for the pictures.
        predictor: the network that was saved.
        frame: results of `method` and of whatever it is compared with; every row of it is.
        method: name of the network's method.

    Raises:
        ValueError: a frame without `method`.
        OSError: a full disk, or no permission.
    """
    frame, task = titled(frame, method), settings.task
    found = {row.label: row for row in rows(frame)}
    if (ours := label_of(frame, method)) is None:
        raise ValueError(f"Expected results of {method!r}. Received: {', '.join(frame['method'].unique())}")
    tests = against(frame, ours, JUDGED[task])
    records = {label: _record(found[label]) for label in dict.fromkeys((ours, label_of(frame, CONTROL) or ours))}
    record = records[ours]
    saved = record if predictor.card.temperature == 1 else saved_record(settings, predictor)
    split = settings.scored
    pages.write_page(
        path,
        "training.html",
        title=f"{settings.data.card.title}: what the trained network can do",
        verdict=verdict(frame, ours, tests),
        scored=_scored(settings),
        scores=_described(table(frame, JUDGED[task])),
        against=pages.rows_of(_as_table(tests), "ours minus"),
        use=_described(table(frame, USED)),
        reliability=pages.chart(_reliability(records | ({} if saved is record else {TEMPERED: saved}))),
        coverage=pages.chart(_coverage(records)),
        tempered="" if saved is record else _tempered(predictor.card.temperature, record, saved),
        unsure=_cases(settings, predictor, saved, "entropy"),
        worst=_cases(settings, predictor, saved, "risk"),
        legend=LEGEND[task == SEGMENTATION],
        patients=None if split.groups is None else pages.rows_of(by_patient(split, saved), "patient"),
        settings=pages.settings_table(_settings(settings, predictor, frame)),
    )


def _record(row):
    if (record := row.record(row.units[0])) is None:
        raise ValueError(f"Expected record.npz beside the result of {row.label!r}. Received: none. Train it again.")
    return record


def titled(frame: pd.DataFrame, method: str) -> pd.DataFrame:
    """The frame with a column `label`, in words; rows without a seed get that of `method`, to be compared with it.

    Where a method has several rows, these are called as in `rows.labelled`.
    """
    frame = labelled(frame)
    titles = dict(zip(frame["method"], frame["title"], strict=True)) | PLAIN | {method: f"ours ({method})"}
    seed = frame.loc[frame["method"] == method, "seed"].max()
    label = frame["label"].cat.rename_categories(lambda label: titles.get(label, label))
    return frame.assign(label=label, seed=frame["seed"].fillna(seed))


def label_of(frame: pd.DataFrame, method: str) -> str | None:
    """The label of a method's row; None where it has none."""
    found = frame.loc[frame["method"] == method, "label"]
    return str(found.iloc[0]) if len(found) else None


def against(frame: pd.DataFrame, ours: str, keys: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Metric -> ours minus each other row's: difference, low, high and outcome ("better", "worse" or ""), by label.

    Raises:
        ValueError: no row of that label.
    """
    made = {}
    resamples = int(frame["num_resamples"].max()) if frame["num_resamples"].notna().any() else 1000
    for key in keys:
        tests = paired(frame, ours, key, num_resamples=resamples).set_index("label")
        turned = pd.DataFrame(
            {"difference": -tests["difference"], "low": -tests["high"], "high": -tests["low"]}, index=tests.index
        )
        good = (turned["difference"] > 0) == METRICS[key].higher_is_better
        outcome = np.where(good, "better", "worse")
        made[key] = turned.assign(outcome=np.where(tests["p_adjusted"] < LEVEL, outcome, ""))
    return made


def _described(made):
    """A table for the template, the meaning of its columns below it."""
    notes = [f"{key}: {METRICS[key].meaning}." for key in made.columns if key in METRICS]
    made.attrs["notes"] = notes + made.attrs["notes"]
    return pages.rows_of(made, "method")


def _as_table(tests):
    """The outcomes as texts, a column for each metric."""
    columns = {}
    for key, test in tests.items():
        columns[key] = {
            label: "-"
            if np.isnan(one["difference"])
            else _signed(one["difference"])
            + ("" if np.isnan(one["low"]) else f" [{_signed(one['low'])}, {_signed(one['high'])}]")
            + (f" {one['outcome']}" if one["outcome"] else "")
            for label, one in test.iterrows()
        }
    return pd.DataFrame(columns)


def _signed(value):
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no -0.000


# ---- the verdict


def verdict(frame: pd.DataFrame, ours: str, tests: dict[str, pd.DataFrame]) -> dict:
    """What the tests say in plain words: `kind` ("better", "worse" or ""), `headline` and `sentences`.

    Args:
        frame: of `titled`.
        ours: label of the network's row.
        tests: of `against`.
    """
    found = {row.label: row for row in rows(frame)}
    control, trivial = label_of(frame, CONTROL), [row.label for row in found.values() if row.is_trivial]
    budgets = [label for label, row in found.items() if row.runs["method"].str.startswith("budget_").any()]
    # The training frequencies are calibrated, which is no merit.
    compared = {key: test.loc[trivial].dropna(subset=["difference"]) for key, test in tests.items() if key != "ece"}
    compared = {key: test for key, test in compared.items() if len(test)}
    useless = [key for key, test in compared.items() if (test["outcome"] != "better").any()]
    plain, turned = label_of(frame, "deterministic"), label_of(frame, "turned")
    rivals = [label for label in (control, plain, turned, *budgets) if label not in (None, ours)]
    sentences = [_sentence(found, ours, label, tests) for label in rivals]
    if compared:
        sentences.append(
            f"A predictor that ignores the image is as good, as far as these images show, in {', '.join(useless)}."
            if useless
            else f"It is better than every predictor that ignores the image in {', '.join(compared)}."
        )
    kind, headline = ("", "There is no plain network to compare it with.")
    if control is not None and control != ours:
        kind, headline = _headline({key: test.loc[control, "outcome"] for key, test in tests.items()})
        step_1 = "the plain network of step 1"
        for label, name in ((plain, step_1), (turned, f"{step_1} in eight flips and turns")):
            if label in (None, ours):
                continue
            outcomes = {key: test.loc[label, "outcome"] for key, test in tests.items() if label in test.index}
            if lost := [key for key, outcome in outcomes.items() if outcome == "worse"]:
                kind = "" if kind == "better" else "worse"
                headline += f" Worse than {name} in {', '.join(lost)}."
            elif label == turned and "better" not in outcomes.values():
                kind = "" if kind == "better" else kind
                headline += f" No difference can be seen from {name}."
    if "nll" in useless:
        kind, headline = "worse", "Do not use it: a predictor that ignores the image has as good probabilities."
    number = int(frame["num_test"].max())
    if number < FEW:
        sentences.append(
            f"{number} test images are few: only large differences can be seen, and all numbers are rough."
        )
    if leak := next((text for text in frame["leak"] if text), ""):
        sentences.append(f"Patients may be in two splits ({leak}): every score is then too good.")
    return {"kind": kind, "headline": headline, "sentences": sentences}


def _headline(outcomes):
    better, worse = ([key for key, one in outcomes.items() if one == kind] for kind in ("better", "worse"))
    rival = "a plain network trained for as many epochs"
    if better and worse:
        return "", f"Better than {rival} in {', '.join(better)}, worse in {', '.join(worse)}."
    if better:
        return "better", f"Better than {rival} in {', '.join(better)}; in the rest no difference can be seen."
    if worse:
        return "worse", f"Worse than {rival} in {', '.join(worse)}: use that one."
    return "", f"No better and no worse than {rival}, as far as these test images can show."


def _sentence(found, ours, label, tests):
    parts = []
    for key, test in tests.items():
        mine, its, one = found[ours].value(key), found[label].value(key), test.loc[label]
        if mine is None or its is None:
            continue
        parts.append(f"{key} {mine:.3f} against {its:.3f}, {one['outcome'] or 'no difference seen'}")
    return f"Against {label}: {'; '.join(parts)}."


# ---- numbers of the saved network


def saved_record(settings: Experiment, predictor: Predictor) -> Record:
    """The record of the test images as the saved network predicts them, with its temperature."""
    return scoring.score(
        predictor.samples,
        settings.scored,
        settings.task,
        batch_size=BATCH,
        train_prevalence=settings.prevalence(),
        threshold=predictor.card.threshold,
        boundary=False,
        verbose=False,
    )


def by_patient(split: Split, record: Record) -> pd.DataFrame:
    """Images, mean error and mean uncertainty of each patient, the highest error first."""
    content = {"images": 1, "error": record["risk"], "uncertainty": record["entropy"]}
    found = pd.DataFrame(content).groupby(np.asarray(split.groups).astype(str))
    made = found.agg({"images": "sum", "error": "mean", "uncertainty": "mean"})
    made = made.sort_values("error", ascending=False, kind="stable")
    shown = made.assign(**{key: made[key].map("{:.3f}".format) for key in ("error", "uncertainty")})
    shown.attrs["notes"] = [f"Error: {METRICS['risk'].meaning}. Uncertainty: entropy in nats. Means over the images."]
    return shown


def _tempered(temperature, record, saved):
    before, after = record.numbers(), saved.numbers()
    numbers = "; ".join(f"{key} {after[key]:.3f} instead of {before[key]:.3f}" for key in ("nll", "brier", "ece"))
    return (
        f"The saved network divides the logits of every draw by a temperature of {temperature:.3f}, which lowers the "
        f"NLL of the validation images. Of the test images it then has {numbers}. The tables above are without it; the "
        "pictures below, and what `sbn-tf predict` writes, are with it."
    )


# ---- charts


def _reliability(records):
    """Observed frequency against predicted probability, in the bins of `ece`."""
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], ":", color="black", linewidth=1)
    for (label, record), colour in zip(records.items(), colours(len(records)), strict=True):
        count, probs, truth = _bins(record)
        used = count > 0
        name = short_name(label, 44)
        name = f"{name}: ECE {record.numbers()['ece']:.3f}"
        ax.plot(probs[used] / count[used], truth[used] / count[used], "o-", color=colour, markersize=4, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="predicted probability", ylabel="observed frequency")
    figure.legend(loc="outside upper left", frameon=False, fontsize="small")
    plain(ax)
    return figure


def _bins(record):
    """Predictions, sum of probabilities and sum of truths in each of the 15 bins of equal width."""
    if record.task == SEGMENTATION:
        return record["calibration"].sum(0)
    probs, truth = record["mean_probs"].ravel(), record["targets"].ravel()
    index = bin_index(probs, NUM_BINS)
    return [np.bincount(index, weights, NUM_BINS) for weights in (None, probs, truth)]


def _coverage(records):
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    curves = {short_name(label, 30): (one["entropy"], one["risk"]) for label, one in records.items()}
    plot_risk_coverage(figure.subplots(), curves, oracle=False)
    return figure


# ---- pictures


def _cases(settings, predictor, record, key):
    """Pictures of the test images that have the most of a statistic, for the template."""
    chosen, risk = np.argsort(-record[key], kind="stable")[:CASES], record["risk"]
    split, card, made = settings.scored, predictor.card, []
    for row in chosen.tolist():
        (one,) = predictor.predict_batch(split.normalised(slice(row, row + 1)))
        pixels = np.asarray(split.images[row])
        pixels = pixels if pixels.dtype == np.uint8 else np.rint(255 * np.clip(pixels, 0, 1)).astype("uint8")
        tiles, means = [("image", pixels)], one.means
        parts = f"aleatoric {means['aleatoric']:.3f}, epistemic {means['epistemic']:.3f}"
        if card.task == SEGMENTATION:
            truth, mask = split.majority(slice(row, row + 1))[0, ..., 0] > 0, one.probabilities > card.threshold
            tiles += [("truth", pages.marked(pixels, truth)), ("prediction", pages.marked(pixels, mask, truth))]
            tiles += [("uncertainty", pages.heat(one.entropy()))]
            lines = [f"Dice {1 - risk[row]:.3f}"]
        else:
            truth = [label for label, true in zip(card.classes, split.targets[row], strict=True) if true]
            lines = [f"truth: {', '.join(truth) or 'none'}"]
            lines.append(f"predicted: {one.decision()} (confidence {one.confidence:.2f})")
        lines.append(f"uncertainty {means['total']:.3f} nats: {parts}")
        name = f"test image {row}" if split.ids is None else str(split.ids[row])
        tiles = [{"name": key, "source": pages.picture(value)} for key, value in tiles]
        made.append({"name": name, "tiles": tiles, "lines": lines})
    return made


# ---- settings


def _scored(settings):
    data, groups = settings.data, settings.scored.groups
    of = "" if groups is None else f" of {len(np.unique(groups))} patients"
    return (
        f"{settings.scored.num_examples} test images{of}, which training never saw; {data.train.num_examples} were "
        f"for training and {data.val.num_examples} for validation."
    )


def _settings(settings, predictor, frame):
    recipe = settings.recipe
    versions = json.loads(next((text for text in frame["versions"] if text), "{}"))
    commit = next((text for text in frame["commit"] if text), "")
    return [
        *pages.about(predictor),
        ("share of Bayesian weights", f"{settings.r_bayes:g}"),
        ("recipe", f"{recipe.name}: {recipe.epochs} and {recipe.bayes_epochs} epochs, batches of {recipe.batch_size}"),
        ("network", settings.network),
        ("seed", settings.seed),
        *versions.items(),
        *([("commit", commit)] if commit else []),
    ]
