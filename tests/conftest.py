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


@pytest.fixture(autouse=True)
def same_conditions() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
