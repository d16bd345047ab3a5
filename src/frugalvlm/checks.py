"""What options of commands, notebooks and functions may be: each wrong value is one sentence."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable
from typing import Any

from frugalvlm.errors import FrugalError

__all__ = [
    "OptionError",
    "check_device",
    "check_name",
    "check_names",
    "check_number",
    "check_present",
    "check_whole",
    "check_wholes",
    "read_whole",
]


class OptionError(FrugalError, ValueError):
    """A value that an option cannot have; the message says which it can."""


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`, NumPy's among them; no text, no truth value.

    Raises:
        OptionError: for anything else.
    """
    wanted = f"at least {least}" if most is None else f"from {least} to {most}"
    # NumPy's truth values index, too: what it calls bool is no number either.
    if not isinstance(value, str) and "bool" not in type(value).__name__:
        try:
            whole = operator.index(value)
        except TypeError:
            pass
        else:
            if whole >= least and (most is None or whole <= most):
                return whole
    raise OptionError(f"{name} is a whole number {wanted}; got {_shown(value)}.")


def check_wholes(name: str, value: Any, least: int = 1) -> tuple[int, ...]:
    """A list of whole numbers, which is not empty.

    Raises:
        OptionError: for anything else, one number alone among it.
    """
    if isinstance(value, str) or not isinstance(value, Iterable) or not (numbers := [*value]):
        raise OptionError(f"{name} is a list of whole numbers such as [48]; got {_shown(value)}.")
    return tuple(check_whole(name, number, least) for number in numbers)


def read_whole(name: str, text: str, least: int = 1, most: int | None = None) -> int:
    """The same from the text of a command line, in digits.

    Raises:
        OptionError: for anything else, `1e3` and the empty text among them.
    """
    digits = re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip())
    return check_whole(name, int(digits[0]) if digits else text, least, most)


def check_number(name: str, value: Any, above: float = 0.0) -> float:
    """A finite number larger than `above`; no text, no truth value.

    Raises:
        OptionError: for anything else.
    """
    if not isinstance(value, str) and "bool" not in type(value).__name__:
        try:
            number = float(value)
        except (TypeError, ValueError):
            pass
        else:
            if math.isfinite(number) and number > above:
                return number
    raise OptionError(f"{name} is a number above {above:g}; got {_shown(value)}.")


def check_name(name: str, value: Any, what: str) -> str:
    """A text that is not empty.

    Args:
        name: of the option.
        value: what was given.
        what: it names, for example "a model's name, a folder or a Hub id".

    Raises:
        OptionError: for anything else.
    """
    if isinstance(value, str) and value.strip():
        return value
    raise OptionError(f"{name} is {what}; got {_shown(value)}.")


def check_names(name: str, value: Any, known: Iterable[str]) -> tuple[str, ...]:
    """A list of known names, none of them twice.

    Raises:
        OptionError: for an empty list, a plain text, or a name that is not known.
    """
    known = tuple(known)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise OptionError(f"{name} is a list of names such as ['{known[0]}']; got {_shown(value)}.")
    names = tuple(value)
    if len(names) > 1 and all(isinstance(one, str) and len(one) == 1 for one in names):
        # A notebook's parameter that was a text is a list of its letters by now.
        return check_names(name, "".join(names), known)
    for one in names:
        if one not in known:
            raise OptionError(f"Unknown in {name}: {_shown(one)}. Known: {', '.join(known)}.")
    if not names:
        raise OptionError(f"{name} is an empty list: name some of {', '.join(known)}.")
    return tuple(dict.fromkeys(names))


def check_device(value: Any) -> str:
    """A device by its form alone: "cpu", "cuda", or "cuda:1" for the second GPU.

    Raises:
        OptionError: for anything else, what other libraries call "gpu" or "mps" among it.
    """
    if isinstance(value, str) and re.fullmatch(r"cpu|cuda(:[0-9]+)?", value):
        return value
    raise OptionError(
        f"Unknown device {_shown(value)}: cpu, cuda or, of several GPUs, cuda:0, cuda:1, ..."
    )


def check_present(value: Any) -> str:
    """The same, and this machine has it.

    Raises:
        OptionError: for another form, or a GPU that is not there.
    """
    device = check_device(value)
    if device == "cpu":
        return device
    import torch  # takes seconds: not for a wrong option

    if not torch.cuda.is_available():
        raise OptionError(
            f"No GPU was found for device '{device}': use cpu, or install a CUDA build of torch."
        )
    found = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= found:
        raise OptionError(
            f"There is no device '{device}': the GPUs here are cuda:0 to cuda:{found - 1}."
        )
    return device


def _shown(value: Any) -> str:
    """A value as the message quotes it: short, and on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
