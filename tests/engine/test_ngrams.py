"""N-grams as they are stored and found again; what is no such file is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from longstride.engine import model as models
from longstride.engine.ngrams import NONE, NGrams
from longstride.errors import BadInput, LongstrideError, ModelError

SIZE = 70_000  # more than two bytes hold


def some(size=SIZE):
    keys = np.array([5, size - 1, (3 + 1) * size + 5])
    tokens = np.array([[6, 7], [size - 2, 0], [8, 9]])
    return NGrams(keys, tokens, np.array([[255, 51], [102, 0], [10, 5]], np.uint8), vocabulary="v", size=size)


@pytest.mark.parametrize("size", [300, SIZE])
def test_what_is_stored_is_found_again(tmp_path, size):
    some(size).save(tmp_path / "new" / "n.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["n.safetensors"]
    found = NGrams.load(tmp_path / "new" / "n.safetensors", "v", size)
    assert len(found) == 3
    assert found.after(NONE, 5) == [(6, 1.0), (7, 0.2)]
    assert found.after(3, 5) == [(8, 10 / 255), (9, 5 / 255)]
    assert found.after(4, 5) == [(6, 1.0), (7, 0.2)]  # an unknown pair: what its last token says
    assert found.after(4, size - 1) == [(size - 2, 0.4)]
    assert found.after(size - 1, 6) == []


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "n.safetensors"
    some().save(path)
    whole = path.read_bytes()
    for vocabulary, size in (("another", SIZE), ("v", SIZE + 1)):
        with pytest.raises(ModelError, match="another vocabulary"):
            NGrams.load(path, vocabulary, size)
    for data in (b"", b"text", whole[:-1], whole[:100]):
        path.write_bytes(data)
        with pytest.raises(ModelError, match="remove it or make it anew"):
            NGrams.load(path, "v", SIZE)
    one, none = np.zeros((2, 1), np.int64), np.zeros((2, 1), np.uint8)
    for keys, tokens, chances in (
        ([5, 4], one, none),
        ([4, 5], one + 9, none),
        ([4, 5], one, none[:1]),
        ([4], one, none),
    ):
        NGrams(np.array(keys), tokens, chances, vocabulary="v", size=9).save(path)
        with pytest.raises(ModelError, match="damaged"):
            NGrams.load(path, "v", 9)
    for keys, tokens, chances in (
        (np.array([4.0, 5.0]), one.astype(np.uint16), none),
        (np.array([4, 5]), one - 1, none),
        (np.array([4, 5]), one.astype(np.float32), none),
        (np.array([4, 5]), one.astype(np.uint16), none.astype(np.int64)),
    ):
        about = {"longstride": json.dumps({"vocabulary": "v", "size": 9})}
        save_file({"keys": keys, "tokens": tokens, "chances": chances}, path, about)
        with pytest.raises(ModelError, match="damaged"):
            NGrams.load(path, "v", 9)
    with pytest.raises(LongstrideError, match="remove it or make it anew"):
        NGrams.load(tmp_path / "none", "v", 9)
    with pytest.raises(BadInput, match="cannot be written"):
        some().save(path / "below")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        some().save(tmp_path / "folder")
    assert not list(tmp_path.glob(".*"))


def test_a_model_finds_its_own_by_its_weights_and_the_embedded_one_those_that_come_with_it(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("LONGSTRIDE_CACHE", str(tmp_path))
    shipped = tmp_path / "shipped.safetensors"
    monkeypatch.setattr(models, "EMBEDDED_NGRAMS", shipped)

    def loaded(name, content, size=SIZE):
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=size))
        return models.find_ngrams(models.PlainModel(name, model, None, content, "v"))

    assert loaded(models.EMBEDDED, "weights") is None  # an installation without them works
    some(SIZE).save(shipped)
    assert loaded("folder", "weights") is None
    assert len(loaded(models.EMBEDDED, "weights")) == 3
    own = models.ngrams_file("weights")
    own.parent.mkdir()
    own.write_bytes(b"damaged")
    assert loaded("folder", "weights") is None  # it loads all the same, and says so
    assert f"{own} holds no n-grams" in caplog.text
    assert len(loaded(models.EMBEDDED, "weights")) == 3
    NGrams(np.array([5]), np.array([[6]]), np.array([[255]], np.uint8), vocabulary="v", size=SIZE).save(own)
    assert len(loaded("folder", "weights")) == 1
    assert len(loaded(models.EMBEDDED, "weights")) == 1  # what was made here comes first
    assert loaded("folder", "weights", SIZE + 1) is None
    assert loaded("folder", "others") is None
