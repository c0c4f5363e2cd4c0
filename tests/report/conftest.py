"""A page as a browser draws it: its elements, and the text in them."""

from __future__ import annotations

import html.parser
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--virtual-time-budget=4000 --dump-dom"
)


class Elements(html.parser.HTMLParser):
    """The tags of a page, and the text in each element that has a data-testid."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.texts = [], [], {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        testid = attributes.get("data-testid")
        self.texts.setdefault(testid, []).append("")
        if tag not in ("meta", "input"):
            self.open.append((tag, testid))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for testid in {testid for _, testid in self.open}:
            self.texts[testid][-1] += data

    def having(self, testid):
        return [
            attributes for _, attributes in self.tags if attributes.get("data-testid") == testid
        ]

    def num(self, tag):
        return [each for each, _ in self.tags].count(tag)


@pytest.fixture(scope="session")
def elements_of():
    """Return a function that parses a page."""
    return Elements


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip(
            "runs the script of the HTML report in a browser, and chromium is not on the PATH. It "
            "is no Python package, so `make test` cannot install it; .ci/run does where apt-get is "
            "allowed, and says so where not. To run these tests: apt-get install chromium"
        )

    def load(path, fragment="", width=1280):
        profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
        command = [CHROMIUM, *FLAGS.split(), profile, f"--window-size={width},1600"]
        url = path.as_uri() + fragment
        run = subprocess.run([*command, url], capture_output=True, check=True, timeout=120)
        elements = Elements(run.stdout.decode())
        (body,) = (attributes for tag, attributes in elements.tags if tag == "body")
        assert (body["data-errors"], body["data-ready"]) == ("", "true")
        assert "[object" not in elements.texts["main"][0]
        return elements

    return load
