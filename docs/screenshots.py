"""
Take the pictures of the example's pages that the README shows.

    python -m docs.screenshots [FOLDER]

Writes settings.png and race.png, into docs without a folder. It needs Chromium.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from tests.example import browser as chromium
from tests.example.site import Site
from tests.servers import wait_until

# The window, in pixels, and how much smaller its picture is.
WIDTH: Final = 1280
SCALE: Final = 0.5


def main(target: Path) -> None:
    """Take both, into a folder."""
    if why := chromium.why_missing():
        sys.exit(why)
    with tempfile.TemporaryDirectory() as profile, Site() as site:
        browser = chromium.start(Path(profile))
        try:
            chromium.resize(browser, WIDTH)
            browser.get(f"{site.address}/settings/")
            wait_for(browser, "5 checked")
            take(browser, target / "settings.png", height=1120)
            browser.get(f"{site.address}/race/")
            browser.find_element("css selector", "[data-start]").click()
            wait_for(browser, "times as fast.")
            take(browser, target / "race.png", height=960)
        finally:
            browser.quit()


def wait_for(browser: Any, said: str) -> None:
    """Wait until a page says something of what it does."""
    element = browser.find_element("css selector", "[data-said]")
    wait_until(lambda: said in element.text, 60)


def take(browser: Any, path: Path, *, height: int) -> None:
    """Write a picture of a page, from its top down to a height."""
    chromium.screenshot(browser, path, height=height, scale=SCALE)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
