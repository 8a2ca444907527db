"""Write the text of a conversation, and find the answers in it."""

from typing import NamedTuple

from .text import is_text, shown

IMAGE = "<image>"
MAX_TEXT = 1_000_000  # characters of a conversation, more than the longest context of a model holds


class BadRecord(ValueError):
    """A record cannot be used for training. The message gives the reason, without the record's id."""


class Template(NamedTuple):
    """Vicuna's format: ``system USER: question ASSISTANT: answer</s>USER: ...``."""

    system: str
    user: str = "USER"
    assistant: str = "ASSISTANT"


class Turn(NamedTuple):
    question: str
    answer: str


TEMPLATES = {
    # The template of the training of the released MixLoRA, and of LLaVA from 1.5 on.
    "v1": Template(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    # The default template of the released evaluation, although the models were not trained with it.
    "llava_v1": Template(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
    # For small models: no system message.
    "bare": Template(""),
}


def prompt(question: str, template: Template, image: bool = True) -> str:
    """The prompt for a question. If there is an image, it comes before the question."""
    head = f"{template.system} " if template.system else ""
    question = place_image(question) if image else question
    return f"{head}{template.user}: {question} {template.assistant}:"


def render(turns: list[Turn], template: Template, end: str) -> tuple[str, list[tuple[int, int]]]:
    """A whole conversation.

    Args:
        turns: questions and answers.
        end: the end of an answer, which is the tokenizer's end-of-sequence token.

    Returns:
        The text, and the start and end of each answer in it, with its end token.
    """
    text, spans = f"{template.system} " if template.system else "", []
    for question, answer in turns:
        text += f"{template.user}: {question} {template.assistant}: "
        spans.append((len(text), len(text) + len(answer) + len(end)))
        text += answer + end
    return text, spans


def read_turns(conversations: object, has_image: bool) -> list[Turn]:
    """Questions and answers from LLaVA's ``[{from: human | gpt, value}, ...]``.

    An answer before the first question is left out, as in LLaVA. The image comes before the question that mentions it,
    or before the first.

    Raises:
        BadRecord: it is not a list of messages; a speaker is unknown; the speakers do not take turns; an answer is
            empty or missing; the texts have more than ``MAX_TEXT`` characters; an image is mentioned in an answer, more
            than once, or although there is none.
    """
    messages = _messages(conversations)
    if messages[0]["from"] == "gpt":
        messages = messages[1:]
    speakers = [message["from"] for message in messages]
    if len(speakers) % 2 or not speakers:
        raise BadRecord("no answer")
    if speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise BadRecord("speakers do not take turns")
    texts = [message["value"].strip() for message in messages]
    turns = [Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2])]
    if not all(answer for _, answer in turns):
        raise BadRecord("empty answer")
    mentions = [question.count(IMAGE) for question, _ in turns]
    if any(IMAGE in answer for _, answer in turns) or sum(mentions) > 1:
        raise BadRecord(f"{IMAGE} in an answer or more than once")
    if sum(mentions) and not has_image:
        raise BadRecord(f"{IMAGE} without an image")
    if has_image:
        place = mentions.index(1) if sum(mentions) else 0
        turns[place] = Turn(place_image(turns[place].question), turns[place].answer)
        if turns[place].question.count(IMAGE) > 1:  # another mention, whose parts surrounded the removed one
            raise BadRecord(f"{IMAGE} in an answer or more than once")
    return turns


def _messages(conversations: object) -> list[dict[str, str]]:
    """Return the conversation if it is a list of messages, each with a speaker and a text; else raise BadRecord."""
    if not isinstance(conversations, list) or not conversations:
        raise BadRecord("no conversation")
    characters = 0
    for message in conversations:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise BadRecord("a message without a text")
        if not is_text(message["value"]):
            raise BadRecord("a message that is not Unicode")
        characters += len(message["value"])
        speaker = message.get("from")
        if not isinstance(speaker, str):
            raise BadRecord("a message without a speaker")
        if speaker not in ("human", "gpt"):
            raise BadRecord(f"unknown speaker {shown(speaker)!r}")
    if characters > MAX_TEXT:
        raise BadRecord(f"more than {MAX_TEXT} characters")
    return conversations


def place_image(question: str) -> str:
    """Put the image before the question."""
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()
