"""Every setting, in one table: the fields of `Settings`.

The table makes the command line's options and their help, `.env.example` and
docs/configuration.md; `resolve` puts the sources together. Reading files is the shell's work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from . import auth_settings, backend_settings, edge_settings, forwarded, model_settings, prices, readers
from .backend_settings import KINDS, BackendSettings, Table
from .model_settings import Models, ModelSettings
from .prices import Prices
from .readers import (
    Reader,
    RedisServer,
    SettingsError,
    backend_urls,
    choice,
    dns_server,
    host,
    key,
    ledger_place,
    number,
    redis_url,
    seconds,
    shown,
    size,
    switch,
    text,
    whole_number,
)

# --- the table ---------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One row of the table."""

    name: str
    env: str
    read: Reader
    default: str
    help: str
    secret: bool
    in_file: bool

    @property
    def option(self) -> str:
        return self.name.replace("_", "-")


def _row(default: str, env: str, read: Reader, help: str, *, secret: bool = False, in_file: bool = True) -> Any:
    metadata = {"env": env, "read": read, "default": default, "help": help, "secret": secret, "in_file": in_file}
    return dataclasses.field(default=read(default) if default else None, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the gateway is told. Durations are seconds, sizes bytes."""

    config: str | None = _row("", "GATEWAY_CONFIG", text, "TOML file with settings, named as in this table", in_file=False)
    port: int | None = _row(
        "8080", "PORT", edge_settings.port, "TCP port to listen on; 0 takes a free one, off leaves the UNIX socket alone"
    )
    host: str = _row("127.0.0.1", "GATEWAY_HOST", host, "address to listen on; 0.0.0.0 or :: for all")
    unix_socket: str | None = _row(
        "", "GATEWAY_UNIX_SOCKET", edge_settings.unix_path, "path of a UNIX socket to listen on beside the port"
    )
    unix_socket_mode: int = _row("0660", "GATEWAY_UNIX_SOCKET_MODE", edge_settings.mode, "who may connect to it, in octal")
    admin_port: int | None = _row(
        "",
        "GATEWAY_ADMIN_PORT",
        edge_settings.port,
        "TCP port that alone answers /admin, /dashboard and /metrics, and /healthz and /readyz too; 0 takes a free one",
    )
    admin_host: str = _row("127.0.0.1", "GATEWAY_ADMIN_HOST", readers.host, "address that the admin port is on")
    workers: int = _row(
        "1",
        "GATEWAY_WORKERS",
        whole_number(1, 256),
        "processes that share the port; what each has for itself: docs/operations.md",
    )
    worker_timeout: float = _row(
        "30s",
        "GATEWAY_WORKER_TIMEOUT",
        seconds(5, or_never=True),
        "a worker that hangs for so long is ended and started again; 0 lets it hang",
    )
    tls_cert: str | None = _row(
        "",
        "GATEWAY_TLS_CERT",
        text,
        "PEM file with the certificate that clients are shown, and those above it; with one, the TCP ports take TLS alone",
    )
    tls_key: str | None = _row("", "GATEWAY_TLS_KEY", text, "PEM file with its private key, unless that is in the same file")
    tls_client_ca: str | None = _row(
        "", "GATEWAY_TLS_CLIENT_CA", text, "PEM file with authorities: every client must show a certificate of one of them"
    )
    trusted_proxies: tuple[str, ...] | None = _row(
        "",
        "GATEWAY_TRUSTED_PROXIES",
        forwarded.networks,
        "addresses and networks of proxies that are believed who the client is, with commas between them; unix is who comes by "
        "the UNIX socket",
    )
    proxy_protocol: bool = _row(
        "false",
        "GATEWAY_PROXY_PROTOCOL",
        switch,
        "each connection to the port begins with a PROXY header (version 1 or 2), and is one of the trusted proxies'",
    )
    backend_url: tuple[str, ...] | None = _row(
        "",
        "BACKEND_URL",
        backend_urls,
        "base URL of the model server, or several with commas between, or where to find some (docs/discovery.md); without one, "
        "requests are echoed",
    )
    backend_kind: Literal["auto", "llamacpp", "vllm", "sglang", "ollama", "tgi", "openai"] = _row(
        "auto",
        "GATEWAY_BACKEND_KIND",
        choice(*KINDS),
        "what the backend is: " + ", ".join(KINDS[1:]) + " (any other OpenAI-compatible server); auto asks it",
    )
    dns_server: tuple[str, int] | None = _row(
        "",
        "GATEWAY_DNS_SERVER",
        dns_server,
        "name server that dns+http and srv+http URLs of backends are looked up at; by default those of /etc/resolv.conf",
    )
    backend_api_key: str | None = _row(
        "", "GATEWAY_BACKEND_API_KEY", key, "key sent to each backend as a Bearer token", secret=True
    )
    forward_authorization: bool = _row(
        "false", "GATEWAY_FORWARD_AUTHORIZATION", switch, "pass the client's Authorization and X-Api-Key on to the backends"
    )
    stream_usage: bool = _row(
        "true",
        "GATEWAY_STREAM_USAGE",
        switch,
        "ask the backend for the token counts of every stream; a client that did not ask does not see them",
    )
    max_body: int = _row("32MiB", "GATEWAY_MAX_BODY", size(1024, 2**32), "largest request body")
    max_answer: int = _row("64MiB", "GATEWAY_MAX_ANSWER", size(1024, 2**32), "largest answer of a backend that is not a stream")
    max_connections: int = _row(
        "16384", "GATEWAY_MAX_CONNECTIONS", whole_number(1, 1048576), "most client connections at a time"
    )
    connect_timeout: float = _row(
        "5s", "GATEWAY_CONNECT_TIMEOUT", seconds(0.01), "longest wait for a connection to the backend"
    )
    first_byte_timeout: float = _row(
        "60s", "GATEWAY_FIRST_BYTE_TIMEOUT", seconds(0.01), "longest wait for the first byte of the backend's answer"
    )
    idle_timeout: float = _row(
        "60s",
        "GATEWAY_IDLE_TIMEOUT",
        seconds(0.01),
        "longest silence within an answer, of the backend or of a client that does not read",
    )
    total_timeout: float = _row("0s", "GATEWAY_TOTAL_TIMEOUT", seconds(0), "longest time for a whole answer; 0 is no limit")
    client_timeout: float = _row(
        "60s",
        "GATEWAY_CLIENT_TIMEOUT",
        seconds(0.01),
        "longest silence of a client that sends a request, or between its requests",
    )
    policy: Literal["expected-completion", "round-robin", "least-load", "session", "prefix", "device"] = _row(
        "expected-completion",
        "GATEWAY_POLICY",
        choice("expected-completion", "round-robin", "least-load", "session", "prefix", "device"),
        "which backend a request goes to: where it is expected to be done first, each in turn, the one with the least work, "
        "that of its session, the one that has its prompt's beginning cached, or the cheapest device with room",
    )
    shared_backends: bool = _row(
        "false",
        "GATEWAY_SHARED_BACKENDS",
        switch,
        "other gateways send to the same backends, and choose the same one for a prompt that none of them knows; with workers "
        "or Redis it is so, else seen in what backends report",
    )
    queue_requests: int = _row(
        "4096", "GATEWAY_QUEUE_REQUESTS", whole_number(0, 1048576), "most requests that wait for a backend at a time"
    )
    queue_bytes: int = _row("256MiB", "GATEWAY_QUEUE_BYTES", size(0), "most memory that the waiting requests may take")
    queue_timeout: float = _row(
        "30s", "GATEWAY_QUEUE_TIMEOUT", seconds(0), "longest wait of a request for a backend; 0 lets none wait"
    )
    admin: Literal["auto", "on", "off"] = _row(
        "auto",
        "GATEWAY_ADMIN",
        choice("auto", "on", "off"),
        "/dashboard and the routes under /admin; auto: where a key with admin is asked for, or the host is loopback",
    )
    queue_comments: float = _row(
        "0s",
        "GATEWAY_QUEUE_COMMENTS",
        seconds(0),
        "time between comments such as ': queued 3, eta 4s' in a stream that waits; 0 sends none",
    )
    priority_aging: float = _row(
        "30s",
        "GATEWAY_PRIORITY_AGING",
        seconds(0.1),
        "time after which a waiting request counts as one of the next higher priority",
    )
    max_attempts: int = _row(
        "3", "GATEWAY_MAX_ATTEMPTS", whole_number(1, 16), "backends that a request is given to, at most, until one answers"
    )
    retry_budget: float = _row(
        "0.1", "GATEWAY_RETRY_BUDGET", number(0, 1), "retries allowed, as a share of all requests; 0 allows none"
    )
    hedge: bool = _row(
        "false", "GATEWAY_HEDGE", switch, "give a request that waits unusually long for its first token to a second backend too"
    )
    panic: bool = _row(
        "true", "GATEWAY_PANIC", switch, "when every backend of a model is out of order, try them all rather than refuse"
    )
    probe_interval: float = _row("2s", "GATEWAY_PROBE_INTERVAL", seconds(0.05), "time between two looks at a backend's health")
    probe_up: int = _row(
        "1", "GATEWAY_PROBE_UP", whole_number(1, 100), "good looks in a row after which a backend counts as healthy again"
    )
    probe_down: int = _row(
        "2", "GATEWAY_PROBE_DOWN", whole_number(1, 100), "bad looks in a row after which a healthy backend counts as unhealthy"
    )
    breaker_failures: int = _row(
        "5", "GATEWAY_BREAKER_FAILURES", whole_number(1, 1000), "failed requests in a row after which a backend gets no more"
    )
    breaker_open: float = _row(
        "10s",
        "GATEWAY_BREAKER_OPEN",
        seconds(0.05, 120),
        "time until a single request then tries it again; each failed try doubles it, up to 2m",
    )
    slow_first_byte: float = _row(
        "0s",
        "GATEWAY_SLOW_FIRST_BYTE",
        seconds(0),
        "a first byte that takes longer counts as a failed request in that row; 0 is off",
    )
    adaptive_concurrency: bool = _row(
        "false",
        "GATEWAY_ADAPTIVE_CONCURRENCY",
        switch,
        "find out by the time to the first token how many requests a backend takes that does not tell (Ollama, say)",
    )
    keys: str | None = _row(
        "", "GATEWAY_KEYS", text, "file with the API keys that are let in; `inference-gateway keys add` makes it"
    )
    jwt_key: str | None = _row(
        "",
        "GATEWAY_JWT_KEY",
        auth_settings.secret,
        "let in who has a JWT that is signed with this secret (HS256); the three JWT settings of this kind exclude each other",
        secret=True,
    )
    jwt_key_file: str | None = _row(
        "", "GATEWAY_JWT_KEY_FILE", text, "or with the public key in this file: PEM, or a JWK set (RS256, ES256, EdDSA)"
    )
    jwt_jwks_url: str | None = _row(
        "", "GATEWAY_JWT_JWKS_URL", auth_settings.jwks_url, "or with one of the public keys in the JWK set under this URL"
    )
    jwt_issuer: str | None = _row("", "GATEWAY_JWT_ISSUER", text, "what a JWT's iss must be")
    jwt_audience: str | None = _row(
        "", "GATEWAY_JWT_AUDIENCE", text, "what a JWT's aud must be, or hold; without it a JWT that has an aud is refused"
    )
    jwt_leeway: float = _row(
        "30s", "GATEWAY_JWT_LEEWAY", seconds(0, 600), "by how much clocks may differ at a JWT's exp and nbf"
    )
    jwt_algorithms: tuple[str, ...] = _row(
        "RS256,ES256,EdDSA,HS256",
        "GATEWAY_JWT_ALGORITHMS",
        auth_settings.algorithms,
        "algorithms that a JWT may be signed with",
    )
    jwt_claims: tuple[tuple[str, str], ...] = _row(
        "tenant=tenant,models=models",
        "GATEWAY_JWT_CLAIMS",
        auth_settings.claims,
        "which claim of a JWT tells what: "
        + ", ".join(auth_settings.PARTS)
        + "; one not named goes by its own name, but for admin",
    )
    metrics_open: bool = _row(
        "false",
        "GATEWAY_METRICS_OPEN",
        switch,
        "where keys are asked for, let everybody see /metrics, not only keys with admin",
    )
    insecure_open: bool = _row(
        "false",
        "GATEWAY_INSECURE_OPEN",
        switch,
        "listen on an address other than loopback although nobody is asked for a key",
    )
    validation: Literal["lenient", "strict"] = _row(
        "lenient",
        "GATEWAY_VALIDATION",
        choice("lenient", "strict"),
        "fields of a request that OpenAI's API does not have: passed on to the backend, or refused",
    )
    count_tokens: bool = _row(
        "false",
        "GATEWAY_COUNT_TOKENS",
        switch,
        "refuse what a model's window has no room for before it waits for a backend; where the bytes alone leave a doubt, a "
        "backend (llama.cpp, vLLM) counts the tokens",
    )
    limit_requests: int | None = _row(
        "",
        "GATEWAY_LIMIT_REQUESTS",
        whole_number(1, 10**9),
        "requests per minute of each key that has no limits of its own; without keys, of each client address",
    )
    limit_tokens: int | None = _row(
        "", "GATEWAY_LIMIT_TOKENS", whole_number(1, 10**10), "tokens per minute, prompt and answer, of the same"
    )
    limit_concurrency: int | None = _row(
        "", "GATEWAY_LIMIT_CONCURRENCY", whole_number(1, 10**6), "requests at the same time, of the same"
    )
    redis_url: RedisServer | None = _row(  # noqa: RUF009 - frozen, as the rest
        "",
        "GATEWAY_REDIS_URL",
        redis_url,
        "Redis or Valkey that counts the limits of several gateways together: redis://:password@host:6379/0, rediss:// for TLS",
        secret=True,
    )
    redis_timeout: float = _row(
        "250ms", "GATEWAY_REDIS_TIMEOUT", seconds(0.01, 10), "longest wait of a request for Redis, which then counts as away"
    )
    limits_fail: Literal["open", "closed"] = _row(
        "open",
        "GATEWAY_LIMITS_FAIL",
        choice("open", "closed"),
        "while Redis is away: open, each gateway counts by itself; closed, requests that have limits are refused",
    )
    grace: float = _row("30s", "GATEWAY_GRACE", seconds(0), "time that requests in flight get to finish when the gateway stops")
    drain_settle: float = _row(
        "0s",
        "GATEWAY_DRAIN_SETTLE",
        seconds(0, 3600),
        "time before that in which /readyz says 503 and all else goes on, so that balancers notice",
    )
    otel: Literal["auto", "on", "off"] = _row(
        "auto",
        "GATEWAY_OTEL",
        choice("auto", "on", "off"),
        "spans and metrics to an OpenTelemetry collector (extra [otel]), as its own OTEL_* variables of the environment say; "
        "auto: if OTEL_EXPORTER_OTLP_ENDPOINT is set",
    )
    log_format: Literal["text", "json"] = _row(
        "text", "GATEWAY_LOG_FORMAT", choice("text", "json"), "log lines for people, or JSON"
    )
    log_file_size: int = _row("100MiB", "GATEWAY_LOG_FILE_SIZE", size(65536), "size at which the file of --logfile is rotated")
    log_files: int = _row("10", "GATEWAY_LOG_FILES", whole_number(1, 1000), "how many rotated log files are kept")
    ledger: str | None = _row(
        "",
        "GATEWAY_LEDGER",
        ledger_place,
        "where a row of each request is kept: the path of an SQLite file, postgresql://user:password@host/database, or off",
        secret=True,
    )
    ledger_flush: float = _row(
        "1s", "GATEWAY_LEDGER_FLUSH", seconds(0, 3600), "longest time that a row is in memory alone; 0 writes each at once"
    )
    ledger_keep: int = _row("0", "GATEWAY_LEDGER_KEEP", whole_number(0, 36500), "days after which rows are deleted; 0 is never")
    ledger_journal: int = _row(
        "256MiB", "GATEWAY_LEDGER_JOURNAL", size(65536), "most bytes of rows that wait on the disk for a database that is away"
    )
    ledger_journal_file: str | None = _row(
        "", "GATEWAY_LEDGER_JOURNAL_FILE", text, "where those are; by default beside the SQLite file, or ./usage.journal"
    )
    prices: Prices = dataclasses.field(default_factory=dict)
    """The file's tables ``[prices."model"]``."""
    backends: tuple[BackendSettings, ...] = ()
    """What `resolve` makes of the URLs or of the file's tables; empty: requests are echoed."""
    models: Models = dataclasses.field(default_factory=dict)
    """The tables ``[models.NAME]`` of the file, by name."""


TABLE: Final[tuple[Setting, ...]] = tuple(
    Setting(
        field.name,
        field.metadata["env"],
        field.metadata["read"],
        field.metadata["default"],
        field.metadata["help"],
        field.metadata["secret"],
        field.metadata["in_file"],
    )
    for field in dataclasses.fields(Settings)
    if field.metadata
)
_BY_NAME: Final = {row.name: row for row in TABLE}
_BY_ENV: Final = {row.env: row for row in TABLE}


# --- sources -----------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where values came from. ``style`` is how it names a setting; see the functions below."""

    where: str
    style: Literal["file", "dotenv", "env", "option"]
    values: Mapping[str, Any]


def resolve(sources: Sequence[Source], *, partial: bool = False) -> Settings:
    """The settings from these sources, of which a later one wins. Raises `SettingsError`. ``partial``: there will be more
    sources, so that what does not go together yet is no problem.

    Names that nobody knows are an error in a file; in the environment they are somebody else's. (Kubernetes
    sets GATEWAY_PORT and the like beside a service called gateway.)
    """
    found: dict[str, Any] = {}
    backends: list[Table] = []
    models: dict[str, ModelSettings] = {}
    where = ""
    for source in sources:
        for name, value in source.values.items():
            if source.style == "file" and name == "prices":
                found["prices"] = prices.read_prices(source.where, value)
                continue
            if source.style == "file" and name == "backends":
                backends = _tables(source)
                found.pop("backend_url", None)
                continue
            if source.style == "file" and name == "models":
                models, where = model_settings.read_tables(source.where, value), source.where
                continue
            row = _row_of(source, name)
            if row is not None and value is not None and value != "":
                found[row.name] = _read(source, name, row, value)
                if row.name == "backend_url":
                    backends = _listed(source, name, found[row.name])
    settings = Settings(**found)
    problem = auth_settings.problem(settings) or edge_settings.problem(settings)
    if problem is not None and not partial:
        raise SettingsError(problem)
    made = backend_settings.made(backends, _of_each(settings), _variables(sources))
    model_settings.check_known(where, models, _served(made))
    return dataclasses.replace(settings, backends=made, models=models)


def _served(backends: Sequence[BackendSettings]) -> frozenset[str] | None:
    """The models that all backends together have been given, if each has."""
    if not backends or not all(one.models for one in backends):
        return None
    return frozenset(name for one in backends for name in one.models)


def _tables(source: Source) -> list[Table]:
    if source.values.get("backend_url"):
        raise SettingsError(f"{source.where}: backend_url and [[backends]] both name backends; take one of them away")
    return backend_settings.read_tables(source.where, source.values["backends"])


def _listed(source: Source, name: str, urls: Sequence[str]) -> list[Table]:
    return [Table(_label(source, name), {"url": url}) for url in urls]


def _of_each(settings: Settings) -> dict[str, Any]:
    """What holds for each backend that does not say otherwise."""
    timeouts = {name: getattr(settings, name) for name in backend_settings.TIMEOUTS}
    return {
        "kind": settings.backend_kind,
        "api_key": settings.backend_api_key,
        "stream_usage": settings.stream_usage,
        **timeouts,
    }


def _variables(sources: Sequence[Source]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        if source.style in ("env", "dotenv"):
            found |= {name: value for name, value in source.values.items() if value}
    return found


def _row_of(source: Source, name: str) -> Setting | None:
    if source.style == "option":
        return _BY_NAME[name]
    if source.style in ("env", "dotenv"):
        if source.style == "dotenv" and name.startswith("GATEWAY_") and name not in _BY_ENV:
            raise SettingsError(f"{source.where}: unknown setting '{name}'; .env.example lists those there are")
        return _BY_ENV.get(name)
    row = _BY_NAME.get(name)
    if row is None or not row.in_file:
        known = ", ".join([*(row.name for row in TABLE if row.in_file), "[[backends]]", "[models.NAME]", "[prices]"])
        raise SettingsError(f"{source.where}: unknown setting '{name}'; known are {known}")
    return row


def _read(source: Source, name: str, row: Setting, value: Any) -> Any:
    try:
        return row.read(value)
    except ValueError as error:
        what = "the value" if row.secret else shown(value)
        raise SettingsError(f"{_label(source, name)}: {what} is not {error}") from None


def _label(source: Source, name: str) -> str:
    return f"--{_BY_NAME[name].option}" if source.style == "option" else f"{source.where}: {name}"


# --- what the table makes ------------------------------------------------------------------------


def option_rows() -> list[tuple[str, str]]:
    """(option without dashes, help) of each setting that may stand on a command line; a secret may not."""
    return [(row.option, f"{row.help} [{_hint(row)}]") for row in TABLE if not row.secret]


def switches() -> list[str]:
    """The options that are true or false."""
    return [row.option for row in TABLE if row.read is switch]


def _hint(row: Setting) -> str:
    return f"{row.env}, default {row.default}" if row.default else row.env


def env_example() -> str:
    """The text of `.env.example`."""
    return "".join(_env_lines())


def _env_lines() -> Iterator[str]:
    yield "# Settings of the inference gateway; copy to .env and take the # off what you change.\n"
    yield "# The order, of which the last wins: default, TOML file (--config), .env, environment, command line.\n"
    for row in TABLE:
        yield f"\n# {row.help[:1].upper()}{row.help[1:]}.\n# {row.env}={row.default}\n"


def markdown() -> str:
    """The text of docs/configuration.md."""
    return "".join(_markdown_lines())


def _markdown_lines() -> Iterator[str]:
    yield "# Configuration\n\n"
    yield "Made from the table in `src/gateway/core/settings.py` by `make docs`.\n\n"
    yield "Sources, of which the last wins: default, TOML file (`--config`), `.env` in the working directory,\n"
    yield "environment, command line. An empty value counts as not set. A bad value, or a key in the TOML file\n"
    yield "that nobody knows, ends the start with one line that names it and exit status 1.\n\n"
    yield "Durations are seconds or carry a unit (`500ms`, `30s`, `2m`, `1h`); sizes are bytes or carry one\n"
    yield "(`512KiB`, `32MiB`, `1GiB`). Secrets have no option: other users of the machine see a command line.\n\n"
    yield "| environment | TOML | option | default | meaning |\n|---|---|---|---|---|\n"
    for row in TABLE:
        name = f"`{row.name}`" if row.in_file else ""
        option = "" if row.secret else f"`--{row.option}`"
        default = f"`{row.default}`" if row.default else ""
        yield f"| `{row.env}` | {name} | {option} | {default} | {row.help} |\n"
    yield from backend_settings.markdown_lines()
    yield from model_settings.markdown_lines()
    yield from prices.markdown_lines()
