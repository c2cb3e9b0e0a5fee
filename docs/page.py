"""Draws docs/fgserve.png, the status page of a server that works. Needs Chromium: python docs/page.py"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

with subprocess.Popen(
    [sys.executable, "-m", "fastgen.cli.serve", "--port", "0", "schedule.max_num_seqs=8"],
    stderr=subprocess.PIPE, text=True,
) as server, tempfile.TemporaryDirectory() as profile:  # fmt: skip
    try:
        assert server.stderr
        url = ""
        for line in server.stderr:
            url = url or "".join(re.findall(r"http://[^/]+", line))
            if "is ready" in line:
                break
        body = {"prompt": "The old lighthouse", "n": 12, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body):
            time.sleep(3)
            options = ("--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}")
            shot = f"--screenshot={Path(__file__).parent / 'fgserve.png'}"
            subprocess.run(
                ["chromium", *options, "--window-size=640,620", "--virtual-time-budget=3000", shot, url], check=True
            )
    finally:
        server.terminate()
