"""``vipllava chat``: a conversation about a picture and the marks on it, in a terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from typer.core import TyperCommand

from vipllava.types import ConfigError, VipLlavaError
from vipllava.visual_prompts.shapes import PALETTE, SHAPES

_ORDER: Final = "vipllava.chat.order"


class ChatCommand(TyperCommand):
    """Remembers in which order options were given: a mark's look stands behind its place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as ever, and note the names of the options in their order."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[_ORDER] = [parameter.name for parameter in order]
        return super().parse_args(ctx, args)


def _repeatable(what: str, *names: str, metavar: str = "TEXT") -> Any:
    return typer.Option(*names, metavar=metavar, help=what)


def chat(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder or Hugging Face id of any format.",
            show_default="the newest of runs/quickstart",
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE", help="File, - for the standard input, or with --allow-urls a URL."
        ),
    ] = None,
    box: Annotated[
        list[str] | None, _repeatable("Mark a box, pixels.", "--box", metavar="X1,Y1,X2,Y2")
    ] = None,
    polygon: Annotated[
        list[str] | None,
        _repeatable("Mark an area; `;` begins another ring.", "--polygon", metavar="X,Y,X,Y,..."),
    ] = None,
    point: Annotated[
        list[str] | None, _repeatable("Mark a point.", "--point", metavar="X,Y")
    ] = None,
    stroke: Annotated[
        list[str] | None,
        _repeatable("Draw a line by hand.", "--stroke", metavar="X,Y,X,Y,..."),
    ] = None,
    rle: Annotated[
        list[str] | None,
        _repeatable("Mark a mask in COCO's run lengths, JSON.", "--rle", metavar="FILE"),
    ] = None,
    shape: Annotated[
        list[str] | None,
        _repeatable(
            f"{', '.join(SHAPES)}. By default a box is a rectangle, a polygon or RLE a mask, a "
            "stroke a scribble. An option behind a place is for that mark, one before the first "
            "place for all.",
            "--shape",
            metavar="SHAPE",
        ),
    ] = None,
    colour: Annotated[
        list[str] | None,
        _repeatable(
            f"{', '.join(PALETTE)}; or R,G,B or #RRGGBB, which no text can name.",
            "--colour",
            "--color",
            metavar="COLOUR",
        ),
    ] = None,
    width: Annotated[
        list[str] | None, _repeatable("Of lines, pixels.", "--width", metavar="N")
    ] = None,
    alpha: Annotated[
        list[str] | None, _repeatable("Opacity, 1 to 255.", "--alpha", metavar="N")
    ] = None,
    question: Annotated[
        list[str] | None,
        _repeatable(
            "Ask this and end; several are turns of one conversation; - reads the standard input. "
            "{0} names the first mark.",
            "--question",
            "-q",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="With --question: one JSON object a line per answer.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the conversation (JSON) and the marked picture."),
    ] = None,
    picture: Annotated[
        Literal["auto", "kitty", "iterm", "blocks", "none"],
        typer.Option(help="How a terminal shows the marked picture."),
    ] = "auto",
    base_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask a server instead, e.g. http://localhost:8000/v1."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The model's name there.", show_default="the only one"),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable that holds the server's key."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from this share of probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.", show_default="random")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 512,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer before it; repeatable.")
    ] = None,
    num_beams: Annotated[int, typer.Option(help="Beam search; shows no answer halfway.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "auto",
    load_in: Annotated[
        Literal["8bit", "4bit"] | None, typer.Option(help="Fewer bits (bitsandbytes).")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What an adapter is put on.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where the model does not say.")
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Let pictures be fetched from public addresses.")
    ] = False,
) -> int:
    """Chat about a picture and the marks on it.

    For example: vipllava chat MODEL image.jpg --box 100,200,200,300 --shape ellipse --colour blue

    With --question the answers alone are printed; else the chat is interactive, and /help there
    lists its commands.
    """
    from vipllava.inference.protocol import Sampling
    from vipllava.serve.terminal.harmless import harmless_errors
    from vipllava.serve.terminal.one_shot import ask_all, read_questions
    from vipllava.serve.terminal.opening import open_picture, open_session, split_arguments
    from vipllava.serve.terminal.options import marks_of_options
    from vipllava.serve.terminal.output import Output
    from vipllava.serve.terminal.talk import Talk

    given = {
        "box": box, "polygon": polygon, "point": point, "stroke": stroke, "rle": rle,
        "shape": shape, "colour": colour, "width": width, "alpha": alpha,
    }  # fmt: skip
    loading = {"device": device, "dtype": dtype, "load_in": load_in}
    loading |= {"base": base, "chat_template": chat_template}
    server = {"base_url": base_url, "name": name, "api_key_env": api_key_env}
    stops = tuple(stop or ())
    # What costs nothing is looked at first: a model takes a minute to load.
    with harmless_errors():
        marks = marks_of_options(_in_order(context.meta[_ORDER], given))
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, stops, num_beams)
        model, image = split_arguments(model, image, has_server=base_url is not None)
        _check_options(loading, server)
        _check_input(question, image, json)
        questions = read_questions(question or ())
        logging.getLogger().setLevel(logging.WARNING)
        if questions:
            out = Output(None if json else sys.stdout, sys.stderr, "none", os.environ)
        else:
            out = Output(sys.stdout, sys.stdout, _protocol(picture), os.environ)
            out.hint(f"opening {base_url or model or 'the model of the quick start'} ...")
        session = open_session(model, image, marks, loading, server, allow_urls=allow_urls)
        talk = Talk(session, out, sampling, partial(open_picture, allow_urls=allow_urls), save)
        if not questions:
            from vipllava.serve.terminal.loop import interact

            return interact(talk, os.environ)
        ask_all(talk, questions, sys.stdout, json=json)
        if save is not None:
            talk.save(save)
        return 0


def _protocol(picture: str) -> Any:
    from vipllava.serve.terminal.pictures import detect_protocol

    if picture != "auto":
        return picture
    stream = sys.stdout
    return detect_protocol(os.environ, is_terminal=stream.isatty(), encoding=stream.encoding)


def _check_options(loading: dict[str, str | None], server: dict[str, str | None]) -> None:
    if server["base_url"] is None:
        _refuse(server, "--base-url, the server that they are about")
    else:
        asked = {name: value for name, value in loading.items() if value != "auto"}
        _refuse(asked, "a model that is loaded here, and --base-url asks a server's")


def _refuse(options: dict[str, str | None], of: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise VipLlavaError(f"{', '.join(given)} need {of}")


def _check_input(question: Sequence[str] | None, image: str | None, json: bool) -> None:
    """Refuse what the standard input or the options cannot give, before anything is loaded."""
    if not question:
        if json:
            raise VipLlavaError("--json needs --question: an interactive chat is for people")
        if image == "-":
            raise VipLlavaError("the picture - needs --question: an interactive chat reads there")
        if sys.stdin is None or not sys.stdin.isatty():  # None: it is closed
            raise VipLlavaError(
                "an interactive chat needs a terminal; ask by --question TEXT (- reads the "
                "standard input)"
            )
        if find_spec("prompt_toolkit") is None:
            raise ConfigError(
                "an interactive chat needs prompt_toolkit, which is not installed: "
                'pip install "vipllava-lightning[chat]"'
            )
    elif image == "-" and "-" in question:
        raise VipLlavaError("the picture - and --question - both read the one standard input")


def _in_order(order: Sequence[str], given: dict[str, list[str] | None]) -> list[tuple[str, str]]:
    """Return the options about marks as they were given, each with its text."""
    values = {name: iter(texts or ()) for name, texts in given.items()}
    return [(name, next(values[name])) for name in order if name in values]
