import inspect
import re

import pytest

from farm import errors
from farm.errors import (
    DataError,
    DeviceCrashed,
    DeviceError,
    DeviceHung,
    FarmError,
    InvariantBroken,
    JobError,
    StorageError,
    UsageError,
)

EVERY = [cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, FarmError)]


@pytest.mark.parametrize("error", [e for e in EVERY if e is not UsageError], ids=lambda e: e.__name__)
def test_an_error_exits_with_1(error: type[FarmError]) -> None:
    assert error("text").exit_code == 1


def test_a_usage_error_exits_with_2() -> None:
    assert UsageError("text").exit_code == 2


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (UsageError, FarmError),
        (DataError, FarmError),
        (DeviceError, FarmError),
        (DeviceCrashed, DeviceError),
        (DeviceHung, DeviceError),
        (JobError, FarmError),
        (StorageError, FarmError),
        (InvariantBroken, StorageError),
    ],
)
def test_an_error_is_caught_as_what_its_caller_does_next(error: type[FarmError], parent: type[FarmError]) -> None:
    assert error.__bases__ == (parent,)


def test_the_modules_docstring_draws_every_error_once() -> None:
    drawn = re.findall(r"^ *[*+-] (\w+)", errors.__doc__ or "", re.MULTILINE)

    assert sorted(drawn) == sorted(cls.__name__ for cls in EVERY)


@pytest.mark.parametrize("error", EVERY, ids=lambda e: e.__name__)
def test_an_error_says_in_a_sentence_what_it_is(error: type[FarmError]) -> None:
    assert (error.__doc__ or "").endswith(".")


def test_an_errors_text_is_its_sentence() -> None:
    assert str(DataError("x.bin has 3 bytes, expected 4")) == "x.bin has 3 bytes, expected 4"
