"""One site and one browser for all tests of the example."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from . import browser as chromium
from .site import Site


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    with Site() as running:
        yield running
    assert "Traceback" not in running.errors, running.errors
    assert "Warning" not in running.errors, running.errors


@pytest.fixture(scope="session")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The browser, for ``browser``."""
    missing = chromium.why_missing()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"CI needs a browser: {missing}", pytrace=False)
    if missing:
        pytest.skip(missing)
    driver = chromium.start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chrome: Any) -> Iterator[Any]:
    """The browser, wide; nothing may appear in its console."""
    chromium.resize(chrome, chromium.WIDTHS[0])
    chrome.get_log("browser")
    yield chrome
    assert chrome.get_log("browser") == []
    # Ends the page's streams.
    chrome.get("about:blank")
