"""Tables in plain text and Markdown, and number formats."""

from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table, the first column left-aligned, the others right-aligned."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def padded(line: Sequence[str]) -> str:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]  # noqa: B905
        return "  ".join(cells).rstrip()

    rule = "-" * len(padded(["-" * w for w in widths]))
    return "\n".join([padded(lines[0]), rule, *(padded(line) for line in lines[1:])])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right-aligned."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def ms(value: float | None) -> str:
    """Three significant digits from 1 ms on; "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def mib(value: float | None) -> str:
    """Bytes in MiB."""
    if value is None:
        return "-"
    size = value / (1 << 20)
    return f"{size:.2f}" if size < 1 else f"{size:.1f}" if size < 100 else f"{size:.0f}"


def ratio(value: float | None) -> str:
    """1.62x; "-" for nothing."""
    return "-" if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return "-" if value is None else f"{100 * value:.0f} %"
