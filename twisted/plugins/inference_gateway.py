"""The twistd plugin: ``twistd inference-gateway``."""

from twisted.application.service import ServiceMaker

inference_gateway = ServiceMaker(
    "Inference Gateway",
    "gateway.command",
    "One OpenAI-compatible front door for model servers.",
    "inference-gateway",
)
