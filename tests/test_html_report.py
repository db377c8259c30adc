"""The HTML report: well-formed, nothing from outside, strangers' text escaped, numbers, a real browser."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sharpcore import InvalidInput, cli
from sharpcore.calibration import calibrate_table
from sharpcore.localization import HeatMap
from sharpcore.report import sections
from sharpcore.report.html import TITLE, ReportParts, render, write_report
from sharpcore.report.page import Column, element, escape, table
from sharpcore.table import ScoreTable

SCRIPT = "<script>document.title = 'taken over'</script>"
STRANGE = [
    SCRIPT,
    "\"double\" and 'single' quotes & <b>tags</b> </table></section>",
    "\u202eשלום עולם, مرحبا بالعالم",
    "javascript:alert(1) &amp; &lt;",
    "zero\x00byte and \x1b[31mescape",
    "a-single-word-" * 40,
    "\U0001f600 " * 30,
]
METRICS = ("score_difference", "hessian_score_difference")


def table_of_scores():
    generator = np.random.default_rng(0)
    rows = []
    for number in range(40):
        memorized = number < 15
        prompt = (
            STRANGE[number - 15]
            if 15 <= number < 15 + len(STRANGE)
            else f"picture {number} of a {'Dog' * (number % 3)}"
        )
        for step in (0, 10):
            row = {"prompt": prompt, "memorized": memorized, "tier": number % 2 + 1 if memorized else None}
            row |= {"step": step, "timestep": 981.0 - 20 * step}
            failed = number == 30
            for metric in METRICS:
                seeds = (generator.normal(size=2) + 1.5 * memorized).tolist()
                numbers = [None] * 3 if failed else [float(np.mean(seeds)), 0.1, seeds]
                row |= dict(zip((metric, f"{metric}_se", f"{metric}_seeds"), numbers, strict=True))
            rows.append(row | {"error": f"row 31: {SCRIPT}" if failed else None})
    return ScoreTable(rows)


def run(*arguments):
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `sharpcore evaluate` writes."""
    path = tmp_path_factory.mktemp("evaluation")
    table_of_scores().to_jsonl(path / "scores.jsonl")
    run(
        "evaluate", "--from-scores", path / "scores.jsonl", "--out", path / "out", "--group-column", "tier",
        "--bootstrap", 20,
    )  # fmt: skip
    return path / "out"


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags that balance, attributes, and tables as lists of rows of (text, attributes)."""

    void = frozenset({"meta", "img"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.tables, self.texts = [], [], {}, []
        self._rows, self._cell = None, None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), f"<{tag}> has an attribute twice"
        self.elements.append((tag, found))
        if tag == "table":
            self._rows = self.tables[found["id"]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = ["", found]
            self._rows[-1].append(self._cell)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag not in self.void
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.texts.append(data)
        if self._cell is not None:
            self._cell[0] += data

    def of(self, *tags):
        return [(tag, attributes) for tag, attributes in self.elements if tag in tags]


def check_page(text):
    """What holds for every report."""
    assert text.startswith("<!DOCTYPE html>\n")
    page = Page(text.removeprefix("<!DOCTYPE html>\n"))
    (root,) = page.of("html")
    assert root[1]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.of("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "srcset", "data", "poster", "action", "xlink:href"):
                assert value.startswith("data:image/")
            if name == "href":
                assert value.startswith("#")
                assert value[1:] in ids
            if name in ("aria-labelledby", "aria-describedby"):
                assert value in ids
    assert not page.of("link", "iframe", "object", "embed", "base", "form")
    assert all(attributes.get("alt") for _, attributes in page.of("img"))
    assert all(attributes["scope"] in ("col", "row") for _, attributes in page.of("th"))
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.of("script")) == 1
    for rows in page.tables.values():
        assert len({len(row) for row in rows}) == 1
    return page


def test_well_formed_and_alone(text):
    page = check_page(text)
    assert len(page.of("img")) == 4
    assert {"evaluation", "groups", "pairs", "confounds", "duplicates", "failed", "scores"} <= set(
        page.tables
    )


def test_text_of_strangers_is_text(text):
    page = Page(text.removeprefix("<!DOCTYPE html>\n"))
    shown = {row[0][0]: row[0][1] for row in page.tables["scores"][1:]}
    for prompt in STRANGE:
        expected = prompt.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
        assert shown[expected]["dir"] == "auto"
    assert SCRIPT not in text
    assert escape(SCRIPT) in text
    assert page.tables["failed"][1][1][0] == f"row 31: {SCRIPT}"
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("<&>\"'", "&lt;&amp;&gt;&quot;&#x27;"),
        ("a\x00\ud800", "a\N{REPLACEMENT CHARACTER}?"),
        (None, ""),
        (1.5, "1.5"),
        (["<", element("b", "<")], "&lt;<b>&lt;</b>"),
    ],
)
def test_escaping(value, expected):
    assert escape(value) == expected


def test_attributes_are_escaped():
    assert element("p", title='"><script>', hidden=True, lang=None) == (
        '<p title="&quot;&gt;&lt;script&gt;" hidden></p>'
    )
    row = table("t", "c", [Column("a", "a", "prompt")], [['" onclick="x']])
    assert 'onclick="x' not in row.replace("&quot; onclick=&quot;x", "")


def cells_of(rows):
    """Rows as mappings from the column's key."""
    keys = [attributes["data-key"] for _, attributes in rows[0]]
    return [dict(zip(keys, row, strict=True)) for row in rows[1:]]


def shown(value, interval, form=".3f"):
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


def test_every_number_is_that_of_the_evaluation(folder, text):
    page = Page(text.removeprefix("<!DOCTYPE html>\n"))
    evaluation = json.loads((folder / "evaluation.json").read_bytes())
    rows = cells_of(page.tables["evaluation"]) + cells_of(page.tables["groups"])
    items = sorted(evaluation["evaluations"], key=lambda item: item["group"] is not None)
    assert len(rows) == len(items) == 12
    for row, item in zip(rows, items, strict=True):
        assert row["metric"][0] == item["metric"]
        assert row["step"][0] == str(item["step"])
        assert item["group"] is None or row["group"][0] == item["group"]
        exact = {"auc": item["auc"], "n_positive": item["n_positive"], "n_negative": item["n_negative"]}
        words = {
            "auc": shown(item["auc"], item["auc_interval"]),
            "delong_interval": "{:.3f} to {:.3f}".format(*item["delong_interval"]),
            "clusters": "{:.3f} to {:.3f}".format(*item["clusters"]["auc_interval"]),
            "n_positive": str(item["n_positive"]),
            "n_negative": str(item["n_negative"]),
            "n_errors": "1",
        }
        for point in item["operating_points"]:
            target = point["target_fpr"]
            words[f"tpr_{target}"] = shown(point["tpr"], point["interval"])
            words[f"fpr_{target}"] = f"{point['fpr']:.3f}"
            words[f"threshold_{target}"] = f"{point['threshold']:.4g}"
            exact |= {f"{name}_{target}": point[name] for name in ("tpr", "fpr", "threshold")}
        assert {key: row[key][0] for key in words} == words
        assert {key: float(row[key][1]["data-value"]) for key in exact} == exact
    pairs = cells_of(page.tables["pairs"])
    assert len(pairs) == len(evaluation["comparisons"]) == 2
    for row, item in zip(pairs, evaluation["comparisons"], strict=True):
        assert row["difference"][0] == shown(item["difference"], item["interval"], "+.3f")
        assert float(row["p_value"][1]["data-value"]) == item["p_value"]
    confounds = {row["name"][0]: row for row in cells_of(page.tables["confounds"])}
    for item in evaluation["confounds"]["features"]:
        assert float(confounds[sections.FEATURES[item["feature"]]]["auc"][1]["data-value"]) == item["auc"]
    assert float(confounds["score_difference@0"]["auc"][1]["data-value"]) == items[0]["auc"]


def test_prompts_are_those_of_the_table(folder, text):
    page = Page(text.removeprefix("<!DOCTYPE html>\n"))
    rows = cells_of(page.tables["scores"])
    at = {step: [row for row in table_of_scores() if row["step"] == step] for step in (0, 10)}
    assert len(rows) == 40
    for row, first, second in zip(rows, at[0], at[10], strict=True):
        assert row["memorized"][0] == ("yes" if first["memorized"] else "no")
        for step, origin in ((0, first), (10, second)):
            for metric in METRICS:
                found = row[f"{metric}@{step}"][1].get("data-value")
                assert (None if found is None else float(found)) == origin[metric]


def test_warnings_come_first(folder, text):
    page = Page(text.removeprefix("<!DOCTYPE html>\n"))
    assert [attributes["id"] for _, attributes in page.of("section")][:3] == ["warnings", "run", "results"]
    said = " ".join(page.texts)
    for warning in json.loads((folder / "evaluation.json").read_bytes())["warnings"]:
        assert warning[1:] in said
    for words in (
        "There are only 15 memorized prompts",
        "There are only 24 other prompts",
        "1 (8), 2 (7)",
        "With 24 other prompts a false positive rate of at most 1 % means none of them",
        "1 prompt could not be scored",
        "does not say with which model and settings",
    ):
        assert words in said


def test_an_evaluation_without_doubts(folder):
    parts = ReportParts.read(folder)
    clean = json.loads(json.dumps(parts.evaluation))
    clean |= {"warnings": [], "settings": {"model": "m 0123456789abcdef"}}
    for item in clean["evaluations"]:
        item |= {"n_positive": 500, "n_negative": 500, "n_errors": 0}
    page = check_page(render(ReportParts(clean)))
    assert any(words.startswith("None. Looked for") for words in page.texts)
    assert "The table of scores is not where it was when it was evaluated." in page.texts
    assert "m 0123456789abcdef" in page.texts


def test_the_same_folder_gives_the_same_file(folder, text, tmp_path):
    write_report(folder, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text
    run("report", folder, "-o", tmp_path / "command.html")
    assert (tmp_path / "command.html").read_text(encoding="utf-8") == text
    assert "sharpcore evaluate --out " in text


def heat_map(image=True):
    latent = torch.arange(16.0, dtype=torch.float64).reshape(4, 4)
    picture = torch.linspace(0, 1, 3 * 64).reshape(3, 8, 8)
    return HeatMap(latent, "score_difference", 3, 921.0, 0, 2, None, SCRIPT, 42, picture if image else None)


def test_heat_maps_are_read_as_they_were_saved(tmp_path):
    for part in (heat_map(), heat_map(image=False), HeatMap(torch.ones(2, 2).double(), "m", None, 1.0, 0, 8)):
        part.save(tmp_path / "map.npz")
        found = HeatMap.load(tmp_path / "map.npz")
        for name, value in vars(part).items():
            other = getattr(found, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    with pytest.raises(InvalidInput, match="there is no such file"):
        HeatMap.load(tmp_path / "missing.npz")
    (tmp_path / "other.npz").write_text("text")
    np.savez(tmp_path / "others.npz", a=np.ones(2))
    for name in ("other.npz", "others.npz"):
        with pytest.raises(InvalidInput, match="expected a heat map that `save` wrote"):
            HeatMap.load(tmp_path / name)


def test_calibration_maps_and_pictures(folder, tmp_path):
    negatives = ScoreTable([row for row in table_of_scores() if not row["memorized"]])
    calibration = calibrate_table(negatives, validation_share=0.25)
    calibration.save(tmp_path / "calibration.json")
    heat_map().save(tmp_path / "map.npz")
    heat_map().plot(tmp_path / "picture.png")
    run(
        "report", folder, "-o", tmp_path / "r.html", "--calibration", tmp_path / "calibration.json",
        "--heat-map", tmp_path / "map.npz", "--image", tmp_path / "picture.png", "--title", SCRIPT,
        "--date", "2026-03-01",
    )  # fmt: skip
    page = check_page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert len(page.of("img")) == 6
    assert "So nobody has checked that the calibration belongs to these scores." in page.texts
    assert page.texts.count("2026-03-01") == 1
    assert page.texts.count(SCRIPT) >= 3  # title twice, the prompt of the map
    rows = cells_of(page.tables["thresholds"])
    assert len(rows) == 8
    at = calibration.at("score_difference", 10)
    (row,) = [
        row
        for row in rows
        if (row["metric"][0], row["step"][0], row["fpr"][0]) == ("score_difference", "10", "3 %")
    ]
    assert row["threshold"][0] == "flags nothing"
    checked = at.validation(0.03)
    assert row["held_out"][0] == f"0 of {checked.count} (0.000 to {checked.interval[1]:.3f})"
    assert row["others"][0].startswith("0 of 24 ")
    p = [row["score_difference@10_p"][1].get("data-value") for row in cells_of(page.tables["scores"])]
    scores = [row["score_difference"] for row in table_of_scores() if row["step"] == 10]
    assert p == [None if score is None else repr(float(at.p_value(score))) for score in scores]
    tensor = ReportParts.read(folder, images=[("an image", torch.rand(3, 8, 8))])
    assert 'alt="an image" width="123"' in render(tensor)


def test_what_is_no_report(folder, tmp_path):
    with pytest.raises(InvalidInput, match="expected a folder of `sharpcore evaluate`"):
        ReportParts.read(tmp_path)
    for content, message in (("{", "not what `sharpcore evaluate` writes"), ("{}", "no evaluations")):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(InvalidInput, match=message):
            ReportParts.read(tmp_path)
    parts = ReportParts.read(folder)
    negatives = ScoreTable([row for row in table_of_scores() if not row["memorized"]])
    other = calibrate_table(negatives, settings={"model": "another"})
    given = dict(parts.evaluation) | {"settings": {"model": "m"}}
    with pytest.raises(InvalidInput, match="the calibration was made for another setting: model"):
        render(ReportParts(given, calibration=other))
    (tmp_path / "text.png").write_text("no picture")
    for source, message in (
        (tmp_path / "text.png", "expected a PNG or JPEG"),
        (tmp_path / "none.png", "there is no such file"),
        (torch.zeros(2, 2), r"expected files or tensors \[3, H, W\]"),
    ):
        with pytest.raises(InvalidInput, match=message):
            render(ReportParts(given, images=[("x", source)]))
    result = CliRunner().invoke(cli.app, ["report", str(folder), "-o", str(tmp_path / "no" / "r.html")])
    assert result.exit_code == 2
    assert "expected a file in a folder that exists" in result.stderr


def test_long_tables_are_cut_to_the_highest(folder, monkeypatch):
    monkeypatch.setattr(sections, "_MOST_CELLS", 80)
    page = check_page(render(ReportParts.read(folder)))
    rows = cells_of(page.tables["scores"])
    assert len(rows) == 80 // 8
    values = [float(row["score_difference@0"][1]["data-value"]) for row in rows]
    scores = [row["score_difference"] for row in table_of_scores() if row["step"] == 0]
    assert values == sorted((s for s in scores if s is not None), reverse=True)[:10]
    assert "10 of 40 prompts: those with the highest score_difference at step 0" in " ".join(page.texts)


# -- in a browser --------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (Debian: chromium)")

# A window has a least width, a frame has none. What is measured in the frame is told to the page around it.
FRAME = """<!DOCTYPE html><html lang="en"><head><title>frame</title><script>
onmessage = event => Object.assign(document.documentElement.dataset, event.data);
</script></head><body><iframe src="measured.html" width="{width}" height="1900"></iframe></body></html>"""
MEASURE = """<script>
const root = document.documentElement;
const images = [...document.images];
const outside = element => !element.closest(".scroll")
  && element.getBoundingClientRect().right > root.clientWidth + 1;
const facts = {
  images: images.length,
  broken: images.filter(image => !image.complete || image.naturalWidth === 0).length,
  client: root.clientWidth,
  scroll: root.scrollWidth,
  outside: [...document.querySelectorAll("main *")].filter(outside).length,
  buttons: document.querySelectorAll("thead button").length,
};
const rows = document.querySelector("#evaluation tbody").rows;
const values = () => [...rows].map(row => row.cells[2].dataset.value).join();
const button = document.querySelector('#evaluation th[data-key="auc"] button');
button.click();
facts.descending = values();
button.click();
facts.ascending = values();
parent.postMessage(facts, "*");
console.log("measured");
</script>"""


def browse(path, folder):
    """The DOM of a page after its scripts ran, what its console said, and a picture of it."""
    picture = folder / f"{path.stem}.png"
    result = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / path.stem}", "--enable-logging=stderr", "--window-size=1280,2000",
            "--hide-scrollbars", "--virtual-time-budget=2000", f"--screenshot={picture}", "--dump-dom",
            path.resolve().as_uri(),
        ],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in result.stderr.decode().splitlines() if ":CONSOLE" in line]
    return result.stdout.decode("utf-8"), console, picture


@pytest.fixture(scope="module")
def full(folder, tmp_path_factory):
    """A report with everything that there is."""
    path = tmp_path_factory.mktemp("full") / "report.html"
    negatives = ScoreTable([row for row in table_of_scores() if not row["memorized"]])
    parts = ReportParts.read(
        folder,
        calibration=calibrate_table(negatives),
        heat_maps=[heat_map(), heat_map(image=False)],
        images=[(SCRIPT, torch.rand(3, 8, 8))],
    )
    write_report(parts, path)
    return path


@in_a_browser
@pytest.mark.parametrize("width", [1200, 390])
def test_pictures_and_widths_in_a_browser(full, tmp_path, width):
    without_policy, count = re.subn(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", full.read_text(encoding="utf-8")
    )
    assert count == 1
    measured = without_policy.replace("</body>", f"{MEASURE}</body>")
    (tmp_path / "measured.html").write_text(measured, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    dom, console, picture = browse(tmp_path / "frame.html", tmp_path)
    assert len(console) == 1
    assert "measured" in console[0]
    ((_, facts),) = Page(dom.removeprefix("<!DOCTYPE html>")).of("html")
    assert (facts["data-images"], facts["data-broken"]) == ("7", "0")
    assert int(facts["data-client"]) == width
    assert int(facts["data-scroll"]) == width
    assert facts["data-outside"] == "0"
    assert int(facts["data-buttons"]) > 20
    ascending, descending = (
        [float(value) for value in facts[f"data-{order}"].split(",")] for order in ("ascending", "descending")
    )
    assert ascending == sorted(ascending) == descending[::-1]
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (1280, 2000)
        assert len(image.convert("RGB").getcolors(2**24)) > 20


@in_a_browser
def test_no_complaint_and_no_script_of_strangers(full, tmp_path):
    dom, console, _ = browse(full, tmp_path)
    assert console == []
    assert f"<title>{TITLE}</title>" in dom
    # Even if one got in.
    copy = tmp_path / "injected.html"
    copy.write_text(
        full.read_text(encoding="utf-8").replace(
            "<footer>", f"{SCRIPT}<img src='http://127.0.0.1:1/x'><footer>"
        ),
        encoding="utf-8",
    )
    dom, console, _ = browse(copy, tmp_path)
    assert f"<title>{TITLE}</title>" in dom
    assert sum("Content Security Policy" in line for line in console) >= 2
