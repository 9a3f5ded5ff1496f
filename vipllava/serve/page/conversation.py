"""One person's conversation with one to four models about one picture."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from vipllava.inference.marked import Marked, draw_marks
from vipllava.inference.protocol import (
    Delta,
    FinishReason,
    Generation,
    GenerationEngine,
    Sampling,
    call_it,
)
from vipllava.serve.errors import ApiError
from vipllava.serve.limits import Held
from vipllava.serve.page.feedback import Feedback
from vipllava.serve.page.markdown import answer_html
from vipllava.serve.page.marks_of_page import plan_within
from vipllava.serve.page.models import ModelList
from vipllava.serve.page.pictures import Picture, PictureStore
from vipllava.serve.page.streams import stream_together
from vipllava.types import Turn, VipLlavaError
from vipllava.visual_prompts.mark_fields import mark_to_fields
from vipllava.visual_prompts.marks import Mark

MOST_MODELS: Final = 4
LONGEST_QUESTION: Final = 20_000
LETTERS: Final = "ABCD"
MOST_BYTES: Final = 64 * 2**20
"""What one conversation takes in memory; see :attr:`Conversation.num_bytes`."""
_COPIES: Final = 2
"""Of a picture that is asked about: what was decoded, and what is drawn on it."""
_PER_FIELD: Final = 16
"""Bytes of Python's numbers and pairs for a letter of marks as JSON."""
_PER_LETTER: Final = 4
_PER_ROUND: Final = 4096
_PAUSE_S: Final = 0.05
_MENTION: Final = re.compile(r"(\{\{\d{1,6}\}\})|\{(\d{1,6})\}")

State = Literal["waiting", "running", "done", "stopped", "failed"]
View = dict[str, Any]
_STATES: Final[dict[FinishReason, State]] = {
    "stop": "done", "length": "done", "cancelled": "stopped", "error": "failed",
}  # fmt: skip


class QuestionRefused(VipLlavaError):
    """A question cannot be asked as it is; nothing was asked."""


@dataclass
class ModelAnswer:
    """What one model said in one round."""

    text: str = ""
    state: State = "waiting"
    cut: bool = False  # at the limit of new tokens
    error: str | None = None
    rating: Literal["up", "down"] | None = None
    flagged: bool = False


@dataclass(eq=False)
class Round:
    """One question and the answers of all models, in the order that they are shown."""

    question: str  # as written, with ``{0}``
    asked: str  # as the models read it
    marks: tuple[Mark, ...]
    words: tuple[str, ...]
    drawn: str | None  # the name of the picture with its marks
    sampling: Sampling
    answers: list[ModelAnswer]
    num_bytes: int  # of everything but the answers
    vote: str | None = None


class Conversation:
    """Rounds of questions, and everything that a page's buttons do to them.

    Used from one event loop.

    Args:
        store: the pictures.
        models: who can be asked.
        feedback: keeps votes.
    """

    def __init__(self, store: PictureStore, models: ModelList, feedback: Feedback) -> None:
        self.store, self.models, self.feedback = store, models, feedback
        self.picture: Picture | None = None
        self.names: tuple[str, ...] = ()  # in the order that they are shown
        self.blind = False  # whether names are hidden until a vote
        self.rounds: list[Round] = []
        self._notice: View | None = None
        self._forgotten = False
        self._answering = asyncio.Lock()
        self._running: list[tuple[GenerationEngine, str]] = []
        self._stopped = False
        self._number = 0

    @property
    def num_bytes(self) -> int:
        """What it takes in memory, about; its picture is the store's."""
        return sum(
            each.num_bytes + _PER_LETTER * sum(len(answer.text) for answer in each.answers)
            for each in self.rounds
        )

    @property
    def answering(self) -> bool:
        """Whether an answer is being written."""
        return self._answering.locked()

    def say_forgotten(self) -> None:
        """Say until the next question that this one has taken the place of another."""
        self._forgotten, self._notice = True, {"kind": "forgotten"}

    async def ask(
        self,
        question: str,
        picture: str | None,
        marks: Sequence[Mark],
        names: Sequence[str],
        sampling: Sampling,
        *,
        blind: bool = False,
    ) -> AsyncGenerator[View]:
        """Ask the models; yield what the page shows, again and again until all have answered.

        Another picture, other models or hiding their names begins a new conversation. What cannot
        be asked is said in the view's notice, and leaves the conversation as it is.

        Args:
            question: may say ``{0}`` for the first mark.
            picture: its name, or None for a question without an image.
            marks: on the picture.
            names: one to four models.
            sampling: how they answer.
            blind: whether names stay hidden until a vote.
        """
        if self._answering.locked() and self.rounds:
            yield self.refusal("an answer is being written: wait for it, or stop it")
            return
        async with self._answering:
            self._stopped = False
            with self.store.work.memory.hold() as held:
                try:
                    marked = await self._begin(
                        question, picture, marks, names, sampling, blind, held
                    )
                except (VipLlavaError, ApiError) as error:
                    refused = str(error)
                else:
                    refused = None
                    async with aclosing(self._answer(self.rounds[-1], marked)) as views:
                        async for view in views:
                            yield view
        yield self.view() if refused is None else self.refusal(refused)

    async def regenerate(self, sampling: Sampling) -> AsyncGenerator[View]:
        """Ask the last question anew, of the same picture and marks."""
        if self._answering.locked() or not self.rounds:
            yield self.view()
            return
        async with self._answering:
            self._stopped, self._notice = False, None
            old, refused = self.rounds[-1], None
            with self.store.work.memory.hold() as held:
                try:
                    marked = await self._draw(self.picture, old.marks, held)
                except (VipLlavaError, ApiError) as error:
                    refused = str(error)
                else:
                    new = replace(
                        old, sampling=sampling, answers=[ModelAnswer() for _ in self.names],
                        vote=None,
                    )  # fmt: skip
                    self.rounds = [new if each is old else each for each in self.rounds]
                    async with aclosing(self._answer(new, marked)) as views:
                        async for view in views:
                            yield view
        yield self.view() if refused is None else self.refusal(refused)

    def stop(self) -> None:
        """End what is being written; what has been stays."""
        self._stopped = True
        for engine, key in self._running:
            engine.cancel(key)

    def clear(self) -> None:
        """Forget every round; the picture and its marks are the page's."""
        self.stop()
        self.rounds, self.names, self.blind, self._notice = [], (), False, None
        self._forgotten = False

    async def vote(self, choice: str) -> None:
        """Record which answer of the last round is the better one, and say who is who.

        Args:
            choice: a letter, ``tie`` or ``bad`` (all of them).

        Raises:
            QuestionRefused: there is nothing to choose from.
            OSError: the vote could not be written.
        """
        letters = LETTERS[: len(self.names)]
        last = self._finished()
        if len(letters) < 2 or last.vote or not (choice in ("tie", "bad") or choice in [*letters]):
            raise QuestionRefused(f"there is no vote {choice!r} about this round")
        winner = self.names[letters.index(choice)] if choice in letters else None
        facts = {"choice": choice, "winner": winner, "blind": self.blind} | self._facts(last)
        last.vote = choice  # before the line is written: a click is one vote
        try:
            await asyncio.to_thread(self.feedback.add, "vote", facts)
        except OSError:
            last.vote = None
            raise
        self.blind = False

    async def rate(self, place: int, kind: str) -> None:
        """Record ``up``, ``down`` or ``flag`` for one answer of the last round.

        Raises:
            QuestionRefused: there is no such answer.
            OSError: it could not be written.
        """
        last = self._finished()
        if not 0 <= place < len(last.answers) or kind not in ("up", "down", "flag"):
            raise QuestionRefused(f"there is no answer {place} to rate {kind!r}")
        facts = {"model": self.names[place], "blind": self.blind} | self._facts(last)
        await asyncio.to_thread(self.feedback.add, kind, facts)
        answer = last.answers[place]
        if kind == "flag":
            answer.flagged = True
        else:
            answer.rating = kind

    def view(self) -> View:
        """Return what the page shows, without a name that is hidden."""
        # Views of a stream and of a button may pass each other on their way: the newer one counts.
        self._number = max(self._number + 1, time.time_ns() // 10**6)
        return {
            "number": self._number,
            "rounds": [self._round_view(each) for each in self.rounds],
            "blind": self.blind, "busy": self._answering.locked(), "notice": self._notice,
            "picture": self.picture and {"sha256": self.picture.sha256, "size": self.picture.size},
        }  # fmt: skip

    async def _begin(
        self, question: str, picture: str | None, marks: Sequence[Mark], names: Sequence[str],
        sampling: Sampling, blind: bool, held: Held,
    ) -> Marked:  # fmt: skip
        if not question.strip() or len(question) > LONGEST_QUESTION:
            raise QuestionRefused(f"a question has 1 to {LONGEST_QUESTION} letters")
        if question != whole_characters(question):
            raise QuestionRefused("the question has half a character: write that one anew")
        if not 1 <= len(set(names)) == len(names) <= MOST_MODELS:
            if not self.models.names:
                raise QuestionRefused("no model is there to be asked: no server answers")
            raise QuestionRefused(f"choose 1 to {MOST_MODELS} models")
        for name in names:
            self.models.engine(name)
        opened = None if picture is None else self.store.picture(picture)
        same = opened is self.picture and set(names) == set(self.names)
        hides = blind and len(names) > 1
        known = self.names if same and self.rounds else ()
        begins_anew = not known or (hides and not self.blind and not self.rounds[-1].vote)
        rounds = [] if begins_anew else self.rounds
        for each in rounds:
            _with_marks_of_now(each, marks)
        fields = await asyncio.to_thread(_num_letters, marks)
        num_bytes = _PER_ROUND + _PER_LETTER * len(question) + _PER_FIELD * fields
        if not begins_anew and self.num_bytes + num_bytes > MOST_BYTES:
            raise QuestionRefused("this chat is as long as one may be: clear it to go on")
        marked = await self._draw(opened, marks, held)
        said = marked.said(question)
        shown = None
        if opened is not None and marked.plan is not None:
            shown = self.store.keep_drawn(opened, marked.plan)
        self._notice = {"kind": "restarted"} if begins_anew and self.rounds else None
        if self._forgotten:
            self._forgotten, self._notice = False, {"kind": "forgotten"}
        if begins_anew:
            self.names = tuple(names)
            if hides:
                secrets.SystemRandom().shuffle(order := list(names))
                self.names = tuple(order)
        self.blind = hides and (begins_anew or self.blind)
        self.picture = opened
        self.rounds = [
            *rounds,
            Round(
                question, said, tuple(marks), marked.words, shown,
                sampling, [ModelAnswer() for _ in self.names], num_bytes,
            ),
        ]  # fmt: skip
        return marked

    async def _draw(self, picture: Picture | None, marks: Sequence[Mark], held: Held) -> Marked:
        """Draw marks on a picture, once for all models; ``held`` takes its memory.

        Raises:
            VipLlavaError: the picture is gone, or a mark cannot be drawn.
            ApiError: too many wait, or the memory is full.
        """
        if picture is None:
            return draw_marks(None, marks)
        held.take(picture.num_bytes * _COPIES)

        def draw() -> Marked:
            if self._stopped:
                raise QuestionRefused("it was stopped before it was asked")
            plan_within(marks, picture.size)
            return draw_marks(self.store.image(picture), marks)

        return await self.store.work.drawing.run(draw)

    def _turns(
        self, asked: Round, place: int, earlier: Sequence[Round], marked: Marked
    ) -> list[Turn]:
        """Return what one model is asked: the rounds that it answered, and the new question."""
        turns: list[Turn] = []
        for each in earlier:
            answer = each.answers[place]
            if answer.text:
                question = marked.said(_with_marks_of_now(each, asked.marks))
                turns += [Turn("user", question), Turn("assistant", answer.text)]
        return [*turns, Turn("user", asked.asked)]

    async def _answer(self, asked: Round, marked: Marked) -> AsyncGenerator[View]:
        """Stream the answers of a round into it."""
        # The page may be cleared meanwhile.
        earlier, names = self.rounds[: self.rounds.index(asked)], self.names
        yield self.view()
        places: list[int] = []
        questions: list[tuple[GenerationEngine, Generation]] = []
        for place, (name, answer) in enumerate(zip(names, asked.answers, strict=True)):
            try:
                turns = await asyncio.to_thread(self._turns, asked, place, earlier, marked)
                request = marked.request(turns, f"page-{secrets.token_hex(8)}")
                questions.append((self.models.engine(name), Generation(request, asked.sampling)))
                places.append(place)
            except VipLlavaError as error:
                answer.state, answer.error = "failed", str(error)
        self._running = [(engine, each.request.key) for engine, each in questions]
        try:
            async with aclosing(stream_together(questions, _PAUSE_S)) as stream:
                async for batch in stream:
                    for number, delta in batch:
                        _take(asked.answers[places[number]], delta)
                    if self._stopped:
                        self.stop()  # of those that had not begun when it was asked for
                    yield self.view()
        finally:
            self._running = []
            for answer in asked.answers:
                if answer.state in ("waiting", "running"):
                    answer.state = "stopped"
        if asked in self.rounds:
            await asyncio.to_thread(self.feedback.add, "answer", self._facts(asked))

    def _finished(self) -> Round:
        if not self.rounds or self._answering.locked():
            raise QuestionRefused("there is no finished answer")
        return self.rounds[-1]

    def refusal(self, text: str) -> View:
        """Return the view with what a person can do about a wish that cannot be met."""
        return self.view() | {"notice": {"kind": "error", "text": whole_characters(text)}}

    def _facts(self, asked: Round) -> dict[str, Any]:
        """Return what a line of feedback says about a round."""
        picture = self.picture
        answers = [
            {"letter": letter, "model": name, "text": answer.text, "state": answer.state}
            for letter, name, answer in zip(LETTERS, self.names, asked.answers, strict=False)
        ]
        return {
            "picture": picture and picture.sha256, "size": picture and picture.size,
            "marks": [mark_to_fields(mark) for mark in asked.marks],
            "question": asked.question, "asked": asked.asked, "turn": self.rounds.index(asked),
            "answers": answers, "sampling": asdict(asked.sampling),
        }  # fmt: skip

    def _round_view(self, each: Round) -> View:
        answers = [
            {
                "name": None if self.blind else name, "letter": letter,
                "text": (said := whole_characters(answer.text)),
                "html": answer_html(said), "state": answer.state, "cut": answer.cut,
                # a message may name the model
                "error": answer.error and ("" if self.blind else whole_characters(answer.error)),
                "rating": answer.rating, "flagged": answer.flagged,
            }
            for letter, name, answer in zip(LETTERS, self.names, each.answers, strict=False)
        ]  # fmt: skip
        return {
            "question": each.question, "asked": each.asked, "words": each.words,
            "marks": [mark_to_fields(mark) for mark in each.marks], "drawn": each.drawn,
            "sampling": asdict(each.sampling), "answers": answers, "vote": each.vote,
        }  # fmt: skip


def whole_characters(text: str) -> str:
    """Return a text that can be encoded: halves that belong together joined, others replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _num_letters(marks: Sequence[Mark]) -> int:
    return len(json.dumps([mark_to_fields(mark) for mark in marks]))


def _take(answer: ModelAnswer, delta: Delta) -> None:
    """Add what came next of an answer."""
    answer.text += delta.text
    answer.state = "running"
    if delta.finish_reason is not None:
        answer.text = whole_characters(answer.text)
        answer.state = _STATES[delta.finish_reason]
        answer.cut = delta.finish_reason == "length"
        if delta.error is not None:
            answer.error = str(call_it(delta.error, delta.key, "the question"))


def _with_marks_of_now(asked: Round, marks: Sequence[Mark]) -> str:
    """Return an earlier question with the numbers that its marks have now.

    Raises:
        QuestionRefused: a mark that it mentions is gone or has changed, so that its words would
            say something else.
    """

    def renumbered(match: re.Match[str]) -> str:
        if match[1] is not None:
            return match[1]
        number = int(match[2])
        if not asked.marks:  # letters of a chat without a picture
            return match[0]
        if asked.marks[number] not in marks:
            raise QuestionRefused(
                f"an earlier question is about the mark {asked.words[number]}, which was changed "
                "or deleted since: undo that, or begin a new chat"
            )
        return f"{{{marks.index(asked.marks[number])}}}"

    return _MENTION.sub(renumbered, asked.question)
