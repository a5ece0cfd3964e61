"""Dataclass fields with help text and limits; the command line makes a flag of each."""

import dataclasses
from typing import Any


def option(help: str, default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A dataclass field with its help text and limits: `low`, `above` and `high` for numbers, `choices` for words."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def check_limits(settings: Any) -> None:
    """Raise ValueError if a field of a dataclass lies outside the limits that its `option` states."""
    for item in dataclasses.fields(settings):
        value, limits = getattr(settings, item.name), item.metadata
        if "choices" in limits and value not in limits["choices"]:
            raise ValueError(f"{item.name} must be one of {', '.join(limits['choices'])}, not {value!r}")
        low, above, high = (limits.get(name) for name in ("low", "above", "high"))
        if low is None and above is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if number is None:
                continue
            high_enough = number >= low if above is None else number > above
            if not (high_enough and number <= high):  # nan fails both
                bound = f"at least {low}" if above is None else f"above {above}"
                raise ValueError(f"{item.name} must be {bound} and at most {high}, not {number}")
