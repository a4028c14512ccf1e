"""The HTTP service of one bundle: predictions, health, metrics, and a new bundle in its place while it runs."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from mge_runtime.batching import Batcher
from mge_runtime.errors import InputError, MGEError, brief, one_line
from mge_runtime.report import json_record

if TYPE_CHECKING:
    from mge_runtime.decode import ImageSource


_GRAY = np.full((64, 64, 3), 128, np.uint8)  # an image for runs that nobody asked for
_LONGEST_NAME = 150  # characters of a file's name that are repeated in JSON
_REASONS = ("opening", "size", "time", "form", "queue")
_CHARSETS = (b"utf-8", b"us-ascii", b"iso-8859-1")  # of names in forms; some of Python's codecs take hours, or raise
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # bounds of the latencies' histogram
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for; what is beyond is refused before it costs anything."""

    body: int = 16_000_000  # bytes of a request; `queue` of them are in memory at most
    images: int = 16  # of a request
    queue: int = 64  # images that were accepted and have no prediction yet; a request that is being read counts as one
    seconds: float = 30.0  # to read a request, and then to predict its images


class _Upload(bytes):
    """The bytes of one image; decoding errors call them by this name."""

    name: str

    def __new__(cls, data: bytes, name: str) -> _Upload:
        upload = super().__new__(cls, data)
        upload.name = name[:_LONGEST_NAME]
        return upload


class _FormInMemory(MultiPartParser):
    """A parser whose files stay in memory, where their size is bounded, and never reach the disk."""

    spool_max_size = sys.maxsize


class _Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, help: str, label: str, *values: object) -> Counter:
            found = Counter(name, help, [label], registry=registry)
            for value in values:  # shown from 0 on, or an alert would miss the first
                found.labels(value)
            return found

        self.requests = counter("mge_requests", "Requests to /predict by the status of their response.", "status", 500)
        self.rejected = counter("mge_rejected", "Requests refused by what they broke.", "reason", *_REASONS)
        self.images = counter("mge_images", "Images by what became of them.", "outcome", "predicted", "refused")
        self.seconds = Histogram(
            "mge_request_seconds", "From a request's headers to its response.", buckets=_SECONDS, registry=registry
        )
        self.batches = Histogram(
            "mge_batch_images", "Images in one run of the chain.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.queue = Gauge("mge_queue_images", "Images accepted and without a prediction yet.", registry=registry)
        self.swaps = counter("mge_swaps", "Bundles opened after the first, or refused.", "outcome", "done", "refused")


class Service:
    """One bundle behind HTTP; `app` is the ASGI application, `keep_loaded` runs beside it in the same event loop.

    Args:
        open_batcher: opens the bundle; gets what `Batcher` calls for each run. Called in a thread, again for each swap.
        limits: of requests.
        top_k: likeliest classes to report.
        say: is told in one line what happens to bundles.
    """

    def __init__(
        self,
        open_batcher: Callable[[Callable[[int], None]], Batcher],
        limits: Limits,
        *,
        top_k: int = 5,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._open_batcher = open_batcher
        self._limits = limits
        self._top_k = top_k
        self._say = say
        self._batcher: Batcher | None = None  # None: not yet open
        self._failing = False  # the last run of the chain failed
        self._closing: set[asyncio.Task[None]] = set()  # bundles that were replaced, and finish their images
        self._asked = asyncio.Event()
        self._stopping = False
        self._waiting = 0  # as `Limits.queue` counts; only the event loop's thread touches it
        self._metrics = _Metrics()
        # The pages that FastAPI offers load scripts from another host.
        self.app = app = FastAPI(title="mge-serve", version=version("mge"), docs_url=None, redoc_url=None)
        app.post("/predict", response_model=None, openapi_extra={"requestBody": _BODY})(self.predict)
        app.get("/health")(self.health)
        app.get("/health/live")(self.live)
        app.get("/metrics", response_model=None)(self.metrics)
        app.exception_handler(HTTPException)(_as_json)

    def reload(self) -> None:
        """Ask `keep_loaded` to open the bundle again."""
        self._asked.set()

    def stop(self) -> None:
        """Ask `keep_loaded` to close the bundle and return."""
        self._stopping = True
        self._asked.set()

    async def keep_loaded(self) -> None:
        """Open the bundle, again whenever `reload` was called, and close it after `stop`.

        A new bundle is opened, checked and warmed up while the old one predicts, takes over between two requests, and
        the old one is closed when its images are done. One that cannot be opened is refused, and the old one goes on.

        Raises:
            MGEError: the first bundle cannot be opened.
        """
        while not self._stopping:
            self._asked.clear()
            try:
                new = await asyncio.to_thread(self._open)
            except Exception as error:
                if self._batcher is None:
                    raise
                self._metrics.swaps.labels("refused").inc()
                self._say(f"error: the new bundle is refused, the one before goes on: {brief(error)}")
            else:
                old, self._batcher, self._failing = self._batcher, new, False
                pipeline = new.pipeline
                self._say(
                    f"ready: {len(pipeline.manifest.class_names)} classes, {pipeline.choice.backend} on "
                    f"{pipeline.choice.device}, at most {new.batch} images in a run, {pipeline.streams} at once"
                )
                if old is not None:  # in a task of its own: where it hangs, the next swap does not wait for it
                    self._metrics.swaps.labels("done").inc()
                    self._closing.add(task := asyncio.create_task(asyncio.to_thread(old.close)))
                    task.add_done_callback(self._closing.discard)
            await self._asked.wait()
        if self._batcher is not None:
            await asyncio.gather(*self._closing, asyncio.to_thread(self._batcher.close))

    async def predict(self, request: Request) -> Response:
        """Classify an image, the body, or several, files of a form; JSON as of `mge-run --json`, for a form a list."""
        start, status = time.monotonic(), 500
        try:
            response = await self._predict(request)
            status = response.status_code
            return response
        except HTTPException as refused:
            status = refused.status_code
            raise
        except ClientDisconnect:
            status = 499  # nobody reads it; the name that nginx gave to this end
            return Response(status_code=status)
        finally:
            self._metrics.requests.labels(status).inc()
            self._metrics.seconds.observe(time.monotonic() - start)

    async def health(self) -> JSONResponse:
        """Whether predictions are made; 503 until the first bundle is warm, and when runs of the chain fail or hang."""
        if self._batcher is None:
            return JSONResponse({"status": "opening the bundle"}, 503)
        if self._failing and not self._hangs(self._batcher):
            with suppress(Exception):  # who asks may send nothing to a service that fails, so this makes the next run
                await self._found([_GRAY])
        if self._failing or self._hangs(self._batcher):
            return JSONResponse({"status": "failing"}, 503)
        pipeline = self._batcher.pipeline
        choice = {"backend": pipeline.choice.backend, "device": pipeline.choice.device}
        return JSONResponse({"status": "ready", "classes": len(pipeline.manifest.class_names), **choice})

    async def live(self) -> dict[str, str]:
        """Whether the process serves HTTP."""
        return {"status": "live"}

    async def metrics(self) -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _open(self) -> Batcher:
        """Open the bundle and predict a gray image, alone and in a full batch: the first runs take longest."""
        batcher = self._open_batcher(self._metrics.batches.observe)
        try:
            for count in sorted({1, batcher.batch}):
                batcher.pipeline.predict_batch([_GRAY] * count)
        except BaseException:
            batcher.close()
            raise
        return batcher

    async def _predict(self, request: Request) -> Response:
        self._ready()
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limits.body:
            raise self._too_large(f"{int(declared):,} bytes")
        with ExitStack() as stack:
            self._admit(1, stack)
            try:
                uploads, is_form = await asyncio.wait_for(self._read(request), self._limits.seconds)
            except asyncio.TimeoutError:
                raise self._refusal(
                    "time", 408, f"the request was not read within {self._limits.seconds:g} s; send it faster"
                ) from None
            self._admit(len(uploads) - 1, stack)
            found = await _unless_gone(request, self._found(uploads))
        records = [json_record(upload.name, one, self._top_k) for upload, one in zip(uploads, found, strict=True)]
        refused = sum(isinstance(one, InputError) for one in found)
        self._metrics.images.labels("refused").inc(refused)
        self._metrics.images.labels("predicted").inc(len(found) - refused)
        return JSONResponse(records if is_form else records[0], 422 if refused == len(found) else 200)

    def _ready(self) -> Batcher:
        if self._batcher is None:
            raise self._refusal("opening", 503, "the bundle is still being opened; try again")
        return self._batcher

    async def _read(self, request: Request) -> tuple[list[_Upload], bool]:
        """The images of a request, and whether they came in a form."""
        stream = self._bounded(request)
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return [_Upload(b"".join([chunk async for chunk in stream]), "the request body")], False
        charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
        if charset.lower() not in _CHARSETS:
            raise self._refusal("form", 400, "the form names a charset that is not read; expected UTF-8, or none")
        limit = self._limits.images
        try:
            form = await _FormInMemory(request.headers, stream, max_files=limit, max_fields=limit).parse()
        except (MultiPartException, FormParserError) as error:  # older Starlettes let the second pass
            message = getattr(error, "message", "it is no multipart data")
            raise self._refusal("form", 400, f"cannot read the form: {one_line(message)}") from error
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        uploads = [_Upload(await file.read(), file.filename or "unnamed") for file in files]
        if not uploads:
            raise self._refusal(
                "form", 400, "the form holds no file; expected one or several images: curl -F image=@photo.jpg"
            )
        return uploads, True

    async def _bounded(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The body's bytes as they come, as long as they are not too many."""
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self._limits.body:
                raise self._too_large("more")
            yield chunk

    async def _found(self, uploads: Sequence[ImageSource]) -> list[Any]:
        """A prediction or an `InputError` for each image."""
        batcher = self._ready()  # closed by no swap before the next await
        futures = [asyncio.wrap_future(batcher.submit(upload)) for upload in uploads]
        try:
            _, late = await asyncio.wait(futures, timeout=self._limits.seconds)
        finally:  # what has not begun is dropped; asyncio would log an error that nobody asks for
            errors = [None if future.cancel() else future.exception() for future in futures]
        is_current = batcher is self._batcher  # else a new bundle has taken over
        if late:
            if self._hangs(batcher):
                self._say(f"error: a run of the chain goes on for more than {self._limits.seconds:g} s")
            line = f"no prediction within {self._limits.seconds:g} s; try again, or send fewer images"
            raise self._refusal("time", 504, line)
        for error in errors:
            if error is None or isinstance(error, InputError):
                continue
            self._failing = self._failing or is_current
            self._say(f"error: {one_line(error) if isinstance(error, MGEError) else brief(error)}")
            if isinstance(error, MGEError):  # it may name paths, which are nobody's business
                raise HTTPException(500, "the prediction failed; the service's log says why") from error
            raise error  # a defect, which shows its traceback
        if is_current and not all(errors):
            self._failing = False
        return [error or future.result() for error, future in zip(errors, futures, strict=True)]

    def _hangs(self, batcher: Batcher) -> bool:
        """Whether a single run takes longer than a request may."""
        return batcher.running > self._limits.seconds

    def _admit(self, count: int, stack: ExitStack) -> None:
        """Count images as waiting until the stack is closed."""
        if self._waiting + count > self._limits.queue:
            raise self._refusal(
                "queue", 503, f"{self._waiting} of {self._limits.queue} images are waiting already; try again"
            )
        self._wait_for(count)
        stack.callback(self._wait_for, -count)

    def _wait_for(self, count: int) -> None:
        self._waiting += count
        self._metrics.queue.set(self._waiting)

    def _too_large(self, found: str) -> HTTPException:
        return self._refusal(
            "size", 413, f"the request holds {found}; expected at most {self._limits.body:,} bytes: send fewer images"
        )

    def _refusal(self, reason: str, status: int, line: str) -> HTTPException:
        self._metrics.rejected.labels(reason).inc()
        return HTTPException(status, line, {"Retry-After": "1"} if status == 503 else None)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """What the work gives; it is cancelled where the client, whose request has been read, goes away before.

    Raises:
        ClientDisconnect: it went away.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _as_json(request: Request, error: HTTPException) -> JSONResponse:
    """Every refusal as JSON of one form, that of an image which cannot be read."""
    del request
    return JSONResponse({"error": one_line(str(error.detail))}, error.status_code, error.headers)
