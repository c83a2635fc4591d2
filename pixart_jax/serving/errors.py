"""Errors as OpenAI's API words them: {"error": {message, type, param, code}} under a status."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from pixart_jax.errors import UserError
from pixart_jax.serving.engine import BatchFailed, Unavailable
from pixart_jax.serving.offer import Refused

LOG = logging.getLogger("pixart_jax.serving")
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class ApiError(Exception):
    """An answer that is an error. param: the request's field. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code or _CODES.get(status), param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def as_api_error(error: Exception, request_id: str = "") -> ApiError:
    """The answer to any exception; one that is no answer is logged under the request's id, and its
    text is not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        return ApiError(400, str(error), error.code, error.param)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, Unavailable):
        status = 429 if error.reason == "queue_full" else 503
        return ApiError(status, str(error), error.reason, retry_after=error.retry_after)
    request_id = request_id or uuid.uuid4().hex
    cause = None if isinstance(error, BatchFailed) else error
    LOG.error("request %s failed", request_id, exc_info=cause)
    return ApiError(
        500, f"internal error; the server's log has it as {request_id}", "internal_error"
    )
