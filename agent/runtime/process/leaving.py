"""A command beside a task that may be left: it goes on though the agent ends.

The agent starts a process that stands before the command's helper (`stand_before`) and has the
helper fork from it. For as long as the command is not left, the two end with the agent. At SIGUSR1
the helper goes on alone (`follow`): it takes what the command prints, so that a full pipe, or one
that nobody reads, does not end it, and ends the command with its task.

Standard library only, as supervisor.py, of which this is a part.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # C half of `signal`: see inside.py
import contextlib
import os
import select
from collections.abc import Callable
from typing import NoReturn

from agent.runtime.process import inside as inside
from agent.runtime.process.inside import PR_SET_PDEATHSIG, Plan

LEAVE = _signal.SIGUSR1
CHUNK_BYTES = 65_536


def stand_before(plan_fd: int, drains: list[int]) -> int:
    """Forks; returns in the new process, with a descriptor on which it says that it goes on alone.
    This one ends with it, with its exit code, or when it is left.
    """
    said, says = os.pipe2(os.O_CLOEXEC)
    standing = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(said)
        inside.prctl(PR_SET_PDEATHSIG, _signal.SIGTERM)
        if os.getppid() != standing:  # it ended before that
            os._exit(1)
        return says

    def hand_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(helper, number)

    for number in (_signal.SIGTERM, LEAVE):
        _signal.signal(number, hand_on)
    # Not before, for this tells the agent that the command has begun.
    os.close(plan_fd)
    os.close(says)
    for handle in drains:
        os.close(handle)
    _let_go()
    if os.read(said, 1):
        os._exit(0)
    os._exit(inside.exit_code(os.waitpid(helper, 0)[1]))


class Outputs:
    """What is needed to go on alone; made before the task's namespaces are entered."""

    def __init__(self, plan: Plan, says: int) -> None:
        self._says = says
        self._task = os.pidfd_open(plan["pid"])
        # The other ends of the command's outputs, which the agent has too.
        self._drains: list[int] = plan["drains"]
        for handle in self._drains:
            os.set_inheritable(handle, False)

    def follow(self, main: int, plan_fd: int, end: Callable[[], None]) -> NoReturn:
        """Waits for the command in this process, and goes on alone when it is left; `end` ends
        it.
        """
        try:
            _signal.signal(LEAVE, self._leave)
            _let_go()
            os.close(plan_fd)  # tells the agent that the command has begun, and may be left
            # Not taken note of yet: its number must stay its own for as long as it may be left.
            os.waitid(os.P_PID, main, os.WEXITED | os.WNOWAIT)
            _signal.signal(LEAVE, _signal.SIG_IGN)
            code = inside.exit_code(os.waitpid(main, 0)[1])
        except _Left:
            if self._task_ended_first(main):
                end()
            code = 0
        os._exit(code)

    def _leave(self, *_: object) -> None:
        _signal.signal(LEAVE, _signal.SIG_IGN)
        inside.prctl(PR_SET_PDEATHSIG, 0)
        os.write(self._says, b"l")
        raise _Left

    def _task_ended_first(self, main: int) -> bool:
        """Goes on until the task has ended, or else the command and all that writes where it
        wrote.
        """
        poll = select.poll()
        poll.register(self._task, select.POLLIN)
        open_ends = set(self._drains)
        ended = os.pidfd_open(main)
        for handle in (*self._drains, ended):
            poll.register(handle, select.POLLIN)
        while open_ends or ended >= 0:
            for handle, _ in poll.poll():
                if handle == self._task:
                    # Its number is its own only for as long as nobody has taken note of its end.
                    return ended >= 0
                if handle == ended:
                    poll.unregister(ended)
                    ended = -1
                    # The task's own end waits for it where the two share a PID namespace.
                    os.waitpid(main, 0)
                elif not _drained(handle):
                    poll.unregister(handle)
                    open_ends.discard(handle)
        return False


class _Left(Exception):
    pass


def _drained(handle: int) -> bool:
    """Takes what there is; False: no more will come."""
    try:
        return bool(os.read(handle, CHUNK_BYTES))
    except BlockingIOError:
        return True
    except OSError:  # a terminal whose other side is closed
        return False


def _let_go() -> None:
    """The standard streams are the command's alone."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
