"""benchmarks/evaluation/sandbox.py: what model-written programs cannot reach, and what they leave behind.

Hostile programs assert, from inside, that what they tried was refused, or are expected not to pass.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dllm_ext.errors import ConfigError

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux"),
]
sys.path.insert(0, str(BENCHMARKS))

from evaluation import confine, sandbox  # noqa: E402

# In every hostile program: whether the kernel says no.
REFUSED = """
import os
def refused(action, *arguments, **options):
    try:
        action(*arguments, **options)
    except OSError:
        return True
    return False
"""


def run(program, **options):
    return sandbox.run(REFUSED + textwrap.dedent(program), **{"timeout": 20.0, **options})


def holds(program, **options):
    outcome = run(program, **options)
    assert outcome.passed, outcome.reason


@pytest.fixture
def layers(monkeypatch):
    """Take layers away, as on machines that lack them."""

    def keep(*names):
        monkeypatch.setattr(sandbox, "LAYERS", names)
        sandbox.protections.cache_clear()

    yield keep
    sandbox.protections.cache_clear()


@pytest.fixture(params=["all", "landlock", "namespaces"])
def each_layer(request, layers):
    """With all layers, and with each of the two optional ones alone."""
    layers(*(sandbox.LAYERS if request.param == "all" else [request.param]))
    try:
        sandbox.protections()
    except ConfigError as e:
        if "neither" not in str(e):  # a layer that the machine has, and that does not hold
            raise
        pytest.skip(str(e))
    return request.param


# --- Outcomes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, reason",
    [
        ("x = 1", "passed"),
        ("", "passed"),
        ("import json, random, decimal, datetime, hashlib, asyncio, typing, dataclasses, tempfile", "passed"),
        ("if __name__ == '__main__': input()", "passed"),
        ("def f(x):\n    assert x == 2\nf(3)", "assertion failed: assert x == 2"),
        ("assert False, 'three\\nlines'", "assertion failed: three"),
        ("def f(:", "SyntaxError: "),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("f = lambda: f()\nf()", "RecursionError: "),
        ("raise ValueError('\\x1b[2J\\x07' + 'x' * 1000)", "ValueError:  [2J xxx"),
        ("raise SystemExit('bye')", "left before its end with status 1"),
        ("import os; os.abort()", "killed by signal "),
        ("x = [0] * 10**9", "out of memory"),
        ("x = 'a' * 10**6\nwhile True: x += x", "out of memory"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(100)", "timed out"),
        ("x = '\\ud800'", "passed"),
        ("x = '\ud800'", "UnicodeEncodeError: "),
        ("x = 1\0", "ValueError: "),
    ],
)
def test_reasons(program, reason):
    timeout = 0.5 if reason == "timed out" else 20.0
    outcome = sandbox.run(program, timeout=timeout)
    assert outcome.passed == (reason == "passed")
    if reason != "ValueError: " or not outcome.reason.startswith("SyntaxError: "):  # from Python 3.12
        assert outcome.reason.startswith(reason)
    assert len(outcome.reason) <= sandbox.REASON_CHARACTERS
    assert timeout <= outcome.seconds < timeout + 2 if reason == "timed out" else outcome.seconds < timeout


def test_hashes_do_not_decide():
    """The order of a set of strings is the same in each run, so a completion that depends on it is not a coin toss."""
    holds("assert hash('a') == {}".format(sandbox.run("assert 0, hash('a')").reason.split(": ")[1]))


def test_run_all_keeps_the_order_and_runs_side_by_side():
    programs = [f"import time; time.sleep({s}); assert 0, {i}" for i, s in enumerate([0.8, 0.1, 0.4, 0])]
    started = time.monotonic()
    outcomes = list(sandbox.run_all(programs, workers=4))
    assert [o.reason for o in outcomes] == [f"assertion failed: {i}" for i in range(4)]
    assert time.monotonic() - started < sum(o.seconds for o in outcomes)
    assert list(sandbox.run_all([], workers=2)) == []


def test_run_all_ends_what_runs_when_nobody_asks_on():
    started = time.monotonic()
    outcomes = sandbox.run_all(["", *["import time; time.sleep(60)"] * 20], workers=2, timeout=60)
    assert next(outcomes).passed
    outcomes.close()
    assert time.monotonic() - started < 20 and not children()


def test_folders_of_packages(tmp_path):
    (tmp_path / "helper.py").write_text("answer = 42")
    assert run("import helper\nassert helper.answer == 42", path=[tmp_path]).passed
    assert run("import helper").reason.startswith("ModuleNotFoundError")
    numpy = Path(pytest.importorskip("numpy").__file__).parents[1]
    holds("import numpy\nassert (numpy.eye(100) @ numpy.ones((100, 3))).sum() == 300", path=[numpy])


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("nan")}, {"memory_mb": 1}])
def test_wrong_limits(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        sandbox.run("", **options)
    with pytest.raises(ConfigError, match="workers"):
        sandbox.run_all([], workers=0)


# --- What cannot be had -----------------------------------------------------------------------------------------------


def test_network(each_layer):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        holds(f"""
            import socket
            assert refused(socket.create_connection, {listener.getsockname()}, 5)
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                    assert refused(socket.socket, family, kind)
            assert refused(socket.socketpair) and refused(socket.getaddrinfo, "example.org", 80)
        """)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_files_outside_cannot_be_changed(each_layer, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("as before")
    checkout, home = ROOT / "python_tests" / "sandbox-was-here", Path.home() / "sandbox-was-here"
    shared = Path(tempfile.gettempdir()) / "sandbox-was-here"  # as /dev/shm: where everybody may write
    places = [str(p) for p in (tmp_path / "new", home, checkout, shared, "/dev/shm/sandbox-was-here")]
    holds(f"""
        victim = {str(victim)!r}
        for path in {places}:
            assert refused(open, path, "w") and refused(os.mkdir, path) and refused(os.symlink, "/", path), path
            assert refused(os.mkfifo, path) and refused(os.open, path, os.O_CREAT) and refused(os.link, victim, path)
        for mode in ("w", "a", "r+"):
            assert refused(open, victim, mode), mode
        assert refused(os.open, victim, os.O_TRUNC) and refused(os.truncate, victim, 0)
        assert refused(os.remove, victim) and refused(os.rename, victim, "mine") and refused(os.link, victim, "mine")
        assert refused(os.chmod, victim, 0) and refused(os.utime, victim) and refused(os.chown, victim, 1, 1)
        assert refused(os.setxattr, victim, "user.x", b"") and refused(os.mknod, "device", 0o020600, 0x103)
        if not refused(os.symlink, victim, "link"):
            assert refused(open, "link", "w") and refused(os.truncate, "link", 0)
    """)
    assert victim.read_text() == "as before" and victim.stat().st_mode & 0o600
    assert os.listdir(tmp_path) == ["victim"] and not any(os.path.lexists(p) for p in places)


def test_own_folder(layers):
    if sandbox.protections()["writing"].startswith("nothing"):
        pytest.skip("no files of its own on this machine")
    holds("""
        import tempfile
        assert os.listdir() == []
        with open("x", "w") as f:
            f.write("text")
        os.makedirs("a/b"); os.rename("x", "a/b/y"); os.truncate("a/b/y", 2)
        assert open("a/b/y").read() == "te" and tempfile.NamedTemporaryFile().write(b"x") == 1
    """)
    layers("landlock")
    holds("assert refused(open, 'x', 'w') and refused(os.mkdir, 'x')")


def test_disk_is_not_filled():
    if sandbox.protections()["writing"].startswith("nothing"):
        pytest.skip("no files of its own on this machine")
    holds("""
        import errno
        def number(name, data):
            try:
                with open(name, "wb") as f:
                    for _ in range(400):
                        f.write(data)
                        f.flush()
            except OSError as e:
                return e.errno
        assert number("large", bytes(1 << 20)) in (errno.EFBIG, errno.ENOSPC)
        os.remove("large")
        assert any(number(f"many{i}", b"x" * 10000) == errno.ENOSPC for i in range(20))
        for i in range(20):
            os.path.exists(f"many{i}") and os.remove(f"many{i}")
        assert any(refused(os.mkdir, f"folder{i}") for i in range(2000))
        files = []
        try:
            for _ in range(2000):
                files.append(open("/dev/zero"))
        except OSError as e:
            assert e.errno == errno.EMFILE
        assert len(files) < 64
    """)


def test_environment_and_files_of_others_cannot_be_read(each_layer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "secret").write_text("hf_secret")
    holds(f"""
        assert "hf_secret" not in str(dict(os.environ)) and set(os.environ) < {{
            "PYTHONHASHSEED", "OPENBLAS_NUM_THREADS", "TMPDIR", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}}
        for process in ("self", os.getpid(), os.getppid(), 1):
            for name in ("environ", "cmdline", "mem", "maps", "fd", "root"):
                assert refused(os.listdir if name in ("fd", "root") else open, f"/proc/{{process}}/{{name}}")
        if {each_layer != "namespaces"}:
            assert refused(open, {str(tmp_path / "secret")!r}) and refused(open, {__file__!r})
            assert refused(open, "/etc/passwd") and refused(os.listdir, "/")
    """)


def test_no_processes(each_layer):
    holds("""
        import subprocess, threading
        assert refused(os.fork) and refused(os.forkpty) and refused(os.posix_spawn, "/bin/true", ["true"], {})
        assert refused(subprocess.run, ["/bin/true"])
        try:
            threading.Thread(target=print).start()
        except RuntimeError:
            pass
        else:
            assert False, "a thread"
    """)
    assert run("while True:\n    os.fork()").reason.startswith("PermissionError")


def test_daemons_do_not_survive(tmp_path):
    """A process that leaves its session and whose parent has ended would outlive the run, if there could be one."""
    sign = tmp_path / "alive"
    run(f"""
        import time
        try:
            for _ in range(2):
                if os.fork():
                    os._exit(0)
                os.setsid()
        except OSError:
            pass
        time.sleep(0.5)
        open({str(sign)!r}, "w").close()
    """)
    time.sleep(0.7)
    assert not sign.exists() and not children()


def test_the_evaluator_is_out_of_reach(each_layer):
    before = [resource.getrlimit(which) for which in range(16)]
    holds("""
        import fcntl, resource, signal
        for target in (os.getppid(), 0, -1, -os.getpid(), 1):
            assert refused(os.kill, target, signal.SIGKILL), target
        assert refused(os.killpg, os.getpgid(os.getppid()), signal.SIGKILL)
        assert refused(os.kill, os.getpid(), signal.SIGUSR1) and refused(signal.setitimer, signal.ITIMER_REAL, 1)
        r, w = os.pipe()
        F_SETSIG, F_SETOWN_EX = 10, 15  # ask the kernel to send a signal of one's choice
        assert refused(fcntl.fcntl, w, fcntl.F_SETOWN, os.getppid()) and refused(fcntl.fcntl, w, F_SETSIG, 9)
        assert refused(fcntl.fcntl, w, F_SETOWN_EX, bytes(8))
        assert refused(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (1, 1))
        assert refused(os.setpriority, os.PRIO_PROCESS, os.getppid(), 19)
        assert refused(os.sched_setaffinity, os.getppid(), {0}) and refused(os.pidfd_open, os.getppid())
        assert refused(os.open, "/dev/tty", os.O_RDWR) and refused(os.memfd_create, "unmetered memory")
    """)
    assert before == [resource.getrlimit(which) for which in range(16)]


def test_limits_cannot_be_changed():
    holds("""
        import resource
        for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
            soft, hard = resource.getrlimit(which)
            assert soft == hard != resource.RLIM_INFINITY
            for limit in (hard + 1, hard - 1, resource.RLIM_INFINITY):
                try:
                    resource.setrlimit(which, (limit, limit))
                except (ValueError, OSError):
                    continue
                assert False, which
    """)


def test_the_kernel_agrees(each_layer):
    """What /proc says about a program that runs: no capabilities, no way to get any, an own session."""
    thread = threading.Thread(target=sandbox.run, args=["import time; time.sleep(1.5)"])
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not (running := [pid for pid in children() if runs(pid, os.getpid())]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        [pid] = running
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert {int(status[f"Cap{which}"], 16) for which in ("Inh", "Prm", "Eff", "Amb")} == {0}
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2" and os.getsid(pid) == pid
        assert os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net") == (each_layer == "landlock")
    finally:
        thread.join()


# --- The evaluator stays well -----------------------------------------------------------------------------------------


def children():
    """This process's children, zombies too."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_program_that_does_not_want_to_end():
    outcome = run(
        """
        import signal, time
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        try:
            os.setsid()
        except OSError:
            pass
        os.closerange(0, 64)
        while True:
            time.sleep(1)
        """,
        timeout=1,
    )
    assert outcome.reason == "timed out" and outcome.seconds < 3


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_100_megabytes_of_output(stream):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    holds(f"""
        import sys
        for _ in range(100):
            sys.{stream}.write("x" * 2**20)
        sys.{stream}.flush()
    """)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_output_without_end():
    assert run("import sys\nwhile True:\n    sys.stderr.write('x' * 2**16)", timeout=1).reason == "timed out"
    assert not run("os.close(2)\nwhile True:\n    os.write(3 + os.path.exists('x'), b'x' * 4096)", timeout=1).passed


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sandbox.run("")
    fds, others = set(os.listdir("/proc/self/fd")), children()
    programs = ["", "1 / 0", "open('x', 'w').write('x')", "import time; time.sleep(9)", "import os; os.abort()"]
    list(sandbox.run_all(programs * 4, workers=3, timeout=0.3))
    assert os.listdir(tmp_path) == [] and children() == others
    assert len(os.listdir("/proc/self/fd")) == len(fds)


# dllm_ext without its native module, for processes that start often or cannot read the site-packages.
LIGHT = f"""
import importlib.util, sys, types
sys.modules["dllm_ext"] = types.ModuleType("dllm_ext")
spec = importlib.util.spec_from_file_location("dllm_ext.errors", {str(ROOT / "dllm_ext" / "errors.py")!r})
sys.modules["dllm_ext.errors"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.path.insert(0, {str(BENCHMARKS)!r})
from evaluation import sandbox
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_evaluator_leaves_no_process(number, each_layer, tmp_path):
    """Ctrl-C ends the programs and removes their folders; so does whatever ends the evaluator, less the folders."""
    endless = "import time\nwhile True: time.sleep(1)"
    program = LIGHT + f"sandbox.LAYERS = {sandbox.LAYERS}\n"
    program += f"list(sandbox.run_all([{endless!r}] * 4, workers=2, timeout=100))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as evaluator:
        try:
            running = []
            deadline = time.monotonic() + 30
            while len(running) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
                running = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if runs(p, evaluator.pid)]
            assert len(running) == 2
            evaluator.send_signal(number)
            errors = evaluator.communicate(timeout=20)[1]
        finally:
            evaluator.kill()
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{p}") for p in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{p}") for p in running)
    assert number == signal.SIGKILL or os.listdir(tmp_path) == []


def runs(pid, parent):
    """Whether it is a child of `parent` that executes a program (and no longer the self-test's setup)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(stat[1]) == parent and b"sys.addaudithook" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- Never without protection -----------------------------------------------------------------------------------------


def test_protections_are_for_a_results_file(each_layer):
    found = sandbox.protections()
    assert json.loads(json.dumps(found)) == found
    assert found["seccomp"] is True and found["network"].startswith("none") and found["capabilities"] == "none"
    assert bool(found["landlock"]) == (each_layer != "namespaces" and bool(confine.landlock_version()))
    if each_layer != "all":
        assert found["writing"] == "nothing: seccomp"


def test_without_enough_protection_nothing_runs(layers, monkeypatch):
    layers()
    with pytest.raises(ConfigError, match=r"neither Landlock .* nor user namespaces"):
        sandbox.run("")
    with pytest.raises(ConfigError, match="neither Landlock"):
        sandbox.run_all([""], workers=1)
    monkeypatch.setattr(sandbox, "SELF_TEST", "assert False, 'a socket could be opened'")
    layers("landlock", "namespaces")
    with pytest.raises(ConfigError, match="does not hold on this machine: assertion failed: a socket could be opened"):
        sandbox.run("")
    monkeypatch.setattr(sandbox, "CONFINE", Path("/nowhere/confine.py"))
    with pytest.raises(ConfigError, match=r"cannot be set up: .*nowhere"):
        sandbox.run("")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        sandbox.run("")


def test_as_an_ordinary_user(tmp_path):
    """The same as root and as anybody else, with an interpreter and a copy of the sandbox that anybody can read."""
    if os.geteuid() != 0:
        pytest.skip("all other tests have run as an ordinary user")
    user = {"user": 65534, "group": 65534, "extra_groups": [], "env": {}, "cwd": "/", "capture_output": True}
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        version = "import sys, ctypes; assert sys.version_info >= (3, 10)"
        try:
            if python and subprocess.run([python, "-c", version], **user).returncode == 0:
                break
        except PermissionError:
            continue
    else:
        pytest.skip("no interpreter that everybody can execute")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(BENCHMARKS / "evaluation", f"{folder}/benchmarks/evaluation")
        shutil.copy(ROOT / "dllm_ext" / "errors.py", folder)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        program = LIGHT.replace(str(ROOT / "dllm_ext"), folder).replace(str(BENCHMARKS), f"{folder}/benchmarks")
        program += f"""
import json, os
programs = ["x = 1", "import os; os.fork()", "import socket; socket.socket()", "open({folder!r} + '/x', 'w')",
            "import os; os.kill(os.getppid(), 9)", "open('/proc/self/environ')", "x = [0] * 10**9"]
print(json.dumps([os.geteuid(), sandbox.protections(), [o.reason for o in sandbox.run_all(programs, 2)]]))
"""
        done = subprocess.run([python, "-c", program], text=True, **user)
    assert done.returncode == 0, done.stderr
    uid, found, reasons = json.loads(done.stdout)
    assert uid == 65534 and found["network"].startswith("none") and found["capabilities"] == "none"
    assert reasons[0] == "passed" and reasons[-1] == "out of memory"
    assert all("Error: [Errno" in reason for reason in reasons[1:-1]), reasons


# --- The filter, on both processors -----------------------------------------------------------------------------------

SOME_CALLS = {  # numbers from the kernel's tables, not from confine.py
    "x86_64": {"read": 0, "openat": 257, "socket": 41, "clone": 56, "fork": 57, "ptrace": 101, "mount": 165,
               "io_uring_setup": 425, "mkdirat": 258, "execve": 59, "unlinkat": 263, "prlimit64": 302,
               "x32 read": 0x40000000},
    "aarch64": {"read": 63, "openat": 56, "socket": 198, "clone": 220, "ptrace": 117, "mount": 40,
                "io_uring_setup": 425, "mkdirat": 34, "execve": 221, "unlinkat": 35, "prlimit64": 261},
}  # fmt: skip


def decide(program, architecture, number, *arguments):
    """Execute a BPF program as the kernel would."""
    words = {0: number, 4: architecture}
    for i, argument in enumerate([*arguments, 0, 0, 0, 0]):
        words |= {16 + 8 * i: argument & 0xFFFFFFFF, 20 + 8 * i: argument >> 32 & 0xFFFFFFFF}
    at, value = 0, None
    while True:
        code, yes, no, k = program[at]
        if code == confine.RETURN:
            return k
        if code == confine.LOAD:
            value = words[k]
        else:
            test = {confine.EQUAL: value == k, confine.AT_LEAST: value >= k, confine.ANY_BIT: value & k}[code]
            at += yes if test else no
        at += 1


@pytest.mark.parametrize("machine", SOME_CALLS)
def test_filter(machine):
    column, architecture = confine.ARCHITECTURES[machine]
    calls = SOME_CALLS[machine]
    allow, eperm, erofs = confine.ALLOW, confine.REFUSE | 1, confine.REFUSE | 30
    for writable in (False, True):
        program = confine.filter_program(column, architecture, writable)
        assert len(program) < 4096 and all(yes < 256 and no < 256 for _, yes, no, _ in program)

        def ask(name, *arguments, program=program):
            return decide(program, architecture, calls[name], *arguments)

        assert {ask(name) for name in ("read", "execve")} == {allow}
        refused = [name for name in ("socket", "clone", "fork", "ptrace", "mount", "io_uring_setup") if name in calls]
        assert {ask(name) for name in refused} == {eperm}
        assert {ask(name) for name in ("mkdirat", "unlinkat")} == {allow if writable else eperm}
        assert ask("openat", 0, 0, os.O_RDONLY | os.O_CLOEXEC) == allow
        assert ask("openat", 0, 0, os.O_WRONLY) == ask("openat", 0, 0, os.O_TRUNC) == (allow if writable else erofs)
        assert ask("prlimit64", 0, 7, 0, 1 << 46) == ask("prlimit64", 1, 7, 0, 0) == allow
        assert ask("prlimit64", 0, 7, 1, 0) == ask("prlimit64", 0, 7, 0xFFF << 32, 0) == eperm
        assert decide(program, architecture ^ 1, calls["read"]) == confine.KILL
        if machine == "x86_64":
            assert ask("x32 read") == confine.KILL
    assert confine.numbers(confine.COMPUTE, 0).keys() > confine.numbers(confine.COMPUTE, 1).keys()
