"""Headless Chromium on `examples/browser`, served from loopback; `tests/browser/check.js` takes the steps."""

import json
import queue
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples/browser"
ORT = PAGE / "node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or not ORT.exists(), reason="needs chromium and onnxruntime-web: make check-browser"
)


class _Handler(SimpleHTTPRequestHandler):
    """The example at /, a folder's files below /files/, and /check.html: the page with the steps in it."""

    def __init__(self, *args, files, reports, **kwargs):
        self.files, self.reports = files, reports
        super().__init__(*args, directory=str(PAGE), **kwargs)

    def translate_path(self, path):
        if path.startswith("/files/"):
            return str(self.files / path.removeprefix("/files/"))
        return str(ROOT / "tests/browser/check.js") if path == "/check.js" else super().translate_path(path)

    def do_GET(self):
        if self.path != "/check.html":
            super().do_GET()
            return
        page = (PAGE / "index.html").read_text() + '<script type="module" src="check.js"></script>'
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page.encode())

    def do_POST(self):
        self.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def browse(folder, steps, *flags, seconds=300):
    """Take steps in a fresh browser.

    Args:
        folder: with the files that the steps name as "/files/NAME"; the steps are written there.
        steps: lists of a step's name and what it is given, see `check.js`.
        flags: further ones for Chromium.
        seconds: how long it may take.

    Returns:
        What came of each step: its result, or {"error": ...}.
    """
    (folder / "steps.json").write_text(json.dumps(steps))
    reports = queue.Queue()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, files=folder, reports=reports)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/check.html"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", *flags]
        command = [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return reports.get(timeout=seconds)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
