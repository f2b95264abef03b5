"""Range checks of the option dataclasses, with messages that name the command-line option."""

MAX_SEED = 2**63 - 1
MAX_THREADS = 1024  # OpenMP crashes when it cannot start as many as it is told to


def at_least(group: str, options: object, least: float, *names: str) -> None:
    for name in names:
        if not getattr(options, name) >= least:  # nor NaN
            raise ValueError(
                f"{group}.{name} must be at least {least}, got {getattr(options, name)}"
            )


def within(group: str, options: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(options, name) <= high:
            raise ValueError(
                f"{group}.{name} must be from {low} to {high}, got {getattr(options, name)}"
            )
