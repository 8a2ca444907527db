"""Text that came from somewhere else: whether it is text, and how to show it in a line."""

LONGEST = 80


def is_text(value: object) -> bool:
    """Whether a value is a string of Unicode. JSON can spell halves of surrogate pairs, which no tokenizer, file or
    terminal takes."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def shown(text: str, longest: int = LONGEST) -> str:
    """The text for a report: what a terminal would not print is spelled out, the middle of a long one left out."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}…({len(text)} characters)…{text[-longest // 4 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
