"""What `make test` leaves to `make test-kernels`: cases that go through the same code as one that it runs.

Of kinds of adapters, families of bases and precisions it takes each once where their product says no more, and of whole
trainings those that nothing shorter stands for. A whole test is marked `@pytest.mark.slow`.
"""

from collections.abc import Iterable

import pytest


def slow(*case: object, id: str | None = None) -> object:
    """One case of a `parametrize` or of a fixture's `params`, of one value or of several."""
    return pytest.param(*case, marks=pytest.mark.slow, id=id)


def mostly(cases: Iterable[object], *often: object) -> list[object]:
    """`cases` of one value each, all slow but `often`."""
    cases = list(cases)
    if unknown := [case for case in often if case not in cases]:
        raise ValueError(f"{unknown} is among no {cases}")
    return [case if case in often else slow(case) for case in cases]
