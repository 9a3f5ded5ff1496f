"""The interactive chat: a line in, an answer or a command's effect out, until it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from vipllava.processes import EXIT_INTERRUPTED
from vipllava.serve.terminal.commands import run_command
from vipllava.serve.terminal.completion import ChatCompleter
from vipllava.serve.terminal.talk import Talk
from vipllava.types import VipLlavaError

PROMPT: Final = "> "


def interact(talk: Talk, environment: Mapping[str, str]) -> int:
    """Show the picture, chat, and save where that was asked for; return the exit code."""
    history, problem = open_history(environment)
    if talk.chat.image is not None:
        talk.show()
    for number, words in enumerate(talk.chat.words):
        talk.out.say(f"{{{number}}} is `{words}`")
    talk.out.hint("/help lists the commands; Ctrl-D ends")
    if problem is not None:
        talk.out.hint(problem)
    code = run_loop(talk, history)
    talk.end()
    return code


def run_loop(talk: Talk, history: History) -> int:
    """Answer until the person ends it; return the exit code.

    An empty line does nothing. Ctrl-C ends an answer, or empties the line; twice at the prompt it
    ends the chat, as Ctrl-D and ``/quit`` do.

    Args:
        talk: the conversation.
        history: lines of earlier chats.
    """
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=ChatCompleter(talk),
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="  ",
        reserve_space_for_menu=6,
    )
    interrupted = False
    with ctrl_c_interrupts():
        while not talk.has_ended:
            try:
                line = session.prompt(PROMPT)
            except EOFError:
                break
            except KeyboardInterrupt:
                if interrupted:
                    return EXIT_INTERRUPTED
                interrupted = True
                talk.out.hint("Ctrl-C again ends the chat, as Ctrl-D does")
                continue
            interrupted = False
            _do(talk, line)
    return 0


def _do(talk: Talk, line: str) -> None:
    """Ask or do what a line says; what is wrong with it is said, and the chat goes on."""
    if not line.strip():
        return
    try:
        if line.startswith("/"):
            run_command(talk, line)
        else:
            talk.ask(line.strip())
    except KeyboardInterrupt:
        talk.out.hint("cancelled; the conversation is as it was before")
    except VipLlavaError as error:
        talk.out.error(error)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def another_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


@contextmanager
def ctrl_c_interrupts() -> Generator[None]:
    """Have Ctrl-C raise KeyboardInterrupt meanwhile, however often it comes.

    :func:`vipllava.processes.begin` ends a program at the first one, and at once at a second.
    """
    before: Any = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def open_history(environment: Mapping[str, str]) -> tuple[History, str | None]:
    """Return the lines of earlier chats, and why they are not kept, where they cannot be.

    They lie in ``vipllava/chat_history`` of ``XDG_STATE_HOME``, by default ``~/.local/state``, and
    only their owner may read them.
    """
    try:
        state = environment.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
        path = Path(state, "vipllava", "chat_history")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except (OSError, RuntimeError) as error:
        return InMemoryHistory(), f"what is typed is not kept for the next chat: {error}"
    return FileHistory(path), None
