"""Range checks of the option dataclasses, with messages that name the command-line option."""


def at_least(group: str, options: object, least: float, *names: str) -> None:
    for name in names:
        if getattr(options, name) < least:
            raise ValueError(
                f"{group}.{name} must be at least {least}, got {getattr(options, name)}"
            )


def within(group: str, options: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(options, name) <= high:
            raise ValueError(
                f"{group}.{name} must be from {low} to {high}, got {getattr(options, name)}"
            )
