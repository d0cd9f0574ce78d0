"""A headless Chromium with a page of examples/web, driven as a person would drive it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("MOBILEVLM_WITHOUT_BROWSER") == "1":
    pytest.skip("asked to go without a browser", allow_module_level=True)

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PAGE = Path(__file__).parents[1] / "examples" / "web"
REMEDY = "run .ci/browser, or set MOBILEVLM_WITHOUT_BROWSER=1"
SECONDS = 120
"""Limit for any action on the page on a busy machine."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe", "--window-size=1280,1200",
)  # fmt: skip


def copy_page(folder: Path) -> Path:
    """The page and the packages that it uses, ready for a server; bundles go beside it."""
    if not (PAGE / "vendor").is_dir():
        pytest.fail(f"{PAGE / 'vendor'}: the page's packages are not there: {REMEDY}")
    return Path(
        shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("node_modules", "bundle"))
    )


@contextmanager
def served(folder: Path, isolated: bool = True) -> Iterator[str]:
    """The address of a copy of the page, by its own server, or by one that sends no headers."""
    own = [str(folder / "serve.py"), "0"]
    plain = ["-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    program = [sys.executable, *(own if isolated else plain)]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+?/", server.stdout.readline())
            assert found is not None
            yield found[0]
        finally:
            server.terminate()


class Browser:
    """One window."""

    def __init__(self, profile: Path) -> None:
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if chromium is None or driver is None:
            pytest.fail(f"chromium and chromedriver are not installed: {REMEDY}")
        options = ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = Chrome(options, Service(driver))
        self.driver.set_script_timeout(SECONDS)

    def open(self, address: str, state: str = "ready") -> None:
        """Goes to the page and waits until its model is loaded, or has failed."""
        self.driver.get(address)
        self._wait_until("ready", "failed")
        assert self._state == state, self.status

    @property
    def status(self) -> str:
        """Return the page's text about its model."""
        return str(self.driver.find_element(By.ID, "status").text)

    def choose_file(self, path: Path) -> None:
        self.driver.execute_script("delete document.body.dataset.opened")
        self.driver.find_element(By.ID, "file").send_keys(str(path))
        opened = "return document.body.dataset.opened"
        WebDriverWait(self.driver, SECONDS, 0.05).until(
            lambda driver: driver.execute_script(opened) == path.name
        )

    @property
    def warning(self) -> str:
        """Return the page's text about the last file."""
        return str(self.driver.find_element(By.ID, "warning").text)

    def click(self, selector: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def ask(self, question: str) -> tuple[str, list[int]]:
        """The answer's text and tokens; of a refusal its message and none."""
        field = self.driver.find_element(By.ID, "question")
        self.run("arguments[0].value = arguments[1]", field, question)
        self.click("#ask")
        self._wait_until("ready")
        answer = self.driver.find_element(By.CSS_SELECTOR, "#answers li")
        text = answer.find_element(By.CSS_SELECTOR, ".answer").get_attribute("textContent") or ""
        tokens = answer.get_attribute("data-tokens") or ""
        return text, [int(token) for token in tokens.split()]

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs the body of an asynchronous function in the page; what it returns."""
        done, failed = self.driver.execute_async_script(
            f"const [back, given] = [arguments[arguments.length - 1], [...arguments].slice(0, -1)];"
            f"(async function () {{ {script} }})(...given)"
            f".then((value) => back([value, null]), (error) => back([null, String(error)]))",
            *arguments,
        )
        assert failed is None, failed
        return done

    @property
    def complaints(self) -> list[str]:
        """Return the messages of the browser's log."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    @property
    def _state(self) -> Any:
        return self.driver.execute_script("return document.body.dataset.state")

    def _wait_until(self, *states: str) -> None:
        WebDriverWait(self.driver, SECONDS, 0.05).until(lambda _: self._state in states)
