"""Settings: flags over `LONGSTRIDE_*` over `longstride.toml` over the defaults here."""

import json
import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from longstride.engine.context import Placement
from longstride.errors import BadInput
from longstride.storage.documents import DEFAULT, is_collection

if TYPE_CHECKING:
    from longstride.engine.sampling import Sampling

TABLES = ("worker",)  # of longstride.toml
NO_FOLDER = ("auto", "none")  # of `adapter`
SYSTEM = "You answer questions about the text you are given. Be brief and keep to the text."


def _list(value: Any) -> Any:
    """The environment knows strings only; a list is JSON there."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise PydanticCustomError("json", 'write a list as JSON, for example ["default"]') from error


def _collection(name: str) -> str:
    if not is_collection(name):
        raise PydanticCustomError("collection", "a collection needs a name of 1 to 100 printable characters")
    return name


def _adapter(name: str) -> str:
    """A folder is stored whole, so that a session finds it from wherever it is opened."""
    return name if name in NO_FOLDER else str(Path(name).expanduser().absolute())


# NoDecode: pydantic-settings would parse the JSON itself, and its error does not say what is wrong
Collections = Annotated[list[Annotated[str, AfterValidator(_collection)]], NoDecode, BeforeValidator(_list)]


class SessionSettings(BaseModel):
    """What belongs to one session and is stored with it."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    placement: Placement = Field(Placement.BESIDE, description="where passages stand: beside, end or turn")
    adapter: Annotated[str, AfterValidator(_adapter)] = Field(
        "auto",
        min_length=1,
        description="a folder with a LoRA adapter; none; auto takes the one that comes along, if any",
    )
    policy: Literal["tokens", "sentence", "confidence", "drift", "never"] = Field(
        "tokens", description="when to retrieve"
    )
    stride: int = Field(16, ge=1, description="retrieve every so many generated tokens")
    query_tokens: int = Field(32, ge=1, description="last tokens of text that form the query")
    passage_tokens: int = Field(128, ge=1, description="tokens of a passage at most")
    passages: int = Field(3, ge=1, le=64, description="passages in a segment at most")
    passage_weight: float = Field(
        0.5, gt=0, le=1, description="weight of each further passage against the one before it (beside); 1 is equal"
    )
    collections: Collections = Field([DEFAULT], description="collections of documents that retrieval draws on")
    refresh: int | None = Field(
        None, ge=0, description="text tokens fed again after a segment; 16 beside and 64 at the end when not set"
    )
    window: Literal["refuse", "sinks", "separators", "cascade", "anchors", "anchors-added", "rollup"] = Field(
        "sinks", description="what stays of the text in the cache, and what happens when the context is full"
    )
    recent_tokens: int = Field(
        512, ge=0, le=1 << 30, description="last tokens that stay whole (separators, cascade, both kinds of anchors)"
    )
    span_tokens: int = Field(64, ge=2, le=1 << 30, description="tokens that an anchor stands for at most (both kinds)")
    context_tokens: int | None = Field(None, ge=64, description="context length; the model's own when not set")
    system: str = Field(SYSTEM, description="the system message")
    max_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="sample among so many best tokens; 0 is all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the best tokens of this probability together")
    min_p: float = Field(0.0, ge=0, le=1, description="leave out tokens below this share of the best one's probability")
    repetition_penalty: float = Field(1.0, gt=0, description="divides the scores of tokens of the turn; 1 is none")
    seed: int | None = Field(None, description="makes sampling repeatable")
    drafting: Literal["off", "lookup", "tree"] = Field(
        "tree",
        description="drafts from text seen and the model's n-grams: off, one branch (lookup) or several (tree)",
    )

    def sampling(self) -> "Sampling":
        """How tokens are chosen."""
        from longstride.engine.sampling import Sampling  # brings torch, which settings alone do not need

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed)


class TomlPart(TomlConfigSettingsSource):
    """What `longstride.toml` says: all that stands outside of `TABLES`, or one of them, for the room of that name."""

    def __init__(self, settings_cls: type[BaseSettings], table: str | None = None) -> None:
        self.table = table
        super().__init__(settings_cls)

    def _read_files(self, *args: Any, **named: Any) -> dict[str, Any]:
        data = super()._read_files(*args, **named)
        if self.table is not None:
            return dict(data.get(self.table, {}))
        return {name: value for name, value in data.items() if name not in TABLES}


class Layers(BaseSettings):
    """Flags over the environment over `longstride.toml`: all that stands outside of tables there, or one `TABLE`."""

    TABLE: ClassVar[str | None] = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base class's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlPart(settings_cls, cls.TABLE)


class Settings(SessionSettings, Layers):
    """All settings; those of `SessionSettings` are the defaults of new sessions."""

    model_config = SettingsConfigDict(
        env_prefix="LONGSTRIDE_",
        toml_file="longstride.toml",
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
    )

    db: Path = Field(Path("longstride.db"), description="the database file")
    model: str = Field("smollm2", description="smollm2, a folder, a GGUF file or a hub id")
    device: str = Field("auto", description="auto, cpu or cuda")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto, fp32, bf16 or fp16")
    budget_tokens: int = Field(512, ge=16, description="new tokens a forward at most")
    block_tokens: int = Field(64, ge=1, description="tokens a stored KV block")
    blocks_limit_bytes: int = Field(8 << 30, ge=0, description="bytes of stored KV at most")
    cache_limit_bytes: int = Field(
        4 << 30, ge=0, description="bytes of open sessions' KV in memory; idle ones make room"
    )
    pieces_limit_bytes: int = Field(512 << 20, ge=0, description="bytes of passage KV kept in memory at most")

    def for_sessions(self) -> SessionSettings:
        """The part that a new session takes over."""
        return SessionSettings(**{name: getattr(self, name) for name in SessionSettings.model_fields})


S = TypeVar("S", bound=BaseSettings)


def load_settings(**given: Any) -> Settings:
    """Settings with `given` on top. Raises `BadInput` naming each setting that is wrong, in one sentence."""
    return load(Settings, **given)


def load(settings_cls: type[S], **given: Any) -> S:
    """The same for any class of settings. A variable that is nearly called like a setting is refused, too."""
    prefix = settings_cls.model_config.get("env_prefix", "")
    variables = [name.upper() for name in os.environ if name.upper().startswith(prefix)]
    settings = [f"{prefix}{name}".upper() for name in settings_cls.model_fields]
    for variable in sorted(set(variables) - set(settings)):
        near = get_close_matches(
            variable.removeprefix(prefix), [name.removeprefix(prefix) for name in settings], 1, 0.8
        )
        if near:
            raise BadInput(f"{variable}: there is no such setting; {prefix}{near[0]} is one")

    def origin(name: str) -> str:
        if name in given:
            return ""
        variable = f"{prefix}{name}".upper()
        return f"from {variable if variable in variables else 'longstride.toml'}"

    try:
        return settings_cls(**given)
    except ValidationError as error:
        raise BadInput(_sentence(error, origin)) from error
    except (OSError, ValueError) as error:
        raise BadInput(f"longstride.toml could not be read: {error}") from error


def changed(settings: SessionSettings, changes: dict[str, Any]) -> SessionSettings:
    """`settings` with `changes`, checked. Raises `BadInput`."""
    try:
        return SessionSettings(**{**settings.model_dump(), **changes})
    except ValidationError as error:
        raise BadInput(_sentence(error)) from error


def changed_for_answer(settings: SessionSettings, changes: dict[str, Any]) -> SessionSettings:
    """`changed`, refusing what would change the session itself."""
    own = {
        "placement", "adapter", "passage_tokens", "passages", "passage_weight", "collections", "refresh", "window",
        "recent_tokens", "span_tokens", "context_tokens", "system",
    }  # fmt: skip
    fixed = own & set(changes)
    if fixed:
        raise BadInput(f"{', '.join(sorted(fixed))} belongs to the session and cannot change for one answer")
    return changed(settings, changes)


def _sentence(error: ValidationError, origin: Callable[[str], str] = lambda _name: "") -> str:
    """What is wrong with which settings; `origin` says where one stands, as in "from longstride.toml"."""
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"]) or "settings"
        unknown = item["type"] == "extra_forbidden"
        what = "there is no such setting" if unknown else item["msg"][0].lower() + item["msg"][1:]
        # a secret must not be shown, nor what was meant for one and misspelt
        got = "" if unknown or "password" in name else f"got {item['input']!r}"
        details = " ".join(filter(None, (got, origin(str(item["loc"][0])) if item["loc"] else "")))
        parts.append(f"{name}: {what}" + (f" ({details})" if details else ""))
    return "; ".join(parts)
