"""The page of the server in a real browser: images by file, drop, paste and camera; turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import FLAGS, SECONDS, Browser
from conftest import BundleOf
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from server import CAT, Server, about, data_uri, running


class Page(Browser):
    """One window with the server's page."""

    def go(self, server: Server) -> None:
        self.driver.get(server.address)
        self._wait_until("ready")

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def wait_for_images(self, count: int) -> None:
        wait = WebDriverWait(self.driver, SECONDS, 0.05)
        wait.until(lambda _: self.count("#images img") == count)

    def turn(self, question: str) -> Any:
        """Asks; the element of the answer."""
        self.find("#question").send_keys(question)
        self.click("#send")
        self._wait_until("ready")
        return self.driver.find_elements(By.CSS_SELECTOR, "article")[-1]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    media = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("browser.FLAGS", (*FLAGS, *media))
        window = Page(tmp_path_factory.mktemp("profile"))
    try:
        yield window
    finally:
        window.driver.quit()


def test_turns_about_a_file_give_the_server_s_answers(page: Page, server: Server) -> None:
    page.go(server)
    page.find("#file").send_keys(str(CAT))
    page.wait_for_images(1)
    messages = about(data_uri(), "What do you see?")
    for number, question in enumerate(("What do you see?", "How many shapes are there?")):
        if number:
            messages.append({"role": "user", "content": question})
        expected = server.ask(messages=messages).json()["choices"][0]["message"]["content"]
        answer = page.turn(question)
        assert answer.find_element(By.CSS_SELECTOR, ".words").text == expected
        assert "first word after" in answer.find_element(By.CSS_SELECTOR, ".timing").text
        messages.append({"role": "assistant", "content": expected})
    assert page.count("article") == 4 and page.count("article.user img") == 1
    page.click("#new")
    assert page.count("article") == 0
    assert page.complaints == []


def test_a_new_conversation_knows_nothing_of_an_answer_that_was_being_made(
    page: Page, server: Server
) -> None:
    page.go(server)
    page.run("""
        const real = fetch;
        window.sent = [];
        window.fetch = async (path, options) => {
          if (options?.body) window.sent.push(JSON.parse(options.body).messages);
          const response = await real(path, options);
          if (!options?.body || window.sent.length > 1) return response;
          const event = { choices: [{ delta: { content: "Half an" } }] };
          const body = new ReadableStream({
            start(sender) {
              sender.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\n\n`));
              options.signal.addEventListener("abort", () => sender.error(options.signal.reason));
            },
          });
          return new Response(body);
        };
    """)
    page.find("#question").send_keys("What was there?")
    page.click("#send")
    wait = WebDriverWait(page.driver, SECONDS, 0.05)
    wait.until(lambda _: page.count(".words") and page.find(".words").text == "Half an")
    page.click("#new")
    assert page.count("article") == 0 and page.find("#stop").is_displayed() is False
    answer = page.turn("What is it?")
    assert answer.find_element(By.CSS_SELECTOR, ".words").text
    assert page.run("return window.sent[1]") == [{"role": "user", "content": "What is it?"}]
    assert page.find("#question").get_property("value") == ""


def test_images_are_dropped_pasted_and_taken_with_the_camera(page: Page, server: Server) -> None:
    page.go(server)
    give = """
        const text = atob(arguments[0].split(",")[1]);
        const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
        const file = new File([bytes], "cat.jpg", { type: "image/jpeg" });
        const data = new DataTransfer();
        data.items.add(file);
        const [kind, field] = [arguments[1], arguments[2]];
        const options = { [field]: data, bubbles: true, cancelable: true };
        const Kind = kind === "drop" ? DragEvent : ClipboardEvent;
        dispatchEvent(new Kind(kind, options));
    """
    page.run(give, data_uri(), "drop", "dataTransfer")
    page.wait_for_images(1)
    page.run(give, data_uri(), "paste", "clipboardData")
    page.wait_for_images(2)
    page.click("#images li button")
    page.wait_for_images(1)
    page.click("#camera")
    playing = "return document.querySelector('#video').videoWidth > 0"
    WebDriverWait(page.driver, SECONDS, 0.05).until(lambda driver: driver.execute_script(playing))
    page.click("#snap")
    page.wait_for_images(2)
    assert page.turn("What is it?").find_element(By.CSS_SELECTOR, ".words").text


def test_what_is_wrong_is_said_and_the_question_stays(
    page: Page, server: Server, tmp_path: Path
) -> None:
    page.go(server)
    path = tmp_path / "text.png"
    path.write_text("no image")
    page.find("#file").send_keys(str(path))
    page.wait_for_images(1)
    answer = page.turn("What is it?")
    assert "not an image in a format" in answer.find_element(By.CSS_SELECTOR, ".error").text
    assert page.find("#question").get_property("value") == "What is it?"
    page.wait_for_images(1)


def test_a_key_is_asked_for(page: Page) -> None:
    with running("--api-key", "secret") as server:
        page.driver.get(server.address)
        wait = WebDriverWait(page.driver, SECONDS, 0.05)
        wait.until(lambda _: page.find("#access").is_displayed())
        assert "no valid API key" in page.find("#message").text
        page.find("#key").send_keys("secret")
        page.click("#access button")
        page._wait_until("ready")
        assert page.turn("What is it?").find_element(By.CSS_SELECTOR, ".words").text


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 780)])
def test_everything_is_on_the_screen(page: Page, server: Server, width: int, height: int) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    page.go(server)
    page.find("#file").send_keys(str(CAT))
    page.wait_for_images(1)
    page.turn("What do you see?")
    for selector in ("h1", "#question", "#send", "#camera", "article:last-child"):
        box = page.find(selector).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, selector
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, selector
    assert page.run("return document.documentElement.scrollWidth") <= width


def test_the_description_is_shown(page: Page, server: Server) -> None:
    page.driver.get(f"{server.address}docs")
    wait = WebDriverWait(page.driver, SECONDS, 0.05)
    wait.until(lambda _: page.count("section") >= 5)
    text = page.find("main").text
    assert "POST /v1/chat/completions" in text and "repetition_penalty" in text


def test_a_model_that_makes_images_has_a_button_that_draws(
    page: Page, server: Server, bundle_of: BundleOf
) -> None:
    before = len(page.complaints)
    page.go(server)
    assert not page.find("#draw").is_displayed()
    with running(model=str(bundle_of("janus", "fp32"))) as draws:
        page.go(draws)
        page.find("#question").send_keys("A small red house near a river.")
        page.click("#draw")
        page._wait_until("ready")
        [drawn] = page.driver.find_elements(By.CSS_SELECTOR, "article.assistant img")
        width, height = (drawn.get_property(f"natural{side}") for side in ("Width", "Height"))
        assert (width, height) == (16, 16)
        assert "codes/s" in page.find("article.assistant .timing").text
        assert page.complaints[before:] == []
