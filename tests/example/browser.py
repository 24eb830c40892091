"""Debian's Chromium, without a window, or why it cannot be had."""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

NEEDED = ("chromium", "chromedriver")
ARGUMENTS = (
    "--headless",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Wide and narrow, in pixels.
WIDTHS = (1280, 390)
TALLEST = 4000
SIZE = """
const { clientWidth, scrollHeight } = document.documentElement;
return [clientWidth, scrollHeight];
"""


def why_missing() -> str | None:
    """Return what keeps the browser from being run here, if anything does."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def start(profile: Path) -> Any:
    """Return a browser that has an empty profile."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    browser, driver = map(shutil.which, NEEDED)
    options = ChromeOptions()
    options.binary_location = str(browser)
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=Service(driver))


def resize(browser: Any, width: int, height: int = 900) -> None:
    """Give a page so much room, as a phone has it where it is narrow."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": width < 600,
        },
    )


def screenshot(
    browser: Any, path: Path, *, height: int = TALLEST, scale: float = 1.0
) -> None:
    """Write a picture of a page, from its top down to a height."""
    width, whole = browser.execute_script(SIZE)
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, whole)}
    picture = browser.execute_cdp_cmd(
        "Page.captureScreenshot",
        {"captureBeyondViewport": True, "clip": {**clip, "scale": scale}},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(picture["data"]))
