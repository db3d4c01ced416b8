"""Our pages in a real browser: they show what they should, and their consoles stay silent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from launch.report_folder import write
from tests.browser import look
from tests.hosts import ROOT
from tests.unit.test_report import swept


def test_a_broken_page_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<p id=a>before</p><script>a.textContent='after'; nothing.there()</script>"
    )
    seen = look((tmp_path / "page.html").as_uri(), for_ms=500)
    assert "after" in seen.dom
    assert any("nothing is not defined" in line for line in seen.console)


def test_the_report_needs_nothing_and_says_nothing(tmp_path: Path) -> None:
    list(write(tmp_path, swept()))
    seen = look((tmp_path / "report.html").as_uri(), for_ms=500)
    assert seen.console == ()
    assert seen.dom.count("<svg") == 4
    assert len(seen.screenshot) > 20_000  # a blank page of this size has some 7,000


def test_the_servers_page_shows_the_plan_and_says_nothing(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fake_server", str(tmp_path), "0.01"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        seen = look(server.stdout.readline().strip())
    finally:
        server.terminate()
        server.wait()
    assert seen.console == ()
    assert re.search(r'id="layout">tp1<', seen.dom)
    assert "It is the only one." in seen.dom
