"""The one exception that is a user's to put right."""


class UserError(ValueError):
    """What the person at the keyboard can put right. Recipes print it on one line and exit with 2."""
