"""How the processes of a job end: with the one that started them, and on Ctrl-C.

Whoever starts several processes ends them when one of them fails. If it is killed itself, nobody
does: under NCCL the others wait in a collective until its timeout, half an hour, and hold their
devices so long. So each of them asks the kernel to be ended with its parent. What ends a job (a
terminal, a queue, ``timeout``) signals all of its processes at once: the main process listens.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Final

PARENT_VARIABLE: Final = "VIPLLAVA_PARENT"
"""The process that started this one, which may have died before this one can ask."""
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
"""What a shell says of a program that Ctrl-C has ended."""
_NAMES: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Windows has two of them
STOP_SIGNALS: Final = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""What asks a job to stop: a person, a closed terminal, or a queue, before the time is up."""
_HELD: Final = {n for n in STOP_SIGNALS if n != signal.SIGTERM or hasattr(signal, "sigwaitinfo")}
"""Signals a worker does not hear; it cannot tell who sent SIGTERM without a wait for it (macOS)."""
RANK_VARIABLES: Final = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""What launchers number processes by; all of them are 0 in the first one."""
_TORCHRUN: Final = "TORCHELASTIC_RUN_ID"
SAME_CTRL_C_S: Final = 1.0
"""Seconds in which a second Ctrl-C is taken for the first: launchers hand on what they get."""
_ENDING_S: Final = 30.0
"""Seconds in which a parent has ended that Ctrl-C has asked to; an error told later is another."""

Handler = Callable[[int, FrameType | None], Any]


def is_first_process() -> bool:
    """Whether this is the first process of its job, by what its launcher says.

    Lightning's own guess takes the first of every node where only ``NODE_RANK`` tells nodes apart.
    """
    # torchrun numbers nodes as they come, whatever Slurm says of them.
    names = ("RANK",) if _TORCHRUN in os.environ else RANK_VARIABLES
    return all(os.environ.get(name, "0") in ("", "0") for name in names)


def begin() -> None:
    """Prepare this process, a program's own; to be called before anything heavy is imported.

    It ends with the process of the job that started it; on Ctrl-C with one line and exit code 130
    unless somebody else listens; on a second one at once, even if it hangs in a library.
    """
    if find_spec("hydra") is None:
        sys.stderr.write(
            f"error: {sys.executable} lacks the packages that this needs: activate the environment "
            "(source .venv/bin/activate), or start it with .venv/bin/python\n"
        )
        sys.exit(2)
    # Threads that wait for each other sleep. OpenMP's own spin: where another process wants the
    # core, a step waits for it over and over, and training is half as fast. It is read when torch
    # is imported (docs/benchmarks.md, `contention`).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    ends = end_with_parent()
    # Else it has begun already, or Ctrl-C is ignored: a shell's background job.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Lightning kills the first process of a node for one that ends before it.
        waits = ends and os.environ.get("LOCAL_RANK", "0") != "0" and _TORCHRUN not in os.environ
        signal.signal(signal.SIGINT, _leave_to_parent if waits else _end)
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_second, args=(read,), daemon=True, name="ctrl-c").start()
    # What the process that started this one has held, see :func:`signals_held`.
    _mask("SIG_UNBLOCK", STOP_SIGNALS)


@cache
def compute_on_cpu() -> None:
    """Let torch compute with one thread more than cores, unless `OMP_NUM_THREADS` is set.

    They get a larger share of the cores beside another busy process: on two cores 0.83 of the speed
    alone, where as many threads as cores get 0.64. Training alone, its data worker beside it, takes
    as long with either.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(torch.get_num_threads() + 1)


def end_with_parent() -> bool:
    """Ask the kernel to kill this process when its parent dies, if the job started it.

    SIGKILL, because SIGTERM asks for a checkpoint, which needs the others. Returns whether it will:
    not in the process that a person started, and not on macOS and Windows.
    """
    named = os.environ.pop(PARENT_VARIABLE, None)
    # torchrun sets LOCAL_RANK for what it starts, Lightning too; srun looks after its own.
    if named is None and "LOCAL_RANK" not in os.environ:
        return False
    parent = os.getppid()
    if not _end_with_parent():
        return False
    if os.getppid() != parent or (named is not None and not _runs(named)):
        os.kill(os.getpid(), signal.SIGKILL)  # it died before
    return True


@contextmanager
def naming_parent() -> Generator[None]:
    """Tell the processes that are started meanwhile which one they belong to."""
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT_VARIABLE, None)


def run_child(command: Sequence[str]) -> tuple[int, signal.Signals | None]:
    """Run a command that calls :func:`begin`, hand on what asks to stop, and wait for its end.

    Returns its exit code, negative for a signal, and the first signal that asked it to stop.
    """
    asked: list[signal.Signals] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        leave_closed_terminal()
        child.send_signal(number)

    with naming_parent(), signals_held():
        child = subprocess.Popen(command)
    before = listen(forward)
    try:
        code = child.wait()
    finally:
        stop_listening(forward, before)
    return code, asked[0] if asked else None


def shell_code(code: int) -> int:
    """Return a child's exit code as a shell does, where a signal's number is added to 128."""
    return code if code >= 0 else 128 - code


def listen(handler: Handler) -> dict[int, Any]:
    """Have a function called by whatever asks to stop; what is ignored (``nohup``) stays so.

    Returns who listened before, for :func:`stop_listening`; nobody outside the main thread.
    """
    in_main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in STOP_SIGNALS if in_main and signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def stop_listening(handler: Handler, before: dict[int, Any]) -> None:
    """Give signals back, except those that somebody else has taken since."""
    for number, earlier in before.items():
        if signal.getsignal(number) == handler:
            signal.signal(number, earlier or signal.SIG_DFL)


def leave_closed_terminal() -> None:
    """Drop what would be written to a terminal that is closed: each such write is an error."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def say(message: str) -> None:
    """Write a line to the error stream, from a signal's handler, too."""
    with suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


@contextmanager
def signals_held() -> Generator[None]:
    """Have the processes that are started meanwhile not hear what asks the job to stop.

    Python would end with a traceback where Ctrl-C meets it before :func:`begin` lets it hear.
    """
    before = _mask("SIG_BLOCK", _HELD)
    try:
        yield
    finally:
        _mask("SIG_SETMASK", before)


def start_worker(worker_id: int = 0) -> None:
    """Prepare a loader's process (a ``worker_init_fn``): only its main process ends it."""
    _mask("SIG_BLOCK", _HELD)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if _end_with_parent() and not parent.is_alive():
        os._exit(1)
    if not hasattr(signal, "sigwaitinfo"):
        return

    def obey() -> None:
        # torch ends a worker that does not answer by SIGTERM; a queue sends it to all processes.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)  # as torch's own handler does: anything else is a failed worker to its parent

    threading.Thread(target=obey, daemon=True).start()


def _mask(how: str, signals: Iterable[int]) -> Iterable[int]:
    """Change which signals this process does not hear; return those of before."""
    has_masks = hasattr(signal, "pthread_sigmask")  # Windows has none
    return signal.pthread_sigmask(getattr(signal, how), signals) if has_masks else ()


def _end_with_parent() -> bool:
    on_linux = sys.platform.startswith("linux")
    return on_linux and not ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _runs(process: str) -> bool:
    """Whether there is such a process, and it is not only waiting to be taken note of."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2]
    except OSError:
        return False
    return state.split()[0] not in ("Z", "X")


def _leave_to_parent(number: int, frame: FrameType | None) -> None:
    """Go on, as the parent may wait for it: it ends for Ctrl-C then, and this process with it."""
    sys.excepthook = _keep_quiet


def _keep_quiet(*error: Any) -> None:
    """Say nothing of what the parent's end breaks, while the kernel ends this process for it."""
    time.sleep(_ENDING_S)
    sys.__excepthook__(*error)


def _end(number: int, frame: FrameType | None) -> None:
    say("stopped by Ctrl-C")
    sys.exit(EXIT_INTERRUPTED)


def _end_at_second(read: int) -> None:
    """Wait for a second Ctrl-C; in a thread, as a collective that hangs lets no handler run."""
    first: float | None = None
    while number := os.read(read, 1):
        if number[0] != signal.SIGINT:
            continue
        first = first or time.monotonic()
        if time.monotonic() - first > SAME_CTRL_C_S:
            for stream in filter(os.isatty, (1, 2)):
                os.write(stream, b"\x1b[?25h")  # show the cursor, which a progress bar has hidden
            say("ended at once by a second Ctrl-C")
            os._exit(EXIT_INTERRUPTED)
