"""Order of the tests, and settings of hypothesis."""

import pytest
from hypothesis import settings

settings.register_profile("project", deadline=None)  # a slow machine is no failure
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole pipelines first: they are the longest, and would otherwise leave a worker idle at the end. `make quick` omits them."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    for item in items:
        if item.get_closest_marker("xdist_group"):
            item.add_marker("slow")
