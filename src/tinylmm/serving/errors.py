"""What a client is told when its request fails, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP's.
        message: what is wrong, and what to do.
        param: the field at fault, such as `messages[1].content`.
        code: a word for programs.
        headers: sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """The reply's JSON."""
        return {"error": {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}}


def wrong(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """The request is at fault."""
    return ApiError(400, message, param, code)


def _kind(status: int) -> str:
    named = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return named.get(status, "server_error" if status >= 500 else "invalid_request_error")
