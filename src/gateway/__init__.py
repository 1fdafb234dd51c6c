"""One OpenAI-compatible front door for model servers, as a Twisted daemon.

The map, from the outside in:

    cli         the command inference-gateway             command   what twistd loads
    service     options, the composition root, start and drain
    app         Klein routes; errors become OpenAI error bodies; one record per request
    guard       who sends a request, and where they may go
    inference   the life of one request, top to bottom
    hedge       a second backend for a stream that is late
    dispatch    waits for the backend that the scheduler gives a request
    windows     refuses what a model has no room for
    relay       a backend's reply on its way to the client
    backend     a model server behind HTTP          echo      no server at all
    pool        the state of every backend               probe     a look at one
    metrics     Prometheus and JSON                 logs      log lines
    keys_file   API keys, read again when they change    jwks      signing keys, fetched
    net         sockets: the server's channel, the client's agent
    core        pure: values in, values out; no clock, no socket, no Twisted

Imports run downwards only, and everything may import core.
"""

__version__ = "0.1.0"
