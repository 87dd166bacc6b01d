"""The report in a real browser: it opens from disk, draws its playback and raises nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from orderlab.study.report.page import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_report_opens_from_disk_and_draws_the_playback(make_report, tmp_path: Path) -> None:
    page = build(make_report(0), tmp_path / "report")[0]
    command = [str(CHROMIUM), *FLAGS, "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "CONSOLE" not in result.stderr, [line for line in result.stderr.splitlines() if "CONSOLE" in line][:3]
    assert re.search(r"<canvas[^>]*width=", result.stdout)
