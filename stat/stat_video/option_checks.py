"""Range checks of the option dataclasses, with messages that name the command-line option."""

from stat_video.errors import OptionError

MAX_SEED = 2**63 - 1
MAX_THREADS = 1024  # OpenMP crashes when it cannot start as many as it is told to


def at_least(group: str, options: object, least: float, *names: str) -> None:
    for name in names:
        if not getattr(options, name) >= least:  # nor NaN
            raise OptionError(
                f"{group}.{name} must be at least {least}, got {getattr(options, name)}"
            )


def check_views(option: str, views: tuple[int, int]) -> None:
    if views[0] < 1 or views[1] not in (1, 3):
        raise OptionError(
            f"{option} must be at least 1 clip in time and 1 or 3 crops, "
            f"got {views[0]} and {views[1]}"
        )


def within(group: str, options: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(options, name) <= high:
            raise OptionError(
                f"{group}.{name} must be from {low} to {high}, got {getattr(options, name)}"
            )
