"""Files to text: encodings, HTML, PDF, and a reason for whatever cannot be read."""

import os
import re
from pathlib import Path

import pytest
from fpdf import FPDF
from hypothesis import given, settings
from hypothesis import strategies as st

from longstride.errors import BadInput
from longstride.scheduler.convert import decode, path_name, text_of

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely."
LATIN = "Ein Café am Fluß, à la façon de Zürich."
RESTRICTED = {"owner_password": "owner"}
LOCKED = {"owner_password": "owner", "user_password": "user"}


def converted(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return text_of(path)


def pdf_of(*pages, **encryption):
    """A PDF with a text a page; `None` is an empty page."""
    pdf = FPDF()
    if encryption:
        pdf.set_encryption(**encryption)
    pdf.set_font("Helvetica")
    for text in pages:
        pdf.add_page()
        if text is not None:
            pdf.multi_cell(0, text=text)
    return bytes(pdf.output())


def aes_pdf_of(text):
    """Marked as encrypted with AES-256, the usual way today, under an unknown password."""
    data = pdf_of(text, **LOCKED)
    zeros = {name: f"/{name} <{'00' * size}>" for name, size in [("O", 48), ("U", 48), ("OE", 32), ("UE", 32)]}
    entry = (
        f"/Filter /Standard /V 5 /R 6 /Length 256 /P -4 {' '.join(zeros.values())} /Perms <{'00' * 16}> "
        "/CF <</StdCF <</CFM /AESV3>>>> /StmF /StdCF /StrF /StdCF"
    )
    return re.sub(rb"/EncryptMetadata.*?/V 2", entry.encode(), data, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        pytest.param("Fluß — 鯨 🐋", "Fluß — 鯨 🐋".encode(), id="utf-8"),
        pytest.param("Fluß — 鯨", "Fluß — 鯨".encode("utf-8-sig"), id="utf-8 with a mark"),
        pytest.param("Fluß — 鯨 🐋", b"\xff\xfe" + "Fluß — 鯨 🐋".encode("utf-16-le"), id="utf-16, little end first"),
        pytest.param("Fluß — 鯨 🐋", b"\xfe\xff" + "Fluß — 鯨 🐋".encode("utf-16-be"), id="utf-16, big end first"),
        pytest.param(LATIN, LATIN.encode("latin-1"), id="latin-1"),
        pytest.param("“Whale” – 5 €", "“Whale” – 5 €".encode("cp1252"), id="cp1252"),
        pytest.param("one\ntwo\nthree", b"one\r\ntwo\r\nthree", id="line ends of Windows"),
        pytest.param("a\tb\x0cc\x1b[0m" + TEXT, b"a\tb\x0cc\x1b[0m" + TEXT.encode(), id="form feeds and colours"),
    ],
)
@pytest.mark.parametrize("name", ["book.txt", "book.md", "book"])
def test_text_is_read_in_its_encoding(tmp_path, name, text, data):
    assert converted(tmp_path, name, data) == text


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1))
@settings(deadline=None)
def test_any_text_survives_any_unicode_encoding(text):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert decode(text.encode(encoding)) == text.removeprefix("\ufeff" if encoding == "utf-8" else "")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b" \n\t\r\n ", "the file holds no text", id="blank"),
        pytest.param(b"\xef\xbb\xbf", "the file holds no text", id="nothing but a mark"),
        pytest.param(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "is a binary file, not text", id="png"),
        pytest.param(b"text and then\x00more text", "is a binary file, not text", id="nul byte"),
        pytest.param(TEXT.encode("utf-16-le"), "is a binary file, not text", id="utf-16 without a mark"),
        pytest.param(bytes(range(1, 256)) * 8, "is a binary file, not text", id="every byte but nul"),
        pytest.param(b"\xef\xbb\xbfgood \xff\xff", "is damaged utf-8-sig text at byte", id="damaged utf-8"),
        pytest.param(b"\xff\xfea\x00b", "is damaged utf-16 text at byte", id="half a character of utf-16"),
    ],
)
def test_what_is_not_text_is_refused_with_the_reason(tmp_path, data, why):
    with pytest.raises(BadInput, match=f"^{why}"):
        converted(tmp_path, "book.txt", data)


def test_a_late_nul_byte_is_dropped(tmp_path):
    assert converted(tmp_path, "book.txt", b"a" * 70_000 + b"\x00b") == "a" * 70_000 + "b"


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"^cannot be read: No such file or directory$"):
        text_of(tmp_path / "nowhere.txt")
    with pytest.raises(BadInput, match=r"^cannot be read: Is a directory$"):
        text_of(tmp_path)


# --- HTML ---


@pytest.mark.parametrize("name", ["page.html", "page.HTM", "page.xhtml"])
def test_html_loses_its_markup_scripts_and_styles(tmp_path, name):
    page = """<!doctype html><html><head><title>Moby Dick</title>
      <style>p { color: red }</style><script>alert("hidden")</script></head>
      <body><h1>Loomings</h1><p>Call   me
      <b>Ishmael</b>.</p><noscript>hidden</noscript><template>hidden</template><!-- hidden -->
      <ul><li>one</li><li>two</li></ul><p>first<br>second</p><div>caf&eacute; &amp; bar</div>
      <script>hidden()</script></body></html>"""
    assert converted(tmp_path, name, page.encode()).splitlines() == [
        "Moby Dick", "Loomings", "Call me", "Ishmael.", "one", "two", "first", "second", "café & bar",
    ]  # fmt: skip


def test_the_end_of_a_block_is_the_end_of_a_line(tmp_path):
    page = b"<h1>One</h1><p>Two</p><div>Three</div><ul><li>Four</li><li>Five</li></ul><tr><td>Six</td></tr>Seven"
    assert converted(tmp_path, "p.html", page) == "One\nTwo\nThree\nFour\nFive\nSix\nSeven"


@pytest.mark.parametrize(
    "page",
    [
        "<div>one<p>two</p></div>",
        "one<div>two</div>",
        "<ul><li>one<ul><li>two</li></ul></li></ul>",
        "<table><tr><td>one</td><td>two</td></tr></table>",
        "<table><tr><th>one</th><th>two</th></tr></table>",
        "<dl><dt>one</dt><dd>two</dd></dl>",
        "<blockquote>one</blockquote>two",
        "<pre>one</pre>two",
        "<html><head><title>one</title></head><body>two</body></html>",
    ],
)
def test_words_of_two_blocks_stay_apart(tmp_path, page):
    assert converted(tmp_path, "p.html", page.encode()).split() == ["one", "two"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_html_is_read_in_its_encoding(tmp_path, encoding):
    declared = '<meta charset="latin-1">' if encoding == "latin-1" else ""
    assert converted(tmp_path, "p.html", f"{declared}<p>{LATIN}</p>".encode(encoding)) == LATIN


def test_html_that_declares_no_encoding_is_read_as_text_would_be(tmp_path):
    assert converted(tmp_path, "p.html", f"<p>{LATIN}</p>".encode("latin-1")) == LATIN


@pytest.mark.parametrize("page", [b"<p> </p>", b"<script>only()</script>", b'<img src="a.png">'])
def test_html_without_text_is_refused(tmp_path, page):
    with pytest.raises(BadInput, match="the file holds no text"):
        converted(tmp_path, "p.html", page)


def test_a_binary_file_named_html_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is a binary file"):
        converted(tmp_path, "p.html", bytes(range(256)) * 8)


def test_html_that_is_only_an_address_is_text(tmp_path):
    assert converted(tmp_path, "p.html", b"https://example.com/whales") == "https://example.com/whales"


# --- PDF ---


@pytest.mark.parametrize("name", ["book.pdf", "book.PDF", "book.txt"])
def test_a_pdf_is_read_page_by_page(tmp_path, name):
    text = converted(tmp_path, name, pdf_of(TEXT, LATIN))
    assert text == f"{TEXT}\n\n{LATIN}"


def test_a_pdf_under_a_password_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"^is an encrypted PDF; save it without a password first$"):
        converted(tmp_path, "book.pdf", pdf_of(TEXT, **LOCKED))


def test_a_pdf_under_aes_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"^is an encrypted PDF"):
        converted(tmp_path, "book.pdf", aes_pdf_of(TEXT))


def test_a_pdf_that_only_restricts_editing_is_read(tmp_path):
    assert converted(tmp_path, "book.pdf", pdf_of(TEXT, **RESTRICTED)) == TEXT


def test_a_pdf_without_text_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"^is a PDF without text"):
        converted(tmp_path, "scan.pdf", pdf_of(None, None))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.98])
def test_a_truncated_pdf_is_refused(tmp_path, share):
    data = pdf_of(TEXT)
    with pytest.raises(BadInput, match=r"^is a damaged PDF"):
        converted(tmp_path, "book.pdf", data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [TEXT.encode(), b"%PDF-1.7\n", b"\x00" * 100])
def test_what_is_no_pdf_but_says_so_is_refused(tmp_path, data):
    with pytest.raises(BadInput, match=r"^is a damaged PDF"):
        converted(tmp_path, "book.pdf", data)


def test_a_pdf_with_an_unknown_filter_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"^is a damaged PDF"):
        converted(tmp_path, "book.pdf", pdf_of(TEXT).replace(b"/FlateDecode", b"/OtherDecode"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """(a file to write damaged bytes to, sound bytes)."""
    return tmp_path_factory.mktemp("damaged") / "book.pdf", pdf_of(TEXT)


@settings(deadline=None, max_examples=200)
@given(share=st.floats(0, 1), value=st.binary(min_size=1, max_size=6), cut=st.booleans())
def test_a_damaged_pdf_gives_text_or_a_reason(damaged, share, value, cut):
    path, data = damaged
    at = int(share * len(data))
    path.write_bytes(data[:at] if cut else data[:at] + value + data[at + len(value) :])
    try:
        text = text_of(path)
    except BadInput as error:
        assert str(error)  # noqa: PT017 - either is right
    else:
        assert text.strip()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_is_there_in_part_is_left_for_later(cut):
    """A file that is being written; another text in one byte a character is taken for what it is."""
    whole = "Grüße 🐋".encode()
    assert decode(whole[:-cut]) == "Grüße "
    assert decode("Grüße é".encode("cp1252")) == "Grüße é"
    assert decode("caf\xe9".encode("cp1252")) == "café"


def test_a_path_that_is_not_utf_8_has_a_name():
    assert path_name(Path(os.fsdecode(b"/a/caf\xe9.txt"))) == "/a/caf\\xe9.txt"
    assert path_name(Path("/a/Grüße.txt")) == "/a/Grüße.txt"
