"""Check text from other sources, and show it in one line."""

LONGEST = 80


def is_text(value: object) -> bool:
    """Whether a value is a string of Unicode. JSON can contain halves of surrogate pairs, which tokenizers, files and
    terminals refuse."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def shown(text: str, longest: int = LONGEST) -> str:
    """The text for a report: characters that a terminal does not print are escaped, and a long text is shortened in the
    middle."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}…({len(text)} characters)…{text[-longest // 4 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
