"""The figures of the paper's table: from clips to embeddings, to scores with 95% intervals, to a table and a chart."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from evaluate_systems import read_clip, read_picture
from matplotlib.figure import Figure

from melfusion_pipeline import metrics

COLUMNS = {"FAD": "lower", "FAD-inf": "lower", "FD": "lower", "KL": "lower", "KAD": "lower", "CLAP": "higher"}
COLUMNS |= {"IMSM matched": "higher", "IMSM mismatched": "below matched"}
CLIPS_AT_ONCE = 256


def extract(
    used: dict[str, object], clips: Sequence[tuple], seconds: float, captions: Sequence[str], sampling_rate: int
) -> dict:
    """Reads clips (path, start) and gives all that is scored of them, arrays `[N, ...]`, with memory for a few."""
    parts = []
    for first in range(0, len(clips), CLIPS_AT_ONCE):
        batch = [
            read_clip(path, seconds, start, sampling_rate) for path, start in clips[first : first + CLIPS_AT_ONCE]
        ]
        audio = {"audio": torch.stack(batch).numpy(), "sampling_rate": sampling_rate}
        part = {"fad": used["fad"].embed(**audio)}
        if "classifier" in used:
            part["fd"], part["classes"] = used["classifier"].embed(**audio), used["classifier"].probabilities(**audio)
        if "clap" in used:
            part["clap"] = used["clap"].embed(**audio)
        if "clap" in used and "clip" in used:
            part["captions"] = used["clap"].probabilities(text=captions, **audio)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def describe_rows(
    used: dict[str, object], rows: Sequence[dict], seconds: float, captions: Sequence[str], sampling_rate: int
) -> dict:
    """What every system's clips are compared with: the real clips, the texts and the pictures of the rows."""
    audio_only = {name: used[name] for name in ("fad", "classifier") if name in used}
    clips = [(row["audio"], row["start"] or 0.0) for row in rows]
    target = extract(audio_only, clips, seconds, captions, sampling_rate)
    names, target["pictures"] = np.unique([row["image"] for row in rows], return_inverse=True)
    if "clap" in used:
        target["texts"] = used["clap"].embed(text=[row["caption"] for row in rows])
    if "clap" in used and "clip" in used:
        batches = [names[first : first + CLIPS_AT_ONCE] for first in range(0, len(names), CLIPS_AT_ONCE)]
        images = ([read_picture(name) for name in batch] for batch in batches)
        probabilities = [used["clip"].probabilities(images=batch, text=captions) for batch in images]
        target["captions"] = np.concatenate(probabilities)[target["pictures"]]
    return target


def score(found: dict, target: dict, seed: int) -> dict[str, metrics.Interval]:
    """All figures of one system for which there are extractors. Rows of one picture are kept together throughout."""
    rows, pictures = np.arange(len(target["pictures"])), target["pictures"]

    def jackknife(statistic: Callable) -> metrics.Interval:
        return metrics.jackknife_interval(statistic, rows, groups=[pictures], seed=seed)

    def distance(metric: Callable, name: str) -> metrics.Interval:
        # A clip and the real one of its row have the caption in common: rows are left out in pairs.
        return jackknife(lambda kept: metric(found[name][kept], target[name][kept]))

    def mean(values: np.ndarray) -> metrics.Interval:
        return metrics.bootstrap_interval(values, groups=pictures, seed=seed)

    scores = {"FAD": distance(metrics.frechet_distance, "fad")}
    scores["FAD-inf"] = distance(metrics.frechet_distance_infinity, "fad")
    if found["fad"].ndim == 2:
        scores["KAD"] = distance(metrics.kernel_audio_distance, "fad")
    if "fd" in found:
        scores["FD"] = distance(metrics.frechet_distance, "fd")
        scores["KL"] = mean(metrics.kl_divergence(found["classes"], target["classes"]))
    if "clap" in found:
        scores["CLAP"] = mean(metrics.clap_score(found["clap"], target["texts"]))
    if "captions" in found:
        similarity = metrics.imsm(target["captions"], found["captions"])
        scores["IMSM matched"] = mean(np.diagonal(similarity))
        scores["IMSM mismatched"] = jackknife(lambda kept: mismatched_mean(similarity, pictures, kept))
    return scores


def mismatched_mean(similarity: np.ndarray, pictures: np.ndarray, rows: np.ndarray) -> float:
    """Mean IMSM of clips with the pictures of other rows, leaving out rows that share the clip's own picture."""
    others = pictures[rows][:, None] != pictures[rows]
    return similarity[np.ix_(rows, rows)][others].mean()


def remarks(target: dict) -> dict[str, str]:
    """Says of a column what it needs to be filled, or what is wrong with it."""
    count, width = len(target["pictures"]), target["fad"].shape[-1]
    found = {}
    if count <= 2 * width:
        found["FAD-inf"] = (
            f"comes out too low: {count} clips are no more than twice the embedding's {width} dimensions"
        )
    if target["fad"].ndim == 3:
        found["KAD"] = "needs one embedding a clip, this extractor gives several"
    if "classes" not in target:
        found |= dict.fromkeys(("FD", "KL"), "needs --classifier")
    if "texts" not in target:
        found["CLAP"] = "needs --clap_model"
    if "captions" not in target:
        found |= dict.fromkeys(("IMSM matched", "IMSM mismatched"), "needs --clap_model and --clip_model")
    return found


def format_interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else "{:.4g} [{:.4g}, {:.4g}]".format(*interval)


def format_results(results: dict) -> str:
    """Formats `results.json` as Markdown: the table, then what its figures depend on."""
    lines = ["| system | n | Hz | " + " | ".join(f"{name} ({better})" for name, better in COLUMNS.items()) + " |"]
    lines.append("|---" * (3 + len(COLUMNS)) + "|")
    for name, system in results["systems"].items():
        cells = [format_interval(system["scores"].get(column)) for column in COLUMNS]
        lines.append("| " + " | ".join([name, str(system["n"]), str(system["sampling_rate"]), *cells]) + " |")
    lines += ["", *(f"- {name}: {value}" for name, value in results["settings"].items())]
    lines += [f"- {column}: {remark}" for column, remark in results["remarks"].items()]
    return "\n".join(lines) + "\n"


def draw_results(results: dict) -> bytes:
    """Draws every filled column as a panel with one point and its interval a system, and gives the PNG."""
    systems = results["systems"]
    columns = [column for column in COLUMNS if all(column in system["scores"] for system in systems.values())]
    height = -(-len(columns) // 4)
    figure = Figure(figsize=(13, height * (1.2 + 0.35 * len(systems))), layout="constrained")
    panels = figure.subplots(height, 4, sharey=True, squeeze=False)
    for panel, column in zip(panels.flat, columns):
        for position, system in enumerate(systems.values()):
            estimate, low, high = system["scores"][column]
            panel.plot([low, high], [position, position], color="C0")
            panel.plot(estimate, position, "o", color="C0")
        panel.set(title=f"{column} ({COLUMNS[column]})", yticks=range(len(systems)), yticklabels=systems)
        panel.locator_params(axis="x", nbins=4)
        panel.grid(alpha=0.3)
    panels[0, 0].invert_yaxis()
    for panel in panels.flat[len(columns) :]:
        panel.set_axis_off()
    settings = results["settings"]
    figure.suptitle(f"n = {settings['rows']}, 95% intervals; FAD, FAD-inf and KAD: {settings['FAD, FAD-inf, KAD']}")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
