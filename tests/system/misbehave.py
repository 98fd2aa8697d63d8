"""What an intruder in a worker would try inside the service's sandbox.

As a program, this is the daemon as it is installed, except that its first worker misbehaves before
it does anything else. Each of ATTEMPTS is made in a process of its own, and a line printed: "name:
done" or "name:" and the error by which it failed. Then the daemon is ended.
"""

import ctypes
import glob
import mmap
import os
import platform
import resource
import runpy
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

DAEMON = "/usr/sbin/tcpupperd"
SUPERVISOR = os.getpid()  # everything else is forked from it

LISTEN_FDS_START = 3
UNUSED_PORT = 9

libc = ctypes.CDLL(None, use_errno=True)
# Both are where they are in every process that is forked from this one.
DATA = ctypes.create_string_buffer(b"data")
CODE = ctypes.cast(libc.getpid, ctypes.c_void_p)

#: The sockets of the host that are left inside.
LEFT = {"/run/systemd/notify", "/run/host-journal"}

CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET = 0x10000000, 0x00020000, 0x40000000
PTRACE_TRACEME, PTRACE_SEIZE = 0, 0x4206
CLOCK_REALTIME = 0
PR_SET_DUMPABLE = 4
AF_VSOCK = 40
# The same on all architectures.
SYS_IO_URING_SETUP, SYS_IO_URING_ENTER = 425, 426
IORING_ENTER_GETEVENTS, IORING_OP_SOCKET = 1, 45
IORING_OFF_SQES = 0x10000000
SYS_INIT_MODULE = {"x86_64": 175, "aarch64": 105}.get(platform.machine(), 0)
SYS_BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 0)
SYS_ADD_KEY = {"x86_64": 248, "aarch64": 217}.get(platform.machine(), 0)


class Succeeded(Exception):  # noqa: N818
    """With something to say about it."""


def call(name: str, *values: Any) -> int:
    """Call a function of the C library, which fails with -1; its result."""
    result: int = getattr(libc, name)(*values)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def execute_through_the_loader() -> None:
    """Which has to be executable, and maps the program."""
    (loader,) = glob.glob("/usr/lib/*-linux-gnu/ld-linux-*.so.*")
    result = subprocess.run([loader, "/bin/true"], capture_output=True, text=True, check=False)
    if result.returncode:
        raise PermissionError(result.stderr.strip())


def execute_from_memory() -> None:
    """A program that lies in no file system that could forbid to execute it."""
    program = os.memfd_create("program", 0)
    with open("/bin/true", "rb") as file:
        os.write(program, file.read())
    os.execve(f"/proc/self/fd/{program}", ["true"], {})


def connect_with_a_passed_socket() -> None:
    """Make a listening socket, which belongs to the network outside, one that connects out."""
    with disconnected() as client, suppress(ConnectionRefusedError):
        client.settimeout(2)
        client.connect(("127.0.0.1", UNUSED_PORT))


def listen_with_a_passed_socket() -> None:
    """On another port outside."""
    with disconnected() as listener:
        listener.bind(("0.0.0.0", 4444))
        listener.listen()


def disconnected() -> socket.socket:
    """A socket of the network outside that is free to be used otherwise: connect(2)."""
    passed = os.dup(LISTEN_FDS_START)
    any_family = bytes(16)
    call("connect", passed, any_family, len(any_family))
    return socket.socket(fileno=passed)


def listen_anew() -> None:
    """With another queue, which changes that of all processes."""
    call("listen", LISTEN_FDS_START, 1)


def listen_locally() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0misbehaved")


def open_by_io_uring(family: int, kind: int = socket.SOCK_STREAM) -> None:
    """Have the kernel open a socket that socket(2) would not be allowed to: io_uring(7)."""
    params = ctypes.create_string_buffer(120)
    ring = call("syscall", SYS_IO_URING_SETUP, 1, params)
    # The offsets of its fields: struct io_sqring_offsets, struct io_cqring_offsets.
    _, tail, _, _, _, _, array = struct.unpack_from("7I", params, 40)
    _, _, _, _, _, cqes = struct.unpack_from("6I", params, 80)
    size = max(array + 4, cqes + 2 * 16)
    with mmap.mmap(ring, size) as queue, mmap.mmap(ring, 64, offset=IORING_OFF_SQES) as entry:
        entry[:32] = struct.pack("BBHiQQII", IORING_OP_SOCKET, 0, 0, family, kind, 0, 0, 0)
        struct.pack_into("I", queue, array, 0)
        struct.pack_into("I", queue, tail, 1)
        call("syscall", SYS_IO_URING_ENTER, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0)
        (result,) = struct.unpack_from("i", queue, cqes + 8)
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def write_into_a_folder() -> None:
    for folder, _, _ in os.walk("/"):
        with suppress(OSError):
            os.close(os.open(f"{folder}/misbehaved", os.O_WRONLY | os.O_CREAT, 0o600))
            raise Succeeded(folder)
    raise PermissionError("none is writable")


def write_to_a_file() -> None:
    """But for the process's own affairs, and for what systemd 254 and later let it ask."""
    for folder, folders, names in os.walk("/"):
        if folder == "/":
            folders[:] = set(folders) - {"proc", "dev"}
        for path in (f"{folder}/{name}" for name in names if name != "memory.pressure"):
            with suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW))
                raise Succeeded(path)
    raise PermissionError("none is writable")


def read_somebodys_home() -> None:
    for home in ("/home", "/root"):
        with suppress(OSError):
            raise Succeeded(f"{home}: {os.listdir(home)}")
    raise PermissionError("none is readable")


def see_others() -> None:
    """Processes of other users."""
    others = [pid for pid in os.listdir("/proc") if pid.isdigit() and owner(pid) != os.getuid()]
    if not others:
        raise ProcessLookupError("none to see")
    raise Succeeded(str(others))


def owner(pid: str) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def write_memory(pid: int, address: int | None) -> None:
    """Over what is there, which changes nothing."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address or 0)
        found = memory.read(1)
        memory.seek(address or 0)
        memory.write(found)


def write_own_code() -> None:
    write_memory(os.getpid(), CODE.value)


def write_own_code_after_asking() -> None:
    """For what the daemon has done away with to be back."""
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
    write_own_code()


def copy_memory(name: str, pid: int) -> None:
    """By a call that is made for it: process_vm_readv(2), process_vm_writev(2)."""
    area = struct.pack("PN", ctypes.addressof(DATA), len(DATA))
    call(name, pid, area, 1, area, 1, 0)


def connect_to_another_service() -> None:
    """By any socket of the file system."""
    for folder, folders, names in os.walk("/"):
        if folder == "/":
            folders.remove("proc")
        for path in (os.path.join(folder, name) for name in names):
            with suppress(FileNotFoundError, PermissionError):
                if path not in LEFT and connects(path):
                    raise Succeeded(path)
    raise ConnectionRefusedError("none to connect to")


def connects(path: str) -> bool:
    """Or reaches it without a connection."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.sendto(b"", path)
        return True
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(path)
            return True
    return False


def log_as_another_service() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        entry = b"SYSLOG_IDENTIFIER=sshd\nMESSAGE=Accepted publickey for root\n"
        log.sendto(entry, "/run/host-journal")


def log_as_another_service_by_syslog() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.sendto(b"<38>sshd[1]: Accepted publickey for root", "/dev/log")


def be_traced() -> None:
    call("ptrace", PTRACE_TRACEME, 0, 0, 0)


def run_in_real_time() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def raise_a_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    call("setrlimit", resource.RLIMIT_NOFILE, struct.pack("LL", hard + 1, hard + 1))


ATTEMPTS: dict[str, Callable[[], Any]] = {
    "open an Internet socket": partial(socket.socket, socket.AF_INET),
    "open an IPv6 socket": partial(socket.socket, socket.AF_INET6),
    "open a netlink socket": partial(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW),
    "open a packet socket": partial(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
    "open an Internet socket by io_uring": partial(open_by_io_uring, socket.AF_INET),
    "open an IPv6 socket by io_uring": partial(open_by_io_uring, socket.AF_INET6),
    "open a netlink socket by io_uring": partial(
        open_by_io_uring, socket.AF_NETLINK, socket.SOCK_RAW
    ),
    "open a socket to the host by io_uring": partial(open_by_io_uring, AF_VSOCK),
    "execute a shell": partial(os.execv, "/bin/sh", ["sh", "-c", ""]),
    "execute through the loader": execute_through_the_loader,
    "execute from memory": execute_from_memory,
    "write into a folder": write_into_a_folder,
    "write to a file": write_to_a_file,
    "read somebody's home": read_somebodys_home,
    "see others' processes": see_others,
    "load a module": partial(call, "syscall", SYS_INIT_MODULE, 0, 0, b""),
    "load a BPF program": partial(call, "syscall", SYS_BPF, 5, 0, 0),
    "add a key": partial(call, "syscall", SYS_ADD_KEY, b"user", b"name", b"key", 3, -3),
    "trace another process": partial(call, "ptrace", PTRACE_SEIZE, SUPERVISOR, 0, 0),
    "be traced": be_traced,
    "write the supervisor's data": partial(write_memory, SUPERVISOR, ctypes.addressof(DATA)),
    "write the supervisor's code": partial(write_memory, SUPERVISOR, CODE.value),
    "write its own code": write_own_code,
    "write its own code after asking": write_own_code_after_asking,
    "copy from the supervisor's memory": partial(copy_memory, "process_vm_readv", SUPERVISOR),
    "copy into the supervisor's memory": partial(copy_memory, "process_vm_writev", SUPERVISOR),
    "connect to another service": connect_to_another_service,
    "log as another service": log_as_another_service,
    "log as another service by syslog": log_as_another_service_by_syslog,
    "become root": partial(os.setuid, 0),
    "become another group": partial(os.setgid, 0),
    "make a user namespace": partial(call, "unshare", CLONE_NEWUSER),
    "make a mount namespace": partial(call, "unshare", CLONE_NEWNS),
    "make a network namespace": partial(call, "unshare", CLONE_NEWNET),
    "mount": partial(call, "mount", b"none", b"/tmp", b"tmpfs", 0, 0),
    "change the root": partial(os.chroot, "/"),
    "write and execute memory": partial(
        mmap.mmap, -1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ),
    "set the clock": partial(call, "clock_settime", CLOCK_REALTIME, bytes(16)),
    "name the host": partial(socket.sethostname, "misbehaved"),
    "make a device": partial(os.mknod, "/dev/shm/mem", 0o020600, os.makedev(1, 1)),
    "reboot": partial(call, "reboot", 0),
    "change the personality": partial(call, "personality", 0x0040000),
    "take precedence": partial(os.setpriority, os.PRIO_PROCESS, 0, -5),
    "run in real time": run_in_real_time,
    "raise a limit": raise_a_limit,
    "limit the supervisor": partial(resource.prlimit, SUPERVISOR, resource.RLIMIT_CORE, (0, 0)),
    "listen locally": listen_locally,
    "listen anew": listen_anew,
    "end the service manager": partial(os.kill, 1, signal.SIGTERM),
    # Last: they spoil the socket.
    "connect with a passed socket": connect_with_a_passed_socket,
    "listen with a passed socket": listen_with_a_passed_socket,
}


def attempt(action: Callable[[], Any]) -> str:
    """Try it in a child; what came of it."""
    reader, writer = os.pipe()
    if not os.fork():
        outcome = "done"
        try:
            action()
        except Succeeded as success:
            outcome = f"done: {success}"
        except OSError as error:
            outcome = str(error)
        os.write(writer, outcome.encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    with os.fdopen(reader) as said:
        # A program that is executed in its place says nothing.
        return said.read() or "done"


def misbehave() -> None:
    """Once, in the first process that the daemon forks."""
    if os.getppid() != SUPERVISOR:
        return
    for name, action in ATTEMPTS.items():
        print(f"{name}: {attempt(action)}", flush=True)
    os.kill(SUPERVISOR, signal.SIGTERM)
    os._exit(0)


if __name__ == "__main__":
    os.register_at_fork(after_in_child=misbehave)
    runpy.run_path(DAEMON, run_name="__main__")
