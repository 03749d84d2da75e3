"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered. `status`: of HTTP; `param`: the field at fault; `code`: for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent, also in the middle of a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": _sendable(self.message), "type": kind, "param": self.param and _sendable(self.param), "code": self.code}
        }

    def response(self) -> Response:
        """The whole answer."""
        return Response(orjson.dumps(self.body()), self.status, self.headers, "application/json")


def of_validation(errors: Sequence[Mapping[str, Any]], fields: Collection[str]) -> ApiError:
    """The first of pydantic's errors in words; `fields`: those that there are."""
    first = errors[0]
    where = [str(part) for part in first.get("loc", ()) if part != "body"]
    param = where[0] if where else None
    if first.get("type") == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}", code="invalid_json")
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent with `Content-Type: application/json`", code="invalid_json")
    if first.get("type") == "extra_forbidden":
        near = difflib.get_close_matches(param, fields, 1)
        hint = f"did you mean `{near[0]}`?" if near else "leave it out"
        return ApiError(400, f"{param[:80]}: no such field, and to ignore it could change the answer; {hint}", param[:80], "unknown_field")
    message = str(first.get("msg", "not allowed")).removeprefix("Value error, ")
    return ApiError(400, f"{'.'.join(where)[:200]}: {message}", param, "invalid_value")


def _sendable(text: str) -> str:
    """Half of a surrogate pair is a character of JSON but not of UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
