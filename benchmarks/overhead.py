"""What an instruction of the linear program costs beside its arithmetic, at most."""

from __future__ import annotations

from measure import OK, Table, why
from problems import Problem

ROUNDS = 20
SHARE = "overhead of all instructions, at most"


def overhead(table: Table, small: Problem, large: Problem) -> None:
    """Rows for a product of the large network, an instruction of the small one, and the share."""
    try:
        linearizations = [problem.linearization() for problem in (small, large)]
        instructions, many = (len(linearization.program.steps) for linearization in linearizations)
    # Whatever it raises is the result.
    except Exception as error:
        table.add_row("product, K=1", status=why(error))
        return
    tangent, large_tangent = small.tangents[:1], large.tangents[:1]

    def products() -> None:
        for _ in range(ROUNDS):
            linearizations[0].jvp(tangent)

    table.unit(f"product, K=1, {many} instructions", lambda: linearizations[1].jvp(large_tangent))
    one = f"one of {instructions} instructions on tiny tensors"
    table.add(one, products, per=ROUNDS * instructions)
    table.measure()
    ratio = table.ratio(one)
    share = None if ratio is None else ratio * many
    table.add_row(SHARE, derived=share, status=OK if share is not None else table.rows[-1].status)
