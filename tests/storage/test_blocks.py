"""KV blocks: the byte budget, who goes first, and no unsound block handed out."""

import hashlib
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from longstride.storage.blocks import Block, Blocks
from longstride.storage.database import Database


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    opened = Database(tmp_path_factory.mktemp("blocks") / "t.db")
    yield opened
    opened.close()


@pytest.fixture
def blocks(database):
    return emptied(database, 1000)


def emptied(database, limit, free_disk=0):
    """An empty table with a budget; a fresh file for every example would cost an fsync each."""
    database.write(lambda tables: tables.conn.execute("delete from blocks"))
    return Blocks(database, limit, free_disk)


def block(name, size=100):
    seed = name.encode()
    data = (hashlib.sha256(seed).digest() * (size // 32 + 1))[:size]
    return Block(hashlib.sha256(seed).digest(), "fingerprint", b"ids of " + seed, b"positions of " + seed, data)


def put(blocks, *which):
    return blocks.database.write(lambda tables: blocks.put(tables, which))


def get(blocks, one):
    return blocks.get(one.id, one.fingerprint, one.ids, one.positions, len(one.data))


def stored(blocks, names):
    kept = blocks.has([block(name).id for name in names])
    return [name for name in names if block(name).id in kept]


def use_times(blocks, **times):
    """Set when blocks were last used, as if time had passed."""
    rows = [(at, block(name).id) for name, at in times.items()]
    update = "update blocks set used_at = ? where id = ?"
    blocks.database.write(lambda tables: tables.conn.executemany(update, rows))


def test_a_block_comes_back_as_it_was_put(blocks):
    one, two = block("one"), block("two", 0)
    assert put(blocks, one, two) == 2
    assert get(blocks, one) == (one.data, "")
    assert get(blocks, two) == (b"", "")
    assert blocks.usage() == (2, 100)
    assert blocks.has([one.id, block("three").id]) == {one.id}
    assert get(blocks, block("three")) == (None, "missing")
    assert blocks.verify() == []


def test_a_block_is_stored_once(blocks):
    assert put(blocks, block("one"), block("one")) == 1
    assert put(blocks, block("one"), block("two")) == 1
    assert blocks.usage() == (2, 200)


@settings(deadline=None, max_examples=40)
@given(
    limit=st.integers(0, 300),
    puts=st.lists(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 200)), max_size=6), max_size=5),
)
def test_the_budget_is_never_exceeded(database, limit, puts):
    """Looked at between any two blocks of one transaction, and after it."""
    blocks = emptied(database, limit)

    def change(tables, wanted):
        def watched():
            for name, size in wanted:
                yield block(str(name), size)
                used = tables.conn.execute("select coalesce(sum(length(data)), 0) from blocks").fetchone()[0]
                assert used <= limit

        return blocks.put(tables, watched())

    for wanted in puts:
        count = database.write(lambda tables, wanted=wanted: change(tables, wanted))
        assert count <= len(wanted)
        used = database.read(lambda tables: tables.conn.execute("select sum(length(data)) from blocks").fetchone()[0])
        assert (used or 0) == blocks.usage()[1] <= limit


def test_a_block_larger_than_the_budget_is_left_out_and_pushes_nothing_out(blocks):
    assert put(blocks, block("one", 500), block("huge", 1001), block("two", 500)) == 2
    assert stored(blocks, ["one", "huge", "two"]) == ["one", "two"]
    assert blocks.usage() == (2, 1000)
    assert put(blocks, block("all", 1000)) == 1
    assert blocks.usage() == (1, 1000)


def test_the_least_recently_used_goes_first(blocks):
    put(blocks, *(block(name, 300) for name in ("a", "b", "c")))
    use_times(blocks, a=300.0, b=100.0, c=200.0)
    put(blocks, block("d", 300))
    assert stored(blocks, "abcd") == ["a", "c", "d"]
    put(blocks, block("e", 600))
    assert stored(blocks, "abcde") == ["d", "e"]


def test_a_touched_block_stays(blocks):
    put(blocks, *(block(name, 300) for name in ("a", "b", "c")))
    use_times(blocks, a=100.0, b=200.0, c=300.0)
    blocks.database.write(lambda tables: blocks.touch(tables, [block("a").id, block("never stored").id]))
    put(blocks, block("d", 300))
    assert stored(blocks, "abcd") == ["a", "c", "d"]


def test_nothing_is_stored_on_a_disk_that_is_nearly_full(database):
    blocks = emptied(database, 1000, free_disk=1 << 60)
    assert put(blocks, block("one")) == 0
    assert blocks.usage() == (0, 0)


def test_dropped_blocks_are_gone_and_can_be_put_again(blocks):
    put(blocks, block("one"), block("two"))
    blocks.database.write(lambda tables: blocks.drop(tables, [block("one").id, block("three").id]))
    assert stored(blocks, ["one", "two"]) == ["two"]
    assert put(blocks, block("one")) == 1
    assert get(blocks, block("one")) == (block("one").data, "")


def flip(blocks, column, at, mask):
    """Flip bits of one byte of a stored value."""

    def change(tables):
        (stored,) = tables.conn.execute(f"select cast({column} as blob) from blocks").fetchone()  # noqa: S608
        value = bytearray(stored)
        value[at] ^= mask
        kind = "text" if column == "fingerprint" else "blob"
        tables.conn.execute(f"update blocks set {column} = cast(? as {kind})", [bytes(value)])  # noqa: S608

    blocks.database.write(change)


@pytest.mark.parametrize("mask", [0x01, 0x80])
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize(
    ("column", "why"),
    [
        ("fingerprint", "was made by another model"),
        ("ids", "holds other token ids"),
        ("positions", "holds other positions"),
        ("data", "fails its checksum"),
        ("checksum", "fails its checksum"),
    ],
)
def test_a_flipped_bit_is_refused_with_a_reason(blocks, column, why, at, mask):
    one = block("one")
    put(blocks, one)
    flip(blocks, column, at, mask)
    assert get(blocks, one) == (None, f"block {one.id.hex()[:12]} {why}")


def test_a_block_whose_id_was_damaged_is_not_found(blocks):
    put(blocks, block("one"))
    flip(blocks, "id", 0, 0x01)
    assert get(blocks, block("one")) == (None, "missing")


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
@pytest.mark.parametrize("sealed", [False, True])
def test_data_of_another_size_is_refused_even_with_its_checksum(blocks, change, sealed):
    one = block("one")
    put(blocks, one)
    data = change(one.data)
    checksum = xxhash.xxh3_128_digest(data if sealed else one.data)
    update = "update blocks set data = ?, checksum = ?"
    blocks.database.write(lambda tables: tables.conn.execute(update, [data, checksum]))
    assert get(blocks, one) == (None, f"block {one.id.hex()[:12]} has {len(data)} bytes instead of 100")
    assert len(blocks.verify()) == 1


def test_blocks_of_versions_that_stored_sha256_are_sound(blocks):
    one = block("one")
    put(blocks, one)
    update = "update blocks set checksum = ?"
    blocks.database.write(lambda tables: tables.conn.execute(update, [hashlib.sha256(one.data).digest()]))
    assert get(blocks, one) == (one.data, "")
    assert blocks.verify() == []
    flip(blocks, "data", 7, 0x10)
    assert get(blocks, one)[0] is None
    assert len(blocks.verify()) == 1


@pytest.mark.parametrize("field", ["fingerprint", "ids", "positions"])
def test_a_block_of_other_contents_under_the_same_id_is_refused(blocks, field):
    one = block("one")
    put(blocks, replace(one, **{field: "another" if field == "fingerprint" else b"others"}))
    data, why = get(blocks, one)
    assert data is None
    assert why.startswith(f"block {one.id.hex()[:12]} ")


@pytest.mark.parametrize("column", ["data", "checksum"])
def test_verify_names_the_damaged_blocks_only(blocks, column):
    one = block("one")
    put(blocks, one)
    flip(blocks, column, 7, 0x10)
    put(blocks, block("two"))
    (problem,) = blocks.verify()
    assert one.id.hex()[:12] in problem
    blocks.database.write(lambda tables: blocks.drop(tables, [one.id]))
    assert blocks.verify() == []
