"""Every error that jlora raises for a user's mistake.

JloraError (ValueError)
├── ParameterError      a request or flag value is wrong; `param` names it      -> HTTP 400
├── ModelError          a base checkpoint cannot be served as it is             -> exit with one line
├── AdapterError        an adapter folder is broken or holds what we refuse     -> HTTP 400
│   └── AdapterNotFound the folder is not there                                 -> HTTP 404
├── ConflictError       it cannot be done in the state that things are in       -> HTTP 409
└── UnknownModelError   no served model or adapter has this name                -> HTTP 404

The message is one line that says what was wrong, what was got and what would be right.
"""


class JloraError(ValueError):
    """Base of all errors that a user can cause; `str(error)` is fit to be shown to that user."""


class ParameterError(JloraError):
    """A parameter has a wrong value. `param` is its name as the user wrote it."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class ModelError(JloraError):
    """A base checkpoint is missing, malformed or of an architecture that is not supported."""


class AdapterError(JloraError):
    """An adapter is malformed, does not fit the base model or uses a feature that is refused.
    `param` is the field of a request that it is about, where that is known."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class AdapterNotFound(AdapterError):
    """There is no adapter at the path that was given."""


class ConflictError(JloraError):
    """The state of things forbids it: another adapter is merged into the base, for instance."""


class UnknownModelError(JloraError):
    """A request named a model that is neither the base model nor a known adapter."""
