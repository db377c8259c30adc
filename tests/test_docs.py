"""The documentation of the detectors against the code, and every block of the tutorial as it stands."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from evidence_of import evidence_of
from typer.testing import CliRunner

from sharpcore import cli
from sharpcore.detect import DETECTORS, Cost, compute_detectors, cost_of, make_detectors

DOCS = Path(__file__).parents[1] / "docs"
DETECTORS_PAGE = (DOCS / "detectors.md").read_text(encoding="utf-8")
TUTORIAL = (DOCS / "tutorial.md").read_text(encoding="utf-8")
COST = re.compile(
    r"- Cost: (?P<passes>\d+) pass(?:es)? \((?P<shared_passes>\d+) shared\), "
    r"(?P<products>\d+) products \((?P<shared_products>\d+) shared\)"
)


def sections():
    parts = re.split(r"^## (.*)$", DETECTORS_PAGE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_every_detector_has_its_section():
    assert [name for name in sections() if name in DETECTORS] == list(DETECTORS)


@pytest.mark.parametrize("name", DETECTORS)
def test_cost_source_and_options_are_those_of_the_code(name):
    section, (made,) = sections()[name], make_detectors([name])
    (cost,) = COST.finditer(section)
    documented = Cost(**{key: int(value) for key, value in cost.groupdict().items()})
    # Any size of a latent that is larger than the numbers of probes.
    assert documented == cost_of([made], dimension=16384) == cost_of([made], dimension=1024)
    marks = re.findall(r"arXiv (\d{4}\.\d{5})|OpenReview (\w+)", DETECTORS[name].source)
    assert marks
    for mark in marks:
        assert next(filter(None, mark)) in section
    options = section if "as `negative_fraction`" not in section else sections()["negative_fraction"]
    listed = next(line for line in options.splitlines() if line.startswith("- Options"))
    for option, parameter in inspect.signature(DETECTORS[name]).parameters.items():
        assert f"`{option}`" in listed
        default = parameter.default
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert f"({default:g}" in listed.replace("1e-3", "0.001")
    assert "- It fails: " in section
    assert "$$" in section


def test_detectors_that_share_everything():
    """As the page says."""
    three = make_detectors(["score_difference", "curvature_proxy", "hessian_score_difference"])
    assert cost_of(three, dimension=64) == cost_of(three[-1:], dimension=64)


def test_the_detector_of_ones_own():
    (block,) = [block for block in blocks(DETECTORS_PAGE, "python") if "class MeanDifference" in block]
    namespace = {}
    exec(block, namespace)
    made = namespace["MeanDifference"]()
    found, _ = evidence_of(torch.tensor([[3.0, 4.0]]), torch.zeros_like)
    assert compute_detectors([made], found).tolist() == [[3.5]]
    assert cost_of([made], dimension=2) == Cost(passes=2, shared_passes=1)


def test_a_proxy_ranks_as_the_score_difference_does_for_one_seed():
    difference = torch.rand(5, 12, dtype=torch.float64)
    found, _ = evidence_of(difference, torch.zeros_like)
    values = compute_detectors(make_detectors(["score_difference", "curvature_proxy"]), found)
    torch.testing.assert_close(values[1], values[0].square() / 12)


SMALL = {
    "score": ["--seeds", 1, "--num-inference-steps", 5, "--quiet"],
    "repair": ["--seeds", 1, "--num-inference-steps", 3, "--limit", 1, "--quiet"],
}
SMALL |= {"calibrate": SMALL["score"], "evaluate": [*SMALL["score"], "--bootstrap", 20], "report": []}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the three lists and, under the name of the tutorial, the shipped model."""
    folder = tmp_path_factory.mktemp("tutorial")
    model = cli.default_model()
    (folder / "my-model").symlink_to(model)
    memorized, others = (
        (model / name).read_text(encoding="utf-8").splitlines()
        for name in ("prompts_mem.txt", "prompts_nonmem.txt")
    )
    lists = {"prompts": [memorized[0], others[0]], "memorized": memorized[:6], "negatives": others[1:9]}
    for name, prompts in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return folder


def steps_of_the_tutorial():
    return re.findall(r"^```(sh|python)\n(.*?)^```$", TUTORIAL, flags=re.MULTILINE | re.DOTALL)


def test_the_tutorial_from_top_to_bottom(workplace, monkeypatch):
    """In order, each with few steps and one seed; what repairs, where that part of the package is there."""
    monkeypatch.chdir(workplace)
    repairs = importlib.util.find_spec("sharpcore.repair") is not None
    namespace, ran = {}, []
    for kind, block in steps_of_the_tutorial():
        if "repair" in block and not repairs:
            continue
        if kind == "python":
            exec(shortened(block), namespace)
            if "pipe" in namespace:
                namespace["pipe"].set_progress_bar_config(disable=True)
            ran.append(block)
            continue
        for line in block.splitlines():
            program, command, *rest = shlex.split(line)
            assert program == "sharpcore"
            result = CliRunner().invoke(cli.app, [command, *rest, *map(str, SMALL[command])])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            ran.append(line)
    assert len(ran) == (10 if repairs else 8)
    written = {path.name for path in workplace.iterdir()}
    assert {"scores.parquet", "decided.parquet", "calibration.json", "map.npz", "where.png"} <= written
    page = (workplace / "page.html").read_text(encoding="utf-8")
    assert page.count("<img ") == (workplace / "evaluation" / "report.html").read_text().count("<img ") + 2
    assert namespace["suspect"] in (workplace / "prompts.txt").read_text().splitlines()
    assert {row["step"] for row in namespace["callback"].table()} == {1, 4}


def shortened(block):
    """The same code with the fewest steps that make sense, and one seed."""
    small = (
        ("num_inference_steps=50", "num_inference_steps=5"),
        ("steps=(1, 40)", "steps=(1, 4)"),
        ("SharpnessScorer(pipe)(prompts)", "SharpnessScorer(pipe)(prompts, seeds=1)"),
        ("steps=[40])", "steps=[4], num_inference_steps=5)"),
        (
            '"score_difference", "curvature_difference")',
            '"score_difference", "curvature_difference:probes=2")',
        ),
        ("seeds=2)", "seeds=1, num_inference_steps=3)"),
    )
    for text, other in small:
        block = block.replace(text, other)
    return block


def test_prose_of_the_tutorial():
    """Its numbers are those of the code."""
    from sharpcore.calibration import needed

    least = int(re.search(r"at least (\d+) of them, as a tenth is kept apart", TUTORIAL)[1])
    assert least - round(0.1 * least) == needed(0.01)
    for path in re.findall(r"\]\((\w+\.md)\)", TUTORIAL + DETECTORS_PAGE):
        assert (DOCS / path).is_file()
