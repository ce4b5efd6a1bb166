"""A damaged database: whatever became of its bytes, a question is answered rightly or refused in one sentence."""

import asyncio
import random
import sqlite3
from dataclasses import dataclass

import pytest

from longstride import Assistant
from longstride.errors import LongstrideError
from longstride.storage.database import Database
from longstride.storage.documents import Documents
from longstride.storage.sessions import Sessions
from longstride.storage.verify import verify
from tests.storage.test_database import make_newer
from tests.tiny import tiny_assistant_model

SETTINGS = {
    "system": "s", "passage_tokens": 24, "passages": 2, "refresh": 8, "stride": 4, "max_tokens": 8, "block_tokens": 16,
    "budget_tokens": 64, "context_tokens": 256, "window": "sinks",
}  # fmt: skip
QUESTION = "What of thing3?"
NAMES = ("ahab", "ishmael")
PAGE = 1024  # smaller than ours, so that a small file has trees of several levels and chains of pages
OF_SESSIONS = ("sessions", "runs", "stream_passages")
OF_DOCUMENTS = ("documents", "passages", "collections")
OTHERS = (
    "answers",
    "blocks",
    "session_blocks",
    "bookmarks",
    "failures",
    "indexes",
)  # derived, or drawn on by no answer
HARMLESS = {("sessions", "created_at"), ("sessions", "updated_at")}


def opened(path):
    return Assistant.open(path, model=tiny_assistant_model(), **SETTINGS)


def text(word, count):
    return "".join(f"Sentence {i} of {word} speaks of thing{i}. " for i in range(count))


async def ask(path, name):
    """(tokens the session holds, the answer, its sources)."""
    async with opened(path) as assistant:
        session = await assistant.session(name, create=False)
        answer = await session.answer(QUESTION)
        return session.tokens, answer.text, [tuple(vars(source).values()) for source in answer.sources]


def wal_of(path):
    return path.with_name(f"{path.name}-wal")


def write(path, data, wal=None):
    """A database of these bytes at `path`."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(data)
    if wal is not None:
        wal_of(path).write_bytes(wal)
    return path


@dataclass(frozen=True)
class Sound:
    """An undamaged database: closed (`data`), and as a crash leaves it (`main` and `wal`). `right`: right answers."""

    data: bytes
    main: bytes
    wal: bytes
    right: dict[str, list[object]]
    blocks: frozenset[int]  # pages of blocks, which are most of the file

    def used(self, *, of_blocks):
        """Offsets of bytes that are not 0."""
        return [at for at, byte in enumerate(self.data) if byte and (at // PAGE in self.blocks) == of_blocks]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return asyncio.run(build(tmp_path_factory.mktemp("sound")))


async def build(folder):
    path, copy = folder / "t.db", folder / "copy.db"
    connection = sqlite3.connect(path)
    connection.execute(f"pragma page_size={PAGE}")
    connection.execute("create table first (page)")
    connection.execute("drop table first")
    connection.close()
    async with opened(path) as assistant:
        for number, word in enumerate(("whales", "ships", "storms")):
            await assistant.add_document(f"{word}.txt", text(word, 8), collection=("default", "other")[number % 2])
        for name, count in zip(NAMES, (20, 14), strict=True):
            session = await assistant.session(name)
            await session.feed(text(name, count), bookmark=f"{name}.txt")
            await session.answer("What of thing5?")
    data = path.read_bytes()
    right = {name: [await ask(write(copy, data), name)] for name in NAMES}
    connection = sqlite3.connect(path)
    blocks = frozenset(row[0] - 1 for row in connection.execute("select pageno from dbstat where name = 'blocks'"))
    connection.close()
    saved = []
    async with opened(path) as assistant:
        session = await assistant.session("ahab")
        for number in range(3):
            # after every commit: SQLite drops them from the first bad one on, and what was there before is right, too
            await session.feed(
                f"Then thing3 came again, {number}. ",
                progress=lambda _tokens: saved.append((path.read_bytes(), wal_of(path).read_bytes())),
            )
    right["ahab"] += [await ask(write(copy, main, wal), "ahab") for main, wal in saved]
    main, wal = saved[-1]
    assert len({tokens for tokens, _, _ in right["ahab"]}) == 1 + len(saved) > 3
    assert all(sources for answers in right.values() for _, _, sources in answers)
    return Sound(data, main, wal, right, blocks)


def problems_of(path):
    """What `verify` says; what lists sessions and documents does not fail otherwise either."""
    try:
        database = Database(path)
        try:
            found = verify(database)
            Sessions(database).all()
            Documents(database).all()
            Documents(database).failures()
        finally:
            database.close()
    except LongstrideError as error:
        return [str(error)]
    return found


async def outcome(sound, path, data, wal, name):
    """What became of a question: right, refused, or a sentence that says what went wrong."""
    problems = problems_of(write(path, data, wal))
    try:
        answer = await ask(write(path, data, wal), name)
    except LongstrideError as error:
        refusal = str(error)
    else:
        return "right" if answer in sound.right[name] else f"a wrong answer: {answer}"
    if any("\n" in sentence or len(sentence) < 20 for sentence in (*problems, refusal)):
        return f"not a sentence: {problems}, {refusal}"
    # what asks for a session by a damaged name, and what makes SQLite take a file for read-only, is known only then
    if not problems and not any(words in refusal for words in ("no session", "read-only")):
        return f"verify does not know of it: {refusal}"
    return "refused"


async def outcomes(sound, path, copies, name=None):
    """How often each outcome came; `copies`: (what was done, bytes of the file, bytes of its WAL or None)."""
    seen = {"right": 0, "refused": 0}
    bad = []
    for number, (what, data, wal) in enumerate(copies):
        found = await outcome(sound, path, data, wal, name or NAMES[number % 2])
        if found in seen:
            seen[found] += 1
        else:
            bad.append((what, found))
    assert bad == []
    return seen


def flipped(rng, data, offsets):
    """(what was done, a copy with one byte changed: a bit of it, or all of it)."""
    for at in offsets:
        copy = bytearray(data)
        copy[at] = rng.choice([copy[at] ^ 1 << rng.randrange(8), 0, 255])
        yield f"byte {at} from {data[at]} to {copy[at]}", bytes(copy)


async def test_the_sound_one_is_answered_from(sound, tmp_path):
    path = tmp_path / "t.db"
    assert problems_of(write(path, sound.data)) == problems_of(write(path, sound.main, sound.wal)) == []
    for name in NAMES:
        assert await ask(write(path, sound.data), name) == sound.right[name][0]
        assert await ask(write(path, sound.main, sound.wal), name) == sound.right[name][-1]


@pytest.mark.parametrize("seed", range(3))
async def test_a_changed_byte_of_what_cannot_be_computed_again(sound, tmp_path, seed):
    rng = random.Random(seed)
    copies = flipped(rng, sound.data, rng.sample(sound.used(of_blocks=False), 60))
    seen = await outcomes(sound, tmp_path / "t.db", ((what, data, None) for what, data in copies))
    assert seen["refused"] > 20


async def test_a_changed_byte_of_the_files_header_or_of_a_pages_header(sound, tmp_path):
    rng = random.Random(10)
    pages = set(range(1, len(sound.data) // PAGE)) - sound.blocks
    heads = rng.sample([page * PAGE + at for page in sorted(pages) for at in range(16)], 45)
    copies = flipped(rng, sound.data, [*range(16, 100, 3), *heads])
    seen = await outcomes(sound, tmp_path / "t.db", ((what, data, None) for what, data in copies))
    assert min(seen.values()) > 5


async def test_a_changed_byte_of_a_cache_costs_only_time(sound, tmp_path):
    rng = random.Random(20)
    copies = flipped(rng, sound.data, rng.sample(sound.used(of_blocks=True), 30))
    seen = await outcomes(sound, tmp_path / "t.db", ((what, data, None) for what, data in copies))
    assert seen["right"] > 20


async def test_a_page_of_zeros(sound, tmp_path):
    starts = [page * PAGE for page in random.Random(30).sample(range(len(sound.data) // PAGE), 30)]
    copies = ((f"page at {at}", sound.data[:at] + bytes(PAGE) + sound.data[at + PAGE :], None) for at in starts)
    assert (await outcomes(sound, tmp_path / "t.db", copies))["refused"] > 5


async def test_a_file_that_ends_early(sound, tmp_path):
    pages = random.Random(40).sample(range(1, len(sound.data) // PAGE), 10)
    lengths = [0, 1, 15, 16, 99, 100, 512, PAGE - 1, len(sound.data) - 1, *(page * PAGE for page in pages)]
    copies = ((f"{length} bytes", sound.data[:length], None) for length in lengths)
    assert (await outcomes(sound, tmp_path / "t.db", copies))["refused"] > 15


async def test_a_log_that_ends_early_or_has_a_changed_byte(sound, tmp_path):
    rng = random.Random(50)
    size = len(sound.wal)
    copies = [(f"{length} bytes", sound.wal[:length]) for length in (0, 31, 32, *rng.sample(range(size), 8))]
    copies += flipped(rng, sound.wal, [*range(0, 56, 6), *rng.sample(range(size), 10)])
    seen = await outcomes(sound, tmp_path / "t.db", ((what, sound.main, wal) for what, wal in copies), "ahab")
    assert seen["right"] > 20


async def test_a_log_that_is_missing_or_damaged_over_a_file_that_has_taken_in_a_part_of_it(sound, tmp_path):
    """A checkpoint writes pages into the file in any order; a power cut ends it anywhere."""
    path = tmp_path / "t.db"
    Database(write(path, sound.main, sound.wal)).close()
    after = path.read_bytes()
    changed = [at for at in range(0, len(sound.main), PAGE) if sound.main[at : at + PAGE] != after[at : at + PAGE]]
    copies = []
    for at in random.Random(70).sample(changed, 8):
        half = sound.main[:at] + after[at : at + PAGE] + sound.main[at + PAGE :]
        copies += [(f"page at {at}, {length} bytes", half, sound.wal[:length]) for length in (0, len(sound.wal) // 2)]
        copies += [(f"page at {at}", half, sound.wal)]
    seen = await outcomes(sound, path, copies, "ahab")
    assert min(seen.values()) > 2


async def test_a_changed_byte_below_a_log(sound, tmp_path):
    rng = random.Random(60)
    offsets = [at for at in sound.used(of_blocks=False) if at < len(sound.main)]
    copies = list(flipped(rng, sound.main, rng.sample(offsets, 20)))
    seen = await outcomes(sound, tmp_path / "t.db", ((what, main, sound.wal) for what, main in copies), "ahab")
    assert sum(seen.values()) == len(copies)  # each refused or answered rightly, of which `outcomes` makes sure


def altered(value):
    """Another value of the same type, used nowhere."""
    if isinstance(value, int | float):
        return value + 1_000_003
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:] if value else b"x"
    return f"~{(value or '')[1:]}"


def alterations(sound, path, tables):
    """(table, column, a copy whose first row there has another value), of tables that have rows."""
    for table in tables:
        connection = sqlite3.connect(write(path, sound.data))
        names = [row[1] for row in connection.execute(f"pragma table_info({table})")]
        row = connection.execute(f"select * from {table}").fetchone()  # noqa: S608
        connection.close()
        for name, value in zip(names, row or (), strict=row is not None):
            connection = sqlite3.connect(write(path, sound.data))
            where = " and ".join(f"{column} is ?" for column in names)
            with connection:
                update = f"update {table} set {name} = ? where {where}"  # noqa: S608
                assert connection.execute(update, [altered(value), *row]).rowcount == 1
            connection.close()
            yield table, name, path.read_bytes()


async def test_an_altered_value_of_the_truth_is_refused_where_it_counts(sound, tmp_path):
    for table, column, data in alterations(sound, tmp_path / "made.db", (*OF_SESSIONS, *OF_DOCUMENTS)):
        for name in NAMES:
            counts = (table, column) not in HARMLESS and (name == NAMES[0] or table in OF_DOCUMENTS)
            found = await outcome(sound, tmp_path / "t.db", data, None, name)
            assert found == ("refused" if counts else "right"), (table, column, name)


async def test_an_altered_value_of_anything_else_changes_no_answer(sound, tmp_path):
    made = 0
    for table, column, data in alterations(sound, tmp_path / "made.db", OTHERS):
        assert await outcome(sound, tmp_path / "t.db", data, None, NAMES[0]) == "right", (table, column)
        made += 1
    assert made > 15


async def test_an_empty_file_a_text_and_a_newer_database_are_refused(tmp_path):
    make_newer(tmp_path / "newer.db")
    for content, why in (
        (b"", "no session 'ahab'"),
        (b"Call me Ishmael.\n" * 100, "not a sound SQLite file"),
        ((tmp_path / "newer.db").read_bytes(), "newer Longstride"),
    ):
        with pytest.raises(LongstrideError, match=why):
            await ask(write(tmp_path / "t.db", content), "ahab")
