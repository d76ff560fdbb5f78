"""What a request is told when it cannot be answered, in the form of OpenAI's errors."""

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is not answered. `status` is the answer's, `param` the field at fault, `code` a short name."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(message: str) -> RequestError:
    return RequestError(403, message, code="not_allowed")


def too_large(what: str, found: float, limit: float, param: str | None = None) -> RequestError:
    message = f"{what}: {found:.10g}, above this server's limit of {limit:.10g}."
    return RequestError(413, message, param, code="too_large")
