"""The example's pages in a real browser, as a person uses them."""

from __future__ import annotations

import os
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from tests.servers import wait_until

from . import browser as chromium
from .site import FORM, ROOT, Site

pytestmark = pytest.mark.browser

SYNC, ASYNC = "Send with send_mail()", "await asend_mail()"
WIDTH = "return document.documentElement.scrollWidth"
PICTURES = Path(os.environ.get("SCREENSHOTS", ROOT / "build" / "screenshots"))


def one(browser: Any, selector: str) -> Any:
    """Return an element, by CSS."""
    return browser.find_element("css selector", selector)


def text(browser: Any, selector: str = "main") -> str:
    return str(one(browser, selector).text)


def wait_for(browser: Any, said: str, selector: str = "main") -> None:
    """Wait until something stands on the page, or on the one that is loading."""
    from selenium.common import NoSuchElementException, StaleElementReferenceException

    def is_said() -> bool:
        try:
            return said in text(browser, selector)
        except (NoSuchElementException, StaleElementReferenceException):
            return False

    wait_until(is_said, 20)


def fill_in(browser: Any, site: Site, **values: str) -> None:
    """Go to the form, and type something into its fields."""
    browser.get(f"{site.address}/")
    fields = {"subject": "Hello", "text": "Shall we meet at noon?", **values}
    for name, value in fields.items():
        field = one(browser, f"[name={name}]")
        if name not in ("mailer", "attachment"):
            field.clear()
        field.send_keys(value)


def fits(browser: Any, name: str) -> None:
    """Check that the page has room at both widths, and write pictures of it."""
    for width in chromium.WIDTHS:
        chromium.resize(browser, width)
        assert browser.execute_script(WIDTH) == width
        picture = PICTURES / f"{name}-{width}.png"
        chromium.screenshot(browser, picture)
        assert picture.stat().st_size > 5000
    chromium.resize(browser, chromium.WIDTHS[0])


def press(browser: Any, label: str) -> None:
    """Press the button that has a label."""
    buttons = browser.find_elements("css selector", "button")
    (button,) = (button for button in buttons if button.text == label)
    button.click()


@pytest.mark.parametrize("button", [SYNC, ASYNC])
def test_what_either_view_sends_appears_in_the_inbox(
    browser: Any, site: Site, button: str
) -> None:
    browser.get(f"{site.address}/inbox/")
    wait_for(browser, "live", "[data-live]")
    inbox = browser.current_window_handle
    browser.switch_to.new_window("tab")
    subject = f"Lunch on <i>Friday</i>? ({button})"
    fill_in(browser, site, subject=subject, to="ada@example.org, nobody@example.org")
    fits(browser, "compose")
    press(browser, button)
    wait_for(browser, "queued as")
    fits(browser, "sent")
    assert "/sent/" in browser.current_url
    assert text(browser, "h1") == subject
    rows = browser.find_elements("css selector", ".timeline .span-row")
    assert [row.text.split()[0] for row in rows][-1] == "body"
    browser.close()
    browser.switch_to.window(inbox)
    wait_for(browser, subject, ".mails li:first-child")
    fits(browser, "inbox")
    one(browser, ".mails a").click()
    wait_for(browser, "Shall we meet at noon?")
    fits(browser, "message")


def test_html_is_shown_in_its_frame_and_runs_nothing(browser: Any, site: Site) -> None:
    message = EmailMessage()
    message["Subject"] = "Looks"
    message["From"] = "eve@example.com"
    message.set_content("Plain.")
    style = "color: #a02020; font-family: sans-serif"
    message.add_alternative(f"<h1 style='{style}'>Bold</h1>", "html")
    message.add_attachment("Soup.", filename="menu.txt")
    site.deliver(message)
    browser.get(f"{site.address}/inbox/")
    one(browser, ".mails a").click()
    wait_for(browser, "menu.txt")
    fits(browser, "message-html")
    browser.switch_to.frame(one(browser, "iframe"))
    heading = one(browser, "h1")
    assert heading.text == "Bold"
    assert heading.value_of_css_property("color") == "rgba(160, 32, 32, 1)"
    browser.switch_to.default_content()


def test_the_admin_keeps_to_the_policy_too(browser: Any, site: Site) -> None:
    site.post("/contact/", **FORM)
    browser.get(f"{site.address}/admin/example/sentmail/")
    one(browser, "[name=username]").send_keys("admin")
    one(browser, "[name=password]").send_keys(site.admin_password + "\n")
    wait_for(browser, "Hello", "body")
    chromium.screenshot(browser, PICTURES / "admin-1280.png")


def test_the_source_beside_the_form_is_that_of_the_views(
    browser: Any, site: Site
) -> None:
    browser.get(f"{site.address}/")
    source = (ROOT / "example_project/example/views/compose.py").read_text()
    for shown in browser.find_elements("css selector", "figure pre"):
        assert shown.text in source
        assert "send_mail(" in shown.text


def test_the_form_can_be_used_from_the_keyboard(browser: Any, site: Site) -> None:
    from selenium.webdriver import ActionChains, Keys

    def typed(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    def label() -> str:
        return str(browser.switch_to.active_element.text)

    browser.get(f"{site.address}/")
    typed(Keys.TAB)
    assert label() == "Skip to the content"
    typed(Keys.ENTER, Keys.TAB)
    # The first field of what was skipped to.
    assert browser.switch_to.active_element.get_attribute("name") == "to"
    typed(Keys.TAB, "By hand", Keys.TAB, "Text", Keys.TAB, Keys.TAB, Keys.TAB)
    assert label() == SYNC
    outline = browser.switch_to.active_element.value_of_css_property("outline-style")
    assert outline == "solid"
    typed(Keys.TAB)
    assert label() == ASYNC
    typed(Keys.SPACE)
    wait_for(browser, "queued as")
    assert text(browser, "h1") == "By hand"


def test_every_field_has_a_label(browser: Any, site: Site) -> None:
    for path in ("/", "/race/"):
        browser.get(f"{site.address}{path}")
        for field in browser.find_elements("css selector", "main :is(input,textarea)"):
            if field.get_attribute("type") != "hidden":
                assert field.accessible_name, field.get_attribute("outerHTML")


def test_wrong_input_is_said_at_the_field(browser: Any, site: Site) -> None:
    fill_in(browser, site, to="ada@", subject="Kept")
    press(browser, SYNC)
    wait_for(browser, "Nothing was sent yet")
    field = one(browser, "[name=to]")
    assert field.get_attribute("aria-invalid") == "true"
    _, error = field.get_attribute("aria-describedby").split()
    assert "is not an email address" in text(browser, f"#{error}")
    assert one(browser, "[name=subject]").get_attribute("value") == "Kept"
    fits(browser, "wrong-input")


def test_a_file_above_the_limit_is_refused_at_once(
    browser: Any, site: Site, tmp_path: Path
) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(2**20 + 1))
    fill_in(browser, site, attachment=str(large))
    wait_for(browser, "too large; the limit is 1 MB", "#id_attachment_error")
    press(browser, SYNC)
    assert browser.current_url == f"{site.address}/"


def test_a_failure_is_shown_with_its_hint(browser: Any, site: Site) -> None:
    fill_in(browser, site, mailer="wrong-password")
    press(browser, ASYNC)
    wait_for(browser, "The message was not sent")
    assert "What to do: The server refused" in text(browser, "[role=alert]")
    chosen = one(browser, "[name=mailer]").get_attribute("value")
    assert chosen == "wrong-password"
    fits(browser, "failure")


def test_the_settings_page_shows_the_hint_for_a_wrong_password(
    browser: Any, site: Site
) -> None:
    browser.get(f"{site.address}/settings/")
    wait_for(browser, "5 checked, 4 with a failure.", "[data-said]")
    card = text(browser, "[data-mailer=wrong-password]")
    assert "fails" in card
    assert "AUTH refused" in card
    assert "The server refused" in card
    assert "works" in text(browser, "[data-mailer=default]")
    signs = browser.find_elements("css selector", "[data-mailer=wrong-port] .sign")
    assert [sign.accessible_name for sign in signs] == [
        "ok",
        "ok",
        "failed",
        *["skipped"] * 5,
    ]
    bars = browser.find_elements("css selector", "[data-mailer=default] [data-bar]")
    assert len(bars) == 8
    assert all(float(bar.get_attribute("width")) > 0 for bar in bars)
    fits(browser, "settings")
    one(browser, "[data-again]").click()
    wait_for(browser, "5 checked, 4 with a failure.", "[data-said]")
    bars = browser.find_elements("css selector", "[data-mailer=default] [data-bar]")
    assert len(bars) == 8


def start_race(browser: Any, site: Site, messages: int, round_trip: int) -> None:
    browser.get(f"{site.address}/race/")
    field = one(browser, "[name=messages]")
    field.clear()
    field.send_keys(str(messages))
    # A slider is moved by a pointer or arrow keys.
    browser.execute_script(
        "arguments[0].value = arguments[1];"
        "arguments[0].dispatchEvent(new Event('input'))",
        one(browser, "[name=round_trip]"),
        round_trip,
    )
    assert text(browser, "output") == f"{round_trip} ms"
    press(browser, "Start")


def test_ours_wins_the_race_at_20_ms(browser: Any, site: Site) -> None:
    start_race(browser, site, messages=40, round_trip=20)
    wait_for(browser, "times as fast.", "[data-said]")
    assert text(browser, "[data-said]").startswith("django-async-smtp is")
    for lane in ("ours", "django"):
        progress = one(browser, f"[data-lane={lane}]")
        assert progress.get_property("value") == progress.get_property("max") == 40
        line = one(browser, f"[data-line={lane}]").get_attribute("points")
        assert len(line.split()) > 1
    assert one(browser, "[data-start]").is_enabled()
    fits(browser, "race")


def test_a_race_can_be_stopped_and_run_again(browser: Any, site: Site) -> None:
    start_race(browser, site, messages=500, round_trip=100)
    wait_for(browser, "They run.", "[data-said]")
    press(browser, "Stop")
    wait_for(browser, "Stopped.", "[data-said]")
    start_race(browser, site, messages=10, round_trip=0)

    def has_ended() -> bool:
        # The processes of the other one may take a moment to end.
        if "Another race" in text(browser, "[data-said]"):
            press(browser, "Start")
        return "times as fast." in text(browser, "[data-said]")

    wait_until(has_ended, 20)


def test_a_race_that_the_server_ends_is_said_to_be_broken_off(browser: Any) -> None:
    with Site() as own:
        start_race(browser, own, messages=500, round_trip=100)
        wait_for(browser, "They run.", "[data-said]")
        assert own.end() == 0
        wait_for(browser, "The race was broken off.", "[data-said]")
        assert one(browser, "[data-start]").is_enabled()


def test_a_race_says_what_is_wrong_at_the_field(site: Site, chrome: Any) -> None:
    start_race(chrome, site, messages=5, round_trip=20)
    wait_for(chrome, "greater than or equal to 10", "#id_messages_error")
    field = one(chrome, "[name=messages]")
    assert field.get_attribute("aria-invalid") == "true"
    # The browser notes the answer's status, 400.
    (noted,) = chrome.get_log("browser")
    assert "400" in noted["message"]


def test_the_pool_page_is_live(browser: Any, site: Site) -> None:
    browser.get(f"{site.address}/pool/")
    wait_for(browser, "live", "[data-live]")
    press(browser, "Send 20 at once")
    # The default of max_connections, and who waits for one.
    wait_until(lambda: gauges(browser).get("in_use") == 5)
    wait_until(lambda: gauges(browser).get("waiting", 0) > 0)
    fits(browser, "pool")
    wait_until(lambda: gauges(browser).get("idle") == 5)


def test_live_pages_leave_room_for_other_tabs(browser: Any, site: Site) -> None:
    first = browser.current_window_handle
    browser.get(f"{site.address}/inbox/")
    # More than a browser has connections for.
    for _ in range(7):
        browser.switch_to.new_window("tab")
        browser.get(f"{site.address}/inbox/")
        wait_for(browser, "live", "[data-live]")
    for tab in set(browser.window_handles) - {first}:
        browser.switch_to.window(tab)
        browser.close()
    browser.switch_to.window(first)
    site.post("/contact/", **FORM | {"subject": "While nobody looked"})
    wait_for(browser, "While nobody looked", ".mails li:first-child")


def gauges(browser: Any) -> dict[str, int]:
    """Return the figures of the server that is in most use."""
    cards: list[dict[str, int]] = browser.execute_script(
        "return [...document.querySelectorAll('[data-servers] section')].map((card) =>"
        " Object.fromEntries([...card.querySelectorAll('.gauges [data-figure]')].map("
        "  (e) => [e.dataset.figure, Number(e.textContent)])))"
    )
    return max(cards, key=lambda card: sum(card.values()), default={})
