"""Pictures that go bad while a stage trains on them: counted, said once, and remembered in checkpoints."""

from collections.abc import Iterable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from calotype.data import Batch, Pictures
from calotype.picture_files import UnreadableImage, display_name, inspect


class DataErrors:
    """Which pictures of a split could not be read so far; `state` is a part of the stage's."""

    def __init__(self, pictures: Pictures, accelerator: Accelerator):
        self.pictures, self.accelerator = pictures, accelerator
        self.state: dict[str, Any] = {"files": [], "said": 0}

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; on their way the first bad picture is named at once."""
        for batch in batches:
            if batch.unread:
                self._note(batch)
            yield batch

    def _note(self, batch: Batch) -> None:
        if not self.state["files"]:
            self.accelerator.print(
                f"\n{self._fault(batch.unread[0])}. The picture of the next position stands in for it, and for others "
                "that go bad; data_errors in metrics.jsonl counts them."
            )
        self._add(self.pictures.records[i].file for i in batch.unread)

    def figures(self) -> dict[str, float]:
        """How many pictures could not be read, over all processes; nothing where all could."""
        if self.accelerator.num_processes > 1:
            self._add(gather_object(self.state["files"]))
        count = len(self.state["files"])
        return {"data_errors[train]": float(count)} if count else {}

    def sentences(self) -> tuple[str, ...]:
        """What is to be said, where there are more than the last time."""
        files, said = self.state["files"], self.state["said"]
        self.state["said"] = len(files)
        if len(files) <= said:
            return ()
        return (
            f"{len(files):,} of {len(self.pictures):,} training pictures could not be read, first "
            f"{display_name(files[0])}; others stand in for them.",
        )

    def _add(self, files: Iterable[str]) -> None:
        self.state["files"] = sorted({*self.state["files"], *files})

    def _fault(self, i: int) -> str:
        file = self.pictures.path(i)
        try:
            inspect(file, decode=True)
        except UnreadableImage as error:
            return str(error)
        return f"{display_name(file)} could not be read for a while"
