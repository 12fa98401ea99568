import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("reproducible")
# One thread each: the tests run side by side. Here too for the fixtures of a whole module.
THREADS = 1
torch.set_num_threads(THREADS)


# Minutes each: begun first, so that none of them is all that is left at the end.
LONG = ("test_demo_keeps_its_promise", "test_the_python_example_runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, the others as they are, but for those of one method and layer.

    These follow one another, so that what is fitted for all of them is fitted in one process.
    """
    files = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (item.name not in LONG, files.index(item.path), case_of(item)))


def case_of(item: pytest.Item) -> str:
    known = item.callspec.params if hasattr(item, "callspec") else {}
    return f"{known['method'].name} {known['layer']}" if {"method", "layer"} <= set(known) else ""


@pytest.fixture(autouse=True)
def same_conditions() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
