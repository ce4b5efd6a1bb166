"""Settings: flags over the environment over longstride.toml over the defaults; one sentence for what is wrong."""

import os
from pathlib import Path

import pytest

from longstride.engine.context import Placement
from longstride.errors import BadInput
from longstride.scheduler.settings import SessionSettings, Settings, changed, load_settings
from longstride.service.settings import load_worker_settings


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder, and no settings from outside."""
    for name in [name for name in os.environ if name.startswith("LONGSTRIDE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_defaults_stand_alone():
    loaded = load_settings()
    assert (loaded.db, loaded.model, loaded.stride, loaded.seed) == (Path("longstride.db"), "smollm2", 16, None)
    assert loaded.for_sessions() == SessionSettings()


def test_each_source_goes_over_the_next(folder, monkeypatch):
    (folder / "longstride.toml").write_text(
        'db = "toml.db"\nmodel = "toml"\nstride = 3\nplacement = "end"\nsystem = "from toml"\n'
    )
    monkeypatch.setenv("LONGSTRIDE_DB", "environment.db")
    monkeypatch.setenv("LONGSTRIDE_MODEL", "environment")
    monkeypatch.setenv("LONGSTRIDE_STRIDE", "2")
    loaded = load_settings(db=Path("flag.db"), stride=1)
    assert (loaded.db, loaded.stride) == (Path("flag.db"), 1)
    assert loaded.model == "environment"
    assert (loaded.placement, loaded.system) == (Placement.END, "from toml")
    assert (loaded.passages, loaded.window) == (3, "sinks")
    monkeypatch.delenv("LONGSTRIDE_STRIDE")
    assert load_settings().stride == 3


@pytest.mark.parametrize(
    ("name", "spelled", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("context_tokens", "2048", 2048),
        ("seed", "7", 7),
        ("blocks_limit_bytes", "0", 0),
        ("dtype", "bf16", "bf16"),
    ],
)
def test_every_setting_can_come_from_the_environment(monkeypatch, name, spelled, value):
    monkeypatch.setenv(f"LONGSTRIDE_{name.upper()}", spelled)
    assert getattr(load_settings(), name) == value


WRONG = [
    ("stride", "0"),
    ("stride", "many"),
    ("placement", "middle"),
    ("policy", "often"),
    ("window", "slide"),
    ("passages", "65"),
    ("context_tokens", "63"),
    ("temperature", "-1"),
    ("top_p", "0"),
    ("repetition_penalty", "0"),
    ("dtype", "fp8"),
    ("budget_tokens", "15"),
    ("blocks_limit_bytes", "-1"),
    ("seed", "one\ntwo"),
]


@pytest.mark.parametrize("source", ["flag", "environment", "toml"])
@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(folder, monkeypatch, name, value, source):
    given = {}
    if source == "flag":
        given[name] = value
    elif source == "environment":
        monkeypatch.setenv(f"LONGSTRIDE_{name.upper()}", value)
    else:
        spelled = value.replace("\n", "\\n")
        (folder / "longstride.toml").write_text(f'{name} = "{spelled}"\n')
    with pytest.raises(BadInput) as refused:
        load_settings(**given)
    message = str(refused.value)
    assert message.startswith(f"{name}: ")
    where = {"flag": "", "environment": f" from LONGSTRIDE_{name.upper()}", "toml": " from longstride.toml"}[source]
    assert message.endswith(f" (got {value!r}{where})")
    assert len(message.splitlines()) == 1


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(BadInput, match=r"^stride: .*\(got 0\); passages: .*\(got 100\)$"):
        load_settings(stride=0, passages=100)


@pytest.mark.parametrize("source", ["flag", "toml"])
def test_an_unknown_setting_is_refused(folder, source):
    given = {"strides": 3} if source == "flag" else {}
    (folder / "longstride.toml").write_text("strides = 3\n" if source == "toml" else "")
    with pytest.raises(BadInput, match=r"^strides: "):
        load_settings(**given)


def test_a_variable_that_is_nearly_called_like_a_setting_is_refused(monkeypatch):
    monkeypatch.setenv("LONGSTRIDE_FOLDER", "somebody else's")
    monkeypatch.setenv("LONGSTRIDE_CACHE", "cache")
    monkeypatch.setenv("LONGSTRIDE_WORKER_NAME", "w")
    assert load_worker_settings().name == "w"
    assert load_settings() == Settings()
    monkeypatch.setenv("LONGSTRIDE_CONTEXT_TOKEN", "100")
    with pytest.raises(BadInput, match=r"^LONGSTRIDE_CONTEXT_TOKEN: .*; LONGSTRIDE_CONTEXT_TOKENS is one$"):
        load_settings()
    monkeypatch.setenv("LONGSTRIDE_WORKER_ATTEMPT", "3")
    with pytest.raises(BadInput, match=r"; LONGSTRIDE_WORKER_ATTEMPTS is one$"):
        load_worker_settings()


@pytest.mark.parametrize("line", ["password = 271828", 'passwort = "271828"'])
def test_a_secret_that_is_wrong_is_not_shown(folder, line):
    (folder / "longstride.toml").write_text(f"[worker]\n{line}\n")
    with pytest.raises(BadInput, match=r"^passwor") as refused:
        load_worker_settings()
    assert "271828" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tls_ca": "ca.pem"}, "need mqtts://"),
        ({"broker": "mqtts://x", "tls_key": "key.pem"}, "needs tls_cert"),
        ({"password": "x"}, "needs a user"),
        ({"password_file": "x"}, "needs a user"),
    ],
)
def test_a_setting_of_the_worker_that_would_do_nothing_is_refused(given, words):
    with pytest.raises(BadInput, match=words):
        load_worker_settings(**given)


@pytest.mark.parametrize("content", [b"stride = \n", b"stride = 3 4", b"system = \xff\xfe"])
def test_a_damaged_file_is_refused_in_one_line(folder, content):
    (folder / "longstride.toml").write_bytes(content)
    with pytest.raises(BadInput, match=r"^longstride\.toml could not be read: ") as refused:
        load_settings()
    assert len(str(refused.value).splitlines()) == 1


def test_sessions_take_over_their_part():
    loaded = load_settings(stride=5, placement="turn", seed=3, db="other.db")
    part = loaded.for_sessions()
    assert type(part) is SessionSettings
    assert (part.stride, part.placement, part.seed) == (5, Placement.TURN, 3)
    assert set(SessionSettings.model_fields) < set(Settings.model_fields)


def test_the_sampling_part():
    sampling = SessionSettings(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=4
    ).sampling()
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.7, 5, 0.9, 0.1)
    assert (sampling.repetition_penalty, sampling.seed) == (1.2, 4)


def test_changed_settings_are_checked_and_the_old_ones_stay():
    before = SessionSettings(stride=5, system="Be brief.")
    after = changed(before, {"stride": 7, "placement": "end"})
    assert (after.stride, after.placement, after.system) == (7, Placement.END, "Be brief.")
    assert (before.stride, before.placement) == (5, Placement.BESIDE)
    assert changed(before, {}) == before
    with pytest.raises(BadInput, match=r"^stride: .*\(got 0\)$"):
        changed(before, {"stride": 0})
    with pytest.raises(BadInput, match=r"^nonsense: "):
        changed(before, {"nonsense": 1})


def test_settings_survive_the_database():
    before = load_settings(stride=5, placement="end", seed=1, context_tokens=100).for_sessions()
    assert SessionSettings(**before.model_dump(mode="json")) == before
