"""Models whose page is shown before their weights are read."""

import threading
from collections.abc import Callable


class Loading:
    """What has to be read before anything can be drawn, one model after the other, in a thread of its own."""

    def __init__(self):
        self._tasks: list[Callable[[], None]] = []
        self._error: Exception | None = None

    def add(self, load: Callable[[], None]) -> None:
        """Call this when it is time."""
        self._tasks.append(load)

    @property
    def is_done(self) -> bool:
        """Whether all is read."""
        return not self._tasks

    def start(self, failed: Callable[[], None]) -> None:
        """Begin to read; where something is found to be wrong, `failed` is called and the rest left unread."""
        threading.Thread(target=self._run, args=(failed,), daemon=True).start()

    def raise_error(self) -> None:
        """Raise what was found to be wrong, a UserError for a model that cannot be loaded."""
        if self._error is not None:
            raise self._error

    def _run(self, failed: Callable[[], None]) -> None:
        try:
            while self._tasks:
                self._tasks[0]()
                del self._tasks[0]
        except Exception as error:  # whatever it is, the command ends with it and not only this thread
            self._error = error
            failed()
