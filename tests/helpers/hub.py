"""A Hugging Face Hub on loopback that serves the files of a folder as those of `owner/name`, revision main."""

import http.server
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What the Hub says of a repository, by its name: status, and the code that huggingface_hub tells errors apart by.
REFUSED = {"none": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "broken": (500, "")}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        self.server.asked.append((self.command, self.path))
        owner, name, resolve, revision, *rest = [*self.path[1:].split("/"), *[""] * 3]
        file = self.server.folder / "/".join(rest)
        if self.server.fault is not None:
            return self.refuse(*self.server.fault)
        if name in REFUSED:
            return self.refuse(*REFUSED[name])
        if (owner, name, resolve) != ("owner", "name", "resolve"):
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(data):x}"')
        if self.command == "HEAD" or self.server.excess is None:
            self.send_header("Content-Length", str(self.server.size or len(data)))
        self.end_headers()
        if body:
            with suppress(ConnectionError):  # whoever has enough hangs up
                self.wfile.write(data + (self.server.excess or b""))
        return None

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def serve_hub(folder):
    """The server, with its `endpoint`; `asked` lists requests; `size` is announced instead; `excess` sent on top;
    `fault`, a status and a code, is what everything gets."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.folder, server.asked, server.size, server.excess, server.fault = Path(folder), [], None, None, None
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
