"""What happens between fork and exec of a task's main process: namespaces, mounts, network, user,
limits.

Runs in a fresh interpreter without site-packages, beside supervisor.py: standard library only,
and of that only what starts quickly (`_socket` and `_signal` instead of `socket` and `signal`,
which pull in enum and selectors). Each step's failure is an `OSError` with the step's name, which
travels to the agent. Order matters and is told where it does. Sources: namespaces(7),
pivot_root(2), capabilities(7), netdevice(7), and what runc does for the same fields.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # C half of `signal`: 4 ms cheaper to import
import _socket
import contextlib
import ctypes
import fcntl
import os
import resource
import stat
import struct
from typing import Any

Plan = dict[str, Any]  # made by plan.py, read here only; marshal carries it, so plain types

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 16384
MS_PRIVATE, MS_SLAVE = 1 << 18, 1 << 19
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAP_LAST = 40  # CAP_CHECKPOINT_RESTORE, Linux 5.9
SIGKILL = 9
TIOCSCTTY = 0x540E

# A folder with more entries is not rebuilt to make room for a mount point in it.
MIMIC_ENTRIES_MAX = 2_000

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    _call("prctl", _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def unshare(flags: int) -> None:
    _call("unshare", _libc.unshare(flags))


def setns(fd: int) -> None:
    _call("setns", _libc.setns(fd, 0))


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _call(f"mount on {target}", result)


# ------------------------------------------------------------------ the task's view of the files


def build_root(plan: Plan) -> None:
    """Gives this process, which has its own mount namespace, a root of its own: the host's files,
    with private /proc, /tmp and /dev/shm, and the task's mounts and files.

    The root is a tmpfs onto which the host's top-level folders are bound, so that a mount point
    such as /data can be made without making it on the host.
    """
    mount("", "/", flags=MS_REC | MS_SLAVE)
    sources = [
        os.open(m["source"], os.O_PATH | os.O_CLOEXEC) if m["type"] == "bind" else -1
        for m in plan["mounts"]
    ]
    root = plan["root"]
    mount("swarm", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for entry in os.scandir("/"):
        _mirror(entry, root, skip=("proc", "tmp"))
    for name, mode in (("proc", 0o755), ("tmp", 0o1777), (".old", 0o700), (".files", 0o700)):
        os.mkdir(f"{root}/{name}")
        os.chmod(f"{root}/{name}", mode)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    _call("pivot_root", _libc.pivot_root(b".", b".old"))
    os.chdir("/")
    mount("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    if os.path.isdir("/dev/shm"):
        size = f",size={plan['shm_size']}" if plan["shm_size"] else ""
        mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"mode=1777{size}")
    if os.path.isdir("/dev/mqueue"):
        mount("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    free = {"/", "/tmp", "/dev/shm"}
    for path in plan["hide"]:
        if os.path.isdir(path):
            mount("hidden", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755")
            free.add(os.path.realpath(path))
    for m, source in zip(plan["mounts"], sources, strict=True):
        _mount_one(m, source, free)
    for number, file in enumerate(plan["files"]):
        _show_file(f"/.files/{number}", file, free)
    # The mounts keep the files; not earlier: what has no name cannot be mirrored by `_mimic`.
    for name in os.listdir("/.files"):
        os.unlink(f"/.files/{name}")
    os.rmdir("/.files")
    _call("umount", _libc.umount2(b"/.old", MNT_DETACH))
    os.rmdir("/.old")
    if plan["read_only"]:
        asked = {os.path.realpath(m["target"]) for m in plan["mounts"]}
        _freeze(asked | {"/proc", "/dev", "/tmp", "/sys"})


def _mirror(entry: os.DirEntry[str], folder: str, *, skip: tuple[str, ...] = ()) -> None:
    """Shows one entry of another folder in this one."""
    place = f"{folder}/{entry.name}"
    if entry.name in skip:
        return
    if entry.is_symlink():
        os.symlink(os.readlink(entry.path), place)
    elif entry.is_dir():
        os.mkdir(place)
        mount(entry.path, place, flags=MS_BIND | MS_REC)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        mount(entry.path, place, flags=MS_BIND)


def _mount_one(m: Plan, source: int, free: set[str]) -> None:
    target = m["target"]
    if m["type"] == "tmpfs":
        _make_mountpoint(target, free, folder=True)
        mount("tmpfs", target, "tmpfs", m["flags"], m["options"])
    else:
        # Which kind of thing it is decides what its mount point must be.
        _make_mountpoint(target, free, folder=os.path.isdir(f"/proc/self/fd/{source}"))
        flags = MS_BIND | (MS_REC if m["recursive"] else 0)
        mount(f"/proc/self/fd/{source}", target, flags=flags)
        os.close(source)
        if m["private"]:
            mount("", target, flags=MS_PRIVATE | MS_REC)
        if m["read_only"]:
            _remount_read_only(target, below=m["recursive"])
    free.add(os.path.realpath(target))


def _show_file(staged: str, file: Plan, free: set[str]) -> None:
    """Writes a secret or config into the root's own memory and binds it to its place."""
    handle = os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(file["data"])
    os.chown(staged, file["uid"], file["gid"])
    os.chmod(staged, file["mode"])
    target = file["target"]
    _make_mountpoint(target, free, folder=False)
    mount(staged, target, flags=MS_BIND)
    mount("", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _make_mountpoint(path: str, free: set[str], *, folder: bool) -> None:
    """Makes sure that something can be mounted on `path`, without making anything on the host.

    Where it is missing, the deepest folder that exists is covered by a tmpfs that shows the same
    entries, and in which the rest of the path is made. `free` are the mount points in which things
    may be made directly: tmpfs of ours, and what the user mounted (as Docker does there).
    """
    if os.path.exists(path):
        if os.path.isdir(path) != folder:
            kind = "folder" if folder else "file"
            raise OSError(20, f"{path}: a {kind} cannot be mounted on something of another kind")
        return
    parent = os.path.dirname(path)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    parent = os.path.realpath(parent)
    inside = max(
        (line[4] for line in _mounts() if (parent + "/").startswith(line[4].rstrip("/") + "/")),
        key=len,
    )
    if inside not in free:
        _mimic(parent)
        free.add(parent)
    if folder:
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))


def _mimic(folder: str) -> None:
    entries = list(os.scandir(folder))
    if len(entries) > MIMIC_ENTRIES_MAX:
        raise OSError(22, f"{folder}: has too many entries to add a mount point; make it by hand")
    real = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    mode = os.stat(folder).st_mode & 0o7777
    mount("swarm-mimic", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o}")
    for entry in os.scandir(f"/proc/self/fd/{real}"):
        _mirror(entry, folder)
    os.close(real)


def _mounts() -> list[list[str]]:
    """/proc/self/mountinfo, last mounted first; field 4 is the mount point, 5 its options."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.split() for line in file][::-1]
    for line in lines:
        for escape in ("\\040", "\\011", "\\012", "\\134"):  # space, tab, newline, backslash
            line[4] = line[4].replace(escape, chr(int(escape[1:], 8)))
    return lines


def _remount_read_only(path: str, *, below: bool) -> None:
    for line in _mounts():
        point = line[4]
        if point == path or (below and point.startswith(path.rstrip("/") + "/")):
            kept = {"nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC}
            flags = sum(kept.get(word, 0) for word in line[5].split(","))
            # Covered mounts cannot be reached any more; nothing can write through them either.
            with contextlib.suppress(FileNotFoundError):
                mount("", point, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | flags)


def _freeze(writable: set[str]) -> None:
    """Makes all mounts read-only but those named and what is below them."""
    for line in _mounts():
        point = line[4]
        if any(point == w or point.startswith(w + "/") for w in writable):
            continue
        _remount_read_only(point, below=False)


# ------------------------------------------------------------------ the task's network


def network_up(address: str, prefix: int, gateway: str) -> None:
    """Configures lo and, with an address, eth0 of this network namespace; by ioctl, because it
    needs no library.
    """
    with _Sock() as handle:
        _flags_up(handle, b"lo")
        if not address:
            return
        mask = struct.pack(">I", 0xFFFFFFFF << (32 - prefix) & 0xFFFFFFFF)
        ip = _socket.inet_aton
        fcntl.ioctl(handle, 0x8916, struct.pack("16s16s8x", b"eth0", _sockaddr(ip(address))))
        fcntl.ioctl(handle, 0x891C, struct.pack("16s16s8x", b"eth0", _sockaddr(mask)))
        _flags_up(handle, b"eth0")
        any_address = b"\0" * 4
        # struct rtentry on 64-bit Linux: default route through the gateway, RTF_UP | RTF_GATEWAY.
        entry = struct.pack(
            "L16s16s16sHhLLhPLLH6x",
            0,
            _sockaddr(any_address),
            _sockaddr(ip(gateway)),
            _sockaddr(any_address),
            3,
            *(0,) * 8,
        )
        fcntl.ioctl(handle, 0x890B, entry)


class _Sock:
    def __enter__(self) -> int:
        self._socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        return self._socket.fileno()

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def _sockaddr(address: bytes) -> bytes:
    return struct.pack("H2x4s8x", _socket.AF_INET, address)


def _flags_up(handle: int, name: bytes) -> None:
    request = fcntl.ioctl(handle, 0x8913, struct.pack("16sh22x", name, 0))
    flags: int = struct.unpack("16sh22x", request)[1]
    fcntl.ioctl(handle, 0x8914, struct.pack("16sh22x", name, flags | 1))


# ------------------------------------------------------------------ becoming the task


def enter_namespaces(plan: Plan) -> None:
    """In the child that is process 1 of a new PID namespace: the other namespaces."""
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
    unshare(flags | (0 if plan["host_network"] else CLONE_NEWNET))


def settle_namespaces(plan: Plan) -> None:
    """Fills the new namespaces, once the agent has put the network device in."""
    os.umask(0o022)
    if plan["hostname"]:
        _socket.sethostname(plan["hostname"])
    if plan["domainname"]:
        name = plan["domainname"].encode()
        _call("setdomainname", _libc.setdomainname(name, len(name)))
    if not plan["host_network"]:
        network_up(plan["address"], plan["prefix"], plan["gateway"])
    build_root(plan)
    for key, value in plan["sysctls"].items():
        with open("/proc/sys/" + key.replace(".", "/"), "w", encoding="utf-8") as file:
            file.write(value)


def open_groups(paths: list[str]) -> list[int]:
    """Opens the cgroups' process lists while the host's files are still in sight."""
    return [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in paths]


def become(plan: Plan, stdio: tuple[int, int, int], groups: list[int]) -> None:
    """Turns this process into the task's command; returns only by raising."""
    os.setsid()
    for number in range(1, 65):
        with contextlib.suppress(OSError, ValueError):
            _signal.signal(number, _signal.SIG_DFL)
    for handle in groups:
        os.write(handle, b"0")  # 0: whoever writes
    if plan["oom_score_adj"] is not None:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(plan["oom_score_adj"]))
    for fd, wanted in zip(stdio, (0, 1, 2), strict=True):
        os.dup2(fd, wanted, inheritable=True)
    if plan["tty"]:
        fcntl.ioctl(0, TIOCSCTTY, 0)
    for limit, soft, hard in plan["rlimits"]:
        resource.setrlimit(limit, (soft, hard))
    os.umask(0o022)
    if plan["capabilities"] is not None:
        for capability in range(CAP_LAST + 1):
            if not plan["capabilities"] >> capability & 1:
                with contextlib.suppress(OSError):  # the kernel has fewer
                    prctl(PR_CAPBSET_DROP, capability)
    if plan["cwd_ours"]:
        os.chdir(plan["cwd"])  # below folders that the task's user may not enter
    if plan["uid"] is not None:
        for fd in (0, 1, 2):
            # So that /dev/stdout can be opened again by name; never /dev/null.
            if stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd):
                os.fchown(fd, plan["uid"], plan["gid"])
        os.setgroups(plan["groups"])
        os.setresgid(plan["gid"], plan["gid"], plan["gid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    # A change of user clears it, so it comes after.
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    if plan["no_new_privileges"]:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    if not plan["cwd_ours"]:
        os.chdir(plan["cwd"])
    os.execvpe(plan["argv"][0], plan["argv"], plan["env"])


def impersonate(plan: Plan) -> None:
    """Makes this process one that may do what the task may, without executing anything."""
    os.umask(0o022)
    if plan["uid"] is not None:
        os.setgroups(plan["groups"])
        os.setresgid(plan["gid"], plan["gid"], plan["gid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    # A change of user has cleared them; the bounding set counts only when something is executed.
    if plan["capabilities"] is not None and os.geteuid() == 0:
        # struct __user_cap_header_struct, version 3; two of effective, permitted, inheritable.
        low, high = plan["capabilities"] & 0xFFFFFFFF, plan["capabilities"] >> 32
        head = struct.pack("Ii", 0x20080522, 0)
        _call("capset", _libc.capset(head, struct.pack("6I", low, low, 0, high, high, 0)))
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    if plan["no_new_privileges"]:
        prctl(PR_SET_NO_NEW_PRIVS, 1)


def exit_code(status: int) -> int:
    """Docker's: the exit status, or 128 and the signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def run_init(main_pid: int) -> int:
    """Process 1 of the task's PID namespace: passes signals on, reaps, ends with the main process;
    the kernel then kills the rest.
    """

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(main_pid, number)

    for number in range(1, 65):
        if number not in (9, 17, 19):  # KILL, CHLD, STOP
            with contextlib.suppress(OSError, ValueError):
                _signal.signal(number, forward)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == main_pid:
            return exit_code(status)
