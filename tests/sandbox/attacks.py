"""Hostile programs, by number: what each tries, and what must come of it."""

from __future__ import annotations

from dataclasses import dataclass

WRONG = "def add(a, b): return 0\n"
RIGHT = "def add(a, b): return a + b\n"
# What a kernel or a limit says to what it refuses. A NameError, say, would mean that the attack never took place.
REFUSED = "PermissionError|OSError|BlockingIOError|FileNotFoundError|MemoryError|ModuleNotFoundError|Refused"
LIBRARY = "import ctypes, os\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
# what a C function or a system call returns below 0 is an error
CHECKED = LIBRARY + "def must(result):\n    if result < 0: raise OSError(ctypes.get_errno(), 'refused')\n"


@dataclass(frozen=True)
class Place:
    """What the programs aim at: a folder anyone may write to and read, a file in it with a secret, the socket in it, a
    TCP port and an abstract socket that listen, and the id of a process of the programs' user."""

    folder: str
    port: int
    abstract: str
    victim: int


@dataclass(frozen=True)
class Attack:
    """Tests are add(2, 3) == 5 and add(1, 1) == 2. passed: how many may hold. outcomes: that it may have, any if empty.

    tries: the program defines `R`, which is "REACHED" only if the attack worked, else the error.
    """

    number: int
    name: str
    code: str
    passed: int = 0
    outcomes: tuple[str, ...] = ("failed",)
    tries: bool = False


def attempt(body: str) -> str:
    """A program that tries `body`, which must raise unless the attack worked, and answers with what came of it."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    tried = f"try:\n{lines}except BaseException as error:\n    R = f'{{type(error).__name__}}: {{error}}'[:80]\n"
    return tried + "else:\n    R = 'REACHED'\ndef add(a, b): return R\n"


def frames(*messages: str) -> str:
    """Code that writes messages as the sandbox itself would."""
    sent = "; ".join(f"os.write(3, struct.pack('!I', len({text!r})) + {text.encode()!r})" for text in messages)
    return f"import os, struct\n{sent}\n"


def attacks(place: Place) -> list[Attack]:
    return [*_verdicts(), *_resources(), *_processes(place), *_kernel(place), *_more(place)]


def _verdicts() -> list[Attack]:
    any_answer = ("failed", "protocol")
    return [
        Attack(0, "honest", RIGHT, 2, ("passed",)),
        Attack(1, "sys.exit while loading", WRONG + "import sys; sys.exit(0)"),
        Attack(2, "os._exit while loading", WRONG + "import os; os._exit(0)"),
        Attack(3, "object equal to all", "class E:\n def __eq__(s, o): return True\ndef add(a, b): return E()"),
        Attack(
            4,
            "int subclass equal to all",
            "class E(int):\n def __eq__(s, o): return True\n __hash__ = int.__hash__\ndef add(a, b): return E(5)",
        ),
        Attack(
            5,
            "patches the encoder to a constant",
            WRONG + "import gc, json, sys\njson.dumps = lambda *a, **k: '[\"value\", 5]'\n"
            "f = sys._getframe()\n"
            "while f:\n    f.f_globals['encode'] = lambda *a: 5\n    f = f.f_back\n",
            1,  # no more than the constant 5 earns
            ("failed", "protocol"),
        ),
        Attack(
            6,
            "walks frames for expected values",
            "import sys\ndef add(a, b):\n f = sys._getframe(); out = []\n while f:\n  out += [v for k, v in "
            "f.f_locals.items() if 'exp' in k.lower() or 'right' in k.lower()]; f = f.f_back\n return (out or [0])[0]",
        ),
        Attack(
            7,
            "scans objects for expected values",
            "import gc\ndef add(a, b):\n for o in gc.get_objects():\n"
            "  if isinstance(o, dict) and 'expected' in o: return o['expected']\n return 0",
        ),
        Attack(
            8,
            "raw verdict lines on the channel",
            WRONG + 'import os\nos.write(3, b\'[0,"ok",true]\\n{"reward":1}\\nPASSED\\n\')',
            outcomes=any_answer,
        ),
        Attack(9, "prints that tests passed", WRONG + "print('2 passed in 0.01s'); print('OK')"),
        Attack(
            10,
            "writes a forged end and exits",
            WRONG + frames('["loaded"]', '["done", 2, 0, ""]', '["passed", 2]') + "os._exit(0)",
            outcomes=any_answer,
        ),
        Attack(11, "200,000 open brackets", WRONG + frames("[" * 200_000), outcomes=any_answer),
        Attack(12, "100,000 digits", WRONG + frames('["value", ' + "9" * 100_000 + "]"), outcomes=any_answer),
        Attack(13, "NaN", "def add(a, b): return float('nan')"),
    ]


def _resources() -> list[Attack]:
    over = ("timeout",)
    memory = ("memory", "failed", "killed", "timeout")
    return [
        Attack(
            14, "flood of output", WRONG + "import os\nwhile True: os.write(3, b'x' * 65536)", outcomes=("protocol",)
        ),
        Attack(15, "endless loop", WRONG + "while True: pass", outcomes=over),
        Attack(
            16,
            "ignores all signals and sleeps",
            WRONG + "import signal, time\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
            " except Exception: pass\ntime.sleep(999)",
            outcomes=over,
        ),
        Attack(
            17,
            "closes the channel and spins",
            WRONG + "import os\nos.close(3)\nwhile True: pass",
            outcomes=("protocol",),
        ),
        Attack(18, "fills memory", attempt("x = [bytearray(1 << 20) for _ in range(100000)]"), 0, memory, True),
        Attack(19, "an int that fills memory", attempt("x = 1 << (1 << 40)"), 0, memory, True),
        Attack(
            20,
            "regular expression that never ends",
            WRONG + "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
            outcomes=over,
        ),
        Attack(
            21,
            "recursion without end",
            WRONG + "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
            outcomes=("memory", "failed", "killed", "timeout"),
        ),
        Attack(22, "reads address 0", WRONG + "import ctypes; ctypes.string_at(0)", outcomes=("killed",)),
        Attack(23, "fork bomb", attempt("import os\nwhile True: os.fork()"), tries=True),
        Attack(
            24,
            "orphan of an orphan",
            attempt(
                "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
                "    if os.fork() == 0: time.sleep(300)\n    os._exit(0)"
            ),
            tries=True,
        ),
        Attack(
            25,
            "thread bomb",
            attempt(
                "import threading, time\ntry:\n    for i in range(100000): threading.Thread(target=time.sleep, "
                "args=(99,), daemon=True).start()\nexcept RuntimeError as error: raise MemoryError(str(error))"
            ),
            tries=True,
            outcomes=("failed", "memory", "timeout"),
        ),
    ]


def _processes(place: Place) -> list[Attack]:
    folder = place.folder

    def tries(number: int, name: str, body: str) -> Attack:
        return Attack(number, name, attempt(body), tries=True)

    return [
        tries(26, "shell", f"import os\nif os.system('touch {folder}/pwn') != 0: raise OSError('refused')"),
        tries(27, "exec", f"import os\nos.execv('/bin/sh', ['sh', '-c', 'touch {folder}/pwn'])"),
        tries(28, "writes outside", f"open('{folder}/pwn', 'w').write('x')"),
        tries(29, "reads a secret anyone may read", f"open('{folder}/secret').read()"),
        tries(30, "reads /etc/passwd", "open('/etc/passwd').read()"),
        tries(
            31,
            "its environment",
            "import os\nknown = {'PYTHONHASHSEED', 'TZ', 'LC_ALL', 'LC_CTYPE', 'OMP_NUM_THREADS', 'PWD'}\n"
            "if set(os.environ) <= known: raise OSError('nothing there')",
        ),
        tries(
            32,
            "environments of other processes",
            "import glob\nfound = []\nfor path in glob.glob('/proc/[0-9]*/environ') + "
            f"['/proc/{place.victim}/environ']:\n    try: found.append(open(path).read())\n    except OSError: pass\n"
            "if not found: raise OSError('none')",
        ),
        tries(33, "lists processes", "import os\nos.listdir('/proc')"),
        tries(34, "kills a process of its user", f"import os\nos.kill({place.victim}, 9)"),
        tries(35, "kills all it may", "import os\nos.kill(-1, 9)"),
        tries(36, "kills the zygote", "import os\nos.kill(os.getppid(), 9)"),
        tries(37, "traces its parent", CHECKED + "must(library.ptrace(16, os.getppid(), 0, 0))"),
        tries(38, "its parent's memory", "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)"),
        tries(39, "process_vm_readv", CHECKED + "must(library.syscall(310, os.getppid(), 0, 0, 0, 0, 0))"),
        tries(40, "TCP on this machine", f"import socket\nsocket.create_connection(('127.0.0.1', {place.port}), 1)"),
        tries(
            41, "UDP", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))"
        ),
        tries(42, "Unix socket", f"import socket\nsocket.socket(socket.AF_UNIX).connect('{folder}/socket')"),
        tries(43, "abstract socket", f"import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{place.abstract}')"),
    ]


def _kernel(place: Place) -> list[Attack]:
    folder = place.folder

    def tries(number: int, name: str, body: str, outcomes: tuple[str, ...] = ("failed",)) -> Attack:
        return Attack(number, name, attempt(body), tries=True, outcomes=outcomes)

    return [
        tries(44, "user namespace", CHECKED + "must(library.unshare(0x10000000))"),
        tries(45, "mount", CHECKED + "must(library.mount(b't', b'/mnt', b'tmpfs', 0, None))"),
        tries(46, "io_uring", CHECKED + "must(library.syscall(425, 4, ctypes.create_string_buffer(256)))"),
        tries(
            47,
            "program in memory",
            "import os\nf = os.memfd_create('x')\nos.write(f, open('/bin/true', 'rb').read())\nos.execve(f, ['x'], {})",
        ),
        tries(
            48,
            "raises its limits",
            "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (999, 999))\n"
            "except ValueError as error: raise OSError(str(error))",
        ),
        tries(
            49, "4 GiB file where it stands", "f = open('big', 'wb')\nfor i in range(4096): f.write(b'x' * (1 << 20))"
        ),
        tries(50, "5,000 descriptors", "import os\nkept = [os.dup(3) for _ in range(5000)]"),
        tries(51, "size of a hidden file", f"import os\nos.stat('{folder}/secret')"),
        tries(52, "signals its parent's thread", CHECKED + "p = os.getppid()\nmust(library.syscall(234, p, p, 9))"),
        tries(
            53,
            "limits its parent",
            "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))",
        ),
        Attack(
            54,
            "x32 system call",
            WRONG + "import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)",
            outcomes=("killed",),
        ),
        tries(
            55,
            "inherited descriptors",
            "import os\nfound = []\nfor i in range(4, 300):\n    try: os.fstat(i); found.append(i)\n"
            "    except OSError: pass\nif not found: raise OSError('none')",
        ),
        tries(
            56,
            "setuid copy of a program",
            f"import os, shutil\nshutil.copy('/bin/true', '{folder}/su'); os.chmod('{folder}/su', 0o4755)",
        ),
        Attack(57, "answers by the hash of a text", "def add(a, b): return hash('x') % 1"),
        tries(58, "imports installed packages", "import torch"),
        Attack(
            59,
            "pickle payload",
            f"import os, pickle\nclass E:\n def __reduce__(s): return (os.system, ('touch {folder}/pwn',))\n"
            "def add(a, b): return E()",
        ),
        tries(
            60, "what another program left", "import builtins\nif not hasattr(builtins, 'LEAK'): raise OSError('none')"
        ),
    ]


def _more(place: Place) -> list[Attack]:
    folder = place.folder
    collisions = ",".join(f'[["i","{k * (2**61 - 1):#x}"],1]' for k in range(1, 9_000))
    return [
        Attack(
            61,
            "rebinds builtins",
            WRONG + "import builtins\nfor n in ('print', 'open', 'isinstance', 'len', 'type', 'list', 'map', 'zip'):\n"
            " setattr(builtins, n, lambda *a, **k: True)",
            outcomes=("failed", "protocol"),
        ),
        Attack(
            62,
            "writes files that Python or pytest run",
            attempt(
                "import os, sys\nworked = 0\nfor p in ['/', '.', '/tmp', *sys.path]:\n"
                " for n in ('conftest.py', 'sitecustomize.py', 'evil.pth'):\n"
                "  try: open(os.path.join(p, n), 'w'); worked += 1\n  except OSError: pass\n"
                "if not worked: raise OSError('none')"
            ),
            tries=True,
        ),
        Attack(
            63,
            "writes after its answer",
            "import atexit, os, struct, threading\ntext = b'[\"value\", 2]'\n"
            "def late(*a):\n for _ in range(99): os.write(3, struct.pack('!I', len(text)) + text)\n"
            "atexit.register(late)\nclass D:\n __del__ = late\nd = D()\n"
            "def add(a, b):\n threading.Timer(0.0, late).start()\n return 0",
            1,  # a forged constant may be what one test asks for
            ("failed", "protocol"),
        ),
        Attack(
            64,
            "traces the process that calls it",
            "import sys\ndef trace(frame, event, arg):\n"
            " if 'answer' in frame.f_locals or 'expected' in frame.f_locals: frame.f_locals['answer'] = ['value', 5]\n"
            " return trace\nsys.settrace(trace)\nf = sys._getframe()\nwhile f: f.f_trace = trace; f = f.f_back\n"
            "sys.addaudithook(lambda *a: None)\n" + WRONG,
            1,
            ("failed", "protocol"),
        ),
        Attack(
            65,
            "handlers and timers against its limits",
            WRONG + "import faulthandler, signal\nfaulthandler.cancel_dump_traceback_later()\n"
            "signal.signal(signal.SIGXCPU, lambda *a: None)\nsignal.signal(signal.SIGPROF, lambda *a: None)\n"
            "signal.setitimer(signal.ITIMER_PROF, 0.01, 0.01)\nwhile True: pass",
            outcomes=("timeout",),
        ),
        Attack(
            66,
            "stops the clock it can see",
            "import time\ntime.time = time.monotonic = time.perf_counter = time.process_time = lambda: 0\n"
            "x = sum(i * i for i in range(3_000_000))\n" + RIGHT,
            2,
            ("passed",),
        ),
        Attack(
            67,
            "machine code of its own",
            # mov eax, 57 (fork); syscall; ret
            attempt(
                "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b8390000000f05c3'))\n"
                "call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
                "if call() < 0: raise OSError('refused')"
            ),
            tries=True,
        ),
        Attack(68, "half of a surrogate pair", "def add(a, b): return '\\ud800'"),
        Attack(
            69, "dictionary of colliding keys", WRONG + frames('["loaded"]', f'["value",["d",{collisions}]]'), 0, ()
        ),
        Attack(74, "NUL in the source", RIGHT + "\0"),
        Attack(76, "source of 10 MiB", RIGHT + "#" * (10 << 20)),
        Attack(
            77, "odd but honest source", "# -*- coding: latin-1 -*-\ndef \uff41dd(a, b): return a + b\n", 2, ("passed",)
        ),
        Attack(
            78,
            "outlives its parent",
            attempt(CHECKED + "must(library.prctl(1, 0, 0, 0, 0))"),
            tries=True,
        ),
        Attack(
            79,
            "signals by owning a descriptor",
            attempt(f"import fcntl\nfcntl.fcntl(3, 10, 9)\nfcntl.fcntl(3, 8, {place.victim})"),
            tries=True,
        ),
        Attack(80, "modes of another's file", attempt(f"import os\nos.chmod('{folder}/secret', 0)"), tries=True),
        Attack(81, "times of another's file", attempt(f"import os\nos.utime('{folder}/secret', (1, 1))"), tries=True),
        Attack(
            82, "a system call of tomorrow", attempt(CHECKED + "must(library.syscall(463, 0, 0, 0, 0))"), tries=True
        ),
        Attack(83, "length of another's file", attempt(f"import os\nos.truncate('{folder}/secret', 0)"), tries=True),
        Attack(
            84,
            "addresses of the machine",
            attempt("import fcntl, struct\nfcntl.ioctl(3, 0x8912, struct.pack('iP', 0, 0))"),  # SIOCGIFCONF
            tries=True,
        ),
        Attack(
            85,
            "which processes there are",
            attempt(
                "import os\nfound = []\n"
                "for call in (os.getsid, os.getpgid, lambda p: os.getpriority(0, p), os.sched_getparam):\n"
                f"    try: found.append(call({place.victim}))\n    except PermissionError: pass\n"
                "if not found: raise OSError('none')"
            ),
            tries=True,
        ),
    ]
