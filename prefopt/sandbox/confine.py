"""What a process does to itself before it runs code of a model: resource limits, Landlock, seccomp.

Nothing here needs a privilege, and nothing can be undone by the process or what it starts. x86-64 Linux.
Landlock: kernel documentation, userspace-api/landlock; seccomp: seccomp(2), bpf(4). Standard library only, and
Python 3.9: the sandbox runs a copy.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

NO_NEW_PRIVILEGES, DUMPABLE, DEATH_SIGNAL, SECCOMP, FILTER = 38, 4, 1, 22, 2
CLOSE_RANGE = 436
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIRECTORY, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
# File rights by the ABI that brought them: 13 at first, then refer, truncate and (5) ioctl on devices.
FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
TCP = 0b11  # bind, connect; since ABI 4
SCOPES = 0b11  # abstract Unix sockets, signals; since ABI 6

AUDIT_X86_64, X32_BIT = 0xC000003E, 0x40000000
KILL, ALLOW, ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
LOAD, AND, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
SYSTEM_CALL, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT, THIRD_ARGUMENT = 0, 4, 16, 24, 32
OPEN, OPENAT = 2, 257
CLONE, CLONE3, IOCTL, FCNTL, PRCTL, TGKILL, PRLIMIT64 = 56, 435, 16, 72, 157, 234, 302
OWN = 0xFEEDFACE  # stands for the process's own id in a filter, which is built once for all processes
NEWEST = 449  # system calls from here on are not known here
CLONE_THREAD = 0x10000
PUSH_INPUT = 0x5412  # types into a terminal
OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: who gets which signal of a descriptor
SOCKETS = (0x8900, 0x89FF)  # the same for sockets, and the machine's network devices and their addresses
NOT_PERMITTED, NOT_IMPLEMENTED = 1, 38

# System calls refused with EPERM, by their x86-64 numbers (arch/x86/entry/syscalls/syscall_64.tbl).
REFUSED = (
    # truncate, which Landlock leaves alone before ABI 3, and openat2, whose flags a filter cannot see
    (76, 437),
    # owners, modes, times and attributes of files, which Landlock leaves alone; sync of the whole machine
    (90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280, 162, 306),
    # sockets, beyond reading and writing the one that is open
    (41, 42, 43, 44, 46, 47, 48, 49, 50, 53, 54, 55, 288, 299, 307),
    # fork, vfork, execve, execveat
    (57, 58, 59, 322),
    # signals to others: kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, pidfd_open, pidfd_getfd
    (62, 200, 129, 297, 424, 434, 438),
    # other processes' memory and state: ptrace, process_vm_readv and _writev, kcmp, process_madvise, .. page moves
    (101, 256, 279, 310, 311, 312, 440, 448),
    # identity, sessions, priorities and scheduling of others, and what tells which processes there are
    (105, 106, 109, 112, 113, 114, 116, 117, 119, 121, 122, 123, 124, 126, 135, 140, 141, 142, 143, 144, 145, 148),
    (203, 251, 274, 314),
    # System V and POSIX shared memory, semaphores and queues: they outlive the process
    (29, 30, 31, 64, 65, 66, 67, 68, 69, 70, 71, 220, 240, 241, 242, 243, 244, 245),
    # mounts and namespaces: pivot_root, chroot, mount, umount2, unshare, setns, open_tree .. fspick, mount_setattr
    (155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442),
    # files made without a path, by handle, or special: memfd_create, memfd_secret, mknod, mknodat, file handles
    (319, 447, 133, 259, 303, 304),
    # large kernel surfaces: io_uring, bpf, userfaultfd, perf, keys, inotify, fanotify
    (425, 426, 427, 321, 323, 298, 248, 249, 250, 253, 254, 294, 300, 301),
    # the machine: acct, swap, reboot, names, ports, modules, quota, clocks, kexec, syslog, _sysctl, lookup_dcookie
    (163, 167, 168, 169, 170, 171, 172, 173, 175, 176, 174, 313, 179, 443, 159, 164, 227, 305, 246, 320, 103, 156, 212),
)  # fmt: skip


def system_call(number: int, *arguments: Any) -> int:
    """OSError if the kernel refuses."""
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"system call {number}")
    return result


def process_control(option: int, value: int) -> None:
    """prctl(2). OSError if the kernel refuses."""
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"prctl {option}")


def close_from(first: int) -> None:
    """Close every descriptor from `first` on."""
    try:
        system_call(CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(0))
    except OSError:  # Linux before 5.9
        os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


# ---------------------------------------------------------------- resources


def limit_resources(memory: int, cpu_seconds: int, file_bytes: int, num_files: int) -> None:
    """Bytes of address space, seconds of processor time, bytes of a file, open files. They can only fall."""
    limits = (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_seconds),  # hard as soft: SIGKILL, which cannot be caught
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, num_files),
        (resource.RLIMIT_STACK, 64 << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    )
    for which, value in limits:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


# ---------------------------------------------------------------- Landlock


def landlock_version() -> int:
    """The kernel's Landlock ABI; 0 where there is none."""
    return max(0, libc.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def landlock_rules(readable: list[str], listable: list[str]) -> int:
    """The descriptor of a rule set that allows reading `readable` (files, or folders with all in them) and the names
    in `listable`, and nothing else: no writing, no execution, no TCP, no abstract sockets or signals out of it.

    Paths that do not exist are left out. OSError where the kernel has no Landlock.
    """
    version = landlock_version()
    files = sum(rights for since, rights in FILE_RIGHTS.items() if since <= version)
    attributes = struct.pack("QQQ", files, TCP, SCOPES)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = system_call(
        CREATE_RULESET, ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    )
    for path in readable:
        _allow(rules, path, READ_FILE | READ_DIRECTORY if os.path.isdir(path) else READ_FILE)
    for path in listable:
        _allow(rules, path, READ_DIRECTORY)
    _allow(rules, "/dev/null", READ_FILE | WRITE_FILE)
    return rules


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not there, or not for this user, who then cannot read it either
        return
    rule = ctypes.c_char_p(struct.pack("=Qi", rights, place))
    try:
        system_call(ADD_RULE, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        os.close(place)


def landlock(rules: int) -> None:
    """Hold this process to a rule set, for good."""
    process_control(NO_NEW_PRIVILEGES, 1)
    system_call(RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0))


# ---------------------------------------------------------------- seccomp


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; `yes` and `no`: instructions to skip."""
    return struct.pack("HBBI", code, yes, no, value & 0xFFFFFFFF)


def _only(call: int, argument: int, test: int, value: int) -> list[bytes]:
    """Allow a system call only where the low half of one argument passes the test."""
    return [
        _step(EQUAL, call, 0, 4),
        _step(LOAD, argument),
        _step(test, value, 0, 1),
        _step(RETURN, ALLOW),
        _step(RETURN, ERRNO | NOT_PERMITTED),
    ]


def _except(call: int, argument: int, *ranges: tuple[int, int]) -> list[bytes]:
    """Allow a system call but where the low half of one argument is in one of the ranges, from first to last."""
    refused = []
    for first, last in ranges:
        refused += [_step(AT_LEAST, first, 0, 2), _step(AT_LEAST, last + 1, 1, 0)]
        refused += [_step(RETURN, ERRNO | NOT_PERMITTED)]
    return [_step(EQUAL, call, 0, len(refused) + 2), _step(LOAD, argument), *refused, _step(RETURN, ALLOW)]


def _open(call: int, flags: int) -> list[bytes]:
    """Allow opening a file with O_TRUNC only for writing, which Landlock sees. Before ABI 3 it does not see O_TRUNC,
    and it never sees the access mode 3, which is neither reading nor writing.
    """
    return [
        _step(EQUAL, call, 0, 7),
        _step(LOAD, flags),
        _step(ANY_BIT, os.O_TRUNC, 0, 4),
        _step(AND, os.O_ACCMODE),
        _step(EQUAL, os.O_WRONLY, 2, 0),
        _step(EQUAL, os.O_RDWR, 1, 0),
        _step(RETURN, ERRNO | NOT_PERMITTED),
        _step(RETURN, ALLOW),
    ]


def seccomp_program() -> bytes:
    """The filter of a process whose id is put in place of OWN: threads but no processes, signals to itself only, and
    none of REFUSED.

    Another architecture and x32, whose numbers mean other calls, kill the process.
    """
    steps = [
        _step(LOAD, ARCHITECTURE),
        _step(EQUAL, AUDIT_X86_64, 1, 0),
        _step(RETURN, KILL),
        _step(LOAD, SYSTEM_CALL),
        _step(AT_LEAST, X32_BIT, 0, 1),
        _step(RETURN, KILL),
        _step(EQUAL, CLONE3, 0, 1),
        _step(RETURN, ERRNO | NOT_IMPLEMENTED),  # glibc then takes clone, whose flags a filter can see
        _step(AT_LEAST, NEWEST, 0, 1),
        _step(RETURN, ERRNO | NOT_IMPLEMENTED),
        *_only(CLONE, FIRST_ARGUMENT, ANY_BIT, CLONE_THREAD),
        *_only(TGKILL, FIRST_ARGUMENT, EQUAL, OWN),
        *_only(PRLIMIT64, FIRST_ARGUMENT, EQUAL, 0),
        *_except(IOCTL, SECOND_ARGUMENT, (PUSH_INPUT, PUSH_INPUT), SOCKETS),
        *_except(FCNTL, SECOND_ARGUMENT, *((owner, owner) for owner in OWNERS)),
        *_except(PRCTL, FIRST_ARGUMENT, (DEATH_SIGNAL, DEATH_SIGNAL)),
        *_open(OPEN, SECOND_ARGUMENT),
        *_open(OPENAT, THIRD_ARGUMENT),
    ]
    for number in [number for group in REFUSED for number in group]:
        steps += [_step(EQUAL, number, 0, 1), _step(RETURN, ERRNO | NOT_PERMITTED)]
    return b"".join([*steps, _step(RETURN, ALLOW)])


def seccomp(program: bytes) -> None:
    """Hold this process and its threads to a filter of `seccomp_program`, for good."""
    process_control(NO_NEW_PRIVILEGES, 1)
    program = program.replace(struct.pack("I", OWN), struct.pack("I", os.getpid()))
    steps = ctypes.create_string_buffer(program)
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(steps)))
    if libc.prctl(SECCOMP, ctypes.c_ulong(FILTER), ctypes.c_void_p(ctypes.addressof(filter_)), 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "seccomp")
