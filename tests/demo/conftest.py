"""What the demo's tests share: the data sets, read once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastmtl.demo import groceries, reviews
from fastmtl.demo.dataset import Dataset


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small nets on a busy machine are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reviews_file() -> reviews.Reviews:
    return reviews.load()


@pytest.fixture(scope="session")
def review_data(reviews_file: reviews.Reviews) -> Dataset:
    return reviews.make_dataset(reviews_file, seed=0)


@pytest.fixture(scope="session")
def groceries_file() -> groceries.Groceries:
    return groceries.load()


@pytest.fixture(scope="session")
def grocery_data(groceries_file: groceries.Groceries) -> Dataset:
    return groceries.make_dataset(groceries_file)
