"""`mge-serve` in a process of its own, and requests as any client sends them."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

PROGRAM = "import mge_runtime.cli.serve as serve; {before}; serve.main(prog_name='mge-serve')"


def wait_until(condition, seconds=30):
    """What a condition gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


def form(*files, name="image", boundary="b0undary"):
    """The body of a form and its headers; files are (file name, bytes)."""
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'
        % (boundary.encode(), name.encode(), title.encode(), data)
        for title, data in files
    ]
    body = b"".join(parts) + b"--%s--\r\n" % boundary.encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


class Server:
    """The command on a free port of this machine; a context manager that kills what is still there."""

    def __init__(self, bundle, *options, before="pass"):
        words = [sys.executable, "-c", PROGRAM.format(before=before), bundle, "--port", "0", "--threads", "1", *options]
        self.process = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")))
        self._reader.start()
        self.port = int(wait_until(lambda: re.search(r"listening on http://127.0.0.1:(\d+)", self.log))[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self._reader.join()

    @property
    def log(self):
        return "".join(list(self.lines))

    def ready(self):
        wait_until(lambda: self.request("GET", "/health")[0] == 200)
        return self

    def request(self, method, path, body=None, headers=None):
        """Status, headers and body, as JSON where it is that."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            return self.response(connection.getresponse())
        finally:
            connection.close()

    @staticmethod
    def response(found):
        data = found.read()
        is_json = found.headers.get_content_type() == "application/json"
        return found.status, found.headers, json.loads(data) if is_json else data.decode()

    def predict(self, body, headers=None):
        """Status and JSON."""
        status, _, found = self.request("POST", "/predict", body, headers)
        return status, found

    def begin(self, body):
        """A request of which half was sent, and what sends the rest and returns status and JSON."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        half = len(body) // 2
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:half])

        def finish():
            with connection:
                connection.sendall(body[half:])
                found = http.client.HTTPResponse(connection)
                found.begin()
                status, _, json_ = self.response(found)
                return status, json_

        return connection, finish

    def metric(self, name):
        """The value of one line of /metrics; 0 where it is not there yet."""
        text = self.request("GET", "/metrics")[2]
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " ")), 0.0)

    def signal(self, name):
        self.process.send_signal(getattr(signal, name))
