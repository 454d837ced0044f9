"""Gives up every right that a model-written program does not need, then becomes the interpreter that runs it.

    python -I -S confine.py '{"result": FD, "folder": ..., "memory": BYTES, ...}'

sandbox.py starts this file in a process of its own; it imports nothing but the standard library, and none of what it
loads (ctypes above all) is there any more after the `execve` at the end, while all limits stay. It writes one line of
JSON to the result pipe: the layers that are in force, or the error that made it give up. In order:

1. Namespaces (where the kernel and the container allow them): the program is alone in a user, a network, a mount and an
   IPC namespace. It has no interface to any network, not even 127.0.0.1; an empty folder hides /proc; its own folder is
   a tmpfs of a fixed size, so that no number of files fills the disk, and nothing has to be cleaned up.
2. Capabilities are dropped: root is an ordinary user afterwards.
3. Resource limits: address space, CPU time, file size, open files, no core dumps.
4. Landlock (Linux 5.13): only the interpreter, its libraries and a few devices can be read: no home folder, no
   checkout, and no /proc/<pid>/environ of the evaluator. Only the program's folder can be written, if it has one.
5. Seccomp, always: a list of the system calls that computing needs; all others are refused. The list has no socket, no
   clone (so no processes and no threads: a fork bomb fails at its first fork, the memory limit holds for the whole
   program, and killing one process kills all of it), no mount, ptrace, keyctl, bpf, io_uring, chmod. It has no kill and
   no timers, not even for oneself: a signal handler is a way to run code in the middle of runner.py's hook. Without a
   tmpfs or without Landlock's control of truncation (Linux 6.2) it also refuses to open anything for writing.

Seccomp is required. One of Landlock and namespaces is required too: without both, the program could read the
environment of the evaluator, with its API tokens, from /proc.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys

FOLDER_BYTES = 16 << 20
FOLDER_FILES = 1000

# Numbers of the system calls that are allowed, on x86-64 and aarch64 ("-": not there). All else is refused, so a call
# that a later kernel brings is refused as well. Calls with a condition are in filter_program().
COMPUTE = """
read 0 63, write 1 64, close 3 57, fstat 5 80, stat 4 -, lstat 6 -, lseek 8 62, pread64 17 67, pwrite64 18 68,
readv 19 65, writev 20 66, preadv 295 69, pwritev 296 70, access 21 -, faccessat 269 48, faccessat2 439 439,
newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, readlink 89 -, readlinkat 267 78, getdents 78 -,
getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, umask 95 166, fadvise64 221 223, flock 73 32,
copy_file_range 326 285, sendfile 40 71, pipe 22 -, pipe2 293 59, dup 32 23, dup2 33 -, dup3 292 24,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19,
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214,
futex 202 98, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293, membarrier 324 283,
arch_prctl 158 -, getrandom 318 278, getcpu 309 168, sched_yield 24 124, sched_getaffinity 204 123,
sched_getparam 143 121, sched_getscheduler 145 120,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigsuspend 130 133, rt_sigpending 127 136,
rt_sigtimedwait 128 137, sigaltstack 131 132, pause 34 -, restart_syscall 219 128, getitimer 36 102,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, times 100 153,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgid 121 155, getpgrp 111 -, getsid 124 156,
uname 63 160, sysinfo 99 179, getrusage 98 165, getrlimit 97 163, getpriority 140 141,
execve 59 221, exit 60 93, exit_group 231 94
"""
# Allowed where Landlock decides which files they reach.
WRITE = """
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, truncate 76 45, ftruncate 77 46, fallocate 285 47,
fsync 74 82, fdatasync 75 83
"""
CONDITIONAL = """
open 2 -, openat 257 56, fcntl 72 25, ioctl 16 29, prlimit64 302 261, clone3 435 435
"""
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on both

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def check(returned):
    """libc's answer, or its errno as an OSError."""
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return returned


def prctl(option, *arguments):
    check(libc.prctl(option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4])))


# --- Namespaces -------------------------------------------------------------------------------------------------------


def enter_namespaces():
    """Whether this process now has a user, network, mount, IPC and UTS namespace of its own."""
    new_mount, new_uts, new_ipc, new_user, new_net = 0x20000, 0x04000000, 0x08000000, 0x10000000, 0x40000000
    uid, gid = os.geteuid(), os.getegid()
    try:
        check(libc.unshare(new_user | new_net | new_mount | new_ipc | new_uts))
    except OSError:  # forbidden by the container or by the distribution
        return False
    # The files keep their owner, but inside it is not number 0: so the execve() drops the rights over the namespaces.
    for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as f:  # unmapped: the number is 65534
            f.write(line)
    return True


def mount_folders(folder):
    """Whether `folder` is a tmpfs of limited size and /proc is hidden."""
    nosuid, nodev, noexec, readonly = 2, 4, 8, 1
    options = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=700"
    try:
        check(libc.mount(b"none", os.fsencode(folder), b"tmpfs", nosuid | nodev | noexec, options.encode()))
        check(libc.mount(b"none", b"/proc", b"tmpfs", nosuid | nodev | noexec | readonly, b"size=0,nr_inodes=1"))
    except OSError:  # a security module may allow namespaces and forbid mounts
        return False
    return True


def drop_capabilities():
    """Whether the program will be without capabilities: execve() gives none to root, nor passes on those of a user."""
    set_securebits, ambient, clear_all, noroot, locked = 28, 47, 4, 1, 2
    try:
        prctl(ambient, clear_all)
        prctl(set_securebits, noroot | locked)
    except OSError:  # not root, who alone may set the bits; or a root without the right to
        return os.geteuid() != 0
    return True


# --- Landlock ---------------------------------------------------------------------------------------------------------

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
READ = EXECUTE | READ_FILE | READ_DIR
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM, REFER = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12, 1 << 13
OWN = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER


def landlock_version():
    """Of the kernel's Landlock: 0 if there is none, or if it is switched off."""
    return max(0, libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def readable_paths(python, extra):
    """What the interpreter is made of: its modules, and the folders of all libraries that it has loaded."""
    with open("/proc/self/maps") as f:
        loaded = {line.split(maxsplit=5)[5].strip() for line in f if "/" in line}
    paths = {os.path.dirname(p) for p in loaded} | {python, *sys.path, *extra}
    return paths | {
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/usr/share/zoneinfo",
        "/dev/zero",
        "/dev/random",
        "/dev/urandom",
    }


def restrict_files(version, readable, folder):
    """Forbid all files but those below `readable`, to be read, and `folder` (or None), to be written."""
    files = (1 << 13) - 1 | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    files |= 1 << 15 if version >= 5 else 0  # ioctl() on devices
    ports = 3 if version >= 4 else 0  # bind() and connect() of TCP
    scopes = 3 if version >= 6 else 0  # abstract Unix sockets and signals
    attributes = struct.pack("QQQ", files, ports, scopes)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = check(libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0))
    rules = [(path, READ) for path in readable] + [("/dev/null", READ_FILE | WRITE_FILE)]
    for path, rights in rules if folder is None else [*rules, (folder, OWN)]:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # e.g. the python311.zip that sys.path always names
            continue
        if not os.path.isdir(path):
            rights &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
        rule = struct.pack("=Qi", rights & files, opened)
        check(libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0))
        os.close(opened)
    check(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


# --- Seccomp ----------------------------------------------------------------------------------------------------------

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_*
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000


def numbers(table, column):
    rows = (row.split() for row in table.replace("\n", " ").split(","))
    return {name: int(both[column]) for name, *both in rows if both[column] != "-"}


def filter_program(column, architecture, writable):
    """The BPF program: the kernel runs it before each system call."""

    def argument(i):  # its low 32 bits: all that the kernel looks at in an int
        return (LOAD, 0, 0, 16 + 8 * i)

    def refuse(number=errno.EPERM):
        return (RETURN, 0, 0, REFUSE | number)

    def one_of(i, *values):
        return [argument(i), *(step for v in values for step in ((EQUAL, 0, 1, v), (RETURN, 0, 0, ALLOW))), refuse()]

    def without(i, bits):
        return [argument(i), (ANY_BIT, 0, 1, bits), refuse(errno.EROFS), (RETURN, 0, 0, ALLOW)]

    high_half = (LOAD, 0, 0, 20 + 8 * 2)  # of prlimit64's third argument, which is null where limits are only read
    opening = 0 if writable else os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    conditions = {
        "open": without(1, opening),
        "openat": without(2, opening),
        # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, locks, F_DUPFD_CLOEXEC: F_SETOWN and F_SETSIG, which are missing
        # here, would send any signal to any process of the user.
        "fcntl": one_of(1, 0, 1, 2, 3, 4, 5, 6, 7, 1030),
        "ioctl": [refuse(errno.ENOTTY)],  # what open() asks is whether it is a terminal
        "prlimit64": [argument(2), (EQUAL, 0, 3, 0), high_half, (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW), refuse()],
        "clone3": [refuse(errno.ENOSYS)],  # so that libc tries clone(), whose refusal it understands
    }
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if column == 0:  # the x32 numbers of x86-64 are another door to the same calls
        program += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]
    for number in numbers(COMPUTE + ("," + WRITE if writable else ""), column).values():
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for name, number in numbers(CONDITIONAL, column).items():
        program += [(EQUAL, 0, len(conditions[name]), number), *conditions[name]]
    return [*program, refuse()]


def install_filter(writable):
    column, architecture = ARCHITECTURES[os.uname().machine]
    program = filter_program(column, architecture, writable)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    head = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    set_seccomp, filter_mode = 22, 2
    prctl(set_seccomp, filter_mode, ctypes.addressof(head))


# --- All of it --------------------------------------------------------------------------------------------------------


def set_limits(memory, seconds):
    for which, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),  # the evaluator's clock is faster; this one also ticks when it is stopped
        (resource.RLIMIT_FSIZE, FOLDER_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def confine(order):
    """Apply every layer that this machine has; returns which, for the results file."""
    if os.uname().machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(f"the seccomp filter is written for 64-bit {' and '.join(ARCHITECTURES)}")
    version = landlock_version() if "landlock" in order["layers"] else 0
    readable = readable_paths(order["python"], order["path"])  # while /proc is there
    namespaces = "namespaces" in order["layers"] and enter_namespaces()
    mounts = namespaces and mount_folders(order["folder"])
    if not (version or mounts):
        raise OSError(
            "neither Landlock (Linux 5.13 or later, not switched off) nor user namespaces with mounts are available, "
            "so the evaluator's environment could be read from /proc"
        )
    os.chdir(order["folder"])  # now the tmpfs
    capabilities = drop_capabilities()
    writable = mounts and version >= 3
    set_limits(order["memory"], order["seconds"])
    set_parent_death_signal, no_new_privileges = 1, 38
    prctl(no_new_privileges, 1)  # setuid programs run without their rights; Landlock and seccomp ask for it
    prctl(set_parent_death_signal, signal.SIGKILL)  # whatever ends the evaluator ends the program
    if os.getppid() != order["parent"]:  # it has ended already
        sys.exit(1)
    if version:
        restrict_files(version, readable, order["folder"] if writable else None)
    install_filter(writable)
    return {
        "landlock": version,
        "namespaces": namespaces,
        "mounts": mounts,
        "capabilities": capabilities,
        "writable": writable,
    }


def main():
    order = json.loads(sys.argv[1])
    with open(os.path.join(os.path.dirname(__file__), "runner.py")) as f:
        runner = f.read()
    # The interpreter itself, not a virtual environment's link to it: its folder is what Landlock opens.
    order["python"] = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    try:
        report = confine(order)
    except OSError as e:
        report = {"error": str(e)}
    os.write(order["result"], json.dumps(report).encode() + b"\n")
    if "error" not in report:
        # Fixed hashes: the order of a set must not decide whether a completion passes. One thread: more are refused.
        environment = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": order["folder"]}
        arguments = ["-s", "-S", "-B", "-X", "utf8", "-c", runner, str(order["result"]), *order["path"]]
        os.execve(order["python"], [order["python"], *arguments], environment)


if __name__ == "__main__":
    main()
