from __future__ import annotations

import pytest

from gateway.core.readers import SettingsError
from gateway.core.settings import Source, resolve


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tls_key": "k.pem"}, "--tls-key: is of no use without GATEWAY_TLS_CERT"),
        ({"tls_client_ca": "ca.pem"}, "--tls-client-ca: is of no use without GATEWAY_TLS_CERT"),
        ({"proxy_protocol": "on"}, "--proxy-protocol: name the proxies in GATEWAY_TRUSTED_PROXIES"),
        ({"proxy_protocol": "on", "trusted_proxies": "unix"}, "--proxy-protocol: name the proxies"),
        ({"port": "off"}, "--port off: give GATEWAY_UNIX_SOCKET"),
        ({"port": "81", "admin_port": "81"}, "--admin-port 81: is the --port too"),
        ({"trusted_proxies": "10.0.0.1/8"}, "is not a list of at most 256 networks such as"),
        ({"unix_socket": "x" * 108}, "is not the path of a socket, of at most 107 bytes"),
        ({"unix_socket": "\u00e9" * 54}, "is not the path of a socket, of at most 107 bytes"),
        ({"unix_socket_mode": "rw"}, "is not a mode in octal such as '0660'"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError) as problem:
        resolve([Source("command line", "option", given)])
    assert says in str(problem.value)


def test_what_goes_together_is_taken() -> None:
    given = {"port": "off", "unix_socket": "/run/g.sock", "unix_socket_mode": "0600", "admin_port": "0"}
    settings = resolve([Source("command line", "option", given | {"trusted_proxies": "10.0.0.0/8, UNIX,10.0.0.0/8"})])
    assert (settings.port, settings.unix_socket_mode, settings.admin_port) == (None, 0o600, 0)
    assert settings.trusted_proxies == ("10.0.0.0/8", "unix")
