"""The files of an evaluation: answers as they come, so that a second start asks only the rest.

settings.json           what the answers depend on; another start there has to have the same
predictions.jsonl       a line per item with its marks kept, and
predictions-MARKS.jsonl one per item with its marks removed, moved or recoloured
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, cast

from vipllava.evaluation.bench import ALL_MARKS, Marks, Prediction, jsonl
from vipllava.files.atomic import write_json, write_whole
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)

SETTINGS: Final = "settings.json"
METRICS: Final = "metrics.json"


class Journal:
    """The predictions of one benchmark in its folder.

    Args:
        folder: the evaluation's own; made if it is not there.
        settings: what the answers depend on, plain JSON values by name.

    Raises:
        VipLlavaError: answers with other settings are there; names them.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._open: dict[Marks, IO[bytes]] = {}
        path = folder / SETTINGS
        wanted = json.loads(json.dumps(settings))
        if path.exists():
            given = read_settings(folder)
            differ = [n for n in {**given, **wanted} if given.get(n) != wanted.get(n)]
            if differ:
                listing = "; ".join(f"{n}: {given.get(n)!r}, now {wanted.get(n)!r}" for n in differ)
                raise VipLlavaError(
                    f"{folder} holds answers with other settings ({listing}); evaluate into "
                    "another folder with name=NEW_NAME, or delete this one"
                )
        elif found := sorted(folder.glob("predictions*.jsonl")):
            raise VipLlavaError(
                f"{folder} holds {found[0].name} without {SETTINGS}, so nobody knows of which "
                "settings; evaluate into another folder with name=NEW_NAME, or delete it"
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, wanted, indent=1)

    def read(self, marks: Marks) -> dict[str, Prediction]:
        """Return what is there, as :func:`read_predictions`."""
        return read_predictions(predictions_path(self.folder, marks))

    def append(self, prediction: Prediction) -> None:
        """Write a prediction behind the others; a kill right after leaves it whole."""
        marks = prediction.marks
        if marks not in self._open:
            # Held for the whole of a run, and closed by :meth:`finish` or with the process.
            file = self._open[marks] = predictions_path(self.folder, marks).open("a+b")
            file.truncate(_whole_lines(file))
        self._open[marks].write(jsonl([prediction.row()]).encode("utf-8", "backslashreplace"))
        self._open[marks].flush()

    def finish(self, marks: Marks, predictions: Sequence[Prediction]) -> None:
        """Write all predictions of one marking anew, in their order, with their scores."""
        if (file := self._open.pop(marks, None)) is not None:
            file.close()
        write_whole(predictions_path(self.folder, marks), jsonl(each.row() for each in predictions))

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.popitem()[1].close()


def predictions_path(folder: Path, marks: Marks) -> Path:
    """Return the file of one marking."""
    return folder / f"predictions{'' if marks == 'kept' else f'-{marks}'}.jsonl"


def read_predictions(path: Path) -> dict[str, Prediction]:
    """Return what a file holds, by key; of lines about one item the last counts.

    A last line that a kill has torn is passed over.

    Raises:
        VipLlavaError: another line is no prediction, or one of another marking than the file's
            name says; names it.
    """
    found: dict[str, Prediction] = {}
    of_name = {predictions_path(path.parent, marks): marks for marks in ALL_MARKS}.get(path)
    if not path.exists():
        return found
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                logger.warning("%s: line %d is torn; it does not count", path, number)
                break
            try:
                prediction = Prediction.from_row(json.loads(line))
            except ValueError as error:
                raise VipLlavaError(
                    f"{path}:{number}: {error}; restore the line, or delete it to have the item "
                    "asked again"
                ) from error
            if of_name is not None and prediction.marks != of_name:
                # Copied from elsewhere: its answers were given to other images.
                own = predictions_path(path.parent, prediction.marks).name
                raise VipLlavaError(
                    f"{path}:{number}: marks is {prediction.marks}, which {own} holds; this file "
                    f"holds {of_name}: restore the file, or delete it to have its items asked again"
                )
            found[prediction.key] = prediction
    return found


def _whole_lines(file: IO[bytes]) -> int:
    """Return how many bytes a file's whole lines have."""
    file.seek(0)
    return sum(len(line) for line in file if line.endswith(b"\n"))


def by_dotted_names(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested settings as a command line names them: ``perturb.jitter``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= by_dotted_names(cast("dict[str, Any]", value), f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what the answers in a folder depend on.

    Raises:
        VipLlavaError: the file cannot be read.
    """
    path = folder / SETTINGS
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VipLlavaError(f"{path} cannot be read ({error}); delete the folder") from error
    if not isinstance(found, dict):
        raise VipLlavaError(f"{path} is no object of settings; delete the folder")
    return cast("dict[str, Any]", found)
