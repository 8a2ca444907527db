"""MME and POPE as their official tools score, by hand and on random answers."""

import json
import random

import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from mixlora_llava.command.main import main
from mixlora_llava.scoring import mme, pope


def line(truth, response, image="a.jpg"):
    return f"{image}\tIs it? Please answer yes or no.\t{truth}\t{response}\n"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("yes", "yes"), ("No.", "no"), ("YES, it is", "yes"), (" yes", "yes"), ("  yes", "other"), ("nope", "no"),
        ("know", "no"), ("eyes", "yes"), ("It is not", "other"), ("", "other"), ("\n", "other"), ("noyes", "no"),
        ("nyes", "yes"), ("I know", "other"), ("a no", "no"),
    ],
)  # fmt: skip
def test_mme_reads_the_first_four_characters(response, answer):
    assert mme.read_answer(response) == answer


def test_mme_by_hand():
    lines = [
        line("Yes", "Yes"), line("No", "No"),  # right as a whole
        line("Yes", "No"), line("No", "no"),  # one of two
        line("YES", "maybe"), line("no", "unsure", image="b.jpg"),  # other; images are two lines, whatever their names
    ]  # fmt: skip
    score = mme.score_subtask(lines)
    assert (score["questions"], score["other"]) == (6, 2)
    assert score["acc"] == 3 / 6 and score["acc_plus"] == 1 / 3
    assert score["score"] == 3 / 6 * 100 + 1 / 3 * 100


def test_mme_answers_that_say_neither_score_nothing():
    assert mme.score_subtask([line("Yes", "maybe"), line("No", "perhaps")])["score"] == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("Yes", "Yes")] * 3, "got 3 lines"),
        ([], "got 0 lines"),
        ([line("Yes", "Yes"), line("maybe", "Yes")], "line 2: the ground truth must be yes or no, got 'maybe'"),
        ([line("Yes", "Yes"), line("No ", "No")], "line 2: the ground truth must be yes or no, got 'No '"),
        ([line("Yes", "Yes"), line("No", "No\tit is")], "line 2: needs the four fields .* got 5"),
        ([line("Yes", "Yes"), "a.jpg\tIs it?\tNo No\n"], "line 2: needs the four fields .* got 3"),
        (["\n", line("Yes", "Yes")], "line 1: needs the four fields .* got 1"),
    ],
)
def test_mme_stops_where_the_tool_stops(lines, message):
    with pytest.raises(ValueError, match=message):
        mme.score_subtask(lines)


# What a fuzzing against the official tool showed to matter. Lower case comes before the cut at four characters: "İ" is
# two of them then. A line separator of Unicode ends no line, a carriage return alone does.
RESPONSES = ["Yes", "no", "Not sure", "", "  Yes", "unknown", "The answer is no", "İİno"]
RESPONSES += ["\x85no", "\u2028yes", "\x0cno"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_mme_on_random_files(tmp_path, end):
    draw = random.Random(0)
    expected = {}
    for name in mme.PERCEPTION + mme.COGNITION:
        rows = [(draw.choice(["Yes", "No", "yes", "NO"]), draw.choice(RESPONSES)) for _ in range(40)]
        text = "".join(line(truth, response) for truth, response in rows)
        mark = draw.choice(["", "\ufeff"])
        (tmp_path / f"{name}.txt").write_bytes((mark + text.rstrip("\n").replace("\n", end)).encode())
        said = {"Yes": "yes", "no": "no", "Not sure": "no", "\x85no": "no", "\u2028yes": "yes", "\x0cno": "no"}
        right = [said.get(response) == truth.lower() for truth, response in rows]
        whole = sum(one and other for one, other in zip(right[::2], right[1::2])) / 20
        expected[name] = sum(right) / 40 * 100 + whole * 100
    scores = mme.score_folder(tmp_path)
    assert {name: row["score"] for name, row in scores["subtasks"].items()} == expected
    assert scores["perception"] == sum(expected[name] for name in mme.PERCEPTION)
    assert scores["total"] == scores["perception"] + scores["cognition"]


def test_mme_names_missing_and_unreadable_files(tmp_path, capsys):
    for name in mme.PERCEPTION + mme.COGNITION:
        (tmp_path / f"{name}.txt").write_text(line("Yes", "Yes") + line("No", "Yes"))
    main(["evaluate", "--mme", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["total"] == 14 * 50
    (tmp_path / "OCR.txt").write_bytes(b"caf\xe9.jpg\tq\tYes\tYes\nb\tq\tNo\tno\n")
    with pytest.raises(ValueError, match=r"OCR\.txt is not UTF-8"):
        mme.score_folder(tmp_path)
    (tmp_path / "OCR.txt").unlink()
    (tmp_path / "count.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks count\.txt, OCR\.txt"):
        mme.score_folder(tmp_path)


def test_mme_file_survives_tabs_and_line_breaks(tmp_path):
    rows = [
        {"question_id": i, "image_path": "images/a.jpg", "prompt": "Is\tit?", "target": truth, "predict": predict}
        for i, (truth, predict) in enumerate([("Yes", "Yes\tand\r\nmore"), ("No", "No")])
    ]
    mme.write_subtask(tmp_path / "color.txt", rows)
    lines = (tmp_path / "color.txt").open().readlines()
    assert lines == ["a.jpg\tIs it?\tYes\tYes and  more\n", "a.jpg\tIs it?\tNo\tNo\n"]
    assert mme.score_subtask(lines)["score"] == 200
    rows[1]["image_path"] = "images/b.jpg"
    with pytest.raises(ValueError, match="two consecutive questions belong to an image"):
        mme.write_subtask(tmp_path / "color.txt", rows)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True), ("No", False), ("no, it is", False), ("There is not", False), ("NO", True), ("No!", True),
        ("It is there. No.", True), (".no", True), ("", True), ("nothing", True), ("No\n", True), ("well,no", True),
        ("n,o", False), ("no\tit is", True), ("a\u00a0no", True), ("It isn't", True), ("Not there", True),
    ],
)  # fmt: skip
def test_pope_reads_the_first_sentence(answer, yes):
    assert pope.says_yes(answer) is yes


def test_pope_on_random_answers(tmp_path):
    draw = random.Random(1)
    answers = [
        draw.choice(["Yes", "No", "no, none", "It is not.", "NO", "Yes. No", "", "there is"]) for _ in range(300)
    ]
    labels = [draw.choice(["yes", "no", "No"]) for _ in answers]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps({"answer": a}) + "\n" for a in answers))
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps({"label": x}) + "\n" for x in labels))
    score = pope.score(
        pope.read_field(tmp_path / "answers.jsonl", "answer"), pope.read_field(tmp_path / "labels.jsonl", "label")
    )
    said = [not {"No", "no", "not"} & set(a.split(".")[0].replace(",", "").split(" ")) for a in answers]
    truth = [label != "no" for label in labels]
    precision, recall, f1, _ = precision_recall_fscore_support(truth, said, average="binary")
    figures = [score["precision"], score["recall"], score["f1"], score["accuracy"], score["yes_ratio"]]
    # Both are the same ratios of counts, up to the rounding of one or two operations.
    assert figures == pytest.approx([precision, recall, f1, accuracy_score(truth, said), sum(said) / 300], rel=1e-14)


def test_pope_pairs_to_the_shorter_and_counts_all_answers():
    score = pope.score(["Yes", "No", "No", "No"], ["yes", "no"])
    assert (score["tp"], score["tn"], score["unpaired"]) == (1, 1, 2)
    assert score["accuracy"] == 1 and score["yes_ratio"] == 0.25


def test_pope_leaves_out_images_that_could_not_be_used():
    """Their answers are empty, which the script would count as yes."""
    said, failed = {"predict": "No", "target": "No", "metadata": {}}, {"metadata": {"error": "no such image"}}
    rows = [said, failed | {"predict": "", "target": "Yes"}, said | {"predict": "Yes", "target": "Yes"}]
    score = pope.score_predictions(rows)
    assert score == {
        "accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 0.5, "tp": 1, "fp": 0, "tn": 1,
        "fn": 0, "errors": 1,
    }  # fmt: skip
    none = pope.score_predictions(rows[1:2])
    assert none["errors"] == 1 and none["accuracy"] is none["recall"] is none["yes_ratio"] is None


def test_pope_without_a_yes_has_no_precision():
    score = pope.score(["No", "No"], ["yes", "no"])
    assert score["precision"] is None and score["f1"] is None
    assert score["recall"] == 0 and score["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"answer": "Yes"}\n\n', "line 2"),
        (b'{"answer": "Yes"}\n{"text": "Yes"}\n', "line 2"),
        (b'["answer"]\n', "line 1"),
        (b'{"answer": "Yes"} {"answer": "No"}\n', "line 1"),
        (b'\xef\xbb\xbf{"answer": "Yes"}\n', "line 1"),
        (b'{"answer": "caf\xe9"}\n', "is not UTF-8"),
    ],
)
def test_pope_names_the_broken_line(tmp_path, content, message):
    (tmp_path / "answers.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"answers\.jsonl.*{message}"):
        pope.read_field(tmp_path / "answers.jsonl", "answer")


@pytest.mark.parametrize(
    ("answers", "labels", "message"),
    [([], ["no"], "nothing"), (["No"], [], "nothing"), (["No", 1], ["no"], "answer 2")],
)
def test_pope_refuses(answers, labels, message):
    with pytest.raises(ValueError, match=message):
        pope.score(answers, labels)


def test_pope_labels_other_than_no_mean_yes(tmp_path):
    (tmp_path / "labels.jsonl").write_bytes(b'{"label": "No"}\r{"label": null}\r\n{"label": "no", "label": "yes"}\n')
    labels = pope.read_field(tmp_path / "labels.jsonl", "label")
    assert labels == ["No", None, "yes"] and pope.score(["Yes"] * 3, labels)["tp"] == 3
