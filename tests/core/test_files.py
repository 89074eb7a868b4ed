import threading
from pathlib import Path

import pytest

from ulae_rt.files import locked_folders


def test_a_second_writer_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with locked_folders([tmp_path]):
            order.append("second")

    with locked_folders([tmp_path]):
        thread = threading.Thread(target=second)
        thread.start()
        begun.wait()
        thread.join(0.2)  # time enough to get in, if the lock did not hold
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_error_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"), locked_folders([tmp_path]):
        raise RuntimeError("inside")
    with locked_folders([tmp_path, tmp_path]):
        pass


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with locked_folders([tmp_path, tmp_path / "missing"]):
        pass
    assert not list(tmp_path.iterdir())
