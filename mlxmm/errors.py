"""The exceptions that are a user's to put right."""


class UserError(ValueError):
    """What the person at the keyboard can put right. Recipes print it on one line and exit with 2."""


class BackendError(ImportError):
    """MLX is there, but not the backend that it computes with; the message says what to install."""
