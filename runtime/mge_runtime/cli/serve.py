"""`mge-serve`: predictions over HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mge_runtime.cli.common import (
    Number,
    Opening,
    at_most_cpus,
    batch_option,
    exit_option,
    opening_options,
    reports_errors,
    say,
    verbose_option,
)
from mge_runtime.errors import MGEError, brief
from mge_runtime.machine import cpu_count, import_library, install_extra

if TYPE_CHECKING:
    from uvicorn import Server

    from mge_runtime.batching import Batcher
    from mge_runtime.chain import Exit
    from mge_runtime.server import Service

_LIBRARIES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
_MOST_DECODERS = 4  # each may need the memory of one image
_LAST = 2.0  # seconds at a stop for work that no request waits for
_IDLE = 10.0  # seconds that a connection may stay open without a whole request


@contextmanager
def _no_hangup() -> Generator[None]:
    """Ignore SIGHUP until there is a bundle to replace."""
    if not hasattr(signal, "SIGHUP"):  # Windows
        yield
        return
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", default="mge.plan")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all of them.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="0: any that is free.")
@batch_option(8)
@click.option(
    "--wait-ms",
    type=Number(min=0, max=10_000),
    default=5,
    show_default=True,
    help="How long an image waits at most for others that are being decoded, to be predicted with them.",
)
@click.option("--max-body", type=Number(min=0.001), default=16, show_default=True, help="Megabytes of a request.")
@click.option("--max-images", type=click.IntRange(min=1), default=16, show_default=True, help="Images of a request.")
@click.option(
    "--queue", type=click.IntRange(min=1), default=64, show_default=True, help="Images accepted at once; beyond is 503."
)
@click.option(
    "--timeout",
    type=Number(min=0.001, max=3600),
    default=30,
    show_default=True,
    help="Seconds to read a request (408), and then to predict its images (504).",
)
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Likeliest classes to report.")
@opening_options
@click.option(
    "--streams",
    type=click.IntRange(min=1),
    callback=at_most_cpus,
    help="Batches computed side by side on a CPU.  [default: one for each processor]",
)
@exit_option
@verbose_option
@click.version_option(package_name="mge")
@reports_errors
@_no_hangup()
def main(
    bundle: str,
    host: str,
    port: int,
    batch: int,
    wait_ms: float,
    max_body: float,
    max_images: int,
    queue: int,
    timeout: float,
    top_k: int,
    opening: Opening,
    streams: int | None,
    exit_at: Exit,
    verbose: int,  # noqa: ARG001 - the option's callback has seen to it
) -> None:
    """Serve predictions of BUNDLE: POST an image, or a form of several, to /predict; GET /health, /metrics.

    SIGTERM finishes what was accepted and stops. SIGHUP opens the file at BUNDLE again: it takes over once it is warm;
    one that cannot be opened is refused, and the one before goes on. There is no TLS and no password: put a proxy in
    front where others than you can reach the port.
    """
    for library in _LIBRARIES:
        import_library(library, install_extra("serve"))
    from uvicorn import Config, Server

    from mge_runtime.batching import Batcher
    from mge_runtime.pipeline import Pipeline
    from mge_runtime.server import Limits, Service

    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it would warn of each bad form

    def open_batcher(on_run: Callable[[int], None]) -> Batcher:
        pipeline = Pipeline.open(bundle, streams=streams or "auto", exit=exit_at, **opening)
        decoders = min(cpu_count(), _MOST_DECODERS)
        return Batcher(pipeline, batch=batch, wait=wait_ms / 1e3, decoders=decoders, on_run=on_run)

    limits = Limits(int(max_body * 1e6), min(max_images, queue), queue, timeout)
    service = Service(open_batcher, limits, top_k=top_k, say=say)
    with _listening(host, port) as listener:
        address = listener.getsockname()
        say(f"listening on http://{f'[{host}]' if ':' in host else host}:{address[1]}, opening {bundle}")
        config = Config(
            service.app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(2 * timeout) + 5,
        )
        asyncio.run(_serve(service, Server(config), listener))


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything takes long.

    Raises:
        MGEError: there is no such address here, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host.encode("idna"), port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # the second: a name that is none
        reason = getattr(error, "strerror", None) or brief(error)
        raise MGEError(
            f"cannot listen on {host}, port {port}: {reason}; expected an address of this machine and a port "
            "that nobody has: name others with --host and --port"
        ) from error
    # Connections inherit it. asyncio sets it only on sockets that name their protocol, which these do not, and a
    # response of two packets would wait 40 ms for the client's delayed acknowledgment.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def _serve(service: Service, server: Server, listener: socket.socket) -> None:
    """Serve until a signal asks to stop, or the first bundle cannot be opened."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn's own handler, which else would end by raising them again
        signal.signal(number, server.handle_exit)
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, service.reload)
    loaded = asyncio.create_task(service.keep_loaded())
    loaded.add_done_callback(lambda _: setattr(server, "should_exit", True))
    idle = asyncio.create_task(_close_idle(server))
    await server.serve(sockets=[listener])
    idle.cancel()
    if lost := len(server.server_state.tasks):  # a second Ctrl-C
        say(f"stopped; requests that were given up: {lost}")
        os._exit(1)  # their cancellation would be logged as a defect
    service.stop()
    if not (await asyncio.wait({loaded}, timeout=_LAST))[0]:
        say("stopped; what was still being opened or computed, no request waited for")
        os._exit(0)  # no thread can be stopped
    await loaded


async def _close_idle(server: Server) -> None:
    """Close connections that bring no whole request, or do not read: uvicorn waits for both without end."""
    idle: dict[tuple[Any, Any], float] = {}
    while True:
        await asyncio.sleep(_IDLE / 10)
        now = time.monotonic()
        connections: list[Any] = list(server.server_state.connections)
        waiting = [
            (c, c.cycle) for c in connections if c.cycle is None or c.cycle.response_complete or c.flow.write_paused
        ]
        idle = {pair: idle.get(pair, now) for pair in waiting}
        for (connection, _), since in idle.items():
            if now - since > _IDLE:
                connection.transport.abort()  # `close` would wait for a reader


if __name__ == "__main__":
    main(prog_name="mge-serve")
