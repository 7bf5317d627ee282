"""Exit codes and the one exception that means "the user can mend this"."""

DONE = 0
BUG = 1
USER_ERROR = 2
DONE_WITH_REFUSALS = 3
TO_BE_CONTINUED = 75


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong, where, and how to mend it."""


class Refusal(Exception):
    """One input of a batch that cannot be used, with its reason; the batch goes on without it."""


def nearest(word: str, valid: list[str]) -> str:
    """A hint naming the valid words, the closest one first: ``"did you mean 'x'?"`` or the whole list."""
    import difflib

    close = difflib.get_close_matches(word, valid, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(valid[:12]) + (", ..." if len(valid) > 12 else "")
    return f"valid: {shown}" if valid else "nothing is valid here"
