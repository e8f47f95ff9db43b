"""A real browser for the tests of pages, and where their screenshots are kept."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
NEEDS_A_BROWSER = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser: the programs chromium and chromedriver are not on this machine"
)
SCREENSHOTS = Path(__file__).parents[2] / "screenshots"

# A page takes 3 to 10 s on two idle cores.
PATIENCE_S = 120

TEXT = """
const text = document.body.innerText;
return [...arguments].every(wanted => text.includes(wanted)) && text;
"""


class Page:
    """A browser with a fresh profile. It waits for content: the pages of this UI never become idle."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(BROWSER)
        options.add_argument("--headless=new")
        options.add_argument("--window-size=1400,1000")
        options.add_argument("--hide-scrollbars")
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # In a container /dev/shm may be tiny, and there may be no other user than root, as whom it refuses its sandbox.
        options.add_argument("--disable-dev-shm-usage")
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")
        self.browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))

    def forget(self) -> None:
        """Be as a fresh profile would be, but for the files that it has in its cache."""
        first, *others = self.browser.window_handles
        for tab in others:
            self.browser.switch_to.window(tab)
            self.browser.close()
        self.browser.switch_to.window(first)
        origin = self.wait("return window.location.origin;")
        self.browser.get("about:blank")
        # What the page of a server keeps: settings in the local storage above all.
        if origin.startswith("http"):
            clear = {"origin": origin, "storageTypes": "all"}
            self.browser.execute_cdp_cmd("Storage.clearDataForOrigin", clear)
        self.browser.set_window_size(1400, 1000)

    def open(self, link: str) -> None:
        self.browser.get(link)

    def wait(self, script: str, *arguments: Any) -> Any:
        """What a script returns, as soon as that is something."""
        return self._until(lambda browser: browser.execute_script(script, *arguments), f"{arguments}: {script}")

    def wait_for_text(self, *texts: str) -> str:
        """The page's whole text once all of these are in it."""
        whole: str = self.wait(TEXT, *texts)
        return whole

    def click(self, text: str) -> None:
        """Follow the link of this text, into a new tab if it opens one."""

        def follow(browser: webdriver.Chrome) -> bool:
            browser.find_element(By.LINK_TEXT, text).click()
            return True

        tabs, address = set(self.browser.window_handles), self.browser.current_url
        self._until(follow, f"no link {text}")
        self._until(lambda browser: browser.current_url != address or set(browser.window_handles) - tabs, "no page")
        for tab in set(self.browser.window_handles) - tabs:
            self.browser.switch_to.window(tab)

    def click_away_the_assistant(self) -> None:
        """Close the panel that the MLflow UI opens in a fresh profile, over a quarter of the page."""

        def close(browser: webdriver.Chrome) -> bool:
            browser.find_element(By.CSS_SELECTOR, '[data-component-id="mlflow.assistant.chat_panel.close"]').click()
            return True

        self._until(close, "no assistant")

    def errors(self) -> list[str]:
        """What the page has complained of since the last call."""
        entries: list[dict[str, Any]] = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [str(entry["message"]) for entry in entries if entry["level"] == "SEVERE"]

    def keep_screenshot(self, name: str, width: int = 1400) -> Path:
        """A picture of the whole page, among those that are kept to be looked at."""
        SCREENSHOTS.mkdir(exist_ok=True)
        height = int(self.wait("return document.documentElement.scrollHeight;"))
        self.browser.set_window_size(width, height + 200)
        path = SCREENSHOTS / f"{name}.png"
        assert self.browser.save_screenshot(str(path))
        return path

    def _until(self, condition: Callable[[webdriver.Chrome], Any], missing: str) -> Any:
        # The page may replace an element between finding it and using it.
        replaced = (NoSuchElementException, StaleElementReferenceException, ElementClickInterceptedException)
        return WebDriverWait(self.browser, PATIENCE_S, ignored_exceptions=replaced).until(condition, missing)
