from __future__ import annotations

import json
import warnings
from functools import cache
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import auth
from gateway.core.auth import Auth, UnknownSigner
from gateway.core.auth_settings import ALGORITHMS
from gateway.core.errors import GatewayError
from gateway.core.jwt_tokens import Rules, Verifier, read_signers, secret_signer
from gateway.core.principal import Budget, Limits, Principal

NOW = 1_800_000_000.0
SECRET = "a-secret-of-32-characters-or-more"
CLAIMS = {part: part for part in "tenant models priority weight rpm tpm concurrency budget".split()}
GOOD = {"sub": "ada", "iss": "https://issuer", "aud": "gateway", "exp": NOW + 60}


def rules(**changes: Any) -> Rules:
    return Rules(ALGORITHMS, "https://issuer", "gateway", 30.0, CLAIMS)._replace(**changes)


@cache
def private(kind: str) -> Any:
    made: dict[str, Any] = {
        "RS256": lambda: rsa.generate_private_key(65537, 2048),
        "RS256 other": lambda: rsa.generate_private_key(65537, 2048),
        "RS256 short": lambda: rsa.generate_private_key(65537, 1024),
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
        "Ed448": ed448.Ed448PrivateKey.generate,
    }
    return made[kind]()


def pem(kind: str) -> bytes:
    found: bytes = private(kind).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return found


def jwk(kind: str, **more: Any) -> dict[str, Any]:
    algorithm = {"RS": jwt.algorithms.RSAAlgorithm, "ES": jwt.algorithms.ECAlgorithm, "Ed": jwt.algorithms.OKPAlgorithm}[
        kind[:2]
    ]
    found: dict[str, Any] = algorithm.to_jwk(private(kind).public_key(), as_dict=True)  # type: ignore[attr-defined]
    return found | more


def jwk_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def token(kind: str = "HS256", kid: str | None = None, headers: dict[str, Any] | None = None, **claims: Any) -> bytes:
    payload = {name: value for name, value in (GOOD | claims).items() if value is not None}
    key = SECRET if kind == "HS256" else private(kind)
    named = ({"kid": kid} if kid is not None else {}) | (headers or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a key that is too short, on purpose
        return jwt.PyJWS().encode(json.dumps(payload).encode(), key, kind.partition(" ")[0], named).encode()


def by_secret(**changes: Any) -> Verifier:
    return Verifier(rules(**changes), [secret_signer(SECRET)])


def refusal(verifier: Verifier, sent: bytes, now: float = NOW) -> str:
    with pytest.raises(GatewayError) as caught:
        verifier.verify(sent, now)
    assert caught.value.body() == auth.invalid("").body()
    return caught.value.detail


@pytest.mark.parametrize("kind", ["RS256", "ES256", "EdDSA"])
@pytest.mark.parametrize("form", ["PEM", "JWK", "set"])
def test_a_public_key_verifies_in_each_of_its_forms(kind: str, form: str) -> None:
    text = {"PEM": pem(kind), "JWK": json.dumps(jwk(kind)).encode(), "set": jwk_set(jwk(kind, kid="1", alg=kind, use="sig"))}
    verifier = Verifier(rules(), read_signers(text[form]))
    assert verifier.verify(token(kind, kid="1"), NOW).id == "jwt:ada"
    assert verifier.verify(token(kind), NOW).id == "jwt:ada"
    assert "not a token" in refusal(verifier, token(kind)[:-4] + b"AAAA")


def test_claims_make_the_principal() -> None:
    claims: Any = {
        "tenant": "acme",
        "models": ["m-*"],
        "priority": "batch",
        "weight": 2,
        "rpm": 60,
        "tpm": 1000,
        "concurrency": 3,
    }
    found = by_secret().verify(token(**claims, budget="10 tokens/day"), NOW)
    assert found == Principal(
        key="jwt:ada",
        id="jwt:ada",
        tenant="acme",
        models=("m-*",),
        priority=2,
        weight=2.0,
        limits=Limits(60, 1000, 3, Budget(10, "tokens", "day")),
        expires=NOW + 90,
    )
    assert by_secret().verify(token(), NOW) == Principal(key="jwt:ada", id="jwt:ada", tenant="ada", expires=NOW + 90)
    assert by_secret().verify(token(models="a b-*"), NOW).models == ("a", "b-*")


def test_a_claim_may_have_another_name_and_admin_must() -> None:
    named = rules(claims={"tenant": "https://x/org", "admin": "root"})
    verifier = Verifier(named, [secret_signer(SECRET)])
    other: Any = {"https://x/org": "acme"}
    found = verifier.verify(token(root=True, **other), NOW)
    assert (found.tenant, found.admin) == ("acme", True)
    assert not by_secret().verify(token(admin=True), NOW).admin


@pytest.mark.parametrize(
    "claims",
    [
        {"tenant": 5},
        {"tenant": "a\nb"},
        {"tenant": "x" * 257},
        {"sub": None},
        {"sub": ["ada"]},
        {"models": 5},
        {"models": [5]},
        {"priority": "urgent"},
        {"rpm": -1},
        {"rpm": "many"},
        {"budget": 5},
    ],
)
def test_a_claim_of_another_form_gives_no_rights(claims: dict[str, Any]) -> None:
    assert "a claim of the token" in refusal(by_secret(), token(**claims))


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"exp": None}, "has no exp"),
        ({"exp": "never"}, "has no exp"),
        ({"exp": True}, "has no exp"),
        ({"exp": 10**30}, "has no exp"),
        ({"exp": NOW - 30}, "has expired"),
        ({"nbf": NOW + 31}, "not valid yet"),
        ({"nbf": "soon"}, "not valid yet"),
        ({"iss": None}, "another issuer"),
        ({"iss": "https://issuer/"}, "another issuer"),
        ({"iss": ["https://issuer"]}, "another issuer"),
        ({"aud": None}, "another audience"),
        ({"aud": "gateway2"}, "another audience"),
        ({"aud": ["a", "b"]}, "another audience"),
        ({"aud": {"gateway": 1}}, "another audience"),
    ],
)
def test_a_token_must_be_for_us_from_our_issuer_and_for_now(claims: dict[str, Any], why: str) -> None:
    assert why in refusal(by_secret(), token(**claims))


def test_clocks_may_differ_by_the_leeway() -> None:
    assert by_secret().verify(token(exp=NOW - 29, nbf=NOW + 29), NOW)
    assert "expired" in refusal(by_secret(leeway=0.0), token(exp=NOW))
    assert by_secret().verify(token(aud=["a", "gateway"]), NOW)


def test_without_an_audience_of_our_own_a_token_for_others_is_refused() -> None:
    assert by_secret(audience=None, issuer=None).verify(token(aud=None, iss=None), NOW)
    assert "another audience" in refusal(by_secret(audience=None), token())


def test_an_algorithm_that_is_not_allowed_is_refused() -> None:
    assert "algorithm" in refusal(by_secret(algorithms=["RS256"]), token())


def test_a_key_is_found_by_its_kid() -> None:
    verifier = Verifier(rules(), read_signers(jwk_set(jwk("RS256", kid="1"), jwk("RS256 other", kid="2"))))
    assert verifier.verify(token("RS256", "1"), NOW)
    assert verifier.verify(token("RS256 other", "2"), NOW)
    assert "not a token" in refusal(verifier, token("RS256", "2"))
    assert "which key" in refusal(verifier, token("RS256"))
    with pytest.raises(UnknownSigner):
        verifier.verify(token("RS256", "3"), NOW)


def test_without_a_kid_the_algorithm_tells_which_key_is_meant() -> None:
    verifier = Verifier(rules(), read_signers(jwk_set(jwk("RS256", kid="1"), jwk("ES256", kid="2"))))
    assert verifier.verify(token("RS256"), NOW)
    assert verifier.verify(token("ES256"), NOW)


def test_keys_of_a_set_that_are_no_use_are_passed_over() -> None:
    useless = [
        jwk("RS256", use="enc"),
        jwk("RS256 short"),
        jwk("ES384"),
        jwk("Ed448"),
        jwk("RS256", alg="RS512"),
        jwk("RS256", kid=5),
        {"kty": "oct", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U"},
        {"kty": "RSA", "n": "!", "e": "AQAB"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "new"},
        {"kty": ["RSA"]},
        {},
    ]
    assert [one.kid for one in read_signers(jwk_set(*useless, jwk("ES256", kid="good")))] == ["good"]
    with pytest.raises(ValueError, match="it has no public key"):
        read_signers(jwk_set(*useless))


@pytest.mark.parametrize("text", [b"", b"no key", b"{", b'{"keys": 1}', b'{"keys": [1]}', b"[]", b"\xff", jwk_set(*[{}] * 101)])
def test_what_is_no_key_is_refused_in_words(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it "):
        read_signers(text)


@pytest.mark.parametrize("kind", ["RS256 short", "ES384", "Ed448"])
def test_a_key_of_another_kind_is_refused_in_words(kind: str) -> None:
    with pytest.raises(ValueError, match="of another kind"):
        read_signers(pem(kind))


def test_new_signing_keys_are_told_from_the_same_ones() -> None:
    verifier = Verifier(rules(), ())
    assert verifier.use(jwk_set(jwk("ES256", kid="1")))
    assert not verifier.use(jwk_set(jwk("ES256", kid="1")))
    assert verifier.use(jwk_set(jwk("ES256", kid="2")))
    with pytest.raises(ValueError, match="no public key"):
        verifier.use(jwk_set())
    assert [one.kid for one in verifier.signers] == ["2"]


# --- what is remembered


class Counting(Verifier):
    verified = 0

    def verify(self, token: bytes, now: float) -> Principal:
        self.verified += 1
        return super().verify(token, now)


def identify(known: Auth, sent: bytes, now: float = NOW) -> Principal:
    pairs = [(b"authorization", b"Bearer " + sent)]
    return known.identify(dict(pairs), pairs, now)


def test_a_token_is_verified_once_until_it_expires_or_other_keys_sign() -> None:
    verifier = Counting(rules(), [secret_signer(SECRET)])
    known, sent = Auth(verifier), token()
    assert identify(known, sent) is identify(known, sent)
    assert verifier.verified == 1
    with pytest.raises(GatewayError):
        identify(known, sent, NOW + 90)
    assert not known._tokens
    identify(known, sent)
    known.forget_tokens()
    identify(known, sent)
    assert verifier.verified == 3


def test_a_bounded_number_of_tokens_is_remembered_and_none_of_them_as_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_TOKENS", 3)
    known = Auth(by_secret())
    sent = [token(sub=f"user{number}") for number in range(5)]
    for one in sent:
        identify(known, one)
    assert [principal.id for principal in known._tokens.values()] == ["jwt:user2", "jwt:user3", "jwt:user4"]
    assert {len(key) for key in known._tokens} == {32}


@given(
    st.binary(max_size=100) | st.from_regex(rb"[A-Za-z0-9_-]{1,40}\.[A-Za-z0-9_-]{1,40}\.[A-Za-z0-9_-]{0,40}", fullmatch=True)
)
def test_whatever_is_sent_is_refused_alike(sent: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        by_secret().verify(sent, NOW)
    assert caught.value.body() == auth.invalid("").body()


@given(
    st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "jku", "x5u"]),
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=4), max_size=2),
    ),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4),
)
def test_whatever_a_header_says_is_no_way_in(header: dict[str, Any], payload: Any) -> None:
    sent = b".".join(jwt.utils.base64url_encode(json.dumps(part).encode()) for part in (header, payload)) + b".AAAA"
    with pytest.raises(GatewayError):
        by_secret().verify(sent, NOW)
