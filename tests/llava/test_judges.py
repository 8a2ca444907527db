"""How answers are judged and counted: exactly, by a model, in MM and MME scores."""

import json

import pytest

from mixlora_llava.model import generate
from mixlora_llava.scoring import predict, scores
from mixlora_llava.scoring.judge import exact, judge_prompt, read_verdict


def test_options_are_written_as_in_the_released_code():
    assert generate.build_prompt("Which? [Options] a, b", "bare") == "USER: <image>\nWhich? Options a, b ASSISTANT:"


@pytest.mark.parametrize(
    ("predict", "target", "right"),
    [
        ("Seven.", "seven", True),
        ("the cat", "Cat", True),
        ("seven red", "seven", False),
        ("A", "a", True),
        ("", "x", False),
    ],
)
def test_exact_judge(predict, target, right):
    assert exact([{"predict": predict, "target": target}]) == [right]


def test_judge_prompt_is_the_papers():
    row = {"prompt": "?", "metadata": {"question": "Is it red?"}, "target": "Yes", "predict": "No"}
    assert judge_prompt(row) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: Decide if the prediction is correct given the question and"
        " the answer. Questions: Is it red? Answer: Yes Prediction: No Your response should only be Yes or No."
        " ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("Yes", True), (" no.", False), ("Yes, it", True), ("Nobody", None), ("maybe", None), ("", None)],
)
def test_verdicts(said, verdict):
    assert read_verdict(said) is verdict


@pytest.mark.slow
def test_mm_avg_is_the_mean_of_the_seven_sets(tmp_path):
    published = {  # MixLoRA E=16, r=4 in Table 1
        "text_vqa": 40.66, "visual_spatial_reasoning": 52.70, "snli_ve_classification": 43.10, "cifar_10": 91.59,
        "cifar_100": 57.28, "mnist": 85.25, "pope_pop": 78.13,
    }  # fmt: skip
    for task, accuracy in published.items():
        right = round(accuracy * 100)
        rows = [
            {"predict": "yes" if i < right else "no", "target": "yes", "prompt": "", "image_path": ""}
            for i in range(10000)
        ]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = scores.score_folder(tmp_path, exact)
    assert report["mm_avg"] == pytest.approx(64.10, abs=0.005)  # as printed
    (tmp_path / "mnist.jsonl").unlink()
    report = scores.score_folder(tmp_path, exact)
    assert report["mm_avg"] is None and report["mm_sets"]["MNIST"] is None


def test_mme_predictions_become_the_tools_files(tmp_path):
    from mixlora_llava.scoring import mme

    for name in mme.PERCEPTION + mme.COGNITION:
        rows = [
            {"question_id": i, "prompt": "USER: q", "metadata": {"question": "q?"}, "image_path": f"x/{i // 2}.jpg",
             "target": target, "predict": "Yes"}
            for i, target in enumerate(["Yes", "No"] * 3)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = scores.score_folder(tmp_path, exact)
    assert report["mme"]["perception"] == 10 * 50 and report["mme"]["total"] == 14 * 50
    assert (tmp_path / "mme" / "OCR.txt").read_text().splitlines()[1] == "0.jpg\tq?\tNo\tYes"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"unique_id": 1}'], "lacks"),
        (["nothing"], "line 1: not JSON"),
        (["[]"], "lacks"),
        (['{"unique_id": 1, "image_path": "a", "prompt": "b", "target": 3}'], r"line 1: \['target'\] must be texts"),
    ],
)
def test_questions_refused_by_line(tmp_path, lines, message):
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        predict.read_questions(tmp_path / "q.jsonl")


def test_a_folder_without_questions_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(ValueError, match="neither a file of questions nor a folder"):
            predict.question_files(place)


@pytest.mark.parametrize(
    ("predict", "target"),
    [
        ("3.5", "35"), ("-5", "5"), ("10:30", "1030"), ("1/2", "12"), ("+", "-"), ("C++", "C"), ("", "+"), ("", "?"),
        ("की", "के"), (".5", "5"),
    ],
)  # fmt: skip
def test_signs_and_marks_count(predict, target):
    assert exact([{"predict": predict, "target": target}, {"predict": target, "target": predict}]) == [False, False]


def test_composed_and_decomposed_letters_are_the_same():
    assert exact([{"predict": "resume\u0301.", "target": "resumé"}, {"predict": "a temple .", "target": "temple"}]) == [
        True, True,
    ]  # fmt: skip


def row(predict="seven", target="seven", **metadata):
    return {"predict": predict, "target": target, "prompt": "", "image_path": "", "metadata": metadata}


def test_an_answer_that_could_not_be_given_is_wrong_whatever_the_judge_says():
    score = scores.score_task("x", [row(error="missing"), row()], judge=lambda rows: [None, True])
    assert score == {"accuracy": 50.0, "count": 2, "unclear": 0, "errors": 1}


def test_answers_of_two_adapters_have_no_common_score(tmp_path):
    for name, digest in (("one", "d1"), ("two", "d2")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row(model_digest=digest)) + "\n")
    with pytest.raises(ValueError, match="several models or adapters, such as those in one and two"):
        scores.score_folder(tmp_path, exact)


def test_a_task_may_have_the_name_of_one_of_mmes(tmp_path):
    rows = [row("3", "3"), row("3", "4\u2028")]  # a separator within a text ends no line
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in rows]
    (tmp_path / "count.jsonl").write_text("".join(lines), encoding="utf-8")
    report = scores.score_folder(tmp_path, exact)
    assert report["tasks"]["count"]["accuracy"] == report["average"] == 50.0 and report["mme"] is None
