"""Every error this project raises on purpose.

CosError
 +- ConfigError            a bad configuration, model file or machine: the CLI prints it, exits 2
 +- RequestError           the client's fault: HTTP 400 (or `status`), names the field
 |   +- UnsupportedParameter
 |   +- ContextLengthExceeded
 |   +- ModelNotFound      404
 +- RateLimited            too many requests or tokens of one client or all: HTTP 429
 +- EngineError            the server's fault
     +- EngineOverloaded   the waiting queue is full: HTTP 429
     +- EngineDraining     shutting down, or not started yet: HTTP 503
     +- RequestTimeout     a request took longer than allowed: HTTP 504
     +- EngineDead         the engine thread has failed: HTTP 500, /health turns red
     +- GenerationFailed   one request's data broke (NaN logits, say): HTTP 500, that request only
"""

from __future__ import annotations


class CosError(Exception):
    """Root of the tree; `str()` is one clear line."""


class ConfigError(CosError):
    """The server cannot start with this configuration, these models or this machine."""


class RequestError(CosError):
    """The request cannot be served as it is.

    Attributes:
        status: HTTP status.
        param: dotted path of the offending field, or None.
        code: machine-readable code of the OpenAI envelope, or None.
    """

    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnsupportedParameter(RequestError):
    """A field that would change the text and that this server does not implement."""

    def __init__(self, param: str, reason: str = "is not supported by this server") -> None:
        super().__init__(f"{param} {reason}", param=param, code="unsupported_parameter")


class ContextLengthExceeded(RequestError):
    """Prompt and completion do not fit into the shortest context of the models."""

    def __init__(self, num_prompt: int, max_length: int, param: str = "prompt") -> None:
        super().__init__(
            f"this server's maximum context length is {max_length} tokens, "
            f"but {param} alone has {num_prompt}; at least one token must be left to generate",
            param=param,
            code="context_length_exceeded",
        )


class ModelNotFound(RequestError):
    """The request names a model that is not served."""

    status = 404

    def __init__(self, name: str, served: str) -> None:
        super().__init__(
            f"the model {name[:200]!r} does not exist; this server serves {served!r}",
            param="model",
            code="model_not_found",
        )


class RateLimited(CosError):
    """The request is fine, and would be served later.

    Attributes:
        code: machine-readable code of the OpenAI envelope.
        retry_after: seconds after which to try again.
    """

    def __init__(self, message: str, code: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class EngineError(CosError):
    """The server failed a request that was fine."""


class EngineOverloaded(EngineError):
    """The bounded waiting queue is full; try again later."""


class EngineDraining(EngineError):
    """The server is starting or shutting down."""


class ThreadsBusy(EngineError):
    """Others kept all threads of a kind busy; the request may be fine, and can be tried again."""


class RequestTimeout(EngineError):
    """The request was not finished within the time that requests get."""


class EngineDead(EngineError):
    """The engine thread stopped after an unexpected error."""


class GenerationFailed(EngineError):
    """One sequence cannot go on; the engine and all other sequences can."""
