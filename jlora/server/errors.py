"""Errors as HTTP answers in OpenAI's shape: {"error": {message, type, param, code}}."""

from typing import Any

import pydantic_core
from starlette.responses import Response

from jlora.errors import (
    AdapterError,
    AdapterNotFound,
    ConflictError,
    JloraError,
    UnknownModelError,
)

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class HttpError(JloraError):
    """A request that is refused with a status of its own."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param


def to_json(value: Any) -> bytes:
    return pydantic_core.to_json(value)


class Json(Response):
    """JSON, compact, as UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_body(
    status: int, message: str, param: str | None, kind: str | None = None
) -> dict[str, Any]:
    error = {"message": message, "type": kind or TYPES.get(status, "BadRequestError")}
    return {"error": {**error, "param": param, "code": status}}


def status_of(error: JloraError) -> int:
    """The HTTP status of a user's mistake."""
    if isinstance(error, HttpError):
        return error.status
    if isinstance(error, UnknownModelError | AdapterNotFound):
        return 404
    return 409 if isinstance(error, ConflictError) else 400


def answer(error: JloraError, adapter_field: str | None = None) -> Json:
    """The HTTP answer to a user's mistake. `adapter_field` is what names an adapter on this route."""
    status = status_of(error)
    param = getattr(error, "param", None)
    kind = None
    if param is None and isinstance(error, AdapterError | ConflictError):
        param = adapter_field
    if isinstance(error, UnknownModelError):
        param = adapter_field or "model"
    elif isinstance(error, AdapterError) and status == 400:
        kind = "InvalidUserInput"
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return Json(error_body(status, str(error), param, kind), status_code=status, headers=headers)
