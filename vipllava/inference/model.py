"""A model to ask from Python: images, marks and questions in, texts out.

::

    model = vl.load("runs/tiny/export")
    reply = model.ask("kitchen.jpg", "What is {0}?", regions=[vl.Rectangle((20, 20, 120, 110))])

One engine stands behind it, whichever: a model in this process or a server.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack, cast, overload

from PIL import Image

from vipllava.inference.background import Background, Pieces
from vipllava.inference.image_sources import ImageSource, open_image
from vipllava.inference.marked import Marked, draw_marks
from vipllava.inference.protocol import (
    Answer,
    Delta,
    FinishReason,
    Generation,
    GenerationEngine,
    Sampling,
    TokenLogprob,
    Usage,
    call_it,
    collect,
)
from vipllava.inference.session import Chat
from vipllava.types import ConfigError, Request, Turn, VipLlavaError
from vipllava.visual_prompts.marks import Mark

_BITS: Final[Mapping[str | None, int | None]] = {None: None, "8bit": 8, "4bit": 4}


class SamplingOptions(TypedDict, total=False):
    """How an answer is chosen; see :class:`vipllava.inference.protocol.Sampling`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
    num_beams: int
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered, and what it was shown and asked; ``str(reply)`` is the text."""

    text: str
    question: str  # with the words of the marks
    words: tuple[str, ...]  # by which texts name each mark, e.g. ``within the red rectangle``
    overlay: Image.Image | None  # the image with its marks; None without an image
    finish_reason: FinishReason
    usage: Usage | None = None  # tokens, where the engine says it
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.text


class ReplyStream(Pieces):
    """A reply as it comes: an iterator over pieces of its text, and the reply at its end.

    Closing it (``close``, a ``with`` block's end, or dropping it) cancels what has not come.
    """

    def __init__(
        self,
        background: Background,
        generation: Generation,
        finish: Callable[[Answer], Reply],
        on_reply: Callable[[Reply], None] | None = None,
    ) -> None:
        self._reply: Reply | None = None
        self._finish, self._on_reply = finish, on_reply
        super().__init__(background, generation)

    def end(self, deltas: list[Delta]) -> None:
        """Make the reply of what came."""
        self._reply = self._finish(_joined(deltas))
        if self._on_reply is not None and self._reply.finish_reason != "cancelled":
            self._on_reply(self._reply)

    @property
    def reply(self) -> Reply:
        """The whole reply, once it has come; if it was cancelled, what came of it.

        Raises:
            VipLlavaError: it has not ended, or it ended with an error.
        """
        if self._reply is None:
            raise VipLlavaError("there is no reply yet: read the stream to its end")
        return self._reply


class Model:
    """Answers questions about images and what is marked on them.

    Methods may be called from any thread, also where an event loop runs (in notebooks); they wait
    for the answer. A ``with`` block, or :meth:`close`, gives the memory back.

    Args:
        engine: answers; it belongs to this model from now on.
    """

    def __init__(self, engine: GenerationEngine) -> None:
        self._background = Background(engine)
        self._calls = itertools.count(1)

    @property
    def engine(self) -> GenerationEngine:
        """The engine behind it."""
        return self._background.engine

    @overload
    def ask(
        self, image: ImageSource | None, question: str, regions: Sequence[Mark] | Mark = (),
        *, stream: Literal[False] = False, allow_urls: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Reply: ...  # fmt: skip

    @overload
    def ask(
        self, image: ImageSource | None, question: str, regions: Sequence[Mark] | Mark = (),
        *, stream: Literal[True], allow_urls: bool = False, **sampling: Unpack[SamplingOptions],
    ) -> ReplyStream: ...  # fmt: skip

    @overload
    def ask(
        self, image: ImageSource | Sequence[ImageSource | None] | None, question: Sequence[str],
        regions: Sequence[Mark] | Sequence[Sequence[Mark]] | Mark = (),
        *, stream: Literal[False] = False, allow_urls: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Reply]: ...  # fmt: skip

    def ask(
        self,
        image: Any,
        question: str | Sequence[str],
        regions: Any = (),
        *,
        stream: bool = False,
        allow_urls: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Reply | ReplyStream | list[Reply]:
        """Ask one question, or several, which are answered together.

        Args:
            image: see :func:`vipllava.inference.image_sources.open_image`; None for a question
                without an image. With a list of questions: one for all, or a list of as many.
            question: ``{0}`` in it stands for the words of the first mark, and so on; ``{{0}}``
                for the letters ``{0}``. Without an image it is left as it is.
            regions: the marks. With a list of questions: one list for all, or a list of as many.
            stream: return the pieces as they come instead of the whole; for one question.
            allow_urls: whether ``image`` may be an http or https address.
            sampling: ``max_new_tokens`` (512), ``temperature`` (0: the likeliest token each time),
                ``top_p``, ``top_k``, ``seed``, ``stop``, ``num_beams``, ``logprobs``.

        Returns:
            A reply; of a list of questions a list in its order; of a stream the pieces.

        Raises:
            MarkError: a mark lies outside of the image or cannot be drawn.
            RecordError: the image cannot be read, or a question mentions a mark that is not there.
            SamplingError: an option means nothing.
            ConfigError: there is no such option; names the nearest.
            PromptTooLong: the question and its answer do not fit into the model's positions.
            EngineStopped: the model is closed.
            VipLlavaError: another argument cannot be meant, the engine could not answer, or this
                process is a fork of the one that loaded the model.
        """
        options = sampling_of(sampling)
        if isinstance(question, str):
            marked = draw_marks(_opened(image, allow_urls), _checked_marks(regions))
            said = marked.said(question)
            request = marked.request((Turn("user", said),), f"question {next(self._calls)}")
            if stream:
                return self._stream(request, said, marked, options)
            (answer,) = self._answers([Generation(request, options)])
            return _reply(answer, said, marked)
        if stream:
            raise VipLlavaError("stream=True takes one question at a time, not a list")
        questions = _checked_questions(question)
        shown = _each_marked(image, regions, len(questions), allow_urls)
        call = next(self._calls)
        asked: list[tuple[str, Marked, Request]] = []
        for number, (text, marked) in enumerate(zip(questions, shown, strict=True)):
            said = marked.said(text)
            key = f"question {number} of call {call}"
            asked.append((said, marked, marked.request((Turn("user", said),), key)))
        answers = self._answers([Generation(request, options) for *_, request in asked])
        return [
            _reply(answer, said, marked)
            for answer, (said, marked, _) in zip(answers, asked, strict=True)
        ]

    def chat(
        self,
        image: ImageSource | None = None,
        regions: Sequence[Mark] | Mark = (),
        *,
        allow_urls: bool = False,
    ) -> Chat:
        """Begin a conversation about an image; marks may be added at any time.

        Args:
            image: see :meth:`ask`, as the next two.
            regions: the first marks.
            allow_urls: whether ``image`` may be an address.

        Raises:
            MarkError: a mark lies outside of the image or cannot be drawn.
            RecordError: the image cannot be read.
        """
        return Chat(self, _opened(image, allow_urls), _checked_marks(regions))

    def stream_turns(
        self,
        marked: Marked,
        turns: Sequence[Turn],
        on_reply: Callable[[Reply], None],
        **sampling: Unpack[SamplingOptions],
    ) -> ReplyStream:
        """Continue a conversation.

        Args:
            marked: its image.
            turns: said already, the user's last.
            on_reply: gets the reply once it has come, unless it was cancelled.
            sampling: see :meth:`ask`.
        """
        options = sampling_of(sampling)
        request = marked.request(turns, f"turn {len(turns)} of chat {next(self._calls)}")
        return self._stream(request, turns[-1].text, marked, options, on_reply)

    def close(self) -> None:
        """End what runs and give back memory; safe to call twice."""
        self._background.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answers(self, generations: Sequence[Generation]) -> list[Answer]:
        try:
            return self._background.run(collect(self.engine, generations))
        except VipLlavaError as error:
            for number, each in enumerate(generations):
                name = f"question {number}" if len(generations) > 1 else "the question"
                call_it(error, each.request.key, name)
            raise

    def _stream(
        self,
        request: Request,
        said: str,
        marked: Marked,
        options: Sampling,
        on_reply: Callable[[Reply], None] | None = None,
    ) -> ReplyStream:
        def finish(answer: Answer) -> Reply:
            return _reply(answer, said, marked)

        return ReplyStream(self._background, Generation(request, options), finish, on_reply)


def load(
    source: str | Path,
    device: str = "auto",
    load_in: Literal["8bit", "4bit"] | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: str = "auto",
    *,
    base: str | None = None,
    chat_template: str | None = None,
    **engine: Any,
) -> Model:
    """Open a model of any format and wait for questions.

    Args:
        source: folder or Hugging Face id: a stage's export, a published model, an adapter.
        device: ``auto`` takes CUDA, then Apple's GPU (MPS), then the CPU; or one of these.
        load_in: ``8bit`` or ``4bit`` holds the language model in so many (bitsandbytes).
        device_map: ``auto`` spreads one model over all devices that are there (accelerate).
        dtype: ``auto``, or of the weights, e.g. ``bfloat16``.
        base: what an adapter is put on, where it does not say so.
        chat_template: which one the model was trained with, where it does not say so.
        engine: how questions run together, see
            :class:`vipllava.inference.local_engine.LocalEngine`.

    Raises:
        CheckpointError: the source is missing, broken, or not a model of this kind.
        ConfigError: the device is not there, what an option needs is not installed, or options
            exclude each other.
    """
    if load_in not in _BITS:
        raise ConfigError(f"load_in={load_in!r}: expected None, '8bit' or '4bit'")
    from vipllava.inference.engine import Engine
    from vipllava.inference.local_engine import LocalEngine

    opened = Engine.from_checkpoint(
        source, device, dtype, base=base, chat_template=chat_template, bits=_BITS[load_in],
        device_map=device_map,
    )  # fmt: skip
    return Model(LocalEngine(opened, **engine))


def connect(base_url: str, model: str, api_key_env: str | None = None, **settings: Any) -> Model:
    """Ask a model behind an OpenAI-compatible server, e.g. ``vipllava serve`` or vLLM.

    Marks are drawn here; the server gets the picture with them.

    Args:
        base_url: up to and with ``/v1``.
        model: as the server calls it.
        api_key_env: the environment variable that holds the key; None sends none.
        settings: further fields of :class:`vipllava.inference.endpoint_client.EndpointSettings`.

    Raises:
        EndpointError: the server does not answer, or does not serve the model.
        ConfigError: a setting means nothing, or the client is not installed.
    """
    from vipllava.inference.endpoint_client import EndpointSettings
    from vipllava.inference.openai_engine import OpenAIEngine

    engine = OpenAIEngine(EndpointSettings(base_url, model, api_key_env, **settings))
    opened = Model(engine)
    try:
        opened._background.run(engine.check())
    except BaseException:
        opened.close()
        raise
    return opened


def sampling_of(options: SamplingOptions) -> Sampling:
    """Return options as they are checked; one text to stop at may stand for a list of one.

    Raises:
        SamplingError: an option means nothing.
        ConfigError: there is no such option; names the nearest.
    """
    given: dict[str, Any] = dict(options)
    known = [*SamplingOptions.__annotations__]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}=?" if near else f"they are {', '.join(known)}"
            raise ConfigError(f"{name}= is no option of a question: {meant}")
    stop = given.get("stop", ())
    given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
    return Sampling(**given)


def _opened(image: Any, allow_urls: bool) -> Image.Image | None:
    return None if image is None else open_image(image, allow_urls=allow_urls)


def _each_marked(images: Any, regions: Any, count: int, allow_urls: bool) -> list[Marked]:
    """Return what each question is about; what several share is opened and drawn once."""
    several = isinstance(images, (list, tuple))
    sources: list[Any] = list(cast("Sequence[Any]", images)) if several else [images] * count
    if len(sources) != count:
        raise VipLlavaError(
            f"{len(sources)} images for {count} questions: give one for each or all"
        )
    marks = _marks_of_each(regions, count)
    opened: dict[int, Image.Image | None] = {}
    drawn: dict[tuple[int, tuple[Mark, ...]], Marked] = {}
    shown: list[Marked] = []
    for source, each in zip(sources, marks, strict=True):
        place = id(source)  # which lives as long as the list does
        if (place, each) not in drawn:
            if place not in opened:
                opened[place] = _opened(source, allow_urls)
            drawn[place, each] = draw_marks(opened[place], each)
        shown.append(drawn[place, each])
    return shown


def _marks_of_each(regions: Any, count: int) -> list[tuple[Mark, ...]]:
    is_list = isinstance(regions, (list, tuple))
    items: list[Any] = list(cast("Sequence[Any]", regions)) if is_list else []
    if not items or not all(isinstance(item, (list, tuple)) for item in items):
        return [_checked_marks(regions)] * count
    if len(items) != count:
        raise VipLlavaError(
            f"{len(items)} lists of regions for {count} questions: give one for each or all"
        )
    return [_checked_marks(item) for item in items]


def _checked_marks(regions: Any) -> tuple[Mark, ...]:
    if isinstance(regions, Mark):
        return (regions,)
    items: list[Any] = [regions]
    if isinstance(regions, (list, tuple)):
        items = list(cast("Sequence[Any]", regions))
    for number, item in enumerate(items):
        if not isinstance(item, Mark):
            raise VipLlavaError(
                f"regions[{number}] is {str(item)[:80]}; expected a mark, e.g. "
                "vl.Rectangle((x1, y1, x2, y2)), or of JSON: mark_fields.parse_marks(...)"
            )
    return tuple(items)


def _checked_questions(questions: Any) -> list[str]:
    is_list = isinstance(questions, (list, tuple))
    items: list[Any] = list(cast("Sequence[Any]", questions)) if is_list else []
    if not is_list or not all(isinstance(item, str) for item in items):
        raise VipLlavaError(f"question is {str(questions)[:80]}; expected a text or a list of them")
    return items


def _joined(deltas: Sequence[Delta]) -> Answer:
    last = deltas[-1] if deltas else None
    return Answer(
        "".join(delta.text for delta in deltas),
        (last and last.finish_reason) or "cancelled",
        last and last.usage,
        tuple(itertools.chain.from_iterable(delta.logprobs for delta in deltas)),
    )


def _reply(answer: Answer, said: str, marked: Marked) -> Reply:
    return Reply(
        answer.text, said, marked.words, marked.image, answer.finish_reason, answer.usage,
        answer.logprobs,
    )  # fmt: skip
