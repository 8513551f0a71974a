"""What every process of the suite is told first. The models and what else tests ask for is in tests/tiny_models.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, here and in the processes that tests start: two workers share two cores. `make test-kernels` asks for two.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")

import pytest

# Files of tests that read, say and refuse, and compute nothing that a processor rounds in its own way. Marked `words`.
WORDS = frozenset(
    """backgrounds cli colours config crops docs evaluate_best folder full_disk help hub images infotext markdown masks
    packaging plots remarks sentences studio twins ui validate words""".split()
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `make test-kernels` leaves out is marked before `-m` chooses."""
    for item in items:
        if item.path.stem.removeprefix("test_") in WORDS:
            item.add_marker("words")


def pytest_configure(config: pytest.Config) -> None:
    """Fixtures, and the libraries with them: 12 s that a process which hands tests to others need not wait for."""
    hands_out = config.getoption("numprocesses", None) and not config.option.collectonly
    if not hands_out or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("tests.tiny_models")
