"""An `etcd` whose disk can be made slow: every fsync and fdatasync of it waits for as many
milliseconds as the file `delay` beside the command says.

Installed as the command `etcd` first in a host's PATH, by `install`. Nothing on this machine delays
a disk as such, so the calls themselves are held back: a seccomp filter hands them to this
process' child, which lets them go on when the time is over (seccomp_unotify(2)). Everything else of
the program, a static one too, runs as ever; its process is the one that was started. x86-64 and
arm64, Linux 5.5 or later, root.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import platform
import select
import shutil
import socket
import struct
import sys
import threading
import time
from pathlib import Path

# seccomp, fsync, fdatasync
_NUMBERS = {"x86_64": (317, 74, 75), "aarch64": (277, 82, 83)}
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_REQUEST_BYTES = 80
_CONTINUE = 1


def install(folder: Path) -> Path:
    """Makes the command below `folder`, which goes first into a host's PATH; the file to write
    milliseconds into.
    """
    folder.mkdir(exist_ok=True)
    command = folder / "etcd"
    # Without what else is put before programs: where a clock is jumped it is swarmd's alone.
    program = f"env --unset=LD_PRELOAD {sys.executable} -S {Path(__file__).resolve()}"
    command.write_text(f'#!/bin/sh\nexec {program} "$0" "$@"\n')
    command.chmod(0o755)
    delay = folder / "delay"
    delay.write_text("0")
    return delay


def main(argv: list[str]) -> None:
    wrapper = Path(argv[0])
    others = [p for p in os.environ["PATH"].split(":") if Path(p) != wrapper.parent]
    real = shutil.which("etcd", path=":".join([*others, "/usr/sbin", "/usr/local/bin"]))
    if real is None:
        sys.exit("there is no etcd beside this wrapper")
    ours, theirs = socket.socketpair()
    # The supervisor is a child of a child, so that whoever started etcd has one process to wait for.
    child = os.fork()
    if child == 0:
        ours.close()
        if os.fork() == 0:
            _supervise(theirs, wrapper.parent / "delay")
        os._exit(0)
    os.waitpid(child, 0)
    theirs.close()
    listener = _filter()
    socket.send_fds(ours, [b"x"], [listener])
    ours.close()
    os.close(listener)
    os.execv(real, [real, *argv[1:]])


def _filter() -> int:
    """From here on the two calls of this process are asked for at the descriptor that it returns."""
    seccomp, fsync, fdatasync = _NUMBERS[platform.machine()]
    steps = [
        (_LOAD, 0, 0, 0),  # the call's number
        (_EQUAL, 1, 0, fsync),
        (_EQUAL, 0, 1, fdatasync),
        (_RETURN, 0, 0, _NOTIFY),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    code = ctypes.create_string_buffer(program, len(program))
    known = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    listener = int(libc.syscall(seccomp, _SET_MODE_FILTER, _NEW_LISTENER, known))
    if listener < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
    return listener


def _supervise(channel: socket.socket, delay: Path) -> None:
    _, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(4))
    listener = array.array("i", ancillary[0][2])[0]
    while True:
        request = bytearray(_REQUEST_BYTES)
        try:
            fcntl.ioctl(listener, _RECEIVE, request)
        except InterruptedError:
            continue
        except FileNotFoundError:
            # The process is gone, or the thread that asked: only the first ends this one.
            if not _alive(listener):
                os._exit(0)
            continue
        (asked,) = struct.unpack_from("Q", request)
        # A thread for each: a disk that is slow serves several at once.
        threading.Thread(target=_let_go, args=(listener, asked, delay), daemon=True).start()


def _alive(listener: int) -> bool:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return not any(event & select.POLLHUP for _, event in poll.poll(0))


def _let_go(listener: int, asked: int, delay: Path) -> None:
    time.sleep(int(delay.read_text() or 0) / 1000)
    with contextlib.suppress(FileNotFoundError):  # it was killed meanwhile
        fcntl.ioctl(listener, _SEND, struct.pack("QqiI", asked, 0, 0, _CONTINUE))


if __name__ == "__main__":
    main(sys.argv[1:])
