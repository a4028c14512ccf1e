"""What every test may rely on."""

import signal


def pytest_configure():
    """Hear signals: `&` in a script starts us with SIGINT ignored, `nohup` with SIGHUP, and children inherit it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
