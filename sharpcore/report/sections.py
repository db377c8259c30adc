"""The sections of the HTML report: what an evaluation found, in words, tables and pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpcore.errors import InvalidInput
from sharpcore.report.confounds import FEATURES
from sharpcore.report.labels import LabelledScores, Place
from sharpcore.report.page import (
    Cell,
    Column,
    Markup,
    Section,
    bullets,
    count_cell,
    element,
    facts,
    interval_bar,
    interval_cell,
    is_picture,
    number_cell,
    picture,
    table,
    value_cell,
)
from sharpcore.table import Row, ScoreTable

if TYPE_CHECKING:
    from sharpcore.calibration import Calibration
    from sharpcore.localization import HeatMap
    from sharpcore.report.html import ReportParts

#: Pictures of `sharpcore evaluate` and what they show.
FIGURES = {
    "roc": "ROC curves",
    "histogram": "Distributions of the scores",
    "auc_over_seeds": "AUC over the number of seeds that are averaged",
    "auc_over_steps": "AUC over the denoising steps",
}
#: With fewer prompts of a kind than this the report warns.
FEW = 30
# The table of prompts has at most so many cells: some megabytes.
_MOST_CELLS = 40_000
_LONGEST_PROMPT = 2000
# Smaller pictures than this many pixels are shown larger.
_LEAST_SIDE = 192


def warnings(parts: ReportParts) -> Section:
    """What makes the numbers less certain than they look, first of all."""
    said = [text[:1].upper() + text[1:] for text in parts.evaluation.get("warnings", ())] + _doubts(parts)
    if said:
        return Section("warnings", "Warnings", [bullets(said)], "warnings")
    nothing = (
        "None. Looked for: repeated prompts within and across the lists, common beginnings, features of the "
        f"text that separate the lists, fewer than {FEW} prompts of a kind, errors."
    )
    return Section("warnings", "Warnings", [element("p", nothing)])


def _doubts(parts: ReportParts) -> list[str]:
    """What makes the numbers less certain than they look."""
    evaluations = parts.evaluation["evaluations"]
    alone = [item for item in evaluations if item.get("group") is None]
    doubts = []
    if not parts.evaluation.get("settings"):
        doubts.append("The table does not say with which model and settings the scores were made.")
        if parts.calibration is not None:
            doubts.append("So nobody has checked that the calibration belongs to these scores.")
    # Numbers of prompts differ between metrics only where some were not measured.
    negatives = min(item["n_negative"] for item in alone)
    for count, name in ((min(item["n_positive"] for item in alone), "memorized"), (negatives, "other")):
        if count < FEW:
            doubts.append(f"There are only {_several(count, f'{name} prompt')}: the intervals are wide.")
    small = {item["group"]: item["n_positive"] for item in evaluations if item.get("group") is not None}
    small = {group: count for group, count in small.items() if count < FEW}
    if small:
        listed = ", ".join(f"{group} ({count})" for group, count in small.items())
        doubts.append(f"Groups have few memorized prompts, so that their intervals are wide: {listed}.")
    for target in dict.fromkeys(p["target_fpr"] for item in alone for p in item["operating_points"]):
        if target * negatives < 1:
            doubts.append(
                f"With {_several(negatives, 'other prompt')} a false positive rate of at most "
                f"{100 * target:g} % means none of them: its threshold is the highest of their scores alone."
            )
    errors = max(item["n_errors"] for item in alone)
    if errors:
        doubts.append(f"{_several(errors, 'prompt')} could not be scored: left out; see Errors.")
    for item in alone:
        if item.get("n_unmeasured"):
            doubts.append(
                f"{item['metric']} at step {item['step']}: {_several(item['n_unmeasured'], 'prompt')} "
                "without an error and without a score."
            )
    below = [f"{item['metric']}@{item['step']} ({item['auc']:.3f})" for item in alone if item["auc"] < 0.5]
    if below:
        doubts.append(
            f"An AUC below one half says that memorized prompts score lower, against what the detector was "
            f"made for: {', '.join(below)}."
        )
    return doubts


def what_was_run(evaluation: Mapping[str, Any]) -> Section:
    """Command, settings, versions, detectors."""
    settings = evaluation.get("settings") or {}
    made = evaluation.get("made_with") or {}
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    first = evaluation["evaluations"][0]
    command = evaluation.get("command")
    content = [
        element("pre", element("code", command)) if command else "",
        facts(
            [
                ("Model and hash of its files", settings.get("model")),
                ("Scored with sharpcore", settings.get("version")),
                ("Units", settings.get("units")),
                ("Seeds", _listed(settings.get("seeds"))),
                ("Steps", _steps(settings)),
                ("Guidance", settings.get("guidance")),
                ("Latent", " × ".join(map(str, settings.get("latent_size", ())))),
                ("Precision of network and products", _joined(settings, "dtype", "precision")),
                ("Backend", settings.get("backend")),
                ("Bootstrap samples, seed", f"{first['bootstrap']}, {first['seed']}"),
                ("Versions of the evaluation", versions),
                ("Machine of the evaluation", made.get("machine")),
            ]
        ),
    ]
    options = settings.get("options", {})
    if options:
        content.append(_detectors(settings))
    return Section("run", "What was run", content)


def _detectors(settings: Mapping[str, Any]) -> Markup:
    costs = settings.get("costs", {})
    names = list(dict.fromkeys(name for cost in costs.values() for name in cost))
    columns = [
        Column("name", "detector", "text"),
        Column("options", "options", "words"),
        *(Column(f"cost_{name}", name.replace("_", " ")) for name in names),
        Column("source", "source", "words"),
    ]
    rows = [
        [
            element("code", metric),
            ", ".join(f"{name}={value}" for name, value in options.items()),
            *(count_cell(costs.get(metric, {}).get(name)) for name in names),
            _source(metric),
        ]
        for metric, options in settings["options"].items()
    ]
    caption = (
        "Detectors, with the work of each alone for one prompt and seed: passes of the network (one branch "
        "each) and products with a Jacobian; the shared ones are done once for all prompts."
    )
    return table("detectors", caption, columns, rows)


def results(evaluations: Sequence[Mapping[str, Any]]) -> Section:
    """The evaluations, of all memorized prompts and by group."""
    alone = [item for item in evaluations if item.get("group") is None]
    grouped = [item for item in evaluations if item.get("group") is not None]
    content = [
        _evaluation_table(
            "evaluation",
            "Memorized prompts against all others. AUC with the interval of the bootstrap; 95 % intervals "
            "throughout.",
            alone,
        )
    ]
    if grouped:
        content += [
            element("h3", "By group"),
            _evaluation_table("groups", "The memorized prompts of each group against all others.", grouped),
        ]
    return Section("results", "Results", content)


def _evaluation_table(key: str, caption: str, evaluations: Sequence[Mapping[str, Any]]) -> Markup:
    targets = [point["target_fpr"] for point in evaluations[0]["operating_points"]]
    costs = list(dict.fromkeys(name for item in evaluations for name in item.get("cost", {})))
    clustered = any(item.get("clusters") for item in evaluations)
    columns = [
        Column("metric", "detector", "text"),
        Column("step", "step"),
        *([Column("group", "group", "text")] if any(item.get("group") for item in evaluations) else []),
        Column("auc", "AUC"),
        Column("delong_interval", "DeLong"),
        *([Column("clusters", "by clusters")] if clustered else []),
    ]
    percent = {target: f"{100 * target:g} %" for target in targets}
    columns += [Column(f"tpr_{target}", f"TPR at {percent[target]} FPR") for target in targets]
    columns += [
        Column("n_positive", "memorized"),
        Column("n_negative", "others"),
        Column("n_errors", "errors"),
        *(Column(f"cost_{name}", name.replace("_", " ")) for name in costs),
    ]
    for target in targets:
        columns += [
            Column(f"threshold_{target}", f"threshold at {percent[target]}"),
            Column(f"fpr_{target}", "FPR there"),
        ]
    rows = []
    for item in evaluations:
        row: list[Any] = [element("code", item["metric"] or "score"), count_cell(item["step"])]
        row += [item["group"]] if columns[2].key == "group" else []
        row += [value_cell(item["auc"], item["auc_interval"]), interval_cell(item.get("delong_interval"))]
        row += [interval_cell((item.get("clusters") or {}).get("auc_interval"))] if clustered else []
        points = {point["target_fpr"]: point for point in item["operating_points"]}
        row += [value_cell(points[target]["tpr"], points[target]["interval"]) for target in targets]
        row += [count_cell(item[name]) for name in ("n_positive", "n_negative", "n_errors")]
        row += [count_cell(item.get("cost", {}).get(name)) for name in costs]
        for target in targets:
            point = points[target]
            row += [number_cell(point["threshold"]), Cell(f"{point['fpr']:.3f}", point["fpr"])]
        rows.append(row)
    return table(key, caption, columns, rows)


def comparisons(comparisons: Sequence[Mapping[str, Any]]) -> Section | None:
    """Detectors against each other, on the same prompts."""
    if not comparisons:
        return None
    columns = [
        Column("first", "detector", "text"),
        Column("second", "compared with", "text"),
        Column("auc_first", "AUC"),
        Column("auc_second", "AUC of the other"),
        Column("difference", "difference"),
        Column("bootstrap_interval", "bootstrap"),
        Column("p_value", "p"),
        Column("p_adjusted", "p (Holm)"),
    ]
    rows = [
        [
            element("code", item["first"]),
            element("code", item["second"]),
            *(Cell(f"{item[name]:.3f}", item[name]) for name in ("auc_first", "auc_second")),
            value_cell(item["difference"], item["interval"], "+.3f"),
            interval_cell(item["bootstrap_interval"], "+.3f"),
            *(
                None if item[name] is None else Cell(f"{item[name]:.2g}", item[name])
                for name in ("p_value", "p_adjusted")
            ),
        ]
        for item in comparisons
    ]
    caption = (
        "Differences of AUC on the same prompts: DeLong's test, two-sided, and a bootstrap that draws the "
        "prompts for both jointly. Holm's p counts how many pairs were compared."
    )
    return Section("comparisons", "Paired comparisons", [table("pairs", caption, columns, rows)])


def text_alone(evaluation: Mapping[str, Any]) -> Section | None:
    """Detectors and features of the text side by side, and how the lists repeat themselves."""
    confounds = evaluation.get("confounds")
    if not confounds:
        return None
    found: list[tuple[Any, Any, str, float, Any]] = [
        (
            "text",
            FEATURES.get(item["feature"], item["feature"]),
            item["direction"],
            item["auc"],
            item["interval"],
        )
        for item in confounds["features"]
    ]
    if confounds["regression_auc"] is not None:
        found.append(
            (
                "text",
                "all of them (cross-validated regression)",
                "",
                confounds["regression_auc"],
                confounds["regression_interval"],
            )
        )
    found += [
        (
            "detector",
            element("code", f"{item['metric'] or 'score'}@{item['step']}"),
            "higher",
            item["auc"],
            item.get("delong_interval"),
        )
        for item in evaluation["evaluations"]
        if item.get("group") is None
    ]
    columns = [
        Column("name", "what", "text"),
        Column("kind", "kind", "text"),
        Column("direction", "memorized prompts have", "text"),
        Column("auc", "AUC"),
        Column("interval", "DeLong"),
        Column("bar", "from 0 to 1", "text"),
    ]
    rows = [
        [name, kind, direction, Cell(f"{auc:.3f}", auc), interval_cell(interval), interval_bar(auc, interval)]
        for kind, name, direction, auc, interval in sorted(found, key=lambda line: -line[3])
    ]
    caption = (
        "What the text of the prompts alone achieves, beside the detectors. A feature counts in its better "
        "direction, so that chance alone puts it a little above one half."
    )
    content = [table("confounds", caption, columns, rows, sortable=False)]
    if confounds.get("notes"):
        content.append(bullets(confounds["notes"]))
    lists = evaluation.get("duplicates")
    if lists:
        content += [element("h3", "Repeated prompts"), _duplicates(lists)]
    return Section("text", "What the text alone tells", content)


def _duplicates(lists: Mapping[str, Any]) -> Markup:
    columns = [
        Column("list", "list", "text"),
        Column("prompts", "prompts"),
        Column("distinct", "different"),
        Column("clusters", "clusters of near-duplicates"),
        Column("effective_clusters", "effective number of clusters"),
    ]
    rows = [
        [
            title,
            *(count_cell(lists[name][key]) for key in ("prompts", "distinct", "clusters")),
            Cell(f"{lists[name]['effective_clusters']:.1f}", lists[name]["effective_clusters"]),
        ]
        for name, title in (("memorized", "memorized"), ("others", "others"))
    ]
    caption = (
        f"{len(lists['shared'])} pairs of prompts are in both lists, {len(lists['shared_near'])} pairs are "
        "near-duplicates across them."
    )
    return table("duplicates", caption, columns, rows, sortable=False)


def curves(parts: ReportParts) -> Section | None:
    """The pictures of the evaluation."""
    alone = [item for item in parts.evaluation["evaluations"] if item.get("group") is None]
    aucs = "; ".join(f"{item['metric']} at step {item['step']} {item['auc']:.3f}" for item in alone)
    said = {
        "roc": f"Areas under the curves: {aucs}.",
        "histogram": f"Memorized prompts ({alone[0]['n_positive']}) and others ({alone[0]['n_negative']}), "
        "with the thresholds of the table of results.",
        "auc_over_steps": f"The values are: {aucs}.",
        "auc_over_seeds": "The values are in the table below.",
    }
    content: list[Markup] = []
    for name, title in FIGURES.items():
        if name in parts.figures:
            alt = f"{title}. {said[name]}"
            content += [element("h3", title), picture(parts.figures[name], alt, name=title)]
    over_seeds = parts.evaluation.get("auc_over_seeds", ())
    if any(row["n_seeds"] > 1 for row in over_seeds):
        columns = [
            Column("metric", "detector", "text"),
            Column("step", "step"),
            Column("n_seeds", "seeds averaged"),
            Column("auc", "AUC"),
            Column("interval", "DeLong"),
        ]
        rows = [
            [
                element("code", row["metric"]),
                count_cell(row["step"]),
                count_cell(row["n_seeds"]),
                Cell(f"{row['auc']:.3f}", row["auc"]),
                interval_cell(None if row["auc_low"] is None else (row["auc_low"], row["auc_high"])),
            ]
            for row in over_seeds
        ]
        content.append(
            element(
                "details",
                element("summary", "AUC over the number of seeds, in numbers"),
                table("seeds", "AUC of the mean over the first seeds.", columns, rows),
            )
        )
    return Section("curves", "Curves", content) if content else None


def thresholds(calibration: Calibration | None, labelled: LabelledScores | None) -> Section | None:
    """A calibration, and how often its thresholds flag here."""
    if calibration is None:
        return None
    from sharpcore.calibration import DEFAULT_FPRS

    columns = [
        Column("metric", "detector", "text"),
        Column("step", "step"),
        Column("count", "negatives"),
        Column("fpr", "FPR at most"),
        Column("threshold", "threshold"),
        Column("bound", "FPR in 95 % of calibrations, at most"),
        Column("held_out", "flagged of those held out"),
        Column("others", "flagged of the others here"),
        Column("memorized", "flagged of the memorized here"),
    ]
    rows = []
    for place, negatives in calibration.negatives.items():
        for rate in DEFAULT_FPRS:
            threshold, checked = negatives.threshold(rate), negatives.validation(rate)
            here = _flagged(negatives, rate, labelled, place)
            rows.append(
                [
                    element("code", place[0] or "score"),
                    count_cell(place[1]),
                    count_cell(len(negatives.scores)),
                    Cell(f"{100 * rate:g} %", rate),
                    "flags nothing" if threshold is None else Cell(f"{threshold:.6g}", threshold),
                    Cell(f"{negatives.bound(rate):.3f}", negatives.bound(rate)),
                    _share((checked.flagged, checked.count)) if checked else None,
                    *(None if counts is None else _share(counts) for counts in here),
                ]
            )
    caption = (
        "Thresholds that were calibrated on prompts that are not memorized, and how often they flag; in "
        "brackets the exact 95 % intervals (Clopper and Pearson)."
    )
    limits = (
        "The rates hold for prompts like those of the calibration that were not used for it; among the "
        "others here there may be some that were."
    )
    made = facts(
        [
            ("Made with sharpcore", calibration.version),
            ("Checksum", calibration.checksum),
            ("Share held out, seed", f"{calibration.validation_share:g}, {calibration.seed}"),
        ]
    )
    content = [element("p", limits), table("thresholds", caption, columns, rows), made]
    return Section("calibration", "Calibration", content)


def heat_maps(maps: Sequence[HeatMap]) -> Section | None:
    """Where in pictures the prompts are memorized."""
    if not maps:
        return None
    found = []
    for part in maps:
        step = "" if part.step is None else f" at step {part.step}"
        seed = "" if part.seed is None else f", seed {part.seed}"
        covered = 100 * float(part.mask().double().mean())
        with_image = "the picture, and over it " if part.image is not None else ""
        found.append(
            picture(
                _png_of(part),
                f"Heat map of {part.metric}{step}{seed}: {with_image}where the prompt is memorized; the mask "
                f"covers {covered:.0f} % of it.",
                [element("code", part.metric), f"{step}{seed}; the mask covers {covered:.0f} %"],
                prompt=None if part.prompt is None else _cut(part.prompt),
            )
        )
    legend = "Bright is memorized; the white line is the outline of the mask (Otsu's threshold)."
    content = [element("p", legend), element("div", *found, class_="gallery")]
    return Section("maps", "Where the prompts are memorized", content)


def images(images: Sequence[tuple[str, Any]]) -> Section | None:
    """Pictures that were given."""
    if not images:
        return None
    found = [picture(_picture_bytes(source), str(caption), caption) for caption, source in images]
    return Section("images", "Images", [element("div", *found, class_="gallery")])


def errors(scores: ScoreTable | None) -> Section | None:
    """Prompts without a score, and why."""
    failed = {} if scores is None else {(row.get("prompt"), row["error"]): row for row in _failed(scores)}
    if not failed:
        return None
    columns = [Column("prompt", "prompt", "prompt"), Column("error", "error", "prompt")]
    rows = [[_cut(prompt), error] for prompt, error in failed]
    caption = f"{_several(len(rows), 'prompt')} without a score, left out of everything above."
    return Section("errors", "Errors", [table("failed", caption, columns, rows)])


def prompts(parts: ReportParts, labelled: LabelledScores | None) -> Section:
    """Every prompt with its scores."""
    if labelled is None or parts.scores is None:
        missing = element("p", "The table of scores is not where it was when it was evaluated.")
        return Section("prompts", "Prompts", [missing])
    group = (parts.evaluation.get("labels") or {}).get("group_column")
    places = [place for place in labelled.scores if any(s is not None for s in labelled.scores[place])]
    p_values = _p_values(parts, labelled, places)
    columns = [
        Column("prompt", "prompt", "prompt"),
        Column("number", "number"),
        Column("memorized", "memorized", "text"),
        *([Column("group", str(group), "text")] if group else []),
    ]
    for metric, step in places:
        columns.append(Column(f"{metric}@{step}", f"{metric.replace('_', ' ')}, step {step}"))
        if (metric, step) in p_values:
            columns.append(Column(f"{metric}@{step}_p", "p"))
    shown = _rows_shown(labelled, places, len(columns))
    rows = []
    for index in shown:
        origin = labelled.columns[index]
        row = [_cut(origin.get("prompt")), count_cell(index + 1), "yes" if labelled.positive[index] else "no"]
        row += [origin.get(group)] if group else []
        for place in places:
            row.append(number_cell(labelled.scores[place][index]))
            if place in p_values:
                row.append(number_cell(p_values[place][index], ".2g"))
        rows.append(row)
    count = len(labelled.columns)
    caption = f"All {count} prompts, in the order of the table; scores are means over the seeds."
    if len(shown) < count:
        caption = (
            f"{len(shown)} of {count} prompts: those with the highest {places[0][0]} at step {places[0][1]}. "
            "All of them are in the table of scores."
        )
    return Section("prompts", "Prompts", [table("scores", caption, columns, rows)])


def _share(counts: tuple[int, int]) -> Cell:
    """k of n, and the exact interval of the proportion."""
    from sharpcore.calibration import clopper_pearson

    flagged, count = counts
    low, high = clopper_pearson(flagged, count)
    return Cell([f"{flagged} of {count} ", element("small", f"({low:.3f} to {high:.3f})")], flagged / count)


def _flagged(
    negatives: Any, rate: float, labelled: LabelledScores | None, place: Any
) -> list[tuple[int, int] | None]:
    """How many of the others and of the memorized prompts are flagged, and of how many."""
    if labelled is None or place not in labelled.scores:
        return [None, None]
    sides = []
    for side in (~labelled.positive, labelled.positive):
        scores = [
            s for s, member in zip(labelled.scores[place], side, strict=True) if member and s is not None
        ]
        flagged = int((negatives.p_value(scores) <= rate).sum()) if scores else 0
        sides.append((flagged, len(scores)) if scores else None)
    return sides


def _p_values(
    parts: ReportParts, labelled: LabelledScores, places: Sequence[Place]
) -> dict[Place, list[float | None]]:
    """The conformal p-value of each prompt, [n], where there is a calibration."""
    calibration = parts.calibration
    if calibration is None:
        return {}
    return {
        place: [
            None if score is None else float(calibration.p_value(score, *place))
            for score in labelled.scores[place]
        ]
        for place in places
        if place in calibration.negatives
    }


def _rows_shown(labelled: LabelledScores, places: Sequence[Place], columns: int) -> list[int]:
    """The prompts of the table: all, or the highest of the first score where that would be too many."""
    count, most = len(labelled.columns), max(1, _MOST_CELLS // columns)
    if count <= most or not places:
        return list(range(min(count, most)))
    first = [-math.inf if score is None else score for score in labelled.scores[places[0]]]
    return sorted(range(count), key=lambda index: -first[index])[:most]


def _failed(scores: ScoreTable) -> Iterable[Row]:
    return (row for row in scores if row.get("error") is not None)


def _several(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _listed(values: Any) -> str | None:
    return None if values is None else ", ".join(map(str, values))


def _joined(settings: Mapping[str, Any], *names: str) -> str:
    return ", ".join(str(settings[name]) for name in names if name in settings)


def _steps(settings: Mapping[str, Any]) -> str | None:
    steps = _listed(settings.get("steps"))
    return steps and f"{steps} of {settings.get('num_inference_steps')}"


def _source(metric: str) -> str | None:
    from sharpcore.detect import find_detector

    try:
        return find_detector(metric).source
    except InvalidInput:  # of a package that is not installed here
        return None


def _cut(prompt: str | None) -> str | None:
    if prompt is None or len(prompt) <= _LONGEST_PROMPT:
        return prompt
    return f"{prompt[:_LONGEST_PROMPT]}… ({len(prompt) - _LONGEST_PROMPT} more characters)"


def _png_of(part: HeatMap) -> bytes:
    buffer = io.BytesIO()
    # The prompt is text of the page.
    replace(part, prompt=None).plot().savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _picture_bytes(source: Any) -> bytes:
    """A PNG or JPEG: the contents of a file, or a tensor [3, H, W] in 0 to 1."""
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise InvalidInput(f"{path}: there is no such file")
        content = path.read_bytes()
        if not is_picture(content):
            raise InvalidInput(f"{path}: expected a PNG or JPEG picture")
        return content
    shape = tuple(getattr(source, "shape", ()))
    if len(shape) != 3 or shape[0] != 3:
        raise InvalidInput(
            f"images: expected files or tensors [3, H, W]; got {type(source).__name__} {shape}"
        )
    from PIL import Image

    pixels = (source.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    image, scale = Image.fromarray(pixels), math.ceil(_LEAST_SIDE / min(shape[1:]))
    if scale > 1:
        image = image.resize((shape[2] * scale, shape[1] * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
