"""Programs of this project as processes that have the libraries' imports behind them.

Importing torch, Lightning and transformers takes a process eight seconds of computing; a tiny
training half a second. So one process imports everything once, and each program is forked from it.
``Popen`` and ``run`` are those of ``subprocess`` otherwise: the program has arguments, environment,
folder, streams, signal mask and session of its own, is a child of the process that starts it, and
ends as an interpreter does.

What has to meet the interpreter itself (signals while it starts, what is imported when) takes
``subprocess``. So does, by itself, what cannot be had here: another interpreter, a variable that
libraries read on import, another system than Linux.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import inspect
import json
import os
import pickle
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
LIBRARIES: Final = (
    "hydra",
    "lightning.pytorch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.vipllava.modeling_vipllava",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.utils.data",
    "deepspeed",
    "sklearn.datasets",
    "pytest",
    "torch.export",
    "torch.profiler",
)
"""What trainings and test modules import; a name that a library's version lacks is left out."""
READ_ON_IMPORT: Final = (
    *("HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "MKL_", "MALLOC_", "DS_ACCELERATOR"),
    *("LANG", "LC_", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONWARNINGS", "PYTHONHASHSEED"),
)
_PR_SET_CHILD_SUBREAPER: Final = 36
_STARTS_WITHIN_S: Final = 300
_ASKING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What is meant for programs, whose process group a server is in."""
_ROOM_FOR_ARGUMENTS: Final = 8192


class Popen(subprocess.Popen):
    """``subprocess.Popen`` of ``[sys.executable, ...]`` without the time of the imports.

    Args:
        given: arguments of ``subprocess.Popen``.
        nested: the processes that the program starts, as Lightning does its ranks, are forked, too.
        options: keyword arguments of ``subprocess.Popen``.
    """

    def __init__(self, *given: Any, nested: bool = False, **options: Any) -> None:
        self._nested = nested
        super().__init__(*given, **options)

    def _execute_child(self, *given: Any) -> None:
        whole = super()._execute_child
        values = inspect.signature(whole).bind(*given).arguments
        environment = dict(os.environ if values["env"] is None else values["env"])
        if not _can_be_forked(values, environment):
            whole(*given)
            return
        streams = ("p2cread", "c2pwrite", "errwrite")
        files = [number if values[s] == -1 else values[s] for number, s in enumerate(streams)]
        program = {
            "arguments": [os.fspath(argument) for argument in values["args"]],
            "environment": environment,
            "folder": os.fspath(values["cwd"] or Path.cwd()),
            "session": bool(values["start_new_session"]),
            "blocked": [*signal.pthread_sigmask(signal.SIG_BLOCK, [])],
            "nested": self._nested,
        }
        try:
            self.pid = _Server.of_this_process().start(program, files)
            self._child_created = True
        finally:
            close: Any = self._close_pipe_fds  # type: ignore[attr-defined]
            close(*(values[s] for s in _PIPES))


class NestedPopen(Popen):
    """As it is where the programs' own programs are forked, too."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, nested=True, **options)


_PIPES: Final = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def run(
    command: list[str],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess:
    """``subprocess.run`` with the :class:`Popen` of this module."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def call(function: Callable[..., object], *arguments: Any, **options: Any) -> Popen:
    """Start a process that calls a function of a module with arguments that can be pickled.

    Args:
        function: to call.
        arguments: its own.
        options: keyword arguments of :class:`Popen`.
    """
    command = [sys.executable, "-c", _CALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = Popen(command, env=environment, stdin=subprocess.PIPE, **options)
    assert process.stdin is not None
    with process.stdin:
        pickle.dump((function, arguments), process.stdin)
    return process


_CALL: Final = """\
import pickle, sys
function, arguments = pickle.load(sys.stdin.buffer)
function(*arguments)
"""


def _can_be_forked(values: dict[str, Any], environment: dict[str, str]) -> bool:
    if not sys.platform.startswith("linux") or values["shell"] or values["executable"]:
        return False
    if values["preexec_fn"] or values["pass_fds"] or values["args"][0] != sys.executable:
        return False
    first = os.fspath(values["args"][1])
    if first.startswith("-") and first not in ("-c", "-m", "-u"):
        return False
    before = _Server.of_this_process().environment
    names = [n for n in before.keys() | environment.keys() if n.startswith(READ_ON_IMPORT)]
    return all(before.get(name) == environment.get(name) for name in names)


class _Server:
    """The process that has imported everything, as the one that asks it sees it."""

    _own: _Server | None = None

    def __init__(
        self, connection: socket.socket, environment: dict[str, str], said: IO[bytes] | None = None
    ) -> None:
        connection.settimeout(_STARTS_WITHIN_S)
        self.process = os.getpid()
        self.environment = environment
        self._socket = connection
        self._said = said
        self._lock = threading.Lock()

    @classmethod
    def of_this_process(cls) -> _Server:
        if cls._own is None or cls._own.process != os.getpid():
            ours, theirs = _connection()
            environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())]
            with theirs:
                server = subprocess.Popen(
                    [*command, " " * _ROOM_FOR_ARGUMENTS],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    # No files: Python's streams would remember that they can be wound back.
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                )
            cls._own = cls(ours, environment, server.stdout)
            atexit.register(cls._own._end, server)
        return cls._own

    def _end(self, server: subprocess.Popen) -> None:
        if self.process == os.getpid():
            self._socket.close()
            server.communicate()

    def start(self, program: dict[str, Any], files: list[int]) -> int:
        """Start a program as a child of this process and return its number."""
        with self._lock:
            # Orphans of this process become its children meanwhile: see _serve.
            _be_reaper(True)
            try:
                socket.send_fds(self._socket, [json.dumps(program).encode()], files)
                answer = self._socket.recv(32)
                assert answer, self._said and self._said.read().decode()
                return int(answer)
            finally:
                _be_reaper(False)


def _connection() -> tuple[socket.socket, socket.socket]:
    """Return both ends; the kernel keeps the messages apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _be_reaper(on: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def _preload() -> None:
    """Import the libraries and all of the package that can be imported here."""
    import vipllava

    names = [module.name for module in pkgutil.walk_packages(vipllava.__path__, "vipllava.")]
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks on import
    for name in (*LIBRARIES, *names):
        with suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the pages stay shared


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork the programs that are asked for; return one in its own process.

    It is forked twice: the process between ends, and the kernel gives its child to the process
    that asked, which then waits for a child of its own.
    """
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        read, write = os.pipe()
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            os.write(write, b"!")
            for file in (read, write, *files):
                os.close(file)
            continue
        if os.fork():
            os._exit(0)
        os.read(read, 1)
        os.close(read)
        os.close(write)
        program = json.loads(message)
        if program["session"]:
            os.setsid()
        if program["nested"]:
            ours, theirs = _connection()
            if os.fork() == 0:
                ours.close()
                for file in (connection.detach(), *files):
                    os.close(file)
                for number in _ASKING:
                    signal.signal(number, _ignore)
                return _serve(theirs)
            theirs.close()
            _Server._own = _Server(ours, _ENVIRONMENT)
            subprocess.Popen = NestedPopen
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        connection.send(str(os.getpid()).encode())
        connection.close()
        return program


def _become(program: dict[str, Any]) -> list[str]:
    """Make this process what the interpreter would be at the start; return its arguments."""
    _show(program["arguments"])
    os.chdir(program["folder"])
    os.environ.clear()
    os.environ.update(program["environment"])
    # Handlers of log messages hold these very objects.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    for number in _ASKING:
        if signal.getsignal(number) is _ignore:
            signal.signal(
                number,
                signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL,
            )
    # Lightning looks on import.
    from lightning.fabric.utilities import rank_zero

    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    signal.pthread_sigmask(signal.SIG_SETMASK, program["blocked"])
    here = program["environment"].get("PYTHONPATH", "")
    sys.path[:] = [*filter(None, here.split(os.pathsep)), *_PATH]
    return program["arguments"][1:]


def _show(arguments: list[str]) -> None:
    """Have the system show these as the command line, by which processes are known."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begins, ends = int(fields[45]), int(fields[46])
    text = "\0".join(arguments).encode()[: ends - begins - 1]
    ctypes.memmove(begins, text.ljust(ends - begins, b"\0"), ends - begins)


def _execute(arguments: list[str]) -> None:
    """Run a program as ``python ARGUMENTS`` does, and end this process.

    Not by taking all modules apart, which would copy every page of memory first.
    """
    code = None
    try:
        _run(arguments)
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            raise
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-u":
        arguments = arguments[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    first, *rest = arguments
    if first == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # else runpy warns
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


def _ignore(number: int, frame: object) -> None:
    """Leave it to the programs, which hear it."""


if __name__ == "__main__":
    _ENVIRONMENT = dict(os.environ)
    _PATH = [path for path in sys.path if path not in (str(Path.cwd()), str(ROOT), "")]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _ignore)  # else it is ignored (nohup), and stays so
    _preload()
    _execute(_become(_serve(socket.socket(fileno=int(sys.argv[1])))))
