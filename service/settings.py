"""The worker's settings: flags over `LONGSTRIDE_WORKER_*` over the table `[worker]` of `longstride.toml`."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from longstride.errors import BadInput
from longstride.scheduler.settings import Layers, load

SCHEMES = {"mqtt": 1883, "mqtts": 8883}  # and their usual ports


class WorkerSettings(Layers):
    """Where messages come from, and the limits. What belongs to sessions and the model is in `Settings`."""

    model_config = SettingsConfigDict(
        env_prefix="LONGSTRIDE_WORKER_", toml_file="longstride.toml", extra="forbid", validate_default=True
    )

    TABLE = "worker"

    broker: str = Field("mqtt://localhost:1883", description="mqtt://HOST:PORT, or mqtts:// for TLS")
    name: str = Field(
        "worker", pattern=r"^[\w.-]{1,100}$", description="the worker's name; the broker keeps its messages under it"
    )
    topics: str = Field("longstride", pattern=r"^[^#+\s]{1,200}$", description="what all topics begin with")
    user: str | None = Field(None, description="the broker's user")
    password: SecretStr | None = Field(None, description="the user's password (not on the command line)")
    password_file: Path | None = Field(None, description="a file whose first line is the password")
    tls_ca: Path | None = Field(None, description="certificates to trust; the system's when not set")
    tls_cert: Path | None = Field(None, description="the worker's own certificate")
    tls_key: Path | None = Field(None, description="its key")
    keepalive_s: int = Field(30, ge=2, description="seconds between pings")
    away_s: int = Field(7 * 86400, ge=60, description="seconds that the broker keeps messages while the worker is away")
    sessions_at_once: int = Field(8, ge=1, description="sessions worked on side by side")
    sessions_open: int = Field(64, ge=1, description="sessions kept open; those unused for longest are closed")
    attempts: int = Field(5, ge=2, description="times a message is tried before it is dead")
    message_limit_bytes: int = Field(1 << 20, ge=1, description="bytes of a message at most")
    inbox_limit: int = Field(1000, ge=1, description="messages waiting at most; the broker holds the rest")
    inbox_limit_bytes: int = Field(64 << 20, ge=1, description="bytes waiting at most; the broker holds the rest")
    keep_days: float = Field(7.0, gt=0, description="days that a message's key is known after it was done")
    notes_every: int | None = Field(None, ge=16, description="a note after every so many tokens read")
    grace_s: float = Field(30.0, ge=0, description="seconds that answers have to finish when the worker is stopped")
    health_file: Path | None = Field(None, description="a file that is written every few seconds")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="port of the Prometheus metrics")
    metrics_host: str = Field("127.0.0.1", description="address of the Prometheus metrics")

    @property
    def address(self) -> tuple[str, int, bool]:
        """(host, port, whether TLS). Raises `BadInput`."""
        wrong = f"the broker must be mqtt://HOST:PORT or mqtts://HOST:PORT, not {self.broker.rpartition('@')[2]!r}"
        try:
            url = urlsplit(self.broker)
            port = url.port
        except ValueError as error:
            raise BadInput(wrong) from error
        if url.username or url.password:
            # command lines are readable by everybody on the machine
            raise BadInput(
                "the broker's address holds a user; set user, and password_file or LONGSTRIDE_WORKER_PASSWORD"
            )
        if url.scheme not in SCHEMES or not url.hostname or url.path.strip("/") or url.query or url.fragment:
            raise BadInput(wrong)
        return url.hostname, port or SCHEMES[url.scheme], url.scheme == "mqtts"

    def secret(self) -> str | None:
        """The password, from the file if one is named. Raises `BadInput`."""
        if self.password_file is None:
            return self.password.get_secret_value() if self.password is not None else None
        try:
            lines = self.password_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the password file {self.password_file} cannot be read: {error}") from error
        if not lines or not lines[0]:
            raise BadInput(f"the password file {self.password_file} is empty; its first line is the password")
        return lines[0]


def load_worker_settings(**given: Any) -> WorkerSettings:
    """Settings with `given` on top. Raises `BadInput` naming each setting that is wrong."""
    settings = load(WorkerSettings, **given)
    _, _, tls = settings.address
    if not tls and any((settings.tls_ca, settings.tls_cert, settings.tls_key)):
        raise BadInput("tls_ca, tls_cert and tls_key need mqtts://; over mqtt:// everything is sent in the clear")
    if settings.tls_key is not None and settings.tls_cert is None:
        raise BadInput("tls_key needs tls_cert, the certificate that it is the key of")
    if settings.user is None and (settings.password is not None or settings.password_file is not None):
        raise BadInput("a password needs a user")
    return settings
