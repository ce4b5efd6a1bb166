"""Intervals, and what a report leaves behind."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longstride.errors import BadInput
from longstride.tuning.report import markdown, provenance, write_json, write_text
from longstride.tuning.statistics import Interval, mean, perplexity
from tests.tiny import tiny_assistant_model

DOCUMENTS = st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 9)), min_size=2, max_size=12)


def test_the_mean_is_over_targets_not_over_documents():
    assert mean([1.0, 8.0], [1, 4]).value == pytest.approx(9 / 5)


@given(DOCUMENTS)
def test_an_interval_holds_its_value_and_moves_with_it(documents):
    sums, counts = [s for s, _ in documents], [c for _, c in documents]
    found = mean(sums, counts)
    assert found.low <= found.value <= found.high
    shifted = mean([s + 3 * c for s, c in documents], counts)
    assert np.allclose(shifted, np.add(found, 3))


def test_one_document_says_nothing_of_others():
    found = mean([6.0], [3])
    assert found == Interval(2.0, None, None)
    assert found.known == (2.0, 2.0)
    assert found.shown(".1f") == "2.0 [-]"
    assert perplexity(found).low is None


def test_equal_counts_give_students_interval():
    values = [1.0, 2.0, 4.0, 7.0]
    found = mean(values, [1] * 4)
    far = 3.182 * np.std(values, ddof=1) / 2
    assert found == pytest.approx((3.5, 3.5 - far, 3.5 + far))
    assert found.shown(".2f") == f"3.50 [{3.5 - far:.2f}, {3.5 + far:.2f}]"


def test_documents_count_whole():
    """A hundred equal targets of a document say no more than one."""
    few = mean([0.0, 1.0, 0.0, 1.0], [1, 1, 1, 1])
    many = mean([0.0, 100.0, 0.0, 100.0], [100, 100, 100, 100])
    assert few == pytest.approx(many)
    assert few.low < 0.2
    assert few.high > 0.8


@pytest.mark.parametrize("documents", [3, 4, 6, 40])
def test_an_interval_covers_the_truth_as_often_as_it_says(documents):
    """Over as few documents as there may be, and of unequal lengths."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        counts = rng.integers(100, 200, documents)
        found = mean(rng.normal(5.0, 2.0, documents) * counts, counts)
        covered += found.low <= 5.0 <= found.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_a_paired_difference_is_narrower_than_its_sides():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 30)
    other = base + 1 + rng.normal(0, 0.1, 30)
    paired, single = mean(other - base, np.ones(30)), mean(base, np.ones(30))
    assert paired.high - paired.low < (single.high - single.low) / 20
    assert paired.low > 0.9


@pytest.mark.parametrize(("sums", "counts"), [([], []), ([0.0], [0])])
def test_nothing_has_no_mean(sums, counts):
    with pytest.raises(ValueError, match="no documents"):
        mean(sums, counts)


def test_a_document_without_targets_is_no_zero():
    assert mean([4.0, 0.0, 6.0], [2, 0, 2]) == mean([4.0, 6.0], [2, 2])


def test_perplexity_of_a_loss():
    assert perplexity(Interval(0.0, -math.log(2), math.log(2))) == pytest.approx((1.0, 0.5, 2.0))


# --- report ---


def test_markdown_keeps_bars_out_of_cells():
    assert markdown(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"


def test_files_are_written_whole_and_folders_made(tmp_path):
    path = tmp_path / "new" / "r.json"
    write_json(path, {"ö": [1]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ö": [1]}
    write_text(path, "over")
    assert path.read_text() == "over"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/r\.json cannot be written"):
        write_json(tmp_path / "file" / "r.json", {})


def test_provenance_names_model_and_machine():
    told = provenance(tiny_assistant_model())
    assert (told["model"], told["fingerprint"]) == ("tiny-llama", "fingerprint of l")
    assert (told["device"], told["dtype"]) == ("cpu", "float32")
    assert told["torch"].startswith("2.")
    json.dumps(told)
