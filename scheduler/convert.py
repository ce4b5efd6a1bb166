"""Files to plain text. A file that cannot be read raises `BadInput` with the reason; it never stops the others."""

import codecs
import logging
import os
import re
import warnings
from pathlib import Path

from longstride.errors import BadInput

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# elements that stand on lines of their own; all others run on
_BLOCKS = re.compile(
    "^(?:address|article|aside|blockquote|br|caption|dd|details|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|header|"
    "hr|legend|li|main|nav|ol|option|p|pre|section|summary|table|tbody|td|tfoot|th|thead|title|tr|ul)$"
)


def text_of(path: Path) -> str:
    """The text of a txt, Markdown, HTML or PDF file (others are read as plain text if they are text)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}") from error
    if not data:
        raise BadInput("the file is empty")
    if data.startswith(b"%PDF-") or path.suffix.lower() == ".pdf":
        text = _pdf(path)
    elif path.suffix.lower() in {".html", ".htm", ".xhtml"}:
        text = _html(data)
    else:
        text = decode(data)
    if not text.strip():
        raise BadInput("the file holds no text")
    return text.replace("\r\n", "\n").replace("\x00", "")


def path_name(path: Path) -> str:
    """A path as text, also one whose bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def decode(data: bytes) -> str:
    """Text in UTF-8 or UTF-16 (with its mark), else in Western European single bytes. Binary data is refused."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise BadInput(f"is damaged {encoding} text at byte {error.start}") from error
    if b"\x00" in data[:65536]:
        raise BadInput("is a binary file, not text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        # the last character of a file that is being written may be there in part; it is UTF-8 if others before it are
        before = data[: error.start]
        cut = error.reason == "unexpected end of data" and not before.isascii()
        text = before.decode("utf-8") if cut else data.decode("cp1252", errors="replace")
    sample = text[:65536]
    strange = sum(1 for c in sample if (ord(c) < 32 and c not in "\t\n\r\f\x1b") or c == "�")
    if strange > len(sample) // 50:
        raise BadInput("is a binary file, not text")
    return text


def _html(data: bytes) -> str:
    try:
        from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
        from bs4.dammit import EncodingDetector
    except ImportError as error:
        raise BadInput('HTML needs an extra: pip install "longstride[documents]"') from error
    declared = EncodingDetector.find_declared_encoding(data, is_html=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a page may be no more than an address
        if declared and b"\x00" not in data:
            page = BeautifulSoup(data, "html.parser", from_encoding=declared)
        else:
            page = BeautifulSoup(decode(data), "html.parser")
    for hidden in page(["script", "style", "noscript", "template"]):
        hidden.decompose()
    for block in page(_BLOCKS):
        block.insert_before("\n")
        block.insert_after("\n")
    lines = (" ".join(line.split()) for line in page.get_text().splitlines())
    return "\n".join(line for line in lines if line)


def _pdf(path: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError
    except ImportError as error:
        raise BadInput('PDF needs an extra: pip install "longstride[documents]"') from error
    # pypdf logs what it stumbles over; what matters of it becomes the reason below
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text() for page in reader.pages]
    except DependencyError as error:
        raise BadInput(f"is an encrypted PDF; save it without a password first ({error})") from error
    # a damaged PDF makes the parser fail in any way; each is this file's fault alone and becomes its reason
    except Exception as error:
        raise BadInput(f"is a damaged PDF: {type(error).__name__}: {error}") from error
    if locked:
        raise BadInput("is an encrypted PDF; save it without a password first")
    # half a character (a lone surrogate) can be spelled in a PDF, and written nowhere
    text = "\n\n".join(pages).encode("utf-8", "replace").decode()
    if not text.strip():
        raise BadInput("is a PDF without text (a scan?); run it through OCR first")
    return text
