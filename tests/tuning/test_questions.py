"""Question sets: the three kinds, by their fields; every refusal with file, record and field."""

import json

import pytest

from longstride.errors import BadInput
from longstride.tuning.questions import BATCH, Document, Gold, load

DOCUMENT = {"id": "d", "text": "First paragraph.\n\nThe second one.\n\nThird."}
ABOUT = {"id": "q", "doc_id": "d", "question": "Which?", "answers": ["second"], "paragraph": 1}
CONTEXTS = {
    "id": "h",
    "question": "Both?",
    "answers": ["yes"],
    "contexts": [{"title": "A", "text": "About a."}, {"title": "B", "text": "About b."}],
    "gold": ["B"],
}
PASSAGE = {"id": "n", "question": "What?", "answers": ["this"], "title": "T", "passage": "It is this."}


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def pair(folder, documents, questions):
    return f"s={write(folder / 'd.jsonl', *documents)},{write(folder / 'q.jsonl', *questions)}"


def test_questions_about_documents_in_either_order(tmp_path):
    spec = pair(tmp_path, [DOCUMENT], [ABOUT])
    loaded = load(spec)
    name, _, paths = spec.partition("=")
    assert load(f"{name}={','.join(paths.split(',')[::-1])}") == loaded
    (question,) = loaded.questions
    assert (question.id, question.document, question.answers, question.metric) == ("q", "d", ("second",), "f1")
    (gold,) = question.gold
    assert DOCUMENT["text"][gold.start : gold.stop] == "The second one."
    (case,) = loaded.cases()
    assert (case.name, case.text, case.documents, case.questions) == ("d", DOCUMENT["text"], (), (question,))


def test_sections_count_from_one_and_may_be_several(tmp_path):
    about = {**ABOUT, "sections": "1, 3"}
    del about["paragraph"]
    (question,) = load(pair(tmp_path, [DOCUMENT], [about])).questions
    assert [DOCUMENT["text"][g.start : g.stop] for g in question.gold] == ["First paragraph.", "Third."]


def test_what_cannot_be_answered_is_left_out_and_counted(tmp_path):
    asked = [ABOUT, {**ABOUT, "answerable": False}, {**ABOUT, "answers": []}, {**ABOUT, "answers": [" "]}]
    loaded = load(pair(tmp_path, [DOCUMENT], asked))
    assert [q.id for q in loaded.questions] == ["q"]
    assert loaded.left_out == {"unanswerable": 3}


def test_questions_that_bring_their_contexts_have_a_case_each(tmp_path):
    loaded = load(f"s={write(tmp_path / 'h.jsonl', CONTEXTS, {**CONTEXTS, 'id': 'i'})}")
    first, second = loaded.cases()
    assert first.documents == (Document("A", "A\nAbout a."), Document("B", "B\nAbout b."))
    assert first.text == ""
    assert first.questions[0].gold == (Gold("B", 0, len("B\nAbout b.")),)
    assert (first.questions[0].document, second.questions[0].document) == ("h", "i")


def test_gold_passages_are_searched_together_and_equal_ones_are_one(tmp_path):
    records = [{**PASSAGE, "id": f"n{i}", "passage": f"It is {i // 2}."} for i in range(2 * BATCH)]
    loaded = load(f"s={write(tmp_path / 'n.jsonl', *records)}")
    assert len(loaded.passages) == BATCH
    assert loaded.questions[1].gold == (Gold("n0", 0, len("T\nIt is 0.")),)
    first, second = loaded.cases()
    assert first.documents == second.documents == loaded.passages
    assert first.collection == second.collection
    assert [*first.questions, *second.questions] == list(loaded.questions)


def test_equal_ids_become_different(tmp_path):
    loaded = load(pair(tmp_path, [DOCUMENT], [ABOUT, {**ABOUT, "question": "Who?"}]))
    assert [q.id for q in loaded.questions] == ["q", "q#2"]


def test_a_choice_is_the_same_each_time_and_holds_the_smaller_one(tmp_path):
    documents = [{**DOCUMENT, "id": f"d{i}"} for i in range(6)]
    asked = [{**ABOUT, "id": f"q{i}", "doc_id": f"d{i % 6}"} for i in range(30)]
    loaded = load(pair(tmp_path, documents, asked))

    def ids(*choice):
        return [q.id for q in loaded.chosen(*choice).questions]

    assert ids(None, None, 0) == [f"q{i}" for i in range(30)]
    assert len({q.document for q in loaded.chosen(2, None, 0).questions}) == 2
    assert ids(2, 4, 0) == ids(2, 4, 0)
    assert set(ids(2, 4, 0)) < set(ids(2, 7, 0)) < set(ids(2, None, 0)) < set(ids(3, None, 0))
    assert ids(None, 4, 0) != ids(None, 4, 1)
    assert ids(None, 4, 0) == sorted(ids(None, 4, 0), key=lambda id_: int(id_[1:]))  # in the file's order


def test_a_case_is_named_by_all_that_is_in_it(tmp_path):
    def case(**changes):
        return load(pair(tmp_path, [DOCUMENT], [{**ABOUT, **changes}])).cases()[0].sha256

    assert case() == case()
    assert len({case(), case(question="Who?"), case(answers=["first"]), case(paragraph=0)}) == 4


@pytest.mark.parametrize("spec", ["", "name", "=a.jsonl", "s=", "s=a,b,c", "a/b=c.jsonl", "a b=c.jsonl"])
def test_what_is_no_set_is_refused(spec):
    with pytest.raises(BadInput, match="is no set: write NAME="):
        load(spec)


def test_a_missing_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere\.jsonl cannot be read"):
        load(f"s={tmp_path / 'nowhere.jsonl'}")
    with pytest.raises(BadInput, match=r"e\.jsonl holds no records"):
        load(f"s={write(tmp_path / 'e.jsonl')}")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**ABOUT, "doc_id": "x"}, r"q\.jsonl, record 2: \"doc_id\" 'x' is no document of .*d\.jsonl"),
        ({**ABOUT, "doc_id": 3}, r"record 2: no \"doc_id\" that is a string"),
        ({**ABOUT, "question": " "}, r"record 2: no \"question\" that is a string with text"),
        ({**ABOUT, "answers": "second"}, r"record 2: no \"answers\" that is a list of strings"),
        ({**ABOUT, "answers": [1]}, r"record 2: no \"answers\" that is a list of strings"),
        ({**ABOUT, "metric": "bleu"}, r"record 2: \"metric\" is 'bleu'; it must be one of f1, exam, rouge"),
        ({**ABOUT, "paragraph": 3}, r"record 2: \"paragraph\" is 3, but its document has 3 paragraphs"),
        ({**ABOUT, "paragraph": "1"}, r"record 2: \"paragraph\" is '1', but"),
        ({**ABOUT, "paragraph": None, "sections": "one"}, r"record 2: \"sections\" is 'one'; it must be numbers"),
        ({**ABOUT, "paragraph": None, "sections": "0"}, r"record 2: \"sections\" is '0', but"),
    ],
)
def test_a_wrong_question_is_named(tmp_path, record, message):
    with pytest.raises(BadInput, match=message):
        load(pair(tmp_path, [DOCUMENT], [ABOUT, record]))


@pytest.mark.parametrize(
    ("documents", "questions", "message"),
    [
        ([DOCUMENT, DOCUMENT], [ABOUT], r"d\.jsonl, record 2: \"id\" 'd' was there before"),
        ([DOCUMENT, {"id": "e"}], [ABOUT], r"d\.jsonl, record 2: no \"text\" that is a string with text"),
        ([{"text": "x"}], [ABOUT], r"d\.jsonl, record 1: no \"id\""),
        ([DOCUMENT], [DOCUMENT], "one of its two files must hold documents"),
        ([ABOUT], [ABOUT], "one of its two files must hold documents"),
        ([DOCUMENT], [{**ABOUT, "answerable": False}], r"q\.jsonl: no question can be asked \(1 unanswerable\)"),
    ],
)
def test_a_wrong_pair_is_refused(tmp_path, documents, questions, message):
    with pytest.raises(BadInput, match=message):
        load(pair(tmp_path, documents, questions))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (DOCUMENT, r"its records bring no \"contexts\" and no \"passage\"; name the file of documents"),
        ({**CONTEXTS, "contexts": []}, r"f\.jsonl, record 1: no \"contexts\" that is a list"),
        ({**CONTEXTS, "contexts": ["A"]}, r"record 1: an item of \"contexts\" is no object"),
        ({**CONTEXTS, "contexts": [{"title": "A"}]}, r"record 1: an item of \"contexts\" is no object"),
        ({**CONTEXTS, "contexts": [{"title": "B", "text": " "}]}, r"record 1: the \"text\" of 'B' in \"contexts\" is"),
        ({**CONTEXTS, "gold": ["C"]}, r"record 1: \"gold\" names 'C', which is no title"),
        ({**CONTEXTS, "gold": None}, r"record 1: no \"gold\" that is a list of strings"),
        ({**PASSAGE, "passage": ""}, r"record 1: no \"passage\" that is a string with text"),
    ],
)
def test_a_wrong_record_of_one_file_is_named(tmp_path, record, message):
    with pytest.raises(BadInput, match=message):
        load(f"s={write(tmp_path / 'f.jsonl', record)}")
