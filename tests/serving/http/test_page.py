"""The page in a headless Chromium, as a person uses it."""

import base64
import shutil
import subprocess

import httpx
import pytest

from recbole_ssm.serving.http.app import create_app
from recbole_ssm.serving.http.titles import Titles

from .conftest import free_port, listening, until

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key of an element


class Browser:
    """Chromium by ChromeDriver's own protocol."""

    def __init__(self, driver: str, profile):
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     "--window-size=1200,800", f"--user-data-dir={profile}"]  # fmt: skip
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._client = httpx.Client(base_url=driver, timeout=60)
        made = self._client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
        self._session = f"/session/{made['sessionId']}"

    def post(self, path: str, **body):
        answer = self._client.post(self._session + path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def run(self, script: str):
        return self.post("/execute/sync", script=script, args=[])

    def texts(self, css: str) -> list[str]:
        return self.run(f"return [...document.querySelectorAll({css!r})].map((one) => one.textContent)")

    def click(self, css: str):
        self.post(f"/element/{self._find(css)}/click")

    def write(self, css: str, text: str):
        self.post(f"/element/{self._find(css)}/value", text=text)

    def screenshot(self) -> bytes:
        return base64.b64decode(self._client.get(self._session + "/screenshot").json()["value"])

    def close(self):
        self._client.delete(self._session)

    def _find(self, css: str) -> str:
        return self.post("/element", using="css selector", value=css)[ELEMENT]


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with chromedriver here: apt-get install chromium chromium-driver")
    port = free_port()
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return httpx.get(f"{address}/status").json()["value"]["ready"]
        except httpx.TransportError:
            return False

    until(ready)
    one = Browser(address, tmp_path / "profile")
    yield one
    one.close()
    driver.terminate()
    driver.wait()


def test_a_person_watches_the_list_change(served, browser):
    evil = "<img src=x onerror='document.title=\"taken\"'>"
    tokens = served.vocabulary.items[1:].tolist()
    titles = {token: f"Film {token}" for token in tokens} | {"i5": f"Fifth {evil}"}
    app = create_app(served, titles=Titles(served.vocabulary, titles), token="a-long-enough-token")
    with listening(app) as address:
        browser.post("/url", url=address)
        until(lambda: "token" in browser.texts("#problem")[0])
        browser.write("#token", "a-long-enough-token")
        browser.click("#door button")
        until(lambda: len(browser.texts("#found li")) == 12)
        assert browser.texts("#about") == ["Mamba4Rec, 30 items"]
        browser.write("#query", "fifth")
        until(lambda: browser.texts("#found li") == [titles["i5"]])
        browser.click("#found button")
        until(lambda: browser.texts("#count") == ["1 event"])

        def expected(*history):
            return [titles[item] for item in served.recommend([list(history)], 15).items[0]]

        assert browser.texts("#next .name") == expected("i5")
        assert browser.texts("#history .name") == [titles["i5"]]
        second = browser.run("return document.querySelector('#next li:nth-child(3) button').dataset.item")
        browser.click("#next li:nth-child(3) button")
        until(lambda: browser.texts("#count") == ["2 events"])
        assert browser.texts("#next .name") == expected("i5", second)
        assert any("▲" in move or "▼" in move or move == "new" for move in browser.texts("#next .move"))
        # A title is text, and the page loads nothing but from its own server.
        assert browser.run("return document.title") == "What comes next"
        assert browser.texts("img") == []
        assert browser.run(
            "return performance.getEntriesByType('resource').map((one) => new URL(one.name).origin)"
        ) == [address for _ in browser.run("return performance.getEntriesByType('resource').map(() => 0)")]
        browser.click("#anew")
        until(lambda: browser.texts("#history li") == [] and browser.texts("#next li") == [])
        browser.click("#found button")
        until(lambda: browser.texts("#count") == ["1 event"])
        assert browser.texts("#next .name") == expected("i5")
        assert browser.texts("#problem") == [""]
    browser.click("#found button")
    until(lambda: browser.texts("#problem") != [""])  # the server has gone, and the page says so


def test_the_page_runs_under_its_policy(served, browser):
    """A script that is not the page's own is not run: the policy holds, and holds for no more than the page."""
    with listening(create_app(served)) as address:
        page = httpx.get(address)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        browser.post("/url", url=address)
        until(lambda: len(browser.texts("#found li")) == 12)
        browser.run(
            "const one = document.createElement('script'); one.textContent = 'document.title = \"taken\"';"
            "document.body.append(one)"
        )
        assert browser.run("return document.title") == "What comes next"
