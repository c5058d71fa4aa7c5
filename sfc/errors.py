"""The one exception for mistakes a user can make and mend."""


class UserError(Exception):
    """Something in the input, the configuration or the machine is wrong, and the user can mend it.

    The message is one line that says what is wrong, where, and what to do. Commands print it to standard error
    and end with exit status 2; library users catch it like any other exception.
    """


class CannotLoadModel(UserError):
    """A model's weights or tokenizer cannot be had, so that nothing can be done with it."""
