"""Wall-clock seconds by stage, with word of each stage as it starts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by stage."""

    def __init__(
        self,
        progress: Callable[[str], None] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> None:
        self.seconds = {} if seconds is None else dict(seconds)
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as ``stage``, added to what the stage took before."""
        if self._progress is not None:
            self._progress(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
