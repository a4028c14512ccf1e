"""`mge-serve` over the loopback: what it predicts, refuses and survives, and how bundles are swapped under load."""

import http.client
import json
import re
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime.cli.run import main as mge_run
from mge_runtime.cli.serve import main
from tests.helpers.commands import fails, run_without
from tests.helpers.images import many_scans, png_file, saved
from tests.helpers.server import Server, form, wait_until

IMAGES, QUEUE = 3, 5
LIMITS = ("--max-images", IMAGES, "--queue", QUEUE, "--max-body", 0.2, "--max-pixels", 10_000)


@pytest.fixture(scope="module")
def plan(bundle_path, tmp_path_factory):
    """A bundle that is swapped."""
    return shutil.copy(bundle_path, tmp_path_factory.mktemp("served") / "mge.plan")


@pytest.fixture(scope="module")
def server(plan):
    with Server(plan, *LIMITS) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def hasty(bundle_path):
    """Half a second to read, half to predict, and to send a first request."""
    options = ("--timeout", 0.5, "--queue", 200, "--max-images", 200)
    with Server(bundle_path, *options, before="serve._IDLE = 0.5") as server:
        yield server.ready()


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After each test nothing waits, and nothing was said but what is meant to be."""
    yield
    for name in {"server", "hasty"} & set(request.fixturenames):
        found = request.getfixturevalue(name)
        wait_until(lambda found=found: found.metric("mge_queue_images") == 0)
        assert found.metric('mge_requests_total{status="500"}') == 0
        assert all(line.startswith(("listening ", "ready: ", "error: ")) for line in found.log.splitlines()), found.log


@pytest.fixture(scope="module")
def files(photos):
    return [saved(photo, "PNG") for photo in photos]


def timeless(records):
    for record in records:
        del record["timings_ms"]
    return records


@pytest.fixture(scope="module")
def printed(files, bundle_path, tmp_path_factory):
    """What `mge-run --json` says of each file."""
    folder = tmp_path_factory.mktemp("images")
    for number, data in enumerate(files):
        (folder / f"{number}.png").write_bytes(data)
    found = CliRunner().invoke(mge_run, ["--engine", str(bundle_path), "--json", str(folder)])
    return timeless([json.loads(line) for line in found.stdout.splitlines()])


def near(found, wanted):
    """Whether JSON is the same; numbers may differ by how a batch is summed."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(near(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(near, found, wanted))
    return found == (pytest.approx(wanted, abs=1e-4) if isinstance(wanted, float) else wanted)


def test_an_image_as_the_body_gives_what_mge_run_prints(server, files, printed):
    for data, wanted in zip(files, printed, strict=True):
        status, found = server.predict(data)
        assert (status, found.pop("image")) == (200, "the request body")
        assert near(*timeless([found]), {key: wanted[key] for key in wanted if key != "image"})


def test_a_form_gives_a_list_and_a_bad_file_spoils_no_other(server, files, printed):
    status, found = server.predict(*form(("a.png", files[0]), ("b\x07.png", b"no image"), ("c.png", files[2])))
    assert status == 200
    assert [record.pop("image") for record in found][::2] == ["a.png", "c.png"]
    wanted = [{key: printed[n][key] for key in printed[n] if key != "image"} for n in (0, 2)]
    assert near(timeless(found[::2]), wanted)
    assert list(found[1]) == ["error"]
    assert "expected a JPEG" in found[1]["error"]
    assert found[1]["error"].isprintable()


BAD = {
    "nothing": b"",
    "text": b"no image",
    "a cut JPEG": saved(np.zeros((90, 90, 3), np.uint8), "JPEG")[:-80],
    "a cut PNG": saved(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8), "PNG")[:-3000],
    "too many pixels": saved(Image.new("RGB", (101, 100)), "PNG"),
    "scans without end": many_scans(10_000),
    "a bomb": png_file(60_000, 60_000, 8, 2, b""),
    "PDF": b"%PDF-1.7\n" + bytes(900),
    "zeros": bytes(100_000),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(900),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_a_bad_image_is_one_line_and_422(server, data):
    for status, found in (server.predict(data), server.predict(*form(("x", data)))):
        assert status == 422
        (record,) = found if isinstance(found, list) else [found]
        assert set(record) == {"image", "error"}
        assert record["error"].isprintable()


CUT, TYPE = form(("a.png", bytes(1000)))
FORMS = {
    "cut": (CUT[:-300], TYPE),
    "cut before its end": (CUT[:-8], TYPE),
    "no boundary": (CUT, {"Content-Type": "multipart/form-data"}),
    "a boundary too long": (CUT, {"Content-Type": "multipart/form-data; boundary=" + "b" * 3000}),
    "another boundary": (CUT, {"Content-Type": "multipart/form-data; boundary=another"}),
    "empty": (b"", TYPE),
    "no file": (CUT.replace(b"; filename", b"; title"), TYPE),
    "no name": (CUT.replace(b"; name", b"; title"), TYPE),
    "a huge header": (CUT.replace(b'"image"', b'"' + b"x" * 150_000 + b'"'), TYPE),
    "many headers": (CUT.replace(b"\r\n\r\n", b"\r\nX: y" * 30_000 + b"\r\n\r\n"), TYPE),
    "many files": form(*[("", b"")] * (IMAGES + 1)),
    "many fields": (b'--b0undary\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n' * 2000, TYPE),
    **{
        f"the charset {name!r}": (CUT, {"Content-Type": f"{TYPE['Content-Type']}; charset={name}"})
        for name in ("\xff", "undefined", "punycode", "hex")
    },
}


@pytest.mark.parametrize(("body", "headers"), FORMS.values(), ids=FORMS)
def test_a_bad_form_is_one_line_and_400(server, body, headers):
    status, found = server.predict(body, headers)
    assert (status, list(found)) == (400, ["error"])
    assert found["error"].isprintable()


def test_forms_of_noise_never_fail_the_server(server):
    rng = np.random.default_rng(5)
    for _ in range(100):
        body = bytearray(CUT)
        for _ in range(rng.integers(1, 8)):
            body[rng.integers(len(body) if rng.integers(2) else 120)] = rng.choice(list(b'\r\n-;="\0\xff:'))
        assert server.predict(bytes(body), TYPE)[0] in (400, 422)


@pytest.mark.parametrize("body", [bytes(200_001), (bytes(1000) for _ in range(300))], ids=["declared", "chunked"])
def test_a_body_too_large_is_413(server, body):
    before = server.metric('mge_rejected_total{reason="size"}')
    status, found = server.predict(body)
    assert status == 413
    assert "expected at most 200,000 bytes" in found["error"]
    assert server.metric('mge_rejected_total{reason="size"}') == before + 1


def test_a_full_queue_is_503_and_takes_again_what_comes_later(server, files):
    held = [server.begin(files[0]) for _ in range(QUEUE)]
    wait_until(lambda: server.metric("mge_queue_images") == QUEUE)
    status, headers, found = server.request("POST", "/predict", files[1])
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "try again" in found["error"]
    assert server.request("GET", "/health")[0] == 200
    for _, finish in held[2:]:
        assert finish()[0] == 200
    assert server.predict(files[1])[0] == 200
    two = form(("a", files[0]), ("b", files[1]))
    third = [server.begin(files[0]) for _ in range(2)]
    wait_until(lambda: server.metric("mge_queue_images") == QUEUE - 1)
    assert server.predict(*two)[0] == 503  # one of the two images would have room
    for _, finish in [*held[:2], *third]:
        assert finish()[0] == 200
    assert server.predict(*two)[0] == 200


def test_a_client_that_goes_away_leaves_nothing(server, files):
    before = server.metric('mge_requests_total{status="499"}')
    connection, _ = server.begin(files[0])
    wait_until(lambda: server.metric("mge_queue_images") == 1)
    connection.close()
    wait_until(lambda: server.metric('mge_requests_total{status="499"}') == before + 1)


def test_what_a_client_waits_for_no_more_is_dropped(hasty):
    slow = saved(Image.new("L", (3000, 3000)), "PNG")
    before = hasty.metric('mge_requests_total{status="499"}')
    body, headers = form(*[("x", slow)] * 200)
    connection = http.client.HTTPConnection("127.0.0.1", hasty.port)
    connection.request("POST", "/predict", body, headers)
    wait_until(lambda: hasty.metric("mge_queue_images") == 200)
    connection.close()
    wait_until(lambda: hasty.metric('mge_requests_total{status="499"}') == before + 1)


def test_a_client_that_does_not_read_is_closed(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(ConnectionError):
            silent.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000_000)  # more than buffers hold


def test_a_slow_request_is_408_and_a_silent_connection_closed(hasty, files):
    connection, _ = hasty.begin(files[0])
    with connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
    for sent in (b"", b"POST /pre"):
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as silent:
            silent.sendall(sent)
            assert silent.recv(1000) == b""


def test_images_that_take_too_long_are_504_and_dropped(hasty, files):
    slow = saved(Image.new("L", (3000, 3000)), "PNG")
    before = hasty.metric("mge_batch_images_sum")
    status, found = hasty.predict(*form(*[("x", slow)] * 200))
    assert status == 504
    assert "send fewer images" in found["error"]
    wait_until(lambda: hasty.predict(files[0])[0] == 200)
    assert hasty.metric("mge_batch_images_sum") - before < 150


def test_a_response_waits_for_no_acknowledgment(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        connection.request("GET", "/health/live")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - start)
    connection.close()
    assert min(seconds[10:]) < 0.03  # Linux delays an acknowledgment by 40 ms


def test_counters_are_there_from_the_start(server):
    text = server.request("GET", "/metrics")[2]
    for name in ('swaps_total{outcome="refused"', 'rejected_total{reason="queue"', 'images_total{outcome="refused"'):
        assert f"mge_{name}}} " in text


def test_other_paths_and_methods_have_errors_as_json(server):
    assert server.request("GET", "/predict")[::2] == (405, {"error": "Method Not Allowed"})
    assert server.request("GET", "/docs")[::2] == (404, {"error": "Not Found"})
    assert "/predict" in server.request("GET", "/openapi.json")[2]["paths"]


@contextmanager
def load(server, files, clients=4):
    """Clients that ask without pause; a list that gets status and class name of each response."""
    found, done = [], threading.Event()

    def ask(number):
        while not done.is_set():
            try:
                status, record = server.predict(files[number])
                found.append((number, status, record.get("probability")))
            except OSError as error:
                found.append((number, error, None))
                return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_bundles_are_swapped_under_load_and_a_bad_one_is_refused(server, plan, tiny, files, tmp_path):
    olds = [server.predict(data)[1]["probability"] for data in files[:4]]
    new = tmp_path / "new.plan"
    with load(server, files) as found:
        for outcome, count in (("done", 1), ("refused", 1), ("done", 2)):
            tiny.write_tiny_bundle(new, seed=1)
            if outcome == "refused":
                new.write_bytes(new.read_bytes()[:-1000])
            new.rename(plan)
            server.signal("SIGHUP")
            wait_until(lambda name=f'mge_swaps_total{{outcome="{outcome}"}}', count=count: server.metric(name) == count)
            enough = len(found) + 20
            wait_until(lambda enough=enough: len(found) > enough)
    assert {status for _, status, _ in found} == {200}
    news = [server.predict(data)[1]["probability"] for data in files[:4]]
    assert olds != news
    assert all(
        probability in (pytest.approx(olds[n], abs=1e-4), pytest.approx(news[n], abs=1e-4))
        for n, _, probability in found
    )
    refused = [line for line in server.log.splitlines() if "refused" in line]
    assert len(refused) == 1
    assert "the one before goes on: cannot " in refused[0]


def test_a_bundle_overwritten_in_place_is_no_longer_healthy_until_it_is_opened_again(copy, files):
    with Server(copy) as server:
        assert server.ready().predict(files[0])[0] == 200
        copy.write_bytes(copy.read_bytes())
        status, found = server.predict(files[0])
        assert status == 500
        assert str(copy) not in found["error"]
        assert f"{copy} was overwritten while it was open" in server.log
        assert server.request("GET", "/health")[::2] == (503, {"status": "failing"})
        server.signal("SIGHUP")
        server.ready()
        assert server.predict(files[0])[0] == 200


def test_a_chain_that_hangs_is_not_healthy_until_it_goes_on_or_is_replaced(bundle_path, files, tmp_path):
    gate = (
        "import pathlib, threading; from mge_runtime.pipeline import Pipeline; run = Pipeline.predict_prepared; "
        f"hangs = lambda: 'mge-run' in threading.current_thread().name and pathlib.Path('{tmp_path}/hang').exists(); "
        "wait = lambda: all(iter(lambda: hangs() and serve.time.sleep(0.02) is None, False)); "
        "Pipeline.predict_prepared = lambda *a, **k: wait() and run(*a, **k)"
    )
    (tmp_path / "hang").touch()
    with Server(bundle_path, "--timeout", 0.5, "--streams", 1, before=gate) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.ready().port)
        connection.request("POST", "/predict", files[0])
        wait_until(lambda: server.metric("mge_batch_images_sum") == 1)
        connection.close()  # a hang is noticed where nobody waits for its end, too
        wait_until(lambda: server.request("GET", "/health")[::2] == (503, {"status": "failing"}))
        assert server.predict(files[0])[0] == 504
        assert "error: a run of the chain goes on for more than 0.5 s" in server.log
        for count in (1, 2):  # the bundle that hangs is replaced all the same
            server.signal("SIGHUP")
            wait_until(lambda count=count: server.metric('mge_swaps_total{outcome="done"}') == count)
            server.ready()
            assert server.predict(files[0])[0] == 504
            wait_until(lambda: server.request("GET", "/health")[0] == 503)
        (tmp_path / "hang").unlink()
        server.ready()


def test_a_signal_to_swap_is_no_end_before_there_is_a_bundle(bundle_path):
    with Server(bundle_path, before="serve.import_library = lambda *_: serve.signal.raise_signal(1)") as server:
        server.ready()


def test_a_request_that_is_no_http_is_400_and_harms_nobody(server, files):
    for head in (
        b"\0\1\2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head)
            assert connection.recv(1000)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")
    assert server.predict(files[0])[0] == 200


def test_ready_after_the_first_bundle_is_warm_and_stopped_without_losing_a_request(bundle_path, files):
    gate = (
        "from mge_runtime.pipeline import Pipeline; opened = Pipeline.open; "
        "Pipeline.open = lambda *a, **k: input() or opened(*a, **k)"
    )
    with Server(bundle_path, before=gate) as server:
        assert server.request("GET", "/health/live")[::2] == (200, {"status": "live"})
        assert server.request("GET", "/health")[::2] == (503, {"status": "opening the bundle"})
        status, headers, found = server.request("POST", "/predict", files[0])
        assert (status, headers["Retry-After"]) == (503, "1")
        assert found == {"error": "the bundle is still being opened; try again"}
        server.process.stdin.write("\n")
        server.process.stdin.flush()
        server.ready()
        assert server.request("GET", "/health")[2]["status"] == "ready"
        with load(server, files) as found:
            wait_until(lambda: len(found) > 20)
            held = [server.begin(data) for data in files]
            wait_until(lambda: server.metric("mge_queue_images") >= len(held))
            server.signal("SIGTERM")
            time.sleep(0.3)
            for _, finish in held:
                assert finish()[0] == 200
            assert server.process.wait(30) == 0
        ends = [status for _, status, _ in found if not isinstance(status, OSError)]
        assert set(ends) == {200}
        assert "Traceback" not in server.log


def test_a_signal_does_not_wait_for_a_bundle_that_is_being_opened(bundle_path):
    gate = "from mge_runtime.pipeline import Pipeline; Pipeline.open = lambda *a, **k: serve.time.sleep(300)"
    with Server(bundle_path, before=gate) as server:
        assert server.request("GET", "/health/live")[0] == 200
        server.signal("SIGTERM")
        assert server.process.wait(20) == 0
        wait_until(lambda: "stopped; what was still being opened" in server.log)


def test_a_second_signal_from_the_keyboard_gives_up_what_is_being_read(bundle_path, files):
    with Server(bundle_path) as server, server.ready().begin(files[0])[0]:
        wait_until(lambda: server.metric("mge_queue_images") == 1)
        server.signal("SIGINT")
        time.sleep(0.3)
        assert server.process.poll() is None
        server.signal("SIGINT")
        assert server.process.wait(20) == 1
        wait_until(lambda: server.log.endswith("stopped; requests that were given up: 1\n"))


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.jetson", "mge-serve.service"])
def test_the_examples_call_the_command_with_options_that_it_has(name):
    text = (Path(__file__).parents[2] / "examples/serve" / name).read_text()
    if name.startswith("Docker"):
        words = [w for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)", text, re.MULTILINE) for w in json.loads(line)]
    else:
        words = re.search(r"^ExecStart=(.*)", text, re.MULTILINE)[1].split()
    assert Path(words[0]).name == "mge-serve"
    given = main.make_context("mge-serve", words[1:]).params
    assert given["bundle"].endswith("/mge.plan")


def test_what_keeps_it_from_starting_is_one_line(bundle_path, tmp_path):
    assert "the file does not exist; check the name" in fails(main, tmp_path / "none.plan", "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}: " in fails(main, bundle_path, "--port", port)
    for host in ("no.such.host.invalid", "é" * 64):
        assert "port 0: " in fails(main, bundle_path, "--port", 0, "--host", host)
    found = run_without(["uvicorn"], "mge_runtime.cli.serve", bundle_path)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].endswith("install mge again, with its extra serve")
