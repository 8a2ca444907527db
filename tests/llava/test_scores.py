"""MME and POPE against their official definitions, by hand and on random answers."""

import json
import random

import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from integration.llava import mme, pope


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
        line("Yes", "maybe"), line("No", "no\tit is"),  # other; malformed by a tab
        "cut off", line("No", "no"),  # malformed by a line break
    ]  # fmt: skip
    score = mme.score_subtask(lines)
    assert (score["questions"], score["other"], score["malformed"]) == (6, 1, 2)
    assert score["acc"] == 4 / 6 and score["acc_plus"] == 1 / 4
    assert score["score"] == 4 / 6 * 100 + 25


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("Yes", "Yes")] * 3, "odd number, 3"),
        ([line("Yes", "Yes"), line("maybe", "Yes")], "line 2: the ground truth"),
        (["x\n", "y\n"], "no line of the four fields"),
        ([], "no line of the four fields"),
    ],
)
def test_mme_stops_where_the_tool_stops(lines, message):
    with pytest.raises(ValueError, match=message):
        mme.score_subtask(lines)


def test_mme_on_random_files(tmp_path):
    draw = random.Random(0)
    responses = ["Yes", "no", "Not sure", "yes\textra", "", "  Yes", "unknown", "The answer is no", "y\tes\tno"]
    expected = {}
    for name in mme.PERCEPTION + mme.COGNITION:
        lines = [line(draw.choice(["Yes", "No"]), draw.choice(responses)) for _ in range(40)]
        (tmp_path / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        rows = [one[:-1].split("\t") for one in lines]
        good = [len(row) == 4 for row in rows]

        def label(row):
            start = (row[3].lower() + "\n")[:4]
            return "yes" if "yes" in start else "no" if "no" in start else "other"

        truth = [row[2].lower() for row, ok in zip(rows, good) if ok]
        accuracy = accuracy_score(truth, [label(row) for row, ok in zip(rows, good) if ok])
        right = [ok and label(row) == row[2].lower() for row, ok in zip(rows, good)]
        whole = sum(one and other for one, other in zip(right[::2], right[1::2])) / 20
        expected[name] = accuracy * 100 + whole * 100
    scores = mme.score_folder(tmp_path)
    assert {name: row["score"] for name, row in scores["subtasks"].items()} == expected
    assert scores["perception"] == sum(expected[name] for name in mme.PERCEPTION)
    assert scores["total"] == scores["perception"] + scores["cognition"]


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


def test_pope_without_a_yes_has_no_precision():
    score = pope.score(["No", "No"], ["yes", "no"])
    assert score["precision"] is None and score["f1"] is None
    assert score["recall"] == 0 and score["accuracy"] == 0.5


def test_pope_names_the_broken_line(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"answer": "Yes"}\n\n')
    with pytest.raises(ValueError, match="line 2"):
        pope.read_field(tmp_path / "answers.jsonl", "answer")
