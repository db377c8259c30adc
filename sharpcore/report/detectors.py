"""The list of detectors: what each costs alone, what it needs, and where it comes from."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sharpcore.detect import cost_of, detectors, make_detectors

if TYPE_CHECKING:
    from rich.table import Table

_COUNT = 50


def describe(dimension: int) -> list[dict[str, Any]]:
    """One row a detector: name, cost for one prompt and seed at the first of 50 steps with latents of so many
    entries, inputs, whether it has a map, options and source."""
    rows = []
    for detector in make_detectors(detectors()):
        needs = [
            words
            for flag, words in (
                (detector.needs_product, "Jacobian"),
                (detector.needs_embedding, "gradient of the embedding"),
                (detector.needs_attention, "cross-attention"),
                (detector.needs_tokens, "text of the prompt"),
            )
            if flag
        ]
        rows.append(
            {
                "name": detector.name,
                **asdict(cost_of([detector], dimension=dimension, count=_COUNT)),
                "steps": list(detector.steps((0,), _COUNT)),
                "needs": needs,
                "map": detector.has_map,
                "options": detector.options(),
                "source": detector.source,
            }
        )
    return rows


def detectors_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `describe` for the terminal."""
    from rich.table import Table

    table = Table(title="detectors; passes and products for one prompt and seed (of them shared by prompts)")
    for name in ("name", "passes", "products", "needs", "map", "source"):
        table.add_column(name, justify="right" if name in ("passes", "products") else "left")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['passes']} ({row['shared_passes']})",
            f"{row['products']} ({row['shared_products']})",
            ", ".join(row["needs"]) or "-",
            "yes" if row["map"] else "",
            row["source"],
        )
    return table
