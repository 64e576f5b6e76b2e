"""Who may call what. Every route is denied by default once keys are set."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from deltazip.server.errors import ApiError

__all__ = ["ADMIN_PATHS", "OPEN_PATHS", "Auth", "Caller"]

OPEN_PATHS = frozenset({"/health", "/health/live"})
ADMIN_PATHS = frozenset({"/v1/load_variant", "/v1/unload_variant"})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request; `key_id` tells keys apart and is not a key."""

    is_admin: bool = False
    key_id: str = ""


class Auth:
    """Checks the bearer token of each request against the keys, in constant time."""

    def __init__(self, api_keys: Sequence[str], admin_key: str) -> None:
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._admin = _digest(admin_key.encode()) if admin_key else None

    def check(self, path: str, authorization: bytes | None) -> Caller:
        """Who calls.

        Args:
            path: the request's path.
            authorization: the Authorization header as it came, None if there was none.

        Raises:
            ApiError: 401 without a good key, 403 for what this key may not do.
        """
        if path in OPEN_PATHS:
            return Caller()
        scheme, _, token = (authorization or b"").partition(b" ")
        given = _digest(token.strip()) if scheme.lower() == b"bearer" else b""
        # Every key is compared, so that time does not tell which one was near.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        is_admin = self._admin is not None and hmac.compare_digest(given, self._admin)
        if path.rstrip("/") in ADMIN_PATHS:
            if self._admin is None:
                raise ApiError(
                    403, "loading at run time is off; the server has no admin key", code="disabled"
                )
            if not is_admin:
                status = 403 if any(matches) else 401
                raise ApiError(
                    status,
                    "this needs the admin key",
                    code="invalid_api_key",
                    headers=_challenge(status),
                )
        elif self._keys and not (any(matches) or is_admin):
            message = (
                "expected 'Authorization: Bearer KEY'" if not given else "the API key is not known"
            )
            raise ApiError(401, message, code="invalid_api_key", headers=_challenge(401))
        return Caller(is_admin, given.hex()[:16] if any(matches) or is_admin else "")


def _challenge(status: int) -> dict[str, str]:
    return {"WWW-Authenticate": "Bearer"} if status == 401 else {}
