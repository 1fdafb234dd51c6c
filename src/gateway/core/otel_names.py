"""Every name that leaves over OTLP, in one table: OpenTelemetry's HTTP and GenAI conventions, and ours under ``gateway.``.

The GenAI conventions move without releases (they left the core conventions at v1.42): a name that changes is changed here.
"""

from __future__ import annotations

from typing import Final

SCOPE: Final = "inference-gateway"

# --- HTTP spans

METHOD: Final = "http.request.method"
METHOD_AS_SENT: Final = "http.request.method_original"
ROUTE: Final = "http.route"
STATUS_CODE: Final = "http.response.status_code"
RESEND_COUNT: Final = "http.request.resend_count"
URL_PATH: Final = "url.path"
URL_SCHEME: Final = "url.scheme"
URL_FULL: Final = "url.full"
CLIENT_ADDRESS: Final = "client.address"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
ERROR_TYPE: Final = "error.type"

METHODS: Final = frozenset(["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"])
"""All else is ``_OTHER``."""
OTHER_METHOD: Final = "_OTHER"

# --- GenAI spans and metrics

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
TOKEN_TYPE: Final = "gen_ai.token.type"

TOKEN_USAGE: Final = "gen_ai.client.token.usage"
OPERATION_DURATION: Final = "gen_ai.client.operation.duration"
REQUEST_DURATION: Final = "gen_ai.server.request.duration"
FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
PER_TOKEN: Final = "gen_ai.server.time_per_output_token"

OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""What a route's request asks of a model."""

# --- ours

REQUEST_ID: Final = "gateway.request.id"
BACKEND: Final = "gateway.backend"
DECISION: Final = "gateway.decision"
ATTEMPTS: Final = "gateway.attempts"
ESTIMATED: Final = "gateway.usage.estimated"
HEDGE_LOST: Final = "gateway.hedge.lost"
QUEUED: Final = "gateway.queued"
QUEUE_SECONDS: Final = "gateway.queue.wait"
FIRST_TOKEN_EVENT: Final = "gateway.first_token"
